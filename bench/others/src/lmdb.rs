//! LMDB: a B-tree in a file that is mapped into memory.
#![allow(unsafe_code)]

use std::ops::Bound;
use std::path::Path;

use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions, FlagSetMode, WithoutTls};

use crate::store::{KEY_LEN, Outcome, Store, StoreSizes, SyncMode};

/// An open environment and its one database.
pub struct Lmdb {
    env: Env<WithoutTls>,
    entries: Database<Bytes, Bytes>,
}

impl Lmdb {
    /// Opens the environment in the directory.
    pub fn open(dir: &Path, sizes: StoreSizes) -> Outcome<Lmdb> {
        let path = dir.join("lmdb");
        std::fs::create_dir_all(&path)?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(usize::try_from(sizes.data_bytes).unwrap_or(usize::MAX));
        // SAFETY: nobody else opens or changes the files of a directory that the benchmark has made for itself.
        let env = unsafe { options.open(&path)? };
        let mut transaction = env.write_txn()?;
        let entries = env.create_database(&mut transaction, None)?;
        transaction.commit()?;
        Ok(Lmdb { env, entries })
    }
}

impl Store for Lmdb {
    fn put(&self, entries: &[([u8; KEY_LEN], Vec<u8>)], durability: SyncMode) -> Outcome<()> {
        let mode = match durability {
            SyncMode::AtReturn => FlagSetMode::Disable,
            SyncMode::Later => FlagSetMode::Enable,
        };
        // SAFETY: the benchmark uses the environment from one thread.
        unsafe { self.env.set_flags(EnvFlags::NO_SYNC, mode)? };
        let mut transaction = self.env.write_txn()?;
        for (key, value) in entries {
            self.entries.put(&mut transaction, key, value)?;
        }
        Ok(transaction.commit()?)
    }

    fn get(&self, key: &[u8; KEY_LEN]) -> Outcome<Option<usize>> {
        let transaction = self.env.read_txn()?;
        let value = self.entries.get(&transaction, key)?;
        // The others copy the value or its block; a mapped one has to be looked at to be read.
        Ok(value.map(|value| value.to_vec().len()))
    }

    fn scan(&self, first: &[u8; KEY_LEN], most: usize) -> Outcome<usize> {
        let transaction = self.env.read_txn()?;
        let mut entries = 0;
        let from = (Bound::Included(&first[..]), Bound::Unbounded);
        for entry in self.entries.range(&transaction, &from)?.take(most) {
            std::hint::black_box(entry?);
            entries += 1;
        }
        Ok(entries)
    }

    fn sync(&self) -> Outcome<()> {
        Ok(self.env.force_sync()?)
    }

    fn close(self: Box<Lmdb>) -> Outcome<()> {
        self.sync()?;
        self.env.prepare_for_closing().wait();
        Ok(())
    }
}
