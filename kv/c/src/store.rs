//! Stores, and what is done with paths.

use std::ffi::{CString, c_char, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use pumice_blobfs::fs::{self, FileSystem, FsError, Stat};
use pumice_rocksdb_fs::{Fault, Use, mount_uri_with, resolve};

use crate::error::{Result, answer, done, invalid, live, pumice_error, put, text};
use crate::options::{mount_options, pumice_options};

/// An open store: a file system on a device, an image file or in memory.
pub struct pumice_store {
    pub(crate) mounted: Arc<SharedMount>,
}

/// A mounted store, which its files keep mounted.
pub(crate) struct SharedMount {
    pub share: Use,
    /// The directory that the program calls `/`, normalised.
    pub root: String,
}

impl SharedMount {
    pub fn fs(&self) -> &FileSystem {
        self.share.fs()
    }

    /// Checks that it is mounted, which it is not in a forked child.
    pub fn check(&self) -> Result<()> {
        self.fs().exists("/")?;
        Ok(())
    }

    /// Unmounts it if this is its last handle.
    pub fn release(mounted: Arc<SharedMount>) -> Result<()> {
        match Arc::into_inner(mounted) {
            Some(last) => Ok(last.share.end(|| ())?),
            None => Ok(()),
        }
    }
}

/// The properties of a file or directory.
#[repr(C)]
pub struct pumice_info {
    /// Length in bytes; 0 for a directory.
    pub len: u64,
    /// Space in use in bytes, with what is allocated ahead.
    pub allocated: u64,
    /// Time of the last change in nanoseconds since 1970; 0 if it is not known.
    pub mtime_ns: u64,
    /// The same for all names of one file, as long as the store is open. 0 for a directory that has none.
    pub file_id: u64,
    /// Number of names of the file.
    pub links: u32,
    /// 1 for a directory, 0 for a file.
    pub is_dir: u32,
}

impl pumice_info {
    pub(crate) fn of(stat: &Stat) -> pumice_info {
        let since_1970 = stat.mtime.duration_since(UNIX_EPOCH).unwrap_or_default();
        pumice_info {
            len: stat.len,
            allocated: stat.allocated,
            mtime_ns: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX),
            file_id: stat.blob_id.map_or(0, |id| id.0),
            links: u32::try_from(stat.links).unwrap_or(u32::MAX),
            is_dir: u32::from(stat.is_dir),
        }
    }
}

/// An entry of a directory.
#[repr(C)]
pub struct pumice_entry {
    /// The last component of its path. It is valid until the function that was called with it returns.
    pub name: *const c_char,
    /// Length in bytes; 0 for a directory.
    pub len: u64,
    /// 1 for a directory, 0 for a file.
    pub is_dir: u32,
    /// Zero.
    pub reserved: u32,
}

/// The space of a store, as `df` shows it. All but the last are in bytes.
#[repr(C)]
pub struct pumice_space {
    /// Space for files.
    pub total: u64,
    /// Space that can still be written.
    pub free: u64,
    /// Space of the files, with what is allocated ahead.
    pub used: u64,
    /// The unit of allocation.
    pub cluster: u64,
    /// Number of files.
    pub files: u64,
}

/// The function that `pumice_store_list` calls for each entry, on the thread that has called it, with
/// no lock held: it may call functions of this API. It returns 0 to go on, and another value to stop. It
/// must not throw, and must not leave by longjmp.
pub type pumice_entry_fn =
    Option<unsafe extern "C" fn(arg: *mut c_void, entry: *const pumice_entry) -> i32>;

/// Opens the store that a URI names: `blobfs:///var/lib/app/data.img`, `blobfs:///dev/nvme0n1`,
/// `blobfs://malloc://64M`. `?size:4G&create` makes a missing image file, `root:/dir` calls that
/// directory `/`, and `cache:64M` limits the page cache. `options` may be NULL. A path with `..` leads
/// out of `root`: it is a name for a directory and no protection.
///
/// A device that holds nothing but zeroes is formatted. A store that this process has open already is
/// shared, with the options of the first one; `-EBUSY` if one is for reading only and the other is not,
/// or if another process has it. A device in memory is new each time. The time that it takes depends on
/// the size of the store if it was not closed in order.
///
/// On success `*store` is the handle, which the caller closes with `pumice_store_close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_open(
    uri: *const c_char,
    options: *const pumice_options,
    store: *mut *mut pumice_store,
    error: *mut pumice_error,
) -> i32 {
    let open = || {
        // SAFETY: by the contract of the header.
        unsafe {
            put("store", store, ptr::null_mut())?;
            let options = mount_options(options)?;
            let (share, root) = mount_uri_with(text("URI", uri)?, options)?;
            let mounted = Arc::new(SharedMount { share, root });
            store.write(Box::into_raw(Box::new(pumice_store { mounted })));
        }
        Ok(())
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, open) }
}

/// Closes a store, and frees the handle whatever is returned. The store is unmounted when the last
/// handle and the last file of it in this process are closed, and everything is durable then. An
/// error says that this last close has failed: the next open repairs what it can. NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_close(
    store: *mut pumice_store,
    error: *mut pumice_error,
) -> i32 {
    let close = || {
        if store.is_null() {
            return Ok(());
        }
        // SAFETY: it is from Box::into_raw in `pumice_store_open`, and closed once.
        let store = unsafe { Box::from_raw(store) };
        SharedMount::release(store.mounted)
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, close) }
}

/// Runs `call` on a store and a path in it.
///
/// # Safety
/// As the header asks of every caller.
pub(crate) unsafe fn on_path<T>(
    store: *const pumice_store,
    path: *const c_char,
    call: impl FnOnce(&Arc<SharedMount>, &str) -> Result<T>,
) -> Result<T> {
    // SAFETY: by the contract of this function.
    let (store, path) = unsafe { (live("store", store)?, text("path", path)?) };
    call(&store.mounted, &resolve(&store.mounted.root, path))
}

/// Runs `call` on a store and two paths in it.
///
/// # Safety
/// As the header asks of every caller.
unsafe fn on_paths(
    store: *const pumice_store,
    from: *const c_char,
    to: *const c_char,
    call: impl FnOnce(&FileSystem, &str, &str) -> std::result::Result<(), FsError>,
) -> Result<()> {
    // SAFETY: by the contract of this function.
    let (from, to) = unsafe { (text("first path", from)?, text("second path", to)?) };
    // SAFETY: by the contract of this function.
    let mounted = &unsafe { live("store", store) }?.mounted;
    let (from, to) = (resolve(&mounted.root, from), resolve(&mounted.root, to));
    Ok(call(mounted.fs(), &from, &to)?)
}

/// Makes all files durable that were written through any handle of the store. Returns the first error;
/// the other files are synced nevertheless.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_sync(
    store: *const pumice_store,
    error: *mut pumice_error,
) -> i32 {
    // SAFETY: by the contract of the header.
    unsafe { done(error, || Ok(live("store", store)?.mounted.fs().sync()?)) }
}

/// Puts the space of the store into `*space`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_space(
    store: *const pumice_store,
    space: *mut pumice_space,
    error: *mut pumice_error,
) -> i32 {
    let ask = || {
        // SAFETY: by the contract of the header.
        let mounted = &unsafe { live("store", store) }?.mounted;
        mounted.check()?;
        let found = mounted.fs().statfs();
        let answer = pumice_space {
            total: found.total,
            free: found.free,
            used: found.used,
            cluster: found.cluster,
            files: found.files,
        };
        // SAFETY: by the contract of the header.
        unsafe { put("space", space, answer) }
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, ask) }
}

/// Puts the properties of a file or directory into `*info`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_info(
    store: *const pumice_store,
    path: *const c_char,
    info: *mut pumice_info,
    error: *mut pumice_error,
) -> i32 {
    let ask = || {
        // SAFETY: by the contract of the header.
        let stat = unsafe { on_path(store, path, |mounted, path| Ok(mounted.fs().stat(path)?)) }?;
        // SAFETY: by the contract of the header.
        unsafe { put("properties", info, pumice_info::of(&stat)) }
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, ask) }
}

/// Calls `each` with `arg` for every entry of a directory, in the order of their names. Returns how many
/// times it was called. Entries that are made or removed meanwhile may be missing or there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_list(
    store: *const pumice_store,
    path: *const c_char,
    each: pumice_entry_fn,
    arg: *mut c_void,
    error: *mut pumice_error,
) -> i64 {
    let list = || {
        let each = each.ok_or_else(|| invalid("the function is NULL: pass one"))?;
        // SAFETY: by the contract of the header.
        let mut found =
            unsafe { on_path(store, path, |mounted, path| Ok(mounted.fs().list(path)?)) }?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let mut called = 0;
        for entry in found {
            let name = CString::new(entry.name)
                .map_err(|_| Fault::new(libc::EUCLEAN, "the store has a name with a NUL"))?;
            let entry = pumice_entry {
                name: name.as_ptr(),
                len: entry.len,
                is_dir: u32::from(entry.is_dir),
                reserved: 0,
            };
            called += 1;
            // SAFETY: the function and its argument belong together, by the contract of the header.
            if unsafe { each(arg, &raw const entry) } != 0 {
                break;
            }
        }
        Ok(called)
    };
    // SAFETY: by the contract of the header.
    unsafe { answer(error, list) }
}

/// Makes a directory, durably. Its parent must exist; `-EEXIST` if the path does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_mkdir(
    store: *const pumice_store,
    path: *const c_char,
    error: *mut pumice_error,
) -> i32 {
    let make = |mounted: &Arc<SharedMount>, path: &str| {
        let path = fs::normalise(path)?;
        Ok(mounted.fs().mkdir(&path)?)
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, || on_path(store, path, make)) }
}

/// Removes an empty directory, durably. `-ENOTEMPTY` if it has entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_rmdir(
    store: *const pumice_store,
    path: *const c_char,
    error: *mut pumice_error,
) -> i32 {
    let remove = |mounted: &Arc<SharedMount>, path: &str| Ok(mounted.fs().rmdir(path)?);
    // SAFETY: by the contract of the header.
    unsafe { done(error, || on_path(store, path, remove)) }
}

/// Removes a name of a file, durably. The file goes with its last name, when it is closed everywhere.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_unlink(
    store: *const pumice_store,
    path: *const c_char,
    error: *mut pumice_error,
) -> i32 {
    let remove = |mounted: &Arc<SharedMount>, path: &str| Ok(mounted.fs().unlink(path)?);
    // SAFETY: by the contract of the header.
    unsafe { done(error, || on_path(store, path, remove)) }
}

/// Renames a file or directory, durably and in one step. A file that has the name `to` is replaced, and
/// stays usable for those who have it open. The content of the file is not synced by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_rename(
    store: *const pumice_store,
    from: *const c_char,
    to: *const c_char,
    error: *mut pumice_error,
) -> i32 {
    // SAFETY: by the contract of the header.
    unsafe { done(error, || on_paths(store, from, to, FileSystem::rename)) }
}

/// Gives a file another name, durably. `-EMLINK` when it has as many as it can have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_store_link(
    store: *const pumice_store,
    from: *const c_char,
    to: *const c_char,
    error: *mut pumice_error,
) -> i32 {
    // SAFETY: by the contract of the header.
    unsafe { done(error, || on_paths(store, from, to, FileSystem::link)) }
}
