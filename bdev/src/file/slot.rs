//! An operation in flight: its next system call, and the meaning of that call's result.

use pumice_io::{IoError, IoErrorKind, Op};

use super::{SharedFile, Zeroing};
use crate::file::probe::Discard;

/// Number of attempts after `EAGAIN` and `EINTR`.
const TRIES: u32 = 64;

/// The next call of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Reads or writes the rest, from `Slot::done` bytes on.
    Transfer,
    /// Zeroes the rest.
    Zero(Zeroing),
    /// Calls `fallocate(PUNCH_HOLE)`.
    Punch,
    /// Calls `BLKDISCARD`.
    Discard,
    /// Calls `fdatasync`.
    Sync,
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) tag: u64,
    pub(super) op: Op,
    pub(super) step: Step,
    /// Number of bytes transferred already.
    pub(super) done: u64,
    /// Number of bytes of the operation.
    pub(super) len: u64,
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// Whether a sync follows the other calls.
    sync_after: bool,
    /// The error of a durable write of which it is not known whether the write has failed or the flush
    /// behind it. The write is made once more, without a flush, to find out.
    in_doubt: Option<i32>,
    tries: u32,
}

impl Slot {
    /// Makes the slot of an operation. `dsync` says whether direct writes carry `RWF_DSYNC`, so
    /// that FUA needs no sync after them. A buffered write is followed by a sync, whose failure
    /// must be distinguished from the write's because it concerns earlier writes too.
    pub(super) fn new(tag: u64, op: Op, shared: &SharedFile, dsync: bool) -> Slot {
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
            in_doubt: None,
            tries: 0,
            op,
        }
    }

    /// Whether the write itself has to be durable, without a sync after it.
    pub(super) fn is_dsync(&self) -> bool {
        self.op.fua() && !self.sync_after && self.in_doubt.is_none()
    }

    /// Prepares for a channel whose writes cannot be durable by themselves: a sync follows.
    pub(super) fn sync_behind(&mut self) {
        self.sync_after |= self.op.fua();
    }

    /// Takes the operation and leaves an empty one in its place.
    pub(super) fn take(&mut self) -> Slot {
        Slot {
            tag: self.tag,
            op: std::mem::replace(&mut self.op, Op::Flush),
            ..*self
        }
    }

    /// Takes the result of a call (bytes, or an errno). Returns `None` when there is another call
    /// to make.
    pub(super) fn advance(
        &mut self,
        result: Result<u32, i32>,
        shared: &SharedFile,
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
            // The data beyond the end of a file that was made shorter is lost, so nothing there is
            // durable.
            Step::Sync => {
                return Some(match shared.shrunk() {
                    // Another thread's flush may have received the error that was meant for this
                    // one.
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
        if let Some(errno) = self.in_doubt {
            // It was the flush, which was for other writes, too.
            let error = self.error(errno, shared);
            shared.flush_fault.note(&error);
            return Some(Err(error));
        }
        if self.sync_after {
            self.step = Step::Sync;
            return None;
        }
        Some(Ok(()))
    }

    fn failed(&mut self, errno: i32, shared: &SharedFile) -> Option<Result<(), Box<IoError>>> {
        if self.step == Step::Zero(Zeroing::ZeroRange)
            && matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
        {
            self.step = Step::Zero(shared.zeroing_refused());
            return None;
        }
        let error = self.error(errno, shared);
        if self.step == Step::Sync {
            shared.flush_fault.note(&error);
        } else if self.is_dsync()
            && self.step == Step::Transfer
            && matches!(error.kind, IoErrorKind::Media | IoErrorKind::TimedOut)
        {
            self.in_doubt = Some(errno);
            return None;
        }
        Some(Err(error))
    }

    fn error(&self, errno: i32, shared: &SharedFile) -> Box<IoError> {
        let mut detail = std::io::Error::from_raw_os_error(errno).to_string();
        if self.step == Step::Sync {
            detail = format!("fdatasync: {detail}");
        }
        let kind = IoErrorKind::from_errno(errno);
        shared.info.error(&self.op, kind, detail)
    }

    fn short(&self, shared: &SharedFile) -> Box<IoError> {
        let kind = IoErrorKind::Short {
            done_bytes: self.done,
        };
        shared.info.error(&self.op, kind, shared.shrunk())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::file::{File, FileOptions};

    pub(in crate::file) fn shared() -> (tempfile::TempDir, Arc<SharedFile>) {
        let dir = tempfile::tempdir().unwrap();
        let file = File::open(
            &FileOptions::new(dir.path().join("image"))
                .size(Some(1 << 20))
                .create(true),
        );
        (dir, file.unwrap().shared)
    }

    #[test]
    fn a_failed_flush_is_remembered() {
        let (_dir, shared) = shared();
        let mut flush = Slot::new(7, Op::Flush, &shared, false);
        let e = flush.advance(Err(libc::EIO), &shared).unwrap().unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Media, "{e}");
        assert!(e.to_string().contains("fdatasync"), "{e}");
        // The next call succeeds, and what the first one lost is lost all the same.
        let mut again = Slot::new(8, Op::Flush, &shared, false);
        again.advance(Ok(0), &shared).unwrap().unwrap_err();
        shared.check(&Op::Flush).unwrap_err();
    }

    #[test]
    fn a_flush_of_a_file_that_was_cut_is_an_error() {
        let (dir, shared) = shared();
        let mut flush = Slot::new(7, Op::Flush, &shared, false);
        flush.advance(Ok(0), &shared).unwrap().unwrap();
        let image = std::fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("image"));
        image.unwrap().set_len(4096).unwrap();
        let e = flush.advance(Ok(0), &shared).unwrap().unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Media, "{e}");
        assert!(e.to_string().contains("truncated"), "{e}");
    }
}
