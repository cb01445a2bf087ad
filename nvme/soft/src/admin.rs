//! The soft controller's admin commands: Base section 5.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_nvme::spec::{
    AdminOpcode, AsyncEvent, Cns, Command, Completion, ErrorLogEntry, FeatureId, FirmwareSlotLog,
    LogPage, SmartLog, Status,
};
use zerocopy::{FromZeros, IntoBytes};

use super::SoftConfig;
use super::backend::Transfer;
use super::engine::{Engine, Outcome};
use super::identify;
use super::memory::DeviceMemory;
use super::queues::{Cq, Sq, data_pieces};

/// Number of entries that the error log keeps.
pub(super) const ERROR_LOG_ENTRIES: usize = 64;
/// Most outstanding asynchronous event requests.
const EVENTS_MAX: usize = 8;

/// The shadow doorbell and event index pages: Base section B.5.
pub(super) struct Shadow {
    memory: Arc<DeviceMemory>,
    values: u64,
    events: u64,
}

impl Shadow {
    fn word(
        &self,
        page: u64,
        qid: u16,
        completion: bool,
    ) -> Option<(&std::sync::atomic::AtomicU64, u32)> {
        let index = 2 * u64::from(qid) + u64::from(completion);
        let word = self.memory.words(page + index / 2 * 8, 1)?;
        Some((&word[0], u32::from(completion) * 32))
    }

    pub fn value(&self, qid: u16, completion: bool) -> u16 {
        self.word(self.values, qid, completion)
            .map_or(0, |(word, shift)| {
                (u64::from_le(word.load(Ordering::Acquire)) >> shift & 0xffff) as u16
            })
    }

    pub fn set_event(&self, qid: u16, completion: bool, value: u16) {
        if let Some((word, shift)) = self.word(self.events, qid, completion) {
            // Both halves of the page are this controller's, so no store of the host is lost.
            let old = u64::from_le(word.load(Ordering::Relaxed));
            let new = (old & !(0xffff_ffff << shift)) | u64::from(value) << shift;
            word.store(new.to_le(), Ordering::SeqCst);
        }
    }
}

/// The state of the admin commands.
pub(super) struct AdminState {
    pub write_cache: bool,
    pub invalid_doorbell: Option<(u16, u16)>,
    pub changed_namespaces: Vec<u32>,
    arbitration: u32,
    event_config: u32,
    features: [u32; 12],
    errors: VecDeque<ErrorLogEntry>,
    error_count: u64,
    requests: VecDeque<Command>,
    events: VecDeque<AsyncEvent>,
    /// Event types whose log page was not read yet. No further event of the type is reported until
    /// then.
    masked: u8,
    read_bytes: u128,
    written_bytes: u128,
    reads: u128,
    writes: u128,
    media_errors: u128,
}

impl AdminState {
    pub fn new(config: &SoftConfig) -> AdminState {
        AdminState {
            write_cache: config.write_cache,
            invalid_doorbell: None,
            changed_namespaces: Vec::new(),
            arbitration: 0,
            event_config: 0xffff_ffff,
            features: [0; 12],
            errors: VecDeque::new(),
            error_count: 0,
            requests: VecDeque::new(),
            events: VecDeque::new(),
            masked: 0,
            read_bytes: 0,
            written_bytes: 0,
            reads: 0,
            writes: 0,
            media_errors: 0,
        }
    }

    pub fn reset(&mut self) {
        self.requests.clear();
        self.events.clear();
        self.masked = 0;
        self.invalid_doorbell = None;
        self.arbitration = 0;
    }

    /// Number of commands per turn of a class: 0 high, 1 medium, 2 low.
    pub fn weight(&self, class: u8) -> u16 {
        let shift = 24 - 8 * u32::from(class.min(2));
        (self.arbitration >> shift & 0xff) as u16 + 1
    }

    pub fn count_read(&mut self, len: usize) {
        self.reads += 1;
        self.read_bytes += len as u128;
    }

    pub fn count_write(&mut self, len: usize) {
        self.writes += 1;
        self.written_bytes += len as u128;
    }

    pub fn log_error(&mut self, qid: u16, c: &Command, status: Status) {
        self.error_count += 1;
        if status.sct().0 == 2 {
            self.media_errors += 1;
        }
        let mut entry = ErrorLogEntry::new_zeroed();
        entry.error_count = self.error_count.into();
        entry.sq_id = qid.into();
        entry.cid = c.cid.into();
        entry.status_phase = (status.0 << 1).into();
        entry.parameter_location = 0xffff.into();
        entry.lba = if qid == 0 { 0 } else { c.lba() }.into();
        entry.nsid = c.nsid.into();
        self.errors.push_front(entry);
        self.errors.truncate(ERROR_LOG_ENTRIES);
    }

    fn smart(&self) -> SmartLog {
        let mut log = SmartLog::new_zeroed();
        let units = |bytes: u128| bytes.div_ceil(512_000).into();
        log.composite_temperature = 300.into();
        log.available_spare = 100;
        log.available_spare_threshold = 10;
        log.data_units_read = units(self.read_bytes);
        log.data_units_written = units(self.written_bytes);
        log.host_reads = self.reads.into();
        log.host_writes = self.writes.into();
        log.power_cycles = 1.into();
        log.media_errors = self.media_errors.into();
        log.error_log_entries = u128::from(self.error_count).into();
        log
    }
}

fn ok(dw0: u32) -> Outcome {
    Outcome::Done(Status::SUCCESS, dw0)
}

fn bad(status: Status) -> Outcome {
    Outcome::Done(status.dnr(), 0)
}

impl Engine {
    pub(super) fn admin_command(&mut self, c: &Command) -> Outcome {
        match AdminOpcode(c.opcode) {
            AdminOpcode::IDENTIFY => self.identify(c),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(c),
            AdminOpcode::CREATE_CQ => self.create_cq(c),
            AdminOpcode::CREATE_SQ => self.create_sq(c),
            AdminOpcode::DELETE_SQ => self.delete_sq(c),
            AdminOpcode::DELETE_CQ => self.delete_cq(c),
            AdminOpcode::SET_FEATURES => self.set_features(c),
            AdminOpcode::GET_FEATURES => self.get_features(c),
            AdminOpcode::ABORT => {
                let sent = self.late.iter().filter(|l| l.is_abort).count();
                if sent >= usize::from(identify::ABORTS_MAX) {
                    return bad(Status::ABORT_LIMIT);
                }
                let (sqid, cid) = ((c.cdw10 & 0xffff) as u16, (c.cdw10 >> 16) as u16);
                // Bit 0: the command was not aborted.
                ok(u32::from(!self.abort_late(sqid, cid)))
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                if self.admin.requests.len() >= EVENTS_MAX {
                    return bad(Status::AER_LIMIT);
                }
                self.admin.requests.push_back(*c);
                self.send_events();
                Outcome::Held
            }
            AdminOpcode::DOORBELL_BUFFER_CONFIG if self.config.shadow_doorbells => {
                if !c.prp1.is_multiple_of(4096) || !c.prp2.is_multiple_of(4096) {
                    return bad(Status::INVALID_FIELD);
                }
                self.shadow = Some(Shadow {
                    memory: Arc::clone(&self.shared.memory),
                    values: c.prp1,
                    events: c.prp2,
                });
                ok(0)
            }
            AdminOpcode::FORMAT_NVM => self.format(c),
            _ => bad(Status::INVALID_OPCODE),
        }
    }

    /// Sends bytes to the host, as many as the command's buffer holds.
    fn answer(&mut self, c: &Command, bytes: &[u8], len: usize) -> Outcome {
        if let Err(status) = data_pieces(&self.shared.memory, c, len, &mut self.pieces) {
            return Outcome::Done(status, 0);
        }
        let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
        let n = bytes.len().min(len);
        let sent = transfer
            .put_at(0, &bytes[..n])
            .and_then(|()| transfer.put_at(n, &vec![0; len - n]));
        match sent {
            Ok(()) => ok(0),
            Err(_) => Outcome::Done(Status::DATA_TRANSFER, 0),
        }
    }

    fn identify(&mut self, c: &Command) -> Outcome {
        let cns = Cns((c.cdw10 & 0xff) as u8);
        let last = u32::try_from(self.media.len()).unwrap_or(u32::MAX);
        let of_namespace = matches!(cns, Cns::NAMESPACE | Cns::NS_DESCRIPTORS);
        if of_namespace && (c.nsid == 0 || c.nsid > last) {
            return bad(Status::INVALID_NAMESPACE);
        }
        match identify::page(&self.config, &self.shared.name, &self.media, cns, c.nsid) {
            Some(page) => self.answer(c, &page, 4096),
            None => bad(Status::INVALID_FIELD),
        }
    }

    fn get_log_page(&mut self, c: &Command) -> Outcome {
        let len = ((c.cdw10 >> 16 | (c.cdw11 & 0xffff) << 16) as usize + 1) * 4;
        let offset = u64::from(c.cdw12) | u64::from(c.cdw13) << 32;
        if len > 1 << 20 {
            return bad(Status::INVALID_FIELD);
        }
        let id = LogPage((c.cdw10 & 0xff) as u8);
        let page: Vec<u8> = match id {
            LogPage::SMART => self.admin.smart().as_bytes().to_vec(),
            LogPage::ERROR => {
                let mut page: Vec<u8> = Vec::new();
                for entry in &self.admin.errors {
                    page.extend(entry.as_bytes());
                }
                page.resize(ERROR_LOG_ENTRIES * 64, 0);
                page
            }
            LogPage::FIRMWARE_SLOTS => {
                let mut log = FirmwareSlotLog::new_zeroed();
                log.active = 1;
                log.revisions[0] = *b"1.0     ";
                log.as_bytes().to_vec()
            }
            LogPage::CHANGED_NAMESPACES => {
                let list = std::mem::take(&mut self.admin.changed_namespaces);
                let mut page: Vec<u8> = list.into_iter().flat_map(u32::to_le_bytes).collect();
                page.resize(4096, 0);
                page
            }
            _ => return bad(Status::INVALID_LOG_PAGE),
        };
        let Some(rest) = usize::try_from(offset).ok().and_then(|o| page.get(o..)) else {
            return bad(Status::INVALID_FIELD);
        };
        let rest = rest.to_vec();
        let outcome = self.answer(c, &rest, len);
        // Without "retain", reading clears the event and allows the next one.
        if c.cdw10 >> 15 & 1 == 0 {
            let kind = match id {
                LogPage::ERROR => 0,
                LogPage::SMART => 1,
                _ => 2,
            };
            self.admin.masked &= !(1 << kind);
            self.send_events();
        }
        outcome
    }

    fn create_cq(&mut self, c: &Command) -> Outcome {
        let qid = (c.cdw10 & 0xffff) as u16;
        if qid == 0 || qid > self.config.queues || self.cqs.contains_key(&qid) {
            return bad(Status::QID_INVALID);
        }
        let Some(entries) = self.entries(c) else {
            return bad(Status::QUEUE_SIZE);
        };
        if c.cdw11 & 1 == 0 || !c.prp1.is_multiple_of(4096) {
            return bad(Status::INVALID_FIELD);
        }
        let vector = (c.cdw11 & 2 != 0).then_some((c.cdw11 >> 16) as u16);
        if vector.is_some_and(|v| usize::from(v) >= self.shared.interrupts.len()) {
            return bad(Status::INVALID_VECTOR);
        }
        self.clear_doorbell(qid, true);
        self.cqs.insert(
            qid,
            Cq {
                base: c.prp1,
                entries,
                tail: 0,
                head: 0,
                phase: true,
                vector,
                waiting: VecDeque::new(),
                posted: false,
            },
        );
        ok(0)
    }

    fn entries(&self, c: &Command) -> Option<u16> {
        let entries_z = (c.cdw10 >> 16) as u16;
        (entries_z >= 1 && entries_z < self.config.entries).then(|| entries_z + 1)
    }

    fn create_sq(&mut self, c: &Command) -> Outcome {
        let qid = (c.cdw10 & 0xffff) as u16;
        let cq = (c.cdw11 >> 16) as u16;
        if qid == 0 || qid > self.config.queues || self.sqs.contains_key(&qid) {
            return bad(Status::QID_INVALID);
        }
        if cq == 0 || !self.cqs.contains_key(&cq) {
            return bad(Status::CQ_INVALID);
        }
        let Some(entries) = self.entries(c) else {
            return bad(Status::QUEUE_SIZE);
        };
        if c.cdw11 & 1 == 0 || !c.prp1.is_multiple_of(4096) {
            return bad(Status::INVALID_FIELD);
        }
        self.clear_doorbell(qid, false);
        self.sqs.insert(
            qid,
            Sq {
                qid,
                base: c.prp1,
                entries,
                head: 0,
                cq,
                priority: (c.cdw11 >> 1 & 3) as u8,
            },
        );
        ok(0)
    }

    fn delete_sq(&mut self, c: &Command) -> Outcome {
        let qid = (c.cdw10 & 0xffff) as u16;
        if qid == 0 || self.sqs.remove(&qid).is_none() {
            return bad(Status::QID_INVALID);
        }
        self.drop_late(qid);
        self.clear_doorbell(qid, false);
        ok(0)
    }

    fn delete_cq(&mut self, c: &Command) -> Outcome {
        let qid = (c.cdw10 & 0xffff) as u16;
        if qid == 0 || !self.cqs.contains_key(&qid) {
            return bad(Status::QID_INVALID);
        }
        if self.sqs.values().any(|s| s.cq == qid) {
            return bad(Status::QUEUE_DELETION);
        }
        self.cqs.remove(&qid);
        self.clear_doorbell(qid, true);
        ok(0)
    }

    /// Sets the doorbell of a queue that is created again to 0.
    fn clear_doorbell(&mut self, qid: u16, completion: bool) {
        let offset = pumice_nvme::spec::doorbell_offset(qid, completion, 0);
        super::transport::set32(&self.shared.registers, offset, 0);
    }

    fn set_features(&mut self, c: &Command) -> Outcome {
        if c.cdw10 >> 31 != 0 {
            return bad(Status::FEATURE_NOT_SAVEABLE);
        }
        match FeatureId((c.cdw10 & 0xff) as u8) {
            FeatureId::NUMBER_OF_QUEUES => {
                let most = u32::from(self.config.queues.max(1)) - 1;
                let (sq, cq) = (c.cdw11 & 0xffff, c.cdw11 >> 16);
                if sq == 0xffff || cq == 0xffff {
                    return bad(Status::INVALID_FIELD);
                }
                let granted = sq.min(most) | cq.min(most) << 16;
                self.admin.features[7] = granted;
                ok(granted)
            }
            FeatureId::VOLATILE_WRITE_CACHE if self.config.write_cache => {
                let on = c.cdw11 & 1 != 0;
                if !on && self.media.iter_mut().any(|ns| ns.flush().is_err()) {
                    return Outcome::Done(Status::WRITE_FAULT, 0);
                }
                self.admin.write_cache = on;
                ok(0)
            }
            FeatureId::ARBITRATION => {
                self.admin.arbitration = c.cdw11;
                ok(0)
            }
            FeatureId::ASYNC_EVENT_CONFIG => {
                self.admin.event_config = c.cdw11;
                ok(0)
            }
            FeatureId(n @ (0x02 | 0x04 | 0x05 | 0x08 | 0x09 | 0x0a)) => {
                self.admin.features[usize::from(n)] = c.cdw11;
                ok(0)
            }
            _ => bad(Status::INVALID_FIELD),
        }
    }

    fn get_features(&mut self, c: &Command) -> Outcome {
        match FeatureId((c.cdw10 & 0xff) as u8) {
            FeatureId::VOLATILE_WRITE_CACHE if self.config.write_cache => {
                ok(u32::from(self.admin.write_cache))
            }
            FeatureId::ARBITRATION => ok(self.admin.arbitration),
            FeatureId::ASYNC_EVENT_CONFIG => ok(self.admin.event_config),
            FeatureId(n @ (0x02 | 0x04 | 0x05 | 0x07 | 0x08 | 0x09 | 0x0a)) => {
                ok(self.admin.features[usize::from(n)])
            }
            _ => bad(Status::INVALID_FIELD),
        }
    }

    fn format(&mut self, c: &Command) -> Outcome {
        let lbaf = (c.cdw10 & 15) | (c.cdw10 >> 12 & 3) << 4;
        let shift = match lbaf {
            0 => 9,
            1 => 12,
            _ => return bad(Status::INVALID_FORMAT),
        };
        // Metadata and protection information are not supported.
        if c.cdw10 >> 4 & 0x1f != 0 {
            return bad(Status::INVALID_FORMAT);
        }
        let targets: Vec<usize> = match c.nsid {
            u32::MAX if self.config.formats_one_by_one => return bad(Status::INVALID_NAMESPACE),
            u32::MAX => (0..self.media.len()).collect(),
            0 => return bad(Status::INVALID_NAMESPACE),
            n if (n as usize) > self.media.len() => return bad(Status::INVALID_NAMESPACE),
            _ if self.config.formats_all => (0..self.media.len()).collect(),
            n => vec![n as usize - 1],
        };
        for n in targets {
            if self.media[n].format(shift).is_err() {
                return Outcome::Done(Status::WRITE_FAULT, 0);
            }
        }
        ok(0)
    }

    /// Queues an event. It is sent when the host has a request outstanding and has cleared the last
    /// event of its type.
    pub(super) fn report(&mut self, event: AsyncEvent) {
        if self.admin.events.len() < 64 {
            self.admin.events.push_back(event);
        }
        self.send_events();
    }

    fn send_events(&mut self) {
        let mut n = 0;
        while n < self.admin.events.len() {
            let event = self.admin.events[n];
            let bit = 1 << event.kind().0;
            if self.admin.masked & bit != 0 {
                n += 1;
                continue;
            }
            let Some(request) = self.admin.requests.pop_front() else {
                return;
            };
            self.admin.events.remove(n);
            self.admin.masked |= bit;
            let head = self.sqs.get(&0).map_or(0, |s| s.head);
            let completion = Completion {
                dw0: event.0,
                sq_head: head,
                cid: request.cid,
                ..Completion::default()
            };
            self.complete(0, completion, false);
        }
    }
}
