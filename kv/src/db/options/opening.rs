//! The openings of each kind of database. They differ in the call that makes the database of the `rocksdb` crate.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pumice_blobfs::fs::FileSystem;
use pumice_rocksdb_fs::{Use, from_root, normal, open_device};
use rocksdb::{
    ColumnFamilyDescriptor, ColumnFamilyTtl, DBRecoveryMode, OptimisticTransactionDB, Options,
    TransactionDB, TransactionDBOptions,
};

use super::super::held::{DbAccess, Held};
use super::super::{Db, OptimisticTransactionDb, TransactionDb};
use super::DbOptions;
use crate::closing::Closing;
use crate::copies;
use crate::error::is_no_space;
use crate::handle::{DbHandle, Rocks};
#[cfg(feature = "inspect")]
use crate::inspect::Registry;
use crate::pool::AsyncPool;
use crate::recorded::{Kept, RecordedOptions};
use crate::{Error, mount_device};

/// The place where a database is opened.
#[derive(Clone, Copy)]
enum DbPlace<'a> {
    /// The device that a URI names.
    Device(&'a str),
    Mounted(&'a FileSystem),
}

impl DbOptions {
    /// Mounts the file system on the device that `uri` names and opens the database in it. A device
    /// that holds nothing is formatted first, unless [`MountOptions::format_empty`](crate::MountOptions::format_empty) was cleared.
    ///
    /// A process may open several databases of one device this way, each at a
    /// [path](DbOptions::path) of its own. They share one file system, which is mounted with the
    /// options of the first one, and the [`Db::close`] of the last one unmounts it. A file is one
    /// device under all its names, and each namespace of an NVMe controller is a device of its own.
    /// Devices in memory (`malloc://…`) are new each time.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::FileSystem`], [`Error::RocksDb`], [`Error::Full`], [`Error::Options`], [`Error::Unsupported`].
    pub fn open(&self, uri: &str) -> Result<Db, Error> {
        self.open_at(DbPlace::Device(uri), self.access(), |options, families| {
            self.open_plain(options, families)
        })
    }

    /// Opens the database in a mounted file system, which stays mounted.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`], [`Error::Full`], [`Error::Options`], [`Error::Unsupported`].
    pub fn open_in(&self, fs: &FileSystem) -> Result<Db, Error> {
        self.open_at(DbPlace::Mounted(fs), self.access(), |options, families| {
            self.open_plain(options, families)
        })
    }

    /// Opens as [`DbOptions::open`] does, with pessimistic transactions. A transaction that was prepared and neither
    /// committed nor rolled back before the database was closed, or its process was killed, is in
    /// [`prepared_transactions`](rocksdb::TransactionDB::prepared_transactions), without its locks: commit or roll back
    /// all of them before you write anything else.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    /// # use pumice::{DbOptions, rocksdb::TransactionDBOptions};
    /// let how = TransactionDBOptions::new();
    /// let db = DbOptions::new().open_transactions(&device, &how)?;
    /// let transfer = db.transaction();
    /// transfer.set_name(b"transfer 7")?;
    /// transfer.put(b"from", b"0")?;
    /// transfer.put(b"to", b"1")?;
    /// transfer.prepare()?;
    /// drop(transfer);
    /// db.close()?;
    /// drop(db);
    ///
    /// let db = DbOptions::new().open_transactions(&device, &how)?;
    /// for found in db.prepared_transactions() {
    ///     assert_eq!(found.get_name().as_deref(), Some(&b"transfer 7"[..]));
    ///     found.commit()?;
    /// }
    /// assert_eq!(db.get(b"to")?.as_deref(), Some(&b"1"[..]));
    /// db.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Fails as [`DbOptions::open`] does, and with [`Error::Unsupported`] for reading only or with a time to live.
    pub fn open_transactions(
        &self,
        uri: &str,
        how: &TransactionDBOptions,
    ) -> Result<TransactionDb, Error> {
        self.open_transactions_at(DbPlace::Device(uri), how)
    }

    /// Opens as [`DbOptions::open_transactions`] does, in a mounted file system, which stays mounted.
    ///
    /// # Errors
    /// Fails as [`DbOptions::open_transactions`] does.
    pub fn open_transactions_in(
        &self,
        fs: &FileSystem,
        how: &TransactionDBOptions,
    ) -> Result<TransactionDb, Error> {
        self.open_transactions_at(DbPlace::Mounted(fs), how)
    }

    fn open_transactions_at(
        &self,
        place: DbPlace<'_>,
        how: &TransactionDBOptions,
    ) -> Result<TransactionDb, Error> {
        self.check_plain("a database with transactions")?;
        self.open_at(place, DbAccess::Write, |options, families| {
            TransactionDB::open_cf_descriptors(options, how, "/", families)
        })
    }

    /// Opens as [`DbOptions::open`] does, with optimistic transactions.
    ///
    /// # Errors
    /// Fails as [`DbOptions::open_transactions`] does.
    pub fn open_optimistic(&self, uri: &str) -> Result<OptimisticTransactionDb, Error> {
        self.open_optimistic_at(DbPlace::Device(uri))
    }

    /// Opens as [`DbOptions::open_optimistic`] does, in a mounted file system, which stays mounted.
    ///
    /// # Errors
    /// Fails as [`DbOptions::open_transactions`] does.
    pub fn open_optimistic_in(&self, fs: &FileSystem) -> Result<OptimisticTransactionDb, Error> {
        self.open_optimistic_at(DbPlace::Mounted(fs))
    }

    fn open_optimistic_at(&self, place: DbPlace<'_>) -> Result<OptimisticTransactionDb, Error> {
        self.check_plain("a database with transactions")?;
        self.open_at(place, DbAccess::Write, |options, families| {
            OptimisticTransactionDB::open_cf_descriptors(options, "/", families)
        })
    }

    /// Opens a second instance of a database that this process may have open for writing. It reads what the database had when it
    /// was opened, and at each [`try_catch_up_with_primary`](rocksdb::DBCommon::try_catch_up_with_primary) what it has then.
    /// `directory` of the same file system is for its info log. The device is mounted once for all.
    ///
    /// Another process cannot do this: a device belongs to one process while that may write.
    /// Column families that are made later are not in it.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    /// let options = pumice::DbOptions::new().path("/orders");
    /// let writer = options.open(&device)?;
    /// let reader = options.open_as_secondary(&device, "/orders-reader")?;
    /// writer.put(b"1", b"shipped")?;
    /// assert_eq!(reader.get(b"1")?, None);
    /// reader.try_catch_up_with_primary()?;
    /// assert_eq!(reader.get(b"1")?.as_deref(), Some(&b"shipped"[..]));
    /// reader.close()?;
    /// writer.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Fails as [`DbOptions::open`] does; with [`Error::Directory`] if `directory` is the database's own, and with
    /// [`Error::Unsupported`] for reading only or with a time to live.
    pub fn open_as_secondary(&self, uri: &str, directory: &str) -> Result<Db, Error> {
        self.open_secondary_at(DbPlace::Device(uri), directory)
    }

    /// Opens as [`DbOptions::open_as_secondary`] does, in a mounted file system, which stays mounted:
    /// [`Db::file_system`] is that of the writer.
    ///
    /// # Errors
    /// Fails as [`DbOptions::open_as_secondary`] does.
    pub fn open_as_secondary_in(&self, fs: &FileSystem, directory: &str) -> Result<Db, Error> {
        self.open_secondary_at(DbPlace::Mounted(fs), directory)
    }

    fn open_secondary_at(&self, place: DbPlace<'_>, directory: &str) -> Result<Db, Error> {
        self.check_plain("a secondary instance")?;
        copies::check_free(directory)?;
        let (root, path) = (normal(&self.path)?, normal(directory)?);
        if path == root {
            let reason =
                "it is the database's own; a secondary instance needs another one".to_owned();
            return Err(Error::Directory { path, reason });
        }
        let own = from_root(&root, &path);
        self.open_at(place, DbAccess::Read, |options, families| {
            Rocks::open_cf_descriptors_as_secondary(options, "/", &own, families)
        })
    }

    fn access(&self) -> DbAccess {
        if self.read_only {
            DbAccess::Read
        } else {
            DbAccess::Write
        }
    }

    /// Refuses what only [`DbOptions::open`] offers.
    fn check_plain(&self, kind: &str) -> Result<(), Error> {
        let but = if self.read_only {
            "for reading only"
        } else if self.ttl.is_some() {
            "with a time to live"
        } else {
            return Ok(());
        };
        let what = format!("opening {kind} {but}; open it as a Db for that");
        Err(Error::Unsupported { what })
    }

    /// Checks the times to live.
    fn check_ttl(&self) -> Result<(), Error> {
        if self.ttl.is_none() && !self.column_family_ttls.is_empty() {
            let reason =
                "column_family_ttl needs ttl, which decides whether values have a time behind them";
            let reason = reason.to_owned();
            return Err(Error::Options { reason });
        }
        if self.ttl.is_some() && self.read_only {
            let what = "opening a database with a time to live for reading only: the rocksdb crate cannot take the times off \
                the values then; open it for writing"
                .to_owned();
            return Err(Error::Unsupported { what });
        }
        let families = self
            .column_family_ttls
            .iter()
            .filter_map(|(_, ttl)| match ttl {
                ColumnFamilyTtl::Duration(ttl) => Some(ttl),
                ColumnFamilyTtl::Disabled | ColumnFamilyTtl::SameAsDb => None,
            });
        // RocksDB takes 0 for no time to live, and the crate cuts off what i32 cannot hold.
        let bad = |ttl: &&Duration| ttl.as_secs() == 0 || i32::try_from(ttl.as_secs()).is_err();
        match self.ttl.iter().chain(families).find(bad) {
            None => Ok(()),
            Some(ttl) => {
                let reason =
                    format!("a time to live of {ttl:?} is not between a second and 68 years");
                Err(Error::Options { reason })
            }
        }
    }

    fn open_plain(
        &self,
        options: &Options,
        families: Vec<ColumnFamilyDescriptor>,
    ) -> Result<Rocks, rocksdb::Error> {
        match self.ttl {
            _ if self.read_only => {
                Rocks::open_cf_descriptors_read_only(options, "/", families, false)
            }
            Some(ttl) => Rocks::open_cf_descriptors_with_ttl(options, "/", families, ttl),
            None => Rocks::open_cf_descriptors(options, "/", families),
        }
    }

    /// Opens a database of any kind: every opening comes here.
    fn open_at<D: DbHandle>(
        &self,
        place: DbPlace<'_>,
        access: DbAccess,
        open: impl FnOnce(&Options, Vec<ColumnFamilyDescriptor>) -> Result<D, rocksdb::Error>,
    ) -> Result<Db<D>, Error> {
        self.check_ttl()?;
        let (fs, mounted) = match place {
            DbPlace::Mounted(fs) => (fs.clone(), None),
            DbPlace::Device(uri) => {
                let mounted = self.mount_shared(uri)?;
                (mounted.fs().clone(), Some(mounted))
            }
        };
        #[cfg(feature = "inspect")]
        let counted = mounted.as_ref().map_or_else(Registry::new, Use::counted);
        let held = self.open_on(fs, mounted, access, open)?;
        #[cfg(feature = "inspect")]
        held.inspect(&self.look, counted)?;
        Ok(Db {
            held: Arc::new(held),
        })
    }

    /// Mounts the device, or shares the mount that this process has.
    fn mount_shared(&self, uri: &str) -> Result<Use, Error> {
        let mut how = self.mount.clone();
        if self.read_only {
            how = how.read_only(true);
        }
        let open = || Ok::<_, Error>(open_device(uri, &how)?);
        Use::of(uri, how.is_read_only(), open, |device, counted| {
            #[cfg(feature = "inspect")]
            let device = self.look.counted(device, counted)?;
            #[cfg(not(feature = "inspect"))]
            let _ = counted;
            mount_device(&device, &how)
        })
    }

    fn open_on<D: DbHandle>(
        &self,
        fs: FileSystem,
        mounted: Option<Use>,
        access: DbAccess,
        open: impl FnOnce(&Options, Vec<ColumnFamilyDescriptor>) -> Result<D, rocksdb::Error>,
    ) -> Result<Held<D>, Error> {
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
            options.set_error_if_exists(false);
            options.set_disable_auto_compactions(true);
        }
        if exists || access == DbAccess::Read {
            // Without this RocksDB makes a missing directory, even to read from it.
            options.create_if_missing(false);
            options.create_missing_column_families(false);
        }
        let families = self.families(&options, families);
        let db = open(&options, families).map_err(|error| {
            if is_no_space(&error) {
                Error::Full { source: error }
            } else {
                error.into()
            }
        })?;
        let kept = (exists && access == DbAccess::Write).then(|| Kept::new(recorded));
        if let Some(kept) = &kept {
            kept.restore(&fs, &root)?;
        }
        Ok(Held {
            db: Some(Arc::new(db)),
            options,
            _sources: self.sources.clone(),
            env,
            binding,
            fs,
            root,
            access,
            kept,
            mounted,
            closing: Mutex::new(Closing::Open),
            refused: Mutex::default(),
            pool: AsyncPool::new(self.async_threads, self.async_queue),
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
        drop(reading.open_in(fs)?);
        Ok(Some(DBRecoveryMode::TolerateCorruptedTailRecords))
    }

    /// Returns every column family that exists or was requested, the default one by its name, so that the handles are the same
    /// the first time and later. Of recorded ones only those that still exist are returned.
    fn families(
        &self,
        options: &Options,
        recorded: Option<Vec<ColumnFamilyDescriptor>>,
    ) -> Vec<ColumnFamilyDescriptor> {
        // A database that does not exist has none. Opening reports other errors.
        let found = Rocks::list_cf(options, "/").ok();
        let mut families = match recorded {
            Some(mut families) => {
                if let Some(found) = &found {
                    families.retain(|family| found.iter().any(|name| name == family.name()));
                }
                families
            }
            None => {
                let requested = self.column_families.iter().cloned();
                requested
                    .map(|(name, options)| ColumnFamilyDescriptor::new(name, options))
                    .collect()
            }
        };
        let found = found.unwrap_or_default().into_iter();
        for name in found.chain(["default".to_owned()]) {
            if !families.iter().any(|known| known.name() == name) {
                families.push(ColumnFamilyDescriptor::new(name, options.clone()));
            }
        }
        for (name, ttl) in &self.column_family_ttls {
            let named = families.iter_mut().find(|family| family.name() == name);
            if let Some(family) = named {
                family.set_ttl(*ttl);
            }
        }
        families
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

    /// Opens a database whose file system the caller has mounted to share it.
    #[cfg(test)]
    pub(crate) fn open_shared(&self, mounted: Use) -> Result<Db, Error> {
        let fs = mounted.fs().clone();
        let held = self.open_on(fs, Some(mounted), DbAccess::Write, |options, families| {
            self.open_plain(options, families)
        })?;
        Ok(Db {
            held: Arc::new(held),
        })
    }
}
