//! Reset with I/O in flight, failure and removal of a controller.

use super::state::{self, Phase};
use super::{ControllerEvent, Core, QueueUse, Registered};
use crate::error::NvmeError;

impl Core {
    /// Resets the controller if it is still in the state in which the request was made.
    ///
    /// Stops the doorbells, disables the controller (which ends every queue and every transfer),
    /// enables it and creates its queues again, each on its second completion memory. Owners see
    /// the new state word and settle their commands, see `queue::commands`.
    pub(crate) fn reset(&self, word: u64, reason: &str) {
        if !state::is_due(self.life.word(), word) {
            return;
        }
        tracing::warn!(device = self.name(), reason, "resetting the controller");
        self.freeze_queues(word);
        let generation = state::generation(word) + 1;
        let mut result = self.start().and_then(|()| self.create_all());
        if let Err(error) = &result
            && !error.is_removed()
            && !self.link.transport.is_gone()
        {
            tracing::warn!(device = self.name(), %error, "controller reset failed; resetting the function");
            result = self
                .link
                .transport
                .reset()
                .map_err(NvmeError::from)
                .and_then(|()| {
                    self.interrupts.enable_again()?;
                    self.start()
                })
                .and_then(|()| self.create_all());
        }
        match result {
            Ok(()) => {
                self.events.push(ControllerEvent::Reset(reason.to_owned()));
                self.life.set(state::word(generation, Phase::Live));
                self.arm_events();
                self.interrupts.wake_sleepers();
            }
            Err(error) if error.is_removed() || self.link.transport.is_gone() => self.removed(),
            Err(error) => self.fail(&format!("{reason}; then: {error}")),
        }
    }

    fn create_all(&self) -> Result<(), NvmeError> {
        let registry = self.queues.lock();
        for Registered { shared: q, use_ } in registry.queues.values() {
            let mut bank = q.bank.lock();
            if *use_ != QueueUse::Owned {
                bank.created = false;
                continue;
            }
            // The owner has sent nothing on memory that it has not joined, so that it is free.
            let next = match bank.joined {
                true => 1 - bank.current,
                false => bank.current,
            };
            q.cq_mem[next].clear();
            (bank.current, bank.joined) = (next, false);
            bank.created = q.qid <= registry.limit;
            if bank.created
                && let Err(error) = self.create_queues(None, q, next)
            {
                bank.created = false;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Marks the controller as failed: DMA is off, then everybody is told.
    pub(super) fn fail(&self, reason: &str) {
        tracing::error!(device = self.name(), reason, "the controller failed");
        self.life.set_failure(reason);
        self.events.push(ControllerEvent::Failed(reason.to_owned()));
        self.end(Phase::Failed);
    }

    /// Marks the controller as removed.
    pub(super) fn removed(&self) {
        tracing::warn!(device = self.name(), "the controller was removed");
        self.events.push(ControllerEvent::Removed);
        self.end(Phase::Removed);
    }

    fn end(&self, phase: Phase) {
        let word = self.life.word();
        if !matches!(state::phase(word), Phase::Live | Phase::Resetting) {
            return;
        }
        if state::phase(word) == Phase::Live {
            self.freeze_queues(word);
        }
        self.link.transport.detach();
        self.life
            .set(state::word(state::generation(word) + 2, phase));
        self.quiet();
        self.interrupts.wake_sleepers();
    }

    /// Gives the device back on request: disables it if it still responds, then releases it.
    pub(super) fn release(&self) {
        let word = self.life.word();
        if state::phase(word) == Phase::Live {
            self.freeze_queues(word);
            if let Err(error) = self.link.disable() {
                tracing::debug!(device = self.name(), %error, "disable before removal");
            }
        }
        self.removed();
    }
}
