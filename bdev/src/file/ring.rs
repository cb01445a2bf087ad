//! The channel that uses io_uring.
//!
//! An operation has at most one submission entry outstanding, so the ring never overflows. The open
//! file is registered, which saves the kernel a look-up and a reference in each call.
//!
//! A thread that submits one durable write, or a flush, and then waits for it makes the system call
//! itself. On a busy machine the ring ends such a write on a thread of the kernel's, and the
//! waiting thread gets the processor back only when another's slice has ended, 4 ms later. A thread
//! that sleeps in its own call is woken by the interrupt. For reads there is no difference.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, types};
use pumice_io::{Completion, IoErrorKind, Op, SubmitError};

use super::SharedFile;
use super::call::{CALL_MIN, run};
use super::slot::Slot;
use super::threads::ThreadChannel;
use crate::device::IoChannel;
use crate::error::BdevError;
use crate::queue::{Completed, refuse};

mod entry;

use entry::{Discarding, InFlight};

/// Most operations in flight on a channel.
const DEPTH: u32 = 256;
/// Longest time for which the kernel may ask to try again before threads take over.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Longest time that a dropped channel waits for operations whose end cannot be awaited.
const CLOSE_MAX: Duration = Duration::from_secs(10);

pub(super) struct RingChannel {
    /// Not dropped in a forked child, where other memory may be at its address.
    ring: ManuallyDrop<IoUring>,
    shared: Arc<SharedFile>,
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
    /// Slot of the only operation that there is, if it has no entry yet. A thread that waits for it
    /// may make its call.
    alone: Option<u32>,
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

// SAFETY: the pointers in `iov` point into buffers that `slot.op` owns; both have the same owner,
// and nothing in them belongs to a thread.
unsafe impl Send for InFlight {}

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
    pub(super) fn new(shared: Arc<SharedFile>) -> io::Result<RingChannel> {
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
            alone: None,
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
            None => Box::new(InFlight::new(slot)),
        };
        let may_be_called = match flight.slot.op {
            Op::Write { fua, .. } => fua,
            Op::Flush => true,
            _ => false,
        };
        self.slots[i as usize] = Some(flight);
        self.push_alone();
        if self.in_flight == 0 && may_be_called {
            self.alone = Some(i);
        } else {
            self.push(i);
        }
        Ok(())
    }

    /// Queues the operation that was left for the thread that waits for it.
    fn push_alone(&mut self) {
        if let Some(i) = self.alone.take() {
            self.push(i);
        }
    }

    /// Makes the call of the only operation there is. Blocks.
    fn call_alone(&mut self, i: u32) {
        let Some(mut flight) = self.slots[i as usize].take() else {
            return;
        };
        self.free.push(i);
        let Completion { tag, op, result } = run(&self.shared, flight.slot.take());
        if let Err(error) = &result {
            tracing::debug!(%error, "I/O failed");
        }
        self.done.push(tag, op, result);
        self.spare.push(flight);
    }

    /// Returns the slot of the operation with the tag `target`.
    fn cancel_target(&self, target: u64) -> Option<u64> {
        let of = |f: &Option<Box<InFlight>>| f.as_ref().is_some_and(|f| f.slot.tag == target);
        self.slots.iter().position(of).map(|i| i as u64)
    }
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
        self.push_alone();
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
        match self.alone.take() {
            Some(i) if timeout >= CALL_MIN => self.call_alone(i),
            Some(i) => {
                self.push(i);
                self.enter_or_give_up(1, timeout);
            }
            None => self.enter_or_give_up(1, timeout),
        }
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
        self.push_alone();
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
mod tests;
