//! BlobFS: files, directories and links in an SPDK blobstore, with a page cache and writeback.
//!
//! [`FileSystem`] is a mount, and [`File`] a handle. Any thread may make any call, which may block
//! on the device. The calling thread does its own I/O.
//!
//! # On disk
//! The format is that of SPDK's BlobFS: a file is a blob with the xattrs `name` and `length`.
//! Directories, links and the records of renames are xattrs with the prefix `pumice.`, which SPDK
//! ignores; see `docs/blobfs.md`.
//!
//! # Durability
//! Operations on names are durable on return, one after the other. Data is durable after
//! [`File::sync`]. The length on the device only ever covers bytes that are durable. What was
//! written and not synced survives a kill of the process in a log in shared memory
//! ([`MountOptions::volatile`]), and no power cut. An orderly end of the process (`exit`, a return
//! from `main`) unmounts what is still mounted.
//!
//! # Forks
//! A mount belongs to the process that made it. In a forked child its handles return
//! [`FsError::Forked`], and dropping them or ending the child does nothing to the device.
//!
//! # Locks
//! `docs/architecture.md` has their order. A read or a write of the device waits while clusters of
//! its file move. The thread that moves them waits until no I/O is in flight on the file, with the
//! locks of names, sync and append held, and takes completions of the shared channels meanwhile. So
//! a completion takes nothing but leaves, and a thread does not begin a second I/O on a file inside
//! the first.

mod ahead;
mod append;
mod attributes;
mod buffers;
mod cache;
mod core;
mod cursor;
mod durable;
mod elastic;
mod error;
mod exit;
mod file;
mod fill;
mod flushes;
mod frame;
mod huge;
mod implied;
mod inode;
mod life;
mod load;
mod lost;
mod memory;
mod metered;
mod mount;
mod names;
mod namespace;
mod offline;
mod options;
mod overwrite;
mod path;
mod pins;
mod read;
mod recorder;
mod runs;
mod shm_log;
mod shm_replay;
mod shm_ring;
mod shm_show;
mod space;
mod stat;
#[cfg(test)]
mod store_tests;
mod sync;
mod syncs;
mod tail;
mod truncate;
mod unflushed;
mod view;
mod volume;
mod writeback;

/// The primitives of [`flushes`] and [`pins`]. Their models replace them.
mod primitives {
    pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    pub(crate) use parking_lot::Mutex;
}

pub use ahead::ReadHandle;
pub use attributes::Attributes;
pub use cache::CacheStats;
pub use cursor::Cursor;
pub use error::{FsError, Result, SpaceKind};
pub use file::{File, Pinned};
pub use load::{UNFINISHED, UNFINISHED_BEFORE};
pub use memory::{Memory, cache_most_bytes};
pub use metered::IoStats;
pub use mount::{DirEntry, FileLock, FileSystem, StatFs};
pub use offline::{add_journal, grow};
pub use options::{Access, FormatOptions, Journal, MountOptions, OpenOptions};
pub use path::{NAME_MAX, normalise};
pub use read::ReadRequest;
pub use stat::Stat;
pub use view::StoreView;
