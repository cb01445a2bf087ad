//! Memory that one thread appends to while others read what it contains already.
//!
//! A [`FillBuf`] is a DMA buffer with a fill mark. Bytes below the mark never change again and may
//! be read, or passed to a device, by anybody. Bytes above it belong to the one [`FillWriter`]. So
//! an append is a `memcpy` and an atomic store, and a full buffer becomes page cache and the source
//! of a device write without a copy.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pumice_bdev::{DmaBuf, DmaSlice};

/// A buffer that grows by appending; see the module.
pub(crate) struct FillBuf {
    /// The whole buffer. It is only ever dereferenced through sub-slices below the mark.
    whole: DmaSlice,
    ptr: NonNull<u8>,
    cap: usize,
    filled: AtomicUsize,
    writer_taken: AtomicBool,
}

// SAFETY: `ptr` points into memory that `whole` keeps alive. Bytes below `filled` are immutable
// (published by a release store, read after an acquire load); bytes above it are touched only by
// the `FillWriter`, of which there is one.
unsafe impl Send for FillBuf {}
// SAFETY: as for `Send`.
unsafe impl Sync for FillBuf {}

impl FillBuf {
    /// Makes a buffer whose first `filled` bytes are those of `buf`.
    pub fn from_buf(mut buf: DmaBuf, filled: usize) -> FillBuf {
        let cap = buf.len();
        assert!(filled <= cap, "filled {filled} of {cap}");
        let ptr = NonNull::new(buf.as_mut_ptr()).expect("a buffer has an address");
        FillBuf {
            whole: buf.freeze(),
            ptr,
            cap,
            filled: AtomicUsize::new(filled),
            writer_taken: AtomicBool::new(false),
        }
    }

    /// Returns the capacity in bytes.
    pub fn cap(&self) -> usize {
        self.cap
    }

    /// Number of bytes that can be read.
    #[inline]
    pub fn filled(&self) -> usize {
        self.filled.load(Ordering::Acquire)
    }

    /// Returns the bytes of `range`, if all of them are below the mark.
    #[inline]
    pub fn get(&self, range: Range<usize>) -> Option<&[u8]> {
        if range.start > range.end || range.end > self.filled() {
            return None;
        }
        // SAFETY: the range lies below the mark, so within the buffer, initialised and immutable
        // for as long as `self` lives, which keeps the memory alive.
        Some(unsafe {
            std::slice::from_raw_parts(self.ptr.as_ptr().add(range.start), range.end - range.start)
        })
    }

    /// Returns the bytes of `range`, for a device to read.
    ///
    /// # Panics
    /// Panics when a byte of the range is not filled yet.
    pub fn dma(&self, range: Range<usize>) -> DmaSlice {
        assert!(range.end <= self.filled(), "{range:?} is not filled");
        self.whole.slice(range)
    }

    /// Returns the writer, or `None` if it was taken before.
    pub fn writer(self: &Arc<Self>) -> Option<FillWriter> {
        if self.writer_taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(FillWriter {
            buf: Arc::clone(self),
            filled: self.filled(),
        })
    }
}

impl std::fmt::Debug for FillBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FillBuf({} of {})", self.filled(), self.cap)
    }
}

/// The right to append to a [`FillBuf`]. It cannot be cloned: each buffer has one.
pub(crate) struct FillWriter {
    buf: Arc<FillBuf>,
    filled: usize,
}

impl FillWriter {
    /// Number of bytes that still fit.
    #[inline]
    pub fn room(&self) -> usize {
        self.buf.cap - self.filled
    }

    /// Appends `bytes` and publishes them.
    ///
    /// # Panics
    /// Panics when they do not fit.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room(), "a full buffer was pushed to");
        // SAFETY: the destination lies in the buffer and above the mark, where only this writer,
        // borrowed exclusively, reads or writes; `bytes` cannot overlap it, since no reference to
        // memory above the mark is ever made.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.buf.ptr.as_ptr().add(self.filled),
                bytes.len(),
            );
        }
        self.filled += bytes.len();
        self.buf.filled.store(self.filled, Ordering::Release);
    }

    /// Appends `n` zeroes.
    ///
    /// # Panics
    /// Panics when they do not fit.
    pub fn push_zeroes(&mut self, n: usize) {
        assert!(n <= self.room(), "a full buffer was pushed to");
        // SAFETY: as in `push`.
        unsafe {
            std::ptr::write_bytes(self.buf.ptr.as_ptr().add(self.filled), 0, n);
        }
        self.filled += n;
        self.buf.filled.store(self.filled, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_is_read_and_no_more() {
        let buf = Arc::new(FillBuf::from_buf(DmaBuf::new(4096).unwrap(), 0));
        let mut w = buf.writer().unwrap();
        assert!(buf.writer().is_none());
        w.push(b"hello");
        w.push_zeroes(3);
        assert_eq!(buf.get(0..8).unwrap(), b"hello\0\0\0");
        assert!(buf.get(0..9).is_none());
        assert_eq!(&buf.dma(1..4)[..], b"ell");
        assert_eq!(w.room(), 4096 - 8);
    }

    #[test]
    #[should_panic(expected = "full buffer")]
    fn it_does_not_overflow() {
        let buf = Arc::new(FillBuf::from_buf(DmaBuf::new(512).unwrap(), 0));
        let mut w = buf.writer().unwrap();
        w.push_zeroes(510);
        w.push(b"abc");
    }

    #[test]
    fn readers_see_only_finished_bytes() {
        let buf = Arc::new(FillBuf::from_buf(DmaBuf::new(1 << 16).unwrap(), 0));
        let mut w = buf.writer().unwrap();
        let reader = {
            let buf = Arc::clone(&buf);
            std::thread::spawn(move || {
                loop {
                    let n = buf.filled();
                    assert!(buf.get(0..n).unwrap().iter().all(|b| *b == 7));
                    if n == 1 << 16 {
                        return;
                    }
                }
            })
        };
        for _ in 0..(1 << 16) / 64 {
            w.push(&[7; 64]);
        }
        reader.join().unwrap();
    }
}
