//! What every store in the comparison does.

use std::error::Error;

/// The result of a call of a store.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// The length of a key in bytes.
pub const KEY_LEN: usize = 16;

/// When a write is on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncMode {
    /// When the call returns.
    AtReturn,
    /// When [`Store::sync`] returns.
    Later,
}

/// An open store.
pub trait Store {
    /// Writes entries in one batch or transaction.
    ///
    /// # Errors
    /// Fails as the store does.
    fn put(&self, entries: &[([u8; KEY_LEN], Vec<u8>)], durability: SyncMode) -> Outcome<()>;

    /// Returns the length of the value in bytes, with the whole value read. `None` if there is none.
    ///
    /// # Errors
    /// Fails as the store does.
    fn get(&self, key: &[u8; KEY_LEN]) -> Outcome<Option<usize>>;

    /// Reads up to `most` entries in order of their keys, from `first` on. Returns how many there were.
    ///
    /// # Errors
    /// Fails as the store does.
    fn scan(&self, first: &[u8; KEY_LEN], most: usize) -> Outcome<usize>;

    /// Makes everything durable that was written.
    ///
    /// # Errors
    /// Fails as the store does.
    fn sync(&self) -> Outcome<()>;

    /// Closes the store. Everything is durable then.
    ///
    /// # Errors
    /// Fails as the store does.
    fn close(self: Box<Self>) -> Outcome<()>;
}

/// The sizes that the stores are opened with.
#[derive(Debug, Clone, Copy)]
pub struct StoreSizes {
    /// Bytes of the cache of each store that has one of its own.
    pub cache_bytes: u64,
    /// Most bytes of data: the size of the image file, and of the address range that LMDB maps.
    pub data_bytes: u64,
}
