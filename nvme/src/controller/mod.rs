//! Controllers: bring-up, admin commands, namespaces, reset, removal.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use pumice_io::process::Birth;
use pumice_io::sys::EventFd;

use crate::dma::{AddressTable, DmaBuf, DmaShared};
use crate::error::{Cause, NvmeError};
use crate::namespace::Namespace;
use crate::queue::QueueShared;
use crate::spec::{
    AdminOpcode, AsyncEvent, Cap, Command, Completion, IdentifyController, IdentifyNvmController,
    Status, Vs,
};
use crate::transport::{OpenTransport, Transport};

mod admin;
mod bringup;
mod identify;
mod keeper;
mod logs;
mod memory;
mod passthrough;
mod queues;
mod reset;
pub(crate) mod state;

use admin::AdminQueue;
use keeper::Requests;
use memory::ControllerMemory;
use passthrough::Prepared;
pub use state::Phase;

/// How a controller is brought up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ControllerOptions {
    /// I/O queue pairs to ask the controller for.
    pub queues: u16,
    /// Interrupt vectors to ask the transport for; 0: poll only.
    pub vectors: u16,
    /// Use shadow doorbells where the controller offers them.
    pub shadow_doorbells: bool,
    /// Use SGLs where the controller offers them.
    pub sgl: bool,
    /// Weighted round robin between the queues' classes, where the controller offers it.
    pub arbitration: Option<Weights>,
    /// An admin command without completion for this long means a reset. Format NVM is given ten
    /// minutes at the least.
    pub admin_timeout: Duration,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        ControllerOptions {
            queues: 64,
            vectors: 65,
            shadow_doorbells: true,
            sgl: true,
            arbitration: None,
            admin_timeout: Duration::from_secs(20),
        }
    }
}

/// Weights of the arbitration's classes (Base section 5.27.1.1), commands per round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// High, 1 to 256.
    pub high: u16,
    /// Medium, 1 to 256.
    pub medium: u16,
    /// Low, 1 to 256.
    pub low: u16,
}

/// Something that happened to a controller; see [`Controller::take_events`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ControllerEvent {
    /// The controller completed an asynchronous event request.
    Async(AsyncEvent),
    /// It was reset, for this reason.
    Reset(String),
    /// The namespaces were listed anew.
    NamespacesChanged,
    /// The bus or transport reported an error.
    TransportError(String),
    /// It is gone.
    Removed,
    /// It could not be reset and is given up.
    Failed(String),
}

/// What the controller says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Info {
    pub identify: Box<IdentifyController>,
    pub nvm: Option<Box<IdentifyNvmController>>,
    pub version: Vs,
    /// Bytes of a command's data at most.
    pub transfer_bytes: usize,
    pub sgl: bool,
    pub write_cache: bool,
}

/// The part of a controller that its queue pairs and its keeper thread share.
#[derive(Debug)]
pub(crate) struct Core {
    /// Tells controllers of this process apart; never 0.
    pub number: u64,
    /// The process that has the controller; a forked child has not.
    pub birth: Birth,
    pub transport: Arc<dyn Transport>,
    pub table: Arc<AddressTable>,
    pub state: AtomicU64,
    options: ControllerOptions,
    cap: Cap,
    /// log2 of the page size in use.
    pub page_shift: u32,
    admin: Mutex<AdminQueue>,
    admin_done: Condvar,
    info: RwLock<Option<Arc<Info>>>,
    namespaces: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    /// The last that was known of every namespace, listed now or not: whoever has a handle of one
    /// that comes back as it was goes on with it. Lock order: before `namespaces`.
    remembered: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// A namespace could not be identified, or the list not be read: the keeper lists them again.
    list_again: AtomicBool,
    interrupts: RwLock<Vec<Arc<EventFd>>>,
    queues: Mutex<Registry>,
    /// A queue identifier became free; with `queues`.
    queue_freed: Condvar,
    shadow: RwLock<Option<[Arc<DmaShared>; 2]>>,
    memory: Mutex<Option<ControllerMemory>>,
    requests: Mutex<Requests>,
    wake: EventFd,
    changed: Condvar,
    changed_lock: Mutex<()>,
    /// What the device may still touch until it is disabled.
    graveyard: Mutex<Vec<Box<dyn Any + Send>>>,
    events: Mutex<VecDeque<ControllerEvent>>,
    failure: Mutex<Option<String>>,
}

/// Queue identifiers that are not free, each with its queue pair.
#[derive(Debug, Default)]
struct Registry {
    queues: BTreeMap<u16, Registered>,
    limit: u16,
}

/// A queue identifier that is not free. It stays taken until the device has certainly no queue of
/// that number: then, and not before, another pair may have it.
#[derive(Debug)]
struct Registered {
    shared: Arc<QueueShared>,
    use_: QueueUse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum QueueUse {
    /// A queue pair has it; a reset creates its queues again.
    Owned,
    /// Its owner is deleting the queues.
    Going,
    /// The device refused to delete the queues; the next reset takes them away.
    Stuck,
}

/// An NVMe controller, enabled. Shared by everything that uses it; when the last handle goes
/// (queue pairs hold one), it is shut down and let go of.
#[derive(Debug)]
pub struct Controller {
    pub(crate) core: Arc<Core>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

/// Events kept for `take_events` at most; older ones are dropped.
const EVENTS_MAX: usize = 64;

impl Core {
    pub fn name(&self) -> &str {
        self.transport.name()
    }

    pub fn phase(&self) -> Phase {
        state::phase(self.state.load(Ordering::Acquire))
    }

    pub fn info(&self) -> Result<Arc<Info>, NvmeError> {
        self.info.read().clone().ok_or_else(|| NvmeError::Protocol {
            device: self.name().to_owned(),
            detail: "the controller was not identified yet".into(),
        })
    }

    fn event(&self, event: ControllerEvent) {
        let mut events = self.events.lock();
        if events.len() >= EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// Why nothing can be done any more.
    pub fn gone(&self, kind: Cause) -> NvmeError {
        match kind {
            Cause::Removed => NvmeError::Removed {
                device: self.name().to_owned(),
            },
            Cause::OtherProcess => NvmeError::OtherProcess {
                device: self.name().to_owned(),
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

    /// How long to wait before a command is sent again: Base section 3.3.3.2.1 (CRD), else
    /// at once and then ever longer.
    pub fn retry_delay(&self, status: Status, retries: u8) -> Duration {
        if let n @ 1..=3 = status.crd()
            && let Ok(info) = self.info()
        {
            let delay = info.identify.crdt[usize::from(n) - 1].get();
            // Tenths of a second; nobody waits longer than ten for a retry.
            return Duration::from_millis(u64::from(delay).min(100) * 100);
        }
        match retries {
            0 => Duration::ZERO,
            n => Duration::from_millis(1 << n.min(7)),
        }
    }

    /// Blocks while a reset is under way, then says whether the controller is to be had.
    fn wait_live(&self) -> Result<u64, NvmeError> {
        if !self.birth.is_here() {
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

    /// Sleeps until the state word is another one, or the time is over.
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
    /// Takes a transport, resets and enables the controller behind it and finds its namespaces.
    /// Blocks; every wait is bounded by what the controller promises (CAP.TO).
    pub fn new(
        transport: OpenTransport,
        options: ControllerOptions,
    ) -> Result<Arc<Controller>, NvmeError> {
        let core = Arc::new(Core::bring_up(transport.0, options)?);
        let keeper = keeper::start(Arc::clone(&core));
        Ok(Arc::new(Controller {
            core,
            keeper: Mutex::new(keeper),
        }))
    }

    /// The device for logs and errors.
    pub fn name(&self) -> &str {
        self.core.name()
    }

    /// Which kind of transport is underneath: `vfio`, `uio`, `vfio-user`, `soft`.
    pub fn transport_kind(&self) -> &'static str {
        self.core.transport.kind()
    }

    /// Whether an interrupt is a message of a controller in another process, which sends one for
    /// each completion, so that a thread that polls does better without.
    pub fn interrupts_are_messages(&self) -> bool {
        self.core.transport.interrupts_are_messages()
    }

    /// What can be done at this moment.
    pub fn phase(&self) -> Phase {
        self.core.phase()
    }

    /// How many resets there were.
    pub fn generation(&self) -> u64 {
        state::generation(self.core.state.load(Ordering::Acquire))
    }

    /// The capabilities register.
    pub fn capabilities(&self) -> Cap {
        self.core.cap
    }

    /// The version register.
    pub fn version(&self) -> Result<Vs, NvmeError> {
        Ok(self.core.info()?.version)
    }

    /// Bytes of a single command's data at most (MDTS, and this driver's own bound of 1 MiB).
    pub fn transfer_bytes(&self) -> Result<usize, NvmeError> {
        Ok(self.core.info()?.transfer_bytes)
    }

    /// Whether shadow doorbells are in use.
    pub fn shadow_doorbells(&self) -> bool {
        self.core.shadow.read().is_some()
    }

    /// Whether data is pointed to by SGLs where they are shorter.
    pub fn uses_sgl(&self) -> bool {
        self.core.info().is_ok_and(|i| i.sgl)
    }

    /// I/O queue pairs that can exist.
    pub fn queue_limit(&self) -> u16 {
        self.core.queues.lock().limit
    }

    /// Interrupt vectors in use, admin's included.
    pub fn interrupt_count(&self) -> usize {
        self.core.interrupts.read().len()
    }

    /// What happened since the last call, oldest first; at most 64 are kept.
    pub fn take_events(&self) -> Vec<ControllerEvent> {
        self.core.events.lock().drain(..).collect()
    }

    /// An admin command of the caller's own making, with data to or from the device. Blocks.
    /// The data pointer and the identifier are set here.
    ///
    /// # Errors
    /// A status other than success is [`NvmeError::Status`]. Refused are commands whose data
    /// would not fit the buffer, and those that tell the device addresses (creating queues,
    /// doorbell buffers, the host memory buffer) or take the driver's own queues away; features
    /// whose data nobody can bound, and those that the driver sets itself; and Format NVM while
    /// there are queue pairs, see [`format`](Self::format). The device only ever sees a buffer of
    /// the driver's, as long as the command can want; of a vendor's command with data, as long as
    /// a command's data can be.
    pub fn admin_command(
        &self,
        command: Command,
        data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let Prepared { command, sent, own } = self.core.prepare(command, data)?;
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

    /// Resets the controller. I/O in flight ends once with its own status, or is sent again, or
    /// ends as aborted when its retries are used up. Blocks until the reset is over.
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

    /// Shuts the controller down (CC.SHN) so that its caches are safe, and lets go of the
    /// device. Every queue pair's I/O ends. Blocks, bounded. Dropping the last handle does the
    /// same without the report.
    pub fn shutdown(&self) -> Result<(), NvmeError> {
        if !self.core.birth.is_here() {
            return Err(self.core.gone(Cause::OtherProcess));
        }
        self.stop_keeper();
        self.core.shut_down()
    }

    fn stop_keeper(&self) {
        let handle = self.keeper.lock().take();
        if let Some(handle) = handle {
            self.core.requests.lock().stop = true;
            self.core.wake.signal();
            if handle.join().is_err() {
                tracing::error!(device = self.name(), "the keeper thread panicked");
            }
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if !self.core.birth.is_here() {
            return;
        }
        self.stop_keeper();
        if let Err(error) = self.core.shut_down() {
            tracing::warn!(device = self.name(), %error, "shutdown");
        }
    }
}
