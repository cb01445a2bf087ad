//! A file in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use crossbeam::atomic::AtomicCell;
use crossbeam::utils::Backoff;
use parking_lot::Mutex;

use super::attributes::{MODE_BITS, Own};
use super::cache::Cache;
use super::error::{FsError, Result};
use super::frame::FileCache;
use super::runs::Ahead;
use super::syncs::Syncs;
use super::tail::Tail;
use super::volume::store_error;
use crate::blobstore::{Blob, BlobId};

/// The time after which a deletion or an unmount waits no longer for threads that use a blob.
pub(crate) const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// Names of the xattrs of a file. Those with the prefix `pumice.` are ours, and SPDK ignores them.
pub(crate) mod xattr {
    /// The path, with a NUL.
    pub const NAME: &str = "name";
    /// Length in bytes, u64.
    pub const LENGTH: &str = "length";
    /// One byte; the file is deleted as soon as nobody has it open.
    pub const IS_DELETED: &str = "is_deleted";
    /// Further names, each with a NUL.
    pub const LINKS: &str = "pumice.links";
    /// One byte; the blob marks a directory.
    pub const DIR: &str = "pumice.dir";
    /// u64; of two blobs with one name, the higher one has it.
    pub const SEQ: &str = "pumice.seq";
    /// u64; the id of the blob from which this one took a name.
    pub const REPLACES: &str = "pumice.replaces";
    /// Two paths, each with a NUL: an incomplete rename of this directory.
    pub const RENAME: &str = "pumice.rename";
    /// u64; nanoseconds since 1970.
    pub const MTIME: &str = "pumice.mtime";
    /// u32; permission bits.
    pub const MODE: &str = "pumice.mode";
}

/// Returns the mode that an xattr holds.
pub(crate) fn decode_mode(raw: &[u8]) -> Option<u32> {
    let mode = u32::from_le_bytes(raw.try_into().ok()?);
    Some(mode & MODE_BITS)
}

/// Returns the current time in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    ns(SystemTime::now())
}

/// Returns a time in nanoseconds since 1970.
pub(crate) fn ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The state of a file's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// The file has a name.
    Named,
    /// It is being deleted or replaced while nobody has it open. A thread that wants to open it
    /// waits for `ops` and looks again.
    Dying,
    /// The last name was removed. The last close deletes the file.
    Orphan,
    /// The blob has been deleted, or a thread is about to delete it.
    Gone,
}

/// A file, open or not. Fields without a lock of their own are written with `tail` locked.
pub(crate) struct Inode {
    pub id: BlobId,
    /// The blob, which is taken out to delete it.
    pub blob: ArcSwapOption<Blob>,
    /// Number of bytes that have clusters, for threads that do not hold `tail`.
    pub allocated: AtomicU64,
    /// The length that readers see.
    pub len: AtomicU64,
    /// The length on the device.
    pub durable_len: AtomicU64,
    /// About the number of bytes that were submitted.
    pub started: AtomicU64,
    /// Sequence of the last write that a flush has to cover.
    pub unflushed: AtomicU64,
    pub frames: Arc<FileCache>,
    /// The append lock.
    pub tail: Mutex<Tail>,
    /// Allows one sync or truncation at a time. Its lock is taken before `tail`.
    pub syncs: Syncs,
    /// Number of truncations. A read from the device that overlaps one is repeated.
    pub epoch: AtomicU64,
    pub ahead: Ahead,
    /// Whether opening an application's data needs the file, so that it may use the reserve.
    pub essential: AtomicBool,
    /// The paths, of which the first is in the xattr `name`. They are changed with the namespace's
    /// `ops` held.
    pub names: Mutex<Vec<String>>,
    /// Number of entries of the map of names that are this file. It changes with the map.
    pub entries: AtomicU32,
    pub mtime_ns: AtomicU64,
    /// The attributes that were set. A leaf among the locks.
    pub own: Mutex<Own>,
    /// Number of open handles.
    pub opens: AtomicUsize,
    pub life: AtomicCell<Life>,
}

impl Inode {
    pub fn new(
        blob: Blob,
        len: u64,
        names: Vec<String>,
        mtime_ns: u64,
        mode: Option<u32>,
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
            syncs: Syncs::default(),
            epoch: AtomicU64::new(0),
            ahead: Ahead::default(),
            allocated: AtomicU64::new(allocated),
            essential: AtomicBool::new(false),
            names: Mutex::new(names),
            entries: AtomicU32::new(0),
            mtime_ns: AtomicU64::new(mtime_ns),
            own: Mutex::new(Own::new(mode)),
            opens: AtomicUsize::new(0),
            life: AtomicCell::new(Life::Named),
            blob: ArcSwapOption::from_pointee(blob),
        })
    }

    /// Returns the blob, unless it was deleted or the file system unmounted.
    pub fn blob(&self) -> Result<Arc<Blob>> {
        let blob = self.blob.load_full();
        blob.ok_or_else(|| FsError::Unmounted { path: self.path() })
    }

    /// Has the bytes put in place that the journal has carried. The caller holds the append lock.
    ///
    /// # Errors
    /// Fails when the device does. The bytes are still in the journal.
    pub fn settle(&self) -> Result<()> {
        let blob = self.blob.load_full();
        let settled = blob.map_or(Ok(()), |blob| blob.settle());
        settled.map_err(|e| store_error(self.path(), e, 0))
    }

    /// Closes the blob, since the store neither deletes a blob that is open nor is unloaded beside one. Threads that use it at this
    /// moment without the append lock, as a read or [`Inode::is_thin`] does, are waited for. Returns whether it was open.
    pub fn close_blob(&self) -> bool {
        self.close_blob_by(Instant::now() + LOOK_TIMEOUT)
    }

    /// Closes the blob as [`Inode::close_blob`] does, and waits until `deadline` at most.
    pub fn close_blob_by(&self, deadline: Instant) -> bool {
        let Some(mut blob) = self.blob.swap(None) else {
            return false;
        };
        let pause = Backoff::new();
        while let Err(looked_at) = Arc::try_unwrap(blob) {
            if Instant::now() > deadline {
                tracing::error!(
                    file = self.path(),
                    "the blob stays open: another thread uses it"
                );
                break;
            }
            blob = looked_at;
            // A look takes some instructions, a read as long as the device.
            if pause.is_completed() {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                pause.snooze();
            }
        }
        true
    }

    /// Whether clusters may be unallocated. Such a file keeps its clusters. A snapshot of the blob
    /// makes it thin.
    pub fn is_thin(&self) -> bool {
        self.blob.load().as_ref().is_some_and(|blob| blob.is_thin())
    }

    /// Whether the file can only be read.
    pub fn is_frozen(&self) -> bool {
        let blob = self.blob.load();
        blob.as_ref().is_some_and(|blob| blob.is_read_only())
    }

    /// Returns its path, for errors.
    pub fn path(&self) -> String {
        let names = self.names.lock();
        names
            .first()
            .cloned()
            .unwrap_or_else(|| format!("deleted file (blob {})", self.id))
    }

    /// Returns the error of bytes that were accepted and are not in memory. Only a defect of the
    /// file system can cause it. An error is better than a length over bytes that were never
    /// written.
    pub fn lost(&self, from: u64, upto: u64) -> FsError {
        FsError::Corrupt {
            blob: self.id.0,
            reason: format!(
                "{}: bytes {from} to {upto} were accepted and are not in memory",
                self.path()
            ),
        }
    }

    /// Whether its blob is deleted or may be soon, so that nothing of it needs to be written.
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
