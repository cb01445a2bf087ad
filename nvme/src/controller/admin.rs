//! The admin queue: commands from any thread, asynchronous events, aborts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::link::Link;
use super::requests::Requests;
use super::state::{Lifecycle, Phase};
use crate::dma::{DmaBuf, DmaDomain, DmaShared};
use crate::error::{Cause, NvmeError, millis};
use crate::queue::{Bell, CompletionRing, ListArea, QueueMem, SubmissionRing, admin_prp};
use crate::spec::{AdminOpcode, AsyncEvent, Cns, Command, Completion, LogPage, Reg, decode};

/// Number of entries of both admin queues.
const ADMIN_ENTRIES: u16 = 32;
/// Number of asynchronous event requests to keep outstanding.
const EVENTS: usize = 4;
const LIST_LEN: usize = 4096;

/// Longest time for which a device may say that it is not ready yet.
const NOT_READY_PATIENCE: Duration = Duration::from_secs(10);
/// Most times that a command is sent again after another status that may pass.
const ADMIN_RETRIES: u8 = 4;

#[derive(Debug)]
enum SlotState {
    Free,
    /// A caller waits for the command.
    Pending,
    /// The caller has stopped waiting. The buffer stays until the command ends.
    Abandoned,
    /// The command is an asynchronous event request.
    Event,
    /// The command is an Abort, for which nobody waits.
    Abort,
    Done(Completion),
    /// A reset ended the command.
    Lost,
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    command: Command,
    data: Option<DmaBuf>,
}

#[derive(Debug)]
struct AdminQueue {
    rings: Option<(SubmissionRing, CompletionRing)>,
    sq_mem: Arc<DmaShared>,
    cq_mem: Arc<DmaShared>,
    lists: DmaShared,
    slots: Vec<Slot>,
    /// Received events, for the keeper.
    events: Vec<AsyncEvent>,
}

impl AdminQueue {
    fn new(domain: Option<&DmaDomain>, page_shift: u32) -> Result<AdminQueue, NvmeError> {
        let entries = usize::from(ADMIN_ENTRIES);
        let queue = |len: usize| {
            let pages = len.next_multiple_of(1 << page_shift);
            DmaShared::zeroed_in(domain, pages).map(Arc::new)
        };
        Ok(AdminQueue {
            rings: None,
            sq_mem: queue(entries * 64)?,
            cq_mem: queue(entries * 16)?,
            lists: DmaShared::zeroed_in(domain, entries * LIST_LEN)?,
            slots: (0..entries - 1)
                .map(|n| Slot {
                    state: SlotState::Free,
                    command: Command {
                        cid: u16::try_from(n).unwrap_or(0),
                        ..Command::default()
                    },
                    data: None,
                })
                .collect(),
            events: Vec::new(),
        })
    }

    /// Ends everything outstanding and tells those who wait. The device is quiet. What has
    /// completed stays with its data, until the caller takes it.
    fn lose_all(&mut self) {
        for slot in &mut self.slots {
            slot.state = match slot.state {
                SlotState::Done(_) => continue,
                SlotState::Pending | SlotState::Lost => SlotState::Lost,
                _ => SlotState::Free,
            };
            slot.data = None;
        }
        self.rings = None;
    }
}

/// Number of identifier bits that hold the slot number. The others are a sequence number.
const SLOT_BITS: u32 = 5;

/// The admin queues: commands from any thread, and those of the driver for which nobody waits.
#[derive(Debug)]
pub(crate) struct Admin {
    pub link: Arc<Link>,
    life: Arc<Lifecycle>,
    requests: Arc<Requests>,
    queue: Mutex<AdminQueue>,
    /// Notified when a command has completed or a slot is free; used with `queue`.
    done: Condvar,
}

impl Admin {
    pub fn new(
        link: &Arc<Link>,
        life: &Arc<Lifecycle>,
        requests: &Arc<Requests>,
    ) -> Result<Admin, NvmeError> {
        Ok(Admin {
            queue: Mutex::new(AdminQueue::new(link.transport.domain(), link.page_shift)?),
            done: Condvar::new(),
            link: Arc::clone(link),
            life: Arc::clone(life),
            requests: Arc::clone(requests),
        })
    }

    /// Tells the disabled controller where the admin queues are, and starts them again.
    pub fn start(&self) -> Result<(), NvmeError> {
        let mut admin = self.queue.lock();
        admin.sq_mem.clear();
        admin.cq_mem.clear();
        let (asq, acq) = (
            self.link.address_of(&admin.sq_mem)?,
            self.link.address_of(&admin.cq_mem)?,
        );
        let entries_z = u32::from(ADMIN_ENTRIES) - 1;
        let transport = &self.link.transport;
        transport.write32(Reg::AQA, entries_z | entries_z << 16)?;
        transport.write64(Reg::ASQ, asq)?;
        transport.write64(Reg::ACQ, acq)?;
        let bell = |completion| -> Result<Bell, NvmeError> {
            Ok(Bell::new(self.link.doorbell(0, completion)?, None))
        };
        let sq_mem = QueueMem::Host(Arc::clone(&admin.sq_mem));
        let sq = SubmissionRing::new(sq_mem, ADMIN_ENTRIES, bell(false)?);
        let cq = CompletionRing::new(Arc::clone(&admin.cq_mem), ADMIN_ENTRIES, 1, bell(true)?);
        admin.rings = Some((sq, cq));
        Ok(())
    }

    /// Sends an admin command and waits for its completion, at most for the admin time-out, after
    /// which the controller is reset. Any thread may call it.
    pub fn run(
        &self,
        command: Command,
        data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        self.run_at(None, command, data)
    }

    /// Sends a command as [`run`](Self::run) does, but only while the controller's state word
    /// is `word`: a command for the queues before a reset is not sent after it.
    ///
    /// Sends the command again after a status that may pass (no Do Not Retry): for as long as a
    /// device may need to become ready, or for a few attempts. Only for the driver's own commands,
    /// which can be sent twice.
    pub fn run_at(
        &self,
        word: Option<u64>,
        command: Command,
        mut data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let start = Instant::now();
        let mut retries = 0;
        loop {
            let (completion, back) = self.attempt(word, command, data, &|| None)?;
            let status = completion.status();
            let again = if status.says_not_ready() {
                start.elapsed() < NOT_READY_PATIENCE.min(self.link.options.admin_timeout)
            } else {
                retries < ADMIN_RETRIES
            };
            if !status.may_pass() || !again {
                return self.outcome(&command, completion, back);
            }
            tracing::debug!(device = self.link.name(), %status, "admin command is sent again");
            std::thread::sleep(self.link.retry_delay(status, retries));
            retries = retries.saturating_add(1);
            data = back;
        }
    }

    /// Sends a command as [`run_at`](Self::run_at) does, but once, whatever its status. A Format NVM
    /// gets more time when `format_left`, the percentage that is left of it, becomes smaller.
    pub fn run_once(
        &self,
        word: Option<u64>,
        command: Command,
        data: Option<DmaBuf>,
        format_left: impl Fn() -> Option<u32>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let (completion, data) = self.attempt(word, command, data, &format_left)?;
        self.outcome(&command, completion, data)
    }

    fn outcome(
        &self,
        command: &Command,
        completion: Completion,
        data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let status = completion.status();
        if status.is_success() {
            return Ok((completion, data));
        }
        Err(NvmeError::Status {
            device: self.link.name().to_owned(),
            command: decode::admin_command(command).to_string(),
            status,
        })
    }

    /// Runs an Identify that returns one page.
    pub fn identify_page(&self, cns: Cns, nsid: u32) -> Result<DmaBuf, NvmeError> {
        let page = self.link.admin_buffer(4096)?;
        let (_, data) = self.run(Command::identify(cns, nsid), Some(page))?;
        data.ok_or_else(|| self.link.protocol("identify lost its buffer"))
    }

    /// Reads a log page.
    pub fn log_page(
        &self,
        page: LogPage,
        nsid: u32,
        len: usize,
        retain: bool,
    ) -> Result<DmaBuf, NvmeError> {
        let bytes = u32::try_from(len).unwrap_or(0);
        let command = Command::get_log(page, nsid, 0, bytes, retain);
        let (_, data) = self.run(command, Some(self.link.admin_buffer(len)?))?;
        data.ok_or_else(|| self.link.protocol("a log page lost its buffer"))
    }

    /// Sends the command once and returns its completion, whatever its status.
    fn attempt(
        &self,
        word: Option<u64>,
        command: Command,
        data: Option<DmaBuf>,
        format_left: &dyn Fn() -> Option<u32>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        if !self.link.birth.is_here() {
            return Err(self.life.gone(Cause::OtherProcess));
        }
        let mut start = Instant::now();
        let formats = AdminOpcode(command.opcode) == AdminOpcode::FORMAT_NVM;
        let timeout = match formats {
            // The command may erase the whole medium before it completes.
            true => self.link.options.format_timeout,
            false => self.link.options.admin_timeout,
        };
        let mut left_percent = u32::MAX;
        let text = |c: &Command| decode::admin_command(c).to_string();
        let unfinished = |what: &str| NvmeError::Unfinished {
            device: self.link.name().to_owned(),
            command: text(&command),
            what: what.to_owned(),
        };
        let mut data = data;
        let slot = loop {
            let mut guard = self.queue.lock();
            if word.is_some_and(|w| w != self.life.word()) {
                return Err(unfinished("the controller was reset"));
            }
            match self.send(&mut guard, command, &mut data, SlotState::Pending)? {
                Some(slot) => break slot,
                None => {
                    self.reap(&mut guard);
                    self.done.wait_for(&mut guard, Duration::from_millis(1));
                }
            }
            if start.elapsed() > timeout {
                return Err(unfinished("the admin queue stays full"));
            }
        };
        let mut pause = Duration::from_micros(20);
        loop {
            let mut guard = self.queue.lock();
            self.reap(&mut guard);
            let entry = &mut guard.slots[slot];
            match entry.state {
                SlotState::Done(completion) => {
                    entry.state = SlotState::Free;
                    let data = entry.data.take();
                    let command = entry.command;
                    drop(guard);
                    self.done.notify_all();
                    tracing::trace!(
                        device = self.link.name(),
                        command = %text(&command),
                        completion = %decode::completion(&completion),
                        "admin"
                    );
                    return Ok((completion, data));
                }
                SlotState::Lost => {
                    entry.state = SlotState::Free;
                    drop(guard);
                    return Err(match self.life.phase() {
                        Phase::Removed => self.life.gone(Cause::Removed),
                        Phase::Failed => self.life.gone(Cause::ControllerFailed),
                        _ => unfinished("the controller was reset"),
                    });
                }
                _ => {}
            }
            let waited = start.elapsed();
            let gone = self.link.transport.is_gone();
            if waited > timeout && formats && !gone {
                drop(guard);
                let left = format_left();
                if left.is_some_and(|left| left < left_percent) {
                    left_percent = left.unwrap_or(0);
                    start = Instant::now();
                    continue;
                }
                guard = self.queue.lock();
                self.reap(&mut guard);
                if !matches!(guard.slots[slot].state, SlotState::Pending) {
                    continue;
                }
            }
            if waited > timeout || gone {
                guard.slots[slot].state = SlotState::Abandoned;
                drop(guard);
                if gone {
                    return Err(self.life.gone(Cause::Removed));
                }
                let what = format!("no completion within {} ms", millis(timeout));
                self.requests.reset(&format!("{}: {what}", text(&command)));
                return Err(unfinished(&what));
            }
            if waited > Duration::from_micros(50) {
                self.done.wait_for(&mut guard, pause);
                pause = (pause * 2).min(Duration::from_millis(1));
            } else {
                drop(guard);
                std::hint::spin_loop();
            }
        }
    }

    /// Puts a command into the queue. Returns `Ok(None)` when the queue is full. The data moves out
    /// of `data` when the command was sent.
    fn send(
        &self,
        queue: &mut AdminQueue,
        mut command: Command,
        data: &mut Option<DmaBuf>,
        state: SlotState,
    ) -> Result<Option<usize>, NvmeError> {
        if queue.rings.is_none() {
            return Err(match self.life.phase() {
                Phase::Removed => self.life.gone(Cause::Removed),
                Phase::Failed => self.life.gone(Cause::ControllerFailed),
                _ => NvmeError::Unfinished {
                    device: self.link.name().to_owned(),
                    command: decode::admin_command(&command).to_string(),
                    what: "the controller is being reset".into(),
                },
            });
        }
        // Events must not take the last entries.
        let Some(slot) = queue
            .slots
            .iter()
            .position(|s| matches!(s.state, SlotState::Free))
        else {
            return Ok(None);
        };
        if let Some(buf) = data {
            let words = LIST_LEN / 8;
            let list_offset = queue.lists.region_offset() + slot * LIST_LEN;
            let list_address = self.link.table.translate(queue.lists.region(), list_offset);
            let area = ListArea {
                words: &queue.lists.as_u64()[slot * words..(slot + 1) * words],
                address: list_address.map_or(0, |(address, _)| address),
            };
            let mapped = list_address.is_some()
                && admin_prp(
                    &mut command,
                    &self.link.table,
                    (&*buf).into(),
                    self.link.page_shift,
                    &area,
                )
                .is_ok();
            if !mapped {
                return Err(NvmeError::Protocol {
                    device: self.link.name().to_owned(),
                    detail: format!("{buf:?} is not mapped for the device or too long"),
                });
            }
        }
        let entry = &mut queue.slots[slot];
        command.cid = entry.command.cid.wrapping_add(1 << SLOT_BITS);
        if command.cid == u16::MAX {
            command.cid = command.cid.wrapping_add(1 << SLOT_BITS);
        }
        entry.command = command;
        entry.data = data.take();
        entry.state = state;
        if let Some((sq, _)) = &mut queue.rings {
            sq.push(command.words());
            sq.ring();
        }
        Ok(Some(slot))
    }

    /// Takes the completions that have arrived.
    fn reap(&self, queue: &mut AdminQueue) {
        let mut reaped = false;
        for _ in 0..ADMIN_ENTRIES {
            let Some((_, cq)) = &mut queue.rings else {
                break;
            };
            let Some(completion) = cq.pop() else { break };
            cq.ack();
            reaped = true;
            let slot = usize::from(completion.cid & ((1 << SLOT_BITS) - 1));
            let known = queue.slots.get(slot).is_some_and(|s| {
                s.command.cid == completion.cid
                    && matches!(
                        s.state,
                        SlotState::Pending
                            | SlotState::Abandoned
                            | SlotState::Event
                            | SlotState::Abort
                    )
            });
            if !known || completion.sq_id != 0 {
                self.requests.reset(&format!(
                    "impossible completion on the admin queue: {}",
                    decode::completion(&completion)
                ));
                continue;
            }
            let entry = &mut queue.slots[slot];
            match entry.state {
                SlotState::Pending => entry.state = SlotState::Done(completion),
                SlotState::Abort => {
                    entry.state = SlotState::Free;
                    // The keeper may send the next one.
                    self.requests.wake();
                }
                SlotState::Event => {
                    entry.state = SlotState::Free;
                    if completion.status().is_success() {
                        queue.events.push(AsyncEvent(completion.dw0));
                        self.requests.wake();
                    }
                }
                _ => {
                    entry.state = SlotState::Free;
                    entry.data = None;
                }
            }
        }
        if reaped {
            self.done.notify_all();
        }
    }

    /// Keeps asynchronous event requests outstanding (Base section 5.2).
    pub fn arm_events(&self) {
        let Ok(info) = self.link.info() else { return };
        let want = EVENTS.min(usize::from(info.identify.aerl_z) + 1);
        let mut queue = self.queue.lock();
        let have = queue
            .slots
            .iter()
            .filter(|s| matches!(s.state, SlotState::Event))
            .count();
        for _ in have..want {
            let command = Command::new(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
            let sent = self.send(&mut queue, command, &mut None, SlotState::Event);
            if !matches!(sent, Ok(Some(_))) {
                break;
            }
        }
    }

    /// Sends an Abort without waiting for it: the aborted command's own completion shows the
    /// result. Returns false when the controller has as many as it takes (ACL), or the queue is
    /// full.
    pub fn abort(&self, sqid: u16, cid: u16) -> bool {
        let most = self
            .link
            .info()
            .map_or(1, |i| usize::from(i.identify.acl_z) + 1);
        let mut queue = self.queue.lock();
        self.reap(&mut queue);
        let is_abort = |s: &&Slot| matches!(s.state, SlotState::Abort);
        if queue.slots.iter().filter(is_abort).count() >= most {
            return false;
        }
        let command = Command::abort(sqid, cid);
        match self.send(&mut queue, command, &mut None, SlotState::Abort) {
            Ok(sent) => sent.is_some(),
            Err(error) => {
                tracing::debug!(device = self.link.name(), %error, "abort not sent");
                true
            }
        }
    }

    /// Takes the asynchronous events that have arrived.
    pub fn take_events(&self) -> Vec<AsyncEvent> {
        let mut queue = self.queue.lock();
        self.reap(&mut queue);
        std::mem::take(&mut queue.events)
    }

    /// Ends everything outstanding on the admin queue. The device is quiet.
    pub fn lose_all(&self) {
        self.queue.lock().lose_all();
        self.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reset that comes before the caller has looked leaves a completed command its data.
    #[test]
    fn a_completed_command_keeps_its_data_over_a_reset() {
        let mut queue = AdminQueue::new(None, 12).expect("memory");
        let data = || Some(DmaBuf::zeroed(512).expect("memory"));
        queue.slots[0].state = SlotState::Done(Completion::default());
        queue.slots[1].state = SlotState::Pending;
        queue.slots[2].state = SlotState::Abandoned;
        for slot in &mut queue.slots[..3] {
            slot.data = data();
        }
        queue.lose_all();
        let [done, pending, abandoned] = &queue.slots[..3] else {
            panic!("three slots");
        };
        assert!(matches!(done.state, SlotState::Done(_)) && done.data.is_some());
        assert!(matches!(pending.state, SlotState::Lost) && pending.data.is_none());
        assert!(matches!(abandoned.state, SlotState::Free) && abandoned.data.is_none());
    }

    /// ASQ and ACQ begin at the controller's pages (CC.MPS), which may be larger than 4096 bytes,
    /// and the queues are zeroed.
    #[test]
    fn queues_begin_at_the_controllers_pages() {
        for shift in 12..=21 {
            // Earlier allocations have no influence.
            let before = DmaShared::zeroed_in(None, 4096).expect("memory");
            let queue = AdminQueue::new(None, shift).expect("memory");
            for memory in [&queue.sq_mem, &queue.cq_mem] {
                assert!(
                    memory.region_offset().is_multiple_of(1 << shift),
                    "2^{shift}"
                );
            }
            drop(before);
        }
    }
}
