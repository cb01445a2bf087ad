//! A mapped BAR that can be taken away from under those who still hold its addresses.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use super::MmioMap;

/// Pages of a device, mapped shared. When the device is given back the pages are replaced by
/// ordinary memory full of ones: what a bus answers for an absent device. Addresses stay good,
/// so doorbells and register references of other threads need no lock and no check.
#[derive(Debug)]
pub(crate) struct DeviceMapping {
    base: NonNull<u8>,
    len: usize,
    retired: Mutex<bool>,
}

// SAFETY: only addresses are handed out (as `MmioMap`, which makes atomic accesses); the range
// is mapped from construction to drop, whatever it is backed by.
unsafe impl Send for DeviceMapping {}
// SAFETY: as above; `retired` is behind a lock.
unsafe impl Sync for DeviceMapping {}

impl DeviceMapping {
    /// Maps `len` bytes at `offset` of the file, both multiples of the page size.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<Arc<DeviceMapping>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        if len == 0 {
            return Err(invalid());
        }
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
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        Ok(Arc::new(DeviceMapping {
            base,
            len,
            retired: Mutex::new(false),
        }))
    }

    /// Where it begins; good as long as the object lives.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.base
    }

    /// The mapping as registers.
    pub(crate) fn mmio(self: &Arc<Self>) -> MmioMap {
        // SAFETY: `base` is page aligned and `len` bytes from it stay mapped as long as `self`
        // lives (retiring replaces the pages in place); nothing else accesses them.
        unsafe { MmioMap::new(self.base, self.len, Arc::new(Arc::clone(self))) }
    }

    /// Puts ordinary memory full of ones in the place of the device's. The kernel exchanges the
    /// pages at once; an access of another thread sees the one or the other.
    pub(crate) fn retire(&self) -> io::Result<()> {
        let mut retired = self.retired.lock();
        if *retired {
            return Ok(());
        }
        let ones = file_of_ones(self.len)?;
        // SAFETY: the range [base, base + len) is this object's own mapping; MAP_FIXED replaces
        // exactly that, and those who hold addresses into it make atomic accesses only, which
        // are as good on ordinary memory.
        let at = unsafe {
            libc::mmap(
                self.base.as_ptr().cast(),
                self.len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                ones.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        *retired = true;
        Ok(())
    }
}

impl Drop for DeviceMapping {
    fn drop(&mut self) {
        // SAFETY: the range is this object's, and no `MmioMap` is left, since each keeps a
        // reference to it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A file in memory of `len` zeroes, to be shared with another process.
pub(crate) fn shared_file(len: usize) -> io::Result<std::fs::File> {
    let file = memory_file(c"pumice-registers")?;
    file.set_len(len as u64)?;
    Ok(file)
}

fn memory_file(name: &CStr) -> io::Result<std::fs::File> {
    // SAFETY: the name is a NUL-terminated string.
    let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
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
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    #[test]
    fn retired_pages_read_as_ones_and_leave_the_file() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(8192).expect("sized");
        file.write_all_at(&7u32.to_le_bytes(), 4096)
            .expect("written");
        let mapping = DeviceMapping::new(file.as_fd(), 4096, 4096).expect("mapped");
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
}
