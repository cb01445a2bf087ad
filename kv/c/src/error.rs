//! Errors, and what is asked of every argument.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use pumice_rocksdb_fs::Fault;

/// Bit of `pumice_error.flags`: the same call may succeed later, after space was freed or a fault of
/// the device has passed.
pub const PUMICE_ERROR_RETRYABLE: u32 = 1;
/// Bit of `pumice_error.flags`: bytes that a call had accepted may be lost or damaged.
pub const PUMICE_ERROR_DATA_LOSS: u32 = 2;

/// Room for the text of a `pumice_error`, with its NUL.
const TEXT: usize = 504;

/// The details of a failure. It is the caller's memory, it needs no initialisation, and there is
/// nothing to free.
#[repr(C)]
pub struct pumice_error {
    /// The errno, positive.
    pub code: i32,
    /// PUMICE_ERROR_RETRYABLE and PUMICE_ERROR_DATA_LOSS.
    pub flags: u32,
    /// A text that says what failed, why, and what to do, in UTF-8, with a NUL at its end. A long one is cut off.
    pub text: [c_char; 504],
}

const _: () = assert!(size_of::<pumice_error>() == 8 + TEXT);

/// The result of everything that can fail here.
pub(crate) type Result<T> = std::result::Result<T, Fault>;

/// Makes the failure of a wrong argument.
pub(crate) fn invalid(text: impl Into<String>) -> Fault {
    Fault::new(libc::EINVAL, text)
}

/// Runs a call. A failure and a panic become the negative errno, with the details in `error`.
///
/// # Safety
/// `error` is null, or memory of a `pumice_error` that nobody else uses.
pub(crate) unsafe fn answer(error: *mut pumice_error, call: impl FnOnce() -> Result<i64>) -> i64 {
    let fault = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(answer)) => return answer,
        Ok(Err(fault)) => fault,
        Err(payload) => Fault::from_panic(&*payload),
    };
    let code = fault.errno.max(1);
    if !error.is_null() {
        // SAFETY: by the contract of this function. All of it is written, so it need not be initialised.
        unsafe { error.write(details(code, &fault)) };
    }
    -i64::from(code)
}

/// As [`answer`], for a call that returns nothing but whether it succeeded.
///
/// # Safety
/// As [`answer`].
pub(crate) unsafe fn done(error: *mut pumice_error, call: impl FnOnce() -> Result<()>) -> i32 {
    // SAFETY: by the contract of this function.
    let answer = unsafe { answer(error, || call().map(|()| 0)) };
    i32::try_from(answer).unwrap_or(-libc::EIO)
}

fn details(code: i32, fault: &Fault) -> pumice_error {
    let mut text = [0; TEXT];
    // A NUL would end the text before its end.
    let printable = fault.text.replace('\0', "\u{fffd}");
    let end = printable.floor_char_boundary(TEXT - 1);
    for (to, byte) in text.iter_mut().zip(printable[..end].bytes()) {
        *to = c_char::from_ne_bytes([byte]);
    }
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    pumice_error {
        code,
        flags: bit(fault.retryable, PUMICE_ERROR_RETRYABLE)
            | bit(fault.data_loss, PUMICE_ERROR_DATA_LOSS),
        text,
    }
}

/// Returns a text that a C program passes.
///
/// # Safety
/// `text` is null, or readable for `'a` up to its NUL.
pub(crate) unsafe fn text<'a>(what: &str, text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(invalid(format!("the {what} is NULL: pass a text")));
    }
    // SAFETY: by the contract of this function.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| {
        invalid(format!(
            "the {what} {:?} is not UTF-8: texts are UTF-8 here",
            text.to_string_lossy()
        ))
    })
}

/// Returns what a handle points to.
///
/// # Safety
/// `handle` is null, or live for `'a`.
pub(crate) unsafe fn live<'a, T>(what: &str, handle: *const T) -> Result<&'a T> {
    // SAFETY: by the contract of this function.
    unsafe { handle.as_ref() }
        .ok_or_else(|| invalid(format!("the {what} is NULL: pass an open one")))
}

/// Puts a result where a C program wants it.
///
/// # Safety
/// `place` is null, or writable.
pub(crate) unsafe fn put<T>(what: &str, place: *mut T, value: T) -> Result<()> {
    if place.is_null() {
        return Err(invalid(format!(
            "the place for the {what} is NULL: pass an address"
        )));
    }
    // SAFETY: by the contract of this function. What was there is not dropped: it may be uninitialised.
    unsafe { place.write(value) };
    Ok(())
}

/// Checks that memory can have this length.
fn check_memory(what: &str, is_null: bool, len: usize) -> Result<()> {
    if len > 0 && is_null {
        return Err(invalid(format!(
            "{what} is NULL, but its length is {len}: pass memory"
        )));
    }
    if isize::try_from(len).is_err() {
        return Err(invalid(format!(
            "{what} cannot have a length of {len} bytes"
        )));
    }
    Ok(())
}

/// Returns the data that a C program passes.
///
/// # Safety
/// `data` is null, or readable and unchanged for `'a` with this length.
pub(crate) unsafe fn data<'a>(data: *const u8, len: usize) -> Result<&'a [u8]> {
    check_memory("the data", data.is_null(), len)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: it is not null, and the rest is the contract of this function.
    Ok(unsafe { slice::from_raw_parts(data, len) })
}

/// Returns the memory that a C program passes for data.
///
/// # Safety
/// `buffer` is null, or initialised or not, writable with this length, and nobody else's for `'a`.
pub(crate) unsafe fn buffer<'a>(buffer: *mut u8, len: usize) -> Result<&'a mut [u8]> {
    check_memory("the buffer", buffer.is_null(), len)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: it is not null, and the rest is the contract of this function. Bytes have no invalid
    // values, and the file system only writes to them.
    Ok(unsafe { slice::from_raw_parts_mut(buffer, len) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(call: impl FnOnce() -> Result<i64>) -> (i64, pumice_error) {
        let mut error = details(1, &Fault::new(1, ""));
        // SAFETY: the place is writable.
        let code = unsafe { answer(&raw mut error, call) };
        (code, error)
    }

    fn said(error: &pumice_error) -> String {
        // SAFETY: the text ends with a NUL.
        unsafe { CStr::from_ptr(error.text.as_ptr()) }
            .to_str()
            .expect("it is cut off between two characters")
            .to_owned()
    }

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        let (code, error) = failed(|| panic!("boom"));
        assert_eq!((code, error.code), (-i64::from(libc::EIO), libc::EIO));
        assert!(said(&error).contains("panicked: boom"), "{}", said(&error));
        // SAFETY: without a place nothing is written.
        let code = unsafe { done(std::ptr::null_mut(), || panic!("boom")) };
        assert_eq!(code, -libc::EIO);
    }

    /// A text is cut off between two characters, and has no NUL inside.
    #[test]
    fn a_text_fits_whatever_it_is() {
        for len in TEXT - 4..TEXT + 4 {
            let long = format!("{}ßßßß", "x".repeat(len - 4));
            let (_, error) = failed(|| Err(invalid(&long[..])));
            let text = said(&error);
            assert!(
                long.starts_with(&text) && text.len() + 2 >= long.len().min(TEXT - 1),
                "{len}"
            );
        }
        let (_, error) = failed(|| Err(invalid("a\0b")));
        assert_eq!(said(&error), "a\u{fffd}b");
    }

    #[test]
    fn the_flags_say_what_the_code_does_not() {
        let mut fault = Fault::new(libc::ENOSPC, "full");
        fault.retryable = true;
        assert_eq!(details(28, &fault).flags, PUMICE_ERROR_RETRYABLE);
        fault.data_loss = true;
        assert_eq!(
            details(28, &fault).flags,
            PUMICE_ERROR_RETRYABLE | PUMICE_ERROR_DATA_LOSS
        );
    }
}
