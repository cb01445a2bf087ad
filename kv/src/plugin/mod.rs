//! Between RocksDB's C++ `FileSystem` and a Rust file system.
//!
//! [`PluginFs`] is what RocksDB needs of a file system, no more; the C++ shim (`kv/shim`) calls it
//! through a table of C functions made for each implementation. There are two: BlobFS, and
//! [`MemoryFs`], which keeps its files in memory: what the shim itself costs is measured with it,
//! and its tests need no device.

mod blobfs;
mod fault;
mod ffi;
mod gate;
mod memory;
mod ops;
pub(crate) mod path;

pub use fault::Fault;
pub(crate) use ffi::{UriMount, env_from_uri, make_cpp_env, make_env, register};
pub(crate) use gate::Gate;
pub use memory::{MemoryFile, MemoryFs};

use std::time::SystemTime;

/// Answer of everything that can fail here.
pub type Result<T> = std::result::Result<T, Fault>;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Make the file if there is none; otherwise a missing file is [`Fault::not_found`].
    pub create: bool,
    /// A new, empty inode under the name: whoever has the old one open keeps its bytes.
    pub fresh: bool,
    /// Reads and writes go past the page cache.
    pub direct: bool,
}

/// What is known of a file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Length in bytes; 0 for a directory.
    pub len: u64,
    /// Last modification.
    pub modified: SystemTime,
    /// The same for all names of one inode, different for different inodes.
    pub file_id: u64,
    /// Names of the inode.
    pub links: u32,
    /// A directory.
    pub is_dir: bool,
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name, without the directory's.
    pub name: String,
    /// Length in bytes; 0 for a directory.
    pub len: u64,
    /// A directory.
    pub is_dir: bool,
}

/// What an implementation can do beyond the plain calls; RocksDB uses only what is claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// [`PluginFile::read_start`] returns before the data is there.
    pub async_reads: bool,
    /// [`PluginFile::pin`] lends cached memory.
    pub pins: bool,
    /// [`PluginFile::prefetch`] does something.
    pub prefetch: bool,
    /// After [`PluginFile::invalidate`] a read asks the device again.
    pub rereads: bool,
}

/// Expected access to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing known.
    Normal,
    /// Single blocks, anywhere.
    Random,
    /// From the start to the end.
    Sequential,
    /// All of it, soon.
    WillNeed,
    /// Not again soon.
    WontNeed,
}

/// A file system as RocksDB needs it. Paths are absolute, `/`-separated and normal: no empty, `.`
/// or `..` component. Every call may block and may come from any thread.
#[allow(
    missing_docs,
    reason = "the names are those of the POSIX calls they stand for"
)]
pub trait PluginFs: Send + Sync + 'static {
    type File: PluginFile;
    /// Holds an exclusive lock until it is dropped.
    type Lock: Send + 'static;

    fn abilities(&self) -> Abilities;
    /// Alignment in bytes, a power of two, of direct reads and writes: offset, length and memory.
    fn alignment(&self) -> usize;
    fn open(&self, path: &str, how: How) -> Result<Self::File>;
    fn remove(&self, path: &str) -> Result<()>;
    /// Replaces `to` at once if it is there.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    fn link(&self, from: &str, to: &str) -> Result<()>;
    fn stat(&self, path: &str) -> Result<Stat>;
    fn mkdir(&self, path: &str) -> Result<()>;
    fn rmdir(&self, path: &str) -> Result<()>;
    fn list(&self, dir: &str) -> Result<Vec<Entry>>;
    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &str) -> Result<()>;
    /// Takes the lock of `path`, making the file if needed; never waits for another holder.
    fn lock(&self, path: &str) -> Result<Self::Lock>;
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> Result<u64>;
}

/// One read of a batch.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where, in bytes.
    pub offset: u64,
    /// Filled from its start, wholly unless the file ends before.
    pub buf: &'a mut [u8],
    /// Bytes read.
    pub result: Result<usize>,
}

/// Answer of [`PluginFile::read_start`].
#[derive(Debug)]
pub enum Started<P> {
    /// The data is in memory: finishing will not wait.
    Ready(P),
    /// The device is at work.
    Pending(P),
}

/// An open file, usable from many threads at once; keeps its inode after the last name is gone.
#[allow(
    missing_docs,
    reason = "the names are those of the POSIX calls they stand for"
)]
pub trait PluginFile: Send + Sync + 'static {
    /// Cached memory on loan.
    type Pin: AsRef<[u8]> + Send + 'static;
    /// A read under way.
    type Pending: PendingRead;

    /// Length in bytes.
    fn size(&self) -> u64;
    fn file_id(&self) -> u64;
    /// Writes at the end. On failure nothing of `data` is in the file.
    fn append(&self, data: &[u8]) -> Result<()>;
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;
    /// Bytes read: fewer than asked only at the end of the file.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize>;
    /// All reads in flight together.
    fn read_many(&self, reads: &mut [Read<'_>]);
    /// The bytes themselves, if they are together in one cached buffer; fewer than `len` only at
    /// the end of the file.
    fn pin(&self, offset: u64, len: usize) -> Option<Self::Pin>;
    fn read_start(&self, offset: u64, len: usize) -> Result<Started<Self::Pending>>;
    fn truncate(&self, len: u64) -> Result<()>;
    /// Reserves space; the length stays. What is not used goes back with [`PluginFile::finish`], or the last handle.
    fn allocate(&self, offset: u64, len: u64) -> Result<()>;
    /// The writer closes, and nobody is going to append: starts writing back what is dirty, without
    /// waiting, and gives back what [`PluginFile::allocate`] held past the end.
    fn finish(&self) -> Result<()>;
    /// Makes data and length durable.
    fn sync(&self) -> Result<()>;
    /// Starts writing back a range, without waiting.
    fn range_sync(&self, offset: u64, len: u64) -> Result<()>;
    fn prefetch(&self, offset: u64, len: u64) -> Result<()>;
    /// Drops clean cached pages; `len` may reach past the end.
    fn invalidate(&self, offset: u64, len: u64) -> Result<()>;
    fn advise(&self, access: Access);
}

/// A read under way; dropping it gives it up.
pub trait PendingRead: Send + 'static {
    /// Waits, and copies into `buf`; bytes read, fewer than asked only at the end of the file.
    fn finish(self, buf: &mut [u8]) -> Result<usize>;
}
