//! A PCIe function through Linux's VFIO.
//!
//! The function is bound to `vfio-pci` and its IOMMU group is opened in a container of its own
//! (TYPE1v2). BAR 0 is mapped, the arena's regions are mapped at I/O addresses inside the IOMMU's
//! windows, and interrupts arrive through eventfds. In a no-IOMMU group the device uses physical
//! addresses, and the arena has to consist of huge pages.
//!
//! Source: Linux `Documentation/driver-api/vfio.rst`, `include/uapi/linux/vfio.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use pumice_io::process::Birth;
use pumice_io::sys::{Absent, DeviceMapping, Doorbell, EventFd, MmioMap, any_readable};

use super::registers::MappedBar;
use super::{Transport, TransportError, TransportEvent};
use crate::dma::{self, AddressTable, ArenaOptions, HugePages, MapperGuard};
use crate::pci::{ConfigSpace, Host, PciAddress};

mod dma_space;
pub(super) mod info;
mod open;
mod sys;

pub(crate) use dma_space::DeviceSpace;
use info::RegionInfo;
use open::{Container, Handle};

const BAR0: u32 = 0;
const BARS: u32 = 6;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
const ERR: u32 = 3;
/// `VFIO_PCI_REQ_IRQ_INDEX`: the interrupt by which the kernel asks for the function.
const REQ: u32 = 4;

/// Most interrupt vectors to enable; each queue pair uses one.
const MAX_VECTORS: u16 = 1024;

/// A PCIe function driven through VFIO.
#[derive(Debug)]
pub struct Vfio {
    name: String,
    pci_id: Option<(u16, u16)>,
    bar: MappedBar,
    bars: Vec<RegionInfo>,
    table: Arc<AddressTable>,
    gone: AtomicBool,
    request: EventFd,
    error: EventFd,
    either: OwnedFd,
    vectors: Mutex<Vec<Arc<EventFd>>>,
    /// Whether MSI-X is on. Changed with `vectors` locked.
    msix: AtomicBool,
    /// Mapped controller memory, to be unmapped with BAR 0.
    memory: Mutex<Vec<Arc<DeviceMapping>>>,
    device: RwLock<Option<Device>>,
    birth: Birth,
}

/// The resources that detach releases. They are dropped in order: mappings before the container.
struct Device {
    mapper: MapperGuard,
    config: RegionInfo,
    can_reset: bool,
    handle: Handle,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device(fd {})", self.handle.as_fd().as_raw_fd())
    }
}

impl ConfigSpace for Device {
    fn read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        with_file(&self.handle, |f| {
            f.read_exact_at(data, self.config.offset + u64::from(offset))
        })
    }

    fn write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        with_file(&self.handle, |f| {
            f.write_all_at(data, self.config.offset + u64::from(offset))
        })
    }
}

/// Makes positioned reads and writes on a duplicate of a descriptor that somebody else owns.
fn with_file<R>(handle: &Handle, f: impl FnOnce(&File) -> io::Result<R>) -> io::Result<R> {
    f(&File::from(handle.as_fd().try_clone_to_owned()?))
}

impl Vfio {
    /// Opens a function that is bound to `vfio-pci`, enables bus mastering and memory decoding
    /// and maps BAR 0 and the arena. The controller is left as it is, except that a function
    /// which can be reset is reset by the kernel when it is opened. Blocks.
    pub fn open(address: PciAddress) -> Result<Arc<Vfio>, TransportError> {
        Self::open_on(&Host::new(), address)
    }

    fn open_on(host: &Host, address: PciAddress) -> Result<Arc<Vfio>, TransportError> {
        let name = address.to_string();
        let io = |what: &str| {
            let (device, what) = (name.clone(), what.to_owned());
            move |source| TransportError::Io {
                device,
                what,
                source,
            }
        };
        let handle = open::open(host, address)?;
        let config = sys::region_info(handle.as_fd(), CONFIG).map_err(io("configuration space"))?;
        let mut bars = Vec::new();
        for index in 0..BARS {
            bars.push(sys::region_info(handle.as_fd(), index).map_err(io("BAR"))?);
        }
        let bar0 = map_bar0(&name, &handle, &bars)?;
        let can_reset = sys::can_reset(handle.as_fd()).map_err(io("VFIO_DEVICE_GET_INFO"))?;

        let request = EventFd::new().map_err(io("eventfd"))?;
        let error = EventFd::new().map_err(io("eventfd"))?;
        let either = any_readable(&[request.as_fd(), error.as_fd()], None).map_err(io("epoll"))?;
        // Error notices exist on PCIe functions only, requests since Linux 4.0.
        for (index, event) in [(REQ, &request), (ERR, &error)] {
            if matches!(sys::irq_count(handle.as_fd(), index), Ok(n) if n > 0) {
                sys::set_irqs(handle.as_fd(), index, 0, &[Some(event.as_fd())])
                    .map_err(io("VFIO_DEVICE_SET_IRQS (device request, error)"))?;
            }
        }

        let space = Arc::new(device_space(&name, &handle));
        if matches!(handle.group().container, Container::NoIommu(_)) {
            want_huge_pages();
        }
        let table = Arc::clone(space.table());
        let mapper = dma::register_mapper(space)?;
        let device = Device {
            mapper,
            config,
            can_reset,
            handle,
        };
        device.enable().map_err(io("PCI command register"))?;
        Ok(Arc::new(Vfio {
            bar: MappedBar::new(&name, bar0),
            pci_id: host.function(address).ok().map(|f| (f.vendor, f.device)),
            name,
            bars,
            table,
            gone: AtomicBool::new(false),
            request,
            error,
            either,
            vectors: Mutex::new(Vec::new()),
            msix: AtomicBool::new(false),
            memory: Mutex::new(Vec::new()),
            device: RwLock::new(Some(device)),
            birth: Birth::now(),
        }))
    }

    fn io(&self, what: &str) -> impl FnOnce(io::Error) -> TransportError + use<> {
        let (device, what) = (self.name.clone(), what.to_owned());
        move |source| TransportError::Io {
            device,
            what,
            source,
        }
    }

    fn removed(&self) -> TransportError {
        TransportError::Removed {
            device: self.name.clone(),
        }
    }

    fn wake_all(&self) {
        for vector in &*self.vectors.lock() {
            vector.signal();
        }
    }
}

/// Asks for huge pages, which physical addressing needs. When the arena is in use already its
/// options stay, and mapping it reports what is missing.
pub(crate) fn want_huge_pages() {
    let mut options = ArenaOptions::default();
    options.huge = HugePages::Always;
    if dma::configure(options).is_err() {
        tracing::debug!("DMA memory is in use already; its huge-page option stays as it is");
    }
}

fn map_bar0(
    name: &str,
    handle: &Handle,
    bars: &[RegionInfo],
) -> Result<Arc<DeviceMapping>, TransportError> {
    let unsupported = |what: String| TransportError::Unsupported {
        device: name.to_owned(),
        what,
    };
    let bar = bars
        .get(BAR0 as usize)
        .filter(|bar| bar.size > 0)
        .ok_or_else(|| unsupported("BAR 0 has no memory assigned".to_owned()))?;
    // All of BAR 0 is mapped where possible. Where the MSI-X table is excluded, the part before it
    // is mapped.
    let (_, len) = bar
        .mappable
        .iter()
        .copied()
        .find(|(at, _)| *at == 0)
        .ok_or_else(|| unsupported("the kernel does not let BAR 0 be mapped".to_owned()))?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    DeviceMapping::new(handle.as_fd(), bar.offset, len, Absent::Ones).map_err(|source| {
        TransportError::Io {
            device: name.to_owned(),
            what: "mapping BAR 0".to_owned(),
            source,
        }
    })
}

fn device_space(name: &str, handle: &Handle) -> DeviceSpace {
    let group = handle.group();
    match &group.container {
        Container::NoIommu(_) => DeviceSpace::physical(name),
        Container::Iommu(container) => {
            DeviceSpace::behind_iommu(name, Arc::clone(container), Arc::clone(&group.iova))
        }
    }
}

// SAFETY: the table is `DeviceSpace`'s: the addresses at which the kernel has mapped the arena for this device.
#[allow(unsafe_code, reason = "the contract of Transport")]
unsafe impl Transport for Vfio {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "vfio"
    }

    fn pci_id(&self) -> Option<(u16, u16)> {
        self.pci_id
    }

    fn read32(&self, offset: u32) -> Result<u32, TransportError> {
        self.bar.read32(offset)
    }

    fn read64(&self, offset: u32) -> Result<u64, TransportError> {
        self.bar.read64(offset)
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.bar.write32(offset, value)
    }

    fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.bar.write64(offset, value)
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError> {
        self.bar.doorbell(offset)
    }

    fn addresses(&self) -> &Arc<AddressTable> {
        &self.table
    }

    fn enable_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, TransportError> {
        let device = self.device.read();
        let device = device.as_ref().ok_or_else(|| self.removed())?;
        let have =
            sys::irq_count(device.handle.as_fd(), MSIX).map_err(self.io("MSI-X information"))?;
        let count = want
            .min(MAX_VECTORS)
            .min(u16::try_from(have).unwrap_or(u16::MAX));
        if count == 0 {
            return Ok(Vec::new());
        }
        // A reset keeps the eventfds, because queue pairs sleep on them.
        let mut vectors = self.vectors.lock();
        let events = EventFd::extend(&vectors, usize::from(count)).map_err(self.io("eventfd"))?;
        let fds: Vec<Option<BorrowedFd<'_>>> = events.iter().map(|e| Some(e.as_fd())).collect();
        sys::set_irqs(device.handle.as_fd(), MSIX, 0, &fds)
            .map_err(self.io("VFIO_DEVICE_SET_IRQS (MSI-X)"))?;
        vectors.clone_from(&events);
        self.msix.store(true, Ordering::Relaxed);
        Ok(events)
    }

    fn switch_interrupt(&self, vector: u16, on: bool) -> Result<bool, TransportError> {
        // A reset in progress switches all of them off and on again.
        let Some(device) = self.device.try_read() else {
            return Ok(false);
        };
        let device = device.as_ref().ok_or_else(|| self.removed())?;
        let vectors = self.vectors.lock();
        let Some(event) = vectors.get(usize::from(vector)) else {
            return Ok(false);
        };
        // With MSI-X off, the kernel would switch on just this vector, and no other one later.
        if !self.msix.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let event = on.then(|| event.as_fd());
        sys::set_irqs(device.handle.as_fd(), MSIX, vector.into(), &[event])
            .map_err(self.io("VFIO_DEVICE_SET_IRQS (one vector)"))?;
        Ok(true)
    }

    fn reset(&self) -> Result<(), TransportError> {
        // The lock is exclusive: nobody uses configuration space while the function resets.
        let device = self.device.write();
        let device = device.as_ref().ok_or_else(|| self.removed())?;
        {
            let vectors = self.vectors.lock();
            self.msix.store(false, Ordering::Relaxed);
            if vectors.is_empty() {
                // There is nothing to switch off.
            } else if let Err(error) = sys::set_irqs(device.handle.as_fd(), MSIX, 0, &[]) {
                tracing::warn!(device = self.name, %error, "MSI-X stays on through the reset");
            }
        }
        self.wake_all();
        if device.can_reset {
            sys::reset(device.handle.as_fd()).map_err(self.io("VFIO_DEVICE_RESET"))?;
        } else {
            tracing::debug!(
                device = self.name,
                "no function level reset; the controller is reset by CC.EN alone"
            );
        }
        device.enable().map_err(self.io("PCI command register"))
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.either.as_fd())
    }

    fn take_event(&self) -> Option<TransportEvent> {
        if self.request.drain() > 0 {
            return Some(TransportEvent::RemovalRequested);
        }
        if self.error.drain() > 0 {
            return Some(TransportEvent::Error(
                "PCIe error reported for the function (AER); dmesg has the details".to_owned(),
            ));
        }
        None
    }

    fn detach(&self) {
        // A forked child does not have the device and must not stop it.
        if !self.birth.is_here() {
            return;
        }
        let Some(device) = self.device.write().take() else {
            return;
        };
        self.gone.store(true, Ordering::Release);
        if let Err(error) = device.disable_dma() {
            tracing::debug!(device = self.name, %error, "bus mastering stays as it is; the function is gone");
        }
        // The kernel releases the function only when its last page is unmapped.
        self.bar.retire();
        for memory in self.memory.lock().drain(..) {
            if let Err(error) = memory.retire() {
                tracing::error!(device = self.name, %error, "controller memory stays mapped");
            }
        }
        let Device { mapper, handle, .. } = device;
        drop(mapper);
        drop(handle);
        self.wake_all();
        tracing::info!(device = self.name, "device released");
    }

    fn map_memory(&self, bar: u8, offset: u64, len: usize) -> Result<MmioMap, TransportError> {
        let device = self.device.read();
        let device = device.as_ref().ok_or_else(|| self.removed())?;
        let region = self.bars.get(usize::from(bar));
        let out_of_range = || TransportError::OutOfRange {
            device: self.name.clone(),
            what: "controller memory",
            offset: offset.saturating_add(len as u64),
            limit: region.map_or(0, |r| r.size),
        };
        let region = region.ok_or_else(out_of_range)?;
        if len == 0 || !region.can_map(offset, len as u64) || !offset.is_multiple_of(4096) {
            return Err(out_of_range());
        }
        let at = region.offset + offset;
        let mapping = DeviceMapping::new(device.handle.as_fd(), at, len, Absent::Ones)
            .map_err(self.io("mapping controller memory"))?;
        self.memory.lock().push(Arc::clone(&mapping));
        Ok(mapping.mmio())
    }
}

impl Drop for Vfio {
    fn drop(&mut self) {
        self.detach();
    }
}
