//! The stores that are compared.

use std::path::Path;

use crate::store::{Outcome, Store, StoreSizes};

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// RocksDB on Pumice, on an image file.
    Pumice,
    /// RocksDB on the kernel's file system.
    Rocksdb,
    /// redb.
    Redb,
    /// fjall.
    Fjall,
    /// LMDB, by the crate heed.
    Lmdb,
}

/// All kinds, in the order of the table.
pub const ALL: [StoreKind; 5] = [
    StoreKind::Pumice,
    StoreKind::Rocksdb,
    StoreKind::Redb,
    StoreKind::Fjall,
    StoreKind::Lmdb,
];

impl StoreKind {
    /// The name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            StoreKind::Pumice => "pumice",
            StoreKind::Rocksdb => "rocksdb",
            StoreKind::Redb => "redb",
            StoreKind::Fjall => "fjall",
            StoreKind::Lmdb => "lmdb",
        }
    }

    /// Opens the store in a directory. It is made if it is not there.
    ///
    /// # Errors
    /// Fails as the store does.
    pub fn open(self, dir: &Path, sizes: StoreSizes) -> Outcome<Box<dyn Store>> {
        Ok(match self {
            StoreKind::Pumice => Box::new(crate::rocks::Rocks::on_pumice(dir, sizes)?),
            StoreKind::Rocksdb => Box::new(crate::rocks::Rocks::on_the_kernel(dir, sizes)?),
            StoreKind::Redb => Box::new(crate::redb::Redb::open(dir, sizes)?),
            StoreKind::Fjall => Box::new(crate::fjall::Fjall::open(dir, sizes)?),
            StoreKind::Lmdb => Box::new(crate::lmdb::Lmdb::open(dir, sizes)?),
        })
    }
}
