//! Hints to the processor.
#![cfg_attr(all(target_arch = "x86_64", not(miri)), allow(unsafe_code))]

/// Length of a line of the processor's cache in bytes.
const LINE: usize = 64;

/// Asks for bytes that the caller is about to read, all of their cache lines at once. Where they come from memory, they come
/// side by side in place of one after another. Does not wait.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for line in bytes.chunks(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing that the program sees. SSE is part of the architecture.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = bytes;
}
