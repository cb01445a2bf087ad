//! A named file in memory, mapped, that is left when the process is killed.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use super::super::file;
use crate::process::Birth;

/// Length in bytes of the first part, which consists of words.
const WORDS_LEN: usize = 4096;

/// A file of this user in shared memory (`/dev/shm`), mapped: 512 words, then bytes. It stays when the process is killed,
/// and nobody else may open it. A forked child does not have the mapping.
#[derive(Debug)]
pub struct SharedMemory {
    path: PathBuf,
    base: NonNull<u8>,
    len: usize,
    birth: Birth,
}

// SAFETY: the words are only accessed atomically, and the bytes through `&self` are only read and through `&mut self` written.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes a file of `len` zeroes, words and bytes together, whose memory is there. No file of that name may exist.
    ///
    /// # Errors
    /// Fails with the system's error, and leaves no file then.
    pub fn create(path: &Path, len: usize) -> io::Result<SharedMemory> {
        if longest_file()? < len as u64 {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        // Memory that is only promised would end the process at its first access (SIGBUS).
        let mapped = file::fallocate(&made, 0, 0, len as u64)
            .and_then(|()| SharedMemory::map(path, &made, len));
        if mapped.is_err() {
            let _ = std::fs::remove_file(path);
        }
        mapped
    }

    /// Maps a file that another process has made.
    ///
    /// # Errors
    /// Fails with the system's error; with `PermissionDenied` if it is not a file that this user has made and nobody else can
    /// open; with `InvalidData` if it has no bytes.
    pub fn open(path: &Path) -> io::Result<SharedMemory> {
        let found = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        let meta = found.metadata()?;
        // SAFETY: the call has no arguments and cannot fail.
        let user = unsafe { libc::geteuid() };
        if !meta.is_file() || meta.uid() != user || meta.mode() & 0o077 != 0 || meta.nlink() != 1 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Memory that is not there would end the process at its first access (SIGBUS).
        let len = usize::try_from(meta.len()).unwrap_or(0);
        if len <= WORDS_LEN || meta.blocks() * 512 < meta.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        SharedMemory::map(path, &found, len)
    }

    fn map(path: &Path, file: &File, len: usize) -> io::Result<SharedMemory> {
        if len <= WORDS_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let base = super::map_shared(file.as_fd(), 0, len)?;
        let memory = SharedMemory {
            path: path.to_owned(),
            base,
            len,
            birth: Birth::now(),
        };
        // SAFETY: the range is this object's own mapping; nothing in this process changes.
        match unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTFORK) } {
            0 => Ok(memory),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Number of bytes behind the words.
    #[inline]
    pub fn num_bytes(&self) -> usize {
        self.len - WORDS_LEN
    }

    /// Returns the word at `index`, one of 512.
    ///
    /// # Panics
    /// Panics if there is no such word, or in a forked child.
    #[inline]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < WORDS_LEN / 8 && self.birth.is_here());
        // SAFETY: the word is inside the mapping, which is aligned to a page and lives as long as `self`, and is only ever
        // accessed atomically.
        unsafe { self.base.cast::<AtomicU64>().add(index).as_ref() }
    }

    /// Returns `len` bytes at `at`.
    ///
    /// # Panics
    /// Panics if they are not there, or in a forked child.
    #[inline]
    pub fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        assert!(at <= self.num_bytes() && len <= self.num_bytes() - at && self.birth.is_here());
        // SAFETY: the range lies behind the words and inside the mapping, which lives as long as `self`, and `&mut self` excludes
        // every other access of this process. Another one could only map it if it were of the same user and took the file for its own:
        // the file has the name of a device that this process holds for itself.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(WORDS_LEN + at), len) }
    }

    /// Copies bytes at `at` to `out`.
    ///
    /// # Panics
    /// Panics if they are not there, or in a forked child.
    pub fn read(&self, at: usize, out: &mut [u8]) {
        assert!(
            at <= self.num_bytes() && out.len() <= self.num_bytes() - at && self.birth.is_here()
        );
        // SAFETY: as in `bytes_mut`; `&self` excludes writes, and `out` is memory of another kind.
        unsafe {
            let from = self.base.as_ptr().add(WORDS_LEN + at);
            std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len());
        }
    }

    /// Removes the file's name. The mapping stays.
    pub fn unlink(&self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // In a forked child the address may hold something else by now.
        if self.birth.is_here() {
            // SAFETY: the range is this object's, and no reference to it is left.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// Returns the longest file that this process may write. A longer one ends it (SIGXFSZ).
fn longest_file() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is ours.
    match unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } {
        0 => Ok(limit.rlim_cur),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_was_written_is_there_when_it_is_opened_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut memory = SharedMemory::create(&path, 8192).expect("made");
        assert_eq!(memory.num_bytes(), 4096);
        memory.word(511).store(7, Ordering::Release);
        memory.bytes_mut(4093, 3).copy_from_slice(&[1, 2, 3]);
        assert!(SharedMemory::create(&path, 8192).is_err(), "it exists");
        drop(memory);
        let memory = SharedMemory::open(&path).expect("opened");
        let mut bytes = [0; 4];
        memory.read(4092, &mut bytes);
        assert_eq!(
            (memory.word(511).load(Ordering::Acquire), bytes),
            (7, [0, 1, 2, 3])
        );
        memory.unlink().expect("removed");
        assert!(!path.exists());
    }

    /// Another user could have put it there, or could change it.
    #[test]
    fn files_that_others_can_reach_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        drop(SharedMemory::create(&path, 8192).expect("made"));
        let kind = |path: &Path| SharedMemory::open(path).map(drop).map_err(|e| e.kind());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert!(kind(&link).is_err());
        let second = dir.path().join("second");
        std::fs::hard_link(&path, &second).expect("linked");
        assert_eq!(kind(&path), Err(io::ErrorKind::PermissionDenied));
        std::fs::remove_file(&second).expect("removed");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("set");
        assert_eq!(kind(&path), Err(io::ErrorKind::PermissionDenied));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        assert_eq!(kind(&path), Ok(()));
        // A sparse file has no memory yet, and a short one no bytes.
        std::fs::write(&second, [0; 4096]).expect("written");
        std::fs::set_permissions(&second, std::fs::Permissions::from_mode(0o600)).expect("set");
        assert_eq!(kind(&second), Err(io::ErrorKind::InvalidData));
        File::options()
            .write(true)
            .open(&second)
            .and_then(|f| f.set_len(1 << 20))
            .expect("sparse");
        assert_eq!(kind(&second), Err(io::ErrorKind::InvalidData));
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn bytes_past_the_end_are_not_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut memory = SharedMemory::create(&dir.path().join("log"), 8192).expect("made");
        memory.bytes_mut(4094, 3);
    }
}
