//! Zeroed memory of any size, in huge pages where the kernel has some, whose allocation may fail.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Size of a huge page on x86-64.
const HUGE: usize = 2 << 20;

/// Bytes of a cache line.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const LINE: usize = 64;

/// Bytes that are zero at first. The kernel allocates them when they are accessed.
#[derive(Debug)]
pub struct Zeroed {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and nothing in it belongs to a thread.
unsafe impl Send for Zeroed {}
// SAFETY: the memory can only be read through a shared reference.
unsafe impl Sync for Zeroed {}

impl Zeroed {
    /// Allocates `len` bytes. Returns `None` where the process gets no more memory; a vector would
    /// end the process.
    pub fn new(len: usize) -> Option<Zeroed> {
        if len == 0 {
            let start = NonNull::dangling();
            return Some(Zeroed { start, len });
        }
        // The mapping has room to begin at a huge page. The rest before and behind is returned at
        // once.
        let slack = if len >= HUGE { HUGE } else { 0 };
        let mapped = len
            .checked_add(slack)
            .filter(|n| *n <= isize::MAX as usize)?;
        // SAFETY: a new private mapping, at a place of the kernel's choice, touches nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let head = if slack > 0 {
            base.addr().next_multiple_of(HUGE) - base.addr()
        } else {
            0
        };
        let start = base.wrapping_add(head);
        if slack > 0 {
            let tail = (len.next_multiple_of(4096)).min(mapped - head);
            // SAFETY: both ranges lie in the mapping just made, before and behind the part that is
            // kept, and nobody has seen them. The advice changes no contents.
            unsafe {
                if head > 0 {
                    libc::munmap(base.cast(), head);
                }
                if mapped - head > tail {
                    libc::munmap(start.wrapping_add(tail).cast(), mapped - head - tail);
                }
                libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
            }
        }
        let start = NonNull::new(start)?;
        Some(Zeroed { start, len })
    }

    /// Copies `data` to `at` past the processor's caches, for data that is not needed again soon
    /// and memory that is not in a cache: no cache line is read only to be overwritten.
    ///
    /// # Panics
    /// Panics when it does not fit.
    #[inline]
    pub fn stream(&mut self, at: usize, data: &[u8]) {
        let to = &mut self[at..at + data.len()];
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
            let head = to.as_ptr().align_offset(LINE).min(to.len());
            let (to_head, to) = to.split_at_mut(head);
            let (head, data) = data.split_at(head);
            to_head.copy_from_slice(head);
            let mut to = to.chunks_exact_mut(LINE);
            let mut lines = data.chunks_exact(LINE);
            for (to, line) in to.by_ref().zip(lines.by_ref()) {
                let to = to.as_mut_ptr().cast::<__m128i>();
                let line = line.as_ptr().cast::<__m128i>();
                // SAFETY: both are whole lines of four times 16 bytes, and the target's begins at a
                // multiple of 64; the fence after the loop orders the stores before everything that
                // follows. SSE2 is part of the architecture.
                unsafe {
                    let words = [0, 1, 2, 3].map(|n| _mm_loadu_si128(line.add(n)));
                    for (n, word) in words.into_iter().enumerate() {
                        _mm_stream_si128(to.add(n), word);
                    }
                }
            }
            to.into_remainder().copy_from_slice(lines.remainder());
            // SAFETY: orders stores, changes nothing.
            unsafe { _mm_sfence() };
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        to.copy_from_slice(data);
    }

    /// Prefetches the bytes of `[at, at + len)`, which will be needed soon.
    #[inline]
    pub fn prefetch(&self, at: usize, len: usize) {
        let end = self.len().min(at.saturating_add(len));
        super::prefetch(&self[at.min(end)..end]);
    }
}

impl Deref for Zeroed {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` are mapped and initialised (zero, or as written) for as
        // long as this value lives; for `len` 0 the pointer is only aligned, which is enough.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Zeroed {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the exclusive reference is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Zeroed {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the range is the mapping that `new` kept, and no reference to it is left.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_or_nothing() {
        assert_eq!(Zeroed::new(0).unwrap().len(), 0);
        for len in [1, 10_000, HUGE - 1, HUGE, HUGE + 4097] {
            let mut some = Zeroed::new(len).unwrap();
            assert!(some.len() == len && some.iter().all(|b| *b == 0), "{len}");
            some.fill(7);
            assert!(some.iter().all(|b| *b == 7), "{len}");
        }
        assert!(Zeroed::new(usize::MAX).is_none());
        assert!(Zeroed::new(1 << 62).is_none());
    }

    #[test]
    fn streamed_bytes_arrive_at_any_place() {
        let mut memory = Zeroed::new(1 << 16).unwrap();
        let data: Vec<u8> = (0..8192_u32).map(|n| (n % 251) as u8 + 1).collect();
        for (at, from, len) in [
            (0, 0, 4096),
            (1, 3, 4096),
            (63, 0, 1),
            (64, 1, 64),
            (100, 7, 27),
            (4095, 5, 8187),
            ((1 << 16) - 130, 0, 130),
            (5, 0, 0),
        ] {
            memory.fill(0);
            memory.stream(at, &data[from..from + len]);
            let mut want = vec![0; 1 << 16];
            want[at..at + len].copy_from_slice(&data[from..from + len]);
            assert!(*memory == *want, "{len} bytes from {from} to {at}");
        }
    }
}
