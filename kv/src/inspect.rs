//! Inspection of a running process's file system and database: JSON-RPC on a socket, and figures
//! for Prometheus.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use pumice_bdev::registry::Bdev;
pub(crate) use pumice_bdev::registry::Registry;
use pumice_bdev::stats::bucket_end;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_control::config::{App, MethodError};
use pumice_bdev_control::metrics::{self, MetricsServer};
use pumice_bdev_control::rpc::{RpcServer, ServerOptions};
use pumice_blobfs::fs::{FileSystem, FsError, Stat};
use pumice_io::sys::Clock;
use serde_json::{Map, Value, json};

use crate::figures::Numbers;
use crate::handle::Rocks;
use crate::{Error, figures};

/// The methods that a process answers beside the reading methods of the block devices.
const METHODS: &[&str] = &[
    "pumice_get_file",
    "pumice_get_files",
    "pumice_get_stats",
    "pumice_get_statfs",
];

/// Answers questions about a mounted file system while it lives. `pumice df`, `ls` and `stat` ask
/// it when the process has the device, and `pumice top` shows its figures.
/// [`DbOptions::rpc_socket`](crate::DbOptions::rpc_socket) and
/// [`DbOptions::metrics`](crate::DbOptions::metrics) start one with a database. This type is for
/// programs that use the `rocksdb` crate, or no database.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let socket = dir.path().join("rpc.sock");
/// let fs = pumice::mount("malloc://64M", &pumice::MountOptions::new())?;
/// let inspection = pumice::Inspection::new(&fs).rpc_socket(&socket)?;
/// // `pumice top SOCKET` shows what the process does, until:
/// drop(inspection);
/// # assert!(!socket.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// No method changes anything. The sockets are private: no user except root and the owner can
/// connect. Figures on a loopback address can be read by every user of the machine.
#[derive(Debug)]
pub struct Inspection {
    app: Arc<App>,
    subject: Subject,
    rpc: Option<RpcServer>,
    metrics: Option<MetricsServer>,
    /// The process whose threads serve.
    pid: u32,
}

/// The options of `DbOptions` for inspection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    pub(crate) rpc_socket: Option<PathBuf>,
    pub(crate) metrics: Option<String>,
}

impl Look {
    /// Returns the device to mount. If the process may be inspected, it is registered, and what is
    /// done to it is counted.
    pub(crate) fn counted(
        &self,
        device: Arc<dyn BlockDevice>,
        registry: &Registry,
    ) -> Result<Arc<dyn BlockDevice>, Error> {
        if self.rpc_socket.is_none() && self.metrics.is_none() {
            return Ok(device);
        }
        let uri = device.info().name.clone();
        let bdev = registry.register(device, Vec::new());
        let bdev = bdev.map_err(|source| Error::Device { uri, source })?;
        bdev.enable_histogram(true, None);
        Ok(Arc::new(bdev))
    }

    pub(crate) fn start(
        &self,
        fs: &FileSystem,
        db: Weak<dyn Numbers>,
        counted: Registry,
    ) -> Result<Option<Inspection>, Error> {
        if self.rpc_socket.is_none() && self.metrics.is_none() {
            return Ok(None);
        }
        let mut inspection = Inspection::with(fs, db, counted);
        if let Some(path) = &self.rpc_socket {
            inspection = inspection.rpc_socket(path)?;
        }
        if let Some(address) = &self.metrics {
            inspection = inspection.metrics(address)?;
        }
        Ok(Some(inspection))
    }
}

/// The objects that are inspected.
#[derive(Clone)]
struct Subject {
    fs: FileSystem,
    /// Empty while the database is being closed.
    db: Weak<dyn Numbers>,
    /// The devices with their counters, if opening has put them into a registry.
    app: Weak<App>,
    start: Instant,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Subject").field(&self.fs).finish()
    }
}

impl Inspection {
    /// Makes an inspection of a file system. Nothing listens yet. The device's latencies and queues are counted only with
    /// [`DbOptions`](crate::DbOptions), which open the device.
    #[must_use]
    pub fn new(fs: &FileSystem) -> Inspection {
        Inspection::with(fs, Weak::<Rocks>::new(), Registry::new())
    }

    /// Makes an inspection also of a database, and of the device in the registry.
    pub(crate) fn with(fs: &FileSystem, db: Weak<dyn Numbers>, counted: Registry) -> Inspection {
        let mut app = App::new();
        app.registry = counted;
        let app = Arc::new(app);
        let subject = Subject {
            fs: fs.clone(),
            db,
            app: Arc::downgrade(&app),
            start: Instant::now(),
        };
        let asked = subject.clone();
        app.answer_only(METHODS, move |method, params| asked.answer(method, params));
        Inspection {
            app,
            subject,
            rpc: None,
            metrics: None,
            pid: std::process::id(),
        }
    }

    /// Answers JSON-RPC on the socket `path`, which is made with mode 0600 and removed when this is
    /// dropped.
    ///
    /// # Errors
    /// Fails with [`Error::Listen`] if something else is there, and when the system does.
    pub fn rpc_socket(mut self, path: &Path) -> Result<Inspection, Error> {
        let server = RpcServer::start(Arc::clone(&self.app), path, ServerOptions::default());
        self.rpc = Some(server.map_err(|source| Error::Listen {
            address: path.display().to_string(),
            source,
        })?);
        Ok(self)
    }

    /// Serves the figures as text for Prometheus on `address`: the path of a Unix socket, or a
    /// loopback address (`127.0.0.1:9100`; port 0 is any free port).
    ///
    /// # Errors
    /// Fails with [`Error::Listen`] for an address that is not loopback, if the path is taken, and
    /// when the system does.
    pub fn metrics(mut self, address: &str) -> Result<Inspection, Error> {
        let subject = self.subject.clone();
        let server = MetricsServer::serve(move || subject.prometheus(), address);
        self.metrics = Some(server.map_err(|source| Error::Listen {
            address: address.to_owned(),
            source,
        })?);
        Ok(self)
    }

    /// Returns the port of [`Inspection::metrics`] on a loopback address.
    #[must_use]
    pub fn metrics_port(&self) -> Option<u16> {
        self.metrics.as_ref()?.port()
    }
}

impl Drop for Inspection {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // In a forked child the threads and the sockets are the parent's.
            std::mem::forget((self.rpc.take(), self.metrics.take()));
        }
    }
}

impl Subject {
    fn prometheus(&self) -> String {
        let db = self.db.upgrade();
        let device = self.fs.device_name();
        let mut text = figures::prometheus(device, &self.fs, db.as_deref());
        if let Some(app) = self.app.upgrade() {
            text.push_str(&metrics::render(&app.registry));
        }
        text
    }

    fn answer(&self, method: &str, params: &Value) -> Result<Value, MethodError> {
        let path = || match &params["path"] {
            Value::String(path) => Ok(path.as_str()),
            Value::Null => Ok("/"),
            _ => Err(MethodError::param("path", "a string is needed")),
        };
        match method {
            "pumice_get_stats" => Ok(self.stats()),
            "pumice_get_statfs" => Ok(self.statfs()),
            "pumice_get_file" => {
                let path = path()?;
                Ok(file(path, &self.fs.stat(path).map_err(failed)?))
            }
            "pumice_get_files" => {
                let dir = path()?;
                let entries = self.fs.list(dir).map_err(failed)?;
                let mut files = Vec::new();
                for entry in entries {
                    let path = format!("{}/{}", dir.trim_end_matches('/'), entry.name);
                    match self.fs.stat(&path) {
                        Ok(stat) => files.push(file(&path, &stat)),
                        // It was removed meanwhile.
                        Err(FsError::NotFound { .. }) => {}
                        Err(e) => return Err(failed(e)),
                    }
                }
                Ok(files.into())
            }
            _ => Err(MethodError::param("method", "not one of this process's")),
        }
    }

    fn statfs(&self) -> Value {
        let mut map = Map::new();
        map.insert("device".to_owned(), json!(self.fs.device_name()));
        for (figure, value) in figures::Snapshot::of(&self.fs).figures() {
            map.insert(figure.name.to_owned(), json!(value));
        }
        Value::Object(map)
    }

    fn stats(&self) -> Value {
        let mut rocksdb = Map::new();
        if let Some(db) = self.db.upgrade() {
            for (name, _, value) in figures::of_rocksdb(&*db) {
                rocksdb.insert(name.replace('-', "_"), json!(value));
            }
        }
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        json!({
            "pid": std::process::id(),
            "uptime_ms": milliseconds(self.start.elapsed()),
            "fs": self.statfs(),
            "rocksdb": rocksdb,
            "latency": self.latency(),
            "channels": self.channels(),
        })
    }

    /// Returns the device's latencies since it was opened: pairs of a latency in ns and the number
    /// of operations that took at most that, and more than the pair before. Null if they are not counted.
    fn latency(&self) -> Value {
        let clock = Clock::get();
        let bdevs = self.app.upgrade().map(|app| app.registry.list());
        if bdevs.as_ref().is_none_or(Vec::is_empty) {
            return Value::Null;
        }
        let histogram = bdevs.iter().flatten().find_map(Bdev::histogram);
        histogram
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .filter(|(_, count)| *count > 0)
            .map(|(bucket, count)| json!([clock.to_ns(bucket_end(bucket)), count]))
            .collect()
    }

    /// Returns the queue and the operations of each open channel: one for each thread that reads, and those that
    /// threads share.
    fn channels(&self) -> Value {
        let bdevs = self.app.upgrade().map(|app| app.registry.list());
        let channels = bdevs.iter().flatten().flat_map(|bdev| {
            let queues = bdev.queues();
            let of = move |id: u64| queues.iter().find(|queue| queue.id == id).cloned();
            let stats = bdev.channel_stats();
            stats
                .into_iter()
                .map(move |(id, stats)| (id, of(id), stats))
        });
        channels
            .map(|(id, queue, stats)| {
                let (reads, writes) = (stats.of(OpKind::Read), stats.of(OpKind::Write));
                json!({
                    "id": id,
                    "opened_by": queue.as_ref().map(|queue| &queue.opened_by),
                    "in_flight": queue.as_ref().map_or(0, |queue| queue.in_flight),
                    "reads": reads.ops,
                    "read_bytes": reads.bytes,
                    "writes": writes.ops,
                    "written_bytes": writes.bytes,
                    "flushes": stats.of(OpKind::Flush).ops,
                })
            })
            .collect()
    }
}

fn file(path: &str, stat: &Stat) -> Value {
    let modified = stat.mtime.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "path": path,
        "type": if stat.is_dir { "directory" } else { "file" },
        "length": stat.len,
        "allocated": stat.allocated,
        "links": stat.links,
        "mode": stat.mode.map(|mode| format!("{mode:04o}")),
        "modified_ns": u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX),
        "blob": stat.blob_id.map(|id| id.to_string()),
    })
}

#[expect(clippy::needless_pass_by_value, reason = "it is the end of the error")]
fn failed(error: FsError) -> MethodError {
    MethodError::new(-i64::from(error.errno()), error.to_string())
}
