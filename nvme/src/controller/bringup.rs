//! Enable, disable, shutdown: Base sections 3.5 and 3.6.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::{Condvar, Mutex, RwLock};

use super::admin::AdminQueue;
use super::events::EventLog;
use super::interrupts::Interrupts;
use super::link::Link;
use super::options::ControllerOptions;
use super::requests::Requests;
use super::state::{self, Lifecycle, Phase};
use super::{Core, Registry};
use crate::error::NvmeError;
use crate::transport::Transport;

impl Core {
    /// Resets, enables and identifies a controller, whatever state it is in.
    pub(super) fn bring_up(
        transport: Arc<dyn Transport>,
        options: ControllerOptions,
    ) -> Result<Core, NvmeError> {
        let link = Arc::new(Link::new(transport, options)?);
        let life = Arc::new(Lifecycle::new(&link));
        let requests = Arc::new(Requests::new(&link, &life)?);
        let core = Core {
            admin: Mutex::new(AdminQueue::new(link.transport.domain(), link.page_shift)?),
            admin_done: Condvar::new(),
            namespaces: RwLock::new(BTreeMap::new()),
            remembered: Mutex::new(BTreeMap::new()),
            list_again: AtomicBool::new(false),
            interrupts: Interrupts::new(&link),
            events: EventLog::default(),
            queues: Mutex::new(Registry::default()),
            queue_freed: Condvar::new(),
            shadow: RwLock::new(None),
            memory: Mutex::new(None),
            requests,
            life,
            link,
        };
        match core.start() {
            Ok(()) => {
                core.life.set(state::word(1, Phase::Live));
                core.arm_events();
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
    pub(super) fn start(&self) -> Result<(), NvmeError> {
        self.link.disable()?;
        self.quiet();
        self.interrupts.enable()?;
        self.start_admin()?;
        self.link.enable()?;
        self.identify_controller()?;
        self.configure_arbitration();
        self.negotiate_queues()?;
        self.configure_shadow()?;
        self.configure_memory();
        self.configure_events();
        self.list_namespaces()?;
        Ok(())
    }

    /// Frees the memory that the device could access: it is disabled.
    pub(super) fn quiet(&self) {
        self.admin_lose_all();
        self.requests.forget_aborts();
        self.free_stuck_queues();
        self.link.free_kept();
        *self.shadow.write() = None;
    }

    /// Does a normal shutdown (Base section 3.6.1), disables the controller and releases it.
    pub(super) fn shut_down(&self) -> Result<(), NvmeError> {
        let word = self.life.word();
        if state::phase(word) != Phase::Live {
            self.link.transport.detach();
            return Ok(());
        }
        self.freeze_queues(word);
        let result = self.link.shut_down();
        self.link.transport.detach();
        self.quiet();
        self.life.set_failure("it was shut down");
        self.life
            .set(state::word(state::generation(word) + 1, Phase::Failed));
        self.interrupts.wake_sleepers();
        result
    }
}
