//! The C++ functions of `cc/tools.h`.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use crate::Files;

#[cfg(feature = "db_bench")]
pub(crate) mod db_bench;
#[cfg(feature = "ldb")]
pub(crate) mod ldb;

unsafe extern "C" {
    fn pumice_rocksdb_version() -> *const c_char;
    fn pumice_memory_env() -> *mut c_void;
}

/// Returns the version of the linked RocksDB.
pub(crate) fn version() -> String {
    // SAFETY: the function takes no arguments, and returns a static text.
    let text = unsafe { CStr::from_ptr(pumice_rocksdb_version()) };
    text.to_string_lossy().into_owned()
}

/// Returns the environment over `files`, which lives as long as the process.
#[cfg(any(feature = "db_bench", feature = "ldb"))]
fn env(files: &Files) -> Result<*mut c_void, pumice::Error> {
    match files {
        Files::Kernel => Ok(ptr::null_mut()),
        // SAFETY: the function takes no arguments.
        Files::Memory => Ok(unsafe { pumice_memory_env() }),
        Files::Pumice(fs) => Ok(pumice::EnvOptions::new().build_cpp(fs)?.as_ptr()),
    }
}
