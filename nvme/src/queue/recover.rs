//! Time-outs, and a queue pair's recovery after its controller was reset or removed.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::pair::QueuePair;
use super::slot::{SlotState, Slots};
use crate::controller::state::{self, Phase};
use crate::error::{Cause, millis};
use crate::spec::decode;

impl QueuePair {
    /// Updates the queue pair to the controller's state. Returns whether it can take commands.
    #[cold]
    pub(super) fn catch_up(&mut self) -> bool {
        if self.dead.is_some() {
            return false;
        }
        if !self.core.birth.is_here() {
            // The I/Os in flight are the parent's, and their memory is not mapped here.
            self.dead = Some(Cause::OtherProcess);
            return false;
        }
        let word = self.core.state.load(Ordering::Acquire);
        match state::phase(word) {
            Phase::Resetting => false,
            Phase::Live => {
                self.rejoin(word);
                self.dead.is_none()
            }
            Phase::Failed => {
                self.give_up(Cause::ControllerFailed);
                false
            }
            Phase::Removed => {
                self.give_up(Cause::Removed);
                false
            }
        }
    }

    /// Continues after a reset, which has created the queues again. The old queues no longer exist,
    /// and the device no longer accesses their buffers, so they are ours again.
    fn rejoin(&mut self, word: u64) {
        let shared = std::sync::Arc::clone(&self.shared);
        let bank = shared.bank.lock();
        self.drain();
        let (sq_shadow, cq_shadow) = self.core.shadows(shared.qid);
        self.sq.restart(sq_shadow);
        self.cq.restart(
            std::sync::Arc::clone(&shared.cq_mem[bank.current]),
            cq_shadow,
        );
        self.seen = word;
        self.stats.resets += 1;
        self.interrupt_on();
        if !bank.created {
            drop(bank);
            self.give_up(Cause::ControllerFailed);
            return;
        }
        for slot in self.slots.numbers() {
            let entry = &self.slots[slot];
            let (state, retries) = (entry.state, entry.retries);
            match state {
                SlotState::Free | SlotState::Retrying => {}
                _ if retries < self.options.max_retries => self.retry(slot, Duration::ZERO),
                SlotState::Overdue => self.finish_command(slot, Some(Cause::Timeout)),
                SlotState::InFlight => self.finish_command(slot, Some(Cause::Aborted)),
            }
        }
    }

    /// Takes what the old completion queue still holds. The device no longer writes it.
    fn drain(&mut self) {
        let mut out = Vec::new();
        for _ in 0..self.shared.cq_entries {
            let Some(completion) = self.cq.pop() else {
                break;
            };
            let ours = self.slots.named_by(&completion).is_some();
            // An impossible completion may be the reason for the reset. The entries behind it are
            // not trusted.
            if !ours || completion.sq_head >= self.sq.entries() {
                break;
            }
            self.complete(completion, &mut out);
        }
        self.backlog.append(&mut out);
    }

    /// Ends everything with an error. The device is quiet (disabled, detached or gone).
    pub(super) fn give_up(&mut self, cause: Cause) {
        let shared = std::sync::Arc::clone(&self.shared);
        {
            let _bank = shared.bank.lock();
            self.drain();
        }
        self.dead = Some(cause);
        self.retrying.clear();
        for slot in self.slots.numbers() {
            if self.slots[slot].state != SlotState::Free {
                self.finish_command(slot, Some(cause));
            }
        }
        self.fail_splits(cause);
    }

    /// Looks for commands that exceed their time-out. Does next to nothing unless it is time to
    /// look.
    pub(super) fn tick(&mut self) {
        let now = millis(self.epoch.elapsed());
        if now < self.next_tick_ms {
            return;
        }
        let timeout = millis(self.options.timeout).max(1);
        self.next_tick_ms = now + (timeout / 8).clamp(1, 1000);
        if self.slots.in_use() == 0 {
            return;
        }
        for slot in self.slots.numbers() {
            let entry = &mut self.slots[slot];
            if !entry.is_sent() {
                continue;
            }
            if entry.deadline_ms == 0 {
                entry.deadline_ms = now + timeout;
                continue;
            }
            if now < entry.deadline_ms {
                continue;
            }
            let text = decode::io_command(self.shared.qid, &entry.command()).to_string();
            if entry.state == SlotState::InFlight {
                entry.state = SlotState::Overdue;
                // The abort gets half of the time-out to take effect.
                entry.deadline_ms = now + (timeout / 2).max(1);
                self.stats.timeouts += 1;
                tracing::warn!(
                    device = self.core.name(),
                    command = %text,
                    timeout_ms = timeout,
                    "no completion in time; aborting"
                );
                self.core.request_abort(self.shared.qid, entry.cid());
            } else {
                entry.deadline_ms = now + timeout;
                self.core
                    .request_reset(&format!("{text}: neither completed nor aborted in time"));
            }
        }
    }

    /// Time until `tick` has something to do, for `wait`.
    pub(super) fn until_tick(&self) -> Duration {
        let now = millis(self.epoch.elapsed());
        let mut wait = Duration::from_millis(self.next_tick_ms.saturating_sub(now));
        if let Some((when, _)) = self.retrying.iter().min_by_key(|(when, _)| *when) {
            wait = wait.min(when.saturating_duration_since(Instant::now()));
        }
        wait
    }
}

impl Drop for QueuePair {
    /// Deletes the queues. Blocks for the admin commands. Buffers of commands in flight are kept
    /// until the device is certainly done with them.
    fn drop(&mut self) {
        if !self.core.birth.is_here() {
            return;
        }
        self.interrupt_on();
        let core = std::sync::Arc::clone(&self.core);
        if core.retire_queue(&self.shared) {
            return;
        }
        let slots = std::mem::replace(&mut self.slots, Slots::new(0, 0));
        let splits = std::mem::take(&mut self.splits);
        core.keep_until_quiet(Box::new((
            slots.into_ios(),
            splits,
            std::sync::Arc::clone(&self.lists),
            std::sync::Arc::clone(&self.shared),
        )));
    }
}
