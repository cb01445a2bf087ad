//! One operation on its way: which system call comes next, and what its result means.

use pumice_io::{IoError, IoErrorKind, Op};

use super::{Shared, Zeroing};
use crate::file::probe::Discard;

/// `EAGAIN` and `EINTR` are tried again so many times.
const TRIES: u32 = 64;

/// The call that an operation needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Read or write what is left, `Slot::done` bytes in.
    Transfer,
    /// Zero what is left.
    Zero(Zeroing),
    /// `fallocate(PUNCH_HOLE)`.
    Punch,
    /// `BLKDISCARD`.
    Discard,
    /// `fdatasync`.
    Sync,
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) tag: u64,
    pub(super) op: Op,
    pub(super) step: Step,
    /// Bytes already transferred.
    pub(super) done: u64,
    /// Bytes in all.
    pub(super) len: u64,
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// Whether a sync follows the rest.
    sync_after: bool,
    tries: u32,
}

impl Slot {
    /// `dsync`: whether direct writes carry `RWF_DSYNC`, so that FUA needs no sync behind them. A
    /// buffered one has it behind it: its failure must be told from that of the write, since it
    /// speaks of earlier writes, too.
    pub(super) fn new(tag: u64, op: Op, shared: &Shared, dsync: bool) -> Slot {
        let bs = shared.info.block_size;
        let step = match &op {
            Op::WriteZeroes { .. } => Step::Zero(shared.zeroing()),
            Op::Unmap { .. } if shared.discard == Discard::Ioctl => Step::Discard,
            Op::Unmap { .. } => Step::Punch,
            Op::Flush => Step::Sync,
            _ => Step::Transfer,
        };
        Slot {
            tag,
            step,
            done: 0,
            len: op.len_bytes(bs),
            offset: op.lba() * u64::from(bs),
            sync_after: op.fua() && !(dsync && shared.direct && step == Step::Transfer),
            tries: 0,
            op,
        }
    }

    /// Whether the write itself has to be durable, with no sync behind it.
    pub(super) fn is_dsync(&self) -> bool {
        self.op.fua() && !self.sync_after
    }

    /// The rest is done by a channel whose writes cannot be durable by themselves.
    pub(super) fn sync_behind(&mut self) {
        self.sync_after |= self.op.fua();
    }

    /// The operation, with an empty one left in its place.
    pub(super) fn take(&mut self) -> Slot {
        Slot {
            tag: self.tag,
            op: std::mem::replace(&mut self.op, Op::Flush),
            ..*self
        }
    }

    /// Takes the result of the call (bytes, or an errno). `None`: there is another one to do.
    pub(super) fn advance(
        &mut self,
        result: Result<u32, i32>,
        shared: &Shared,
    ) -> Option<Result<(), Box<IoError>>> {
        let n = match result {
            Ok(n) => u64::from(n),
            Err(libc::EAGAIN | libc::EINTR) if self.tries < TRIES => {
                self.tries += 1;
                return None;
            }
            Err(errno) => return self.failed(errno, shared),
        };
        match self.step {
            // What lay beyond the end of a file that shrank is gone: nothing there is durable.
            Step::Sync => {
                return Some(match shared.shrunk() {
                    // Another thread's flush may have taken the error that was this one's.
                    why if why.is_empty() => shared.flush_fault.check(&shared.info, &self.op),
                    why => Err(shared.info.error(&self.op, IoErrorKind::Media, why)),
                });
            }
            Step::Transfer | Step::Zero(Zeroing::Write) => {
                self.done += n;
                if self.done < self.len {
                    let unit = if shared.direct {
                        shared.info.block_size
                    } else {
                        1
                    };
                    if n == 0 || !self.done.is_multiple_of(u64::from(unit)) {
                        return Some(Err(self.short(shared)));
                    }
                    return None;
                }
            }
            Step::Zero(_) | Step::Punch | Step::Discard => self.done = self.len,
        }
        if self.sync_after {
            self.step = Step::Sync;
            return None;
        }
        Some(Ok(()))
    }

    fn failed(&mut self, errno: i32, shared: &Shared) -> Option<Result<(), Box<IoError>>> {
        if self.step == Step::Zero(Zeroing::ZeroRange)
            && matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
        {
            self.step = Step::Zero(shared.zeroing_refused());
            return None;
        }
        let mut detail = std::io::Error::from_raw_os_error(errno).to_string();
        if self.step == Step::Sync {
            detail = format!("fdatasync: {detail}");
        }
        let kind = IoErrorKind::from_errno(errno);
        let error = shared.info.error(&self.op, kind, detail);
        if self.step == Step::Sync {
            shared.flush_fault.note(&error);
        }
        Some(Err(error))
    }

    fn short(&self, shared: &Shared) -> Box<IoError> {
        let kind = IoErrorKind::Short {
            done_bytes: self.done,
        };
        shared.info.error(&self.op, kind, shared.shrunk())
    }
}
