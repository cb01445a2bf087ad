//! The functions of `cc/db_bench.cc`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::slice;

use super::env;
use crate::Files;

type FlagFn =
    unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, *const c_char, *const c_char);
type SaidFn = unsafe extern "C" fn(*mut c_void, *const c_char, usize);

unsafe extern "C" {
    fn pumice_db_bench_flags(each: FlagFn, arg: *mut c_void);
    fn pumice_db_bench_set(name: *const c_char, value: *const c_char) -> c_int;
    fn pumice_db_bench_run(env: *mut c_void, said: SaidFn, arg: *mut c_void) -> c_int;
    fn pumice_db_bench_verify(keys: *mut u64, error: *mut c_char, error_len: usize) -> c_int;
}

/// A flag of `db_bench` from C++: name, type, value, help.
pub(crate) type RawFlag = [String; 4];

/// Returns every flag of `db_bench`.
pub(crate) fn flags() -> Vec<RawFlag> {
    unsafe extern "C" fn each(
        arg: *mut c_void,
        name: *const c_char,
        kind: *const c_char,
        value: *const c_char,
        help: *const c_char,
    ) {
        // SAFETY: `arg` is the vector below, which nobody else uses during the call.
        let flags = unsafe { &mut *arg.cast::<Vec<RawFlag>>() };
        flags.push([name, kind, value, help].map(|text| {
            // SAFETY: C++ passes texts that end with a NUL and are valid for the call.
            unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .into_owned()
        }));
    }
    let mut flags: Vec<RawFlag> = Vec::new();
    // SAFETY: `each` takes what is passed with it.
    unsafe { pumice_db_bench_flags(each, ptr::from_mut(&mut flags).cast()) };
    flags
}

/// Sets a flag of `db_bench`. Returns false for a value that it cannot have.
pub(crate) fn set(name: &str, value: &str) -> bool {
    let (Ok(name), Ok(value)) = (CString::new(name), CString::new(value)) else {
        return false;
    };
    // SAFETY: both texts end with a NUL and outlive the call.
    unsafe { pumice_db_bench_set(name.as_ptr(), value.as_ptr()) == 0 }
}

/// Runs `db_bench` with the flags that were set.
pub(crate) fn run<S: FnMut(&[u8]) + Send>(files: &Files, said: S) -> Result<c_int, pumice::Error> {
    unsafe extern "C" fn hear<S: FnMut(&[u8]) + Send>(
        arg: *mut c_void,
        text: *const c_char,
        len: usize,
    ) {
        // SAFETY: `arg` is the closure below. The stream that calls holds its lock, so no two calls are at the same time.
        let said = unsafe { &mut *arg.cast::<S>() };
        let bytes = if len == 0 {
            &[]
        } else {
            // SAFETY: C++ passes `len` readable bytes.
            unsafe { slice::from_raw_parts(text.cast(), len) }
        };
        // A panic must not cross into C++. Its message went to the panic hook.
        let _ = catch_unwind(AssertUnwindSafe(|| said(bytes)));
    }
    let env = env(files)?;
    let mut said = said;
    // SAFETY: the environment is new and never freed; `hear` takes what is passed with it, which outlives the call. Where
    // db_bench ends the process, this frame is still there.
    Ok(unsafe { pumice_db_bench_run(env, hear::<S>, ptr::from_mut(&mut said).cast()) })
}

/// Reads back every key of the run's databases.
pub(crate) fn verify() -> Result<u64, String> {
    let mut keys = 0;
    let mut error = [0_u8; 1024];
    // SAFETY: both places are writable, and the length is the text's.
    let code =
        unsafe { pumice_db_bench_verify(&raw mut keys, error.as_mut_ptr().cast(), error.len()) };
    if code == 0 {
        return Ok(keys);
    }
    let text = CStr::from_bytes_until_nul(&error).unwrap_or_default();
    Err(text.to_string_lossy().into_owned())
}
