//! A PCIe function through `uio_pci_generic` and sysfs, where VFIO is not available.
//!
//! There is no IOMMU: the device uses physical addresses, the arena has to consist of huge pages,
//! and completions can only be polled (`uio_pci_generic` does not support MSI-X). Needs root.
//!
//! Source: Linux `Documentation/driver-api/uio-howto.rst` and
//! `Documentation/ABI/testing/sysfs-bus-pci` (`resource0`, `config`, `reset`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::process::Birth;
use pumice_io::sys::{Absent, DeviceMapping, Doorbell, EventFd, MmioMap};

use super::registers::MappedBar;
use super::vfio::{DeviceSpace, want_huge_pages};
use super::{Transport, TransportError};
use crate::dma::{self, AddressTable, MapperGuard};
use crate::pci::{ConfigSpace, Host, PciAddress, PciError};
use crate::spec::{Cap, Cc, Csts, Reg};

/// The kernel driver that a function must be bound to.
pub(crate) const DRIVER: &str = "uio_pci_generic";

/// A PCIe function driven through uio.
#[derive(Debug)]
pub struct Uio {
    name: String,
    pci_id: (u16, u16),
    host: Host,
    dir: String,
    bar: MappedBar,
    table: Arc<AddressTable>,
    gone: AtomicBool,
    memory: Mutex<Vec<Arc<DeviceMapping>>>,
    device: Mutex<Option<Device>>,
    birth: Birth,
}

#[derive(Debug)]
struct Device {
    _mapper: MapperGuard,
    config: File,
    /// Locked while it is open: uio itself admits everybody.
    _resource: File,
    /// When its last descriptor is closed, however the process ends, the kernel disables bus
    /// mastering, so that the function does not write memory of a process that has ended.
    _node: File,
}

impl ConfigSpace for Device {
    fn read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.config.read_exact_at(data, u64::from(offset))
    }

    fn write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.config.write_all_at(data, u64::from(offset))
    }
}

impl Uio {
    /// Opens a function that is bound to `uio_pci_generic`, enables bus mastering and memory
    /// decoding and maps BAR 0. Fails when another process of Pumice has it. Blocks.
    pub fn open(address: PciAddress) -> Result<Arc<Uio>, TransportError> {
        Self::open_on(Host::new(), address)
    }

    fn open_on(host: Host, address: PciAddress) -> Result<Arc<Uio>, TransportError> {
        let name = address.to_string();
        let unsupported = |what: String| TransportError::Unsupported {
            device: address.to_string(),
            what,
        };
        let function = host.nvme_function(address).map_err(|e| match e {
            PciError::Io { path, source } => io_error(&name, &path.display().to_string(), source),
            other => unsupported(other.to_string()),
        })?;
        if function.driver.as_deref() != Some(DRIVER) {
            let driver = function.driver.as_deref().unwrap_or("no driver");
            return Err(unsupported(format!(
                "its kernel driver is {driver}, not {DRIVER}; give it to Pumice with: pumice setup bind {name} --driver uio"
            )));
        }
        let dir = format!("/sys/bus/pci/devices/{name}");
        let open = |file: &str| {
            let path = host.path(&format!("{dir}/{file}"));
            File::options()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|e| io_error(&name, &path.display().to_string(), e))
        };
        let node = open_node(&host, &name, &dir)?;
        let resource = open("resource0")?;
        lock(&name, &resource)?;
        let len = resource
            .metadata()
            .map_err(|e| io_error(&name, "resource0", e))?
            .len();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let mapping = DeviceMapping::new(resource.as_fd(), 0, len, Absent::Ones)
            .map_err(|e| io_error(&name, "mapping resource0", e))?;
        let config = open("config")?;
        let space = Arc::new(DeviceSpace::physical(&name));
        want_huge_pages();
        let table = Arc::clone(space.table());
        let mapper = dma::register_mapper(space)?;
        let device = Device {
            _mapper: mapper,
            config,
            _resource: resource,
            _node: node,
        };
        let bar = MappedBar::new(&name, mapping);
        let command = |e| io_error(&name, "PCI command register", e);
        // An earlier process that was killed may have left the controller enabled. It must not
        // continue when it can access memory again.
        device.enable_memory().map_err(command)?;
        stop_controller(&name, &bar)?;
        device.enable().map_err(command)?;
        Ok(Arc::new(Uio {
            bar,
            pci_id: (function.vendor, function.device),
            name,
            host,
            dir,
            table,
            gone: AtomicBool::new(false),
            memory: Mutex::new(Vec::new()),
            device: Mutex::new(Some(device)),
            birth: Birth::now(),
        }))
    }

    fn removed(&self) -> TransportError {
        TransportError::Removed {
            device: self.name.clone(),
        }
    }
}

/// Opens the function's `/dev/uioN`.
fn open_node(host: &Host, device: &str, dir: &str) -> Result<File, TransportError> {
    let list = host.path(&format!("{dir}/uio"));
    let names = std::fs::read_dir(&list).map_err(|e| io_error(device, "its uio directory", e))?;
    let name = names.flatten().map(|entry| entry.file_name()).next();
    let name =
        name.ok_or_else(|| io_error(device, "its uio node", io::ErrorKind::NotFound.into()))?;
    let path = host.path("/dev").join(name);
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| io_error(device, &path.display().to_string(), e))
}

/// Clears CC.EN and waits for CSTS.RDY = 0 within CAP.TO.
fn stop_controller(device: &str, bar: &MappedBar) -> Result<(), TransportError> {
    let cc = bar.read32(Reg::CC)?;
    if cc == u32::MAX || !Cc::from(cc).en() {
        return Ok(());
    }
    tracing::info!(device, "the controller was left enabled; stopping it");
    bar.write32(Reg::CC, Cc::from(cc).with_en(false).with_shn(0).into())?;
    let units = u64::from(Cap::from(bar.read64(Reg::CAP)?).to());
    let timeout_ms = 500 * (units + 1);
    let start = Instant::now();
    while Csts::from(bar.read32(Reg::CSTS)?).rdy() {
        if start.elapsed() > Duration::from_millis(timeout_ms) {
            return Err(TransportError::Timeout {
                device: device.to_owned(),
                what: "CC.EN = 0 (CSTS.RDY stays 1)".to_owned(),
                timeout_ms,
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn io_error(device: &str, what: &str, source: io::Error) -> TransportError {
    if source.kind() == io::ErrorKind::PermissionDenied {
        return TransportError::Unsupported {
            device: device.to_owned(),
            what: format!("{what}: {source}; uio needs root, VFIO does not"),
        };
    }
    TransportError::Io {
        device: device.to_owned(),
        what: what.to_owned(),
        source,
    }
}

fn lock(device: &str, file: &File) -> Result<(), TransportError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(std::fs::TryLockError::WouldBlock) => Err(TransportError::InUse {
            device: device.to_owned(),
            detail: format!(
                "another process has /sys/bus/pci/devices/{device}/resource0 locked (fuser tells which)"
            ),
            pid: None,
        }),
        Err(std::fs::TryLockError::Error(source)) => {
            Err(io_error(device, "locking resource0", source))
        }
    }
}

// SAFETY: the table is `DeviceSpace`'s: the physical addresses of the arena's huge pages.
#[allow(unsafe_code, reason = "the contract of Transport")]
unsafe impl Transport for Uio {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "uio"
    }

    fn pci_id(&self) -> Option<(u16, u16)> {
        Some(self.pci_id)
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

    fn enable_interrupts(&self, _want: u16) -> Result<Vec<Arc<EventFd>>, TransportError> {
        Ok(Vec::new())
    }

    fn reset(&self) -> Result<(), TransportError> {
        let device = self.device.lock();
        let device = device.as_ref().ok_or_else(|| self.removed())?;
        let attribute = format!("{}/reset", self.dir);
        if self.host.path(&attribute).exists() {
            self.host.write(&attribute, "1").map_err(|e| match e {
                PciError::Io { source, .. } => io_error(&self.name, &attribute, source),
                other => TransportError::Unsupported {
                    device: self.name.clone(),
                    what: other.to_string(),
                },
            })?;
        } else {
            tracing::debug!(
                device = self.name,
                "no function level reset; the controller is reset by CC.EN alone"
            );
        }
        device
            .enable()
            .map_err(|e| io_error(&self.name, "PCI command register", e))
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn detach(&self) {
        // A forked child does not have the device and must not stop it.
        if !self.birth.is_here() {
            return;
        }
        let Some(device) = self.device.lock().take() else {
            return;
        };
        self.gone.store(true, Ordering::Release);
        if let Err(error) = device.disable_dma() {
            tracing::debug!(device = self.name, %error, "bus mastering stays as it is; the function is gone");
        }
        self.bar.retire();
        for memory in self.memory.lock().drain(..) {
            if let Err(error) = memory.retire() {
                tracing::error!(device = self.name, %error, "controller memory stays mapped");
            }
        }
        tracing::info!(
            device = self.name,
            fd = device.config.as_raw_fd(),
            "device released"
        );
    }

    fn map_memory(&self, bar: u8, offset: u64, len: usize) -> Result<MmioMap, TransportError> {
        if self.is_gone() {
            return Err(self.removed());
        }
        let path = self.host.path(&format!("{}/resource{bar}", self.dir));
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| io_error(&self.name, &path.display().to_string(), e))?;
        let limit = file
            .metadata()
            .map_err(|e| io_error(&self.name, &path.display().to_string(), e))?
            .len();
        let end = offset.checked_add(len as u64).filter(|end| *end <= limit);
        if len == 0 || end.is_none() || !offset.is_multiple_of(4096) {
            return Err(TransportError::OutOfRange {
                device: self.name.clone(),
                what: "controller memory",
                offset: offset.saturating_add(len as u64),
                limit,
            });
        }
        let mapping = DeviceMapping::new(file.as_fd(), offset, len, Absent::Ones)
            .map_err(|e| io_error(&self.name, "mapping controller memory", e))?;
        self.memory.lock().push(Arc::clone(&mapping));
        Ok(mapping.mmio())
    }
}

impl Drop for Uio {
    fn drop(&mut self) {
        self.detach();
    }
}
