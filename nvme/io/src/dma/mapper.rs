//! How regions become reachable for devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::arena::{self, Arena};
use super::error::DmaError;
use super::region::{CHUNK_LEN, Region, RegionId};
use crate::process::Birth;

/// Chunks that the arena can have: 128 GiB.
pub(super) const MAX_CHUNKS: usize = 65_536;

/// A transport, as the arena sees it: told of every region, see
/// [`register_mapper`](super::register_mapper).
///
/// # Safety
/// The memory of a region belongs to the buffers in it. An implementation makes it reachable for a device and does nothing
/// else with it: the device reads and writes a buffer only while a command that was given the buffer is in flight.
#[allow(unsafe_code, reason = "implementations promise something")]
pub unsafe trait DmaMapper: Send + Sync {
    /// Makes the whole region readable and writable for the device, and its addresses known
    /// to the transport's [`AddressTable`] before it returns. Must not take DMA memory.
    fn map(&self, region: &Region) -> Result<(), DmaError>;

    /// Takes the mapping back. The device is quiet by then.
    fn unmap(&self, region: &Region);
}

/// Keeps a mapper registered; when dropped, every region is unmapped from it.
#[must_use = "dropping the guard unmaps everything"]
pub struct MapperGuard {
    /// The domain that it is registered with, if that is not the process's arena.
    domain: Option<Arc<Arena>>,
    id: u64,
    birth: Birth,
}

impl MapperGuard {
    pub(super) fn of_process(id: u64) -> MapperGuard {
        MapperGuard {
            domain: None,
            id,
            birth: Birth::now(),
        }
    }

    pub(super) fn of_domain(arena: Arc<Arena>, id: u64) -> MapperGuard {
        MapperGuard {
            domain: Some(arena),
            ..MapperGuard::of_process(id)
        }
    }
}

impl std::fmt::Debug for MapperGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MapperGuard({})", self.id)
    }
}

impl Drop for MapperGuard {
    fn drop(&mut self) {
        match &self.domain {
            // The parent's registration is no business of a child's.
            _ if !self.birth.is_here() => {}
            Some(domain) => domain.unregister_mapper(self.id),
            None => arena::unregister_mapper(self.id),
        }
    }
}

/// At which address a device sees each chunk of the arena: one per transport.
///
/// Reading is a load from a flat array: queue pairs translate with it for every command.
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
    /// A table for the process's arena in which nothing is mapped.
    pub fn new() -> AddressTable {
        AddressTable::with(0, MAX_CHUNKS)
    }

    /// A table for these chunks.
    pub(super) fn with(first: usize, count: usize) -> AddressTable {
        AddressTable {
            first,
            chunks: (0..count).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// A chunk's place in the table.
    fn chunk(&self, region: RegionId, n: usize) -> &AtomicU64 {
        &self.chunks[region.index() - self.first + n]
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
        self.chunk(region, n).store(address | 1, Ordering::Release);
    }

    /// Forgets a region.
    pub fn clear_region(&self, region: &Region) {
        for n in 0..region.len() / CHUNK_LEN {
            self.chunk(region.id(), n).store(0, Ordering::Release);
        }
    }

    /// The device's address of byte `offset` of a region, and how many bytes from there on are
    /// certainly contiguous for the device (up to the end of the chunk). `None`: not mapped, or of
    /// another arena.
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
