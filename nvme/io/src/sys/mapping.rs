//! Mapped files: BARs that can be replaced while other threads hold their addresses, and memory that outlives the process.
#![allow(unsafe_code)]

mod shared_memory;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

pub use shared_memory::SharedMemory;

use super::MmioMap;
use crate::process::Birth;

/// Pages of a device, mapped shared. When the device is released the pages are replaced by ordinary
/// memory: of ones, which is what a bus returns for an absent device, or of zeroes. Addresses stay
/// valid, so doorbells and register references of other threads need no lock and no check. A forked
/// child does not have these pages.
#[derive(Debug)]
pub struct DeviceMapping {
    base: NonNull<u8>,
    len: usize,
    absent: Absent,
    retired: Mutex<bool>,
    birth: Birth,
}

/// The memory that replaces the pages of a released device. Neither kind costs memory in proportion
/// to the mapping's length, which the other side may have chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// All ones, for registers.
    Ones,
    /// Zeroes, for memory.
    Zeroes,
}

/// Longest file of ones. A longer mapping maps it repeatedly.
const ONES_LEN: usize = 2 << 20;

// SAFETY: only addresses are handed out (as `MmioMap`, which makes atomic accesses); the range
// is mapped from construction to drop, whatever it is backed by.
unsafe impl Send for DeviceMapping {}
// SAFETY: as above; `retired` is behind a lock.
unsafe impl Sync for DeviceMapping {}

impl DeviceMapping {
    /// Maps `len` bytes at `offset` of the file, both multiples of the page size.
    pub fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        absent: Absent,
    ) -> io::Result<Arc<DeviceMapping>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        if len == 0 {
            return Err(invalid());
        }
        let base = map_shared(fd, offset, len)?;
        let mapping = Arc::new(DeviceMapping {
            base,
            len,
            absent,
            retired: Mutex::new(false),
            birth: Birth::now(),
        });
        mapping.hide_from_children()?;
        Ok(mapping)
    }

    /// The first byte, valid as long as the object lives.
    pub fn start(&self) -> NonNull<u8> {
        self.base
    }

    /// The mapping as registers.
    pub fn mmio(self: &Arc<Self>) -> MmioMap {
        // SAFETY: `base` is page aligned and `len` bytes from it stay mapped as long as `self`
        // lives (retiring replaces the pages in place); nothing else accesses them.
        unsafe { MmioMap::new(self.base, self.len, Arc::new(Arc::clone(self))) }
    }

    fn hide_from_children(&self) -> io::Result<()> {
        // SAFETY: the range is this object's own mapping; nothing in this process changes.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_DONTFORK) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Replaces the device's memory by ordinary memory. The kernel exchanges the pages: an access
    /// of another thread sees one or the other.
    pub fn retire(&self) -> io::Result<()> {
        let mut retired = self.retired.lock();
        if *retired {
            return Ok(());
        }
        match self.absent {
            Absent::Zeroes => self.replace(0, self.len, None)?,
            Absent::Ones => {
                let ones = file_of_ones(self.len.min(ONES_LEN))?;
                for at in (0..self.len).step_by(ONES_LEN) {
                    let len = (self.len - at).min(ONES_LEN);
                    self.replace(at, len, Some(ones.as_fd()))?;
                }
            }
        }
        self.hide_from_children()?;
        *retired = true;
        Ok(())
    }

    /// Replaces `len` bytes from `at` on by private copies of a file's pages, or by zeroes.
    fn replace(&self, at: usize, len: usize, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        assert!(at + len <= self.len);
        let anonymous = if file.is_none() {
            libc::MAP_ANONYMOUS
        } else {
            0
        };
        // SAFETY: the range lies in [base, base + len), this object's own mapping; MAP_FIXED
        // replaces exactly that, and those who hold addresses into it make atomic accesses only
        // (or are a controller of this process, whose accesses are as good on any memory).
        let mapped = unsafe {
            libc::mmap(
                self.base.as_ptr().add(at).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | anonymous,
                file.map_or(-1, |f| f.as_raw_fd()),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for DeviceMapping {
    fn drop(&mut self) {
        // In a forked child the address may hold something else by now.
        if !self.birth.is_here() {
            return;
        }
        // SAFETY: the range is this object's, and no `MmioMap` is left, since each keeps a
        // reference to it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Maps `len` bytes of a file, to be read and written, where the kernel likes.
fn map_shared(fd: BorrowedFd<'_>, offset: libc::off_t, len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast::<u8>()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Makes a file of `len` zeroes in memory, to be shared with another process, which cannot change
/// its length.
pub fn shared_file(len: usize) -> io::Result<std::fs::File> {
    let file = memory_file(c"pumice-registers")?;
    file.set_len(len as u64)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: `file` is an open descriptor.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether nobody can make another process's file shorter, which would end this process at its next
/// access (SIGBUS).
pub fn keeps_its_length(file: BorrowedFd<'_>) -> bool {
    // SAFETY: `file` is an open descriptor.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

fn memory_file(name: &CStr) -> io::Result<std::fs::File> {
    // SAFETY: the name is a NUL-terminated string.
    let raw =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) }.into())
}

fn file_of_ones(len: usize) -> io::Result<OwnedFd> {
    let file = memory_file(c"pumice-gone")?;
    let page = [0xffu8; 4096];
    let mut at = 0;
    while at < len {
        let n = page.len().min(len - at);
        file.write_all_at(&page[..n], at as u64)?;
        at += n;
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn retired_pages_read_as_ones_and_leave_the_file() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(8192).expect("sized");
        file.write_all_at(&7u32.to_le_bytes(), 4096)
            .expect("written");
        let mapping = DeviceMapping::new(file.as_fd(), 4096, 4096, Absent::Ones).expect("mapped");
        let mmio = mapping.mmio();
        let word = mmio.word32(0).expect("inside");
        assert_eq!(word.load(Ordering::Relaxed), 7u32.to_le());
        mapping.retire().expect("retired");
        mapping.retire().expect("a second time does nothing");
        assert_eq!(word.load(Ordering::Relaxed), u32::MAX);
        word.store(1, Ordering::Relaxed);
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096).expect("read");
        assert_eq!(bytes, 7u32.to_le_bytes());
    }

    fn shmem_kib() -> u64 {
        let info = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
        let line = info.lines().find(|l| l.starts_with("Shmem:"));
        let field = line.and_then(|l| l.split_whitespace().nth(1));
        field.and_then(|n| n.parse().ok()).expect("a number")
    }

    /// The other side chooses the length, so removing a mapping must not cost memory in proportion
    /// to it.
    #[test]
    fn a_long_mapping_costs_nothing_to_take_back() {
        let file = memory_file(c"test").expect("a file");
        file.set_len(4 << 30).expect("sparse");
        for absent in [Absent::Ones, Absent::Zeroes] {
            let mapping = DeviceMapping::new(file.as_fd(), 0, 4 << 30, absent).expect("mapped");
            let before = shmem_kib();
            mapping.retire().expect("retired");
            let more = shmem_kib().saturating_sub(before);
            assert!(more < 1 << 20, "{more} KiB of shared memory");
            let mmio = mapping.mmio();
            let want = if absent == Absent::Ones { u32::MAX } else { 0 };
            for at in [0, (2 << 20) - 4, 2 << 20, (4 << 30) - 4] {
                let word = mmio.word32(at).expect("inside");
                assert_eq!(word.load(Ordering::Relaxed), want);
            }
            // The store is visible nowhere else.
            mmio.word32(8).expect("inside").store(7, Ordering::Relaxed);
            let other = mmio.word32((2 << 20) + 8).expect("inside");
            assert_eq!(other.load(Ordering::Relaxed), want);
        }
    }

    #[test]
    fn shared_files_keep_their_length() {
        let file = shared_file(8192).expect("a file");
        assert!(keeps_its_length(file.as_fd()));
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        let open = memory_file(c"test").expect("a file");
        assert!(!keeps_its_length(open.as_fd()));
        let plain = tempfile::tempfile().expect("a file");
        assert!(!keeps_its_length(plain.as_fd()));
    }
}
