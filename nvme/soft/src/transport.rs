//! The driver's side of the soft controller: the transport that the driver uses, and the handle for
//! tests and tools.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use pumice_io::dma::{AddressTable, MapperGuard, register_mapper};
use pumice_io::process::Birth;
use pumice_io::sys::{Absent, DeviceMapping, Doorbell, EventFd, Kick, MmioMap, shared_file};
use pumice_nvme::spec::{AsyncEvent, Cap, Cc, Cmbloc, Cmbsz, Reg};
use pumice_nvme::transport::{OpenTransport, Transport, TransportError, TransportEvent};

use super::engine::{Engine, Order};
use super::fault::Faults;
use super::media::SoftNamespace;
use super::memory::DeviceMemory;
use super::{SoftConfig, identify};

/// The BAR of the controller memory buffer.
pub(super) const CMB_BAR: u8 = 2;

/// State that both sides share.
pub(super) struct SoftShared {
    pub name: String,
    pub registers: MmioMap,
    pub kick: Arc<Kick>,
    pub memory: Arc<DeviceMemory>,
    pub interrupts: Vec<Arc<EventFd>>,
    pub faults: Faults,
    pub orders: Mutex<Vec<Order>>,
    pub ordered: AtomicBool,
    pub gone: AtomicBool,
    events: Mutex<Vec<TransportEvent>>,
    event: EventFd,
    pub commands: AtomicU64,
}

impl SoftShared {
    /// Removes the device: register reads give all ones and sleepers wake.
    pub fn vanish(&self, event: Option<TransportEvent>) {
        self.gone.store(true, Ordering::SeqCst);
        if let Some(event) = event {
            self.events.lock().push(event);
            self.event.signal();
        }
        for interrupt in &self.interrupts {
            interrupt.signal();
        }
    }
}

/// The driver's transport to a soft controller.
struct SoftTransport {
    shared: Arc<SoftShared>,
    pci_id: Option<(u16, u16)>,
    bar_len: usize,
    /// The file of the registers, when they are shared with another process.
    register_file: Option<File>,
    engine: Mutex<Option<JoinHandle<Vec<SoftNamespace>>>>,
    media: Mutex<Option<Vec<SoftNamespace>>>,
    birth: Birth,
    /// Last, so that the engine has ended before the memory is unmapped.
    _mapping: Option<MapperGuard>,
}

impl fmt::Debug for SoftTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SoftTransport({})", self.shared.name)
    }
}

/// A handle on a soft controller, for everything that happens to it besides its commands.
#[derive(Clone, Debug)]
pub struct SoftController(Arc<SoftTransport>);

/// Counters of a soft controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SoftStats {
    /// Number of commands taken from its queues.
    pub commands: u64,
}

static NUMBER: AtomicU64 = AtomicU64::new(0);

impl SoftController {
    /// Makes a controller and starts its thread.
    ///
    /// # Errors
    /// Fails when the system has no thread, eventfd or memory for it.
    pub fn new(mut config: SoftConfig) -> Result<SoftController, TransportError> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("soft-{number}");
        for (n, ns) in config.namespaces.iter_mut().enumerate() {
            if ns.uuid == [0; 16] {
                ns.uuid[..8].copy_from_slice(&number.to_le_bytes());
                ns.uuid[8..].copy_from_slice(&(n as u64 + 1).to_be_bytes());
                // A version 8 (custom) UUID: RFC 9562 section 5.8.
                ns.uuid[6] = 0x80;
            }
        }
        let bar_len =
            (Reg::DOORBELLS as usize + (usize::from(config.queues) + 1) * 8).next_multiple_of(4096);
        let shared = |source| TransportError::Io {
            device: name.clone(),
            what: "memory for shared registers".into(),
            source,
        };
        let (registers, register_file) = if config.served {
            let file = shared_file(bar_len).map_err(shared)?;
            let mapping =
                DeviceMapping::new(file.as_fd(), 0, bar_len, Absent::Ones).map_err(shared)?;
            (mapping.mmio(), Some(file))
        } else {
            let words = (0..bar_len / 8).map(|_| AtomicU64::new(0)).collect();
            (MmioMap::from_words(words), None)
        };
        let memory = Arc::new(DeviceMemory::new(config.cmb_len));
        let io = |source| TransportError::Io {
            device: name.clone(),
            what: "eventfd".into(),
            source,
        };
        let interrupts = (0..config.vectors)
            .map(|_| EventFd::new().map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io)?;
        // Another process reaches the memory that it has given, and none of this one.
        let mapping = match config.served {
            true => None,
            false => Some(register_mapper(memory.clone())?),
        };
        let shared = Arc::new(SoftShared {
            registers,
            kick: Arc::new(Kick::default()),
            memory,
            interrupts,
            faults: Faults::default(),
            orders: Mutex::new(Vec::new()),
            ordered: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            events: Mutex::new(Vec::new()),
            event: EventFd::new().map_err(io)?,
            commands: AtomicU64::new(0),
            name: name.clone(),
        });
        power_on(&shared, &config);
        let pci_id = config.pci_id;
        let engine = Engine::new(Arc::clone(&shared), config);
        let handle = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || engine.run())
            .map_err(|source| TransportError::Io {
                device: name,
                what: "thread".into(),
                source,
            })?;
        Ok(SoftController(Arc::new(SoftTransport {
            shared,
            pci_id,
            bar_len,
            register_file,
            engine: Mutex::new(Some(handle)),
            media: Mutex::new(None),
            birth: Birth::now(),
            _mapping: mapping,
        })))
    }

    /// Returns the transport to it, for [`Controller::new`](pumice_nvme::Controller::new).
    pub fn transport(&self) -> OpenTransport {
        OpenTransport::new(self.0.clone())
    }

    /// Returns the transport to it, for a server to another process.
    pub(super) fn as_transport(&self) -> Arc<dyn Transport> {
        self.0.clone()
    }

    /// The faults in force.
    pub fn faults(&self) -> &Faults {
        &self.0.shared.faults
    }

    /// Counters of the controller.
    pub fn stats(&self) -> SoftStats {
        SoftStats {
            commands: self.0.shared.commands.load(Ordering::Relaxed),
        }
    }

    /// The file of BAR 0, for a process that it is served to.
    pub(super) fn register_file(&self) -> Option<BorrowedFd<'_>> {
        self.0.register_file.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn bar_len(&self) -> usize {
        self.0.bar_len
    }

    pub(super) fn memory(&self) -> &DeviceMemory {
        &self.0.shared.memory
    }

    pub(super) fn interrupts(&self) -> &[Arc<EventFd>] {
        &self.0.shared.interrupts
    }

    fn order(&self, order: Order) {
        self.0.shared.orders.lock().push(order);
        self.0.shared.ordered.store(true, Ordering::SeqCst);
        self.0.shared.kick.wake();
    }

    /// Removes the controller by surprise: it does not respond any longer, and commands in flight
    /// are lost.
    pub fn unplug(&self) {
        self.0.stop();
        self.0.shared.vanish(Some(TransportEvent::Removed));
    }

    /// Asks the driver to release the controller, as the kernel does before an orderly removal.
    pub fn request_removal(&self) {
        self.0
            .shared
            .events
            .lock()
            .push(TransportEvent::RemovalRequested);
        self.0.shared.event.signal();
    }

    /// Reports a bus error to the driver.
    pub fn bus_error(&self, text: &str) {
        let event = TransportEvent::Error(text.to_owned());
        self.0.shared.events.lock().push(event);
        self.0.shared.event.signal();
    }

    /// Sets CSTS.CFS and stops until the controller is reset.
    pub fn fatal(&self) {
        self.order(Order::Fatal);
    }

    /// Reports an asynchronous event.
    pub fn report(&self, event: AsyncEvent) {
        self.order(Order::Event(event));
    }

    /// Adds a namespace and reports the change.
    pub fn add_namespace(&self, ns: SoftNamespace) {
        self.order(Order::Add(Box::new(ns)));
    }

    /// Cuts the power: `survives(nsid, lba)` decides for each block that is only in the volatile
    /// cache whether it reaches the medium. The controller is removed. Returns its namespaces, for
    /// another controller.
    pub fn power_cut(&self, mut survives: impl FnMut(u32, u64) -> bool) -> Vec<SoftNamespace> {
        self.0.stop();
        // This comes before the driver is told, because its detach would flush the cache.
        let mut media = self.0.media.lock().take().unwrap_or_default();
        self.0.shared.vanish(Some(TransportEvent::Removed));
        for (n, ns) in media.iter_mut().enumerate() {
            let nsid = u32::try_from(n + 1).unwrap_or(u32::MAX);
            if let Err(error) = ns.lose(|lba| survives(nsid, lba)) {
                tracing::error!(nsid, %error, "soft controller's medium at power cut");
            }
        }
        media
    }
}

/// Sets the registers to their values at power-on.
fn power_on(shared: &SoftShared, config: &SoftConfig) {
    let cap = Cap::new()
        .with_mqes_z(config.entries.max(2) - 1)
        .with_cqr(true)
        .with_ams_wrr(config.weighted)
        .with_to(config.timeout_500ms)
        .with_css(1)
        .with_cmbs(config.cmb_len > 0);
    set64(&shared.registers, Reg::CAP, cap.into());
    set32(&shared.registers, Reg::VS, identify::VERSION);
    if config.cmb_len > 0 {
        let size = u32::try_from(config.cmb_len / 4096).unwrap_or(0);
        let cmbsz = Cmbsz::new().with_sqs(true).with_sz(size);
        let cmbloc = Cmbloc::new().with_bir(CMB_BAR).with_cqda(true);
        set32(&shared.registers, Reg::CMBSZ, cmbsz.into());
        set32(&shared.registers, Reg::CMBLOC, cmbloc.into());
    }
}

pub(super) fn set32(map: &MmioMap, offset: u32, value: u32) {
    if let Some(word) = map.word32(offset as usize) {
        word.store(value.to_le(), Ordering::Release);
    }
}

pub(super) fn set64(map: &MmioMap, offset: u32, value: u64) {
    if let Some(word) = map.word64(offset as usize) {
        word.store(value.to_le(), Ordering::Release);
    }
}

pub(super) fn get32(map: &MmioMap, offset: u32) -> u32 {
    map.word32(offset as usize)
        .map_or(0, |w| u32::from_le(w.load(Ordering::Acquire)))
}

pub(super) fn get64(map: &MmioMap, offset: u32) -> u64 {
    map.word64(offset as usize)
        .map_or(0, |w| u64::from_le(w.load(Ordering::Acquire)))
}

/// Whether the driver may write the register.
fn writable(offset: u32) -> bool {
    matches!(
        offset,
        Reg::INTMS | Reg::INTMC | Reg::CC | Reg::NSSR | Reg::AQA
    ) || (Reg::ASQ..Reg::CMBLOC).contains(&offset)
        || (Reg::CMBMSC..Reg::CMBSTS).contains(&offset)
        || offset >= Reg::DOORBELLS
}

impl SoftTransport {
    /// Ends the engine and waits for it. Its media are kept.
    fn stop(&self) {
        // A forked child does not have the thread.
        if !self.birth.is_here() {
            return;
        }
        let handle = self.engine.lock().take();
        let Some(handle) = handle else { return };
        self.shared.orders.lock().push(Order::Stop);
        self.shared.ordered.store(true, Ordering::SeqCst);
        self.shared.kick.wake();
        match handle.join() {
            Ok(media) => *self.media.lock() = Some(media),
            Err(_) => tracing::error!(device = self.shared.name, "soft controller panicked"),
        }
    }

    fn check(&self, offset: u32, len: usize) -> Result<(), TransportError> {
        let offset = offset as usize;
        if offset + len > self.bar_len || !offset.is_multiple_of(len) {
            return Err(TransportError::OutOfRange {
                device: self.shared.name.clone(),
                what: "register",
                offset: offset as u64,
                limit: self.bar_len as u64,
            });
        }
        Ok(())
    }
}

// SAFETY: the table is `DeviceMemory`'s, which the controller reads and writes by: it looks every address up and reaches
// the byte of the arena that has it, or nothing.
#[allow(unsafe_code, reason = "the contract of Transport")]
unsafe impl Transport for SoftTransport {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn kind(&self) -> &'static str {
        "soft"
    }

    fn pci_id(&self) -> Option<(u16, u16)> {
        self.pci_id
    }

    fn read32(&self, offset: u32) -> Result<u32, TransportError> {
        self.check(offset, 4)?;
        if self.is_gone() {
            return Ok(u32::MAX);
        }
        Ok(get32(&self.shared.registers, offset))
    }

    fn read64(&self, offset: u32) -> Result<u64, TransportError> {
        self.check(offset, 8)?;
        if self.is_gone() {
            return Ok(u64::MAX);
        }
        Ok(get64(&self.shared.registers, offset))
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.check(offset, 4)?;
        if writable(offset) && !self.is_gone() {
            if offset == Reg::CC
                && Cc::from(value).en() != Cc::from(get32(&self.shared.registers, Reg::CC)).en()
            {
                // The controller answers from its thread. Until then its state must not look like
                // an answer.
                self.order_cc(value);
                return Ok(());
            }
            set32(&self.shared.registers, offset, value);
            self.shared.kick.wake();
        }
        Ok(())
    }

    fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.check(offset, 8)?;
        if writable(offset) && !self.is_gone() {
            set64(&self.shared.registers, offset, value);
            self.shared.kick.wake();
        }
        Ok(())
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError> {
        self.check(offset, 4)?;
        Doorbell::waking(
            &self.shared.registers,
            offset as usize,
            Arc::clone(&self.shared.kick),
        )
        .ok_or_else(|| TransportError::OutOfRange {
            device: self.shared.name.clone(),
            what: "doorbell",
            offset: u64::from(offset),
            limit: self.bar_len as u64,
        })
    }

    fn addresses(&self) -> &Arc<AddressTable> {
        &self.shared.memory.table
    }

    fn enable_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, TransportError> {
        let have = self.shared.interrupts.iter().take(usize::from(want));
        Ok(have.cloned().collect())
    }

    fn reset(&self) -> Result<(), TransportError> {
        if self.is_gone() {
            return Err(TransportError::Removed {
                device: self.shared.name.clone(),
            });
        }
        self.order_cc(0);
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Relaxed)
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.event.as_fd())
    }

    fn take_event(&self) -> Option<TransportEvent> {
        self.shared.event.drain();
        let mut events = self.shared.events.lock();
        if events.is_empty() {
            return None;
        }
        let event = events.remove(0);
        if !events.is_empty() {
            self.shared.event.signal();
        }
        Some(event)
    }

    fn detach(&self) {
        if !self.birth.is_here() {
            return;
        }
        self.stop();
        if !self.shared.gone.load(Ordering::SeqCst) {
            self.shared.vanish(None);
        }
        // The detach is orderly: the cache has time to reach the medium.
        if let Some(media) = &mut *self.media.lock() {
            for ns in media {
                if let Err(error) = ns.flush() {
                    tracing::error!(device = self.shared.name, %error, "flush at detach");
                }
            }
        }
    }

    fn map_memory(&self, bar: u8, offset: u64, len: usize) -> Result<MmioMap, TransportError> {
        let have = self.shared.memory.buffer.len() * 8;
        if bar != CMB_BAR || offset != 0 || len > have || len == 0 {
            return Err(TransportError::OutOfRange {
                device: self.shared.name.clone(),
                what: "controller memory",
                offset,
                limit: have as u64,
            });
        }
        Ok(MmioMap::from_words(Arc::clone(&self.shared.memory.buffer)))
    }
}

impl SoftTransport {
    fn order_cc(&self, value: u32) {
        set32(&self.shared.registers, Reg::CC, value);
        self.shared.kick.wake();
    }
}

impl Drop for SoftTransport {
    fn drop(&mut self) {
        self.detach();
    }
}

#[cfg(test)]
mod tests {
    use pumice_io::dma::{CHUNK_LEN, DmaBuf};

    use super::super::memory::IOVA_BASE;
    use super::*;

    /// A controller that is served to another process does not reach the buffers of this one, whatever address that names.
    #[test]
    fn a_served_controller_reaches_no_buffer_of_its_process() {
        let buf = DmaBuf::zeroed(4096).unwrap();
        let at = buf.region().index() * CHUNK_LEN + buf.region_offset();
        let config = || SoftConfig::new(Vec::new());
        for (config, reaches) in [(config(), true), (config().served(), false)] {
            let soft = SoftController::new(config).unwrap();
            let word = soft.memory().words(IOVA_BASE + at as u64, 1);
            assert_eq!(word.is_some(), reaches);
        }
    }
}
