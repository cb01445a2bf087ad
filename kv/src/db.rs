//! A database and its file system.

use std::ffi::CStr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pumice_blobfs::fs::{FileSystem, FsError};
use pumice_rocksdb_fs::{Binding, Use, chain};
use rocksdb::{
    CStrLike, DBWithThreadMode, DEFAULT_COLUMN_FAMILY_NAME, Env, FlushOptions, MultiThreaded,
    Options,
};

use crate::closing::{Closing, buffers_its_log};
#[cfg(feature = "inspect")]
use crate::inspect::{Inspection, Look, Registry};
use crate::recorded::Kept;
use crate::unlogged::{self, Family, Refused};
use crate::{Error, figures};

mod options;

pub use options::DbOptions;

/// The database type of the `rocksdb` crate that [`Db`] wraps.
pub type Rocks = DBWithThreadMode<MultiThreaded>;

/// A RocksDB database inside a Pumice file system.
///
/// It dereferences to [`rocksdb::DBWithThreadMode`], so reading and writing are that type's: `get`,
/// `put`, `delete`, `merge`, `write` a `WriteBatch`, `iterator`, `snapshot`, `cf_handle`,
/// `create_cf`, `flush`, `compact_range`, `property_value` and the rest. The methods here concern
/// the file system: opening, checkpoints, backups, closing.
///
/// `Send` and `Sync`: threads share it by reference or in an `Arc`, and each drives the device
/// through a queue of its own. This applies to threads of one process: in a forked child an
/// inherited `Db` returns errors, and dropping it there does nothing; see [`FileSystem`].
///
/// ```
/// let dir = tempfile::tempdir()?;
/// let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
///
/// let db = pumice::Db::open(&device)?;
/// db.put(b"fruit", b"apple")?;
/// assert_eq!(db.get(b"fruit")?.as_deref(), Some(&b"apple"[..]));
/// db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Db {
    /// The database, which only the drop takes.
    db: Option<Arc<Rocks>>,
    /// The options of its opening, with its environment.
    options: Options,
    env: Env,
    /// Ends the use of `env`.
    binding: Arc<Binding>,
    pub(crate) fs: FileSystem,
    pub(crate) root: String,
    read_only: bool,
    /// The content of the newest `OPTIONS` file, if this opening must not change it.
    kept: Option<Kept>,
    /// The shared mount, if opening made it or found one of another database.
    mounted: Option<Use>,
    closing: Mutex<Closing>,
    refused: Mutex<Refused>,
    /// Gone when the database is closed.
    #[cfg(feature = "inspect")]
    inspection: Mutex<Option<Inspection>>,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("path", &self.root)
            .finish_non_exhaustive()
    }
}

impl Db {
    /// Opens the database at `/` of the device that `uri` names, creating both if they do not
    /// exist. [`DbOptions::new`] has the choices.
    ///
    /// # Errors
    /// Fails as [`DbOptions::open`] does.
    pub fn open(uri: &str) -> Result<Db, Error> {
        DbOptions::new().open(uri)
    }

    /// The database of the `rocksdb` crate.
    #[must_use]
    pub fn rocksdb(&self) -> &Rocks {
        self.db.as_ref().expect("only the drop takes it")
    }

    /// The file system of the database.
    #[must_use]
    pub fn file_system(&self) -> &FileSystem {
        &self.fs
    }

    /// The environment of the database, whose `/` is the database's directory.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// The database's directory in its file system.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.root
    }

    /// Makes everything written so far durable, closes the database and, if opening mounted the
    /// file system, unmounts that and releases the device. Remaining handles (this one, clones of
    /// its [`Db::env`]) return errors from then on. The directory, or the device, can be opened
    /// again at once. Dropping does the same, and reports errors to `tracing` only. A second call
    /// does nothing.
    ///
    /// What was put without a log is written to tables, also with RocksDB's option
    /// `avoid_flush_during_shutdown`.
    ///
    /// # Errors
    /// [`Error::RocksDb`], [`Error::FileSystem`], [`Error::Unlogged`]: nothing is lost, the
    /// database stays as usable as the fault allows, and `close` can be called again when the fault
    /// has passed. Only what has no log may be beyond writing then: RocksDB writes no table after an
    /// error that it takes for a lasting one. It can still be read. For ten seconds after
    /// [`Error::Unlogged`], `close` returns the same error, so that RocksDB can recover. Once
    /// everything is written and the unmount fails, RocksDB has stopped writing tables: puts fail, or
    /// need a log. After one without a log, `close` returns [`Error::Unlogged`], and so it does after any put if there was
    /// one without a log before, since RocksDB does not tell which it was. Dropping gives up what could not be written.
    pub fn close(&self) -> Result<(), Error> {
        let mut closing = self.closing();
        if *closing == Closing::Closed {
            return Ok(());
        }
        if self.read_only {
            self.rocksdb().cancel_all_background_work(true);
        } else {
            if *closing == Closing::Open {
                self.keep_recorded_options()?;
                self.settle()?;
                self.write_unlogged()?;
                self.rocksdb().cancel_all_background_work(true);
                *closing = Closing::Stopped;
            }
            if *closing != Closing::Unmounting {
                // Puts that came meanwhile. RocksDB writes no table of those without a log any longer, so this fails.
                self.settle()?;
                self.write_unlogged()?;
            }
        }
        // Whoever opens the device next finds it free: the inspection has it too. While the device
        // cannot be released, there is something to be asked about.
        let stop = || {
            #[cfg(feature = "inspect")]
            self.stop_inspection();
        };
        match &self.mounted {
            Some(mounted) => mounted.end(stop).inspect_err(|_| {
                if self.is_being_unmounted() {
                    *closing = Closing::Unmounting;
                }
            })?,
            None => stop(),
        }
        self.binding.close();
        *closing = Closing::Closed;
        Ok(())
    }

    /// Creates a column family.
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::create_cf`], and [`Error::FileSystem`] if the database was opened with
    /// [`DbOptions::try_load_options`] and its recorded options could not be kept; the family exists then.
    pub fn create_cf(&self, name: impl AsRef<str>, options: &Options) -> Result<(), Error> {
        self.rocksdb().create_cf(name, options)?;
        self.keep_recorded_options()
    }

    /// Brings back what [`DbOptions::try_load_options`] promises to keep.
    pub(crate) fn keep_recorded_options(&self) -> Result<(), Error> {
        match &self.kept {
            Some(kept) => kept.restore(&self.fs, &self.root),
            None => Ok(()),
        }
    }

    fn closing(&self) -> MutexGuard<'_, Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(feature = "inspect")]
    fn inspect(&self, look: &Look, counted: Registry) -> Result<(), Error> {
        let db = self.db.as_ref().map(Arc::downgrade).unwrap_or_default();
        let inspection = look.start(&self.fs, db, counted)?;
        *self
            .inspection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = inspection;
        Ok(())
    }

    /// Nobody asks any longer, and the device's last user beside the file system is gone.
    #[cfg(feature = "inspect")]
    fn stop_inspection(&self) {
        let mut inspection = self
            .inspection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        drop(inspection.take());
    }

    /// A property of RocksDB's (`rocksdb.stats`, of the default column family), or a figure of the file system's:
    /// [`Db::property_int_value`].
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::property_value`].
    pub fn property_value(&self, name: impl CStrLike) -> Result<Option<String>, rocksdb::Error> {
        self.property(
            name,
            |figure| figure.to_string(),
            |db, name| db.property_value(name),
        )
    }

    /// A property of RocksDB's that is a number, or a figure of the file system's: `pumice.free-bytes`,
    /// `pumice.cache-hits`, `pumice.device-written-bytes` and the others that `kv/README.md` lists. `None`: there is no
    /// such property.
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::property_int_value`].
    pub fn property_int_value(&self, name: impl CStrLike) -> Result<Option<u64>, rocksdb::Error> {
        self.property(
            name,
            |figure| figure,
            |db, name| db.property_int_value(name),
        )
    }

    fn property<T>(
        &self,
        name: impl CStrLike,
        from_figure: fn(u64) -> T,
        from_rocksdb: fn(&Rocks, &CStr) -> Result<Option<T>, rocksdb::Error>,
    ) -> Result<Option<T>, rocksdb::Error> {
        let Ok(name) = name.bake() else {
            // A name with a NUL in it is nobody's.
            return Ok(None);
        };
        match name.to_str() {
            Ok(text) if text.starts_with("pumice.") => {
                Ok(figures::property(&self.fs, text).map(from_figure))
            }
            _ => from_rocksdb(self.rocksdb(), &name),
        }
    }

    /// Makes all puts durable. RocksDB stops using a log when a write or sync of it has failed. Its
    /// puts are in the log's file nevertheless, so the file system can make them durable when the
    /// fault has passed. If they are still in RocksDB's own buffer, tables with the same contents
    /// are as good.
    fn settle(&self) -> Result<(), Error> {
        let db = self.rocksdb();
        let Err(failed) = db.flush_wal(true) else {
            return Ok(());
        };
        if !buffers_its_log(&self.fs, &self.root) && self.fs.sync().is_ok() {
            return Ok(());
        }
        let families = self.families().map_err(|_| failed.clone())?;
        let families: Vec<_> = families.iter().map(|(_, family)| family).collect();
        db.flush_cfs_opt(&families, &FlushOptions::default())
            .map_err(|_| failed.into())
    }

    /// Whether the file system has refused everything since an unmount began.
    fn is_being_unmounted(&self) -> bool {
        matches!(self.fs.sync_dir("/"), Err(FsError::Unmounted { .. }))
    }

    /// Writes what was put without a log.
    fn write_unlogged(&self) -> Result<(), Error> {
        // The default family answers for all of them if it has something in memory. The list of
        // them is in the MANIFEST, which need not be readable.
        let name = DEFAULT_COLUMN_FAMILY_NAME;
        if let Some(default) = self.rocksdb().cf_handle(name)
            && unlogged::all_logged(self.rocksdb(), name, &default)
        {
            return Ok(());
        }
        let families = self.families()?;
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let written = unlogged::write(self.rocksdb(), &families, &mut refused);
        written.map_err(|source| Error::Unlogged {
            path: self.root.clone(),
            source,
        })
    }

    /// Returns the names of the column families that the database has.
    ///
    /// ```
    /// # let options = pumice::rocksdb::Options::default();
    /// let fs = pumice::mount("malloc://256M", &pumice::MountOptions::new())?;
    /// let db = pumice::DbOptions::new().column_family("events", options).open_in(&fs)?;
    /// assert_eq!(db.column_families()?, ["default", "events"]);
    /// # db.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::RocksDb`] if the MANIFEST cannot be read.
    pub fn column_families(&self) -> Result<Vec<String>, Error> {
        Ok(Rocks::list_cf(&self.options, "/")?)
    }

    /// Returns the column families that exist, with their names.
    fn families(&self) -> Result<Vec<Family<'_>>, rocksdb::Error> {
        let names = Rocks::list_cf(&self.options, "/")?;
        let handles = names
            .into_iter()
            .filter_map(|name| Some((self.rocksdb().cf_handle(&name)?, name)));
        Ok(handles.map(|(family, name)| (name, family)).collect())
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        let inherited = self.fs.is_inherited();
        // There is no later time to wait for.
        *self
            .refused
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = None;
        if !inherited
            && !self.read_only
            && *self.closing() == Closing::Open
            && let Err(error) = self.write_unlogged()
        {
            tracing::error!(error = %chain(&error), "the database was dropped and may lose what was put without a log");
        }
        let db = self.db.take();
        if inherited {
            // RocksDB would wait for threads that only the parent has.
            std::mem::forget(db);
            return;
        }
        #[cfg(feature = "inspect")]
        self.stop_inspection();
        drop(db);
        self.binding.close();
    }
}

impl Deref for Db {
    type Target = Rocks;

    fn deref(&self) -> &Rocks {
        self.rocksdb()
    }
}
