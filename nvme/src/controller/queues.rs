//! The I/O queues of a controller: their numbers, and how they are made, made again and deleted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use pumice_io::sys::barrier;

use super::admin::Admin;
use super::interrupts::Interrupts;
use super::link::Link;
use super::memory::ControllerMemory;
use super::requests::Requests;
use super::shadow::ShadowDoorbells;
use super::state::{self, Lifecycle, Phase};
use crate::dma::DmaShared;
use crate::error::NvmeError;
use crate::queue::{
    Bank, Bell, CompletionRing, Lists, Parts, PointerStyle, QueueMem, QueueOptions, QueueShared,
    Ringing, SubmissionRing, bank_in, freeze,
};
use crate::spec::{AdminOpcode, Command, FeatureId, Status};

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

/// The I/O queues of a controller.
#[derive(Debug)]
pub(crate) struct IoQueues {
    link: Arc<Link>,
    life: Arc<Lifecycle>,
    requests: Arc<Requests>,
    admin: Arc<Admin>,
    interrupts: Arc<Interrupts>,
    pub shadow: ShadowDoorbells,
    pub(super) memory: ControllerMemory,
    /// Lock order: before the bank of a queue pair, the admin queue and the list of namespaces.
    registry: Mutex<Registry>,
    /// Notified when a queue identifier is free; used with `registry`.
    freed: Condvar,
}

impl IoQueues {
    pub fn new(
        life: &Arc<Lifecycle>,
        requests: &Arc<Requests>,
        admin: &Arc<Admin>,
        interrupts: &Arc<Interrupts>,
    ) -> IoQueues {
        let link = &admin.link;
        IoQueues {
            link: Arc::clone(link),
            life: Arc::clone(life),
            requests: Arc::clone(requests),
            admin: Arc::clone(admin),
            interrupts: Arc::clone(interrupts),
            shadow: ShadowDoorbells::new(admin),
            memory: ControllerMemory::new(link),
            registry: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    /// Returns the largest number of queue pairs.
    pub fn limit(&self) -> u16 {
        self.registry.lock().limit
    }

    /// Runs `change` while there is no queue pair and none can be made. Returns the number of pairs
    /// if there are some.
    pub fn without_pairs<T>(&self, change: impl FnOnce() -> T) -> Result<T, usize> {
        let registry = self.registry.lock();
        match registry.queues.len() {
            0 => Ok(change()),
            open => Err(open),
        }
    }

    /// Asks for I/O queues with Set Features 07h: Base section 5.27.1.5. A controller may grant
    /// more or fewer than it was asked for.
    pub fn negotiate(&self) -> Result<(), NvmeError> {
        let want = u32::from(self.link.options.queues.max(1)) - 1;
        let command =
            Command::set_feature(FeatureId::NUMBER_OF_QUEUES, 0, want | want << 16, false);
        let (done, _) = self.admin.run(command, None)?;
        let granted = (done.dw0 & 0xffff).min(done.dw0 >> 16) + 1;
        let limit = u16::try_from(granted.min(want + 1)).unwrap_or(1);
        self.registry.lock().limit = limit;
        Ok(())
    }

    /// Creates a queue pair's queues on the device, on the current completion memory. With a state
    /// word, creates them only while the controller is in that state. After an error the device may
    /// have one of them.
    fn create(&self, word: Option<u64>, q: &QueueShared, bank: usize) -> Result<(), NvmeError> {
        let create_cq = Command::create_cq(q.qid, q.cq_entries - 1, q.cq_address[bank], q.vector);
        self.admin.run_at(word, create_cq, None)?;
        let create_sq =
            Command::create_sq(q.qid, q.sq_entries - 1, q.sq_address, q.qid, q.priority);
        self.admin.run_at(word, create_sq, None)?;
        Ok(())
    }

    /// Deletes a queue pair's queues and frees its identifier. Returns true when the device no
    /// longer accesses their memory, nor that of their commands. Returns false when it refused; the
    /// identifier then stays taken until the next reset.
    pub fn retire(&self, q: &Arc<QueueShared>) -> bool {
        // From here on a reset does not create the queues again. The identifier stays taken: the
        // device has queues of that number until it has answered.
        self.mark(q.qid, QueueUse::Going);
        let done = self.delete(q);
        if done {
            // Another queue pair may get the identifier, and its commands the same numbers.
            self.requests.forget_aborts_of(q.qid);
            self.give_memory(q);
            self.registry.lock().queues.remove(&q.qid);
        } else {
            self.mark(q.qid, QueueUse::Stuck);
        }
        self.freed.notify_all();
        done
    }

    fn mark(&self, qid: u16, use_: QueueUse) {
        if let Some(entry) = self.registry.lock().queues.get_mut(&qid) {
            entry.use_ = use_;
        }
    }

    /// Deletes the queues. Returns whether the device now has no queues of this number.
    fn delete(&self, q: &QueueShared) -> bool {
        loop {
            let Ok(word) = self.life.wait_live() else {
                // After a failure or removal the controller is detached, so the device is quiet.
                return true;
            };
            if !q.bank.lock().created {
                return true;
            }
            let delete = |op| {
                match self
                    .admin
                    .run_at(Some(word), Command::delete_queue(op, q.qid), None)
                {
                    // The device itself says that there is no such queue.
                    Err(NvmeError::Status { status, .. })
                        if status.code() == Status::QID_INVALID =>
                    {
                        Ok(())
                    }
                    other => other.map(|_| ()),
                }
            };
            let deleted =
                delete(AdminOpcode::DELETE_SQ).and_then(|()| delete(AdminOpcode::DELETE_CQ));
            match deleted {
                Ok(()) => return true,
                // A reset in between has deleted all queues.
                Err(_) if self.life.word() != word => {
                    if self.life.wait_live().is_ok() {
                        return true;
                    }
                }
                Err(error) => {
                    tracing::warn!(device = self.link.name(), qid = q.qid, %error, "queues not deleted");
                    return false;
                }
            }
        }
    }

    /// Frees the identifiers of queues that the device refused to delete: it was disabled, which
    /// ends them.
    pub fn free_stuck(&self) {
        let mut registry = self.registry.lock();
        let stuck = registry
            .queues
            .extract_if(.., |_, e| e.use_ == QueueUse::Stuck);
        for (_, entry) in stuck {
            self.give_memory(&entry.shared);
        }
        self.freed.notify_all();
    }

    fn give_memory(&self, q: &QueueShared) {
        if let QueueMem::Controller(_, offset) = &q.sq_mem {
            self.memory.give(*offset, usize::from(q.sq_entries) * 64);
        }
    }

    /// Creates the queues of all pairs again, each on its second completion memory.
    pub fn create_all(&self) -> Result<(), NvmeError> {
        let registry = self.registry.lock();
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
                && let Err(error) = self.create(None, q, next)
            {
                bank.created = false;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stops every owner from ringing doorbells, as a first step of a reset or shutdown. When this
    /// returns, the state word must differ from the one that the owners have seen.
    pub fn freeze(&self, word: u64) {
        let resetting = state::word(state::generation(word) + 1, Phase::Resetting);
        let queues = || -> Vec<Arc<QueueShared>> {
            let registry = self.registry.lock();
            let all = registry.queues.values();
            all.map(|entry| Arc::clone(&entry.shared)).collect()
        };
        freeze(|| self.life.set(resetting), queues, |q| &q.ringing);
    }

    /// Makes the queues of a pair, on the device too, and what else it consists of. Blocks.
    pub fn pair(&self, options: &QueueOptions) -> Result<Parts, NvmeError> {
        barrier::init();
        let info = self.link.info()?;
        let max = u32::from(self.link.cap.mqes_z()) + 1;
        let depth = u32::from(options.depth.clamp(1, 4095)).min(max - 1);
        let sq_entries = u16::try_from(depth + 1).unwrap_or(2).max(2);
        let cq_wish = (2 * u32::from(sq_entries))
            .min(max)
            .min(u32::from(u16::MAX));
        let cq_entries = u16::try_from(cq_wish).unwrap_or(2).max(2);
        let depth = sq_entries - 1;

        let list_len = list_len(info.transfer_bytes, self.link.page_shift);
        let cq_mem = [(); 2].map(|()| self.link.queue_memory(usize::from(cq_entries) * 16));
        let [a, b] = cq_mem;
        let cq_mem = [Arc::new(a?), Arc::new(b?)];
        let lists_len = usize::from(depth) * list_len;
        let lists = Arc::new(DmaShared::zeroed_in(
            self.link.transport.domain(),
            lists_len,
        )?);

        let shared = self.reserve(options, sq_entries, cq_entries, cq_mem)?;
        match self.bring_to_life(&shared) {
            Ok((word, bells)) => self.assemble(shared, word, lists, list_len, bells),
            Err(error) => {
                // It is not certain whether the device has a queue there.
                shared.bank.lock().created = true;
                if !self.retire(&shared) {
                    self.link.keep_until_quiet(Box::new(shared));
                }
                Err(error)
            }
        }
    }

    /// Creates the queues of a registered pair, or lets a reset that happens meanwhile do so.
    /// Returns the state word for which its rings are valid at the beginning.
    fn bring_to_life(&self, shared: &Arc<QueueShared>) -> Result<(u64, (Bell, Bell)), NvmeError> {
        let bell = |completion, shadow| -> Result<Bell, NvmeError> {
            Ok(Bell::new(
                self.link.doorbell(shared.qid, completion)?,
                shadow,
            ))
        };
        loop {
            let word = self.life.wait_live()?;
            let bank = *shared.bank.lock();
            let (sq_shadow, cq_shadow) = self.shadow.of(shared.qid);
            if !bank.created {
                // The queue starts at 0, whatever an earlier queue with its number left there.
                for shadow in sq_shadow.iter().chain(&cq_shadow) {
                    shadow.clear();
                }
            }
            // Doorbells come before queues, so that there is nothing to undo when one is refused.
            let bells = (bell(false, sq_shadow)?, bell(true, cq_shadow)?);
            let made = if bank.created {
                Ok(())
            } else {
                self.create(Some(word), shared, bank.current)
            };
            // The lock is held, so that a reset that begins now decides after this.
            if let Some(mut now) = bank_in(&shared.bank, &self.life.state, word) {
                made?;
                now.created = true;
                return Ok((word, bells));
            }
            // A reset happened meanwhile. Either it found the pair in the registry and created the
            // queues, or it was past the registry already and they have to be created now.
        }
    }

    /// Takes a free queue identifier, an interrupt vector and the submission queue's memory.
    fn reserve(
        &self,
        options: &QueueOptions,
        sq_entries: u16,
        cq_entries: u16,
        cq_mem: [Arc<DmaShared>; 2],
    ) -> Result<Arc<QueueShared>, NvmeError> {
        let cq_address = [
            self.link.address_of(&cq_mem[0])?,
            self.link.address_of(&cq_mem[1])?,
        ];
        let sq_len = usize::from(sq_entries) * 64;
        let in_controller = if options.controller_memory {
            self.memory.take(sq_len)
        } else {
            None
        };
        let (sq_mem, sq_address) = match in_controller {
            Some((map, offset, address)) => (QueueMem::Controller(map, offset), address),
            None => {
                let mem = Arc::new(self.link.queue_memory(sq_len)?);
                let address = self.link.address_of(&mem)?;
                (QueueMem::Host(mem), address)
            }
        };
        let (mut registry, qid) = match self.free_identifier() {
            Ok(free) => free,
            Err(error) => {
                if let QueueMem::Controller(_, offset) = sq_mem {
                    self.memory.give(offset, sq_len);
                }
                return Err(error);
            }
        };
        let interrupt = self.interrupts.of(qid).filter(|_| options.interrupt);
        if let Some(interrupt) = &interrupt {
            interrupt.arm(false);
        }
        let shared = Arc::new(QueueShared {
            qid,
            sq_entries,
            cq_entries,
            vector: interrupt.as_ref().map(|_| qid),
            interrupt,
            priority: options.priority,
            sq_mem,
            sq_address,
            cq_address,
            cq_mem,
            ringing: Ringing::default(),
            bank: Mutex::new(Bank {
                current: 0,
                created: false,
                joined: false,
            }),
        });
        let entry = Registered {
            shared: Arc::clone(&shared),
            use_: QueueUse::Owned,
        };
        registry.queues.insert(qid, entry);
        Ok(shared)
    }

    /// Returns a free queue identifier, under the registry's lock. Waits for identifiers that are
    /// about to become free, and resets a controller that has refused to delete the queues of the
    /// last ones.
    fn free_identifier(&self) -> Result<(MutexGuard<'_, Registry>, u16), NvmeError> {
        let deadline = Instant::now() + self.link.options.admin_timeout;
        let mut was_reset = false;
        let mut registry = self.registry.lock();
        loop {
            let limit = registry.limit;
            if let Some(qid) = (1..=limit).find(|q| !registry.queues.contains_key(q)) {
                return Ok((registry, qid));
            }
            let any = |use_| registry.queues.values().any(|e| e.use_ == use_);
            if any(QueueUse::Going) && Instant::now() < deadline {
                self.freed.wait_until(&mut registry, deadline);
            } else if any(QueueUse::Stuck) && !was_reset {
                was_reset = true;
                MutexGuard::unlocked(&mut registry, || self.requests.reset_and_wait())?;
            } else {
                return Err(NvmeError::NoQueues {
                    device: self.link.name().to_owned(),
                    limit,
                });
            }
        }
    }

    fn assemble(
        &self,
        shared: Arc<QueueShared>,
        word: u64,
        lists: Arc<DmaShared>,
        list_len: usize,
        (sq_bell, cq_bell): (Bell, Bell),
    ) -> Result<Parts, NvmeError> {
        // If a reset has happened meanwhile, the state word shows it and the pair catches up.
        let current = {
            let mut bank = shared.bank.lock();
            bank.joined = true;
            bank.current
        };
        let depth = shared.sq_entries - 1;
        let lists = Lists::new(lists, &self.link.table, depth, list_len).map_err(|_| {
            self.link
                .protocol("list memory is not mapped for the device")
        })?;
        // Entries that are consumed but not acknowledged are room that the controller lacks. There
        // are never so many that it cannot post a completion for every command in flight.
        let spare = shared.cq_entries - 1 - depth.min(shared.cq_entries - 1);
        let ack_at = spare.min(shared.cq_entries / 4).max(1);
        let memory = Arc::clone(&shared.cq_mem[current]);
        Ok(Parts {
            sq: SubmissionRing::new(shared.sq_mem.clone(), shared.sq_entries, sq_bell),
            cq: CompletionRing::new(memory, shared.cq_entries, ack_at, cq_bell),
            shared,
            word,
            lists,
            style: PointerStyle {
                page_len: 1 << self.link.page_shift,
                sgl: self.link.info()?.sgl,
            },
        })
    }
}

/// Returns the length of a command's list area: PRP entries for the largest transfer and at least
/// 32 ranges of Dataset Management. It is a power of two up to a page, so that an area crosses no
/// page.
fn list_len(transfer_bytes: usize, page_shift: u32) -> usize {
    let entries = (transfer_bytes >> page_shift) + 1;
    (entries * 8).next_power_of_two().clamp(512, 4096)
}
