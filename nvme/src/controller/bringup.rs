//! Enable, disable, shutdown: Base sections 3.5 and 3.6.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, RwLock};
use pumice_io::sys::EventFd;

use super::admin::AdminQueue;
use super::keeper::Requests;
use super::link::Link;
use super::options::ControllerOptions;
use super::state::{self, Phase};
use super::{Core, Registry};
use crate::error::NvmeError;
use crate::transport::{Transport, TransportError};

impl Core {
    /// Resets, enables and identifies a controller, whatever state it is in.
    pub(super) fn bring_up(
        transport: Arc<dyn Transport>,
        options: ControllerOptions,
    ) -> Result<Core, NvmeError> {
        let link = Arc::new(Link::new(transport, options)?);
        let io = |source| TransportError::Io {
            device: link.name().to_owned(),
            what: "eventfd".into(),
            source,
        };
        let core = Core {
            state: AtomicU64::new(state::word(0, Phase::Resetting)),
            admin: Mutex::new(AdminQueue::new(link.transport.domain(), link.page_shift)?),
            admin_done: Condvar::new(),
            namespaces: RwLock::new(BTreeMap::new()),
            remembered: Mutex::new(BTreeMap::new()),
            list_again: AtomicBool::new(false),
            interrupts: RwLock::new(Vec::new()),
            queues: Mutex::new(Registry::default()),
            queue_freed: Condvar::new(),
            shadow: RwLock::new(None),
            memory: Mutex::new(None),
            requests: Mutex::new(Requests::default()),
            wake: EventFd::new().map_err(io)?,
            changed: Condvar::new(),
            changed_lock: Mutex::new(()),
            events: Mutex::new(VecDeque::new()),
            failure: Mutex::new(None),
            link,
        };
        match core.start() {
            Ok(()) => {
                core.set_state(state::word(1, Phase::Live));
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
        if self.interrupts.read().is_empty() && self.link.options.vectors > 0 {
            *self.interrupts.write() = self.some_interrupts(self.link.options.vectors)?;
        }
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

    /// Enables as many interrupt vectors as the transport gives, at most `want`. Without any,
    /// completions are polled.
    pub(super) fn some_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, NvmeError> {
        let mut count = want;
        while count > 0 {
            match self.link.transport.enable_interrupts(count) {
                Ok(vectors) => return Ok(vectors),
                Err(error) if self.link.transport.is_gone() => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(device = self.name(), count, %error, "interrupt vectors refused; trying fewer");
                    count /= 2;
                }
            }
        }
        Ok(Vec::new())
    }

    /// Frees the memory that the device could access: it is disabled.
    pub(super) fn quiet(&self) {
        self.admin_lose_all();
        self.forget_aborts();
        self.free_stuck_queues();
        self.link.free_kept();
        *self.shadow.write() = None;
    }

    /// Does a normal shutdown (Base section 3.6.1), disables the controller and releases it.
    pub(super) fn shut_down(&self) -> Result<(), NvmeError> {
        let word = self.state.load(Ordering::Acquire);
        if state::phase(word) != Phase::Live {
            self.link.transport.detach();
            return Ok(());
        }
        self.freeze_queues(word);
        let result = self.link.shut_down();
        self.link.transport.detach();
        self.quiet();
        *self.failure.lock() = Some("it was shut down".into());
        self.set_state(state::word(state::generation(word) + 1, Phase::Failed));
        self.wake_sleepers();
        result
    }
}
