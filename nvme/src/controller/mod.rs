//! Controllers: bring-up, admin commands, namespaces, reset, removal.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::{Condvar, Mutex, RwLock};

use crate::dma::{DmaBuf, DmaShared};
use crate::error::{Cause, NvmeError};
use crate::namespace::Namespace;
use crate::queue::QueueShared;
use crate::spec::{AdminOpcode, Cap, Command, Completion, Vs};
use crate::transport::OpenTransport;

mod admin;
mod bringup;
mod events;
mod identify;
mod info;
mod interrupts;
mod keeper;
mod link;
mod logs;
mod memory;
mod options;
mod passthrough;
mod queues;
mod quirks;
mod ready;
mod requests;
mod reset;
pub(crate) mod state;

use admin::AdminQueue;
pub use events::ControllerEvent;
use events::EventLog;
use interrupts::Interrupts;
use keeper::Keeper;
pub(crate) use link::Link;
use memory::ControllerMemory;
pub use options::{ControllerOptions, Weights};
use passthrough::Prepared;
use requests::Requests;
pub(crate) use state::Lifecycle;
pub use state::Phase;

/// The part of a controller that its queue pairs and its keeper thread share.
#[derive(Debug)]
pub(crate) struct Core {
    pub link: Arc<Link>,
    pub life: Arc<Lifecycle>,
    pub requests: Arc<Requests>,
    interrupts: Interrupts,
    events: EventLog,
    admin: Mutex<AdminQueue>,
    admin_done: Condvar,
    namespaces: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    /// The last known state of every namespace, whether it is listed now or not. Handles of a
    /// namespace that comes back unchanged continue to work. Lock order: before `namespaces`.
    remembered: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// Whether a namespace could not be identified, or the list not be read, so that the keeper
    /// lists them again.
    list_again: AtomicBool,
    queues: Mutex<Registry>,
    /// Signals that a queue identifier became free; used with `queues`.
    queue_freed: Condvar,
    shadow: RwLock<Option<[Arc<DmaShared>; 2]>>,
    memory: Mutex<Option<ControllerMemory>>,
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

impl Core {
    pub fn name(&self) -> &str {
        self.link.transport.name()
    }

    /// Returns the error that says why a queue pair can do nothing.
    pub fn gone(&self, cause: Cause) -> NvmeError {
        match cause {
            Cause::NoQueue => NvmeError::NoQueues {
                device: self.link.name().to_owned(),
                limit: self.queues.lock().limit,
            },
            _ => self.life.gone(cause),
        }
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
        self.core.life.phase()
    }

    /// Number of resets.
    pub fn generation(&self) -> u64 {
        state::generation(self.core.life.word())
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
        self.core.interrupts.count()
    }

    /// Returns the events since the last call, oldest first. At most 64 are kept.
    pub fn take_events(&self) -> Vec<ControllerEvent> {
        self.core.events.take()
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
            let word = self.core.life.wait_live()?;
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
        self.core.requests.reset_and_wait()
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
            return Err(self.core.life.gone(Cause::OtherProcess));
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
