//! The arena's regions in the address space of the device.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vfio_ioctls::{VfioContainer, VfioError};

use super::sys;
use crate::dma::{
    AddressTable, CHUNK_LEN, DmaError, DmaMapper, Region, RegionId, memlock, physical_chunks,
};
use crate::transport::IovaSpace;

/// The kind of device addresses.
pub(super) enum Space {
    /// An IOMMU translates; mappings are made in the container.
    Iommu(Arc<VfioContainer>),
    /// The device uses physical addresses.
    Physical,
}

/// The mapper of one device.
pub(crate) struct DeviceSpace {
    device: String,
    space: Space,
    table: Arc<AddressTable>,
    /// Shared with the other devices in the container. Lock order: after `state`.
    iova: Arc<Mutex<IovaSpace>>,
    state: Mutex<Mapped>,
}

struct Mapped {
    regions: HashMap<RegionId, u64>,
    bytes: usize,
}

impl DeviceSpace {
    /// Makes a mapper behind an IOMMU, inside its windows, which other devices of the container
    /// share.
    pub(super) fn behind_iommu(
        device: &str,
        container: Arc<VfioContainer>,
        iova: Arc<Mutex<IovaSpace>>,
    ) -> Self {
        Self::new(device, Space::Iommu(container), iova)
    }

    /// Makes a mapper without an IOMMU.
    pub(crate) fn physical(device: &str) -> Self {
        let none = Arc::new(Mutex::new(IovaSpace::new(Vec::new())));
        Self::new(device, Space::Physical, none)
    }

    fn new(device: &str, space: Space, iova: Arc<Mutex<IovaSpace>>) -> Self {
        DeviceSpace {
            device: device.to_owned(),
            space,
            table: Arc::new(AddressTable::new()),
            iova,
            state: Mutex::new(Mapped {
                regions: HashMap::new(),
                bytes: 0,
            }),
        }
    }

    pub(crate) fn table(&self) -> &Arc<AddressTable> {
        &self.table
    }

    fn map_iommu(&self, container: &Arc<VfioContainer>, region: &Region) -> Result<(), DmaError> {
        let mut state = self.state.lock();
        let mut free = self.iova.lock();
        let iova = free
            .take(region.len() as u64, CHUNK_LEN as u64)
            .ok_or_else(|| DmaError::NoIova {
                device: self.device.clone(),
                len: region.len(),
                windows: free.describe(),
            })?;
        if let Err(error) = sys::map(container, region, iova) {
            free.give(iova);
            drop(free);
            let used = state.regions.len();
            return Err(self.explain(container, region, &error, used, state.bytes));
        }
        tracing::debug!(
            device = self.device,
            len = region.len(),
            iova = format_args!("{iova:#x}"),
            "region mapped for DMA"
        );
        state.regions.insert(region.id(), iova);
        state.bytes += region.len();
        self.table.set_region(region, iova);
        Ok(())
    }

    /// Explains the kernel's error: ENOSPC when `dma_entry_limit` is used up, ENOMEM when the
    /// memlock limit is (Linux `drivers/vfio/vfio_iommu_type1.c`).
    fn explain(
        &self,
        container: &Arc<VfioContainer>,
        region: &Region,
        error: &VfioError,
        used: usize,
        mapped: usize,
    ) -> DmaError {
        let device = self.device.clone();
        let source = match error {
            VfioError::IommuDmaMap(errno) => io::Error::from_raw_os_error(errno.errno()),
            other => io::Error::other(other.to_string()),
        };
        match source.raw_os_error() {
            Some(libc::ENOSPC) => {
                let left = sys::iommu_info(&**container)
                    .ok()
                    .and_then(|info| info.mappings_left)
                    .and_then(|n| usize::try_from(n).ok());
                DmaError::NoMappings {
                    device,
                    used,
                    limit: used + left.unwrap_or(0),
                }
            }
            Some(libc::ENOMEM | libc::EDQUOT) => DmaError::Pin {
                device,
                len: region.len(),
                mapped,
                memlock: memlock(),
                source,
            },
            _ => DmaError::Map {
                device,
                len: region.len(),
                reason: format!("VFIO_IOMMU_MAP_DMA: {source}"),
            },
        }
    }
}

// SAFETY: the regions are mapped for the device by the kernel, or their addresses looked up, and not touched here.
#[allow(unsafe_code, reason = "the contract of DmaMapper")]
unsafe impl DmaMapper for DeviceSpace {
    fn map(&self, region: &Region) -> Result<(), DmaError> {
        match &self.space {
            Space::Iommu(container) => self.map_iommu(container, region),
            Space::Physical => {
                for (n, address) in physical_chunks(region)?.into_iter().enumerate() {
                    self.table.set_chunk(region.id(), n, address);
                }
                Ok(())
            }
        }
    }

    fn unmap(&self, region: &Region) {
        self.table.clear_region(region);
        let mut state = self.state.lock();
        let Some(iova) = state.regions.remove(&region.id()) else {
            return;
        };
        state.bytes -= region.len();
        let Space::Iommu(container) = &self.space else {
            return;
        };
        match container.vfio_dma_unmap(iova, region.len()) {
            // From here on, and not before, the address is free for another device of the
            // container.
            Ok(()) => self.iova.lock().give(iova),
            // Closing the container removes the mapping in any case.
            Err(error) => {
                tracing::warn!(device = self.device, %error, iova = format_args!("{iova:#x}"), "DMA mapping not taken back");
            }
        }
    }
}
