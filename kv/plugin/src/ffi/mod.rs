//! The C functions that the shim calls, over BlobFS.
//!
//! A handle on the C++ side is a pointer from `Box::into_raw`: [`Mounted`] for a file system,
//! [`Opened`] for a file, [`Locked`] for a lock, `ReadHandle` for a read. C++ releases each exactly
//! once, after the last call with it. Many threads may call with one handle at once, for which
//! these types are `Sync`. No panic leaves a function: [`guard`] makes it an error.
#![allow(unsafe_code)]

mod files;
mod paths;
mod start;

pub(crate) use files::*;
pub(crate) use paths::*;
pub use start::{handle, handle_of};
pub(crate) use start::{pumice_abi_check, pumice_mount_uri};

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::Arc;

use pumice_blobfs::fs::{File, FileSystem};

use crate::Use;
use crate::binding::Binding;
use crate::contract::{PUMICE_DATA_LOSS, PUMICE_RETRYABLE, pumice_fault};
use crate::fault::{Fault, Result};

/// A file system, and its directory that an environment calls `/`, normalised.
struct Mounted {
    fs: FileSystem,
    root: String,
    binding: Arc<Binding>,
    /// The share of the mount, if a URI has named it.
    share: Option<Arc<Use>>,
}

/// A file that was opened through an environment.
struct Opened {
    file: File,
    binding: Arc<Binding>,
    /// Keeps the file system mounted. The fields are dropped in this order.
    _share: Option<Arc<Use>>,
}

/// A lock that was taken through an environment, which holds it.
struct Locked {
    binding: Arc<Binding>,
    id: usize,
}

thread_local! {
    static LAST: RefCell<Fault> = RefCell::new(Fault::new(libc::EIO, "no failure"));
}

/// Keeps `fault` for `pumice_last_fault` and returns its negative errno.
#[cold]
fn remember(fault: Fault) -> i64 {
    let errno = i64::from(fault.errno.max(1));
    // A thread that is ending has no place for the text.
    let _ = LAST.try_with(|last| *last.borrow_mut() = fault);
    -errno
}

#[inline(always)]
fn guard(call: impl FnOnce() -> Result<i64>) -> i64 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(answer)) => answer,
        Ok(Err(fault)) => remember(fault),
        Err(payload) => remember(Fault::from_panic(&*payload)),
    }
}

/// Runs a call that cannot fail. A panic is ignored after its message went to the panic hook.
fn guard_value<T>(otherwise: T, call: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(otherwise)
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// # Safety
/// `data` and `len` describe memory that stays readable and unchanged for `'a`, or `len` is 0.
unsafe fn bytes<'a>(data: *const c_char, len: usize) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: by the contract of this function.
    unsafe { slice::from_raw_parts(data.cast(), len) }
}

/// # Safety
/// `data` and `len` describe memory that nobody else touches for `'a`, or `len` is 0.
unsafe fn bytes_mut<'a>(data: *mut c_char, len: usize) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: by the contract of this function.
    unsafe { slice::from_raw_parts_mut(data.cast(), len) }
}

/// # Safety
/// `path` and `len` are readable for `'a`.
unsafe fn text<'a>(path: *const c_char, len: usize) -> Result<&'a str> {
    // SAFETY: by the contract of this function.
    let path = unsafe { bytes(path, len) };
    std::str::from_utf8(path).map_err(|_| {
        Fault::new(
            libc::EINVAL,
            format!("{:?} is not UTF-8", String::from_utf8_lossy(path)),
        )
    })
}

/// # Safety
/// `fs` is a live file system of [`handle`] or `pumice_mount_uri`.
unsafe fn mounted<'a>(fs: *const c_void) -> &'a Mounted {
    // SAFETY: a live handle points to a Mounted, shared.
    unsafe { &*fs.cast::<Mounted>() }
}

/// # Safety
/// `file` is a live file of `pumice_open`.
unsafe fn opened<'a>(file: *const c_void) -> &'a Opened {
    // SAFETY: a live handle points to an Opened, shared.
    unsafe { &*file.cast::<Opened>() }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_last_fault(out: *mut pumice_fault) {
    static GONE: &str = "the thread is ending";
    let raw = LAST
        .try_with(|last| {
            let fault = last.borrow();
            pumice_fault {
                err: fault.errno,
                flags: if fault.retryable { PUMICE_RETRYABLE } else { 0 }
                    | if fault.data_loss { PUMICE_DATA_LOSS } else { 0 },
                text: fault.text.as_ptr().cast(),
                text_len: fault.text.len(),
            }
        })
        .unwrap_or(pumice_fault {
            err: libc::EIO,
            flags: 0,
            text: GONE.as_ptr().cast(),
            text_len: GONE.len(),
        });
    // SAFETY: the shim passes its own pumice_fault. The text lives in the thread's LAST, which the
    // next call of this thread changes at the earliest.
    unsafe { out.write(raw) };
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_fault_take(fault: *mut c_void) {
    // SAFETY: `fault` is from Box::into_raw in `read_rest`, and given back once.
    let fault = unsafe { Box::from_raw(fault.cast::<Fault>()) };
    remember(*fault);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the text of this thread's last fault, as C++ reads it.
    fn last() -> (i32, String) {
        let mut fault = std::mem::MaybeUninit::uninit();
        // SAFETY: the function writes all of it, and its text is valid until the next call.
        unsafe {
            pumice_last_fault(fault.as_mut_ptr());
            let fault = fault.assume_init();
            let text = bytes(fault.text, fault.text_len);
            (fault.err, String::from_utf8_lossy(text).into_owned())
        }
    }

    #[test]
    fn a_panic_is_a_failure_with_its_text() {
        assert_eq!(guard(|| panic!("boom")), -i64::from(libc::EIO));
        let (errno, text) = last();
        assert_eq!(errno, libc::EIO);
        assert!(text.contains("panicked: boom"), "{text}");
        assert_eq!(guard_value(7, || panic!("swallowed")), 7);
    }

    #[test]
    fn a_failure_keeps_its_errno_and_text() {
        let fault = Fault::new(libc::ENOSPC, "the disk is full");
        assert_eq!(guard(|| Err(fault)), -i64::from(libc::ENOSPC));
        assert_eq!(last(), (libc::ENOSPC, "the disk is full".to_owned()));
    }
}
