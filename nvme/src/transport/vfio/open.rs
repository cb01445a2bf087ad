//! Opening a PCI function by address, with errors that say what to do.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pumice_io::process::PerProcess;
use vfio_ioctls::{VfioContainer, VfioError};

use super::sys::{self, OpenError};
use crate::pci::{Function, Group, Host, PciAddress, PciError};
use crate::transport::{IovaSpace, TransportError};

/// An open function. Fields are dropped in order: the device before its group.
pub(super) struct Handle {
    device: OwnedFd,
    function: InUse,
}

/// An open group of this process, shared by all functions of it: the kernel allows one opening of a
/// group, and the whole group is in one address space.
pub(super) struct OpenGroup {
    group: File,
    pub(super) container: Container,
    /// The free addresses of the group's address space.
    pub(super) iova: Arc<Mutex<IovaSpace>>,
    functions: Mutex<HashSet<PciAddress>>,
}

/// The address space of a group.
pub(super) enum Container {
    /// Translated by a TYPE1v2 IOMMU.
    Iommu(Arc<VfioContainer>),
    /// Not translated: physical addresses.
    NoIommu(File),
}

/// Marks a function as open, so that this process does not open it twice.
struct InUse {
    group: Arc<OpenGroup>,
    address: PciAddress,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.group.functions.lock().remove(&self.address);
    }
}

/// The open groups by their device nodes.
static GROUPS: PerProcess<Mutex<HashMap<String, Weak<OpenGroup>>>> =
    PerProcess::new(Mutex::default);

impl Handle {
    /// Returns the function's group.
    pub(super) fn group(&self) -> &OpenGroup {
        &self.function.group
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Opens the function. Does not wait; fails when another process has its group.
///
/// Group and device are opened here and not by `vfio_ioctls::VfioDevice`, which panics when it
/// is dropped after the function was unplugged (it looks its group up in sysfs again).
pub(super) fn open(host: &Host, address: PciAddress) -> Result<Handle, TransportError> {
    let device = address.to_string();
    let function = host
        .nvme_function(address)
        .map_err(|e| pci_error(&device, e))?;
    let group = usable_group(host, &function)?;
    let node = group.node();
    let mut groups = GROUPS.get().lock();
    groups.retain(|_, group| group.strong_count() > 0);
    let shared = match groups.get(&node).and_then(Weak::upgrade) {
        Some(shared) => shared,
        None => {
            let shared = Arc::new(open_group(&device, &group)?);
            groups.insert(node.clone(), Arc::downgrade(&shared));
            shared
        }
    };
    if !shared.functions.lock().insert(address) {
        return Err(TransportError::InUse {
            device,
            detail: "this process has it open".to_owned(),
            pid: Some(std::process::id()),
        });
    }
    let function = InUse {
        group: shared,
        address,
    };
    let opened = sys::open_device(&function.group.group, &device);
    Ok(Handle {
        device: opened.map_err(|e| explain_step(&device, &node, e))?,
        function,
    })
}

fn open_group(device: &str, group: &Group) -> Result<OpenGroup, TransportError> {
    let node = group.node();
    let open = |path: &str| {
        let file = File::options().read(true).write(true).open(path);
        file.map_err(|e| explain_io(device, path, e))
    };
    let container = if group.no_iommu {
        Container::NoIommu(open("/dev/vfio/vfio")?)
    } else {
        let container = VfioContainer::new(None).map_err(|e| explain(device, e))?;
        Container::Iommu(Arc::new(container))
    };
    let file = open(&node)?;
    let joined = match &container {
        Container::Iommu(c) => sys::join_container(&**c, sys::TYPE1V2, &file),
        Container::NoIommu(c) => sys::join_container(c, sys::NO_IOMMU, &file),
    };
    joined.map_err(|e| explain_step(device, &node, e))?;
    let windows = match &container {
        Container::NoIommu(_) => Vec::new(),
        Container::Iommu(c) => {
            let info = sys::iommu_info(&**c).map_err(|source| TransportError::Io {
                device: device.to_owned(),
                what: "VFIO_IOMMU_GET_INFO".to_owned(),
                source,
            })?;
            info.windows
        }
    };
    let iova = IovaSpace::new(windows);
    tracing::debug!(device, node, windows = iova.describe(), "I/O address space");
    Ok(OpenGroup {
        group: file,
        container,
        iova: Arc::new(Mutex::new(iova)),
        functions: Mutex::default(),
    })
}

/// Explains why a step from group to device failed.
fn explain_step(device: &str, node: &str, error: OpenError) -> TransportError {
    match error {
        OpenError::NotViable => unsupported(
            device,
            format!("{node} is not viable: another function of the group is bound to a driver of the kernel; see: pumice doctor"),
        ),
        OpenError::Step("VFIO_SET_IOMMU", e) if e.raw_os_error() == Some(libc::EPERM) => unsupported(
            device,
            "the platform cannot isolate interrupts (no interrupt remapping), which VFIO requires: turn it on in the firmware, or accept the risk with vfio_iommu_type1 allow_unsafe_interrupts=1".to_owned(),
        ),
        OpenError::Step(what, source) => TransportError::Io {
            device: device.to_owned(),
            what: format!("{what} on {node}"),
            source,
        },
    }
}

fn pci_error(device: &str, error: PciError) -> TransportError {
    match error {
        PciError::Io { path, source } => TransportError::Io {
            device: device.to_owned(),
            what: path.display().to_string(),
            source,
        },
        other => unsupported(device, strip(&other.to_string(), device)),
    }
}

/// Removes the device's name, which is in front of every error already.
fn strip(text: &str, device: &str) -> String {
    text.strip_prefix(device)
        .and_then(|t| t.strip_prefix(": "))
        .unwrap_or(text)
        .to_owned()
}

fn unsupported(device: &str, what: String) -> TransportError {
    TransportError::Unsupported {
        device: device.to_owned(),
        what,
    }
}

/// Returns the group, if the drivers of its functions allow its use.
fn usable_group(host: &Host, function: &Function) -> Result<Group, TransportError> {
    let device = function.address.to_string();
    if function.driver.as_deref() != Some("vfio-pci") {
        let driver = function.driver.as_deref().unwrap_or("no driver");
        return Err(unsupported(
            &device,
            format!(
                "its kernel driver is {driver}, not vfio-pci; give it to Pumice with: pumice setup bind {device}"
            ),
        ));
    }
    let Some(group) = function.group.clone() else {
        return Err(unsupported(
            &device,
            "it has no IOMMU group: turn the IOMMU on (firmware set-up, and intel_iommu=on on the kernel's command line), then see: pumice doctor".to_owned(),
        ));
    };
    let rivals = host.group_rivals(function);
    if !rivals.is_empty() {
        let list: Vec<String> = rivals.iter().map(|(a, d)| format!("{a} ({d})")).collect();
        return Err(unsupported(
            &device,
            format!(
                "IOMMU group {} also holds {}, which the kernel drives; a group is given away as a whole: unbind them too",
                group.id,
                list.join(", ")
            ),
        ));
    }
    Ok(group)
}

fn explain(device: &str, error: VfioError) -> TransportError {
    match error {
        VfioError::OpenContainer(source) => explain_io(device, "/dev/vfio/vfio", source),
        VfioError::VfioExtension => unsupported(
            device,
            "the kernel has no TYPE1v2 IOMMU for VFIO: modprobe vfio_iommu_type1".to_owned(),
        ),
        other => unsupported(device, other.to_string()),
    }
}

fn explain_io(device: &str, node: &str, source: io::Error) -> TransportError {
    match source.raw_os_error() {
        Some(libc::EBUSY) => {
            let opener = Host::new().openers(node).into_iter().next();
            TransportError::InUse {
                device: device.to_owned(),
                pid: opener.as_ref().map(|(pid, _)| *pid),
                detail: match opener {
                    Some((pid, name)) => format!("process {pid} ({name}) has {node} open"),
                    None => {
                        format!("another process has {node} open (fuser -v {node} tells which)")
                    }
                },
            }
        }
        Some(libc::EACCES | libc::EPERM) => unsupported(
            device,
            format!(
                "no permission for {node}: run as root, or hand the node over with: pumice setup bind {device} --user $USER"
            ),
        ),
        Some(libc::ENOENT | libc::ENODEV) => unsupported(
            device,
            format!("{node} is not there: modprobe vfio-pci, and see: pumice doctor"),
        ),
        _ => TransportError::Io {
            device: device.to_owned(),
            what: node.to_owned(),
            source,
        },
    }
}
