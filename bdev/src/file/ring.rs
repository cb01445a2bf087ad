//! The channel that uses io_uring.
//!
//! An operation has at most one submission entry outstanding, so the ring never overflows. The open
//! file is registered, which saves the kernel a look-up and a reference in each call.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use pumice_io::sys::file as sys;
use pumice_io::{Completion, IoErrorKind, Op, SubmitError};

use super::slot::{Slot, Step};
use super::threads::ThreadChannel;
use super::{Shared, Zeroing};
use crate::device::IoChannel;
use crate::error::BdevError;
use crate::queue::{Completed, refuse};

/// Most operations in flight on a channel.
const DEPTH: u32 = 256;
/// Longest time for which the kernel may ask to try again before threads take over.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Longest time that a dropped channel waits for operations whose end cannot be awaited.
const CLOSE_MAX: Duration = Duration::from_secs(10);
/// The registered file.
const FILE: types::Fixed = types::Fixed(0);

pub(super) struct RingChannel {
    /// Not dropped in a forked child, where other memory may be at its address.
    ring: ManuallyDrop<IoUring>,
    shared: Arc<Shared>,
    slots: Vec<Option<Box<InFlight>>>,
    free: Vec<u32>,
    /// Boxes of ended operations, to be used again.
    #[expect(
        clippy::vec_box,
        reason = "they move back into slots, where the kernel needs a fixed address"
    )]
    spare: Vec<Box<InFlight>>,
    /// Resets, which wait for the operations before them.
    resets: Vec<(u64, Op)>,
    done: Completed,
    /// Number of operations that the ring has, or whose completions wait, without those of
    /// `broken`.
    in_flight: usize,
    /// Slots whose entries the kernel has not accepted yet, in order.
    queued: VecDeque<u32>,
    /// Time since when the kernel has asked to try again and has accepted nothing.
    stalled: Option<Instant>,
    broken: Option<Broken>,
}

/// State after the kernel has refused `io_uring_enter` for good (a seccomp filter, a closed
/// descriptor). Threads carry out the operations that it had not accepted, and all later ones.
/// Those that it had accepted still complete.
struct Broken {
    errno: i32,
    /// The threads, or `None` when they cannot be started either: then operations fail with
    /// `errno`.
    threads: Option<ThreadChannel>,
    /// Slots of discards whose entries the kernel did not accept. Their threads are running
    /// already.
    discards: Vec<u32>,
}

/// A slot and the memory that the kernel reads besides the operation's buffers.
struct InFlight {
    slot: Slot,
    iov: Vec<libc::iovec>,
    discard: Option<Discarding>,
}

// SAFETY: the pointers in `iov` point into buffers that `slot.op` owns; both have the same owner,
// and nothing in them belongs to a thread.
unsafe impl Send for InFlight {}

/// A `BLKDISCARD` on a thread of its own. The ring waits for `event`.
struct Discarding {
    event: File,
    errno: Arc<AtomicI32>,
    over: Arc<AtomicBool>,
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
        // Kernels before 5.19 do not support cooperative task running.
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
            ring: ManuallyDrop::new(ring),
            shared,
            slots,
            free: (0..DEPTH).rev().collect(),
            spare: Vec::new(),
            resets: Vec::new(),
            done: Completed::default(),
            in_flight: 0,
            queued: VecDeque::new(),
            stalled: None,
            broken: None,
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
        self.queued.push_back(i);
    }

    /// Submits what is queued. If `want` is not 0, sleeps until a completion or the time-out.
    fn enter(&mut self, want: usize, timeout: Duration) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let result = if want == 0 {
            submitter.submit()
        } else {
            let timespec = types::Timespec::from(timeout);
            let args = types::SubmitArgs::new().timespec(&timespec);
            submitter.submit_with_args(want, &args)
        };
        let left = self.ring.submission().len();
        if self.queued.len() > left || left == 0 {
            self.queued.drain(..self.queued.len() - left);
            self.stalled = None;
        }
        match result {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                // The kernel needs completions to be taken, or memory, first.
                Some(libc::EBUSY | libc::EAGAIN)
                    if self.stalled.get_or_insert_with(Instant::now).elapsed() < STALL_MAX =>
                {
                    Ok(())
                }
                _ => Err(e),
            },
        }
    }

    /// Calls [`RingChannel::enter`]. After a permanent error, threads take over.
    fn enter_or_give_up(&mut self, want: usize, timeout: Duration) {
        if let Err(error) = self.enter(want, timeout) {
            self.give_up(&error);
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        let device = &self.shared.info.name;
        let threads = ThreadChannel::new(Arc::clone(&self.shared));
        match &threads {
            Ok(_) => tracing::warn!(device, %error, "io_uring_enter is refused: threads take over"),
            Err(e) => tracing::error!(device, %error, threads = %e, "io_uring_enter is refused"),
        }
        self.broken = Some(Broken {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
            threads: threads.ok(),
            discards: Vec::new(),
        });
        for i in std::mem::take(&mut self.queued) {
            let is_discard = self.slots[i as usize]
                .as_ref()
                .is_some_and(|f| f.discard.is_some());
            match &mut self.broken {
                Some(broken) if is_discard => broken.discards.push(i),
                _ => self.pass_on(i),
            }
        }
    }

    /// Passes the operation in slot `i`, of which the kernel has nothing, to the threads.
    fn pass_on(&mut self, i: u32) {
        let Some(mut flight) = self.slots[i as usize].take() else {
            return;
        };
        self.free.push(i);
        let mut slot = flight.slot.take();
        self.spare.push(flight);
        let Some(broken) = &mut self.broken else {
            return;
        };
        match &mut broken.threads {
            _ if matches!(slot.op, Op::Abort { .. }) => self.done.push(slot.tag, slot.op, Ok(())),
            Some(threads) => {
                slot.sync_behind();
                threads.adopt(slot);
                self.in_flight -= 1;
            }
            None => {
                let kind = IoErrorKind::from_errno(broken.errno);
                let e = self.shared.info.error(&slot.op, kind, "io_uring_enter");
                self.done.push(slot.tag, slot.op, Err(e));
            }
        }
    }

    /// Ends the discards whose threads have ended, where no completion will report it.
    fn reap_discards(&mut self) {
        let Some(broken) = &mut self.broken else {
            return;
        };
        let slots = &self.slots;
        let is_over = |i: &mut u32| {
            let flight = slots[*i as usize].as_ref();
            flight
                .and_then(|f| f.discard.as_ref())
                .is_none_or(|d| d.over.load(Ordering::Acquire))
        };
        let over: Vec<u32> = broken.discards.extract_if(.., is_over).collect();
        for i in over {
            self.completed(i, 8);
        }
    }

    fn idle(&self) -> bool {
        let threads = self.broken.as_ref().and_then(|b| b.threads.as_ref());
        self.free.len() == DEPTH as usize && threads.is_none_or(|t| t.in_flight() == 0)
    }

    fn reap(&mut self) {
        // Take the results first: handling one may queue another call.
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
        self.reap_discards();
        if !self.resets.is_empty() && self.idle() {
            for (tag, op) in self.resets.drain(..) {
                self.done.push(tag, op, Ok(()));
            }
        }
    }

    fn completed(&mut self, i: u32, result: i32) {
        let Some(flight) = self.slots.get_mut(i as usize).and_then(Option::as_mut) else {
            return;
        };
        let is_over = |d: &Discarding| d.over.load(Ordering::Acquire);
        if result < 0 && flight.discard.as_ref().is_some_and(|d| !is_over(d)) {
            // The wait has ended, by an abort or an error. The thread goes on discarding, and what is
            // written to these blocks from now on would be lost: the operation ends with the thread.
            match &mut self.broken {
                None => self.push(i),
                Some(broken) => broken.discards.push(i),
            }
            return;
        }
        let discarded = flight.discard.take();
        let errno = discarded.map_or(0, |d| d.errno.load(Ordering::Acquire));
        let result = match u32::try_from(result) {
            Ok(n) if errno == 0 => Ok(n),
            Ok(_) => Err(errno),
            Err(_) => Err(-result),
        };
        let outcome = match &flight.slot.op {
            // The abort succeeds whether or not there was something to cancel.
            Op::Abort { .. } => Some(Ok(())),
            _ => flight.slot.advance(result, &self.shared),
        };
        let Some(outcome) = outcome else {
            match self.broken {
                None => self.push(i),
                Some(_) => self.pass_on(i),
            }
            return;
        };
        if let Err(error) = &outcome {
            tracing::debug!(%error, "I/O failed");
        }
        if let Some(mut flight) = self.slots[i as usize].take() {
            self.free.push(i);
            let slot = flight.slot.take();
            self.done.push(slot.tag, slot.op, outcome);
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

    /// Returns the slot of the operation with the tag `target`.
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
    fn zero_by_writing(&mut self, shared: &Shared, at: u64, left: u64) -> squeue::Entry {
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
    fn discard(&mut self, shared: &Arc<Shared>, at: u64, len: u64) -> io::Result<squeue::Entry> {
        let discard = match &mut self.discard {
            Some(discard) => discard,
            none => none.insert(Discarding::start(shared, at, len)?),
        };
        let fd = types::Fd(discard.event.as_raw_fd());
        Ok(opcode::Read::new(fd, discard.counter.as_mut_ptr(), 8).build())
    }
}

impl Discarding {
    fn start(shared: &Arc<Shared>, at: u64, len: u64) -> io::Result<Discarding> {
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

/// Checks buffers: direct I/O requires aligned memory, and a vector has at most `IOV_MAX` parts.
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
        if let Err(e) = self.shared.check(&op) {
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
        match &mut self.broken {
            None => {
                self.start(tag, op, cancel)?;
                self.in_flight += 1;
                Ok(())
            }
            Some(Broken {
                threads: Some(threads),
                ..
            }) => threads.submit(tag, op),
            Some(Broken { errno, .. }) => {
                let kind = IoErrorKind::from_errno(*errno);
                let e = self.shared.info.error(&op, kind, "io_uring_enter");
                refuse(op, e)
            }
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if !self.shared.info.is_here() {
            return 0;
        }
        let (queued, more) = {
            let sq = self.ring.submission();
            (!sq.is_empty(), sq.taskrun() || sq.cq_overflow())
        };
        if (queued || more) && self.broken.is_none() {
            self.enter_or_give_up(0, Duration::ZERO);
        }
        self.reap();
        let n = self.done.drain_into(out);
        self.in_flight -= n;
        let threads = self.broken.as_mut().and_then(|b| b.threads.as_mut());
        n + threads.map_or(0, |t| t.poll(out))
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.shared.info.still_here()?;
        if self.done.len() > 0 || !self.ring.completion().is_empty() {
            return Ok(());
        }
        if let Some(broken) = &mut self.broken {
            // There is no way to wait for operations in a ring that cannot be entered, so this
            // naps.
            let nap = timeout.min(Duration::from_millis(1));
            match &mut broken.threads {
                Some(threads) if self.in_flight == 0 => return threads.wait(timeout),
                Some(threads) if threads.in_flight() > 0 => return threads.wait(nap),
                _ if self.in_flight > 0 => thread::sleep(nap),
                _ => {}
            }
            return Ok(());
        }
        if self.in_flight == 0 {
            return Ok(());
        }
        if self.free.len() == DEPTH as usize {
            return Ok(()); // only resets: poll ends them
        }
        self.enter_or_give_up(1, timeout);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        if !self.shared.info.is_here() {
            return 0;
        }
        let threads = self.broken.as_ref().and_then(|b| b.threads.as_ref());
        self.in_flight + threads.map_or(0, ThreadChannel::in_flight)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring is open as long as the channel, which the result borrows.
        let ring = || unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        self.broken.is_none().then(ring)
    }
}

impl Drop for RingChannel {
    fn drop(&mut self) {
        // In a forked child the ring and its operations belong to the parent.
        if !self.shared.info.is_here() {
            std::mem::forget(std::mem::take(&mut self.slots));
            return;
        }
        // The kernel may still access the buffers, so they are freed when it has finished.
        let start = Instant::now();
        while self.free.len() < DEPTH as usize {
            if self.broken.is_none() {
                self.enter_or_give_up(1, Duration::from_secs(1));
            } else if start.elapsed() < CLOSE_MAX {
                thread::sleep(Duration::from_millis(1));
            } else {
                let device = &self.shared.info.name;
                tracing::error!(
                    device,
                    "I/O in flight at close does not end: its memory stays"
                );
                std::mem::forget(std::mem::take(&mut self.slots));
                break;
            }
            self.reap();
        }
        // This releases the open file now, and not when the kernel closes the ring.
        let _ = self.ring.submitter().unregister_files();
        // SAFETY: the ring is dropped only here and not used again.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DmaBuf;
    use crate::file::FileOptions;

    /// The fields of an entry that the tests look at (linux/io_uring.h, `struct io_uring_sqe`).
    #[derive(Debug, PartialEq, Eq)]
    struct Fields {
        opcode: u8,
        off: u64,
        addr: u64,
        len: u32,
        op_flags: u32,
    }

    const FSYNC: u8 = 3;
    const WRITE: u8 = 23;
    const READ: u8 = 22;

    fn fields(entry: &squeue::Entry) -> Fields {
        assert_eq!(size_of::<squeue::Entry>(), 64);
        // SAFETY: an entry is the kernel's structure of 64 bytes, all of them initialised.
        let raw = unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() };
        let u32_at = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(raw[at..at + 8].try_into().unwrap());
        Fields {
            opcode: raw[0],
            off: u64_at(8),
            addr: u64_at(16),
            len: u32_at(24),
            op_flags: u32_at(28),
        }
    }

    fn shared(buffered: bool) -> (tempfile::TempDir, Arc<Shared>) {
        // This is not in /tmp, which is memory without direct I/O on many machines.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap());
        let dir = dir.unwrap();
        let file = crate::file::File::open(&FileOptions {
            path: dir.path().join("image"),
            size: Some(1 << 20),
            create: true,
            buffered,
            ..FileOptions::default()
        });
        (dir, file.unwrap().shared)
    }

    fn flight(op: Op, shared: &Shared) -> InFlight {
        InFlight {
            slot: Slot::new(7, op, shared, true),
            iov: Vec::new(),
            discard: None,
        }
    }

    fn write(fua: bool) -> Op {
        Op::Write {
            lba: 3,
            data: DmaBuf::zeroed(4096).unwrap().freeze(),
            fua,
        }
    }

    /// Whether the calls for `op` make its data durable when each of them succeeds.
    fn is_durable(op: Op, shared: &Arc<Shared>) -> bool {
        let mut flight = flight(op, shared);
        for _ in 0..8 {
            let entry = fields(&flight.entry(shared));
            let dsync = entry.op_flags & libc::RWF_DSYNC.cast_unsigned() != 0;
            // A data sync covers everything written before it.
            let durable = match entry.opcode {
                FSYNC => true,
                opcode => dsync && opcode == WRITE,
            };
            match flight.slot.advance(Ok(entry.len), shared) {
                None => {}
                Some(result) => {
                    result.unwrap();
                    return durable;
                }
            }
        }
        panic!("the operation does not end");
    }

    /// B22: an abort ends the wait for a discard and not the discard; and its result is nobody else's.
    #[test]
    fn an_aborted_discard_ends_when_it_is_done() {
        let (_dir, shared) = shared(true);
        let mut channel = RingChannel::new(Arc::clone(&shared)).unwrap();
        let unmap = Op::Unmap {
            lba: 0,
            len_blocks: 8,
        };
        // As if the device took `BLKDISCARD`: a thread is at it.
        let mut flight = flight(unmap, &shared);
        flight.slot.step = Step::Discard;
        let event = sys::eventfd().unwrap();
        let mut signal = event.try_clone().unwrap();
        let (errno, over) = (
            Arc::new(AtomicI32::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        flight.discard = Some(Discarding {
            event,
            errno: Arc::clone(&errno),
            over: Arc::clone(&over),
            counter: [0; 8],
        });
        let number = channel.free.pop().unwrap();
        channel.slots[number as usize] = Some(Box::new(flight));
        channel.in_flight = 1;
        channel.completed(number, -libc::ECANCELED);
        let mut out = Vec::new();
        assert_eq!(channel.poll(&mut out), 0, "the thread is still at it");
        errno.store(libc::EIO, Ordering::Release);
        over.store(true, Ordering::Release);
        signal.write_all(&1_u64.to_ne_bytes()).unwrap();
        while channel.poll(&mut out) == 0 {
            channel.wait(Duration::from_secs(1)).unwrap();
        }
        assert!(out[0].result.is_err(), "{:?}", out[0]);
        // The next operation of the slot has a result of its own.
        channel.submit(2, write(false)).unwrap();
        out.clear();
        while channel.poll(&mut out) == 0 {
            channel.wait(Duration::from_secs(1)).unwrap();
        }
        assert!(out[0].result.is_ok(), "{:?}", out[0]);
    }

    #[test]
    fn what_promises_to_be_durable_is() {
        for buffered in [false, true] {
            let (_dir, shared) = shared(buffered);
            let zeroes = |fua| Op::WriteZeroes {
                lba: 0,
                len_blocks: 8,
                fua,
            };
            assert!(is_durable(Op::Flush, &shared));
            assert!(is_durable(write(true), &shared));
            assert!(!is_durable(write(false), &shared));
            for method in [Zeroing::ZeroRange, Zeroing::Write] {
                shared.zeroing.store(method as u8, Ordering::Relaxed);
                assert!(is_durable(zeroes(true), &shared), "{method:?}");
                assert!(!is_durable(zeroes(false), &shared), "{method:?}");
            }
        }
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_ended() {
        let (_dir, shared) = shared(true);
        let buf = DmaBuf::zeroed(8192).unwrap();
        let start = buf.as_ptr().addr() as u64;
        let mut read = flight(Op::Read { lba: 2, buf }, &shared);
        let first = fields(&read.entry(&shared));
        let want = Fields {
            opcode: READ,
            off: 1024,
            addr: start,
            len: 8192,
            op_flags: 0,
        };
        assert_eq!(first, want);
        assert!(read.slot.advance(Ok(1536), &shared).is_none());
        let rest = fields(&read.entry(&shared));
        let want = Fields {
            off: 1024 + 1536,
            addr: start + 1536,
            len: 8192 - 1536,
            ..want
        };
        assert_eq!(rest, want);
        assert!(read.slot.advance(Ok(8192 - 1536), &shared).unwrap().is_ok());

        // The rest of one buffer, and the buffers behind it.
        let bufs = vec![DmaBuf::zeroed(512).unwrap(), DmaBuf::zeroed(1024).unwrap()];
        let second = bufs[1].as_ptr().addr();
        let mut read = flight(Op::ReadV { lba: 0, bufs }, &shared);
        read.entry(&shared);
        assert_eq!(read.iov.len(), 2);
        assert!(read.slot.advance(Ok(612), &shared).is_none());
        read.entry(&shared);
        let parts: Vec<_> = read
            .iov
            .iter()
            .map(|v| (v.iov_base.addr(), v.iov_len))
            .collect();
        assert_eq!(parts, [(second + 100, 924)]);
    }

    #[test]
    fn calls_that_were_interrupted_are_made_again() {
        let (_dir, shared) = shared(false);
        let ops = [write(true), Op::Flush];
        for op in ops {
            let mut slot = Slot::new(0, op, &shared, true);
            for errno in [libc::EAGAIN, libc::EINTR, libc::EAGAIN] {
                assert!(slot.advance(Err(errno), &shared).is_none());
            }
            let n = u32::try_from(slot.len).unwrap();
            assert!(slot.advance(Ok(n), &shared).unwrap().is_ok());
        }
        // The number of attempts is limited.
        let mut slot = Slot::new(0, write(false), &shared, true);
        let ended = (0..1000).find_map(|_| slot.advance(Err(libc::EAGAIN), &shared));
        assert!(ended.unwrap().is_err());
    }
}
