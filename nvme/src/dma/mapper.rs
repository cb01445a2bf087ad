//! How regions become reachable for devices.

use std::sync::atomic::{AtomicU64, Ordering};

use super::arena;
use super::error::DmaError;
use super::region::{CHUNK_LEN, Region, RegionId};

/// Chunks that the arena can have: 128 GiB.
pub(super) const MAX_CHUNKS: usize = 65_536;

/// A transport, as the arena sees it: told of every region, see
/// [`register_mapper`](super::register_mapper).
pub trait DmaMapper: Send + Sync {
    /// Makes the whole region readable and writable for the device, and its addresses known
    /// to the transport's [`AddressTable`] before it returns. Must not take DMA memory.
    fn map(&self, region: &Region) -> Result<(), DmaError>;

    /// Takes the mapping back. The device is quiet by then.
    fn unmap(&self, region: &Region);
}

/// Keeps a mapper registered; when dropped, every region is unmapped from it.
#[derive(Debug)]
#[must_use = "dropping the guard unmaps everything"]
pub struct MapperGuard(pub(super) u64);

impl Drop for MapperGuard {
    fn drop(&mut self) {
        arena::unregister_mapper(self.0);
    }
}

/// At which address a device sees each chunk of the arena: one per transport.
///
/// Reading is a load from a flat array: queue pairs translate with it for every command.
pub struct AddressTable {
    /// Address with bit 0 set, or 0 for "not mapped". Addresses are page aligned.
    chunks: Box<[AtomicU64]>,
}

impl std::fmt::Debug for AddressTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mapped = self
            .chunks
            .iter()
            .filter(|c| c.load(Ordering::Relaxed) != 0)
            .count();
        write!(f, "AddressTable({mapped} chunks mapped)")
    }
}

impl Default for AddressTable {
    fn default() -> Self {
        AddressTable::new()
    }
}

impl AddressTable {
    /// A table in which nothing is mapped.
    pub fn new() -> AddressTable {
        AddressTable {
            chunks: (0..MAX_CHUNKS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Notes that the device sees the region as one range from `address`, which is 4096-aligned.
    pub fn set_region(&self, region: &Region, address: u64) {
        for n in 0..region.len() / CHUNK_LEN {
            self.set_chunk(region.id(), n, address + (n * CHUNK_LEN) as u64);
        }
    }

    /// Notes that the device sees chunk `n` of a region at `address`, which is 4096-aligned.
    pub fn set_chunk(&self, region: RegionId, n: usize, address: u64) {
        assert!(address & 4095 == 0, "device addresses are page aligned");
        self.chunks[region.index() + n].store(address | 1, Ordering::Release);
    }

    /// Forgets a region.
    pub fn clear_region(&self, region: &Region) {
        for n in 0..region.len() / CHUNK_LEN {
            self.chunks[region.id().index() + n].store(0, Ordering::Release);
        }
    }

    /// The device's address of byte `offset` of a region, and how many bytes from there on are
    /// certainly contiguous for the device (up to the end of the chunk). `None`: not mapped.
    #[inline]
    pub fn translate(&self, region: RegionId, offset: usize) -> Option<(u64, usize)> {
        let entry = self
            .chunks
            .get(region.index() + offset / CHUNK_LEN)?
            .load(Ordering::Relaxed);
        if entry & 1 == 0 {
            return None;
        }
        let within = offset % CHUNK_LEN;
        Some(((entry - 1) + within as u64, CHUNK_LEN - within))
    }
}
