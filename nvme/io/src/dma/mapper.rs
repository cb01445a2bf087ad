//! Mappers, which make regions accessible to devices.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::DmaError;
use super::region::{CHUNK_LEN, Region, RegionId};
use crate::process::Birth;

/// Most chunks of the arena: 128 GiB.
pub(super) const MAX_CHUNKS: usize = 65_536;

/// The arena's interface to a transport, which is told of every region; see
/// [`register_mapper`](super::register_mapper).
///
/// # Safety
/// The memory of a region belongs to the buffers in it. An implementation makes it accessible to a
/// device and does nothing else with it: the device reads and writes a buffer only while a command
/// that has the buffer is in flight.
#[allow(unsafe_code, reason = "implementations promise something")]
pub unsafe trait DmaMapper: Send + Sync {
    /// Makes the whole region readable and writable for the device, and enters its addresses into
    /// the transport's [`AddressTable`] before it returns. Must not take DMA memory.
    fn map(&self, region: &Region) -> Result<(), DmaError>;

    /// Removes the mapping. The device no longer accesses it.
    fn unmap(&self, region: &Region);
}

/// Keeps a mapper registered. When it is dropped, every region is unmapped from the mapper.
#[must_use = "dropping the guard unmaps everything"]
pub struct MapperGuard {
    unregister: Box<dyn Fn() + Send + Sync>,
    birth: Birth,
}

impl MapperGuard {
    /// Makes the guard of a registration that `unregister` ends.
    pub(super) fn new(unregister: impl Fn() + Send + Sync + 'static) -> MapperGuard {
        MapperGuard {
            unregister: Box::new(unregister),
            birth: Birth::now(),
        }
    }
}

impl std::fmt::Debug for MapperGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MapperGuard")
    }
}

impl Drop for MapperGuard {
    fn drop(&mut self) {
        // In a forked child the registration belongs to the parent.
        if self.birth.is_here() {
            (self.unregister)();
        }
    }
}

/// The device's address of each chunk of the arena. Each transport has one.
///
/// Reading is a load from a flat array, because queue pairs translate addresses for every command.
pub struct AddressTable {
    /// The number of the first chunk in it.
    first: usize,
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
    /// Makes a table for the process's arena in which nothing is mapped.
    pub fn new() -> AddressTable {
        AddressTable::with(0, MAX_CHUNKS)
    }

    /// Makes a table for these chunks.
    pub(super) fn with(first: usize, count: usize) -> AddressTable {
        AddressTable {
            first,
            chunks: (0..count).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Returns a chunk's entry.
    fn chunk(&self, region: RegionId, n: usize) -> &AtomicU64 {
        &self.chunks[region.index() - self.first + n]
    }

    /// Records that the device sees the region as one range from `address`, which is 4096-aligned.
    pub fn set_region(&self, region: &Region, address: u64) {
        for n in 0..region.len() / CHUNK_LEN {
            self.set_chunk(region.id(), n, address + (n * CHUNK_LEN) as u64);
        }
    }

    /// Records that the device sees chunk `n` of a region at `address`, which is 4096-aligned.
    pub fn set_chunk(&self, region: RegionId, n: usize, address: u64) {
        assert!(address & 4095 == 0, "device addresses are page aligned");
        self.chunk(region, n).store(address | 1, Ordering::Release);
    }

    /// Removes a region's entries.
    pub fn clear_region(&self, region: &Region) {
        for n in 0..region.len() / CHUNK_LEN {
            self.chunk(region.id(), n).store(0, Ordering::Release);
        }
    }

    /// Returns the device's address of byte `offset` of a region, and how many bytes from there on
    /// are contiguous for the device (up to the end of the chunk). Returns `None` when the region
    /// is not mapped, or belongs to another arena.
    #[inline]
    pub fn translate(&self, region: RegionId, offset: usize) -> Option<(u64, usize)> {
        let entry = self
            .chunks
            .get(region.index().checked_sub(self.first)? + offset / CHUNK_LEN)?
            .load(Ordering::Relaxed);
        if entry & 1 == 0 {
            return None;
        }
        let within = offset % CHUNK_LEN;
        Some(((entry - 1) + within as u64, CHUNK_LEN - within))
    }
}
