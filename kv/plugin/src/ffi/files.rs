//! The functions of an open file.

use std::ffi::{c_char, c_void};
use std::slice;

use pumice_blobfs::fs::{Access, File, FsError, Pinned, ReadHandle, ReadRequest};

use super::{Opened, bytes, bytes_mut, count, guard, guard_value, opened};
use crate::contract::{
    PUMICE_ACCESS_RANDOM, PUMICE_ACCESS_SEQUENTIAL, PUMICE_ACCESS_WILL_NEED,
    PUMICE_ACCESS_WONT_NEED, pumice_read,
};
use crate::fault::{Fault, Result};

/// Memory that `pumice_read_many` lends to RocksDB.
enum Lent {
    Cached(Pinned),
    Owned(Vec<u8>),
}

impl Lent {
    fn bytes(&self) -> &[u8] {
        match self {
            Lent::Cached(pin) => pin,
            Lent::Owned(bytes) => bytes,
        }
    }
}

/// Returns a file, for calls that end with their environment.
///
/// # Safety
/// As [`opened`].
#[inline(always)]
unsafe fn usable<'a>(file: *const c_void) -> Result<&'a File> {
    // SAFETY: by the contract of this function.
    let opened = unsafe { opened(file) };
    opened.binding.check()?;
    Ok(&opened.file)
}

/// Functions of a file that return only whether they succeeded.
macro_rules! file_calls {
    ($($name:ident($($arg:ident: $ty:ty),*) => |$file:ident| $call:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(file: *const c_void, $($arg: $ty),*) -> i64 {
            guard(|| {
                // SAFETY: the shim passes a live file, and readable data where it passes data.
                unsafe {
                    let $file = usable(file)?;
                    $call?;
                }
                Ok(0)
            })
        }
    )*};
}

file_calls! {
    pumice_append(data: *const c_char, len: usize) => |file| file.append(bytes(data, len));
    pumice_write_at(offset: u64, data: *const c_char, len: usize) => |file| file.write_at(offset, bytes(data, len));
    pumice_truncate(len: u64) => |file| file.truncate(len);
    pumice_allocate(offset: u64, len: u64) => |file| file.allocate(offset, len);
    pumice_sync() => |file| file.sync();
    pumice_range_sync(offset: u64, len: u64) => |file| file.range_sync(offset, len);
    pumice_prefetch(offset: u64, len: u64) => |file| file.prefetch(offset, len);
    // This starts writing dirty bytes, without waiting, and frees what was allocated past the end.
    pumice_finish() => |file| file.flush().map(|()| file.finish_writing());
    pumice_invalidate(offset: u64, len: u64) => |file| Ok::<(), FsError>(file.invalidate(offset, len));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_file_release(file: *const c_void) {
    // SAFETY: `file` is from Box::into_raw in `pumice_open`; the shim releases it once, last.
    let file = unsafe { Box::from_raw(file.cast_mut().cast::<Opened>()) };
    guard_value((), || drop(file));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_file_len(file: *const c_void) -> u64 {
    // SAFETY: the shim passes a live file.
    let opened = unsafe { opened(file) };
    guard_value(0, || opened.file.len())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_file_id(file: *const c_void) -> u64 {
    // SAFETY: the shim passes a live file.
    let opened = unsafe { opened(file) };
    guard_value(0, || opened.file.blob_id().0)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_read_at(
    file: *const c_void,
    offset: u64,
    buf: *mut c_char,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the shim passes a live file, and memory that is RocksDB's for this read.
        let (file, buf) = unsafe { (usable(file)?, bytes_mut(buf, len)) };
        Ok(count(file.read_at(offset, buf)?))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_read_many(
    file: *const c_void,
    reads: *mut pumice_read,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the shim passes a live file and an array of its own with `len` reads.
        let (file, raws) = unsafe { (usable(file)?, slice::from_raw_parts_mut(reads, len)) };
        // Cached bytes that can be lent need no buffer and no copy.
        let mut left = 0;
        for raw in &mut *raws {
            let pinned = raw
                .buf
                .is_null()
                .then(|| file.read_pinned(raw.offset, raw.len));
            match pinned.flatten() {
                Some(pin) => lend(raw, Lent::Cached(pin)),
                None => left += 1,
            }
        }
        if left > 0 {
            read_rest(file, raws, left);
        }
        Ok(0)
    })
}

/// Reads the `left` requests that `pumice_read_many` could not lend.
fn read_rest(file: &File, raws: &mut [pumice_read], left: usize) {
    let open = |raw: &pumice_read| raw.pin.is_null();
    let mut own: Vec<Vec<u8>> = raws
        .iter()
        .filter(|raw| open(raw) && raw.buf.is_null())
        .map(|raw| vec![0; raw.len])
        .collect();
    let mut next_own = own.iter_mut();
    let mut reads = Vec::with_capacity(left);
    for raw in raws.iter().filter(|raw| open(raw)) {
        let buf = if raw.buf.is_null() {
            next_own
                .next()
                .map_or(&mut [] as &mut [u8], Vec::as_mut_slice)
        } else {
            // SAFETY: RocksDB's memory for this read alone: its reads do not overlap.
            unsafe { bytes_mut(raw.buf.cast(), raw.len) }
        };
        reads.push(ReadRequest::new(raw.offset, buf));
    }
    file.read_many(&mut reads);
    let results: Vec<_> = reads.into_iter().map(|read| read.result).collect();
    let mut own = own.into_iter();
    for (raw, result) in raws.iter_mut().filter(|raw| open(raw)).zip(results) {
        let lent = if raw.buf.is_null() { own.next() } else { None };
        match (result, lent) {
            (Ok(got), Some(mut bytes)) => {
                bytes.truncate(got);
                lend(raw, Lent::Owned(bytes));
            }
            (Ok(got), None) => raw.got = count(got),
            (Err(e), _) => {
                let fault = Fault::from(e);
                raw.got = -i64::from(fault.errno.max(1));
                raw.fault = Box::into_raw(Box::new(fault)).cast();
            }
        }
    }
}

fn lend(raw: &mut pumice_read, lent: Lent) {
    let lent = Box::new(lent);
    raw.data = lent.bytes().as_ptr();
    raw.got = count(lent.bytes().len());
    raw.pin = Box::into_raw(lent).cast();
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_pin_release(pin: *mut c_void) {
    // SAFETY: `pin` is from Box::into_raw in `lend`; RocksDB gives it back once.
    let lent = unsafe { Box::from_raw(pin.cast::<Lent>()) };
    guard_value((), || drop(lent));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_advise(file: *const c_void, access: u32) {
    let access = match access {
        PUMICE_ACCESS_RANDOM => Access::Random,
        PUMICE_ACCESS_SEQUENTIAL => Access::Sequential,
        PUMICE_ACCESS_WILL_NEED => Access::WillNeed,
        PUMICE_ACCESS_WONT_NEED => Access::DontNeed,
        _ => Access::Normal,
    };
    // SAFETY: the shim passes a live file.
    let opened = unsafe { opened(file) };
    guard_value((), || opened.file.advise(access));
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_read_start(
    file: *const c_void,
    offset: u64,
    len: usize,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: the shim passes a live file.
        let read = unsafe { usable(file) }?.read_async(offset, len)?;
        let ready = i64::from(read.poll());
        // SAFETY: the shim passes a place for the handle.
        unsafe { out.write(Box::into_raw(Box::new(read)).cast()) };
        Ok(ready)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_read_finish(
    pending: *mut c_void,
    buf: *mut c_char,
    len: usize,
) -> i64 {
    // SAFETY: `pending` is from Box::into_raw in `pumice_read_start`, and finished or cancelled once.
    let read = unsafe { Box::from_raw(pending.cast::<ReadHandle>()) };
    guard(move || {
        // SAFETY: the scratch memory of the request, RocksDB's for this read alone.
        Ok(count(read.read_into(unsafe { bytes_mut(buf, len) })?))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_read_cancel(pending: *mut c_void) {
    // SAFETY: `pending` is from Box::into_raw in `pumice_read_start`, and finished or cancelled once.
    let read = unsafe { Box::from_raw(pending.cast::<ReadHandle>()) };
    guard_value((), || drop(read));
}
