//! Owned and shared buffers.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use super::arena::{self, Block, DmaDomain};
use super::buddy::class_len;
use super::error::DmaError;
use super::region::RegionId;

/// Owned bytes that every device may reach.
///
/// Aligned to 4096 bytes, or, when shorter than 4096, to its size class (512 at the least).
/// Its device addresses are contiguous within each 2 MiB and, where an IOMMU translates,
/// altogether. Taking and dropping one costs tens of nanoseconds; the contents of a new one
/// are unspecified.
pub struct DmaBuf {
    block: Block,
    len: usize,
}

// SAFETY: the buffer is the sole title to its block; the bytes belong to no thread.
unsafe impl Send for DmaBuf {}
// SAFETY: a shared `DmaBuf` gives shared access to its bytes only.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// Takes a buffer of `len` bytes; the contents are unspecified, but initialised.
    /// Blocks only when the arena has to grow.
    #[inline]
    pub fn new(len: usize) -> Result<DmaBuf, DmaError> {
        Ok(DmaBuf {
            block: arena::take(len)?,
            len,
        })
    }

    /// As [`new`](Self::new), from a domain's memory if one is named.
    pub fn new_in(domain: Option<&DmaDomain>, len: usize) -> Result<DmaBuf, DmaError> {
        let block = match domain {
            Some(domain) => domain.take(len)?,
            None => arena::take(len)?,
        };
        Ok(DmaBuf { block, len })
    }

    /// Takes a buffer of `len` zeroes.
    pub fn zeroed(len: usize) -> Result<DmaBuf, DmaError> {
        let mut buf = DmaBuf::new(len)?;
        buf.fill(0);
        Ok(buf)
    }

    /// Takes a buffer and copies `bytes` into it.
    pub fn copy_from(bytes: &[u8]) -> Result<DmaBuf, DmaError> {
        let mut buf = DmaBuf::new(bytes.len())?;
        buf.copy_from_slice(bytes);
        Ok(buf)
    }

    /// Length in bytes, as asked for.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes that the buffer could have without another allocation.
    pub fn capacity(&self) -> usize {
        class_len(usize::from(self.block.class))
    }

    /// Sets the length within the capacity; what lies between the old and a longer new length
    /// is unspecified.
    ///
    /// # Panics
    /// When `len` is 0 or above [`capacity`](Self::capacity).
    pub fn set_len(&mut self, len: usize) {
        assert!(len > 0 && len <= self.capacity(), "buffer length {len}");
        self.len = len;
    }

    /// Makes the bytes immutable and shareable. Costs one small heap allocation.
    pub fn freeze(self) -> DmaSlice {
        let len = self.len;
        DmaSlice {
            buf: Arc::new(self),
            start: 0,
            len,
        }
    }

    /// Where the buffer starts in this process, with the right to use all of it by raw access:
    /// no reference to its bytes is made, which would promise that they do not change.
    #[inline]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.block.ptr
    }

    /// The region that the buffer lies in.
    #[inline]
    pub fn region(&self) -> RegionId {
        self.block.region
    }

    /// Where the buffer starts in its region, in bytes.
    #[inline]
    pub fn region_offset(&self) -> usize {
        self.block.offset as usize
    }
}

impl Drop for DmaBuf {
    #[inline]
    fn drop(&mut self) {
        arena::give(self.block);
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the block is mapped for ever, initialised (memfd memory starts as zeroes),
        // at least `len` long, and borrowed from `self`, its only owner.
        unsafe { std::slice::from_raw_parts(self.block.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for DmaBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.block.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DmaBuf({} bytes at {}+{:#x})",
            self.len, self.block.region.0, self.block.offset
        )
    }
}

/// A shared, immutable view of a [`DmaBuf`] or of a part of one; cheap to clone.
#[derive(Clone)]
pub struct DmaSlice {
    buf: Arc<DmaBuf>,
    start: usize,
    len: usize,
}

impl DmaSlice {
    /// Length of the view, in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the view has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of this view.
    ///
    /// # Panics
    /// When the range does not lie in the view.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> DmaSlice {
        assert!(range.start <= range.end && range.end <= self.len);
        DmaSlice {
            buf: Arc::clone(&self.buf),
            start: self.start + range.start,
            len: range.end - range.start,
        }
    }

    /// The whole underlying buffer back, if nobody else holds a view of it; else `self`.
    pub fn try_into_buf(self) -> Result<DmaBuf, DmaSlice> {
        let DmaSlice { buf, start, len } = self;
        Arc::try_unwrap(buf).map_err(|buf| DmaSlice { buf, start, len })
    }

    /// The region that the view lies in.
    #[inline]
    pub fn region(&self) -> RegionId {
        self.buf.region()
    }

    /// Where the view starts in its region, in bytes.
    #[inline]
    pub fn region_offset(&self) -> usize {
        self.buf.region_offset() + self.start
    }
}

impl From<DmaBuf> for DmaSlice {
    fn from(buf: DmaBuf) -> DmaSlice {
        buf.freeze()
    }
}

impl Deref for DmaSlice {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // Not by way of a reference to the whole buffer: its maker may still write what no view
        // covers (an append buffer whose first blocks are already on their way).
        // SAFETY: the view lies in the buffer, which `self.buf` keeps alive and initialised, and
        // nobody writes to bytes that a view covers.
        unsafe {
            let base = self.buf.block.ptr.as_ptr();
            std::slice::from_raw_parts(base.add(self.start), self.len)
        }
    }
}

impl fmt::Debug for DmaSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaSlice({}+{} of {:?})", self.start, self.len, self.buf)
    }
}
