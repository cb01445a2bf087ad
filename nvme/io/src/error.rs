//! Errors of one operation.

use std::fmt;
use std::io;

use crate::op::{Op, OpKind};

/// The kind of an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoErrorKind {
    /// The range does not lie inside the device.
    OutOfRange,
    /// A length or a buffer is empty or not aligned as the device requires.
    Misaligned,
    /// The operation is longer than the device accepts.
    TooLong,
    /// The device does not support the operation.
    Unsupported,
    /// The device cannot be written.
    ReadOnly,
    /// There is no space for the data (a sparse image on a full file system, a thin device).
    NoSpace,
    /// The medium could not read or write the data.
    Media,
    /// The transfer ended early. The backing file may have been made shorter.
    Short {
        /// Number of bytes that were transferred.
        done_bytes: u64,
    },
    /// A compare found a difference at `offset_bytes` into the operation.
    Miscompare {
        /// First byte that differs.
        offset_bytes: u64,
    },
    /// A reset, an abort or the removal of a device below ended the operation.
    Aborted,
    /// The operation did not complete in time. It may still take effect.
    TimedOut,
    /// The device was removed.
    Removed,
    /// The device is busy with something that excludes this operation. It can be tried again.
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
    /// There is no memory for the operation.
    NoMemory,
}

impl IoErrorKind {
    /// Whether the same operation may succeed when it is tried again.
    pub fn is_retryable(self) -> bool {
        match self {
            IoErrorKind::Aborted | IoErrorKind::Busy | IoErrorKind::NoMemory => true,
            IoErrorKind::Nvme { dnr, .. } => !dnr,
            IoErrorKind::Os(e) => e == libc::EAGAIN || e == libc::EINTR || e == libc::EBUSY,
            _ => false,
        }
    }

    /// Returns the kind of an errno.
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

/// The status of a command that an NVMe controller completed: the 15 bits of the completion queue
/// entry from the status code to Do Not Retry (NVM Express Base Specification 2.0, section
/// 3.3.3.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NvmeStatus(pub u16);

/// A failed I/O operation: its device, operation, place and reason.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoError {
    /// Name of the device on which the error arose.
    pub device: String,
    /// The operation.
    pub op: OpKind,
    /// First block.
    pub lba: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Block size of the device, so that the text can give the byte offset.
    pub block_size: u32,
    /// The kind of error.
    pub kind: IoErrorKind,
    /// The status of the NVMe command, if a controller has completed one.
    pub nvme_status: Option<NvmeStatus>,
    /// More about the cause; may be empty.
    pub detail: String,
}

impl IoError {
    /// Makes an error of `op` on the device `device`.
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
            nvme_status: None,
            detail: detail.into(),
        })
    }

    /// Whether the same operation may succeed when it is tried again.
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
