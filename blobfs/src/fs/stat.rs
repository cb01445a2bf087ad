//! The properties of files and directories.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::inode::Inode;
use super::names::Dir;
use crate::blobstore::BlobId;

/// Properties of a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stat {
    /// Length in bytes.
    pub len: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Time of the last change; the epoch if it is not known.
    pub mtime: SystemTime,
    /// Id of the blob; `None` for a directory that only names imply.
    pub blob_id: Option<BlobId>,
    /// Space in use, in bytes.
    pub allocated: u64,
    /// Number of names of the file.
    pub links: usize,
    /// Permission bits, if they were set; see [`Attributes`](super::Attributes).
    pub mode: Option<u32>,
}

impl Stat {
    pub(crate) fn of_file(ino: &Inode) -> Stat {
        Stat {
            links: ino.names.lock().len(),
            mode: ino.own.lock().mode,
            ..Stat::of_inherited_file(ino)
        }
    }

    /// Returns what can be told of a file in a forked child, where the holder of a lock may not exist.
    pub(crate) fn of_inherited_file(ino: &Inode) -> Stat {
        Stat {
            len: ino.len(),
            is_dir: false,
            mtime: UNIX_EPOCH + Duration::from_nanos(ino.mtime_ns.load(Ordering::Relaxed)),
            blob_id: Some(ino.id),
            allocated: ino.allocated.load(Ordering::Acquire),
            links: 0,
            mode: None,
        }
    }

    pub(crate) fn of_dir(dir: &Dir) -> Stat {
        Stat {
            len: 0,
            is_dir: true,
            mtime: UNIX_EPOCH + Duration::from_nanos(dir.mtime_ns.load(Ordering::Relaxed)),
            blob_id: *dir.marker.lock(),
            allocated: 0,
            links: 1,
            mode: dir.mode.load(),
        }
    }
}
