//! Memory that the driver and the device use at the same time.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::arena::DmaDomain;
use super::buf::DmaBuf;
use super::error::DmaError;
use super::region::RegionId;

/// DMA memory that is accessed only as atomics, because the device may write any of it at any time:
/// queues, PRP lists, shadow doorbells.
///
/// Words are in the machine's byte order and NVMe's are little-endian, so use `to_le` and
/// `from_le`.
pub struct DmaShared {
    /// Owns the memory. Its bytes are never borrowed as `[u8]`.
    buf: DmaBuf,
    words64: usize,
}

impl DmaShared {
    /// Takes `len` bytes of zeroes from the process's arena.
    #[cfg(test)]
    pub fn zeroed(len: usize) -> Result<DmaShared, DmaError> {
        DmaShared::zeroed_in(None, len)
    }

    /// Takes `len` bytes of zeroes, from a domain if one is named; `len` is a multiple of 8.
    ///
    /// # Panics
    /// Panics when `len` is not a multiple of 8.
    pub fn zeroed_in(domain: Option<&DmaDomain>, len: usize) -> Result<DmaShared, DmaError> {
        assert!(
            len.is_multiple_of(8),
            "shared memory is a multiple of 8 bytes"
        );
        let shared = DmaShared {
            buf: DmaBuf::new_in(domain, len)?,
            words64: len / 8,
        };
        shared.clear();
        Ok(shared)
    }

    /// The memory as 64-bit words.
    #[inline]
    pub fn as_u64(&self) -> &[AtomicU64] {
        let base = self.buf.base().cast::<AtomicU64>().as_ptr();
        // SAFETY: the block is 512-aligned, `words64 * 8` long, alive as long as `self`, and
        // shared memory: every access of this process to it goes through atomics.
        unsafe { std::slice::from_raw_parts(base, self.words64) }
    }

    /// The memory as 32-bit words.
    #[inline]
    pub fn as_u32(&self) -> &[AtomicU32] {
        let base = self.buf.base().cast::<AtomicU32>().as_ptr();
        // SAFETY: as for `as_u64`.
        unsafe { std::slice::from_raw_parts(base, self.words64 * 2) }
    }

    /// Sets every word to zero.
    pub fn clear(&self) {
        for word in self.as_u64() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The region that contains the memory.
    pub fn region(&self) -> RegionId {
        self.buf.region()
    }

    /// The memory's offset in its region, in bytes.
    pub fn region_offset(&self) -> usize {
        self.buf.region_offset()
    }
}

impl fmt::Debug for DmaShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaShared({:?})", self.buf)
    }
}
