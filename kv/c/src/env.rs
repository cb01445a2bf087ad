//! The environment for RocksDB's C API, which `kv/plugin/shim/c_api.cc` makes.

use std::ffi::{c_char, c_void};

use pumice_rocksdb_fs::{handle_of, mount_uri_with};

use crate::error::{done, live, pumice_error, put, text};
use crate::options::{mount_options, pumice_options};

/// The environment of RocksDB's C API (`rocksdb/c.h`).
pub struct rocksdb_env_t {
    _opaque: (),
}

#[allow(
    improper_ctypes,
    reason = "C only has pointers to it, and cbindgen writes it without fields this way"
)]
unsafe extern "C" {
    /// Opens a store as `pumice_store_open` does, and returns it as an environment for
    /// `rocksdb_options_set_env`. All paths of RocksDB are then paths in the store, and everything in
    /// `rocksdb/c.h` works on it: databases, column families, backups, checkpoints. Returns NULL on a
    /// failure, with `error->code` and `error->text`.
    ///
    /// The libraries `pumice_rocksdb` and `pumice_db` have it, not `pumice_fs`. A program that opens
    /// the URI of a store that it has open shares that store.
    ///
    /// The caller closes the environment with `pumice_env_close` or `rocksdb_env_destroy`, after every
    /// database, backup engine and SST writer that was opened with it, and after the `rocksdb_options_t`
    /// that it was set in.
    ///
    /// A forked child of a process with an open database ends by `_exit` or exec: RocksDB's handler for
    /// `exit` waits for threads that only the parent has, on any file system.
    pub fn pumice_env_open(
        uri: *const c_char,
        options: *const pumice_options,
        error: *mut pumice_error,
    ) -> *mut rocksdb_env_t;

    /// Closes an environment. Its store is unmounted when its last environment, handle and file are
    /// closed: what RocksDB has written is durable then, also without a sync. NULL is ignored.
    pub fn pumice_env_close(env: *mut rocksdb_env_t);
}

/// Opens a store for the shim, as `pumice_mount_uri` does with options and this API's errors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_env_mount(
    uri: *const c_char,
    options: *const pumice_options,
    fs: *mut *const c_void,
    error: *mut pumice_error,
) -> i32 {
    let mount = || {
        // SAFETY: by the contract of the header; `fs` is the shim's.
        unsafe {
            live("place for the file system", fs)?;
            let options = mount_options(options)?;
            let (share, root) = mount_uri_with(text("URI", uri)?, options)?;
            put("file system", fs, handle_of(share, root))
        }
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, mount) }
}
