//! The C API of Pumice (`include/pumice.h`): a store by its URI, its files, and its space.
//!
//! The library `libpumice_fs` has these functions beside those of the RocksDB plugin. The environment
//! for RocksDB's C API is in C++ (`kv/plugin/shim/c_api.cc`), since it is a C++ object; `env` has what
//! it calls, and its declarations for the header.
//!
//! No panic leaves a function: `answer` makes it an error. The header says what every function does;
//! `tests/header.rs` compares it with what cbindgen makes of these sources.
#![allow(
    unsafe_code,
    non_camel_case_types,
    clippy::missing_safety_doc,
    reason = "this crate is the boundary to C, whose names these are; the header's first comment says what every caller promises"
)]

mod env;
mod error;
mod file;
mod header;
mod options;
mod store;

pub use env::*;
pub use error::{PUMICE_ERROR_DATA_LOSS, PUMICE_ERROR_RETRYABLE, pumice_error};
pub use file::*;
pub use header::*;
pub use options::{
    PUMICE_HEADER_VERSION, PUMICE_STORE_ACCEPT_DAMAGE, PUMICE_STORE_NO_FORMAT,
    PUMICE_STORE_READ_ONLY, PUMICE_STORE_VOLATILE, pumice_options,
};
pub use store::{
    pumice_entry, pumice_entry_fn, pumice_info, pumice_space, pumice_store, pumice_store_close,
    pumice_store_info, pumice_store_link, pumice_store_list, pumice_store_mkdir, pumice_store_open,
    pumice_store_rename, pumice_store_rmdir, pumice_store_space, pumice_store_sync,
    pumice_store_unlink,
};
