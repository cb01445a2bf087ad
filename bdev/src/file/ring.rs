//! The channel over io_uring.
//!
//! One submission entry at most is outstanding per operation, so the ring never overflows. The
//! open file is registered: the kernel then skips its per-call look-up and reference.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::slot::{Slot, Step};
use super::{Shared, Zeroing, sys};
use crate::device::IoChannel;
use crate::error::{BdevError, IoErrorKind};
use crate::op::{Completion, Op, SubmitError};
use crate::queue::{Completed, refuse};

/// Operations in flight on a channel.
const DEPTH: u32 = 256;
/// The registered file.
const FILE: types::Fixed = types::Fixed(0);

pub(super) struct RingChannel {
    ring: IoUring,
    shared: Arc<Shared>,
    slots: Vec<Option<Box<InFlight>>>,
    free: Vec<u32>,
    /// Boxes of operations that have ended, to be used again.
    #[expect(
        clippy::vec_box,
        reason = "they move back into slots, where the kernel needs a fixed address"
    )]
    spare: Vec<Box<InFlight>>,
    /// Resets wait for the operations before them.
    resets: Vec<(u64, Op)>,
    done: Completed,
    in_flight: usize,
}

/// A slot and the memory that the kernel reads besides the operation's buffers.
struct InFlight {
    slot: Slot,
    iov: Vec<libc::iovec>,
    discard: Option<Discarding>,
}

// SAFETY: the pointers in `iov` point into buffers that `slot.op` owns; whoever owns the one owns
// the other, and nothing in them belongs to a thread.
unsafe impl Send for InFlight {}

/// A `BLKDISCARD` on a thread of its own; the ring waits for `event`.
struct Discarding {
    event: File,
    errno: Arc<AtomicI32>,
    counter: [u8; 8],
}

fn build() -> io::Result<IoUring> {
    let cq = DEPTH * 2;
    let modern = IoUring::builder()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(cq)
        .dontfork()
        .build(DEPTH);
    match modern {
        // Kernels before 5.19 know no cooperative task running.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(cq).dontfork().build(DEPTH)
        }
        other => other,
    }
}

impl RingChannel {
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<RingChannel> {
        let ring = build()?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::other("io_uring of a kernel before 5.11"));
        }
        ring.submitter()
            .register_files(&[shared.file.as_raw_fd()])?;
        let mut slots = Vec::new();
        slots.resize_with(DEPTH as usize, || None);
        Ok(RingChannel {
            ring,
            shared,
            slots,
            free: (0..DEPTH).rev().collect(),
            spare: Vec::new(),
            resets: Vec::new(),
            done: Completed::default(),
            in_flight: 0,
        })
    }

    /// Queues the next call of the operation in slot `i`.
    fn push(&mut self, i: u32) {
        let Some(flight) = &mut self.slots[i as usize] else {
            return;
        };
        let entry = flight.entry(&self.shared).user_data(u64::from(i));
        // SAFETY: everything that the entry points to (buffers, iovecs, the counter of a discard)
        // is owned by the boxed `InFlight`, which stays in its slot, unmoved and untouched, until
        // the entry's completion has been seen; `drop` waits for that, or leaks the slots.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("a slot has one entry, and there are as many entries as slots");
    }

    /// Submits what is queued and, if `want`, sleeps for a completion until the time-out.
    fn enter(&mut self, want: usize, timeout: Duration) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let result = if want == 0 {
            submitter.submit()
        } else {
            let timespec = types::Timespec::from(timeout);
            let args = types::SubmitArgs::new().timespec(&timespec);
            submitter.submit_with_args(want, &args)
        };
        match result {
            Ok(_) => Ok(()),
            // EBUSY and EAGAIN: the kernel wants completions reaped, or memory, first.
            Err(e) => match e.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    fn reap(&mut self) {
        // Results first: handling one may queue another call.
        let mut results = [(0_u32, 0_i32); 64];
        loop {
            let mut n = 0;
            for (place, cqe) in results.iter_mut().zip(self.ring.completion()) {
                *place = (
                    u32::try_from(cqe.user_data()).unwrap_or(u32::MAX),
                    cqe.result(),
                );
                n += 1;
            }
            for (i, result) in &results[..n] {
                self.completed(*i, *result);
            }
            if n < results.len() {
                break;
            }
        }
        if !self.resets.is_empty() && self.free.len() == DEPTH as usize {
            for (tag, op) in self.resets.drain(..) {
                self.done.push(tag, op, Ok(()));
            }
        }
    }

    fn completed(&mut self, i: u32, result: i32) {
        let Some(flight) = self.slots.get_mut(i as usize).and_then(Option::as_mut) else {
            return;
        };
        let result = match u32::try_from(result) {
            Ok(n) => match flight.discard.take() {
                Some(discard) => match discard.errno.load(Ordering::Acquire) {
                    0 => Ok(n),
                    errno => Err(errno),
                },
                None => Ok(n),
            },
            Err(_) => Err(-result),
        };
        let outcome = match &flight.slot.op {
            // Whether there was something to cancel is no concern of the abort.
            Op::Abort { .. } => Some(Ok(())),
            _ => flight.slot.advance(result, &self.shared),
        };
        let Some(outcome) = outcome else {
            self.push(i);
            return;
        };
        if let Err(error) = &outcome {
            tracing::debug!(%error, "I/O failed");
        }
        if let Some(mut flight) = self.slots[i as usize].take() {
            self.free.push(i);
            let op = std::mem::replace(&mut flight.slot.op, Op::Flush);
            self.done.push(flight.slot.tag, op, outcome);
            self.spare.push(flight);
        }
    }

    fn start(&mut self, tag: u64, op: Op, cancel: u64) -> Result<(), SubmitError> {
        let Some(i) = self.free.pop() else {
            return Err(SubmitError::Busy(op));
        };
        let mut slot = Slot::new(tag, op, &self.shared, true);
        slot.offset += cancel;
        let flight = match self.spare.pop() {
            Some(mut flight) => {
                flight.slot = slot;
                flight
            }
            None => Box::new(InFlight {
                slot,
                iov: Vec::new(),
                discard: None,
            }),
        };
        self.slots[i as usize] = Some(flight);
        self.push(i);
        Ok(())
    }

    /// The slot of the operation with the tag `target`.
    fn cancel_target(&self, target: u64) -> Option<u64> {
        let of = |f: &Option<Box<InFlight>>| f.as_ref().is_some_and(|f| f.slot.tag == target);
        self.slots.iter().position(of).map(|i| i as u64)
    }
}

impl InFlight {
    fn entry(&mut self, shared: &Arc<Shared>) -> squeue::Entry {
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
            Step::Zero(Zeroing::PunchHole) | Step::Punch => {
                fallocate(libc::FALLOC_FL_PUNCH_HOLE, at, left)
            }
            Step::Discard => match self.discard(shared, at, left) {
                Ok(entry) => entry,
                Err(error) => {
                    // Without a thread or an eventfd: a call that fails tells the caller.
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
        let rw_flags = if self.slot.op.fua() {
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
            // Its target, by the number of the slot, is where others have their offset.
            Op::Abort { .. } => opcode::AsyncCancel::new(at).build(),
            op => unreachable!("{} is no transfer", op.kind()),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most the zeroes' length"
    )]
    fn zero_by_writing(&mut self, shared: &Shared, at: u64, left: u64) -> squeue::Entry {
        match shared.zeroes() {
            // The zeroes live as long as `shared`, of which the channel has a share.
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

    fn discard(&mut self, shared: &Arc<Shared>, at: u64, len: u64) -> io::Result<squeue::Entry> {
        let event = sys::eventfd()?;
        let mut signal = event.try_clone()?;
        let errno = Arc::new(AtomicI32::new(0));
        let (result, device) = (Arc::clone(&errno), Arc::clone(shared));
        thread::Builder::new()
            .name("bdev-discard".to_owned())
            .spawn(move || {
                if let Err(e) = sys::discard(&device.file, at, len) {
                    result.store(e.raw_os_error().unwrap_or(libc::EIO), Ordering::Release);
                }
                let _ = signal.write_all(&1_u64.to_ne_bytes());
            })?;
        let discard = self.discard.insert(Discarding {
            event,
            errno,
            counter: [0; 8],
        });
        let fd = types::Fd(discard.event.as_raw_fd());
        Ok(opcode::Read::new(fd, discard.counter.as_mut_ptr(), 8).build())
    }
}

fn fallocate(mode: i32, at: u64, len: u64) -> squeue::Entry {
    opcode::Fallocate::new(FILE, len)
        .offset(at)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// Fills `iov` with what is left of `parts` after the first `skip` bytes.
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

/// Direct I/O needs aligned memory; a vector has at most `IOV_MAX` parts.
pub(super) fn check_buffers(shared: &Shared, op: &Op) -> Result<(), Box<crate::IoError>> {
    let mask = shared.mem_align - 1;
    let parts = |n: usize| {
        if n <= 1024 {
            return Ok(());
        }
        Err(shared.info.error(
            op,
            IoErrorKind::TooLong,
            format!("{n} buffers, at most 1024"),
        ))
    };
    let aligned = match op {
        Op::Read { buf, .. } => buf.as_ptr().addr() & mask == 0,
        Op::Write { data, .. } => data.as_ptr().addr() & mask == 0,
        Op::ReadV { bufs, .. } => {
            parts(bufs.len())?;
            bufs.iter().all(|b| b.as_ptr().addr() & mask == 0)
        }
        Op::WriteV { data, .. } => {
            parts(data.len())?;
            data.iter().all(|d| d.as_ptr().addr() & mask == 0)
        }
        _ => true,
    };
    if aligned {
        return Ok(());
    }
    let detail = format!(
        "direct I/O needs buffers aligned to {} bytes",
        shared.mem_align
    );
    Err(shared.info.error(op, IoErrorKind::Misaligned, detail))
}

impl IoChannel for RingChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let checked = self.shared.info.check(&op);
        if let Err(e) = checked.and_then(|()| check_buffers(&self.shared, &op)) {
            return refuse(op, e);
        }
        if !self.resets.is_empty() || self.done.is_full() {
            return Err(SubmitError::Busy(op));
        }
        let mut cancel = 0;
        match op {
            Op::Reset => {
                self.resets.push((tag, op));
                self.in_flight += 1;
                return Ok(());
            }
            Op::Abort { tag: target } => match self.cancel_target(target) {
                Some(slot) => cancel = slot,
                None => {
                    self.done.push(tag, op, Ok(()));
                    self.in_flight += 1;
                    return Ok(());
                }
            },
            _ => {}
        }
        self.start(tag, op, cancel)?;
        self.in_flight += 1;
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let (queued, more) = {
            let sq = self.ring.submission();
            (!sq.is_empty(), sq.taskrun() || sq.cq_overflow())
        };
        if (queued || more)
            && let Err(error) = self.enter(0, Duration::ZERO)
        {
            let device = &self.shared.info.name;
            tracing::error!(device, %error, "io_uring_enter failed; the operations stay queued");
        }
        self.reap();
        let n = self.done.drain_into(out);
        self.in_flight -= n;
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if self.in_flight == 0 || self.done.len() > 0 || !self.ring.completion().is_empty() {
            return Ok(());
        }
        if self.free.len() == DEPTH as usize {
            return Ok(()); // only resets: poll ends them
        }
        self.enter(1, timeout)
            .map_err(|e| BdevError::os(&self.shared.info.name, "waiting for completions", e))
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }
}

impl Drop for RingChannel {
    fn drop(&mut self) {
        // The kernel may still read and write the buffers: they are freed when it is done.
        let mut failures = 0;
        while self.free.len() < DEPTH as usize {
            match self.enter(1, Duration::from_secs(1)) {
                Ok(()) => self.reap(),
                Err(error) => {
                    failures += 1;
                    let device = &self.shared.info.name;
                    tracing::error!(device, %error, "waiting for I/O in flight at close");
                    if failures > 10 {
                        std::mem::forget(std::mem::take(&mut self.slots));
                        return;
                    }
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
        // The open file is let go of now and not when the kernel gets round to it.
        let _ = self.ring.submitter().unregister_files();
    }
}
