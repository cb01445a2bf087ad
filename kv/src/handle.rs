//! The databases of the `rocksdb` crate that a [`Db`](crate::Db) can hold.

use std::ffi::CStr;
use std::sync::Arc;

use rocksdb::backup::BackupEngine;
use rocksdb::checkpoint::{Checkpoint, TransactionDBCheckpoint};
use rocksdb::{
    AsColumnFamilyRef, BoundColumnFamily, DBWithThreadMode, Error, FlushOptions, IteratorMode,
    MultiThreaded, OptimisticTransactionDB, Options, ReadOptions, TransactionDB,
};

/// The database type of the `rocksdb` crate that [`Db`](crate::Db) wraps.
pub type Rocks = DBWithThreadMode<MultiThreaded>;

/// A database of the `rocksdb` crate that a [`Db`](crate::Db) can hold: [`Rocks`], [`TransactionDB`] and
/// [`OptimisticTransactionDB`]. Only this crate implements it.
pub trait DbHandle: Calls + Send + Sync + Sized + 'static {}

impl<D: Calls + Send + Sync + 'static> DbHandle for D {}

/// The calls that [`Db`](crate::Db) makes whatever it holds. The crate has no trait for them.
pub trait Calls {
    fn flush_log(&self) -> Result<(), Error>;
    fn flush_families<C: AsColumnFamilyRef>(&self, families: &[&C]) -> Result<(), Error>;
    fn family(&self, name: &str) -> Option<Arc<BoundColumnFamily<'_>>>;
    fn add_family(&self, name: &str, options: &Options) -> Result<(), Error>;
    fn text(&self, property: &CStr) -> Result<Option<String>, Error>;
    fn number(&self, property: &CStr) -> Result<Option<u64>, Error>;
    /// The first key that an iterator with these options gives.
    fn first_key(&self, family: &impl AsColumnFamilyRef, how: ReadOptions) -> Option<Box<[u8]>>;
    /// Looks for a key. Whether it is found does not matter.
    fn look_up(&self, family: &impl AsColumnFamilyRef, key: &[u8], how: &ReadOptions);
    fn checkpoint_to(&self, path: &str) -> Result<(), Error>;
    fn read(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error>;
    fn write(&self, key: &[u8], value: &[u8]) -> Result<(), Error>;
    fn remove(&self, key: &[u8]) -> Result<(), Error>;
    fn flush_default(&self) -> Result<(), Error>;

    /// Waits for flushes and compactions, and starts no more.
    fn stop(&self);
    /// Whether a family may have something that no table has.
    fn may_hold_entries(&self, family: &impl AsColumnFamilyRef) -> bool;
    /// A key that a table of the family has.
    fn key_of_a_table(&self, name: &str) -> Option<Vec<u8>>;
    fn back_up(&self, engine: &mut BackupEngine) -> Result<(), crate::Error>;
}

/// The calls that the crate's types have under the same names.
macro_rules! common {
    ($checkpoint:ident) => {
        fn flush_log(&self) -> Result<(), Error> {
            self.flush_wal(true)
        }

        fn flush_families<C: AsColumnFamilyRef>(&self, families: &[&C]) -> Result<(), Error> {
            self.flush_cfs_opt(families, &FlushOptions::default())
        }

        fn family(&self, name: &str) -> Option<Arc<BoundColumnFamily<'_>>> {
            self.cf_handle(name)
        }

        fn add_family(&self, name: &str, options: &Options) -> Result<(), Error> {
            self.create_cf(name, options)
        }

        fn text(&self, property: &CStr) -> Result<Option<String>, Error> {
            self.property_value(property)
        }

        fn number(&self, property: &CStr) -> Result<Option<u64>, Error> {
            self.property_int_value(property)
        }

        fn first_key(
            &self,
            family: &impl AsColumnFamilyRef,
            how: ReadOptions,
        ) -> Option<Box<[u8]>> {
            let mut keys = self.iterator_cf_opt(family, how, IteratorMode::Start);
            Some(keys.next()?.ok()?.0)
        }

        fn look_up(&self, family: &impl AsColumnFamilyRef, key: &[u8], how: &ReadOptions) {
            drop(self.get_pinned_cf_opt(family, key, how));
        }

        fn checkpoint_to(&self, path: &str) -> Result<(), Error> {
            $checkpoint::new(self)?.create_checkpoint(path)
        }

        fn read(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
            self.get(key)
        }

        fn write(&self, key: &[u8], value: &[u8]) -> Result<(), Error> {
            self.put(key, value)
        }

        fn remove(&self, key: &[u8]) -> Result<(), Error> {
            self.delete(key)
        }

        fn flush_default(&self) -> Result<(), Error> {
            self.flush()
        }
    };
}

/// The calls that the crate has for all but [`TransactionDB`].
macro_rules! of_the_base {
    () => {
        fn stop(&self) {
            self.cancel_all_background_work(true);
        }

        fn may_hold_entries(&self, family: &impl AsColumnFamilyRef) -> bool {
            ["active-mem-table", "imm-mem-tables"].iter().any(|which| {
                let entries =
                    self.property_int_value_cf(family, &format!("rocksdb.num-entries-{which}"));
                !matches!(entries, Ok(Some(0)))
            })
        }

        fn key_of_a_table(&self, name: &str) -> Option<Vec<u8>> {
            let mut files = self.live_files().ok()?.into_iter();
            files
                .find(|file| file.column_family_name == name)?
                .start_key
        }

        fn back_up(&self, engine: &mut BackupEngine) -> Result<(), crate::Error> {
            Ok(engine.create_new_backup_flush(self, true)?)
        }
    };
}

impl Calls for Rocks {
    common!(Checkpoint);
    of_the_base!();
}

impl Calls for OptimisticTransactionDB<MultiThreaded> {
    common!(Checkpoint);
    of_the_base!();
}

impl Calls for TransactionDB<MultiThreaded> {
    common!(TransactionDBCheckpoint);

    /// The crate cannot ask for it. What is being written when the file system is unmounted fails like a write of a process
    /// that is killed, and the next opening removes it.
    fn stop(&self) {}

    fn may_hold_entries(&self, _family: &impl AsColumnFamilyRef) -> bool {
        true
    }

    fn key_of_a_table(&self, _name: &str) -> Option<Vec<u8>> {
        None
    }

    fn back_up(&self, _engine: &mut BackupEngine) -> Result<(), crate::Error> {
        Err(crate::Error::Unsupported {
            what: "a backup of an open TransactionDb, which the rocksdb crate does not offer: make a checkpoint, or open the \
                database as a Db and back it up"
                .to_owned(),
        })
    }
}
