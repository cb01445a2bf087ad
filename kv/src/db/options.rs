//! How a database is opened.

use std::sync::{Arc, Mutex};

use pumice_blobfs::fs::{self, FileSystem};
use pumice_rocksdb_fs::{Use, normal, open_device};
use rocksdb::{ColumnFamilyDescriptor, DBRecoveryMode, Options};

use super::{Db, Rocks};
use crate::closing::Closing;
use crate::copies;
use crate::error::is_no_space;
#[cfg(feature = "inspect")]
use crate::inspect::{Look, Registry};
use crate::recorded::{Kept, RecordedOptions};
use crate::{EnvOptions, Error, MountOptions, mount_device};

/// Options of opening a [`Db`].
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
    column_families: Vec<(String, Options)>,
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
            column_families: Vec::new(),
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

    /// Mounts the file system on the device that `uri` names and opens the database in it. A device
    /// that holds nothing is formatted first, unless [`MountOptions::format_empty`] was cleared.
    ///
    /// A process may open several databases of one device this way, each at a
    /// [path](DbOptions::path) of its own. They share one file system, which is mounted with the
    /// options of the first one, and the [`Db::close`] of the last one unmounts it. A file is one
    /// device under all its names, and each namespace of an NVMe controller is a device of its own.
    /// Devices in memory (`malloc://…`) are new each time.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::FileSystem`], [`Error::RocksDb`], [`Error::Full`].
    pub fn open(&self, uri: &str) -> Result<Db, Error> {
        let mut how = self.mount.clone();
        if self.read_only {
            how = how.read_only(true);
        }
        let open = || Ok::<_, Error>(open_device(uri, &how)?);
        let mounted = Use::of(uri, how.is_read_only(), open, |device, counted| {
            #[cfg(feature = "inspect")]
            let device = self.look.counted(device, counted)?;
            #[cfg(not(feature = "inspect"))]
            let _ = counted;
            mount_device(&device, &how)
        })?;
        #[cfg(feature = "inspect")]
        let counted = mounted.counted();
        let fs = mounted.fs().clone();
        let db = self.open_on(fs, Some(mounted))?;
        #[cfg(feature = "inspect")]
        db.inspect(&self.look, counted)?;
        Ok(db)
    }

    /// Opens the database in a mounted file system, which stays mounted.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`], [`Error::Full`].
    pub fn open_in(&self, fs: &FileSystem) -> Result<Db, Error> {
        let db = self.open_on(fs.clone(), None)?;
        #[cfg(feature = "inspect")]
        db.inspect(&self.look, Registry::new())?;
        Ok(db)
    }

    pub(crate) fn open_on(&self, fs: FileSystem, mounted: Option<Use>) -> Result<Db, Error> {
        let root = normal(&self.path)?;
        copies::check_free(&root)?;
        let (env, binding) = self.env.clone().root(&root).build_bound(&fs)?;
        let exists = self.as_recorded && fs.exists(&format!("{root}/CURRENT"))?;
        let recorded = if exists {
            RecordedOptions::of(&fs, &root)?
        } else {
            None
        };
        let wal_recovery = if exists {
            self.check_log(&fs, &root, recorded.as_ref())?
        } else {
            self.wal_recovery
        };
        let (mut options, families) = match &recorded {
            Some(recorded) => {
                let (options, families) = recorded.quiet()?;
                (options, Some(families))
            }
            None => (self.options.clone(), None),
        };
        options.set_env(&env);
        if let Some(mode) = wal_recovery {
            options.set_wal_recovery_mode(mode);
        }
        if exists {
            options.create_if_missing(false);
            options.create_missing_column_families(false);
            options.set_error_if_exists(false);
            options.set_disable_auto_compactions(true);
        }
        if self.read_only {
            // Without this RocksDB makes a missing directory, even to read from it.
            options.create_if_missing(false);
            options.create_missing_column_families(false);
        }
        let opened = match families {
            Some(families) => self.open_recorded(&options, families),
            None => self.open_families(&options),
        };
        let db = opened.map_err(|error| {
            if is_no_space(&error) {
                Error::Full { source: error }
            } else {
                error.into()
            }
        })?;
        let kept = (exists && !self.read_only).then(|| Kept::new(recorded));
        if let Some(kept) = &kept {
            kept.restore(&fs, &root)?;
        }
        Ok(Db {
            db: Some(Arc::new(db)),
            options,
            env,
            binding,
            fs,
            root,
            read_only: self.read_only,
            kept,
            mounted,
            closing: Mutex::new(Closing::Open),
            refused: Mutex::default(),
            #[cfg(feature = "inspect")]
            inspection: Mutex::new(None),
        })
    }

    /// Checks that nothing of the log of an existing database would be left out, and returns the mode of recovery.
    fn check_log(
        &self,
        fs: &FileSystem,
        root: &str,
        recorded: Option<&RecordedOptions>,
    ) -> Result<Option<DBRecoveryMode>, Error> {
        if let Some(logs) = recorded.and_then(RecordedOptions::wal_dir) {
            let path = normal(&format!("{root}/{logs}"))?;
            if !fs.exists(&path)? {
                let reason = "the log of the database is recorded to be there, and nothing is: the database's program names \
                    it from another directory, or it is a copy, whose log is beside its tables; open it with its program; an \
                    empty directory there stands for a log that has nothing"
                    .to_owned();
                return Err(Error::Directory { path, reason });
            }
        }
        if self.read_only || self.wal_recovery.is_some() {
            return Ok(self.wal_recovery);
        }
        // What RocksDB cannot read of a log when it opens for writing, it removes. Reading changes nothing.
        let strict = DBRecoveryMode::TolerateCorruptedTailRecords;
        let reading = self.clone().read_only(true).wal_recovery_mode(strict);
        drop(reading.open_on(fs.clone(), None)?);
        Ok(Some(DBRecoveryMode::TolerateCorruptedTailRecords))
    }

    /// Opens with every column family that exists or was requested, the default one by its name, so
    /// that the handles are the same the first time and later.
    fn open_families(&self, options: &Options) -> Result<Rocks, rocksdb::Error> {
        let mut families = self.column_families.clone();
        // A database that does not exist has none. Opening reports other errors.
        let found = Rocks::list_cf(options, "/").unwrap_or_default();
        for name in found.into_iter().chain(["default".to_owned()]) {
            if !families.iter().any(|(known, _)| *known == name) {
                families.push((name, options.clone()));
            }
        }
        if self.read_only {
            Rocks::open_cf_with_opts_for_read_only(options, "/", families, false)
        } else {
            Rocks::open_cf_with_opts(options, "/", families)
        }
    }

    /// Opens with the column families that exist, each with its recorded options if it has some.
    fn open_recorded(
        &self,
        options: &Options,
        mut families: Vec<ColumnFamilyDescriptor>,
    ) -> Result<Rocks, rocksdb::Error> {
        if let Ok(found) = Rocks::list_cf(options, "/") {
            families.retain(|family| found.iter().any(|name| name == family.name()));
            for name in found {
                if !families.iter().any(|family| family.name() == name) {
                    families.push(ColumnFamilyDescriptor::new(name, options.clone()));
                }
            }
        }
        if self.read_only {
            Rocks::open_cf_descriptors_read_only(options, "/", families, false)
        } else {
            Rocks::open_cf_descriptors(options, "/", families)
        }
    }

    /// Deletes the database's files.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn destroy_in(&self, fs: &FileSystem) -> Result<(), Error> {
        let env = self.env.clone().root(&self.path).build(fs)?;
        let mut options = self.options.clone();
        options.set_env(&env);
        Ok(Rocks::destroy(&options, "/")?)
    }
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
