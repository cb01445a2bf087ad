//! Making and deleting I/O queue pairs.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use pumice_io::sys::barrier;

use super::state::{self, Phase};
use super::{Controller, Core, QueueUse, Registered, Registry};
use crate::dma::DmaShared;
use crate::error::NvmeError;
use crate::queue::{
    Bank, Bell, CompletionRing, Lists, Parts, PointerStyle, QueueMem, QueueOptions, QueuePair,
    QueueShared, Ringing, SubmissionRing, bank_in, freeze,
};
use crate::spec::{AdminOpcode, Command, FeatureId, Status};

impl Core {
    /// Asks for I/O queues with Set Features 07h: Base section 5.27.1.5. A controller may grant
    /// more or fewer than it was asked for.
    pub(super) fn negotiate_queues(&self) -> Result<(), NvmeError> {
        let want = u32::from(self.link.options.queues.max(1)) - 1;
        let command =
            Command::set_feature(FeatureId::NUMBER_OF_QUEUES, 0, want | want << 16, false);
        let (done, _) = self.admin(command, None)?;
        let granted = (done.dw0 & 0xffff).min(done.dw0 >> 16) + 1;
        let limit = u16::try_from(granted.min(want + 1)).unwrap_or(1);
        self.queues.lock().limit = limit;
        Ok(())
    }

    /// Creates a queue pair's queues on the device, on the current completion memory. With a state
    /// word, creates them only while the controller is in that state. After an error the device may
    /// have one of them.
    pub(super) fn create_queues(
        &self,
        word: Option<u64>,
        q: &QueueShared,
        bank: usize,
    ) -> Result<(), NvmeError> {
        let create_cq = Command::create_cq(q.qid, q.cq_entries - 1, q.cq_address[bank], q.vector);
        self.admin_at(word, create_cq, None)?;
        let create_sq =
            Command::create_sq(q.qid, q.sq_entries - 1, q.sq_address, q.qid, q.priority);
        self.admin_at(word, create_sq, None)?;
        Ok(())
    }

    /// Deletes a queue pair's queues and frees its identifier. Returns true when the device no
    /// longer accesses their memory, nor that of their commands. Returns false when it refused; the
    /// identifier then stays taken until the next reset.
    pub(crate) fn retire_queue(&self, q: &Arc<QueueShared>) -> bool {
        // From here on a reset does not create the queues again. The identifier stays taken: the
        // device has queues of that number until it has answered.
        self.mark_queue(q.qid, QueueUse::Going);
        let done = self.delete_queues(q);
        if done {
            // Another queue pair may get the identifier, and its commands the same numbers.
            self.requests.forget_aborts_of(q.qid);
            self.give_queue_memory(q);
            self.queues.lock().queues.remove(&q.qid);
        } else {
            self.mark_queue(q.qid, QueueUse::Stuck);
        }
        self.queue_freed.notify_all();
        done
    }

    fn mark_queue(&self, qid: u16, use_: QueueUse) {
        if let Some(entry) = self.queues.lock().queues.get_mut(&qid) {
            entry.use_ = use_;
        }
    }

    /// Deletes the queues. Returns whether the device now has no queues of this number.
    fn delete_queues(&self, q: &QueueShared) -> bool {
        loop {
            let Ok(word) = self.life.wait_live() else {
                // After a failure or removal the controller is detached, so the device is quiet.
                return true;
            };
            if !q.bank.lock().created {
                return true;
            }
            let delete = |op| {
                match self.admin_at(Some(word), Command::delete_queue(op, q.qid), None) {
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
                    tracing::warn!(device = self.name(), qid = q.qid, %error, "queues not deleted");
                    return false;
                }
            }
        }
    }

    /// Frees the identifiers of queues that the device refused to delete: it was disabled, which
    /// ends them.
    pub(super) fn free_stuck_queues(&self) {
        let mut registry = self.queues.lock();
        let stuck = registry
            .queues
            .extract_if(.., |_, e| e.use_ == QueueUse::Stuck);
        for (_, entry) in stuck {
            self.give_queue_memory(&entry.shared);
        }
        self.queue_freed.notify_all();
    }

    fn give_queue_memory(&self, q: &QueueShared) {
        if let QueueMem::Controller(_, offset) = &q.sq_mem {
            self.give_controller_memory(*offset, usize::from(q.sq_entries) * 64);
        }
    }
}

impl Controller {
    /// Makes an I/O queue pair. Blocks for the admin commands.
    ///
    /// # Errors
    /// Fails with [`NvmeError::NoQueues`] when the controller has no more queues.
    pub fn queue_pair(self: &Arc<Self>, options: &QueueOptions) -> Result<QueuePair, NvmeError> {
        barrier::init();
        let core = &self.core;
        let info = core.link.info()?;
        let max = u32::from(core.link.cap.mqes_z()) + 1;
        let depth = u32::from(options.depth.clamp(1, 4095)).min(max - 1);
        let sq_entries = u16::try_from(depth + 1).unwrap_or(2).max(2);
        let cq_wish = (2 * u32::from(sq_entries))
            .min(max)
            .min(u32::from(u16::MAX));
        let cq_entries = u16::try_from(cq_wish).unwrap_or(2).max(2);
        let depth = sq_entries - 1;

        let list_len = list_len(info.transfer_bytes, core.link.page_shift);
        let cq_mem = [(); 2].map(|()| core.link.queue_memory(usize::from(cq_entries) * 16));
        let [a, b] = cq_mem;
        let cq_mem = [Arc::new(a?), Arc::new(b?)];
        let lists_len = usize::from(depth) * list_len;
        let lists = Arc::new(DmaShared::zeroed_in(
            core.link.transport.domain(),
            lists_len,
        )?);

        let shared = self.reserve(options, sq_entries, cq_entries, cq_mem)?;
        match self.bring_to_life(&shared) {
            Ok((word, bells)) => self.assemble(options, shared, word, lists, list_len, bells),
            Err(error) => {
                // It is not certain whether the device has a queue there.
                shared.bank.lock().created = true;
                if !core.retire_queue(&shared) {
                    core.link.keep_until_quiet(Box::new(shared));
                }
                Err(error)
            }
        }
    }

    /// Creates the queues of a registered pair, or lets a reset that happens meanwhile do so.
    /// Returns the state word for which its rings are valid at the beginning.
    fn bring_to_life(&self, shared: &Arc<QueueShared>) -> Result<(u64, (Bell, Bell)), NvmeError> {
        let core = &self.core;
        let bell = |completion, shadow| -> Result<Bell, NvmeError> {
            Ok(Bell::new(
                core.link.doorbell(shared.qid, completion)?,
                shadow,
            ))
        };
        loop {
            let word = core.life.wait_live()?;
            let bank = *shared.bank.lock();
            let (sq_shadow, cq_shadow) = core.shadows(shared.qid);
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
                core.create_queues(Some(word), shared, bank.current)
            };
            // The lock is held, so that a reset that begins now decides after this.
            if let Some(mut now) = bank_in(&shared.bank, &core.life.state, word) {
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
        let core = &self.core;
        let cq_address = [
            core.link.address_of(&cq_mem[0])?,
            core.link.address_of(&cq_mem[1])?,
        ];
        let sq_len = usize::from(sq_entries) * 64;
        let in_controller = if options.controller_memory {
            core.take_controller_memory(sq_len)
        } else {
            None
        };
        let (sq_mem, sq_address) = match in_controller {
            Some((map, offset, address)) => (QueueMem::Controller(map, offset), address),
            None => {
                let mem = Arc::new(core.link.queue_memory(sq_len)?);
                let address = core.link.address_of(&mem)?;
                (QueueMem::Host(mem), address)
            }
        };
        let (mut registry, qid) = match self.free_identifier() {
            Ok(free) => free,
            Err(error) => {
                if let QueueMem::Controller(_, offset) = sq_mem {
                    core.give_controller_memory(offset, sq_len);
                }
                return Err(error);
            }
        };
        let interrupt = core.interrupts.of(qid).filter(|_| options.interrupt);
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
        let core = &self.core;
        let deadline = Instant::now() + core.link.options.admin_timeout;
        let mut was_reset = false;
        let mut registry = core.queues.lock();
        loop {
            let limit = registry.limit;
            if let Some(qid) = (1..=limit).find(|q| !registry.queues.contains_key(q)) {
                return Ok((registry, qid));
            }
            let any = |use_| registry.queues.values().any(|e| e.use_ == use_);
            if any(QueueUse::Going) && Instant::now() < deadline {
                core.queue_freed.wait_until(&mut registry, deadline);
            } else if any(QueueUse::Stuck) && !was_reset {
                was_reset = true;
                MutexGuard::unlocked(&mut registry, || self.reset())?;
            } else {
                return Err(NvmeError::NoQueues {
                    device: self.name().to_owned(),
                    limit,
                });
            }
        }
    }

    fn assemble(
        self: &Arc<Self>,
        options: &QueueOptions,
        shared: Arc<QueueShared>,
        word: u64,
        lists: Arc<DmaShared>,
        list_len: usize,
        (sq_bell, cq_bell): (Bell, Bell),
    ) -> Result<QueuePair, NvmeError> {
        let core = &self.core;
        // If a reset has happened meanwhile, the state word shows it and the pair catches up.
        let current = {
            let mut bank = shared.bank.lock();
            bank.joined = true;
            bank.current
        };
        let depth = shared.sq_entries - 1;
        let lists = Lists::new(lists, &core.link.table, depth, list_len).map_err(|_| {
            core.link
                .protocol("list memory is not mapped for the device")
        })?;
        // Entries that are consumed but not acknowledged are room that the controller lacks. There
        // are never so many that it cannot post a completion for every command in flight.
        let spare = shared.cq_entries - 1 - depth.min(shared.cq_entries - 1);
        let ack_at = spare.min(shared.cq_entries / 4).max(1);
        let memory = Arc::clone(&shared.cq_mem[current]);
        let parts = Parts {
            sq: SubmissionRing::new(shared.sq_mem.clone(), shared.sq_entries, sq_bell),
            cq: CompletionRing::new(memory, shared.cq_entries, ack_at, cq_bell),
            shared,
            word,
            lists,
            style: PointerStyle {
                page_len: 1 << core.link.page_shift,
                sgl: core.link.info()?.sgl,
            },
        };
        Ok(QueuePair::new(self, options, parts))
    }
}

/// Returns the length of a command's list area: PRP entries for the largest transfer and at least
/// 32 ranges of Dataset Management. It is a power of two up to a page, so that an area crosses no
/// page.
fn list_len(transfer_bytes: usize, page_shift: u32) -> usize {
    let entries = (transfer_bytes >> page_shift) + 1;
    (entries * 8).next_power_of_two().clamp(512, 4096)
}

impl Core {
    /// Stops every owner from ringing doorbells, as a first step of a reset or shutdown. When this
    /// returns, the state word must differ from the one that the owners have seen.
    pub(super) fn freeze_queues(&self, word: u64) {
        let resetting = state::word(state::generation(word) + 1, Phase::Resetting);
        let queues = || -> Vec<Arc<QueueShared>> {
            let registry = self.queues.lock();
            let all = registry.queues.values();
            all.map(|entry| Arc::clone(&entry.shared)).collect()
        };
        freeze(|| self.life.set(resetting), queues, |q| &q.ringing);
    }
}
