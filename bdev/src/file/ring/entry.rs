//! Submission entries: what the kernel is asked to do for the operation of a slot.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;

use io_uring::{opcode, squeue, types};
use pumice_io::Op;
use pumice_io::sys::file as sys;

use super::super::slot::{Slot, Step};
use super::super::{SharedFile, Zeroing};

/// The registered file.
const FILE: types::Fixed = types::Fixed(0);

/// A slot and the memory that the kernel reads besides the operation's buffers.
pub(super) struct InFlight {
    pub slot: Slot,
    pub iov: Vec<libc::iovec>,
    pub discard: Option<Discarding>,
}

/// A `BLKDISCARD` on a thread of its own. The ring waits for `event`.
pub(super) struct Discarding {
    pub event: File,
    pub errno: Arc<AtomicI32>,
    pub over: Arc<AtomicBool>,
    pub counter: [u8; 8],
}

impl InFlight {
    pub fn new(slot: Slot) -> InFlight {
        InFlight {
            slot,
            iov: Vec::new(),
            discard: None,
        }
    }

    /// Makes the submission entry of the slot's next call.
    pub fn entry(&mut self, shared: &Arc<SharedFile>) -> squeue::Entry {
        let Slot {
            offset,
            done,
            len,
            step,
            ..
        } = self.slot;
        let (at, left) = (offset + done, len - done);
        match step {
            Step::Sync => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Step::Transfer => self.transfer(at),
            Step::Zero(Zeroing::Write) => self.zero_by_writing(shared, at, left),
            Step::Zero(Zeroing::ZeroRange) => fallocate(libc::FALLOC_FL_ZERO_RANGE, at, left),
            Step::Punch => fallocate(libc::FALLOC_FL_PUNCH_HOLE, at, left),
            Step::Discard => match self.discard(shared, at, left) {
                Ok(entry) => entry,
                Err(error) => {
                    // Without a thread or an eventfd, a call that fails reports it to the caller.
                    tracing::warn!(%error, "starting a discard failed");
                    fallocate(-1, at, left)
                }
            },
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "check() limits an operation to 1 GiB"
    )]
    fn transfer(&mut self, at: u64) -> squeue::Entry {
        let done = self.slot.done as usize;
        let rw_flags = if self.slot.is_dsync() {
            libc::RWF_DSYNC
        } else {
            0
        };
        match &mut self.slot.op {
            Op::Read { buf, .. } => {
                let rest = &mut buf[done..];
                opcode::Read::new(FILE, rest.as_mut_ptr(), rest.len() as u32)
                    .offset(at)
                    .build()
            }
            Op::Write { data, .. } => {
                let rest = &data[done..];
                let entry = opcode::Write::new(FILE, rest.as_ptr(), rest.len() as u32);
                entry.offset(at).rw_flags(rw_flags).build()
            }
            Op::ReadV { bufs, .. } => {
                self.iov.clear();
                let parts = bufs.iter_mut().map(|b| (b.as_mut_ptr(), b.len()));
                gather(&mut self.iov, done, parts);
                let n = self.iov.len() as u32;
                opcode::Readv::new(FILE, self.iov.as_ptr(), n)
                    .offset(at)
                    .build()
            }
            Op::WriteV { data, .. } => {
                self.iov.clear();
                gather(
                    &mut self.iov,
                    done,
                    data.iter().map(|d| (d.as_ptr().cast_mut(), d.len())),
                );
                let n = self.iov.len() as u32;
                let entry = opcode::Writev::new(FILE, self.iov.as_ptr(), n);
                entry.offset(at).rw_flags(rw_flags).build()
            }
            // The number of its target's slot is where other operations have their offset.
            Op::Abort { .. } => opcode::AsyncCancel::new(at).build(),
            op => unreachable!("{} is not a transfer", op.kind()),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most the zeroes' length"
    )]
    fn zero_by_writing(&mut self, shared: &SharedFile, at: u64, left: u64) -> squeue::Entry {
        match shared.zeroes() {
            // The zeroes live as long as `shared`, to which the channel has a reference.
            Ok(zeroes) => {
                let n = left.min(zeroes.len() as u64) as u32;
                opcode::Write::new(FILE, zeroes.as_ptr(), n)
                    .offset(at)
                    .build()
            }
            Err(error) => {
                tracing::warn!(%error, "no memory for zeroes");
                fallocate(-1, at, left)
            }
        }
    }

    /// Waits for the thread that discards, and starts it first if it is not there yet.
    fn discard(
        &mut self,
        shared: &Arc<SharedFile>,
        at: u64,
        len: u64,
    ) -> io::Result<squeue::Entry> {
        let discard = match &mut self.discard {
            Some(discard) => discard,
            none => none.insert(Discarding::start(shared, at, len)?),
        };
        let fd = types::Fd(discard.event.as_raw_fd());
        Ok(opcode::Read::new(fd, discard.counter.as_mut_ptr(), 8).build())
    }
}

impl Discarding {
    fn start(shared: &Arc<SharedFile>, at: u64, len: u64) -> io::Result<Discarding> {
        let event = sys::eventfd()?;
        let mut signal = event.try_clone()?;
        let errno = Arc::new(AtomicI32::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (result, device, ended) = (Arc::clone(&errno), Arc::clone(shared), Arc::clone(&over));
        thread::Builder::new()
            .name("bdev-discard".to_owned())
            .spawn(move || {
                if let Err(e) = sys::discard(&device.file, at, len) {
                    result.store(e.raw_os_error().unwrap_or(libc::EIO), Ordering::Release);
                }
                ended.store(true, Ordering::Release);
                let _ = signal.write_all(&1_u64.to_ne_bytes());
            })?;
        Ok(Discarding {
            event,
            errno,
            over,
            counter: [0; 8],
        })
    }
}

fn fallocate(mode: i32, at: u64, len: u64) -> squeue::Entry {
    opcode::Fallocate::new(FILE, len)
        .offset(at)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// Fills `iov` with the rest of `parts` behind the first `skip` bytes.
fn gather(
    iov: &mut Vec<libc::iovec>,
    mut skip: usize,
    parts: impl Iterator<Item = (*mut u8, usize)>,
) {
    for (base, len) in parts {
        let skipped = skip.min(len);
        skip -= skipped;
        if skipped < len {
            let base = base.wrapping_add(skipped).cast();
            iov.push(libc::iovec {
                iov_base: base,
                iov_len: len - skipped,
            });
        }
    }
}
