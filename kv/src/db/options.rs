//! How a database is opened.

use std::time::Duration;

use pumice_blobfs::fs;
use rocksdb::{ColumnFamilyTtl, DBRecoveryMode, Options};

#[cfg(feature = "inspect")]
use crate::inspect::Look;
use crate::{EnvOptions, Error, MountOptions};

mod opening;

/// Options of opening a [`Db`](crate::Db).
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
/// use pumice::rocksdb::{Options, WriteOptions};
///
/// let mut events = Options::default();
/// events.set_enable_blob_files(true);
/// let db = pumice::DbOptions::new()
///     .path("/orders")
///     .configure(|options| options.set_write_buffer_size(32 << 20))
///     .column_family("events", events)
///     .open(&device)?;
///
/// let mut sync = WriteOptions::default();
/// sync.set_sync(true);
/// let events = db.cf_handle("events").ok_or("no such column family")?;
/// db.put_cf_opt(&events, b"1", b"shipped", &sync)?;
/// # drop(events);
/// # db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DbOptions {
    pub(crate) path: String,
    options: Options,
    /// Options from which others were derived by a text, and whose comparators and filters those use.
    sources: Vec<Options>,
    column_families: Vec<(String, Options)>,
    ttl: Option<Duration>,
    column_family_ttls: Vec<(String, ColumnFamilyTtl)>,
    async_threads: usize,
    async_queue: usize,
    read_only: bool,
    /// Whether the options that the database has recorded take the place of these.
    as_recorded: bool,
    wal_recovery: Option<DBRecoveryMode>,
    mount: MountOptions,
    pub(crate) env: EnvOptions,
    #[cfg(feature = "inspect")]
    look: Look,
}

impl Default for DbOptions {
    fn default() -> Self {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // By default RocksDB keeps a thousand info logs, one of each opening, and a file takes a
        // cluster.
        options.set_keep_log_file_num(10);
        if let Some(bytes) = memtable_bytes(fs::Memory::of_this_process().map(|m| m.limit_bytes)) {
            options.set_write_buffer_size(bytes);
        }
        DbOptions {
            path: "/".to_owned(),
            options,
            sources: Vec::new(),
            column_families: Vec::new(),
            ttl: None,
            column_family_ttls: Vec::new(),
            async_threads: 4,
            async_queue: 256,
            read_only: false,
            as_recorded: false,
            wal_recovery: None,
            mount: MountOptions::default(),
            env: EnvOptions::default(),
            #[cfg(feature = "inspect")]
            look: Look::default(),
        }
    }
}

/// The size of a memtable where RocksDB's default of 64 MiB, two of them, is too much for the memory that
/// the process may use: a sixteenth of that, at least 4 MiB.
fn memtable_bytes(limit_bytes: Option<u64>) -> Option<usize> {
    let bytes = (limit_bytes? / 16).max(4 << 20);
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes < 64 << 20)
}

impl std::fmt::Debug for DbOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self
            .column_families
            .iter()
            .map(|(name, _)| &name[..])
            .collect();
        f.debug_struct("DbOptions")
            .field("path", &self.path)
            .field("column_families", &names)
            .field("ttl", &self.ttl)
            .field("read_only", &self.read_only)
            .field("as_recorded", &self.as_recorded)
            .field("mount", &self.mount)
            .field("env", &self.env)
            .finish_non_exhaustive()
    }
}

impl DbOptions {
    /// Opens the database at `/`, made if it does not exist, with RocksDB's defaults, except that ten of
    /// its info logs are kept and not a thousand, and that a memtable takes at most a sixteenth of
    /// the memory that this process may use.
    #[must_use]
    pub fn new() -> DbOptions {
        DbOptions::default()
    }

    /// Sets the directory of the database in the file system, which several databases may share.
    /// The default is `/`.
    #[must_use]
    pub fn path(mut self, path: &str) -> DbOptions {
        path.clone_into(&mut self.path);
        self
    }

    /// Replaces RocksDB's options. Opening sets their environment.
    #[must_use]
    pub fn rocksdb(mut self, options: Options) -> DbOptions {
        self.options = options;
        self
    }

    /// Changes RocksDB's options.
    #[must_use]
    pub fn configure(mut self, change: impl FnOnce(&mut Options)) -> DbOptions {
        change(&mut self.options);
        self
    }

    /// Sets the options of one column family, which is created if it does not exist. Existing
    /// families that are not named here are opened with the database's options.
    #[must_use]
    pub fn column_family(mut self, name: &str, options: Options) -> DbOptions {
        self.column_families.retain(|(known, _)| known != name);
        self.column_families.push((name.to_owned(), options));
        self
    }

    /// Changes RocksDB's options by a text of RocksDB's form, such as
    /// `max_open_files=100;compression=kNoCompression;block_based_table_factory={block_size=16384}`.
    ///
    /// ```
    /// # use pumice::{DbOptions, ErrorKind};
    /// let options = DbOptions::new().options_string("max_open_files=100;compression=kNoCompression")?;
    /// options.open("malloc://256M")?.close()?;
    ///
    /// let error = DbOptions::new().options_string("max_open_flies=100").unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InvalidInput);
    /// assert!(error.to_string().contains("max_open_flies"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Options`], which names an option that does not exist or has a bad value. Of a group in braces RocksDB names the
    /// group, and the text is there, too.
    pub fn options_string(mut self, text: &str) -> Result<DbOptions, Error> {
        let source = self.options;
        self.options = derived(&source, text)?;
        self.sources.push(source);
        Ok(self)
    }

    /// Changes the options of one column family as [`DbOptions::options_string`] changes the database's. A family that has no
    /// options of its own yet begins with the database's.
    ///
    /// # Errors
    /// Fails as [`DbOptions::options_string`] does.
    pub fn column_family_string(mut self, name: &str, text: &str) -> Result<DbOptions, Error> {
        let own = self.column_families.iter().find(|(known, _)| known == name);
        let source = own.map_or(&self.options, |(_, options)| options).clone();
        let options = derived(&source, text)?;
        self.sources.push(source);
        Ok(self.column_family(name, options))
    }

    /// Lets entries expire: compactions remove them when they are older than this, which is between a second and 68 years.
    /// Until then they can still be read. RocksDB writes the time behind each value, and a database that was made with a time
    /// to live must always be opened with one: otherwise every value has four more bytes. Families that
    /// [`Db::create_cf`](crate::Db::create_cf) makes do not expire until the database is opened again.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let day = Duration::from_secs(24 * 60 * 60);
    /// let db = pumice::DbOptions::new().ttl(day).open("malloc://256M")?;
    /// db.put(b"session", b"open")?;
    /// assert_eq!(db.get(b"session")?.as_deref(), Some(&b"open"[..]));
    /// db.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> DbOptions {
        self.ttl = Some(ttl);
        self
    }

    /// Sets the time to live of one column family where it is not the one of [`DbOptions::ttl`], which must be set, too.
    #[must_use]
    pub fn column_family_ttl(mut self, name: &str, ttl: ColumnFamilyTtl) -> DbOptions {
        self.column_family_ttls.retain(|(known, _)| known != name);
        self.column_family_ttls.push((name.to_owned(), ttl));
        self
    }

    /// Sets how many threads do the operations of futures ([`Db::run_async`](crate::Db::run_async)). They start when they are
    /// first needed. The default is four, and the least is one.
    #[must_use]
    pub fn async_threads(mut self, threads: usize) -> DbOptions {
        self.async_threads = threads.max(1);
        self
    }

    /// Sets how many operations of futures may be in the queue, beside those that threads are doing. A future that finds it full
    /// waits. The default is 256, and the least is one.
    #[must_use]
    pub fn async_queue(mut self, operations: usize) -> DbOptions {
        self.async_queue = operations.max(1);
        self
    }

    /// Refuses writes. Nothing is created, neither an image nor a file system nor a database.
    /// [`DbOptions::open`] then opens the device for reading only and writes nothing to it.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> DbOptions {
        self.read_only = read_only;
        self
    }

    /// Opens an existing database as a tool does that does not know the options of the database's program: with those that
    /// its newest `OPTIONS` file has, for every column family, as RocksDB's `ldb --try_load_options` does. There is no
    /// automatic compaction, since a compaction filter or merge operator of the program may be missing, and the content of
    /// that file stays the newest. Without such a file the options that were set here are used.
    ///
    /// Opening for writing is refused, and changes nothing, if the database's log has what RocksDB cannot read without its
    /// program, such as a merge whose operator is missing: RocksDB would remove it with all that follows it.
    /// [`DbOptions::wal_recovery_mode`] sets another mode for that.
    ///
    /// ```
    /// # use pumice::{DbOptions, MountOptions, RecordedOptions};
    /// let fs = pumice::mount("malloc://256M", &MountOptions::new())?;
    /// let db = DbOptions::new().configure(|options| options.set_num_levels(4)).open_in(&fs)?;
    /// db.close()?;
    /// let db = DbOptions::new().try_load_options().open_in(&fs)?;
    /// db.put(b"key", b"value")?;
    /// db.close()?;
    /// let recorded = RecordedOptions::of(&fs, "/")?.ok_or("no options")?;
    /// assert!(recorded.text().contains("num_levels=4"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn try_load_options(mut self) -> DbOptions {
        self.as_recorded = true;
        self
    }

    /// Sets what opening does about damage in the write-ahead log, whatever the other options say.
    #[must_use]
    pub fn wal_recovery_mode(mut self, mode: DBRecoveryMode) -> DbOptions {
        self.wal_recovery = Some(mode);
        self
    }

    /// Sets how [`DbOptions::open`] mounts.
    #[must_use]
    pub fn mount(mut self, mount: MountOptions) -> DbOptions {
        self.mount = mount;
        self
    }

    /// Sets how RocksDB uses the file system. [`DbOptions::path`] sets the root.
    #[must_use]
    pub fn env(mut self, env: EnvOptions) -> DbOptions {
        self.env = env;
        self
    }

    /// While the database is open, the process answers questions about it on the socket `path`: `pumice df`, `ls` and
    /// `stat` ask there when they find the device in use, `pumice top` shows what the process does, and any client of
    /// JSON-RPC can ask (`pumice rpc`). The socket has mode 0600, nothing can be changed through it, and closing
    /// removes it. Of several databases that share a device, the one that mounts it decides whether its operations are
    /// counted one by one: without this option or [`DbOptions::metrics`] there are no latencies and no channels. Needs the
    /// feature `inspect`.
    #[cfg(feature = "inspect")]
    #[must_use]
    pub fn rpc_socket(mut self, path: impl Into<std::path::PathBuf>) -> DbOptions {
        self.look.rpc_socket = Some(path.into());
        self
    }

    /// While the database is open, its figures, the file system's and the device's are served as text for Prometheus on
    /// `address`: the path of a Unix socket, or a loopback address (`127.0.0.1:9100`). Needs the feature `inspect`.
    #[cfg(feature = "inspect")]
    #[must_use]
    pub fn metrics(mut self, address: &str) -> DbOptions {
        self.look.metrics = Some(address.to_owned());
        self
    }
}

/// Returns options that a text has changed. RocksDB copies the pointers to comparators and filters, which `source` owns.
fn derived(source: &Options, text: &str) -> Result<Options, Error> {
    source
        .clone()
        .get_options_from_string(text)
        .map_err(|error| Error::Options {
            reason: format!("{error} (in {text:?})"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memtables_follow_the_limit_of_memory() {
        let mib = |n: u64| Some(n << 20);
        let cases = [
            (16, Some(4)),
            (128, Some(8)),
            (1000, Some(62)),
            (1024, None),
            (64 << 10, None),
        ];
        for (limit, want) in cases {
            let bytes = memtable_bytes(mib(limit)).map(|bytes| bytes >> 20);
            assert_eq!(bytes, want, "{limit} MiB");
        }
        assert_eq!(memtable_bytes(None), None);
    }
}
