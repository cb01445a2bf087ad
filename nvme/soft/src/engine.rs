//! The soft controller's thread: registers, doorbells, completions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use pumice_nvme::spec::{
    AdminOpcode, AsyncEvent, AsyncEventType, Cc, Cmbmsc, Command, Completion, Csts, Reg, Status,
};
use pumice_nvme::transport::TransportEvent;

use super::admin::{AdminState, Shadow};
use super::fault::Fault;
use super::media::SoftNamespace;
use super::queues::{Cq, Sq};
use super::transport::{SoftShared, get32, get64, set32};
use super::{SoftConfig, fault};

/// A request of the driver's side to the thread.
pub(super) enum Order {
    Stop,
    Fatal,
    Event(AsyncEvent),
    Add(Box<SoftNamespace>),
}

/// The result of a command.
pub(super) enum Outcome {
    Done(Status, u32),
    /// The command stays outstanding (asynchronous event request).
    Held,
}

pub(super) struct Late {
    when: Instant,
    sqid: u16,
    /// Whether it completes an Abort.
    pub is_abort: bool,
    completion: Completion,
}

/// Most commands taken from a queue before the others get a turn.
const BURST: u16 = 32;

pub(super) struct Engine {
    pub shared: Arc<SoftShared>,
    pub config: SoftConfig,
    pub media: Vec<SoftNamespace>,
    pub admin: AdminState,
    pub sqs: BTreeMap<u16, Sq>,
    pub cqs: BTreeMap<u16, Cq>,
    pub shadow: Option<Shadow>,
    pub pieces: Vec<(u64, usize)>,
    pub scratch: Vec<u8>,
    pub(super) late: Vec<Late>,
    cc: Cc,
    /// Time at which CSTS.RDY follows CC.EN.
    ready_at: Option<Instant>,
    fatal: bool,
    stop: bool,
}

impl Engine {
    pub fn new(shared: Arc<SoftShared>, mut config: SoftConfig) -> Engine {
        let media = std::mem::take(&mut config.namespaces);
        Engine {
            admin: AdminState::new(&config),
            shared,
            config,
            media,
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            shadow: None,
            pieces: Vec::new(),
            scratch: Vec::new(),
            late: Vec::new(),
            cc: Cc::new(),
            ready_at: None,
            fatal: false,
            stop: false,
        }
    }

    pub fn run(mut self) -> Vec<SoftNamespace> {
        self.shared.kick.attach();
        let mut idle_since: Option<Instant> = None;
        let mut rounds = 0u32;
        while !self.stop {
            let worked = self.turn();
            if worked {
                idle_since = None;
                rounds = 0;
                continue;
            }
            std::hint::spin_loop();
            rounds += 1;
            if rounds < 64 {
                continue;
            }
            rounds = 0;
            let since = *idle_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= self.config.spin {
                self.sleep();
                idle_since = None;
            }
        }
        self.media
    }

    /// Looks at everything once. Returns whether there was something to do.
    fn turn(&mut self) -> bool {
        let mut worked = self.registers();
        if self.shared.ordered.swap(false, Ordering::SeqCst) {
            self.orders();
            worked = true;
        }
        if !self.late.is_empty() {
            worked |= self.late_completions();
        }
        if self.cc.en() && !self.fatal && self.ready_at.is_none() {
            worked |= self.queues();
        }
        worked
    }

    /// Sleeps until woken, with the event indexes set so that the host does wake the thread.
    fn sleep(&mut self) {
        let kick = Arc::clone(&self.shared.kick);
        let mut timeout = if self.config.served && self.cc.en() {
            Duration::from_micros(50)
        } else {
            Duration::from_secs(1)
        };
        let now = Instant::now();
        for late in &self.late {
            timeout = timeout.min(late.when.saturating_duration_since(now));
        }
        if let Some(when) = self.ready_at {
            timeout = timeout.min(when.saturating_duration_since(now));
        }
        if let Some(shadow) = &self.shadow {
            for sq in self.sqs.values().filter(|s| s.qid != 0) {
                shadow.set_event(sq.qid, false, sq.head);
            }
            for (qid, cq) in self.cqs.iter().filter(|(q, _)| **q != 0) {
                shadow.set_event(*qid, true, cq.head);
            }
        }
        fence(Ordering::SeqCst);
        kick.sleep_unless(timeout, || self.has_work());
    }

    fn has_work(&self) -> bool {
        if self.shared.ordered.load(Ordering::SeqCst)
            || get32(&self.shared.registers, Reg::CC) != u32::from(self.cc)
        {
            return true;
        }
        if !self.cc.en() || self.fatal {
            return false;
        }
        self.sqs.values().any(|sq| self.tail(sq) != sq.head)
            || self
                .cqs
                .iter()
                .any(|(qid, cq)| !cq.waiting.is_empty() && self.cq_head(*qid) != cq.head)
    }

    fn orders(&mut self) {
        let orders = std::mem::take(&mut *self.shared.orders.lock());
        for order in orders {
            match order {
                Order::Stop => self.stop = true,
                Order::Fatal => self.set_fatal(),
                Order::Event(event) => self.report(event),
                Order::Add(mut ns) => {
                    let n = self.media.len() as u64 + 1;
                    ns.uuid[8..].copy_from_slice(&n.to_be_bytes());
                    self.media.push(*ns);
                    self.admin
                        .changed_namespaces
                        .push(u32::try_from(n).unwrap_or(u32::MAX));
                    self.report(AsyncEvent::new(AsyncEventType::NOTICE, 0, 4));
                }
            }
        }
    }

    fn set_fatal(&mut self) {
        self.fatal = true;
        let csts = Csts::from(get32(&self.shared.registers, Reg::CSTS));
        set32(
            &self.shared.registers,
            Reg::CSTS,
            csts.with_cfs(true).into(),
        );
    }

    /// Handles CC: enable, disable, shutdown.
    fn registers(&mut self) -> bool {
        if let Some(when) = self.ready_at {
            if Instant::now() < when {
                return false;
            }
            self.ready_at = None;
            set32(
                &self.shared.registers,
                Reg::CSTS,
                Csts::new().with_rdy(self.cc.en()).into(),
            );
            return true;
        }
        let cc = Cc::from(get32(&self.shared.registers, Reg::CC));
        if cc == self.cc {
            return false;
        }
        let before = std::mem::replace(&mut self.cc, cc);
        if before.en() != cc.en() {
            self.reset();
            if cc.en() {
                self.create_admin_queues();
            }
            self.ready_at = Some(Instant::now() + self.config.ready_delay);
        }
        if cc.shn() != 0 && before.shn() == 0 && cc.en() {
            for ns in &mut self.media {
                if let Err(error) = ns.flush() {
                    tracing::error!(%error, "soft controller's medium at shutdown");
                }
            }
            let csts = Csts::from(get32(&self.shared.registers, Reg::CSTS));
            set32(&self.shared.registers, Reg::CSTS, csts.with_shst(2).into());
        }
        true
    }

    fn reset(&mut self) {
        self.sqs.clear();
        self.cqs.clear();
        self.late.clear();
        self.shadow = None;
        self.fatal = false;
        self.admin.reset();
        let doorbells = (usize::from(self.config.queues) + 1) * 2;
        for n in 0..doorbells {
            let offset = Reg::DOORBELLS + u32::try_from(n * 4).unwrap_or(0);
            set32(&self.shared.registers, offset, 0);
        }
    }

    fn create_admin_queues(&mut self) {
        let map = &self.shared.registers;
        let aqa = get32(map, Reg::AQA);
        let entries = |bits: u32| u16::try_from((bits & 0xfff) + 1).unwrap_or(2).max(2);
        let sq = Sq {
            qid: 0,
            base: get64(map, Reg::ASQ),
            entries: entries(aqa),
            head: 0,
            cq: 0,
            priority: 0,
        };
        let cq = Cq {
            base: get64(map, Reg::ACQ),
            entries: entries(aqa >> 16),
            tail: 0,
            head: 0,
            phase: true,
            vector: Some(0),
            waiting: Default::default(),
            posted: false,
        };
        let msc = Cmbmsc::from(get64(map, Reg::CMBMSC));
        self.shared
            .memory
            .set_buffer_base(msc.cmse().then_some(msc.cba() << 12));
        self.sqs.insert(0, sq);
        self.cqs.insert(0, cq);
    }

    fn doorbell(&self, qid: u16, completion: bool) -> u16 {
        if let Some(shadow) = self.shadow.as_ref().filter(|_| qid != 0) {
            return shadow.value(qid, completion);
        }
        let offset = Reg::DOORBELLS + (2 * u32::from(qid) + u32::from(completion)) * 4;
        u16::try_from(get32(&self.shared.registers, offset)).unwrap_or(u16::MAX)
    }

    fn tail(&self, sq: &Sq) -> u16 {
        self.doorbell(sq.qid, false)
    }

    fn cq_head(&self, qid: u16) -> u16 {
        self.doorbell(qid, true)
    }

    /// Takes commands from every queue, urgent ones first under weighted round robin.
    fn queues(&mut self) -> bool {
        let mut worked = false;
        // The host may move the controller memory buffer while the controller is enabled.
        if self.config.cmb_len > 0 {
            let msc = Cmbmsc::from(get64(&self.shared.registers, Reg::CMBMSC));
            let base = msc.cmse().then_some(msc.cba() << 12);
            self.shared.memory.set_buffer_base(base);
        }
        let qids: smallvec::SmallVec<[(u8, u16); 16]> = {
            let mut list: smallvec::SmallVec<[(u8, u16); 16]> = self
                .sqs
                .values()
                .map(|s| (if s.qid == 0 { 0 } else { s.priority + 1 }, s.qid))
                .collect();
            if self.cc.ams() == 1 {
                list.sort_unstable();
            }
            list
        };
        for (class, qid) in qids {
            let burst = match class {
                0 | 1 => BURST,
                n if self.cc.ams() == 1 => self.admin.weight(n - 2),
                _ => BURST,
            };
            worked |= self.queue(qid, burst);
            if self.fatal || self.stop || !self.cc.en() {
                break;
            }
        }
        worked |= self.deliver();
        worked
    }

    fn queue(&mut self, qid: u16, burst: u16) -> bool {
        let Some(sq) = self.sqs.get(&qid) else {
            return false;
        };
        let (cqid, entries, base) = (sq.cq, sq.entries, sq.base);
        let tail = self.tail(sq);
        let mut head = sq.head;
        if tail == head {
            return false;
        }
        if tail >= entries {
            // The event is reported once for each value, because the head cannot follow.
            if self.admin.invalid_doorbell != Some((qid, tail)) {
                self.admin.invalid_doorbell = Some((qid, tail));
                self.report(AsyncEvent::new(AsyncEventType::ERROR, 1, 1));
            }
            return false;
        }
        let mut taken = 0;
        while head != tail && taken < burst {
            if !self.room(cqid) {
                break;
            }
            let Some(words) = self.shared.memory.words(base + u64::from(head) * 64, 8) else {
                self.set_fatal();
                break;
            };
            let mut raw = [0u64; 8];
            for (to, from) in raw.iter_mut().zip(words) {
                *to = from.load(Ordering::Relaxed);
            }
            let command = Command::from_words(raw);
            head = if head + 1 == entries { 0 } else { head + 1 };
            taken += 1;
            match self.sqs.get_mut(&qid) {
                Some(sq) => sq.head = head,
                None => break,
            }
            self.command(qid, cqid, head, &command);
            if self.fatal || self.stop || !self.sqs.contains_key(&qid) {
                break;
            }
        }
        self.shared
            .commands
            .fetch_add(u64::from(taken), Ordering::Relaxed);
        taken > 0
    }

    /// Whether the completion queue has room. Reads its doorbell when it seems full.
    fn room(&mut self, cqid: u16) -> bool {
        let Some(cq) = self.cqs.get(&cqid) else {
            return false;
        };
        if cq.waiting.is_empty() && !cq.is_full() {
            return true;
        }
        self.update_head(cqid);
        self.drain_waiting(cqid);
        self.cqs
            .get(&cqid)
            .is_some_and(|cq| cq.waiting.is_empty() && !cq.is_full())
    }

    fn update_head(&mut self, cqid: u16) {
        let head = self.cq_head(cqid);
        if let Some(cq) = self.cqs.get_mut(&cqid)
            && head < cq.entries
        {
            cq.head = head;
        }
    }

    fn drain_waiting(&mut self, cqid: u16) {
        let memory = Arc::clone(&self.shared.memory);
        if let Some(cq) = self.cqs.get_mut(&cqid) {
            while !cq.is_full() {
                let Some(c) = cq.waiting.pop_front() else {
                    break;
                };
                cq.post(&memory, c, false);
            }
        }
    }

    fn command(&mut self, qid: u16, cqid: u16, head: u16, command: &Command) {
        let struck = self.shared.faults.strike(qid, command);
        let mut completion = Completion {
            sq_id: qid,
            sq_head: head,
            cid: command.cid,
            ..Completion::default()
        };
        match struck {
            Some(Fault::Drop) => return,
            Some(Fault::Fatal) => return self.set_fatal(),
            Some(Fault::Remove) => {
                self.stop = true;
                self.shared.vanish(Some(TransportEvent::Removed));
                return;
            }
            Some(Fault::Status(status)) => {
                self.admin.log_error(qid, command, status);
                completion.status_phase = status.0 << 1;
                return self.complete(cqid, completion, false);
            }
            Some(Fault::Data(bytes)) => {
                self.overwrite(command, &bytes);
                return self.complete(cqid, completion, false);
            }
            _ => {}
        }
        let outcome = if qid == 0 {
            self.admin_command(command)
        } else {
            self.io_command(command)
        };
        let Outcome::Done(status, dw0) = outcome else {
            return;
        };
        if !status.is_success() {
            self.admin.log_error(qid, command, status);
        }
        completion.status_phase = status.0 << 1;
        completion.dw0 = dw0;
        match struck {
            None => self.complete(cqid, completion, false),
            Some(Fault::DropCompletion) => {}
            Some(Fault::Delay(by)) => self.late.push(Late {
                when: Instant::now() + by,
                sqid: qid,
                is_abort: qid == 0 && command.opcode == AdminOpcode::ABORT.0,
                completion,
            }),
            Some(Fault::WrongPhase) => self.complete(cqid, completion, true),
            Some(fault) => {
                fault::corrupt(&fault, &mut completion);
                self.complete(cqid, completion, false);
            }
        }
    }

    pub(super) fn complete(&mut self, cqid: u16, completion: Completion, wrong_phase: bool) {
        let memory = Arc::clone(&self.shared.memory);
        let Some(cq) = self.cqs.get_mut(&cqid) else {
            return;
        };
        if cq.is_full() || !cq.waiting.is_empty() {
            cq.waiting.push_back(completion);
            return;
        }
        if !cq.post(&memory, completion, wrong_phase) {
            self.set_fatal();
        }
    }

    /// Raises the interrupts of posted completions, and posts those that waited for room.
    fn deliver(&mut self) -> bool {
        let mut worked = false;
        let full: smallvec::SmallVec<[u16; 8]> = self
            .cqs
            .iter()
            .filter(|(_, cq)| !cq.waiting.is_empty())
            .map(|(qid, _)| *qid)
            .collect();
        for qid in full {
            self.update_head(qid);
            self.drain_waiting(qid);
        }
        for cq in self.cqs.values_mut() {
            if std::mem::take(&mut cq.posted) {
                worked = true;
                if let Some(interrupt) = cq
                    .vector
                    .and_then(|v| self.shared.interrupts.get(usize::from(v)))
                {
                    interrupt.signal_if_armed();
                }
            }
        }
        worked
    }

    fn late_completions(&mut self) -> bool {
        let now = Instant::now();
        let mut worked = false;
        let mut n = 0;
        while n < self.late.len() {
            if self.late[n].when > now {
                n += 1;
                continue;
            }
            let late = self.late.swap_remove(n);
            if let Some(cqid) = self.sqs.get(&late.sqid).map(|s| s.cq) {
                self.complete(cqid, late.completion, false);
            }
            worked = true;
        }
        if worked {
            self.deliver();
        }
        worked
    }

    /// Carries out an Abort: a delayed command ends as aborted. Returns false when no such command
    /// is delayed.
    pub(super) fn abort_late(&mut self, sqid: u16, cid: u16) -> bool {
        let found = self
            .late
            .iter()
            .position(|l| l.sqid == sqid && l.completion.cid == cid);
        let Some(n) = found else { return false };
        let mut late = self.late.swap_remove(n);
        late.completion.status_phase = Status::ABORTED_BY_REQUEST.0 << 1;
        if let Some(cqid) = self.sqs.get(&sqid).map(|s| s.cq) {
            self.complete(cqid, late.completion, false);
        }
        true
    }

    /// Aborts a queue's commands in flight, because it is being deleted.
    pub(super) fn drop_late(&mut self, sqid: u16) {
        self.late.retain(|l| l.sqid != sqid);
    }
}
