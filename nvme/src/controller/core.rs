//! A controller's rooms, and its life: bring-up, reset, failure, removal, shutdown.

use std::sync::Arc;

use super::admin::Admin;
use super::events::{ControllerEvent, EventLog};
use super::identify;
use super::interrupts::Interrupts;
use super::link::Link;
use super::namespaces::Namespaces;
use super::options::ControllerOptions;
use super::queues::IoQueues;
use super::requests::Requests;
use super::state::{self, Lifecycle, Phase};
use crate::error::{Cause, NvmeError};
use crate::transport::Transport;

/// The part of a controller that its queue pairs and its keeper thread share. Each room owns its
/// state, and the later ones use the earlier ones.
///
/// Lock order: the namespaces that are remembered, or the registry of queues and then the bank of a
/// queue pair; the admin queue. The others are leaves.
#[derive(Debug)]
pub(crate) struct Core {
    pub link: Arc<Link>,
    pub life: Arc<Lifecycle>,
    pub requests: Arc<Requests>,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) events: EventLog,
    pub(super) admin: Arc<Admin>,
    pub(super) namespaces: Namespaces,
    pub queues: IoQueues,
}

impl Core {
    /// Resets, enables and identifies a controller, whatever state it is in.
    pub(super) fn bring_up(
        transport: Arc<dyn Transport>,
        options: ControllerOptions,
    ) -> Result<Core, NvmeError> {
        let link = Arc::new(Link::new(transport, options)?);
        let life = Arc::new(Lifecycle::new(&link));
        let requests = Arc::new(Requests::new(&link, &life)?);
        let interrupts = Arc::new(Interrupts::new(&link));
        let admin = Arc::new(Admin::new(&link, &life, &requests)?);
        let core = Core {
            namespaces: Namespaces::new(&admin),
            queues: IoQueues::new(&life, &requests, &admin, &interrupts),
            events: EventLog::default(),
            admin,
            interrupts,
            requests,
            life,
            link,
        };
        match core.start() {
            Ok(()) => {
                core.life.set(state::word(1, Phase::Live));
                core.admin.arm_events();
                Ok(core)
            }
            Err(error) => {
                // The device may still know our memory: disable it before the memory is freed.
                core.link.transport.detach();
                Err(error)
            }
        }
    }

    /// Disables and enables the controller and sets up everything but the I/O queues.
    fn start(&self) -> Result<(), NvmeError> {
        self.link.disable()?;
        self.quiet();
        self.interrupts.enable()?;
        self.admin.start()?;
        self.link.enable()?;
        self.link.set_info(identify::controller(&self.admin)?);
        identify::configure_arbitration(&self.admin);
        self.queues.negotiate()?;
        self.queues.shadow.configure()?;
        self.queues.memory.configure();
        identify::configure_events(&self.admin);
        self.namespaces.list()
    }

    /// Frees the memory that the device could access: it is disabled.
    fn quiet(&self) {
        self.admin.lose_all();
        self.requests.forget_aborts();
        self.queues.free_stuck();
        self.link.free_kept();
        self.queues.shadow.forget();
    }

    /// Does a normal shutdown (Base section 3.6.1), disables the controller and releases it.
    pub(super) fn shut_down(&self) -> Result<(), NvmeError> {
        let word = self.life.word();
        if state::phase(word) != Phase::Live {
            self.link.transport.detach();
            return Ok(());
        }
        self.queues.freeze(word);
        let result = self.link.shut_down();
        self.link.transport.detach();
        self.quiet();
        self.life.set_failure("it was shut down");
        self.life
            .set(state::word(state::generation(word) + 1, Phase::Failed));
        self.interrupts.wake_sleepers();
        result
    }

    /// Resets the controller if it is still in the state in which the request was made.
    ///
    /// Stops the doorbells, disables the controller (which ends every queue and every transfer),
    /// enables it and creates its queues again, each on its second completion memory. Owners see
    /// the new state word and settle their commands, see `queue::commands`.
    pub(super) fn reset(&self, word: u64, reason: &str) {
        if !state::is_due(self.life.word(), word) {
            return;
        }
        tracing::warn!(
            device = self.link.name(),
            reason,
            "resetting the controller"
        );
        self.queues.freeze(word);
        let generation = state::generation(word) + 1;
        let mut result = self.start().and_then(|()| self.queues.create_all());
        if let Err(error) = &result
            && !error.is_removed()
            && !self.link.transport.is_gone()
        {
            tracing::warn!(device = self.link.name(), %error, "controller reset failed; resetting the function");
            result = self
                .link
                .transport
                .reset()
                .map_err(NvmeError::from)
                .and_then(|()| {
                    self.interrupts.enable_again()?;
                    self.start()
                })
                .and_then(|()| self.queues.create_all());
        }
        match result {
            Ok(()) => {
                self.events.push(ControllerEvent::Reset(reason.to_owned()));
                self.life.set(state::word(generation, Phase::Live));
                self.admin.arm_events();
                self.interrupts.wake_sleepers();
            }
            Err(error) if error.is_removed() || self.link.transport.is_gone() => self.removed(),
            Err(error) => self.fail(&format!("{reason}; then: {error}")),
        }
    }

    /// Marks the controller as failed: DMA is off, then everybody is told.
    fn fail(&self, reason: &str) {
        tracing::error!(device = self.link.name(), reason, "the controller failed");
        self.life.set_failure(reason);
        self.events.push(ControllerEvent::Failed(reason.to_owned()));
        self.end(Phase::Failed);
    }

    /// Marks the controller as removed.
    pub(super) fn removed(&self) {
        tracing::warn!(device = self.link.name(), "the controller was removed");
        self.events.push(ControllerEvent::Removed);
        self.end(Phase::Removed);
    }

    fn end(&self, phase: Phase) {
        let word = self.life.word();
        if !matches!(state::phase(word), Phase::Live | Phase::Resetting) {
            return;
        }
        if state::phase(word) == Phase::Live {
            self.queues.freeze(word);
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
            self.queues.freeze(word);
            if let Err(error) = self.link.disable() {
                tracing::debug!(device = self.link.name(), %error, "disable before removal");
            }
        }
        self.removed();
    }

    /// Returns the error that says why a queue pair can do nothing.
    pub fn gone(&self, cause: Cause) -> NvmeError {
        match cause {
            Cause::NoQueue => NvmeError::NoQueues {
                device: self.link.name().to_owned(),
                limit: self.queues.limit(),
            },
            _ => self.life.gone(cause),
        }
    }
}
