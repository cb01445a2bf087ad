//! Controllers: bring-up, admin commands, namespaces, reset, removal.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use pumice_io::sys::EventFd;

use crate::dma::{DmaBuf, DmaShared};
use crate::error::{Cause, NvmeError};
use crate::namespace::Namespace;
use crate::queue::QueueShared;
use crate::spec::{AdminOpcode, AsyncEvent, Cap, Command, Completion, Vs};
use crate::transport::OpenTransport;

mod admin;
mod bringup;
mod identify;
mod info;
mod keeper;
mod link;
mod logs;
mod memory;
mod options;
mod passthrough;
mod queues;
mod quirks;
mod ready;
mod reset;
pub(crate) mod state;

use admin::AdminQueue;
use keeper::{Keeper, Requests};
pub(crate) use link::Link;
use memory::ControllerMemory;
pub use options::{ControllerOptions, Weights};
use passthrough::Prepared;
pub use state::Phase;

/// An event of a controller; see [`Controller::take_events`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ControllerEvent {
    /// The controller completed an asynchronous event request.
    Async(AsyncEvent),
    /// The controller was reset, for this reason.
    Reset(String),
    /// The namespaces were listed again.
    NamespacesChanged,
    /// The bus or transport reported an error.
    TransportError(String),
    /// The controller was removed.
    Removed,
    /// The controller could not be reset and has failed, for this reason.
    Failed(String),
}

/// The part of a controller that its queue pairs and its keeper thread share.
#[derive(Debug)]
pub(crate) struct Core {
    pub link: Arc<Link>,
    pub state: AtomicU64,
    admin: Mutex<AdminQueue>,
    admin_done: Condvar,
    namespaces: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    /// The last known state of every namespace, whether it is listed now or not. Handles of a
    /// namespace that comes back unchanged continue to work. Lock order: before `namespaces`.
    remembered: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// Whether a namespace could not be identified, or the list not be read, so that the keeper
    /// lists them again.
    list_again: AtomicBool,
    interrupts: RwLock<Vec<Arc<EventFd>>>,
    queues: Mutex<Registry>,
    /// Signals that a queue identifier became free; used with `queues`.
    queue_freed: Condvar,
    shadow: RwLock<Option<[Arc<DmaShared>; 2]>>,
    memory: Mutex<Option<ControllerMemory>>,
    requests: Mutex<Requests>,
    wake: EventFd,
    changed: Condvar,
    changed_lock: Mutex<()>,
    events: Mutex<VecDeque<ControllerEvent>>,
    failure: Mutex<Option<String>>,
}

/// Queue identifiers that are not free, each with its queue pair.
#[derive(Debug, Default)]
struct Registry {
    queues: BTreeMap<u16, Registered>,
    limit: u16,
}

/// A queue identifier that is not free. Another pair may have it only when the device has certainly
/// no queue of that number.
#[derive(Debug)]
struct Registered {
    shared: Arc<QueueShared>,
    use_: QueueUse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum QueueUse {
    /// A queue pair has the identifier. A reset creates its queues again.
    Owned,
    /// The owner is deleting the queues.
    Going,
    /// The device refused to delete the queues. The next reset deletes them.
    Stuck,
}

/// An enabled NVMe controller, shared by everything that uses it. When the last handle is dropped
/// (queue pairs hold one), it is shut down and released.
#[derive(Debug)]
pub struct Controller {
    pub(crate) core: Arc<Core>,
    /// Held during the whole shutdown. Nothing else takes it.
    keeper: Mutex<Keeper>,
}

/// Most events kept for `take_events`. Older ones are dropped.
const EVENTS_MAX: usize = 64;

impl Core {
    pub fn name(&self) -> &str {
        self.link.transport.name()
    }

    pub fn phase(&self) -> Phase {
        state::phase(self.state.load(Ordering::Acquire))
    }

    fn event(&self, event: ControllerEvent) {
        let mut events = self.events.lock();
        if events.len() >= EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// Returns the error that says why the controller can do nothing.
    pub fn gone(&self, kind: Cause) -> NvmeError {
        match kind {
            Cause::Removed => NvmeError::Removed {
                device: self.name().to_owned(),
            },
            Cause::OtherProcess => NvmeError::OtherProcess {
                device: self.name().to_owned(),
            },
            Cause::NoQueue => NvmeError::NoQueues {
                device: self.name().to_owned(),
                limit: self.queues.lock().limit,
            },
            _ => NvmeError::Failed {
                device: self.name().to_owned(),
                reason: self
                    .failure
                    .lock()
                    .clone()
                    .unwrap_or_else(|| "no reason noted".into()),
            },
        }
    }

    /// Blocks while the controller is being reset. Then returns the state word, or the reason why
    /// the controller is not available.
    fn wait_live(&self) -> Result<u64, NvmeError> {
        if !self.link.birth.is_here() {
            return Err(self.gone(Cause::OtherProcess));
        }
        loop {
            let word = self.state.load(Ordering::Acquire);
            match state::phase(word) {
                Phase::Live => return Ok(word),
                Phase::Failed => return Err(self.gone(Cause::ControllerFailed)),
                Phase::Removed => return Err(self.gone(Cause::Removed)),
                Phase::Resetting => {
                    let mut guard = self.changed_lock.lock();
                    if self.state.load(Ordering::Acquire) == word {
                        self.changed
                            .wait_for(&mut guard, Duration::from_millis(100));
                    }
                }
            }
        }
    }

    /// Sleeps until the state word differs from `word`, or the time is over.
    pub(crate) fn wait_changed(&self, word: u64, timeout: Duration) {
        let mut guard = self.changed_lock.lock();
        if self.state.load(Ordering::Acquire) == word {
            self.changed.wait_for(&mut guard, timeout);
        }
    }

    fn set_state(&self, word: u64) {
        {
            let _guard = self.changed_lock.lock();
            self.state.store(word, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }
}

impl Controller {
    /// Takes a transport, resets and enables its controller and lists its namespaces. Blocks; every
    /// wait is bounded by the time that the controller promises (CAP.TO, CRTO.CRWMT), see
    /// [`ControllerOptions::admin_timeout`].
    ///
    /// # Errors
    /// Fails when the system has no thread that watches the controller, which is then left as it
    /// was; and when the controller does not come up or deviates from the specification.
    pub fn new(
        transport: OpenTransport,
        options: ControllerOptions,
    ) -> Result<Arc<Controller>, NvmeError> {
        let keeper = keeper::prepare(transport.name())?;
        let core = Arc::new(Core::bring_up(transport.0, options)?);
        let keeper = Mutex::new(keeper.watch(&core));
        Ok(Arc::new(Controller { core, keeper }))
    }

    /// The device's name for logs and errors.
    pub fn name(&self) -> &str {
        self.core.link.name()
    }

    /// The kind of transport: `vfio`, `uio`, `vfio-user` or `soft`.
    pub fn transport_kind(&self) -> &'static str {
        self.core.link.transport.kind()
    }

    /// Whether an interrupt is a message from a controller in another process. Such a controller
    /// sends one for each completion, so a polling thread is faster without.
    pub fn interrupts_are_messages(&self) -> bool {
        self.core.link.transport.interrupts_are_messages()
    }

    /// The controller's phase at this moment.
    pub fn phase(&self) -> Phase {
        self.core.phase()
    }

    /// Number of resets.
    pub fn generation(&self) -> u64 {
        state::generation(self.core.state.load(Ordering::Acquire))
    }

    /// The capabilities register.
    pub fn capabilities(&self) -> Cap {
        self.core.link.cap
    }

    /// The version register.
    pub fn version(&self) -> Result<Vs, NvmeError> {
        Ok(self.core.link.info()?.version)
    }

    /// Most bytes of a single command's data (MDTS, and this driver's bound of 1 MiB).
    pub fn transfer_bytes(&self) -> Result<usize, NvmeError> {
        Ok(self.core.link.info()?.transfer_bytes)
    }

    /// Whether shadow doorbells are in use.
    pub fn shadow_doorbells(&self) -> bool {
        self.core.shadow.read().is_some()
    }

    /// Whether data pointers are SGLs where these are shorter.
    pub fn uses_sgl(&self) -> bool {
        self.core.link.info().is_ok_and(|i| i.sgl)
    }

    /// Most I/O queue pairs.
    pub fn queue_limit(&self) -> u16 {
        self.core.queues.lock().limit
    }

    /// Number of interrupt vectors in use, including the admin queue's.
    pub fn interrupt_count(&self) -> usize {
        self.core.interrupts.read().len()
    }

    /// Returns the events since the last call, oldest first. At most 64 are kept.
    pub fn take_events(&self) -> Vec<ControllerEvent> {
        self.core.events.lock().drain(..).collect()
    }

    /// Runs an admin command of the caller, with data to or from the device. Blocks. This function
    /// sets the data pointer and the identifier.
    ///
    /// # Errors
    /// Fails with [`NvmeError::Status`] when the status is not success. Refuses commands whose data
    /// would not fit the buffer; commands that pass addresses to the device (creating queues,
    /// doorbell buffers, the host memory buffer) or delete the driver's own queues; features whose
    /// data has no known bound, and features that the driver sets itself; and Format NVM while
    /// there are queue pairs, see [`format`](Self::format). The device is only given a buffer of
    /// the driver, as long as the command can need, or, for a vendor specific command with data, as
    /// long as any command's data can be.
    pub fn admin_command(
        &self,
        command: Command,
        data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let Prepared { command, sent, own } = passthrough::prepare(&self.core.link, command, data)?;
        let send = || {
            let word = self.core.wait_live()?;
            self.core.admin_once(Some(word), command, sent)
        };
        let (completion, data) = match AdminOpcode(command.opcode) {
            AdminOpcode::FORMAT_NVM => self.core.reformat(send)?,
            AdminOpcode::NS_MANAGEMENT | AdminOpcode::NS_ATTACHMENT => {
                let done = send()?;
                self.core.list_namespaces()?;
                done
            }
            _ => send()?,
        };
        Ok((completion, passthrough::finish(data, own)))
    }

    /// Resets the controller. I/O in flight ends once: with its own status, with that of another
    /// attempt, or as aborted when its retries are used up. Blocks until the reset has ended.
    pub fn reset(&self) -> Result<(), NvmeError> {
        let before = self.core.wait_live()?;
        self.core.request_reset("asked for");
        let start = Instant::now();
        loop {
            let word = self.core.wait_live()?;
            if word != before {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(60) {
                return Err(NvmeError::NotReady {
                    device: self.name().to_owned(),
                    what: "reset",
                    timeout_ms: 60_000,
                    limit: "the longest wait for a reset".into(),
                    csts: 0,
                });
            }
            let mut guard = self.core.changed_lock.lock();
            if self.core.state.load(Ordering::Acquire) == before {
                self.core
                    .changed
                    .wait_for(&mut guard, Duration::from_millis(20));
            }
        }
    }

    /// Shuts the controller down (CC.SHN), so that its caches are safe, and releases the device.
    /// Every queue pair's I/O ends. Blocks for a bounded time. Dropping the last handle does the
    /// same without returning an error. Of several calls each returns when the controller is shut
    /// down.
    ///
    /// # Errors
    /// Fails when the controller does not report the end of its shutdown in time, so that its
    /// caches may not be on the medium. Every later call then fails too.
    pub fn shutdown(&self) -> Result<(), NvmeError> {
        if !self.core.link.birth.is_here() {
            return Err(self.core.gone(Cause::OtherProcess));
        }
        self.keeper.lock().stop(&self.core)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if !self.core.link.birth.is_here() {
            return;
        }
        if let Err(error) = self.keeper.get_mut().stop(&self.core) {
            tracing::warn!(device = self.name(), %error, "shutdown");
        }
    }
}
