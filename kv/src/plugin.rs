//! RocksDB environments from the C++ shim, over the file system of `pumice-rocksdb-fs`.
#![allow(unsafe_code, reason = "the functions of the C++ shim are called here")]

use std::ffi::c_void;
use std::panic::catch_unwind;
use std::ptr::NonNull;
use std::sync::{Arc, Once};

use pumice_blobfs::fs::FileSystem;
use pumice_rocksdb_fs::shim::{
    pumice_env_from_uri, pumice_env_new, pumice_env_wrap, pumice_register_uri, pumice_shim_check,
};
use pumice_rocksdb_fs::{Binding, handle};

/// Registers URIs as [`crate::register_uri`] does, before `main`, for C++ programs that link this
/// crate.
#[unsafe(no_mangle)]
extern "C" fn pumice_register_blobfs() {
    // The message of a panic went to the panic hook.
    let _ = catch_unwind(crate::register_uri);
}

/// The reason why no environment could be made.
#[derive(Debug)]
pub(crate) struct EnvError(pub String);

/// Converts a text that C++ has written.
fn written(text: &[u8]) -> String {
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    String::from_utf8_lossy(&text[..end]).into_owned()
}

/// Checks that the shim, this crate and the linked RocksDB belong together.
fn check() -> Result<(), EnvError> {
    let mut error = [0_u8; 1024];
    let (text, room) = (error.as_mut_ptr().cast(), error.len());
    // SAFETY: the pointer goes with its length.
    match unsafe { pumice_shim_check(text, room) } {
        0 => Ok(()),
        _ => Err(EnvError(written(&error))),
    }
}

fn out_of_memory() -> EnvError {
    EnvError("RocksDB could not make an environment: out of memory".into())
}

/// Makes a `rocksdb::Env*` over `fs`, whose `/` is the directory `root` of it (normalised), and the
/// object that ends its use. It offers the abilities in `offers` to RocksDB.
pub(crate) fn make_cpp_env(
    fs: FileSystem,
    root: String,
    offers: u32,
) -> Result<(NonNull<c_void>, Arc<Binding>), EnvError> {
    check()?;
    let binding = Arc::<Binding>::default();
    let fs = handle(fs, root, Arc::clone(&binding));
    // SAFETY: the handle is given away.
    let env = unsafe { pumice_env_new(fs, offers) };
    let env = NonNull::new(env).ok_or_else(out_of_memory)?;
    Ok((env, binding))
}

/// Makes an environment as [`make_cpp_env`] does, as that of the `rocksdb` crate.
pub(crate) fn make_env(
    fs: FileSystem,
    root: String,
    offers: u32,
) -> Result<(rocksdb::Env, Arc<Binding>), EnvError> {
    let (env, binding) = make_cpp_env(fs, root, offers)?;
    // SAFETY: a new environment, whose ownership passes on.
    let env = unsafe { pumice_env_wrap(env.as_ptr()) };
    if env.is_null() {
        return Err(out_of_memory());
    }
    // SAFETY: a new rocksdb_env_t, whose ownership passes on.
    Ok((unsafe { rocksdb::Env::from_raw(env.cast()) }, binding))
}

/// Registers `blobfs://…` with RocksDB in this process. A second call does nothing.
pub(crate) fn register_uri() {
    static ONCE: Once = Once::new();
    // SAFETY: the function takes no arguments.
    ONCE.call_once(|| unsafe { pumice_register_uri() });
}

/// Returns the environment that RocksDB makes for a registered URI.
pub(crate) fn env_from_uri(uri: &str) -> Result<rocksdb::Env, EnvError> {
    let mut error = [0_u8; 1024];
    let (text, room) = (error.as_mut_ptr().cast(), error.len());
    // SAFETY: both pointers go with their lengths.
    let env = unsafe { pumice_env_from_uri(uri.as_ptr().cast(), uri.len(), text, room) };
    if env.is_null() {
        return Err(EnvError(written(&error)));
    }
    // SAFETY: a new rocksdb_env_t, whose ownership passes on.
    Ok(unsafe { rocksdb::Env::from_raw(env.cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_this_build_belong_together() {
        check().unwrap();
    }
}
