//! Mapped device memory: registers, doorbells, controller memory buffers.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::kick::Kick;

/// A mapped part of a device's memory, accessed only with single aligned loads and stores.
///
/// Words are in the machine's byte order and the device's are little-endian, so convert.
#[derive(Clone)]
pub struct MmioMap {
    base: NonNull<u8>,
    len: usize,
    /// Keeps the mapping alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: all accesses are atomic, and the constructor's caller promised that the memory may be
// accessed from any thread while the owner lives.
unsafe impl Send for MmioMap {}
// SAFETY: as above.
unsafe impl Sync for MmioMap {}

impl fmt::Debug for MmioMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MmioMap({:#x} bytes)", self.len)
    }
}

#[allow(clippy::len_without_is_empty, reason = "no mapping is empty")]
impl MmioMap {
    /// Wraps mapped memory.
    ///
    /// # Safety
    /// `base` is 8-aligned, `len` bytes from it stay mapped readable and writable as long as
    /// `owner` lives, and this process accesses them in no other way than by atomics.
    pub unsafe fn new(base: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> MmioMap {
        assert!(base.as_ptr().addr().is_multiple_of(8));
        MmioMap {
            base,
            len,
            _owner: owner,
        }
    }

    /// Wraps memory of this process that stands for device memory.
    pub fn from_words(words: Arc<[AtomicU64]>) -> MmioMap {
        let base = NonNull::from(&words[..]).cast::<u8>();
        let len = words.len() * 8;
        // SAFETY: a slice of atomics, 8-aligned, kept alive by the Arc, never seen otherwise.
        unsafe { MmioMap::new(base, len, Arc::new(words)) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the 32-bit word at `offset`, or `None` when that is outside or not a multiple of 4.
    #[inline]
    pub fn word32(&self, offset: usize) -> Option<&AtomicU32> {
        if !offset.is_multiple_of(4) || offset.checked_add(4)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping and aligned; alive as long as `self`.
        Some(unsafe { self.base.add(offset).cast::<AtomicU32>().as_ref() })
    }

    /// Returns the 64-bit word at `offset`, or `None` when that is outside or not a multiple of 8.
    #[inline]
    pub fn word64(&self, offset: usize) -> Option<&AtomicU64> {
        if !offset.is_multiple_of(8) || offset.checked_add(8)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping and aligned; alive as long as `self`.
        Some(unsafe { self.base.add(offset).cast::<AtomicU64>().as_ref() })
    }

    /// The whole mapping as 64-bit words.
    pub fn as_u64(&self) -> &[AtomicU64] {
        // SAFETY: aligned, mapped for `len` bytes, alive as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.cast::<AtomicU64>().as_ptr(), self.len / 8) }
    }
}

/// The way to write a doorbell.
enum Reach {
    Mapped(NonNull<AtomicU32>, MmioMap),
    Waking(NonNull<AtomicU32>, MmioMap, Arc<Kick>),
    Message(Arc<dyn Fn(u32) + Send + Sync>),
}

/// A doorbell register: written by the driver, never read.
pub struct Doorbell(Reach);

// SAFETY: the pointers are into the MmioMap beside them, which is Send, and only used for
// atomic stores; the function is Send and Sync.
unsafe impl Send for Doorbell {}
// SAFETY: as above.
unsafe impl Sync for Doorbell {}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Reach::Mapped(..) => "Doorbell(mapped)",
            Reach::Waking(..) => "Doorbell(waking)",
            Reach::Message(..) => "Doorbell(message)",
        })
    }
}

impl Doorbell {
    /// Returns the register at `offset` of mapped memory, or `None` when that is outside.
    pub fn mapped(map: &MmioMap, offset: usize) -> Option<Doorbell> {
        let word = NonNull::from(map.word32(offset)?);
        Some(Doorbell(Reach::Mapped(word, map.clone())))
    }

    /// Returns a register as [`mapped`](Self::mapped) does, for a controller thread of this process
    /// that may sleep.
    pub fn waking(map: &MmioMap, offset: usize, kick: Arc<Kick>) -> Option<Doorbell> {
        let word = NonNull::from(map.word32(offset)?);
        Some(Doorbell(Reach::Waking(word, map.clone(), kick)))
    }

    /// Makes a register that is written by messages: `send` is called with each value.
    pub fn message(send: Arc<dyn Fn(u32) + Send + Sync>) -> Doorbell {
        Doorbell(Reach::Message(send))
    }

    /// Writes the register. All earlier stores to memory are visible to the device before it.
    #[inline]
    pub fn ring(&self, value: u32) {
        match &self.0 {
            Reach::Mapped(word, _map) => {
                device_write_barrier();
                // SAFETY: `_map` keeps the memory mapped.
                unsafe { word.as_ref() }.store(value.to_le(), Ordering::Release);
            }
            Reach::Waking(word, _map, kick) => {
                // SAFETY: `_map` keeps the memory alive.
                unsafe { word.as_ref() }.store(value.to_le(), Ordering::Release);
                kick.wake();
            }
            Reach::Message(send) => send(value),
        }
    }
}

/// Orders stores to memory before a store to a device. On x86-64 stores to uncached memory are
/// ordered already; a weakly ordered machine needs an outer-shareable barrier.
#[inline(always)]
fn device_write_barrier() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier instruction has no operands and changes no state.
    unsafe {
        std::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "aarch64"))]
    fence(Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_outside_are_refused() {
        let map = MmioMap::from_words((0..4).map(|_| AtomicU64::new(0)).collect());
        assert_eq!(map.len(), 32);
        assert!(map.word32(28).is_some());
        assert!(map.word32(32).is_none());
        assert!(map.word32(2).is_none());
        assert!(map.word64(28).is_none());
        assert!(map.word32(usize::MAX - 3).is_none());
        let bell = Doorbell::mapped(&map, 8).unwrap();
        bell.ring(7);
        assert_eq!(map.word32(8).unwrap().load(Ordering::Relaxed), 7u32.to_le());
    }
}
