//! fjall: a log-structured merge tree in Rust.

use std::path::Path;

use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use crate::store::{KEY_LEN, Outcome, Store, StoreSizes, SyncMode};

/// An open database and its one keyspace.
pub struct Fjall {
    db: Database,
    entries: Keyspace,
}

impl Fjall {
    /// Opens the database in the directory.
    pub fn open(dir: &Path, sizes: StoreSizes) -> Outcome<Fjall> {
        let db = Database::builder(dir.join("fjall"))
            .cache_size(sizes.cache_bytes)
            .journal_compression(CompressionType::None)
            .open()?;
        let entries = db.keyspace("entries", KeyspaceCreateOptions::default)?;
        Ok(Fjall { db, entries })
    }
}

impl Store for Fjall {
    fn put(&self, entries: &[([u8; KEY_LEN], Vec<u8>)], durability: SyncMode) -> Outcome<()> {
        let mode = match durability {
            SyncMode::AtReturn => Some(PersistMode::SyncData),
            SyncMode::Later => None,
        };
        let mut batch = self.db.batch().durability(mode);
        for (key, value) in entries {
            batch.insert(&self.entries, key, &value[..]);
        }
        Ok(batch.commit()?)
    }

    fn get(&self, key: &[u8; KEY_LEN]) -> Outcome<Option<usize>> {
        Ok(self.entries.get(key)?.map(|value| value.len()))
    }

    fn scan(&self, first: &[u8; KEY_LEN], most: usize) -> Outcome<usize> {
        let mut entries = 0;
        for entry in self.entries.range(&first[..]..).take(most) {
            std::hint::black_box(entry.into_inner()?);
            entries += 1;
        }
        Ok(entries)
    }

    fn sync(&self) -> Outcome<()> {
        Ok(self.db.persist(PersistMode::SyncAll)?)
    }

    fn close(self: Box<Fjall>) -> Outcome<()> {
        self.sync()
    }
}
