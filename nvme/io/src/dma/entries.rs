//! The entries of a queue in memory.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::shared::DmaShared;
use crate::sys::MmioMap;

/// A queue's entries of `N` 64-bit words each, in memory that the device uses too.
///
/// The address of the memory is looked up once, so a queue finds an entry with one comparison.
pub struct Entries<const N: usize> {
    base: NonNull<[AtomicU64; N]>,
    count: u16,
    /// Keeps the memory alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is accessed as atomics only, and the owner, which is Send and Sync, keeps it
// alive.
unsafe impl<const N: usize> Send for Entries<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for Entries<N> {}

impl<const N: usize> Entries<N> {
    /// Makes `count` entries at the start of the host's memory.
    ///
    /// # Panics
    /// Panics when the memory is smaller.
    pub fn in_host(memory: Arc<DmaShared>, count: u16) -> Entries<N> {
        let base = NonNull::from(&memory.as_u64()[..usize::from(count) * N]).cast();
        Entries {
            base,
            count,
            _owner: memory,
        }
    }

    /// Makes `count` entries of the controller's memory from byte `offset` on, a multiple of 8.
    ///
    /// # Panics
    /// Panics when they do not lie inside the memory.
    pub fn in_controller(memory: &MmioMap, offset: usize, count: u16) -> Entries<N> {
        assert!(offset.is_multiple_of(8));
        let words = &memory.as_u64()[offset / 8..][..usize::from(count) * N];
        Entries {
            base: NonNull::from(words).cast(),
            count,
            _owner: Arc::new(memory.clone()),
        }
    }

    /// Number of entries.
    #[inline]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Returns the words of an entry.
    ///
    /// # Panics
    /// Panics when there is no entry of this number.
    #[inline]
    pub fn at(&self, number: u16) -> &[AtomicU64; N] {
        assert!(number < self.count, "no such queue entry");
        // SAFETY: the constructors saw `count` entries of `N` words from `base` on, 8-aligned; the
        // owner keeps them where they are, and no access of this process to them is not atomic.
        unsafe { self.base.add(usize::from(number)).as_ref() }
    }
}

impl<const N: usize> fmt::Debug for Entries<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entries({} of {} bytes)", self.count, N * 8)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn entries_are_the_words_of_their_memory() {
        let memory = Arc::new(DmaShared::zeroed(4096).unwrap());
        let entries = Entries::<8>::in_host(Arc::clone(&memory), 64);
        entries.at(63)[7].store(1, Ordering::Relaxed);
        entries.at(1)[0].store(2, Ordering::Relaxed);
        assert_eq!(memory.as_u64()[511].load(Ordering::Relaxed), 1);
        assert_eq!(memory.as_u64()[8].load(Ordering::Relaxed), 2);
        let map = MmioMap::from_words((0..20).map(|_| AtomicU64::new(0)).collect());
        let entries = Entries::<2>::in_controller(&map, 32, 8);
        entries.at(7)[1].store(3, Ordering::Relaxed);
        assert_eq!(map.as_u64()[19].load(Ordering::Relaxed), 3);
    }

    #[test]
    #[should_panic(expected = "no such queue entry")]
    fn nothing_behind_the_last_entry() {
        let entries = Entries::<8>::in_host(Arc::new(DmaShared::zeroed(4096).unwrap()), 3);
        entries.at(3);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn no_more_entries_than_memory() {
        let map = MmioMap::from_words((0..20).map(|_| AtomicU64::new(0)).collect());
        Entries::<8>::in_controller(&map, 32, 3);
    }
}
