//! The functions of a file system and its paths.

use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use pumice_blobfs::fs::{self, Access, FileSystem, FsError, OpenOptions};

use super::{Locked, Mounted, Opened, count, guard, guard_value, mounted, text};
use crate::contract::{
    PUMICE_OPEN_CREATE, PUMICE_OPEN_DIRECT, PUMICE_OPEN_FRESH, pumice_name_fn, pumice_stat,
};
use crate::fault::Result;
use crate::path::resolve;

/// Returns an environment, for calls that end with it.
///
/// # Safety
/// As [`mounted`].
unsafe fn usable_fs<'a>(fs: *const c_void) -> Result<&'a Mounted> {
    // SAFETY: by the contract of this function.
    let mounted = unsafe { mounted(fs) };
    mounted.binding.check()?;
    Ok(mounted)
}

/// Runs `call` on an environment and one path of its file system.
///
/// # Safety
/// `fs` is live; `path` and `len` are readable for the call.
unsafe fn on_path(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
    call: impl FnOnce(&Mounted, &str) -> Result<i64>,
) -> i64 {
    guard(|| {
        // SAFETY: by the contract of this function.
        let (mounted, path) = unsafe { (usable_fs(fs)?, text(path, len)?) };
        call(mounted, &resolve(&mounted.root, path))
    })
}

/// Makes the missing parent directories of the normalised `path`.
fn make_parents(fs: &FileSystem, path: &str) -> Result<()> {
    for (at, _) in path.match_indices('/').skip(1) {
        match fs.mkdir(&path[..at]) {
            Ok(()) | Err(FsError::Exists { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Whether the path is one of the files that RocksDB makes whenever it opens a database. On a full
/// file system they may use the reserve, so that the database can be opened, read and emptied.
fn is_essential(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    matches!(name, "LOG" | "CURRENT" | "IDENTITY" | "LOCK")
        || name.starts_with("MANIFEST-")
        || name.starts_with("OPTIONS-")
        || matches!(extension, Some("dbtmp" | "log"))
}

/// Functions of one path that return only whether they succeeded.
macro_rules! path_calls {
    ($($name:ident => $call:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            fs: *const c_void,
            path: *const c_char,
            len: usize,
        ) -> i64 {
            // SAFETY: the shim passes a live file system and a readable path.
            unsafe {
                on_path(fs, path, len, |mounted, path| {
                    $call(&mounted.fs, path)?;
                    Ok(0)
                })
            }
        }
    )*};
}

path_calls! {
    pumice_remove => FileSystem::unlink;
    pumice_rmdir => FileSystem::rmdir;
    pumice_sync_dir => FileSystem::sync_dir;
}

/// Functions of two paths.
macro_rules! paths_calls {
    ($($name:ident => $call:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            fs: *const c_void,
            from: *const c_char,
            from_len: usize,
            to: *const c_char,
            to_len: usize,
        ) -> i64 {
            guard(|| {
                // SAFETY: the shim passes a live file system.
                let mounted = unsafe { usable_fs(fs) }?;
                // SAFETY: the shim passes readable paths.
                let (from, to) = unsafe { (text(from, from_len)?, text(to, to_len)?) };
                let (from, to) = (resolve(&mounted.root, from), resolve(&mounted.root, to));
                $call(&mounted.fs, &from, &to)?;
                Ok(0)
            })
        }
    )*};
}

paths_calls! {
    pumice_rename => FileSystem::rename;
    pumice_link => FileSystem::link;
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_fs_release(fs: *const c_void) {
    // SAFETY: `fs` is from Box::into_raw; the shim releases it once, last.
    let mounted = unsafe { Box::from_raw(fs.cast_mut().cast::<Mounted>()) };
    guard_value((), || drop(mounted));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_open(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
    how: u32,
    out: *mut *const c_void,
) -> i64 {
    let fresh = how & PUMICE_OPEN_FRESH != 0;
    let open = |mounted: &Mounted, path: &str| {
        let options = OpenOptions::READ
            .create(how & PUMICE_OPEN_CREATE != 0)
            .fresh(fresh)
            .essential(is_essential(path));
        let file = mounted.fs.open(path, options)?;
        if how & PUMICE_OPEN_DIRECT != 0 {
            file.set_direct(true);
        }
        if fresh && path.ends_with(".log") {
            // A write-ahead log is read again only by recovery.
            file.advise(Access::NoReuse);
        }
        let opened = Opened {
            file,
            binding: Arc::clone(&mounted.binding),
            _share: mounted.share.clone(),
        };
        let handle = Box::into_raw(Box::new(opened));
        // SAFETY: the shim passes a place for the handle.
        unsafe { out.write(handle.cast_const().cast()) };
        Ok(0)
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, open) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_stat_path(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
    out: *mut pumice_stat,
) -> i64 {
    let stat = |mounted: &Mounted, path: &str| {
        let stat = mounted.fs.stat(path)?;
        let since_1970 = stat.mtime.duration_since(UNIX_EPOCH);
        let raw = pumice_stat {
            len: stat.len,
            mtime_s: since_1970.map_or(0, |t| t.as_secs()),
            file_id: stat.blob_id.map_or(0, |id| id.0),
            links: u32::try_from(stat.links).unwrap_or(u32::MAX),
            is_dir: u32::from(stat.is_dir),
        };
        // SAFETY: the shim passes its own pumice_stat.
        unsafe { out.write(raw) };
        Ok(0)
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, stat) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_mkdir(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
) -> i64 {
    let mkdir = |mounted: &Mounted, path: &str| {
        let path = fs::normalise(path)?;
        if path == mounted.root {
            // RocksDB expects the parents of its `/`.
            make_parents(&mounted.fs, &path)?;
        }
        Ok(mounted.fs.mkdir(&path).map(|()| 0)?)
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, mkdir) }
}

/// Makes a database's directory with its parents. The `rocksdb` crate makes the parents in the
/// kernel's file system before it asks for the last directory here.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_make_dirs(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
) -> i64 {
    let make = |mounted: &Mounted, path: &str| {
        let path = fs::normalise(path)?;
        make_parents(&mounted.fs, &path)?;
        match mounted.fs.mkdir(&path) {
            Err(FsError::Exists { .. }) if mounted.fs.stat(&path)?.is_dir => Ok(0),
            made => Ok(made.map(|()| 0)?),
        }
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, make) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_list(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
    each: pumice_name_fn,
    arg: *mut c_void,
) -> i64 {
    let list = |mounted: &Mounted, path: &str| {
        let entries = mounted.fs.list(path)?;
        for entry in &entries {
            let name = entry.name.as_bytes();
            let is_dir = u32::from(entry.is_dir);
            // SAFETY: `each` and `arg` belong together and are valid for this call; the function
            // does not throw (noexcept) and copies the name.
            unsafe { each(arg, name.as_ptr().cast(), name.len(), entry.len, is_dir) };
        }
        Ok(count(entries.len()))
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, list) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_lock(
    fs: *const c_void,
    path: *const c_char,
    len: usize,
    out: *mut *mut c_void,
) -> i64 {
    let lock = |mounted: &Mounted, path: &str| {
        let id = mounted.binding.hold(mounted.fs.lock(path)?)?;
        let binding = Arc::clone(&mounted.binding);
        let lock = Box::into_raw(Box::new(Locked { binding, id }));
        // SAFETY: the shim passes a place for the handle.
        unsafe { out.write(lock.cast()) };
        Ok(0)
    };
    // SAFETY: the shim passes a live file system and a readable path.
    unsafe { on_path(fs, path, len, lock) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_unlock(lock: *mut c_void) {
    // SAFETY: `lock` is from Box::into_raw in `pumice_lock`; the shim gives it back once.
    let lock = unsafe { Box::from_raw(lock.cast::<Locked>()) };
    guard_value((), || lock.binding.unlock(lock.id));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_free_bytes(fs: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: the shim passes a live file system.
        let mounted = unsafe { usable_fs(fs) }?;
        // SAFETY: the shim passes a place for the answer.
        unsafe { out.write(mounted.fs.free_bytes()) };
        Ok(0)
    })
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::contract::PUMICE_RETRYABLE;
    use crate::ffi::{pumice_file_id, pumice_file_release};

    /// An environment's file system, as C++ holds it.
    struct Handle(*const c_void);

    impl Handle {
        fn new() -> Handle {
            let fs = crate::mount("malloc://64M", &crate::MountOptions::new()).unwrap();
            Handle(crate::handle(fs, "/".to_owned(), Arc::default()))
        }

        /// Returns the identity of the file at `path`, opened in this way.
        fn id(&self, path: &str, how: u32) -> u64 {
            let mut file = ptr::null();
            // SAFETY: the file system is live, the path is readable, the handle is released once.
            unsafe {
                let opened =
                    pumice_open(self.0, path.as_ptr().cast(), path.len(), how, &raw mut file);
                assert_eq!(opened, 0, "{path}");
                let id = pumice_file_id(file);
                pumice_file_release(file);
                id
            }
        }
    }

    impl Drop for Handle {
        fn drop(&mut self) {
            // SAFETY: the handle is released once, last.
            unsafe { pumice_fs_release(self.0) };
        }
    }

    /// M313: RocksDB keys caches by it.
    #[test]
    fn files_have_identities_of_their_own() {
        let fs = Handle::new();
        let make = PUMICE_OPEN_CREATE | PUMICE_OPEN_FRESH;
        let (a, b) = (fs.id("/a", make), fs.id("/b", make));
        assert_ne!(a, b);
        // SAFETY: the file system is live, the paths are readable.
        let linked = unsafe { pumice_link(fs.0, c"/a".as_ptr(), 2, c"/c".as_ptr(), 2) };
        assert_eq!(linked, 0);
        assert_eq!(fs.id("/c", 0), a);
        let mut stat = std::mem::MaybeUninit::uninit();
        // SAFETY: the file system is live, the path is readable, and the answer is written where it is 0.
        let stat = unsafe {
            assert_eq!(
                pumice_stat_path(fs.0, c"/c".as_ptr(), 2, stat.as_mut_ptr()),
                0
            );
            stat.assume_init()
        };
        assert_eq!((stat.file_id, stat.links), (a, 2));
        // This is a new inode under the old name.
        assert_ne!(fs.id("/a", make), a);
    }

    #[test]
    fn what_is_not_there_is_enoent_and_final() {
        let fs = Handle::new();
        // SAFETY: the file system is live, the path is readable.
        let removed = unsafe { pumice_remove(fs.0, c"/none".as_ptr(), 5) };
        assert_eq!(removed, -i64::from(libc::ENOENT));
        let mut fault = std::mem::MaybeUninit::uninit();
        // SAFETY: the function writes all of it.
        let fault = unsafe {
            crate::ffi::pumice_last_fault(fault.as_mut_ptr());
            fault.assume_init()
        };
        assert_eq!(
            (fault.err, fault.flags & PUMICE_RETRYABLE),
            (libc::ENOENT, 0)
        );
    }
}
