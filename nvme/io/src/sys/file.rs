//! System calls that the `file` module needs and the standard library does not offer.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Numbers of `BLKDISCARD`, `BLKGETSIZE64`, `BLKSSZGET` and `BLKROGET` (linux/fs.h).
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKROGET: libc::c_ulong = 0x125e;

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Tries to take a `flock` lock on the open file. Fails with `WouldBlock` when another has it.
pub fn try_flock(file: &File, exclusive: bool) -> io::Result<()> {
    let how = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: the descriptor is open for the whole call.
    check(unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) })
}

/// Releases the lock at once, even while a ring still holds the open file.
pub fn unlock(file: &File) {
    // SAFETY: the descriptor is open for the whole call.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Returns the capacity of a block device in bytes.
pub fn block_device_len(file: &File) -> io::Result<u64> {
    let mut len = 0_u64;
    // SAFETY: BLKGETSIZE64 stores one u64 at the address, which is valid for writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut len) })?;
    Ok(len)
}

/// Returns the logical sector size of a block device in bytes.
pub fn sector_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int at the address, which is valid for writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Returns the number of bytes that this user can still allocate in the file's file system.
pub fn free_bytes(file: &File) -> io::Result<u64> {
    // SAFETY: all zeroes are a valid statvfs, which is plain numbers.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open for the whole call, `stat` is valid for writes.
    check(unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut stat) })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Discards a range of a block device. Blocks.
pub fn discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the address.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Writes at an offset, and returns when what was written is durable (`RWF_DSYNC`). Returns the
/// number of bytes. Blocks.
pub fn write_durable_at(file: &File, data: &[u8], offset: u64) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    let part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: the descriptor is open for the whole call, which only reads the one part, the memory
    // of `data`.
    let n = unsafe {
        libc::pwritev2(
            file.as_raw_fd(),
            &raw const part,
            1,
            offset,
            libc::RWF_DSYNC,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Calls `fallocate(2)`. May block.
pub fn fallocate(file: &impl AsRawFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let to = |n: u64| i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
    let (offset, len) = (to(offset)?, to(len)?);
    // SAFETY: the descriptor is open for the whole call.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) })
}

/// Returns the alignment of memory and of offsets that direct I/O on the file requires, in bytes
/// (statx, Linux 6.1). `None` where the kernel does not say; zeroes where direct I/O is not
/// supported.
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: statx is a plain structure for which all zeroes are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor, which is open; `stat` is
    // valid for writes.
    let ret = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    (ret == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Whether a block device cannot be written.
pub fn is_write_protected(file: &File) -> io::Result<bool> {
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET stores one int at the address, which is valid for writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut flag) })?;
    Ok(flag != 0)
}

/// Returns the first byte at or behind `offset` that may be other than zero according to the file
/// system, or `None` if there is none. Fails with `Unsupported` when the file system cannot say.
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_DATA)
}

/// Returns the first hole at or behind `offset`, or the end.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no memory is involved, and nobody uses the position of the open file.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            e => Err(e),
        },
    }
}

/// Makes the file durable, including its length and place. Blocks.
pub fn sync_all(file: &File) -> io::Result<()> {
    file.sync_all()
}

fn proc_path(file: &File) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

/// Whether [`link`] can name this file without a name, which it does through /proc.
pub fn can_be_named(file: &File) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{}", file.as_raw_fd())).is_ok()
}

/// Gives a file without a name the name `path`. Fails with `AlreadyExists` when a file has the
/// name.
pub fn link(file: &File, path: &Path) -> io::Result<()> {
    let (from, to) = (proc_path(file)?, CString::new(path.as_os_str().as_bytes())?);
    // SAFETY: both are strings that end with a zero byte and outlive the call.
    check(unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    })
}

/// Makes an eventfd.
pub fn eventfd() -> io::Result<File> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Removes `O_DIRECT` from the open file.
pub fn clear_direct(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for both calls, whose arguments and results are plain numbers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_DIRECT) })
}
