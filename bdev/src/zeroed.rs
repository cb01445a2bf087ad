//! Zeroed memory that may be too much to ask for.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed};

/// `len` bytes of zeroes, which the kernel gives as they are touched; `None` where the process
/// gets no more, instead of the end of the process that a vector would be.
pub(crate) fn bytes(len: usize) -> Option<Box<[u8]>> {
    let layout = Layout::array::<u8>(len).ok()?;
    if len == 0 {
        return Some(Box::default());
    }
    // SAFETY: the layout's length is not zero.
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        return None;
    }
    // SAFETY: the global allocator has just given `len` initialised bytes with the layout of
    // `[u8; len]`, which belong to nobody else.
    Some(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, len)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_or_nothing() {
        assert_eq!(bytes(0).unwrap().len(), 0);
        let some = bytes(10_000).unwrap();
        assert!(some.len() == 10_000 && some.iter().all(|b| *b == 0));
        assert!(bytes(usize::MAX).is_none());
        assert!(bytes(1 << 62).is_none());
    }
}
