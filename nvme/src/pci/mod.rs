//! PCI functions as Linux's sysfs shows them: which NVMe controllers there are, who drives them,
//! their IOMMU groups, and whether the kernel uses what is on them.
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
