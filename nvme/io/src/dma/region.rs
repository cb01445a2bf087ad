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
use crate::process::Birth;

/// The length of a chunk in bytes, that of a huge page. A region's length is a multiple of it, a
/// region's virtual address is aligned to it, and device addresses are kept for each chunk.
pub const CHUNK_LEN: usize = 2 << 20;

/// Identifies a region: the number of its first chunk in the arena.
///
/// Byte `offset` of the region lies in chunk `RegionId::index() + offset / CHUNK_LEN`, so an
/// `AddressTable` needs one flat array whatever the regions' sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(super) u32);

impl RegionId {
    /// The number of the region's first chunk.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Shared memory that is mapped into this process, and of which buffers are parts.
#[derive(Debug)]
pub struct Region {
    id: RegionId,
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    huge: bool,
    birth: Birth,
}

// SAFETY: the mapping is process-wide and `Region` hands out its address only. The buffers made of
// it, each of which is handed out once, decide who may access which bytes.
unsafe impl Send for Region {}
// SAFETY: as above; no method of `Region` touches the mapped bytes.
unsafe impl Sync for Region {}

#[allow(clippy::len_without_is_empty, reason = "no region is empty")]
impl Region {
    /// Maps a region as below, in memory of the heap, because the interpreter has no mappings of
    /// files. It cannot be passed to another process.
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
            birth: Birth::now(),
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
        let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        if huge {
            flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        }
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
        // Nobody who is given the file can make it shorter, which would kill this process at the
        // next access (SIGBUS).
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: `fd` is an open descriptor.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(os("fcntl(F_ADD_SEALS)"));
        }
        // Reserve an address range with room to align, then map the file over its aligned part.
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
        // From here on, dropping the region unmaps it.
        let region = Region {
            id,
            fd,
            base,
            len,
            huge,
            birth: Birth::now(),
        };
        // A child has its own arena: it neither reads nor writes memory that devices and the parent
        // use.
        // SAFETY: the range is the mapping that was just made.
        if unsafe { libc::madvise(region.base.as_ptr().cast(), len, libc::MADV_DONTFORK) } != 0 {
            return Err(os("madvise(MADV_DONTFORK)"));
        }
        Ok(region)
    }

    /// The region's identifier.
    pub fn id(&self) -> RegionId {
        self.id
    }

    /// Length in bytes, a multiple of [`CHUNK_LEN`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// The region's address in this process, aligned to [`CHUNK_LEN`].
    pub fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// The memory file. The region is its bytes `0..len()`. It is sealed, so nobody can truncate
    /// it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the region consists of 2 MiB pages, each of them physically contiguous.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Makes every chunk present in memory as far as there is memory, without changing its bytes.
    pub(super) fn touch(&self) {
        use std::sync::atomic::{AtomicU64, Ordering};
        // Since Linux 5.14; the kernel faults the pages in and changes nothing in them.
        #[cfg(not(miri))]
        // SAFETY: the range is this region's mapping, and its bytes are not changed.
        if unsafe {
            libc::madvise(
                self.base.as_ptr().cast(),
                self.len,
                libc::MADV_POPULATE_WRITE,
            )
        } == 0
        {
            return;
        }
        for n in 0..self.len / CHUNK_LEN {
            let at = self.ptr(n * CHUNK_LEN).cast::<AtomicU64>();
            // A read is enough to make a page of a shared file present. Its result must look used,
            // or the compiler would remove it.
            // SAFETY: the address lies in the mapping and is aligned; other users of the bytes
            // access them as atomics or are devices.
            std::hint::black_box(unsafe { at.as_ref() }.load(Ordering::Relaxed));
        }
    }

    /// Makes a huge page of the pages of the chunk that begins at `offset`. Its bytes stay as they are and may be in use. Not
    /// even a device that has them mapped sees a difference: the kernel leaves pages alone that are pinned. Blocks for
    /// about a millisecond.
    ///
    /// # Errors
    /// Fails with EINVAL where the kernel makes no huge page of such memory at all, and otherwise if it has no huge page or a
    /// page is pinned now.
    pub(super) fn join(&self, offset: usize) -> io::Result<()> {
        assert!(offset.is_multiple_of(CHUNK_LEN));
        let at = self.ptr(offset).as_ptr().cast();
        // SAFETY: the chunk is a part of this region's mapping, which stays at its address. The kernel copies the bytes to the
        // huge page while nobody can access them, so that no reference to them sees a change.
        match unsafe { libc::madvise(at, CHUNK_LEN, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Gives the memory of a range of whole pages back to the system. They read as zeroes from then
    /// on. Nobody uses the range, and no device has it mapped.
    pub(super) fn release(&self, offset: usize, len: usize) -> std::io::Result<()> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        crate::sys::file::fallocate(&self.fd, punch, offset as u64, len as u64)
    }

    /// Address of byte `offset`.
    pub fn ptr(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len);
        // SAFETY: offset < len, so the result stays inside the mapping.
        unsafe { self.base.add(offset) }
    }
}

// The interpreter keeps the few regions of a test.
#[cfg(not(miri))]
impl Drop for Region {
    fn drop(&mut self) {
        // In a forked child the address may hold something else: the region was not inherited.
        if !self.birth.is_here() {
            return;
        }
        // Only two kinds of region are ever dropped: one that no device could map, and one of a
        // domain whose buffers are all freed. The process's arena keeps the others for the life of
        // the process.
        // SAFETY: the range was mapped by `map` and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn present(region: &Region, offset: usize) -> bool {
        let map = File::open("/proc/self/pagemap").expect("pagemap");
        let mut entry = [0; 8];
        let page = (region.address() + offset) as u64 / 4096;
        map.read_exact_at(&mut entry, page * 8).expect("read");
        u64::from_le_bytes(entry) >> 63 == 1
    }

    /// Holds in a build with optimisation too.
    #[test]
    fn touched_chunks_are_in_memory() {
        let region = Region::map(RegionId(0), 8 << 20, false).expect("a region");
        let chunks = || (0..4).map(|n| present(&region, n * CHUNK_LEN));
        assert!(!chunks().any(|present| present));
        region.touch();
        assert!(chunks().all(|present| present));
    }

    #[test]
    fn the_file_keeps_its_length() {
        let region = Region::map(RegionId(0), 2 << 20, false).expect("a region");
        let file = File::from(region.fd().try_clone_to_owned().expect("a descriptor"));
        for len in [0, 4096, 4 << 20] {
            let refused = file.set_len(len).expect_err("sealed");
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        }
    }
}
