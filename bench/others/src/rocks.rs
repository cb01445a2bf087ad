//! RocksDB, on Pumice and on the kernel's file system, with the same options.

use std::path::Path;

use pumice::fs::FileSystem;
use pumice::rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, IteratorMode, Options, WriteBatch,
    WriteOptions,
};

use crate::store::{KEY_LEN, Outcome, Store, StoreSizes, SyncMode};

/// An open database.
pub struct Rocks {
    db: DB,
    /// The file system, if it is ours.
    fs: Option<FileSystem>,
}

impl Rocks {
    /// Opens a database on Pumice, on an image file in the directory.
    pub fn on_pumice(dir: &Path, sizes: StoreSizes) -> Outcome<Rocks> {
        let image = dir.join("disk.img");
        let uri = format!(
            "file://{}?size={}&create=1",
            image.display(),
            sizes.data_bytes
        );
        let fs = pumice::mount(&uri, &pumice::MountOptions::new())?;
        let mut options = options(sizes);
        options.set_env(&pumice::env(&fs));
        Ok(Rocks {
            db: DB::open(&options, "/")?,
            fs: Some(fs),
        })
    }

    /// Opens a database on the kernel's file system.
    pub fn on_the_kernel(dir: &Path, sizes: StoreSizes) -> Outcome<Rocks> {
        Ok(Rocks {
            db: DB::open(&options(sizes), dir.join("db"))?,
            fs: None,
        })
    }
}

/// A filter and a cache of blocks, as every guide to RocksDB asks for. The values cannot be compressed.
fn options(sizes: StoreSizes) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_bloom_filter(10.0, false);
    let cache_bytes = usize::try_from(sizes.cache_bytes).unwrap_or(usize::MAX);
    blocks.set_block_cache(&Cache::new_lru_cache(cache_bytes));
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::None);
    options.set_block_based_table_factory(&blocks);
    options
}

impl Store for Rocks {
    fn put(&self, entries: &[([u8; KEY_LEN], Vec<u8>)], durability: SyncMode) -> Outcome<()> {
        let mut batch = WriteBatch::default();
        for (key, value) in entries {
            batch.put(key, value);
        }
        let mut options = WriteOptions::default();
        options.set_sync(durability == SyncMode::AtReturn);
        Ok(self.db.write_opt(batch, &options)?)
    }

    fn get(&self, key: &[u8; KEY_LEN]) -> Outcome<Option<usize>> {
        Ok(self.db.get_pinned(key)?.map(|value| value.len()))
    }

    fn scan(&self, first: &[u8; KEY_LEN], most: usize) -> Outcome<usize> {
        let from = IteratorMode::From(first, Direction::Forward);
        let mut entries = 0;
        for entry in self.db.iterator(from).take(most) {
            entry?;
            entries += 1;
        }
        Ok(entries)
    }

    fn sync(&self) -> Outcome<()> {
        Ok(self.db.flush_wal(true)?)
    }

    fn close(self: Box<Rocks>) -> Outcome<()> {
        self.sync()?;
        drop(self.db);
        if let Some(fs) = self.fs {
            fs.unmount()?;
        }
        Ok(())
    }
}
