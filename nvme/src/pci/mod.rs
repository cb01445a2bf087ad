//! PCI functions in Linux's sysfs: NVMe controllers, their drivers and IOMMU groups, and the
//! kernel's uses of their disks.
//!
//! Source: Linux `Documentation/ABI/testing/sysfs-bus-pci`, `Documentation/driver-api/vfio.rst`.

mod address;
mod config;
mod host;
mod usage;

pub use address::{ParseAddressError, PciAddress};
pub use config::{Capability, ConfigSpace, MsixCapability};
pub use host::{Function, Group, Host, PciError};
pub use usage::{Claims, Unchecked, Use};
