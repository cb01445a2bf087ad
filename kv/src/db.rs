//! A database and its file system.

use std::ffi::CStr;
use std::ops::Deref;
use std::sync::Arc;

use pumice_blobfs::fs::FileSystem;
use rocksdb::{CStrLike, Env, MultiThreaded, OptimisticTransactionDB, Options, TransactionDB};

use crate::handle::{DbHandle, Rocks};
use crate::pool::PoolPhase;
use crate::{Error, figures};

mod futures;
mod held;
mod options;

pub use futures::DbFuture;
pub(crate) use held::Held;
pub use options::DbOptions;

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
pub struct Db<D: DbHandle = Rocks> {
    pub(crate) held: Arc<Held<D>>,
}

/// A [`Db`] with pessimistic transactions, which lock the keys that they write and those that they get for update.
///
/// [`DbOptions::open_transactions`] opens it. It dereferences to [`rocksdb::TransactionDB`]: `transaction`, `transaction_opt`,
/// `prepared_transactions`, and reading and writing outside of transactions, which take the same locks. Close it as a
/// [`Db`] is closed. A transaction that was neither committed nor prepared then is lost, as it is when the process ends.
///
/// A lock that another transaction holds for too long, and a deadlock, are errors of the kind
/// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict).
///
/// ```
/// use pumice::rocksdb::{TransactionDBOptions, TransactionOptions, WriteOptions};
/// use pumice::{DbOptions, Error, ErrorKind};
///
/// let db = DbOptions::new().open_transactions("malloc://256M", &TransactionDBOptions::new())?;
/// db.put(b"stock", b"2")?;
/// let sale = db.transaction();
/// assert_eq!(sale.get_for_update(b"stock", true)?.as_deref(), Some(&b"2"[..]));
/// sale.put(b"stock", b"1")?;
///
/// let mut impatient = TransactionOptions::new();
/// impatient.set_lock_timeout(1);
/// let other = db.transaction_opt(&WriteOptions::default(), &impatient);
/// let refused = Error::from(other.put(b"stock", b"0").unwrap_err());
/// assert_eq!(refused.kind(), ErrorKind::Conflict);
/// drop(other);
///
/// sale.commit()?;
/// assert_eq!(db.get(b"stock")?.as_deref(), Some(&b"1"[..]));
/// db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type TransactionDb = Db<TransactionDB<MultiThreaded>>;

/// A [`Db`] with optimistic transactions, which lock nothing and find conflicts when they commit.
///
/// [`DbOptions::open_optimistic`] opens it. It dereferences to [`rocksdb::OptimisticTransactionDB`]: `transaction`,
/// `transaction_opt`, and reading and writing outside of transactions. A commit that would overwrite what has changed since the
/// transaction wrote it or got it for update fails with the kind [`ErrorKind::Conflict`](crate::ErrorKind::Conflict).
///
/// ```
/// use pumice::{DbOptions, Error, ErrorKind};
///
/// let db = DbOptions::new().open_optimistic("malloc://256M")?;
/// let transaction = db.transaction();
/// transaction.put(b"fruit", b"apple")?;
/// db.put(b"fruit", b"pear")?;
/// let refused = Error::from(transaction.commit().unwrap_err());
/// assert_eq!(refused.kind(), ErrorKind::Conflict);
/// assert_eq!(db.get(b"fruit")?.as_deref(), Some(&b"pear"[..]));
/// db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type OptimisticTransactionDb = Db<OptimisticTransactionDB<MultiThreaded>>;

impl<D: DbHandle> std::fmt::Debug for Db<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("path", &self.held.root)
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
}

impl<D: DbHandle> Db<D> {
    /// The database of the `rocksdb` crate.
    #[must_use]
    pub fn rocksdb(&self) -> &D {
        self.held.handle()
    }

    /// The file system of the database.
    #[must_use]
    pub fn file_system(&self) -> &FileSystem {
        &self.held.fs
    }

    /// The environment of the database, whose `/` is the database's directory.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.held.env
    }

    /// The database's directory in its file system.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.held.root
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
        self.held.close()
    }

    /// Creates a column family.
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::create_cf`], and [`Error::FileSystem`] if the database was opened with
    /// [`DbOptions::try_load_options`] and its recorded options could not be kept; the family exists then.
    pub fn create_cf(&self, name: impl AsRef<str>, options: &Options) -> Result<(), Error> {
        self.rocksdb().add_family(name.as_ref(), options)?;
        self.held.keep_recorded_options()
    }

    /// A property of RocksDB's (`rocksdb.stats`, of the default column family), or a figure of the file system's:
    /// [`Db::property_int_value`].
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::property_value`].
    pub fn property_value(&self, name: impl CStrLike) -> Result<Option<String>, rocksdb::Error> {
        self.property(name, |figure| figure.to_string(), D::text)
    }

    /// A property of RocksDB's that is a number, or a figure of the file system's: `pumice.free-bytes`,
    /// `pumice.cache-hits`, `pumice.device-written-bytes` and the others that `kv/README.md` lists. `None`: there is no
    /// such property.
    ///
    /// # Errors
    /// As [`rocksdb::DBWithThreadMode::property_int_value`].
    pub fn property_int_value(&self, name: impl CStrLike) -> Result<Option<u64>, rocksdb::Error> {
        self.property(name, |figure| figure, D::number)
    }

    fn property<T>(
        &self,
        name: impl CStrLike,
        from_figure: fn(u64) -> T,
        from_rocksdb: fn(&D, &CStr) -> Result<Option<T>, rocksdb::Error>,
    ) -> Result<Option<T>, rocksdb::Error> {
        let Ok(name) = name.bake() else {
            // A name with a NUL in it is nobody's.
            return Ok(None);
        };
        match name.to_str() {
            Ok(text) if text.starts_with("pumice.") => {
                Ok(figures::property(&self.held.fs, text).map(from_figure))
            }
            _ => from_rocksdb(self.rocksdb(), &name),
        }
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
        Ok(Rocks::list_cf(&self.held.options, "/")?)
    }
}

impl<D: DbHandle> Drop for Db<D> {
    fn drop(&mut self) {
        // In a forked child nobody does what futures have asked for, and nobody may wait for it.
        if !self.held.fs.is_inherited() {
            self.held.drain(PoolPhase::Ended);
            self.held.pool.wait_for_closers();
        }
    }
}

impl<D: DbHandle> Deref for Db<D> {
    type Target = D;

    fn deref(&self) -> &D {
        self.rocksdb()
    }
}
