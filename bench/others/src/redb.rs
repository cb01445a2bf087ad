//! redb: a copy-on-write B-tree in one file.

use std::path::Path;

use redb::{Database, ReadableDatabase, TableDefinition, TableError};

use crate::store::{KEY_LEN, Outcome, Store, StoreSizes, SyncMode};

const TABLE: TableDefinition<&[u8; KEY_LEN], &[u8]> = TableDefinition::new("entries");

/// An open database.
pub struct Redb(Database);

impl Redb {
    /// Opens the database in the directory.
    pub fn open(dir: &Path, sizes: StoreSizes) -> Outcome<Redb> {
        let mut builder = Database::builder();
        builder.set_cache_size(usize::try_from(sizes.cache_bytes).unwrap_or(usize::MAX));
        Ok(Redb(builder.create(dir.join("redb"))?))
    }

    fn write(
        &self,
        entries: &[([u8; KEY_LEN], Vec<u8>)],
        durability: redb::Durability,
    ) -> Outcome<()> {
        let mut transaction = self.0.begin_write()?;
        transaction.set_durability(durability)?;
        {
            let mut table = transaction.open_table(TABLE)?;
            for (key, value) in entries {
                table.insert(key, &value[..])?;
            }
        }
        Ok(transaction.commit()?)
    }
}

impl Store for Redb {
    fn put(&self, entries: &[([u8; KEY_LEN], Vec<u8>)], durability: SyncMode) -> Outcome<()> {
        let durability = match durability {
            SyncMode::AtReturn => redb::Durability::Immediate,
            SyncMode::Later => redb::Durability::None,
        };
        self.write(entries, durability)
    }

    fn get(&self, key: &[u8; KEY_LEN]) -> Outcome<Option<usize>> {
        let table = match self.0.begin_read()?.open_table(TABLE) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        Ok(table.get(key)?.map(|value| value.value().to_vec().len()))
    }

    fn scan(&self, first: &[u8; KEY_LEN], most: usize) -> Outcome<usize> {
        let table = self.0.begin_read()?.open_table(TABLE)?;
        let mut entries = 0;
        for entry in table.range::<&[u8; KEY_LEN]>(first..)?.take(most) {
            let (key, value) = entry?;
            std::hint::black_box((key.value(), value.value()));
            entries += 1;
        }
        Ok(entries)
    }

    fn sync(&self) -> Outcome<()> {
        self.write(&[], redb::Durability::Immediate)
    }

    fn close(self: Box<Redb>) -> Outcome<()> {
        self.sync()
    }
}
