//! The commands of a queue pair: from the submission queue to the completion queue, in parts, once
//! more, and over a reset.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_io::{Completion as IoCompletion, Op, SubmitError};

use super::build::{Work, plain, plan};
use super::data::NotMapped;
use super::handles::Handles;
use super::observer::Observer;
use super::outgoing::Outgoing;
use super::parts::Parts;
use super::retries::Retries;
use super::rings::Rings;
use super::shared::{QueueShared, bank_in};
use super::slot::{NO_RETRY, SlotState, Slots, WHOLE};
use super::split::{Split, Splits};
use super::stats::QueueStats;
use super::watch::Watch;
use crate::controller::Core;
use crate::controller::state::{self, Phase};
use crate::error::{Cause, InvalidIo, NvmeError};
use crate::namespace::Namespace;
use crate::spec::{Completion, Status, decode};

/// The rings of a queue pair and the commands in them.
#[derive(Debug)]
pub(super) struct Commands {
    rings: Rings,
    dead: Option<Cause>,
    outgoing: Outgoing,
    splits: Splits,
    retries: Retries,
    /// I/Os that have ended and were not handed back yet.
    backlog: Vec<IoCompletion>,
    max_retries: u8,
    watch: Watch,
    polls: u32,
    stats: QueueStats,
}

impl Commands {
    pub fn new(
        core: Arc<Core>,
        parts: Parts,
        max_retries: u8,
        timeout: Duration,
        observer: Observer,
    ) -> Commands {
        let shared = parts.shared;
        Commands {
            dead: None,
            outgoing: Outgoing {
                table: Arc::clone(&core.link.table),
                slots: Slots::new(shared.qid, shared.sq_entries - 1),
                handles: Handles::default(),
                lists: parts.lists,
                style: parts.style,
                observer,
                sent: 0,
            },
            rings: Rings::new(core, shared, parts.word, parts.sq, parts.cq),
            splits: Splits::default(),
            retries: Retries::default(),
            backlog: Vec::new(),
            max_retries,
            watch: Watch::new(timeout),
            polls: 0,
            stats: QueueStats::default(),
        }
    }

    pub fn core(&self) -> &Arc<Core> {
        &self.rings.core
    }

    fn device(&self) -> &str {
        self.rings.link.name()
    }

    pub fn shared(&self) -> &Arc<QueueShared> {
        &self.rings.shared
    }

    pub fn observer(&self) -> &Observer {
        &self.outgoing.observer
    }

    pub fn depth(&self) -> usize {
        self.outgoing.slots.len()
    }

    pub fn has_slot(&self) -> bool {
        self.outgoing.slots.next().is_some()
    }

    /// Number of I/Os that were accepted and not handed back yet.
    pub fn in_flight(&self) -> usize {
        let whole = self.outgoing.slots.in_use() - self.splits.outstanding();
        whole + self.splits.len() + self.backlog.len()
    }

    /// Whether commands are in flight or wait for slots.
    pub fn any(&self) -> bool {
        self.outgoing.slots.in_use() > 0 || self.splits.any_waiting()
    }

    pub fn stats(&self) -> QueueStats {
        let commands = self.outgoing.sent;
        QueueStats {
            commands,
            ..self.stats.with(&self.rings.stats())
        }
    }

    /// Accepts an I/O, or returns it.
    #[inline]
    pub fn submit(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        if self.must_catch_up() && !self.catch_up() {
            return Err(self.not_now(ns, io));
        }
        if !ns.validity.is_of(self.rings.link.number) {
            return Err(self.invalid(ns, io, InvalidIo::Stale(ns.limits.nsid)));
        }
        let Some((entry, segment)) = plain(&ns.limits, &io) else {
            return self.submit_other(ns, tag, io);
        };
        match self.outgoing.point(segment) {
            Some(pointer) => self
                .outgoing
                .enter(&mut self.rings, ns, tag, io, entry, pointer),
            None => self.submit_listed(ns, tag, io),
        }
    }

    /// Whether the controller's state has changed, or this is a forked child's copy of the queue
    /// pair.
    #[inline]
    pub fn must_catch_up(&self) -> bool {
        !self.rings.are_valid() || !self.rings.link.birth.is_here()
    }

    /// Returns an I/O that is not accepted in the controller's state.
    #[cold]
    pub fn not_now(&self, ns: &Namespace, io: Op) -> SubmitError {
        match self.dead {
            Some(cause) => self.refuse(ns, io, cause),
            None => SubmitError::Busy(io),
        }
    }

    /// Refuses a valid operation, with the cause.
    #[cold]
    pub fn refuse(&self, ns: &Namespace, op: Op, cause: Cause) -> SubmitError {
        let error = cause.error(self.device(), ns.block_size(), &op, "");
        SubmitError::Refused(op, error)
    }

    /// Refuses an operation that can never be done.
    #[cold]
    fn invalid(&self, ns: &Namespace, op: Op, why: InvalidIo) -> SubmitError {
        let error = why.error(self.device(), ns.block_size(), &op);
        SubmitError::Refused(op, error)
    }

    /// Submits a plain I/O whose data pointer needs the slot's list area.
    #[inline(never)]
    fn submit_listed(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        let Some((entry, segment)) = plain(&ns.limits, &io) else {
            return self.submit_other(ns, tag, io);
        };
        let Some(number) = self.outgoing.slots.next() else {
            return Err(SubmitError::Busy(io));
        };
        match self.outgoing.point_by_list(number, segment) {
            Ok(pointer) => self
                .outgoing
                .enter(&mut self.rings, ns, tag, io, entry, pointer),
            Err(NotMapped) => self.submit_other(ns, tag, io),
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
        match plan(&ns.limits, &io) {
            Err(why) => Err(self.invalid(ns, io, why)),
            Ok(None) => self.outgoing.flush(&mut self.rings, ns, tag, io),
            Ok(Some(work)) => self.submit_split(ns, tag, io, work),
        }
    }

    /// Accepts an I/O that takes several commands. Sends as many as there is room for; later polls
    /// send the others.
    fn submit_split(
        &mut self,
        ns: &Namespace,
        tag: u64,
        io: Op,
        work: Work,
    ) -> Result<(), SubmitError> {
        // There may be as many split I/Os as slots, which bounds the memory.
        if self.splits.len() >= self.outgoing.slots.len() {
            return Err(SubmitError::Busy(io));
        }
        let namespace = self.outgoing.handles.number(&ns.validity);
        let index = (self.splits).add(Split::new(ns, namespace, tag, io, work));
        self.send_parts(index);
        Ok(())
    }

    /// Sends commands of a split I/O while there are slots.
    fn send_parts(&mut self, index: u32) {
        if let Some(split) = self.splits.get_mut(index) {
            self.outgoing.send_parts(&mut self.rings, split, index);
        }
        self.splits.let_wait(index);
        self.backlog.extend(self.splits.take_ended(index));
    }

    /// Continues split I/Os that found no slot before.
    fn continue_splits(&mut self) {
        for _ in 0..self.splits.waiting() {
            if self.outgoing.slots.next().is_none() {
                break;
            }
            if let Some(index) = self.splits.next_waiting() {
                self.send_parts(index);
            }
        }
    }

    /// Rings the doorbells and hands back the I/Os that have ended.
    #[inline]
    pub fn poll(&mut self, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        if self.must_catch_up() && !self.catch_up() {
            // The completion memory may belong to a later generation by now. What it still holds of
            // this one is taken when the reset has ended.
            out.append(&mut self.backlog);
            return out.len() - before;
        }
        self.rings.ring_if_worthwhile();
        // The loop is bounded, whatever the device writes.
        for _ in 0..self.rings.shared.cq_entries {
            let Some(completion) = self.rings.pop() else {
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

    /// Lets the next poll look at the clock.
    pub fn look_at_clock(&mut self) {
        self.polls |= 0x3f;
    }

    #[inline]
    fn has_side_work(&self) -> bool {
        !self.backlog.is_empty() || self.splits.any_waiting() || !self.retries.is_empty()
    }

    #[cold]
    fn side_work(&mut self, out: &mut Vec<IoCompletion>) {
        if self.dead.is_none() && self.rings.are_valid() {
            self.send_retries();
            self.continue_splits();
            let Rings { core, shared, .. } = &self.rings;
            self.watch
                .look(core, shared, &mut self.outgoing.slots, &mut self.stats);
            self.rings.interrupt_off_while_polling();
            self.rings.ring_if_worthwhile();
        }
        out.append(&mut self.backlog);
    }

    /// Takes one completion and checks it: it must name this queue and a command in flight, with
    /// its sequence number.
    #[inline]
    fn complete(&mut self, c: Completion, out: &mut Vec<IoCompletion>) {
        let plain = c.status().is_success()
            && self.rings.has_entry(c.sq_head)
            && !self.outgoing.observer.observes()
            && out.len() < out.capacity();
        if plain && self.outgoing.slots.finish_plain(&c, out) {
            self.rings.count();
        } else {
            self.complete_other(c, out);
        }
    }

    /// Handles every completion that [`complete`](Self::complete) does not.
    #[inline(never)]
    fn complete_other(&mut self, c: Completion, out: &mut Vec<IoCompletion>) {
        let named = self.outgoing.slots.named_by(&c);
        let Some(slot) = named.filter(|_| self.rings.has_entry(c.sq_head)) else {
            return self.impossible(c);
        };
        self.rings.count();
        self.outgoing
            .observer
            .completed(self.rings.link.name(), slot, &c);
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
        self.rings.core.requests.reset(&format!(
            "impossible completion on queue {}: {}",
            self.rings.shared.qid,
            decode::completion(&c)
        ));
    }

    #[cold]
    fn complete_failed(&mut self, slot: u16, c: Completion) {
        let status = c.status();
        let entry = &self.outgoing.slots[slot];
        let (state, retries) = (entry.state, entry.retries);
        tracing::debug!(
            device = self.rings.link.name(),
            command = entry.in_words(self.rings.shared.qid),
            completion = %decode::completion(&c),
            "command failed"
        );
        let may_pass = !status.do_not_retry() && status.code() != Status::COMPARE_FAILURE;
        if may_pass && retries < self.max_retries {
            self.retry(slot, self.rings.link.retry_delay(status, retries));
            return;
        }
        let aborted = status.code() == Status::ABORTED_BY_REQUEST;
        let cause = match state {
            SlotState::Overdue if aborted => Cause::Timeout,
            _ => Cause::Status(status),
        };
        self.finish_command(slot, Some(cause));
    }

    fn retry(&mut self, slot: u16, delay: Duration) {
        let entry = &mut self.outgoing.slots[slot];
        entry.state = SlotState::Retrying;
        entry.retries += 1;
        self.retries.add(Instant::now() + delay, slot);
    }

    fn send_retries(&mut self) {
        if self.retries.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(slot) = self.retries.take_due(now) {
            if !self.outgoing.may_repeat(&self.rings, slot) {
                self.finish_command(slot, Some(Cause::Replaced));
                continue;
            }
            // The slot gets a new identifier, so that a late completion of the earlier attempt is
            // not taken for this one's.
            self.outgoing.slots.rename(slot);
            let command = self.outgoing.slots[slot].command();
            self.stats.retries += 1;
            self.outgoing.send(&mut self.rings, slot, command);
        }
    }

    /// Ends a command. Its I/O ends too, unless it has other parts.
    fn finish_command(&mut self, slot: u16, failure: Option<Cause>) {
        let entry = &mut self.outgoing.slots[slot];
        let (tag, split, started_ns) = (entry.tag, entry.split, entry.started_ns);
        let io = std::mem::replace(&mut entry.io, Op::Flush);
        let block_size = entry.block_size(&io);
        let qid = self.rings.shared.qid;
        let failure = failure.map(|cause| (cause, entry.in_words(qid)));
        self.outgoing.slots.give(slot);
        if failure.is_none() {
            self.outgoing.observer.succeeded(started_ns);
        }
        let device = self.rings.link.name();
        if split != WHOLE {
            self.splits.part_ended(device, split, failure);
            self.backlog.extend(self.splits.take_ended(split));
            return;
        }
        let result = failure.map_or(Ok(()), |(cause, text)| {
            Err(cause.error(device, block_size, &io, &text))
        });
        self.backlog.push(IoCompletion {
            tag,
            op: io,
            result,
        });
    }

    /// Asks for the abort of the I/O with this tag. Returns whether it was in flight.
    pub fn abort(&mut self, tag: u64) -> bool {
        let mut found = false;
        for slot in self.outgoing.slots.numbers() {
            let entry = &mut self.outgoing.slots[slot];
            if entry.tag != tag {
                continue;
            }
            match entry.state {
                SlotState::Free => continue,
                SlotState::InFlight | SlotState::Overdue => {
                    entry.retries = NO_RETRY;
                    let Rings { core, shared, .. } = &self.rings;
                    core.requests.abort(shared.qid, entry.cid());
                }
                SlotState::Retrying => {
                    self.retries.forget(slot);
                    self.finish_command(slot, Some(Cause::AskedFor));
                }
            }
            found = true;
        }
        // The commands of a split I/O that were not sent yet are not sent.
        let device = self.rings.link.name();
        found | self.splits.fail_tagged(device, tag, Cause::AskedFor)
    }

    /// Whether `poll` has something to do.
    #[inline]
    pub fn ready(&self) -> bool {
        self.rings.any_completion()
            || !self.backlog.is_empty()
            || (self.dead.is_none() && self.rings.are_outdated())
    }

    /// Waits for the end of a reset, if there is one: until then there is nothing to hand back and
    /// nothing can be submitted. Returns whether there was.
    pub fn wait_for_reset(&self, timeout: Duration) -> bool {
        let word = self.rings.state();
        let waits = state::phase(word) == Phase::Resetting
            && self.backlog.is_empty()
            && self.dead.is_none();
        if waits {
            self.core().life.wait_changed(word, timeout);
        }
        waits
    }

    /// Returns the error that says why nothing more can be submitted, if that is so.
    pub fn check_alive(&self) -> Result<(), NvmeError> {
        self.dead
            .map_or(Ok(()), |cause| Err(self.rings.core.gone(cause)))
    }

    /// Returns the time until a poll has something to do that no completion reports.
    pub fn until_side_work(&self) -> Duration {
        let wait = self.watch.until_next();
        match self.retries.next() {
            Some(when) => wait.min(when.saturating_duration_since(Instant::now())),
            None => wait,
        }
    }

    /// Rings the doorbells before a sleep.
    pub fn ring_all(&mut self) {
        self.rings.ring_all();
    }

    /// Sleeps for at most `slice` until `poll` may have something to do.
    pub fn sleep(&mut self, slice: Duration) {
        let (backlog, alive) = (!self.backlog.is_empty(), self.dead.is_none());
        self.rings.sleep(slice, |rings| {
            rings.any_completion() || backlog || (alive && rings.are_outdated())
        });
    }

    /// Updates the queue pair to the controller's state. Returns whether it can take commands.
    #[cold]
    pub fn catch_up(&mut self) -> bool {
        if self.dead.is_some() {
            return false;
        }
        if !self.rings.link.birth.is_here() {
            // The I/Os in flight are the parent's, and their memory is not mapped here.
            self.dead = Some(Cause::OtherProcess);
            return false;
        }
        let word = self.rings.state();
        match state::phase(word) {
            Phase::Resetting => {}
            Phase::Live => return self.rejoin(word),
            Phase::Failed => self.give_up(Cause::ControllerFailed),
            Phase::Removed => self.give_up(Cause::Removed),
        }
        false
    }

    /// Continues after a reset, which has created the queues again: the device no longer accesses
    /// the buffers of the old ones. Does nothing when the controller has left the state `word`,
    /// because its next reset decides about the queues. Returns whether it can take commands.
    fn rejoin(&mut self, word: u64) -> bool {
        let (core, shared) = (Arc::clone(self.core()), Arc::clone(self.shared()));
        let Some(mut bank) = bank_in(&shared.bank, &core.life.state, word) else {
            return false;
        };
        self.drain();
        if !bank.created {
            // The rings stay invalid, so that nothing is written to queues that do not exist.
            drop(bank);
            self.give_up(Cause::NoQueue);
            return false;
        }
        self.rings.restart(word, bank.current);
        bank.joined = true;
        self.stats.resets += 1;
        for slot in self.outgoing.slots.numbers() {
            let entry = &self.outgoing.slots[slot];
            let (state, retries) = (entry.state, entry.retries);
            match state {
                SlotState::Free | SlotState::Retrying => {}
                _ if retries < self.max_retries => self.retry(slot, Duration::ZERO),
                SlotState::Overdue => self.finish_command(slot, Some(Cause::Timeout)),
                SlotState::InFlight => self.finish_command(slot, Some(Cause::Aborted)),
            }
        }
        true
    }

    /// Takes what the old completion queue still holds. The device no longer writes it.
    fn drain(&mut self) {
        let mut out = Vec::new();
        for _ in 0..self.rings.shared.cq_entries {
            let Some(completion) = self.rings.pop() else {
                break;
            };
            let ours = self.outgoing.slots.named_by(&completion).is_some();
            // An impossible completion may be the reason for the reset. The entries behind it are
            // not trusted.
            if !ours || !self.rings.has_entry(completion.sq_head) {
                break;
            }
            self.complete(completion, &mut out);
        }
        self.backlog.append(&mut out);
    }

    /// Ends everything with an error. The device is quiet (disabled, detached or gone).
    fn give_up(&mut self, cause: Cause) {
        let shared = Arc::clone(self.shared());
        {
            let _bank = shared.bank.lock();
            self.drain();
        }
        self.dead = Some(cause);
        self.retries.clear();
        for slot in self.outgoing.slots.numbers() {
            if self.outgoing.slots[slot].state != SlotState::Free {
                self.finish_command(slot, Some(cause));
            }
        }
        let ended = self.splits.fail_all(self.rings.link.name(), cause);
        self.backlog.extend(ended);
        debug_assert!(self.outgoing.slots.in_use() == 0);
    }
}

impl Drop for Commands {
    /// Deletes the queues. Blocks for the admin commands. Buffers of commands in flight are kept
    /// until the device is certainly done with them.
    fn drop(&mut self) {
        let (link, shared) = (Arc::clone(&self.rings.link), Arc::clone(self.shared()));
        if !link.birth.is_here() {
            return;
        }
        self.rings.interrupt_on();
        if self.core().queues.retire(&shared) {
            return;
        }
        let ios = std::mem::replace(&mut self.outgoing.slots, Slots::new(0, 0)).into_ios();
        let splits = std::mem::take(&mut self.splits);
        let lists = self.outgoing.lists.memory();
        link.keep_until_quiet(Box::new((ios, splits, lists, shared)));
    }
}
