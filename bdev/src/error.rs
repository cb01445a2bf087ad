//! Errors: [`IoError`] for one operation, [`BdevError`] for devices as a whole.

use std::fmt;
use std::io;
use std::path::PathBuf;

use pumice_io::uri::UriError;

use crate::op::{Op, OpKind};

/// What went wrong with an I/O operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoErrorKind {
    /// The range does not lie inside the device.
    OutOfRange,
    /// A length or a buffer is not aligned as the device needs it, or is empty.
    Misaligned,
    /// The operation is longer than the device takes ([`crate::DeviceInfo::max_io_blocks`]).
    TooLong,
    /// The device cannot do it.
    Unsupported,
    /// The device cannot be written.
    ReadOnly,
    /// There is no space left for it (a sparse image on a full file system, a thin device).
    NoSpace,
    /// The medium could not give the data back, or did not take it.
    Media,
    /// The transfer ended early: `done_bytes` were transferred. Also a backing file that shrank.
    Short {
        /// How much was transferred.
        done_bytes: u64,
    },
    /// A compare found a difference at `offset_bytes` into the operation.
    Miscompare {
        /// First byte that differs.
        offset_bytes: u64,
    },
    /// Ended by a reset, an abort or the removal of something below.
    Aborted,
    /// Not completed in time. It may still land.
    TimedOut,
    /// The device is gone.
    Removed,
    /// The device is busy with something that excludes this; try again.
    Busy,
    /// An NVMe status (NVM Express Base Specification 2.0, section 3.3.3.2.1).
    Nvme {
        /// Status code type.
        sct: u8,
        /// Status code.
        sc: u8,
        /// Do not retry.
        dnr: bool,
    },
    /// Another error of the operating system, by errno.
    Os(i32),
    /// No memory for it.
    NoMemory,
}

impl IoErrorKind {
    /// Whether the same operation may succeed when tried again.
    pub fn is_retryable(self) -> bool {
        match self {
            IoErrorKind::Aborted | IoErrorKind::Busy | IoErrorKind::NoMemory => true,
            IoErrorKind::Nvme { dnr, .. } => !dnr,
            IoErrorKind::Os(e) => e == libc::EAGAIN || e == libc::EINTR || e == libc::EBUSY,
            _ => false,
        }
    }

    /// From an errno.
    pub fn from_errno(errno: i32) -> IoErrorKind {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => IoErrorKind::NoSpace,
            libc::EIO | libc::EILSEQ | libc::ENODATA | libc::EREMOTEIO => IoErrorKind::Media,
            libc::EOPNOTSUPP => IoErrorKind::Unsupported,
            libc::EROFS | libc::EPERM => IoErrorKind::ReadOnly,
            libc::ENODEV | libc::ENXIO => IoErrorKind::Removed,
            libc::ECANCELED => IoErrorKind::Aborted,
            libc::ETIMEDOUT | libc::ETIME => IoErrorKind::TimedOut,
            libc::ENOMEM => IoErrorKind::NoMemory,
            e => IoErrorKind::Os(e),
        }
    }
}

impl fmt::Display for IoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IoErrorKind::OutOfRange => f.write_str("out of range"),
            IoErrorKind::Misaligned => f.write_str("misaligned"),
            IoErrorKind::TooLong => f.write_str("too long"),
            IoErrorKind::Unsupported => f.write_str("not supported by the device"),
            IoErrorKind::ReadOnly => f.write_str("device is read-only"),
            IoErrorKind::NoSpace => f.write_str("no space left"),
            IoErrorKind::Media => f.write_str("media error"),
            IoErrorKind::Short { done_bytes } => {
                write!(f, "short transfer, {done_bytes} bytes done")
            }
            IoErrorKind::Miscompare { offset_bytes } => {
                write!(f, "miscompare at byte {offset_bytes}")
            }
            IoErrorKind::Aborted => f.write_str("aborted"),
            IoErrorKind::TimedOut => f.write_str("timed out"),
            IoErrorKind::Removed => f.write_str("device removed"),
            IoErrorKind::Busy => f.write_str("device busy"),
            IoErrorKind::Nvme { sct, sc, dnr } => {
                let dnr = if *dnr { ", do not retry" } else { "" };
                write!(f, "NVMe status {sct:#x}/{sc:#04x}{dnr}")
            }
            IoErrorKind::Os(e) => write!(f, "{}", io::Error::from_raw_os_error(*e)),
            IoErrorKind::NoMemory => f.write_str("out of memory"),
        }
    }
}

/// An I/O operation that failed: which device, what, where, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoError {
    /// Name of the device that failed (in a stack: the one where the error arose).
    pub device: String,
    /// The operation.
    pub op: OpKind,
    /// First block.
    pub lba: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Block size of the device, so that the text can give the byte offset.
    pub block_size: u32,
    /// The class of the error.
    pub kind: IoErrorKind,
    /// More about the cause; may be empty.
    pub detail: String,
}

impl IoError {
    /// An error of `op` on the device `device`.
    pub fn new(
        device: &str,
        block_size: u32,
        op: &Op,
        kind: IoErrorKind,
        detail: impl Into<String>,
    ) -> Box<IoError> {
        Box::new(IoError {
            device: device.to_owned(),
            op: op.kind(),
            lba: op.lba(),
            len_bytes: op.len_bytes(block_size),
            block_size,
            kind,
            detail: detail.into(),
        })
    }

    /// Whether the same operation may succeed when tried again.
    pub fn is_retryable(&self) -> bool {
        self.kind.is_retryable()
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.device, self.op)?;
        if self.len_bytes > 0 {
            let offset = u128::from(self.lba) * u128::from(self.block_size);
            let (len, lba) = (self.len_bytes, self.lba);
            write!(f, " of {len} bytes at LBA {lba} (byte offset {offset})")?;
        }
        write!(f, ": {}", self.kind)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for IoError {}

/// Errors of devices, names, configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BdevError {
    /// A URI that says nothing we can open.
    #[error("{uri}: {reason}")]
    InvalidUri {
        /// The URI.
        uri: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An option or parameter with a value that cannot be.
    #[error("{name}: {reason}")]
    InvalidOption {
        /// Its name.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Somebody else has it.
    #[error("{device}: in use by {}", owner(*.pid))]
    InUse {
        /// Device or path.
        device: String,
        /// Its owner, where the kernel says.
        pid: Option<u32>,
    },
    /// A block device that is mounted, or a backing file that a loop device uses.
    #[error("{device}: {reason}")]
    Unsafe {
        /// Device or path.
        device: String,
        /// Why it must not be touched, and what to do.
        reason: String,
    },
    /// A system call failed.
    #[error("{device}: {what}: {source}")]
    Os {
        /// Device or path.
        device: String,
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The device holds something, or could not be read as a whole, and nobody has said that it may
    /// be written over.
    #[error(
        "{device}: holds {contents}; nothing was changed; to lose that, say so: --force \
         (`force`, `Overwrite::Anything` in the library)"
    )]
    NotBlank {
        /// Device or path.
        device: String,
        /// What was found.
        contents: crate::contents::Contents,
    },
    /// A file has another size than the one that was asked for.
    #[error(
        "{}: the file has {found_bytes} bytes, size= says {wanted_bytes}; nothing was changed; leave \
         size= out, or make the file and what is on it longer: pumice grow {} {wanted_bytes}",
        .path.display(), .path.display()
    )]
    WrongSize {
        /// The path.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The size that was asked for.
        wanted_bytes: u64,
    },
    /// The path does not exist.
    #[error("{}: {hint}", .path.display())]
    NoSuchFile {
        /// The path.
        path: PathBuf,
        /// What is missing, and what to do.
        hint: String,
    },
    /// The NVMe driver's own.
    #[cfg(feature = "nvme")]
    #[error(transparent)]
    Nvme {
        /// What went wrong.
        source: pumice_nvme::NvmeError,
    },
    /// No device of that name.
    #[error("no bdev `{name}`{hint}")]
    NotFound {
        /// The name asked for.
        name: String,
        /// What there is instead; starts with punctuation.
        hint: String,
    },
    /// The name, or the alias, is taken.
    #[error("bdev `{name}` exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Another module claims the device.
    #[error("bdev `{name}` is claimed by {by}")]
    Claimed {
        /// The device.
        name: String,
        /// Who holds it.
        by: String,
    },
    /// The device is gone.
    #[error("bdev `{name}` was removed")]
    Removed {
        /// The device.
        name: String,
    },
    /// Something that this build, machine or module cannot do.
    #[error("{device}: {reason}")]
    Unsupported {
        /// Device, module or path.
        device: String,
        /// What, and what would work.
        reason: String,
    },
    /// No DMA memory.
    #[error("{device}: {source}")]
    Dma {
        /// Device.
        device: String,
        /// Why.
        #[source]
        source: crate::DmaError,
    },
    /// A single operation failed.
    #[error(transparent)]
    Io(#[from] Box<IoError>),
}

impl From<UriError> for BdevError {
    fn from(e: UriError) -> BdevError {
        BdevError::InvalidUri {
            uri: e.uri,
            reason: e.reason,
        }
    }
}

fn owner(pid: Option<u32>) -> String {
    const OTHER: &str = "stop it or use another device";
    match pid {
        Some(pid) if pid == std::process::id() => format!(
            "this process ({pid}), which has it open already: close or unmount it there, or share \
             that handle"
        ),
        Some(pid) => format!("process {pid}; {OTHER}"),
        None => format!("another process; {OTHER}"),
    }
}

impl BdevError {
    /// The errno that says the same.
    pub fn errno(&self) -> i32 {
        match self {
            BdevError::NotFound { .. } | BdevError::Removed { .. } => libc::ENODEV,
            BdevError::Exists { .. } => libc::EEXIST,
            BdevError::Claimed { .. } => libc::EPERM,
            BdevError::InUse { .. } | BdevError::Unsafe { .. } | BdevError::NotBlank { .. } => {
                libc::EBUSY
            }
            BdevError::NoSuchFile { .. } => libc::ENOENT,
            BdevError::Unsupported { .. } => libc::ENOTSUP,
            BdevError::Dma { .. } => libc::ENOMEM,
            BdevError::Os { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            #[cfg(feature = "nvme")]
            BdevError::Nvme { source } => source.errno(),
            BdevError::Io(_) => libc::EIO,
            BdevError::InvalidUri { .. }
            | BdevError::InvalidOption { .. }
            | BdevError::WrongSize { .. } => libc::EINVAL,
        }
    }

    /// A system call failed: on which device or path, what, why.
    pub fn os(device: impl Into<String>, what: impl Into<String>, e: io::Error) -> Self {
        BdevError::Os {
            device: device.into(),
            what: what.into(),
            source: e,
        }
    }
}
