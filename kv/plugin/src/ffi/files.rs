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

/// Most bytes of a range that are asked for early: a block of RocksDB's default size and what surrounds it.
const PREFETCH: usize = 8 << 10;

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
                Some(pin) => {
                    prefetch(&pin);
                    lend(raw, Lent::Cached(pin));
                }
                None => left += 1,
            }
        }
        if left > 0 {
            read_rest(file, raws, left);
        }
        Ok(0)
    })
}

/// Asks the processor for what is lent: RocksDB begins at the end, with the checksum, and would wait for memory three times. A
/// longer range has more lines than the processor waits for at once.
#[inline]
fn prefetch(lent: &[u8]) {
    pumice_io::sys::prefetch(&lent[lent.len().saturating_sub(PREFETCH)..]);
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

#[cfg(test)]
mod tests {
    use std::ptr;
    use std::sync::Arc;

    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    use pumice_bdev::{BlockDevice, OpKind};
    use pumice_blobfs::fs::OpenOptions;

    use super::*;
    use crate::ffi::{pumice_fault_take, pumice_fs_release, pumice_open};

    /// Length of the file, whose last page is not whole.
    const LEN: u64 = 100 * 4096 + 100;

    /// The bytes of the file: those of each page have a value of their own.
    fn content() -> Vec<u8> {
        let value = |n: u64| u8::try_from(n / 4096 + 1).unwrap();
        (0..LEN).map(value).collect()
    }

    /// A file, none of which is in memory, on a device that fails on demand.
    struct Uncached {
        faulty: Arc<ErrorDevice>,
        /// The first block of the file on the device.
        block: u64,
        fs: *const c_void,
        file: *const c_void,
    }

    impl Uncached {
        fn new() -> Uncached {
            let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
            let faulty = Arc::new(ErrorDevice::new(None, base));
            let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
            let options = crate::MountOptions::new();
            let fs = crate::mount_device(&device, &options).unwrap();
            let file = fs.open("/f", OpenOptions::CREATE).unwrap();
            file.append(&content()).unwrap();
            file.sync().unwrap();
            drop(file);
            fs.unmount().unwrap();
            drop(fs);
            // The cache of a new mount is empty.
            let fs = crate::mount_device(&device, &options).unwrap();
            let id = fs.stat("/f").unwrap().blob_id.unwrap();
            let block = fs.blobstore().extents(id).unwrap().lba(0).unwrap();
            let fs = crate::handle(fs, "/".to_owned(), Arc::default());
            let mut file = ptr::null();
            // SAFETY: the file system is live, and the path is readable.
            let opened = unsafe { pumice_open(fs, c"/f".as_ptr(), 2, 0, &raw mut file) };
            assert_eq!(opened, 0);
            Uncached {
                faulty,
                block,
                fs,
                file,
            }
        }

        /// Lets every read fail that touches the first page of the file.
        fn fail_first_page(&self) {
            self.faulty.inject(
                Injection::new(Failure::Fail)
                    .op(Some(OpKind::Read))
                    .count(u64::MAX)
                    .range(Some((self.block, 1))),
            );
        }

        /// Reads these ranges (offset, length) together, into memory of the file system. A read that
        /// fails has no bytes.
        fn read_many(&self, ranges: &[(u64, usize)]) -> Vec<Option<Vec<u8>>> {
            let read = |(offset, len): &(u64, usize)| pumice_read {
                offset: *offset,
                len: *len,
                buf: ptr::null_mut(),
                data: ptr::null(),
                got: 0,
                pin: ptr::null_mut(),
                fault: ptr::null_mut(),
            };
            let mut reads: Vec<_> = ranges.iter().map(read).collect();
            // SAFETY: the file is live, and the array has this length.
            let done = unsafe { pumice_read_many(self.file, reads.as_mut_ptr(), reads.len()) };
            assert_eq!(done, 0);
            let answer = |read: &pumice_read| {
                let Ok(got) = usize::try_from(read.got) else {
                    // SAFETY: a read that failed has a fault, which is taken once.
                    unsafe { pumice_fault_take(read.fault) };
                    return None;
                };
                // SAFETY: the memory is readable until the loan ends, which it does once.
                unsafe {
                    let bytes = slice::from_raw_parts(read.data, got).to_vec();
                    pumice_pin_release(read.pin);
                    Some(bytes)
                }
            };
            reads.iter().map(answer).collect()
        }
    }

    impl Drop for Uncached {
        fn drop(&mut self) {
            // SAFETY: each handle is released once, last.
            unsafe {
                pumice_file_release(self.file);
                pumice_fs_release(self.fs);
            }
        }
    }

    /// Each read has memory of its own, also if one of them fails.
    #[test]
    fn a_read_that_fails_takes_nothing_from_the_others() {
        let file = Uncached::new();
        file.fail_first_page();
        let got = file.read_many(&[(0, 4096), (40 * 4096, 3 * 4096), (80 * 4096, 4096)]);
        let page = |n: u8| vec![n + 1; 4096];
        let three = [page(40), page(41), page(42)].concat();
        assert!(got == [None, Some(three), Some(page(80))]);
    }

    /// `RocksDB` takes a short read for the end of the file, and nothing else.
    #[test]
    fn a_read_across_the_end_is_short() {
        let file = Uncached::new();
        let got = file.read_many(&[(LEN - 4196, 8192), (LEN, 10), (LEN + 5, 10)]);
        let rest = content().split_off(99 * 4096);
        let empty = Some(Vec::new());
        assert!(got == [Some(rest), empty.clone(), empty]);
    }
}
