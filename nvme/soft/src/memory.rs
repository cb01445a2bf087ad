//! The host's memory as the soft controller accesses it: by device address.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use parking_lot::RwLock;
use pumice_io::dma::{AddressTable, CHUNK_LEN, DmaError, DmaMapper, Region};
use pumice_io::sys::{Absent, DeviceMapping};

/// Device address of the arena's chunk 0. It is not 0, so that a null address is an error.
pub(super) const IOVA_BASE: u64 = 0x10_0000_0000;
/// Number of chunks that the arena can have.
const MAX_CHUNKS: usize = 65_536;

/// The mapper of a soft controller. It maps every chunk of the arena at a fixed device address.
pub(super) struct DeviceMemory {
    pub table: Arc<AddressTable>,
    /// The chunks by number; null where nothing is mapped. A region outlives every mapper.
    chunks: Box<[AtomicPtr<u8>]>,
    /// The controller memory buffer and the device address that the host has given it.
    pub buffer: Arc<[AtomicU64]>,
    buffer_base: RwLock<Option<u64>>,
    /// Memory of another process, when the controller is served to one.
    foreign: RwLock<Foreign>,
    has_foreign: AtomicBool,
}

#[derive(Default)]
struct Foreign {
    mapped: BTreeMap<u64, ForeignRegion>,
    /// Mappings that were removed: ordinary memory now, kept for those who still hold a reference.
    retired: Vec<Arc<DeviceMapping>>,
}

struct ForeignRegion {
    len: usize,
    mapping: Arc<DeviceMapping>,
}

impl DeviceMemory {
    pub fn new(buffer_len: usize) -> DeviceMemory {
        DeviceMemory {
            table: Arc::new(AddressTable::new()),
            chunks: (0..MAX_CHUNKS)
                .map(|_| AtomicPtr::new(std::ptr::null_mut()))
                .collect(),
            buffer: (0..buffer_len / 8).map(|_| AtomicU64::new(0)).collect(),
            buffer_base: RwLock::new(None),
            foreign: RwLock::new(Foreign::default()),
            has_foreign: AtomicBool::new(false),
        }
    }

    pub fn set_buffer_base(&self, base: Option<u64>) {
        *self.buffer_base.write() = base;
    }

    /// Maps `len` bytes at `offset` of another process's file at `address`. The caller has made
    /// sure that they lie inside the file.
    pub fn add_foreign(
        &self,
        address: u64,
        len: u64,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mapping = DeviceMapping::new(file, offset, len, Absent::Zeroes)?;
        let mut foreign = self.foreign.write();
        foreign
            .mapped
            .insert(address, ForeignRegion { len, mapping });
        self.has_foreign.store(true, Ordering::Release);
        Ok(())
    }

    /// Removes the mapping at `address`: from now on the controller does not access the file.
    pub fn remove_foreign(&self, address: u64) {
        let mut foreign = self.foreign.write();
        let Some(region) = foreign.mapped.remove(&address) else {
            return;
        };
        if let Err(error) = region.mapping.retire() {
            tracing::error!(%error, "memory of a vfio-user client stays mapped");
        }
        foreign.retired.push(region.mapping);
    }

    /// Releases the address ranges of removed mappings. The controller is disabled.
    pub fn forget_retired(&self) {
        self.foreign.write().retired.clear();
    }

    /// Number of address ranges that wait for [`forget_retired`](Self::forget_retired).
    pub fn retired_count(&self) -> usize {
        self.foreign.read().retired.len()
    }

    fn find_foreign(&self, address: u64) -> Option<(NonNull<u8>, usize)> {
        let foreign = self.foreign.read();
        let (start, region) = foreign.mapped.range(..=address).next_back()?;
        let at = usize::try_from(address - start).ok()?;
        if at >= region.len {
            return None;
        }
        // SAFETY: at < len, inside the mapping, which stays mapped (if only to ordinary memory)
        // until the controller is disabled.
        Some((unsafe { region.mapping.start().add(at) }, region.len - at))
    }

    /// Returns the memory at a device address and how much of it is contiguous from there.
    fn find(&self, address: u64) -> Option<(NonNull<u8>, usize)> {
        if self.has_foreign.load(Ordering::Acquire)
            && let Some(found) = self.find_foreign(address)
        {
            return Some(found);
        }
        if address >= IOVA_BASE {
            let at = usize::try_from(address - IOVA_BASE).ok()?;
            if let Some(chunk) = self.chunks.get(at / CHUNK_LEN) {
                let base = NonNull::new(chunk.load(Ordering::Acquire))?;
                let offset = at % CHUNK_LEN;
                // SAFETY: a mapped chunk has CHUNK_LEN bytes and offset is below that.
                return Some((unsafe { base.add(offset) }, CHUNK_LEN - offset));
            }
        }
        let base = (*self.buffer_base.read())?;
        let at = usize::try_from(address.checked_sub(base)?).ok()?;
        let len = self.buffer.len() * 8;
        if at >= len {
            return None;
        }
        let start = NonNull::new(self.buffer.as_ptr().cast_mut().cast::<u8>())?;
        // SAFETY: at < len, inside the slice of atomics, whose bytes may be written through a
        // shared reference.
        Some((unsafe { start.add(at) }, len - at))
    }

    /// Returns `count` words at an 8-aligned address, if they are contiguous.
    pub fn words(&self, address: u64, count: usize) -> Option<&[AtomicU64]> {
        let (at, contiguous) = self.find(address)?;
        if !address.is_multiple_of(8) || count * 8 > contiguous {
            return None;
        }
        // SAFETY: `count * 8` bytes are mapped, 8-aligned, for the life of the process (regions) or
        // as long as `self` (buffer), and are shared memory that both sides access as atomics.
        Some(unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>().as_ptr(), count) })
    }

    /// Copies from the host's memory. Returns false when some of it is not mapped.
    pub fn read(&self, mut address: u64, mut to: &mut [u8]) -> bool {
        while !to.is_empty() {
            let Some((from, contiguous)) = self.find(address) else {
                return false;
            };
            let n = to.len().min(contiguous);
            // SAFETY: n bytes are mapped at `from`, `to` has n bytes, and `to` is ours alone.
            // The host's driver owns the buffer of a command in flight and does not touch it,
            // so nobody writes the source meanwhile; its bytes are any bytes.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), n) };
            address += n as u64;
            to = &mut to[n..];
        }
        true
    }

    /// Copies into the host's memory. Returns false when some of it is not mapped.
    pub fn write(&self, mut address: u64, mut from: &[u8]) -> bool {
        while !from.is_empty() {
            let Some((to, contiguous)) = self.find(address) else {
                return false;
            };
            let n = from.len().min(contiguous);
            // SAFETY: n bytes are mapped writable at `to`; the driver holds the buffer of a
            // command in flight without touching it until the completion, which is stored
            // (Release) after this.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), n) };
            address += n as u64;
            from = &from[n..];
        }
        true
    }
}

// SAFETY: the regions' bytes are read and written only for commands in flight, at the addresses in them.
unsafe impl DmaMapper for DeviceMemory {
    fn map(&self, region: &Region) -> Result<(), DmaError> {
        let first = region.id().index();
        for n in 0..region.len() / CHUNK_LEN {
            let ptr = region.ptr(n * CHUNK_LEN).as_ptr();
            self.chunks[first + n].store(ptr, Ordering::Release);
        }
        self.table
            .set_region(region, IOVA_BASE + (first * CHUNK_LEN) as u64);
        Ok(())
    }

    fn unmap(&self, region: &Region) {
        self.table.clear_region(region);
        for n in 0..region.len() / CHUNK_LEN {
            self.chunks[region.id().index() + n].store(std::ptr::null_mut(), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const BASE: u64 = 1 << 40;

    #[test]
    fn words_lie_inside_what_is_mapped() {
        let memory = DeviceMemory::new(4096);
        memory.set_buffer_base(Some(BASE));
        let words = |at, count| memory.words(BASE + at, count).map(<[_]>::len);
        assert_eq!(words(0, 512), Some(512));
        assert_eq!(words(4088, 1), Some(1));
        for (at, count) in [(0, 513), (4088, 2), (4, 1), (4096, 1)] {
            assert_eq!(words(at, count), None, "{count} words at {at}");
        }
        assert!(memory.words(BASE - 8, 1).is_none());
    }

    #[test]
    fn memory_of_another_process_ends_where_it_ends() {
        let memory = DeviceMemory::new(0);
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        memory.add_foreign(BASE, 8192, file.as_fd(), 0).unwrap();
        let room = |at| memory.find(BASE + at).map(|(_, room)| room);
        assert_eq!([0, 8191].map(room), [Some(8192), Some(1)]);
        assert_eq!([8192, 8193, 1 << 20].map(room), [None; 3]);
        assert!(memory.find(BASE - 1).is_none());
        assert!(memory.write(BASE + 8190, &[1, 2]));
        assert!(!memory.write(BASE + 8191, &[1, 2]));
        let mut byte = [0; 2];
        assert!(memory.read(BASE + 8190, &mut byte));
        assert_eq!(byte, [1, 1], "what fitted was written");
    }
}
