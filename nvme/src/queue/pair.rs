//! The queue pair: submission and completion in the plain case of one command per I/O.

use std::cell::Cell;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pumice_io::{Completion as IoCompletion, IoError, Op, SubmitError};

use super::bounce::Bounce;
use super::data::{ListArea, NotMapped, Pointer, PointerStyle, Segment, point_at, point_directly};
use super::ring::{CompletionRing, QueueMem, SubmissionRing};
use super::shared::QueueShared;
use super::slot::{NO_RETRY, SlotState, Slots, WHOLE};
use super::split::Split;
use super::stats::QueueStats;
use super::wait::{Interrupting, Spin};
use crate::controller::{Controller, Core};
use crate::dma::{AddressTable, DmaShared};
use crate::error::{Cause, InvalidIo};
use crate::namespace::{CommandLimits, Namespace};
use crate::spec::{
    BlocksIo, Command, Completion, IoFlags, IoOpcode, QueuePriority, Status, decode,
};

/// Options of a queue pair.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueOptions {
    /// Most commands in flight, 1 to 4095. It is lower when the controller's queues are shorter.
    pub depth: u16,
    /// Priority class under weighted round robin arbitration.
    pub priority: QueuePriority,
    /// Whether to use an interrupt vector, with which [`QueuePair::wait`] sleeps until the device
    /// interrupts. Without one it sleeps in short naps. Through VFIO the vector is switched off
    /// while the thread finds completions by polling; a controller in another process (vfio-user)
    /// interrupts for each completion.
    pub interrupt: bool,
    /// Whether to place the submission queue in the controller's memory buffer, if there is one.
    pub controller_memory: bool,
    /// Whether to record latencies, submission to completion. Costs nothing when it is off.
    pub histogram: bool,
    /// Time after which a command without completion is aborted. If that does not help, the
    /// controller is reset.
    pub timeout: Duration,
    /// Most times that a command is sent again when its status allows it.
    pub max_retries: u8,
    /// Longest time that `wait` spins before it sleeps.
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
    /// Returns the default options with another depth.
    pub fn depth(depth: u16) -> QueueOptions {
        QueueOptions {
            depth,
            ..QueueOptions::default()
        }
    }
}

/// A submission and a completion queue, which one thread owns.
#[derive(Debug)]
pub struct QueuePair {
    pub(crate) core: Arc<Core>,
    /// Number of the controller that made it.
    pub(crate) owner: u64,
    /// Keeps the controller enabled.
    pub(crate) _controller: Arc<Controller>,
    pub(crate) shared: Arc<QueueShared>,
    /// The controller's state word for which the rings are valid.
    pub(crate) seen: u64,
    pub(crate) dead: Option<Cause>,
    pub(crate) sq: SubmissionRing,
    pub(crate) cq: CompletionRing,
    pub(crate) slots: Slots,
    pub(crate) lists: Arc<DmaShared>,
    /// The device address of each slot's list area.
    pub(crate) list_addresses: Vec<u64>,
    pub(crate) list_words: usize,
    pub(crate) table: Arc<AddressTable>,
    /// The callers' I/Os, where the device must not see their buffers.
    pub(crate) bounce: Option<Box<Bounce>>,
    pub(crate) style: PointerStyle,
    pub(crate) splits: Vec<Option<Box<Split>>>,
    pub(crate) free_splits: Vec<u32>,
    pub(crate) waiting_splits: VecDeque<u32>,
    pub(crate) retrying: VecDeque<(Instant, u16)>,
    pub(crate) backlog: Vec<IoCompletion>,
    /// The span that submitted each slot's I/O, while commands are logged.
    pub(crate) spans: Vec<Option<tracing::Span>>,
    pub(crate) options: QueueOptions,
    pub(crate) epoch: Instant,
    pub(crate) polls: u32,
    pub(crate) next_tick_ms: u64,
    pub(crate) histogram: Option<Box<Histogram<u64>>>,
    /// Whether latencies are recorded or commands are logged.
    pub(crate) observed: bool,
    pub(crate) stats: QueueStats,
    pub(crate) spin: Spin,
    pub(crate) interrupting: Interrupting,
    pub(crate) not_sync: PhantomData<Cell<()>>,
}

impl QueuePair {
    /// Returns the queue identifier, from 1.
    pub fn qid(&self) -> u16 {
        self.shared.qid
    }

    /// The largest number of commands in flight.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Whether the submission queue is in the controller memory buffer.
    pub fn in_controller_memory(&self) -> bool {
        matches!(self.shared.sq_mem, QueueMem::Controller(..))
    }

    /// Number of I/Os that were accepted and not handed back yet.
    pub fn in_flight(&self) -> usize {
        if !self.core.birth.is_here() {
            return 0;
        }
        let in_splits: usize = self.splits.iter().flatten().map(|s| s.outstanding).sum();
        let splits = self.splits.len() - self.free_splits.len();
        self.slots.in_use() - in_splits + splits + self.backlog.len()
    }

    /// Returns the controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self._controller
    }

    /// Counters since the queue pair was made.
    pub fn stats(&self) -> QueueStats {
        QueueStats {
            sq_doorbells: self.sq.rings(),
            cq_doorbells: self.cq.rings(),
            ..self.stats
        }
    }

    /// Latencies in nanoseconds, submission to completion, if they are recorded.
    pub fn histogram(&self) -> Option<&Histogram<u64>> {
        self.histogram.as_deref()
    }

    /// Accepts an I/O, which [`poll`](Self::poll) hands back with its tag. Never blocks. Does not
    /// ring the doorbell: `poll` does, once for everything that was submitted before it.
    ///
    /// # Errors
    /// Returns the I/O when the queue is full or the controller is being reset
    /// ([`SubmitError::Busy`]), and when the I/O is invalid for the namespace or the controller was
    /// removed ([`SubmitError::Refused`]).
    #[inline]
    pub fn submit(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        if self.must_catch_up() && !self.catch_up() {
            return Err(match self.dead {
                Some(cause) => self.refuse(ns, io, cause),
                None => SubmitError::Busy(io),
            });
        }
        if self.bounce.is_some() {
            return self.submit_copy(ns, tag, io);
        }
        self.submit_here(ns, tag, io)
    }

    /// Whether the controller's state has changed, or this is a forked child's copy of the queue
    /// pair.
    #[inline]
    fn must_catch_up(&self) -> bool {
        self.core.state.load(Ordering::Acquire) != self.seen || !self.core.birth.is_here()
    }

    /// Submits a copy whose data is in the device's own memory.
    fn submit_copy(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        let core = Arc::clone(&self.core);
        let (Some(bounce), Some(domain)) = (&mut self.bounce, core.transport.domain()) else {
            return self.submit_here(ns, tag, io);
        };
        if self.slots.next().is_none() {
            return Err(SubmitError::Busy(io));
        }
        // A copy would be valid. An error has to be about the caller's buffers.
        if !Bounce::is_aligned(&io) {
            return self.submit_here(ns, tag, io);
        }
        let (number, copy) = match bounce.lend(domain, tag, io) {
            Ok(lent) => lent,
            Err(io) => return Err(self.refuse(ns, io, Cause::NotMapped)),
        };
        self.submit_here(ns, number, copy).map_err(|mut refused| {
            if let Some(bounce) = &mut self.bounce {
                let copy = std::mem::replace(refused.op_mut(), Op::Flush);
                *refused.op_mut() = bounce.take_back(number, copy, false).1;
            }
            refused
        })
    }

    #[inline]
    fn submit_here(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        if !ns.validity.is_of(self.owner) {
            return Err(self.invalid(ns, io, InvalidIo::Stale(ns.limits.nsid)));
        }
        let Some((entry, segment)) = plain(&ns.limits, &io) else {
            return self.submit_other(ns, tag, io);
        };
        match point_directly(&self.table, segment, self.style) {
            Some(pointer) => self.enter(tag, io, entry, pointer),
            None => self.submit_listed(ns, tag, io),
        }
    }

    /// Refuses a valid operation, with the cause.
    #[cold]
    fn refuse(&self, ns: &Namespace, op: Op, cause: Cause) -> SubmitError {
        let error = cause.error(self.core.name(), ns.block_size(), &op, "");
        SubmitError::Refused(op, error)
    }

    /// Refuses an operation that can never be done.
    #[cold]
    fn invalid(&self, ns: &Namespace, op: Op, why: InvalidIo) -> SubmitError {
        let (device, detail) = (self.core.name(), why.to_string());
        let error = IoError::new(device, ns.block_size(), &op, why.kind(), detail);
        SubmitError::Refused(op, error)
    }

    /// Takes a slot for an I/O of one command and writes the command to the submission queue.
    #[inline]
    fn enter(
        &mut self,
        tag: u64,
        io: Op,
        entry: BlocksIo,
        pointer: Pointer,
    ) -> Result<(), SubmitError> {
        let Some((number, slot)) = self.slots.take() else {
            return Err(SubmitError::Busy(io));
        };
        let words = entry.words(slot.cid(), pointer.words, pointer.flags);
        slot.begin(words, tag, io);
        self.stats.commands += 1;
        self.sq.push(words);
        if self.histogram.is_some() || super::trace::is_on() {
            self.observe_command(number);
        }
        Ok(())
    }

    /// Submits a plain I/O whose data pointer needs the slot's list area.
    #[inline(never)]
    fn submit_listed(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        let Some((entry, segment)) = plain(&ns.limits, &io) else {
            return self.submit_other(ns, tag, io);
        };
        let Some(number) = self.slots.next() else {
            return Err(SubmitError::Busy(io));
        };
        match self.point_by_list(number, segment) {
            Ok(pointer) => self.enter(tag, io, entry, pointer),
            Err(NotMapped) => self.submit_other(ns, tag, io),
        }
    }

    /// Makes a command's data pointer in the slot's list area.
    fn point_by_list(&self, slot: u16, segment: Segment) -> Result<Pointer, NotMapped> {
        let at = usize::from(slot);
        let area = ListArea {
            words: &self.lists.as_u64()[at * self.list_words..(at + 1) * self.list_words],
            address: self.list_addresses[at],
        };
        let mut command = Command::default();
        point_at(&mut command, &self.table, segment, self.style, &area)?;
        Ok(Pointer {
            words: [command.prp1, command.prp2],
            flags: command.flags,
        })
    }

    /// Records the time at which a command was sent, and logs it, if either is wanted.
    #[cold]
    fn observe_command(&mut self, slot: u16) {
        if self.histogram.is_some() {
            self.slots[slot].started_ns = self.now_ns();
        }
        if super::trace::is_on() {
            self.trace_command(slot);
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Writes a slot's command to the submission queue.
    pub(super) fn send(&mut self, slot: u16, command: Command) {
        let entry = &mut self.slots[slot];
        let command = entry.keep(command);
        entry.state = SlotState::InFlight;
        entry.deadline_ms = 0;
        self.stats.commands += 1;
        self.sq.push(command.words());
        if self.histogram.is_some() || super::trace::is_on() {
            self.observe_command(slot);
        }
    }

    /// Rings the doorbells for submitted I/Os and hands back those that have ended. Never blocks.
    /// Returns how many it added to `out`.
    #[inline]
    pub fn poll(&mut self, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        let count = self.poll_here(out);
        if let Some(bounce) = &mut self.bounce {
            for done in &mut out[before..] {
                bounce.finish(done);
            }
        }
        count
    }

    #[inline]
    fn poll_here(&mut self, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        if self.must_catch_up() && !self.catch_up() {
            // The completion memory may belong to a later generation by now. What it still holds of
            // this one is taken when the reset has ended.
            out.append(&mut self.backlog);
            return out.len() - before;
        }
        if self.sq.is_dirty() || self.cq.wants_ack() {
            self.ring();
        }
        // The loop is bounded, whatever the device writes.
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
    fn side_work(&mut self, out: &mut Vec<IoCompletion>) {
        if self.dead.is_none() && self.core.state.load(Ordering::Acquire) == self.seen {
            self.send_retries();
            self.continue_splits();
            self.tick();
            self.interrupt_off_while_polling();
            if self.sq.is_dirty() {
                self.ring();
            }
        }
        out.append(&mut self.backlog);
    }

    /// Writes the doorbells, unless a reset has begun: the registers may then belong to another
    /// generation of the queues.
    #[inline]
    pub(super) fn ring(&mut self) {
        let Self {
            shared,
            core,
            cq,
            sq,
            seen,
            ..
        } = self;
        shared.ringing.while_in(&core.state, *seen, || {
            // Make room for completions before there are more commands to complete.
            if cq.wants_ack() {
                cq.ack();
            }
            sq.ring();
        });
    }

    /// Takes one completion and checks it: it must name this queue and a command in flight, with
    /// its sequence number.
    #[inline]
    pub(super) fn complete(&mut self, c: Completion, out: &mut Vec<IoCompletion>) {
        let plain = c.status().is_success()
            && c.sq_head < self.sq.entries()
            && !self.observed
            && out.len() < out.capacity();
        if plain && self.slots.finish_plain(&c, out) {
            self.stats.completions += 1;
        } else {
            self.complete_other(c, out);
        }
    }

    /// Handles every completion that [`complete`](Self::complete) does not.
    #[inline(never)]
    fn complete_other(&mut self, c: Completion, out: &mut Vec<IoCompletion>) {
        let named = self.slots.named_by(&c);
        let Some(slot) = named.filter(|_| c.sq_head < self.sq.entries()) else {
            return self.impossible(c);
        };
        self.stats.completions += 1;
        if !self.spans.is_empty() {
            self.trace_completion(slot, &c);
        }
        if c.status().is_success() {
            self.finish_command(slot, None);
        } else {
            self.complete_failed(slot, c);
        }
        out.append(&mut self.backlog);
    }

    /// Handles a completion that matches no command of ours. The device cannot be trusted with
    /// anything in flight, so its queues are deleted by a reset.
    #[cold]
    fn impossible(&mut self, c: Completion) {
        self.core.request_reset(&format!(
            "impossible completion on queue {}: {}",
            self.shared.qid,
            decode::completion(&c)
        ));
    }

    #[cold]
    fn complete_failed(&mut self, slot: u16, c: Completion) {
        let status = c.status();
        let overdue = self.slots[slot].state == SlotState::Overdue;
        let command = self.slots[slot].command();
        tracing::debug!(
            device = self.core.name(),
            command = %decode::io_command(self.shared.qid, &command),
            completion = %decode::completion(&c),
            "command failed"
        );
        if !status.do_not_retry()
            && status.code() != Status::COMPARE_FAILURE
            && self.slots[slot].retries < self.options.max_retries
        {
            self.retry(
                slot,
                self.core.retry_delay(status, self.slots[slot].retries),
            );
            return;
        }
        let timed_out = overdue && status.code() == Status::ABORTED_BY_REQUEST;
        let kind = if timed_out {
            Cause::Timeout
        } else {
            Cause::Status(status)
        };
        self.finish_command(slot, Some(kind));
    }

    pub(super) fn retry(&mut self, slot: u16, delay: Duration) {
        let entry = &mut self.slots[slot];
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
            // The slot gets a new identifier, so that a late completion of the earlier attempt is
            // not taken for this one's.
            self.slots.rename(slot);
            let command = self.slots[slot].command();
            self.stats.retries += 1;
            self.send(slot, command);
        }
    }

    /// Ends a command. Its I/O ends too, unless it has other parts.
    pub(super) fn finish_command(&mut self, slot: u16, failure: Option<Cause>) {
        let entry = &mut self.slots[slot];
        let (tag, split, started_ns) = (entry.tag, entry.split, entry.started_ns);
        let io = std::mem::replace(&mut entry.io, Op::Flush);
        let (command, retries) = (entry.command(), entry.retries);
        let failure_in_words = failure.map(|cause| {
            let command = decode::io_command(self.shared.qid, &command);
            let text = match retries {
                0 | NO_RETRY => command.to_string(),
                retries => format!("{command} (sent again {retries} times)"),
            };
            (cause, text)
        });
        self.slots.give(slot);
        if failure.is_none() && self.histogram.is_some() {
            let took_ns = self.now_ns().saturating_sub(started_ns).max(1);
            if let Some(histogram) = &mut self.histogram {
                histogram.saturating_record(took_ns);
            }
        }
        if split == WHOLE {
            let result = failure_in_words.map_or(Ok(()), |(cause, text)| {
                // Its blocks are those of the command, 0's based.
                let blocks = u64::from(command.cdw12 & 0xffff) + 1;
                let block_size = u32::try_from(io.len_bytes(1) / blocks).unwrap_or(0);
                Err(cause.error(self.core.name(), block_size, &io, &text))
            });
            self.backlog.push(IoCompletion {
                tag,
                op: io,
                result,
            });
        } else {
            self.finish_part(split, failure_in_words);
        }
    }

    /// Submits an I/O that is not a plain read or write of one command.
    #[cold]
    fn submit_other(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        if let Op::Abort { tag: target } = io {
            self.abort(target);
            self.backlog.push(IoCompletion {
                tag,
                op: io,
                result: Ok(()),
            });
            return Ok(());
        }
        let limits = &ns.limits;
        match super::build::plan(limits, &io) {
            Err(why) => Err(self.invalid(ns, io, why)),
            Ok(None) => {
                let Some((slot, entry)) = self.slots.take() else {
                    return Err(SubmitError::Busy(io));
                };
                entry.tag = tag;
                entry.io = io;
                entry.retries = 0;
                self.send(slot, Command::flush(limits.nsid));
                Ok(())
            }
            Ok(Some(work)) => self.submit_split(limits, tag, io, work),
        }
    }
}

/// Returns the command and the data of a read or write of one buffer that fits one command as it
/// is.
#[inline]
fn plain(limits: &CommandLimits, io: &Op) -> Option<(BlocksIo, Segment)> {
    let (op, lba, segment, flags) = match io {
        Op::Read { lba, buf } => (IoOpcode::READ, *lba, Segment::from(buf), IoFlags::NONE),
        Op::Write { lba, data, fua } => (
            IoOpcode::WRITE,
            *lba,
            Segment::from(data),
            IoFlags::fua(*fua),
        ),
        _ => return None,
    };
    let blocks = segment.len >> limits.block_shift;
    let whole = blocks << limits.block_shift == segment.len && segment.offset & 3 == 0;
    let blocks = blocks as u64;
    let end = lba.checked_add(blocks)?;
    let one_command = limits.data.first(lba, blocks) == blocks;
    if !whole || blocks == 0 || !one_command || end > limits.num_blocks || !limits.usable {
        return None;
    }
    let entry = BlocksIo {
        op,
        nsid: limits.nsid,
        lba,
        blocks: u32::try_from(blocks).ok()?,
        flags,
    };
    Some((entry, segment))
}
