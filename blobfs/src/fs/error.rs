//! Errors of the file system.

use std::sync::Arc;

use pumice_bdev::{BdevError, DmaError, IoError, IoErrorKind};

/// An error of the file system, with the path and the cause in its text. [`FsError::errno`] returns
/// the number that a C caller expects.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// There is no file or directory of that name.
    #[error("{path}: no such file or directory")]
    NotFound {
        /// The requested path.
        path: String,
    },
    /// A file or directory has the name already.
    #[error("{path}: it exists already")]
    Exists {
        /// The existing path.
        path: String,
    },
    /// The path is not a directory.
    #[error("{path}: not a directory")]
    NotDir {
        /// Path of the file.
        path: String,
    },
    /// The path is a directory.
    #[error("{path}: is a directory")]
    IsDir {
        /// Path of the directory.
        path: String,
    },
    /// The directory still has entries.
    #[error("{path}: directory not empty")]
    NotEmpty {
        /// Path of the directory.
        path: String,
    },
    /// There is no space of some kind. Nothing was changed.
    #[error("{what}: {}", .kind.text(*.free_bytes))]
    NoSpace {
        /// The operation that needed the space.
        what: String,
        /// The kind of space.
        kind: SpaceKind,
        /// Number of free bytes: of the file system's clusters, or for [`SpaceKind::Host`] below
        /// the image.
        free_bytes: u64,
    },
    /// The name is too long for the format.
    #[error(
        "{path}: the name has {len} bytes with its directories, and may have {max}; use a shorter one"
    )]
    NameTooLong {
        /// The path.
        path: String,
        /// Length of the path in bytes.
        len: usize,
        /// Most bytes.
        max: usize,
    },
    /// Another handle holds the lock of the file.
    #[error("{path} is locked by another database of this process: close that one first")]
    Locked {
        /// Path of the file.
        path: String,
    },
    /// An argument is invalid.
    #[error("{what}: {reason}")]
    InvalidInput {
        /// The argument or the path.
        what: String,
        /// The reason, and a correct form.
        reason: String,
    },
    /// The file system is mounted read-only.
    #[error("{path}: the file system is mounted read-only")]
    ReadOnly {
        /// The path that was to be changed.
        path: String,
    },
    /// An operation of the device failed.
    #[error("{context}: {source}")]
    Io {
        /// The operation of the file system.
        context: String,
        /// The device's error.
        source: Arc<IoError>,
        /// Whether bytes that were accepted before may be lost.
        data_loss: bool,
    },
    /// The device failed in the middle of a change, which may be done, or may be completed by the
    /// next mount. Until then the file system continues with the old state.
    #[error("{what}: the outcome is open, the next mount decides: {source}")]
    Undecided {
        /// The change.
        what: String,
        /// The error.
        source: Arc<FsError>,
    },
    /// The metadata on the device is inconsistent.
    #[error("blob {blob:#x}: {reason}; `pumice fsck` can say more")]
    Corrupt {
        /// Id of the blob.
        blob: u64,
        /// The inconsistency.
        reason: String,
    },
    /// The file system is damaged, and was to be mounted for writing. Nothing was written.
    #[error(
        "{device}: the file system is damaged: {}; mount it read-only to copy what can be read; \
         `pumice fsck --repair` gives up damaged blobs, and the mount option accept_damage goes on without what is damaged",
        crate::blobstore::some_lines(.damage)
    )]
    Damaged {
        /// Name of the device.
        device: String,
        /// A line for each damage, with the path where it is known.
        damage: Vec<String>,
    },
    /// Another process, or another part of this one, has the device.
    #[error("{device}: in use by {}", owner(*.pid))]
    InUse {
        /// Name of the device.
        device: String,
        /// The process that has it, where the kernel says.
        pid: Option<u32>,
    },
    /// The device has other content.
    #[error("{device}: holds {found}; {hint}")]
    Foreign {
        /// Name of the device.
        device: String,
        /// The recognised content.
        found: String,
        /// The advice to the user.
        hint: String,
    },
    /// The parent of this process mounted the file system.
    #[error(
        "{device}: mounted by the parent of this process: a mount is not inherited; mount in the \
         child, or fork before mounting"
    )]
    Forked {
        /// Name of the device.
        device: String,
    },
    /// The file has as many names as its metadata can hold.
    #[error("{path}: too many hard links to one file; copy it instead")]
    TooManyLinks {
        /// A name that it has.
        path: String,
    },
    /// The file system was unmounted.
    #[error("{path}: the file system has been unmounted")]
    Unmounted {
        /// The requested path.
        path: String,
    },
    /// There is no memory for buffers.
    #[error("there is no memory for buffers: {0}")]
    NoMemory(#[source] Arc<DmaError>),
    /// The device as a whole failed.
    #[error(transparent)]
    Device(Arc<BdevError>),
    /// An error of the blobstore.
    #[error("{context}: {source}")]
    Store {
        /// The operation of the file system.
        context: String,
        /// The blobstore's error.
        source: Arc<crate::blobstore::Error>,
    },
}

fn owner(pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid == std::process::id() => {
            format!("this process ({pid}): unmount it there first, or share that file system")
        }
        Some(pid) => format!("process {pid}; stop it first"),
        None => "another process; stop it first".to_owned(),
    }
}

/// A kind of space that a file system can run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpaceKind {
    /// The clusters, of which files consist.
    Clusters,
    /// Metadata pages, when there is no room for more of them.
    MetadataPages,
    /// Space on the kernel's file system that holds a sparse image.
    Host,
}

impl SpaceKind {
    fn text(self, free_bytes: u64) -> String {
        match self {
            SpaceKind::Clusters => format!(
                "no space left ({free_bytes} bytes free); delete files, or make the file system larger with `pumice grow`"
            ),
            SpaceKind::MetadataPages => format!(
                "no space left: the metadata pages are used up ({free_bytes} bytes free, but not enough of them in one piece for more pages); \
                 delete files, or make the file system larger with `pumice grow`"
            ),
            SpaceKind::Host => format!(
                "no space left on the file system that holds the image ({free_bytes} bytes free there); make room there and try again"
            ),
        }
    }
}

/// Result with [`FsError`].
pub type Result<T> = std::result::Result<T, FsError>;

impl FsError {
    /// Returns the errno that a kernel file system would return.
    pub fn errno(&self) -> i32 {
        match self {
            FsError::NotFound { .. } => libc::ENOENT,
            FsError::Exists { .. } => libc::EEXIST,
            FsError::NotDir { .. } => libc::ENOTDIR,
            FsError::IsDir { .. } => libc::EISDIR,
            FsError::NotEmpty { .. } => libc::ENOTEMPTY,
            FsError::NoSpace { .. } => libc::ENOSPC,
            FsError::NameTooLong { .. } => libc::ENAMETOOLONG,
            FsError::Locked { .. } => libc::EAGAIN,
            FsError::InvalidInput { .. } | FsError::Foreign { .. } => libc::EINVAL,
            FsError::Damaged { .. } => libc::EUCLEAN,
            FsError::ReadOnly { .. } => libc::EROFS,
            FsError::Io { source, .. } => match source.kind {
                IoErrorKind::NoSpace => libc::ENOSPC,
                IoErrorKind::ReadOnly => libc::EROFS,
                _ => libc::EIO,
            },
            FsError::Undecided { .. } => libc::EIO,
            FsError::Corrupt { .. } => libc::EUCLEAN,
            FsError::InUse { .. } => libc::EBUSY,
            FsError::Unmounted { .. } | FsError::Forked { .. } => libc::EBADF,
            FsError::TooManyLinks { .. } => libc::EMLINK,
            FsError::NoMemory(_) => libc::ENOMEM,
            FsError::Device(e) => e.errno(),
            FsError::Store { .. } => libc::EIO,
        }
    }

    /// Whether the same call may succeed when it is tried again: after space was freed, or after a
    /// transient fault of the device.
    pub fn is_retryable(&self) -> bool {
        match self {
            FsError::NoSpace { .. } | FsError::NoMemory(_) => true,
            FsError::Io { source, .. } => source.is_retryable(),
            _ => false,
        }
    }

    /// Whether bytes that a call had accepted may be lost.
    pub fn is_data_loss(&self) -> bool {
        matches!(
            self,
            FsError::Corrupt { .. }
                | FsError::Io {
                    data_loss: true,
                    ..
                }
        )
    }

    /// Whether there is no space, in the file system or below the device.
    pub(crate) fn is_no_space(&self) -> bool {
        self.errno() == libc::ENOSPC
    }

    /// Returns the same error with the position in the file.
    pub(crate) fn in_file(self, path: &str, off: u64) -> FsError {
        match self {
            FsError::Io {
                context,
                source,
                data_loss,
            } => FsError::Io {
                context: format!("{path}: {context} of bytes from {off} on"),
                source,
                data_loss,
            },
            e => e,
        }
    }

    pub(crate) fn not_found(path: &str) -> FsError {
        FsError::NotFound {
            path: path.to_owned(),
        }
    }

    pub(crate) fn invalid(what: &str, reason: impl Into<String>) -> FsError {
        FsError::InvalidInput {
            what: what.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn io(context: impl Into<String>, source: Box<IoError>) -> FsError {
        FsError::Io {
            context: context.into(),
            source: Arc::from(source),
            data_loss: false,
        }
    }
}

impl From<DmaError> for FsError {
    fn from(e: DmaError) -> FsError {
        FsError::NoMemory(Arc::new(e))
    }
}

impl From<BdevError> for FsError {
    fn from(e: BdevError) -> FsError {
        match e {
            BdevError::InUse { device, pid } => FsError::InUse { device, pid },
            e => FsError::Device(Arc::new(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::{FileSystem, FormatOptions, MountOptions};

    fn io(kind: IoErrorKind) -> FsError {
        let dev = pumice_bdev::open("malloc://1M").unwrap();
        FsError::io(
            "test",
            dev.info().error(&pumice_bdev::Op::Flush, kind, "test"),
        )
    }

    #[test]
    fn errors_have_the_numbers_that_a_kernel_gives() {
        let path = || "/f".to_owned();
        let no_space = crate::blobstore::Error::NoSpace {
            needed: 2,
            free: 1,
            total: 9,
        };
        let no_space = crate::fs::volume::store_error("append", no_space, 4096);
        let cases = [
            (FsError::not_found("/f"), libc::ENOENT, false),
            (FsError::Exists { path: path() }, libc::EEXIST, false),
            (FsError::NotDir { path: path() }, libc::ENOTDIR, false),
            (FsError::IsDir { path: path() }, libc::EISDIR, false),
            (FsError::NotEmpty { path: path() }, libc::ENOTEMPTY, false),
            (no_space, libc::ENOSPC, true),
            (FsError::Locked { path: path() }, libc::EAGAIN, false),
            (FsError::invalid("/f", "no"), libc::EINVAL, false),
            (FsError::ReadOnly { path: path() }, libc::EROFS, false),
            (FsError::Unmounted { path: path() }, libc::EBADF, false),
            (io(IoErrorKind::NoSpace), libc::ENOSPC, false),
            (io(IoErrorKind::ReadOnly), libc::EROFS, false),
            (io(IoErrorKind::Media), libc::EIO, false),
            (io(IoErrorKind::Busy), libc::EIO, true),
        ];
        for (error, errno, retryable) in cases {
            assert_eq!(error.errno(), errno, "{error}");
            assert_eq!(error.is_retryable(), retryable, "{error}");
            assert_eq!(error.is_no_space(), errno == libc::ENOSPC, "{error}");
        }
    }

    #[test]
    fn a_device_that_is_mounted_already_is_in_use() {
        let dev = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
        let mount = || FileSystem::mount(Arc::clone(&dev), &MountOptions::default());
        let fs = mount().unwrap();
        let twice = mount().unwrap_err();
        assert_eq!(twice.errno(), libc::EBUSY, "{twice}");
        fs.unmount().unwrap();
        mount().unwrap();
    }
}
