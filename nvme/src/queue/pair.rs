//! The queue pair: submission and completion of the plain case, one command per I/O.

use std::cell::Cell;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::barrier;
use super::build::check_segment;
use super::data::{ListArea, NotMapped, Pointer, PointerStyle, Segment, point_at, point_directly};
use super::ring::{CompletionRing, QueueMem, SubmissionRing};
use super::shared::QueueShared;
use super::split::Split;
use super::stats::QueueStats;
use super::wait::Spin;
use crate::controller::{Controller, Core};
use crate::dma::{AddressTable, DmaShared};
use crate::error::{InvalidIo, IoError, IoErrorKind, SubmitError};
use crate::io::{Io, IoDone};
use crate::namespace::{Limits, Namespace};
use crate::spec::{Command, Completion, IoFlags, IoOpcode, QueuePriority, Status, decode};

/// What a queue pair shall be like.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueOptions {
    /// Commands in flight at most, 1 to 4095; fewer when the controller's queues are shorter.
    pub depth: u16,
    /// Class under weighted arbitration.
    pub priority: QueuePriority,
    /// Ask for an interrupt vector, so that [`QueuePair::wait`] can sleep until woken. Without
    /// one it sleeps in short naps.
    pub interrupt: bool,
    /// Place the submission queue in the controller's memory buffer, if it has one.
    pub controller_memory: bool,
    /// Count latencies, submission to completion. Off, it costs nothing.
    pub histogram: bool,
    /// A command without completion for this long is aborted, and if that does not help, the
    /// controller reset.
    pub timeout: Duration,
    /// How often a command is sent again when its status allows it.
    pub max_retries: u8,
    /// `wait` spins no longer than this before it sleeps.
    pub spin_max: Duration,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions {
            depth: 128,
            priority: QueuePriority::MEDIUM,
            interrupt: true,
            controller_memory: false,
            histogram: false,
            timeout: Duration::from_secs(30),
            max_retries: 3,
            spin_max: Duration::from_micros(50),
        }
    }
}

impl QueueOptions {
    /// The defaults with another depth.
    pub fn depth(depth: u16) -> QueueOptions {
        QueueOptions {
            depth,
            ..QueueOptions::default()
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    InFlight,
    /// In flight, and an abort was asked for because it takes too long.
    Overdue,
    /// Over, waiting to be sent again.
    Retrying,
}

/// As a number of retries: there shall be no more.
pub(crate) const NO_RETRY: u8 = u8::MAX;

/// No split.
pub(crate) const WHOLE: u32 = u32::MAX;

/// One command's place. Its number is the low part of the command identifier, the high part is
/// a sequence number, so that a completion of an earlier command in the slot is recognised.
#[derive(Debug)]
pub(crate) struct Slot {
    pub command: Command,
    pub tag: u64,
    /// The I/O, if this command is all of it.
    pub io: Option<Io>,
    /// The split I/O that this command is a part of.
    pub split: u32,
    pub state: SlotState,
    pub retries: u8,
    /// When the command is overdue, in milliseconds of the queue's clock; 0: not stamped yet.
    pub deadline_ms: u64,
    pub started_ns: u64,
    pub list_address: u64,
}

impl Slot {
    /// Free, with the next sequence number, which counts in units of `step`. 0xffff is no
    /// command's identifier (Base section 3.3.3.1, "CID").
    #[inline]
    fn release(&mut self, step: u16) {
        self.state = SlotState::Free;
        let next = self.command.cid.wrapping_add(step);
        self.command.cid = if next == u16::MAX {
            next.wrapping_add(step)
        } else {
            next
        };
    }
}

/// A submission and a completion queue, owned by one thread.
#[derive(Debug)]
pub struct QueuePair {
    pub(crate) core: Arc<Core>,
    /// The controller's number.
    pub(crate) owner: u64,
    /// Keeps the controller enabled.
    pub(crate) _controller: Arc<Controller>,
    pub(crate) shared: Arc<QueueShared>,
    /// The controller's state word under which the rings are good.
    pub(crate) seen: u64,
    pub(crate) dead: Option<IoErrorKind>,
    pub(crate) sq: SubmissionRing,
    pub(crate) cq: CompletionRing,
    pub(crate) slots: Vec<Slot>,
    pub(crate) free: Vec<u16>,
    /// Identifiers are slot numbers in the bits below, sequence numbers from here on.
    pub(crate) cid_step: u16,
    pub(crate) lists: Arc<DmaShared>,
    pub(crate) list_words: usize,
    pub(crate) table: Arc<AddressTable>,
    pub(crate) style: PointerStyle,
    pub(crate) splits: Vec<Option<Box<Split>>>,
    pub(crate) free_splits: Vec<u32>,
    pub(crate) waiting_splits: VecDeque<u32>,
    pub(crate) retrying: VecDeque<(Instant, u16)>,
    pub(crate) backlog: Vec<IoDone>,
    /// Who submitted what is in the slots, while commands are logged.
    pub(crate) spans: Vec<Option<tracing::Span>>,
    pub(crate) options: QueueOptions,
    pub(crate) epoch: Instant,
    pub(crate) polls: u32,
    pub(crate) next_tick_ms: u64,
    pub(crate) histogram: Option<Box<Histogram<u64>>>,
    pub(crate) stats: QueueStats,
    pub(crate) spin: Spin,
    pub(crate) not_sync: PhantomData<Cell<()>>,
}

impl QueuePair {
    /// Queue identifier, from 1.
    pub fn qid(&self) -> u16 {
        self.shared.qid
    }

    /// Commands that can be in flight.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Whether the submission queue lies in the controller's memory buffer.
    pub fn in_controller_memory(&self) -> bool {
        matches!(self.shared.sq_mem, QueueMem::Controller(..))
    }

    /// I/Os that were accepted and not handed back yet.
    pub fn in_flight(&self) -> usize {
        let commands = self.slots.len() - self.free.len();
        let in_splits: usize = self.splits.iter().flatten().map(|s| s.outstanding).sum();
        let splits = self.splits.len() - self.free_splits.len();
        commands - in_splits + splits + self.backlog.len()
    }

    /// The controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self._controller
    }

    /// Counts since the queue pair was made.
    pub fn stats(&self) -> QueueStats {
        QueueStats {
            sq_doorbells: self.sq.rings(),
            cq_doorbells: self.cq.rings(),
            ..self.stats
        }
    }

    /// Latencies in nanoseconds, submission to completion, if they are counted.
    pub fn histogram(&self) -> Option<&Histogram<u64>> {
        self.histogram.as_deref()
    }

    /// Accepts an I/O, to be handed back by [`poll`](Self::poll) with its tag. Never blocks and
    /// does not ring the doorbell: `poll` does, once for all that was submitted before it.
    ///
    /// # Errors
    /// The I/O comes back when the queue is full ([`SubmitError::Busy`]), when it is wrong for
    /// the namespace, or when the controller is gone.
    #[inline]
    pub fn submit(&mut self, ns: &Namespace, tag: u64, io: Io) -> Result<(), SubmitError> {
        if self.core.state.load(Ordering::Acquire) != self.seen && !self.catch_up() {
            return Err(match self.dead {
                Some(kind) => SubmitError::Gone(io, kind),
                None => SubmitError::Busy(io),
            });
        }
        let limits = &ns.limits;
        if !ns.title.is_of(self.owner) {
            return Err(SubmitError::Invalid(io, InvalidIo::Stale(limits.nsid)));
        }
        let (op, lba, segment, flags) = match &io {
            Io::Read { lba, buf } => (IoOpcode::READ, *lba, Segment::from(buf), IoFlags::NONE),
            Io::Write { lba, data, fua } => (
                IoOpcode::WRITE,
                *lba,
                Segment::from(data),
                IoFlags::fua(*fua),
            ),
            _ => return self.submit_other(limits, tag, io),
        };
        let Some(blocks) = plain_blocks(limits, lba, &segment) else {
            return self.submit_other(limits, tag, io);
        };
        let Some(slot) = self.free.pop() else {
            return Err(SubmitError::Busy(io));
        };
        let pointer = match point_directly(&self.table, segment, self.style) {
            Some(pointer) => pointer,
            None => match self.point_by_list(slot, segment) {
                Ok(pointer) => pointer,
                Err(NotMapped) => {
                    self.free.push(slot);
                    return self.submit_other(limits, tag, io);
                }
            },
        };
        let started_ns = self.histogram.is_some().then(|| self.now_ns());
        let entry = &mut self.slots[usize::from(slot)];
        let words = Command::blocks_io_words(
            op,
            pointer.flags,
            entry.command.cid,
            limits.nsid,
            pointer.words,
            lba,
            blocks,
            flags,
        );
        entry.command = Command::from_words(words);
        entry.tag = tag;
        entry.io = Some(io);
        entry.split = WHOLE;
        entry.retries = 0;
        entry.state = SlotState::InFlight;
        entry.deadline_ms = 0;
        if let Some(now) = started_ns {
            entry.started_ns = now;
        }
        self.stats.commands += 1;
        self.sq.push(&words);
        if super::trace::is_on() {
            self.trace_command(slot);
        }
        Ok(())
    }

    #[cold]
    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The pointer to a command's data by the slot's list.
    #[inline(never)]
    fn point_by_list(&self, slot: u16, segment: Segment) -> Result<Pointer, NotMapped> {
        let at = usize::from(slot);
        let area = ListArea {
            words: &self.lists.as_u64()[at * self.list_words..(at + 1) * self.list_words],
            address: self.slots[at].list_address,
        };
        let mut command = Command::default();
        point_at(&mut command, &self.table, segment, self.style, &area)?;
        Ok(Pointer {
            words: [command.prp1, command.prp2],
            flags: command.flags,
        })
    }

    /// Writes a slot's command to the submission queue.
    pub(super) fn send(&mut self, slot: u16, mut command: Command) {
        let started_ns = self.histogram.is_some().then(|| self.now_ns());
        let entry = &mut self.slots[usize::from(slot)];
        command.cid = entry.command.cid;
        entry.command = command;
        entry.state = SlotState::InFlight;
        entry.deadline_ms = 0;
        if let Some(now) = started_ns {
            entry.started_ns = now;
        }
        self.stats.commands += 1;
        self.sq.push(&command.words());
        if super::trace::is_on() {
            self.trace_command(slot);
        }
    }

    /// Rings the doorbells for what was submitted, and hands back what has ended. Never blocks.
    /// Returns how many were added to `out`.
    #[inline]
    pub fn poll(&mut self, out: &mut Vec<IoDone>) -> usize {
        let before = out.len();
        if self.core.state.load(Ordering::Acquire) != self.seen && !self.catch_up() {
            // The completion memory may be a later generation's by now; what it still holds of
            // ours is taken when the reset is over.
            out.append(&mut self.backlog);
            return out.len() - before;
        }
        if self.sq.is_dirty() || self.cq.wants_ack() {
            self.ring();
        }
        // Bounded, whatever the device writes.
        for _ in 0..self.shared.cq_entries {
            let Some(completion) = self.cq.pop() else {
                break;
            };
            self.complete(completion, out);
        }
        self.polls = self.polls.wrapping_add(1);
        if self.polls & 0x3f == 0 || self.has_side_work() {
            self.side_work(out);
        }
        out.len() - before
    }

    #[inline]
    fn has_side_work(&self) -> bool {
        !self.backlog.is_empty() || !self.waiting_splits.is_empty() || !self.retrying.is_empty()
    }

    #[cold]
    fn side_work(&mut self, out: &mut Vec<IoDone>) {
        if self.dead.is_none() && self.core.state.load(Ordering::Acquire) == self.seen {
            self.send_retries();
            self.continue_splits();
            self.tick();
            if self.sq.is_dirty() {
                self.ring();
            }
        }
        out.append(&mut self.backlog);
    }

    /// Writes the doorbells, unless a reset has begun: the registers may belong to another
    /// generation of the queues by then.
    #[inline]
    pub(super) fn ring(&mut self) {
        self.shared.ringing.store(true, Ordering::Relaxed);
        barrier::light();
        if self.core.state.load(Ordering::Acquire) == self.seen {
            // Room for completions before there is more to complete.
            if self.cq.wants_ack() {
                self.cq.ack();
            }
            self.sq.ring();
        }
        self.shared.ringing.store(false, Ordering::Release);
    }

    /// Takes one completion. What it says is checked: it must name this queue and a command
    /// that is in flight, with its sequence number.
    #[inline]
    pub(super) fn complete(&mut self, c: Completion, out: &mut Vec<IoDone>) {
        let slot = c.cid & (self.cid_step - 1);
        let Some(entry) = self.slots.get_mut(usize::from(slot)) else {
            return self.impossible(c);
        };
        let known = entry.command.cid == c.cid
            && matches!(entry.state, SlotState::InFlight | SlotState::Overdue)
            && c.sq_id == self.shared.qid
            && c.sq_head < self.shared.sq_entries;
        if !known {
            return self.impossible(c);
        }
        self.stats.completions += 1;
        if !self.spans.is_empty() {
            self.trace_completion(slot, &c);
        }
        let entry = &mut self.slots[usize::from(slot)];
        if c.status().is_success() && entry.split == WHOLE && entry.io.is_some() {
            entry.release(self.cid_step);
            self.free.push(slot);
            if let Some(histogram) = &mut self.histogram {
                record(histogram, self.epoch, entry.started_ns);
            }
            // Taken last, so that it moves once.
            if let Some(io) = entry.io.take() {
                out.push(IoDone {
                    tag: entry.tag,
                    io,
                    result: Ok(()),
                });
            }
            return;
        }
        self.complete_slow(slot, c);
        out.append(&mut self.backlog);
    }

    /// Makes a slot free.
    pub(super) fn release(&mut self, slot: u16) {
        self.slots[usize::from(slot)].release(self.cid_step);
        self.free.push(slot);
    }

    /// A completion that no command of ours can have: the device cannot be trusted with
    /// anything that is in flight, so its queues go.
    #[cold]
    fn impossible(&mut self, c: Completion) {
        self.core.request_reset(&format!(
            "impossible completion on queue {}: {}",
            self.shared.qid,
            decode::completion(&c)
        ));
    }

    /// Failures, and commands that are a part of a split I/O.
    #[cold]
    fn complete_slow(&mut self, slot: u16, c: Completion) {
        let status = c.status();
        let index = usize::from(slot);
        if status.is_success() {
            self.finish_command(slot, None);
            return;
        }
        let overdue = self.slots[index].state == SlotState::Overdue;
        let command = self.slots[index].command;
        tracing::debug!(
            device = self.core.name(),
            command = %decode::io_command(self.shared.qid, &command),
            completion = %decode::completion(&c),
            "command failed"
        );
        if !status.do_not_retry()
            && status.code() != Status::COMPARE_FAILURE
            && self.slots[index].retries < self.options.max_retries
        {
            self.retry(
                slot,
                self.core.retry_delay(status, self.slots[index].retries),
            );
            return;
        }
        let timed_out = overdue && status.code() == Status::ABORTED_BY_REQUEST;
        let kind = if timed_out {
            IoErrorKind::Timeout
        } else {
            IoErrorKind::Status(status)
        };
        self.finish_command(slot, Some(kind));
    }

    pub(super) fn retry(&mut self, slot: u16, delay: Duration) {
        let entry = &mut self.slots[usize::from(slot)];
        entry.state = SlotState::Retrying;
        entry.retries += 1;
        self.retrying.push_back((Instant::now() + delay, slot));
    }

    fn send_retries(&mut self) {
        if self.retrying.is_empty() {
            return;
        }
        let now = Instant::now();
        for _ in 0..self.retrying.len() {
            let Some((when, slot)) = self.retrying.pop_front() else {
                break;
            };
            if when > now {
                self.retrying.push_back((when, slot));
                continue;
            }
            // A new identifier: a late completion of the earlier attempt is not this one's.
            self.release(slot);
            self.free.pop();
            let command = self.slots[usize::from(slot)].command;
            self.stats.retries += 1;
            self.send(slot, command);
        }
    }

    /// Ends a command; the I/O ends with it unless it has other parts.
    pub(super) fn finish_command(&mut self, slot: u16, failure: Option<IoErrorKind>) {
        let entry = &mut self.slots[usize::from(slot)];
        let (tag, split, started_ns) = (entry.tag, entry.split, entry.started_ns);
        let io = entry.io.take();
        let error = failure.map(|kind| {
            Box::new(IoError {
                device: self.core.name().to_owned(),
                qid: self.shared.qid,
                command: entry.command,
                kind,
                retries: if entry.retries == NO_RETRY {
                    0
                } else {
                    entry.retries
                },
            })
        });
        self.release(slot);
        if let Some(histogram) = self.histogram.as_mut().filter(|_| failure.is_none()) {
            record(histogram, self.epoch, started_ns);
        }
        match io {
            Some(io) => self.backlog.push(IoDone {
                tag,
                io,
                result: error.map_or(Ok(()), Err),
            }),
            None => self.finish_part(split, error),
        }
    }

    /// An I/O that is not a plain read or write of one command.
    #[cold]
    fn submit_other(&mut self, limits: &Limits, tag: u64, io: Io) -> Result<(), SubmitError> {
        match super::build::plan(limits, &io) {
            Err(why) => Err(SubmitError::Invalid(io, why)),
            Ok(None) => {
                let Some(slot) = self.free.pop() else {
                    return Err(SubmitError::Busy(io));
                };
                let entry = &mut self.slots[usize::from(slot)];
                entry.tag = tag;
                entry.io = Some(io);
                entry.split = WHOLE;
                entry.retries = 0;
                self.send(slot, Command::flush(limits.nsid));
                Ok(())
            }
            Ok(Some(work)) => self.submit_split(limits, tag, io, work),
        }
    }
}

#[cold]
fn record(histogram: &mut Histogram<u64>, epoch: Instant, started_ns: u64) {
    let now = u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
    histogram.saturating_record(now.saturating_sub(started_ns).max(1));
}

/// The number of blocks, when the I/O fits one command as it is.
#[inline]
fn plain_blocks(limits: &Limits, lba: u64, segment: &Segment) -> Option<u32> {
    let blocks = check_segment(limits, segment).ok()?;
    let end = lba.checked_add(blocks)?;
    if blocks == 0
        || blocks > u64::from(limits.transfer_blocks)
        || end > limits.num_blocks
        || !limits.usable
    {
        return None;
    }
    let boundary = u64::from(limits.boundary_blocks);
    if boundary != 0 && lba / boundary != (end - 1) / boundary {
        return None;
    }
    u32::try_from(blocks).ok()
}
