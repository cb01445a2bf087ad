//! PCI functions, drivers and IOMMU groups in sysfs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Claims, PciAddress, Use, usage};

/// An error of sysfs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// There is no such function.
    #[error(
        "{0}: no such PCI function (lspci -D lists them); if it was removed, echo 1 > /sys/bus/pci/rescan"
    )]
    NoFunction(PciAddress),
    /// The function is not an NVMe controller.
    #[error("{address}: class {class:#08x} is not an NVMe controller (0x010802)")]
    NotNvme {
        /// Address of the function.
        address: PciAddress,
        /// Class code of the function.
        class: u32,
    },
    /// The driver did not take the function.
    #[error(
        "{address}: the kernel's driver {driver} did not take the function (now: {now}); dmesg tells why"
    )]
    NotBound {
        /// Address of the function.
        address: PciAddress,
        /// The requested driver.
        driver: String,
        /// The driver that has the function instead.
        now: String,
    },
}

/// A machine, identified by the directory that is its `/`.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Host::new()
    }
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Function {
    /// Address of the function.
    pub address: PciAddress,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Class code, such as `0x010802`.
    pub class: u32,
    /// The kernel driver that the function is bound to.
    pub driver: Option<String>,
    /// The driver that the function is reserved for (`driver_override`).
    pub driver_override: Option<String>,
    /// The function's IOMMU group.
    pub group: Option<Group>,
    /// NUMA node, on a machine with several.
    pub numa_node: Option<u32>,
    /// Block devices that the kernel made for it, such as `nvme0n1`.
    pub block_devices: Vec<String>,
}

/// The IOMMU group of a function: the smallest set of functions that can be given to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Group {
    /// Number of the group. The device node is `/dev/vfio/<id>`, or `/dev/vfio/noiommu-<id>` in a
    /// no-IOMMU group.
    pub id: u32,
    /// Whether `vfio` made the group without an IOMMU, so that the device can access all memory.
    pub no_iommu: bool,
    /// The functions in the group, this one included.
    pub members: Vec<PciAddress>,
}

impl Group {
    /// The group's device node.
    pub fn node(&self) -> String {
        let prefix = if self.no_iommu { "noiommu-" } else { "" };
        format!("/dev/vfio/{prefix}{}", self.id)
    }
}

/// Class code of NVMe controllers without the programming interface (PCI Code and ID Assignment:
/// 01h mass storage, 08h non-volatile memory).
const CLASS_NVM: u32 = 0x0001_0800;

impl Function {
    /// Whether the class code says NVM Express.
    pub fn is_nvme(&self) -> bool {
        self.class & 0xffff_ff00 == CLASS_NVM
    }
}

impl Host {
    /// Returns this machine.
    pub fn new() -> Host {
        Host::at("/")
    }

    /// Returns the machine whose files lie below `root`, for tests and for containers that mount
    /// the host's `/sys` elsewhere.
    pub fn at(root: impl Into<PathBuf>) -> Host {
        Host { root: root.into() }
    }

    /// Whether this is the machine that the process runs on, judged by its root.
    pub fn is_this_machine(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Returns an absolute path of the machine, below its root.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// Returns a file's text without white space around it, or `None` when the file does not exist.
    pub fn read(&self, absolute: &str) -> Result<Option<String>, PciError> {
        let path = self.path(absolute);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PciError::Io { path, source }),
        }
    }

    /// Writes a kernel attribute.
    pub fn write(&self, absolute: &str, text: &str) -> Result<(), PciError> {
        let path = self.path(absolute);
        fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|source| PciError::Io { path, source })
    }

    fn function_dir(address: PciAddress) -> String {
        format!("/sys/bus/pci/devices/{address}")
    }

    /// Returns the last component of the path that a symbolic link points to.
    fn link(&self, absolute: &str) -> Option<String> {
        let target = fs::read_link(self.path(absolute)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// Returns the names in a directory, in order, or none when it does not exist.
    pub fn names(&self, absolute: &str) -> Vec<String> {
        names(&self.path(absolute))
    }

    /// Returns every NVMe controller, by address.
    pub fn nvme_functions(&self) -> Result<Vec<Function>, PciError> {
        let mut found = Vec::new();
        for name in self.names("/sys/bus/pci/devices") {
            let Ok(address) = name.parse() else { continue };
            match self.function(address) {
                Ok(function) if function.is_nvme() => found.push(function),
                // The function may be removed while the list is read.
                Ok(_) | Err(PciError::NoFunction(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }

    /// Returns the function at an address, of any class.
    pub fn function(&self, address: PciAddress) -> Result<Function, PciError> {
        let dir = Self::function_dir(address);
        let number = |name: &str| -> Result<Option<u32>, PciError> {
            let text = self.read(&format!("{dir}/{name}"))?;
            Ok(text.and_then(|t| u32::from_str_radix(t.trim_start_matches("0x"), 16).ok()))
        };
        let Some(class) = number("class")? else {
            return Err(PciError::NoFunction(address));
        };
        let id = |value: Option<u32>| u16::try_from(value.unwrap_or(0)).unwrap_or(0);
        let driver_override = self
            .read(&format!("{dir}/driver_override"))?
            .filter(|t| !t.is_empty() && t != "(null)");
        let numa_node = self
            .read(&format!("{dir}/numa_node"))?
            .and_then(|t| t.parse().ok());
        Ok(Function {
            address,
            vendor: id(number("vendor")?),
            device: id(number("device")?),
            class,
            driver: self.link(&format!("{dir}/driver")),
            driver_override,
            group: self.group(&dir)?,
            numa_node,
            block_devices: usage::block_devices(self, &dir),
        })
    }

    fn group(&self, dir: &str) -> Result<Option<Group>, PciError> {
        let link = format!("{dir}/iommu_group");
        let Some(id) = self.link(&link).and_then(|n| n.parse().ok()) else {
            return Ok(None);
        };
        let name = self.read(&format!("{link}/name"))?;
        let members = self
            .names(&format!("{link}/devices"))
            .iter()
            .filter_map(|n| n.parse().ok())
            .collect();
        Ok(Some(Group {
            id,
            no_iommu: name.as_deref() == Some("vfio-noiommu"),
            members,
        }))
    }

    /// Returns the NVMe controller at an address.
    pub fn nvme_function(&self, address: PciAddress) -> Result<Function, PciError> {
        let function = self.function(address)?;
        if function.is_nvme() {
            Ok(function)
        } else {
            Err(PciError::NotNvme {
                address,
                class: function.class,
            })
        }
    }

    /// Returns the machine's uses of the function's block devices: mounts, swap, volumes on top,
    /// loop devices and targets, and processes that have them open; and which of these could not be
    /// determined. An empty list says that there is certainly no use.
    pub fn uses(&self, function: &Function) -> Vec<Use> {
        self.claim(function).err().unwrap_or_default()
    }

    /// Claims the function's disks, so that nobody begins to use them while the driver changes.
    ///
    /// # Errors
    /// Returns the uses that [`Host::uses`] finds.
    pub fn claim(&self, function: &Function) -> Result<Claims, Vec<Use>> {
        let dir = Self::function_dir(function.address);
        usage::claim(self, &dir, &function.block_devices)
    }

    /// Returns other functions of the same group that a kernel driver uses: while there are any,
    /// VFIO refuses the group. Bridges and ports may keep their drivers.
    pub fn group_rivals(&self, function: &Function) -> Vec<(PciAddress, String)> {
        let members = function.group.iter().flat_map(|g| &g.members);
        members
            .filter(|a| **a != function.address)
            .filter_map(|a| Some((*a, self.function(*a).ok()?.driver?)))
            .filter(|(_, driver)| !is_harmless_driver(driver))
            .collect()
    }

    /// Returns the processes that have a file of this path open, with pid and name. An empty list
    /// says that `/proc` shows none to this process.
    pub fn openers(&self, path: &str) -> Vec<(u32, String)> {
        usage::openers(self, |target| target == path)
            .into_iter()
            .map(|opener| (opener.pid, opener.name))
            .collect()
    }

    /// Unbinds the function from its driver and leaves it without one. Blocks while a process has
    /// it open through VFIO.
    pub fn unbind(&self, address: PciAddress) -> Result<(), PciError> {
        let dir = Self::function_dir(address);
        self.write(&format!("{dir}/driver_override"), "\n")?;
        if self.function(address)?.driver.is_some() {
            self.write(&format!("{dir}/driver/unbind"), &address.to_string())?;
        }
        Ok(())
    }

    /// Binds the function to `driver` (`None`: to whichever kernel driver matches it). Blocks until
    /// the kernel has unbound the old driver and probed the new one.
    pub fn bind(&self, address: PciAddress, driver: Option<&str>) -> Result<(), PciError> {
        let dir = Self::function_dir(address);
        // A newline alone clears it (sysfs-bus-pci, driver_override).
        self.write(&format!("{dir}/driver_override"), driver.unwrap_or("\n"))?;
        let current = self.function(address)?.driver;
        if let (Some(wanted), Some(now)) = (driver, &current)
            && wanted == now
        {
            return Ok(());
        }
        if current.is_some() {
            self.write(&format!("{dir}/driver/unbind"), &address.to_string())?;
        }
        self.write("/sys/bus/pci/drivers_probe", &address.to_string())?;
        let now = self.function(address)?.driver;
        match driver {
            Some(wanted) if now.as_deref() != Some(wanted) => Err(PciError::NotBound {
                address,
                driver: wanted.to_owned(),
                now: now.unwrap_or_else(|| "no driver".to_owned()),
            }),
            _ => Ok(()),
        }
    }
}

fn is_harmless_driver(driver: &str) -> bool {
    matches!(
        driver,
        "vfio-pci" | "pcieport" | "pci-stub" | "shpchp" | "uio_pci_generic"
    )
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
