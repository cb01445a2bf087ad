//! A region: one shared memory file, mapped.
#![allow(unsafe_code)]

#[cfg(not(miri))]
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
#[cfg(not(miri))]
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use super::error::DmaError;

/// Regions are multiples of this many bytes, start at a virtual address aligned to it, and
/// device addresses are kept per piece of this length: the size of a huge page.
pub const CHUNK_LEN: usize = 2 << 20;

/// Names a region: the number of its first chunk in the arena.
///
/// Byte `offset` of the region lies in chunk `RegionId::index() + offset / CHUNK_LEN`, so an
/// [`AddressTable`](super::AddressTable) needs one flat array whatever the regions' sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(super) u32);

impl RegionId {
    /// The number of the region's first chunk.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Shared memory mapped into this process, from which buffers are cut.
#[derive(Debug)]
pub struct Region {
    id: RegionId,
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    huge: bool,
}

// SAFETY: the mapping is process-wide and `Region` hands out its address only; who may touch
// which bytes is decided by the buffers cut from it, each of which is handed out once.
unsafe impl Send for Region {}
// SAFETY: as above; no method of `Region` touches the mapped bytes.
unsafe impl Sync for Region {}

impl Region {
    /// As below, in memory of the heap: the interpreter knows no mappings of files. No other
    /// process can be given it.
    #[cfg(miri)]
    pub(super) fn map(id: RegionId, len: usize, huge: bool) -> Result<Region, DmaError> {
        let os = |call, source| DmaError::Os { call, len, source };
        let fd = std::fs::File::open("/dev/null").map_err(|e| os("open", e))?;
        let layout = std::alloc::Layout::from_size_align(len, CHUNK_LEN).expect("whole chunks");
        // SAFETY: the layout has a length.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) });
        Ok(Region {
            id,
            fd: fd.into(),
            base: base.ok_or_else(|| os("alloc", io::ErrorKind::OutOfMemory.into()))?,
            len,
            huge,
        })
    }

    /// Maps `len` bytes (a multiple of [`CHUNK_LEN`]) of new shared memory.
    #[cfg(not(miri))]
    pub(super) fn map(id: RegionId, len: usize, huge: bool) -> Result<Region, DmaError> {
        assert!(len > 0 && len.is_multiple_of(CHUNK_LEN));
        let os = |call| DmaError::Os {
            call,
            len,
            source: io::Error::last_os_error(),
        };
        const NAME: &CStr = c"pumice-dma";
        let flags = if huge {
            libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
        } else {
            libc::MFD_CLOEXEC
        };
        // SAFETY: NAME is a NUL-terminated string, flags are valid memfd flags.
        let raw = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
        if raw < 0 {
            return Err(os("memfd_create"));
        }
        // SAFETY: `raw` was just returned by the kernel and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let file_len = libc::off_t::try_from(len).expect("a region is far smaller than off_t");
        // SAFETY: `fd` is an open descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), file_len) } != 0 {
            return Err(os("ftruncate"));
        }
        // An address range with room to align, then the file over the aligned part of it.
        let reserve = len + CHUNK_LEN;
        // SAFETY: an anonymous, inaccessible reservation at an address of the kernel's choice
        // touches no existing mapping.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserve,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(os("mmap (reserve)"));
        }
        let start = addr.cast::<u8>();
        let head = start.align_offset(CHUNK_LEN);
        assert!(head <= CHUNK_LEN);
        // SAFETY: head <= CHUNK_LEN, so [start + head, + len) lies inside the reservation made
        // above, which nobody else knows of; MAP_FIXED replaces a part of just that.
        let base = unsafe {
            libc::mmap(
                start.add(head).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let error = os("mmap");
            // SAFETY: the reservation is ours and nothing was mapped over it.
            unsafe { libc::munmap(addr, reserve) };
            return Err(error);
        }
        // SAFETY: the two remainders of the reservation, in front of and behind the file, are
        // ours and unused.
        unsafe {
            if head > 0 {
                libc::munmap(addr, head);
            }
            if head < CHUNK_LEN {
                libc::munmap(start.add(head + len).cast(), CHUNK_LEN - head);
            }
        }
        let base = NonNull::new(base.cast::<u8>()).expect("mmap does not return null");
        Ok(Region {
            id,
            fd,
            base,
            len,
            huge,
        })
    }

    /// The region's name.
    pub fn id(&self) -> RegionId {
        self.id
    }

    /// Length in bytes, a multiple of [`CHUNK_LEN`].
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the region starts in this process; aligned to [`CHUNK_LEN`].
    pub fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// The memory file; the region is its bytes `0..len()`. It is never truncated.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the region consists of 2 MiB pages, each of them physically contiguous.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Makes every chunk present in memory, without changing its bytes.
    pub(super) fn touch(&self) {
        use std::sync::atomic::{AtomicU64, Ordering};
        for n in 0..self.len / CHUNK_LEN {
            let at = self.ptr(n * CHUNK_LEN).cast::<AtomicU64>();
            // SAFETY: the address lies in the mapping, is aligned, and an atomic add of zero
            // changes nothing, whoever else uses the bytes.
            unsafe { at.as_ref() }.fetch_add(0, Ordering::Relaxed);
        }
    }

    /// Address of byte `offset`.
    pub(crate) fn ptr(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len);
        // SAFETY: offset < len, so the result stays inside the mapping.
        unsafe { self.base.add(offset) }
    }
}

// Under the interpreter the few regions of a test are kept.
#[cfg(not(miri))]
impl Drop for Region {
    fn drop(&mut self) {
        // Only a region that no device could be told of, and from which no buffer was cut, is
        // ever dropped: the arena keeps the others for ever.
        // SAFETY: the range was mapped by `map` and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
