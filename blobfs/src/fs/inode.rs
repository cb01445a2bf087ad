//! A file in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use crossbeam::atomic::AtomicCell;
use parking_lot::Mutex;
use pumice_bdev::Ticket;

use super::cache::Cache;
use super::error::{FsError, Result};
use super::frame::FileCache;
use super::tail::Tail;
use crate::blobstore::{Blob, BlobId};

/// Names of the xattrs of a file. Those with the prefix `pumice.` are ours, and SPDK ignores them.
pub(crate) mod xattr {
    /// The path, with a NUL.
    pub const NAME: &str = "name";
    /// Length in bytes, u64.
    pub const LENGTH: &str = "length";
    /// One byte; the file is gone as soon as nobody has it open.
    pub const IS_DELETED: &str = "is_deleted";
    /// Further names, each with a NUL.
    pub const LINKS: &str = "pumice.links";
    /// One byte; the blob marks a directory.
    pub const DIR: &str = "pumice.dir";
    /// u64; of two blobs with one name, the higher has it.
    pub const SEQ: &str = "pumice.seq";
    /// u64; the id of the blob from which this one took a name.
    pub const REPLACES: &str = "pumice.replaces";
    /// Two paths, each with a NUL: a rename of this directory that has to be finished.
    pub const RENAME: &str = "pumice.rename";
    /// u64; nanoseconds since 1970.
    pub const MTIME: &str = "pumice.mtime";
}

/// Now, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads in flight ahead of the reader.
#[derive(Default)]
pub(crate) struct Ahead {
    pub runs: Vec<(std::ops::Range<u64>, Ticket)>,
}

/// How far the life of a file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// It has a name.
    Named,
    /// It is being deleted or replaced while nobody has it open. A thread that wants to open it waits
    /// for `ops` and looks again.
    Dying,
    /// Its last name is gone; the last close deletes it.
    Orphan,
    /// Its blob has been deleted, or a thread is about to delete it.
    Gone,
}

/// A file, open or not. Fields without a lock of their own are written under `tail`.
pub(crate) struct Inode {
    pub id: BlobId,
    /// The blob; taken out to delete it.
    pub blob: ArcSwapOption<Blob>,
    /// Bytes that have clusters, for those who do not hold `tail`.
    pub allocated: AtomicU64,
    /// Length that readers see.
    pub len: AtomicU64,
    /// Length on the device.
    pub durable_len: AtomicU64,
    /// About as much as has been handed to the device.
    pub started: AtomicU64,
    /// Sequence of the last write that a flush has to cover.
    pub unflushed: AtomicU64,
    pub frames: Arc<FileCache>,
    /// The append lock.
    pub tail: Mutex<Tail>,
    /// One sync or truncation at a time. Taken before `tail`.
    pub sync_lock: Mutex<()>,
    /// Counts truncations: a read of the device that overlaps one is done again.
    pub epoch: AtomicU64,
    pub ahead: Mutex<Ahead>,
    pub ahead_count: AtomicUsize,
    /// Opening needs it: it may go into the reserve.
    pub essential: AtomicBool,
    /// Paths; the first is in the xattr `name`. Changed under the namespace's `ops`.
    pub names: Mutex<Vec<String>>,
    pub mtime_ns: AtomicU64,
    /// Open handles.
    pub opens: AtomicUsize,
    pub life: AtomicCell<Life>,
}

impl Inode {
    pub fn new(
        blob: Blob,
        len: u64,
        names: Vec<String>,
        mtime_ns: u64,
        cache: &Arc<Cache>,
    ) -> Arc<Inode> {
        let allocated = blob.num_clusters() * blob.store().cluster_size();
        Arc::new(Inode {
            id: blob.id(),
            len: AtomicU64::new(len),
            durable_len: AtomicU64::new(len),
            started: AtomicU64::new(len),
            unflushed: AtomicU64::new(0),
            frames: FileCache::new(cache),
            tail: Mutex::new(Tail::new(len, allocated)),
            sync_lock: Mutex::new(()),
            epoch: AtomicU64::new(0),
            ahead: Mutex::default(),
            ahead_count: AtomicUsize::new(0),
            allocated: AtomicU64::new(allocated),
            essential: AtomicBool::new(false),
            names: Mutex::new(names),
            mtime_ns: AtomicU64::new(mtime_ns),
            opens: AtomicUsize::new(0),
            life: AtomicCell::new(Life::Named),
            blob: ArcSwapOption::from_pointee(blob),
        })
    }

    /// The blob, unless it has been deleted or the file system unmounted.
    pub fn blob(&self) -> Result<Arc<Blob>> {
        let blob = self.blob.load_full();
        blob.ok_or_else(|| FsError::Unmounted { path: self.path() })
    }

    /// Closes the blob.
    pub fn close_blob(&self) {
        self.blob.store(None);
    }

    /// Whether clusters may be unallocated: such a file keeps the clusters that it has. A snapshot of the
    /// blob makes it thin.
    pub fn is_thin(&self) -> bool {
        self.blob.load().as_ref().is_some_and(|blob| blob.is_thin())
    }

    /// Whether it can only be read.
    pub fn is_frozen(&self) -> bool {
        let blob = self.blob.load();
        blob.as_ref().is_some_and(|blob| blob.is_read_only())
    }

    /// Its path, for errors.
    pub fn path(&self) -> String {
        let names = self.names.lock();
        names
            .first()
            .cloned()
            .unwrap_or_else(|| format!("deleted file (blob {})", self.id))
    }

    /// The error of bytes that were accepted and are not in memory any more. Only a defect of the
    /// file system can cause it; better an error than a length over bytes that were never written.
    pub fn lost(&self, from: u64, upto: u64) -> FsError {
        FsError::Corrupt {
            blob: self.id.0,
            reason: format!(
                "{}: bytes {from} to {upto} were accepted and are not in memory any more",
                self.path()
            ),
        }
    }

    /// Whether its blob is or may soon be deleted: what it has is not written any more.
    pub fn is_going(&self) -> bool {
        matches!(self.life.load(), Life::Dying | Life::Gone)
    }

    #[inline]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Inode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Inode({} {}, {} bytes)",
            self.id,
            self.path(),
            self.len()
        )
    }
}
