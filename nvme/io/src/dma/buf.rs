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

/// Owned bytes that every device can access.
///
/// Aligned to 4096 bytes or, when shorter than 4096, to its size class (at least 512). Its device
/// addresses are contiguous within each 2 MiB and, where an IOMMU translates, as a whole. Taking
/// and dropping one costs tens of nanoseconds. The contents of a new one are unspecified.
pub struct DmaBuf {
    block: Block,
    len: usize,
}

// SAFETY: only the owner of the buffer may access its block; the bytes belong to no thread.
unsafe impl Send for DmaBuf {}
// SAFETY: a shared `DmaBuf` gives shared access to its bytes only.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// Takes a buffer of `len` bytes. Its contents are initialised but unspecified. Blocks only
    /// when the arena has to grow.
    #[inline]
    pub fn new(len: usize) -> Result<DmaBuf, DmaError> {
        Ok(DmaBuf {
            block: arena::take(len)?,
            len,
        })
    }

    /// Takes a buffer as [`new`](Self::new) does, from a domain's memory if one is named.
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

    /// Length in bytes, as requested.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The largest length that the buffer can have without another allocation.
    pub fn capacity(&self) -> usize {
        class_len(usize::from(self.block.class))
    }

    /// Sets the length within the capacity. The bytes between the old and a longer new length are
    /// unspecified.
    ///
    /// # Panics
    /// Panics when `len` is 0 or above [`capacity`](Self::capacity).
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

    /// The buffer's address in this process, through which all of it may be accessed. It makes no
    /// reference to the bytes, which would promise that they do not change.
    #[inline]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.block.ptr
    }

    /// The region that contains the buffer.
    #[inline]
    pub fn region(&self) -> RegionId {
        self.block.region
    }

    /// The buffer's offset in its region, in bytes.
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
        // SAFETY: the block is mapped for the life of the process, initialised (memfd memory starts
        // as zeroes), at least `len` long, and borrowed from `self`, its only owner.
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

/// A shared, immutable view of a [`DmaBuf`] or of a part of one. Clones share the buffer.
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

    /// Returns a part of this view.
    ///
    /// # Panics
    /// Panics when the range does not lie in the view.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> DmaSlice {
        assert!(range.start <= range.end && range.end <= self.len);
        DmaSlice {
            buf: Arc::clone(&self.buf),
            start: self.start + range.start,
            len: range.end - range.start,
        }
    }

    /// Returns the whole underlying buffer if nobody else has a view of it, otherwise `self`.
    pub fn try_into_buf(self) -> Result<DmaBuf, DmaSlice> {
        let DmaSlice { buf, start, len } = self;
        Arc::try_unwrap(buf).map_err(|buf| DmaSlice { buf, start, len })
    }

    /// The region that contains the view.
    #[inline]
    pub fn region(&self) -> RegionId {
        self.buf.region()
    }

    /// The view's offset in its region, in bytes.
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
        // This avoids a reference to the whole buffer: its maker may still write bytes that no view
        // covers (an append buffer whose first blocks are being written to the device).
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
