//! Open files.

use std::ffi::c_char;
use std::ptr;
use std::sync::Arc;

use pumice_blobfs::fs::{File, OpenOptions};

use crate::error::{Result, answer, buffer, data, done, invalid, live, pumice_error, put};
use crate::store::{SharedMount, on_path, pumice_info, pumice_store};

/// Bit for `pumice_file_open`: create the file if it does not exist.
pub const PUMICE_FILE_CREATE: u32 = 1;
/// Bit for `pumice_file_open`, with PUMICE_FILE_CREATE: fail with `-EEXIST` if the file exists.
pub const PUMICE_FILE_EXCLUSIVE: u32 = 2;
/// Bit for `pumice_file_open`: set the length to 0.
pub const PUMICE_FILE_TRUNCATE: u32 = 4;
/// Bit for `pumice_file_open`: bypass the page cache.
pub const PUMICE_FILE_DIRECT: u32 = 8;

/// All bits for `pumice_file_open`.
const FILE_FLAGS: u32 =
    PUMICE_FILE_CREATE | PUMICE_FILE_EXCLUSIVE | PUMICE_FILE_TRUNCATE | PUMICE_FILE_DIRECT;

/// An open file. It keeps its store mounted, and its content if the last name is removed.
pub struct pumice_file {
    file: File,
    mounted: Arc<SharedMount>,
}

/// Opens a file for reading and writing; `flags` are PUMICE_FILE_* or 0. A file that was created has its
/// name durably.
///
/// On success `*file` is the handle, which the caller closes with `pumice_file_close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_open(
    store: *const pumice_store,
    path: *const c_char,
    flags: u32,
    file: *mut *mut pumice_file,
    error: *mut pumice_error,
) -> i32 {
    let has = |flag| flags & flag != 0;
    let open = |mounted: &Arc<SharedMount>, path: &str| {
        let unknown = flags & !FILE_FLAGS;
        if unknown != 0 {
            return Err(invalid(format!(
                "{path}: the flags {unknown:#x} do not exist: leave them out"
            )));
        }
        if has(PUMICE_FILE_EXCLUSIVE) && !has(PUMICE_FILE_CREATE) {
            return Err(invalid(format!(
                "{path}: PUMICE_FILE_EXCLUSIVE only goes with PUMICE_FILE_CREATE: add that"
            )));
        }
        let how = OpenOptions::READ
            .create(has(PUMICE_FILE_CREATE))
            .exclusive(has(PUMICE_FILE_EXCLUSIVE))
            .truncate(has(PUMICE_FILE_TRUNCATE));
        let file = mounted.fs().open(path, how)?;
        file.set_direct(has(PUMICE_FILE_DIRECT));
        Ok(pumice_file {
            file,
            mounted: Arc::clone(mounted),
        })
    };
    let open = || {
        // SAFETY: by the contract of the header.
        unsafe {
            put("file", file, ptr::null_mut())?;
            let opened = on_path(store, path, open)?;
            put("file", file, Box::into_raw(Box::new(opened)))
        }
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, open) }
}

/// Closes a file, and frees the handle whatever is returned. It does not sync: what was not synced
/// outlives the process, but not a power cut, until the store is closed. An error is that of the store's
/// last close, see `pumice_store_close`. NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_close(
    file: *mut pumice_file,
    error: *mut pumice_error,
) -> i32 {
    let close = || {
        if file.is_null() {
            return Ok(());
        }
        // SAFETY: it is from Box::into_raw in `pumice_file_open`, and closed once.
        let pumice_file { file, mounted } = *unsafe { Box::from_raw(file) };
        drop(file);
        SharedMount::release(mounted)
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, close) }
}

/// Returns a file.
///
/// # Safety
/// As the header asks of every caller.
unsafe fn open_file<'a>(file: *const pumice_file) -> Result<&'a File> {
    // SAFETY: by the contract of this function.
    Ok(&unsafe { live("file", file) }?.file)
}

/// Reads at most `len` bytes at `offset` into `buf`. Returns the number of bytes, which is less than
/// `len` only at the end of the file, and 0 behind it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_read(
    file: *const pumice_file,
    offset: u64,
    buf: *mut u8,
    len: usize,
    error: *mut pumice_error,
) -> i64 {
    let read = || {
        // SAFETY: by the contract of the header.
        let (file, buf) = unsafe { (open_file(file)?, buffer(buf, len)?) };
        let got = file.read_at(offset, buf)?;
        Ok(i64::try_from(got).unwrap_or(i64::MAX))
    };
    // SAFETY: by the contract of the header.
    unsafe { answer(error, read) }
}

/// Writes all `len` bytes at `offset`; a gap behind the end becomes zeroes. After a failure the bytes
/// there may be the old or the new ones. `pumice_file_sync` makes them durable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_write(
    file: *const pumice_file,
    offset: u64,
    buf: *const u8,
    len: usize,
    error: *mut pumice_error,
) -> i32 {
    let write = || {
        // SAFETY: by the contract of the header.
        let (file, bytes) = unsafe { (open_file(file)?, data(buf, len)?) };
        Ok(file.write_at(offset, bytes)?)
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, write) }
}

/// Appends all `len` bytes at the end, usually by a copy into memory. Appends of several threads come one
/// after the other. After a failure the file is unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_append(
    file: *const pumice_file,
    buf: *const u8,
    len: usize,
    error: *mut pumice_error,
) -> i32 {
    let append = || {
        // SAFETY: by the contract of the header.
        let (file, bytes) = unsafe { (open_file(file)?, data(buf, len)?) };
        Ok(file.append(bytes)?)
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, append) }
}

/// Sets the length. New bytes are zeroes. A shorter length is durable on return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_truncate(
    file: *const pumice_file,
    len: u64,
    error: *mut pumice_error,
) -> i32 {
    // SAFETY: by the contract of the header.
    unsafe { done(error, || Ok(open_file(file)?.truncate(len)?)) }
}

/// Makes the content and the length durable. After a failure the data stays in memory, and the next
/// sync writes it again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_sync(
    file: *const pumice_file,
    error: *mut pumice_error,
) -> i32 {
    // SAFETY: by the contract of the header.
    unsafe { done(error, || Ok(open_file(file)?.sync()?)) }
}

/// Puts the properties of an open file into `*info`. It may have lost its name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_file_info(
    file: *const pumice_file,
    info: *mut pumice_info,
    error: *mut pumice_error,
) -> i32 {
    let ask = || {
        // SAFETY: by the contract of the header.
        let open = unsafe { live("file", file) }?;
        open.mounted.check()?;
        // SAFETY: by the contract of the header.
        unsafe { put("properties", info, pumice_info::of(&open.file.stat())) }
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, ask) }
}
