//! Errors of the controller and its queue pairs.

use std::time::Duration;

use pumice_io::uri::UriError;
use pumice_io::{IoError, IoErrorKind, Op};

use crate::dma::DmaError;
use crate::spec::Status;
use crate::transport::TransportError;

/// The reason why a controller could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvmeError {
    /// An error of the transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An error of DMA memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The controller did not reach a state within the time that it promises (CAP.TO, CRTO.CRWMT).
    #[error("{device}: {what} not within {timeout_ms} ms, {limit} (CSTS {csts:#x})")]
    NotReady {
        /// Name of the device.
        device: String,
        /// The awaited state.
        what: &'static str,
        /// The length of the wait, in milliseconds.
        timeout_ms: u64,
        /// The origin of that length: the register that names it, or a limit of the driver.
        limit: String,
        /// The status register (CSTS) at the end of that time.
        csts: u32,
    },
    /// The controller reports a fatal error (CSTS.CFS).
    #[error("{device}: fatal controller status (CSTS {csts:#x}) while {what}")]
    Fatal {
        /// Name of the device.
        device: String,
        /// The operation that found the error.
        what: &'static str,
        /// The status register (CSTS).
        csts: u32,
    },
    /// The controller was removed.
    #[error("{device}: the controller was removed")]
    Removed {
        /// Name of the device.
        device: String,
    },
    /// A reset did not bring the controller back.
    #[error("{device}: the controller failed and is given up: {reason}")]
    Failed {
        /// Name of the device.
        device: String,
        /// The reason why the reset failed.
        reason: String,
    },
    /// The controller was opened by the process that this one was forked from.
    #[error(
        "{device}: opened before the fork that made this process, so it is the parent's; open it \
         in the child"
    )]
    OtherProcess {
        /// Name of the device.
        device: String,
    },
    /// An admin command ended with an error status.
    #[error("{device}: {command}: {status}")]
    Status {
        /// Name of the device.
        device: String,
        /// The command as text.
        command: String,
        /// The status of its completion.
        status: Status,
    },
    /// An admin command did not end in time, or its queue was reset.
    #[error("{device}: {command}: {what}")]
    Unfinished {
        /// Name of the device.
        device: String,
        /// The command as text.
        command: String,
        /// The event that ended the wait.
        what: String,
    },
    /// The device sent something that the specification does not allow.
    #[error("{device}: {detail}")]
    Protocol {
        /// Name of the device.
        device: String,
        /// A description of what it sent.
        detail: String,
    },
    /// The device does not support the operation.
    #[error("{device}: {what}")]
    Unsupported {
        /// Name of the device.
        device: String,
        /// The missing ability.
        what: String,
    },
    /// The controller has no such namespace.
    #[error("{device}: there is no namespace {nsid}; it has {known}")]
    NoNamespace {
        /// Name of the device.
        device: String,
        /// The requested namespace identifier.
        nsid: u32,
        /// The identifiers that exist.
        known: String,
    },
    /// All I/O queues of the controller are in use.
    #[error("{device}: all {limit} I/O queue pairs are in use; share one between threads")]
    NoQueues {
        /// Name of the device.
        device: String,
        /// Number of I/O queues.
        limit: u16,
    },
}

impl From<UriError> for NvmeError {
    fn from(e: UriError) -> NvmeError {
        NvmeError::Transport(e.into())
    }
}

impl NvmeError {
    /// Returns the errno that corresponds to the error.
    pub fn errno(&self) -> i32 {
        match self {
            NvmeError::NotReady { .. } | NvmeError::Transport(TransportError::Timeout { .. }) => {
                libc::ETIMEDOUT
            }
            NvmeError::NoNamespace { .. } => libc::ENODEV,
            NvmeError::NoQueues { .. } => libc::EBUSY,
            _ => libc::EIO,
        }
    }

    /// Whether the device is removed for good.
    pub fn is_removed(&self) -> bool {
        matches!(
            self,
            NvmeError::Removed { .. } | NvmeError::Transport(TransportError::Removed { .. })
        )
    }

    /// The status, if the command was completed with an error status.
    pub fn status(&self) -> Option<Status> {
        match self {
            NvmeError::Status { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// The reason why a command failed or was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The controller completed the command with this status.
    Status(Status),
    /// The command did not end in time. It was aborted or its queue was reset, and the retries are
    /// used up. Whether a write was carried out is unknown.
    Timeout,
    /// The controller was reset during the command, and the retries are used up. Whether a write
    /// was carried out is unknown.
    Aborted,
    /// The caller asked for the end of the operation before all of its commands were sent.
    AskedFor,
    /// The controller was removed.
    Removed,
    /// The controller failed and could not be reset.
    ControllerFailed,
    /// The controller has granted fewer I/O queues since a reset, and the queue pair has none.
    NoQueue,
    /// The namespace was replaced or formatted before the command was sent (again). Whether an
    /// earlier attempt was carried out is unknown.
    Replaced,
    /// A buffer is not mapped for the device.
    NotMapped,
    /// The queue pair was made by the process that this one was forked from.
    OtherProcess,
}

impl Cause {
    /// Returns the kind of the error of the operation.
    fn kind(self) -> IoErrorKind {
        match self {
            Cause::Status(status) => match status.code() {
                Status::COMPARE_FAILURE => IoErrorKind::Miscompare { offset_bytes: 0 },
                Status::LBA_OUT_OF_RANGE => IoErrorKind::OutOfRange,
                Status::CAPACITY_EXCEEDED => IoErrorKind::NoSpace,
                Status::ABORTED_BY_REQUEST => IoErrorKind::Aborted,
                Status::WRITE_FAULT | Status::UNRECOVERED_READ => IoErrorKind::Media,
                code => IoErrorKind::Nvme {
                    sct: code.sct().0,
                    sc: code.sc(),
                    dnr: status.do_not_retry(),
                },
            },
            Cause::Timeout => IoErrorKind::TimedOut,
            Cause::Aborted | Cause::AskedFor => IoErrorKind::Aborted,
            Cause::NotMapped => IoErrorKind::NoMemory,
            Cause::Removed
            | Cause::ControllerFailed
            | Cause::NoQueue
            | Cause::Replaced
            | Cause::OtherProcess => IoErrorKind::Removed,
        }
    }

    /// Returns the error of an operation on `device`; `detail` says more, such as the command.
    pub fn error(self, device: &str, block_size: u32, op: &Op, detail: &str) -> Box<IoError> {
        let detail = match detail {
            "" => self.to_string(),
            detail => format!("{detail}: {self}"),
        };
        let mut error = IoError::new(device, block_size, op, self.kind(), detail);
        if let Cause::Status(status) = self {
            error.nvme_status = Some(status.into());
        }
        error
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cause::Status(status) => status.fmt(f),
            Cause::Timeout => f.write_str("no completion in time"),
            Cause::Aborted => f.write_str("aborted by a controller reset"),
            Cause::AskedFor => f.write_str("aborted as was asked for"),
            Cause::Removed => f.write_str("the controller was removed"),
            Cause::ControllerFailed => f.write_str("the controller failed"),
            Cause::NoQueue => f.write_str(
                "the controller has fewer I/O queues since a reset, and none for this queue pair; \
                 make another one, or share one",
            ),
            Cause::Replaced => f.write_str(
                "the namespace was replaced or formatted meanwhile, so that nothing more is sent; \
                 ask the controller for it again",
            ),
            Cause::NotMapped => f.write_str("a buffer is not mapped for the device"),
            Cause::OtherProcess => f.write_str(
                "the queue pair was made before the fork that made this process, so it is the \
                 parent's; open the device in the child",
            ),
        }
    }
}

/// The reason why an operation is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidIo {
    /// A length that is not a multiple of the block size.
    #[error("{len} bytes are not whole blocks of {block_size}")]
    Length {
        /// Length in bytes.
        len: usize,
        /// The namespace's block size.
        block_size: u32,
    },
    /// The I/O has no blocks.
    #[error("an I/O of no blocks")]
    Empty,
    /// The I/O goes beyond the end of the namespace.
    #[error("blocks {lba}+{blocks} are outside a namespace of {num_blocks} blocks")]
    OutOfRange {
        /// First block.
        lba: u64,
        /// Number of blocks.
        blocks: u64,
        /// The namespace's size in blocks.
        num_blocks: u64,
    },
    /// The controller does not support the command.
    #[error("the controller does not support {0}")]
    Unsupported(&'static str),
    /// The namespace's format cannot be used.
    #[error(
        "namespace {0} has a format that this driver does not use; `pumice nvme id-ns` says which"
    )]
    Format(u32),
    /// The namespace belongs to another controller, or its format may have changed.
    #[error(
        "namespace {0} is not this controller's or was formatted since; ask the controller for it again"
    )]
    Stale(u32),
    /// A buffer starts at an odd address.
    #[error("a buffer does not start at a multiple of four bytes")]
    NotAligned,
}

impl InvalidIo {
    /// Returns the error of an operation on `device`.
    pub fn error(self, device: &str, block_size: u32, op: &Op) -> Box<IoError> {
        IoError::new(device, block_size, op, self.kind(), self.to_string())
    }

    /// Returns the kind of the error of the operation.
    fn kind(self) -> IoErrorKind {
        match self {
            InvalidIo::Length { .. } | InvalidIo::Empty | InvalidIo::NotAligned => {
                IoErrorKind::Misaligned
            }
            InvalidIo::OutOfRange { .. } => IoErrorKind::OutOfRange,
            InvalidIo::Unsupported(_) | InvalidIo::Format(_) => IoErrorKind::Unsupported,
            // The namespace is gone or has changed.
            InvalidIo::Stale(_) => IoErrorKind::Removed,
        }
    }
}

/// Returns a duration in milliseconds, for logs.
pub(crate) fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
