//! Environments over a file system, and URIs for RocksDB's own tools.

use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use pumice_blobfs::fs::FileSystem;

use super::{Mounted, guard, guard_value, text};
use crate::plugin::binding::Binding;
use crate::plugin::contract::{
    PUMICE_CONTRACT, pumice_check, pumice_env_from_uri, pumice_env_new, pumice_env_wrap,
    pumice_register_uri,
};
use crate::plugin::fault::Fault;

#[unsafe(no_mangle)]
pub(in crate::plugin) unsafe extern "C" fn pumice_mount_uri(
    uri: *const c_char,
    len: usize,
    out: *mut *const c_void,
) -> i64 {
    guard(|| {
        check().map_err(|e| Fault::new(libc::EINVAL, e.0))?;
        // SAFETY: the shim passes readable text.
        let (fs, root) = crate::uri::mount_uri(unsafe { text(uri, len) }?)?;
        let binding = Arc::default();
        let handle = Box::into_raw(Box::new(Mounted { fs, root, binding }));
        // SAFETY: the shim passes a place for the handle, which is given away.
        unsafe { out.write(handle.cast_const().cast()) };
        Ok(0)
    })
}

/// Registers URIs as [`crate::register_uri`] does, before `main`, for C++ programs that link this
/// crate.
#[unsafe(no_mangle)]
extern "C" fn pumice_register_blobfs() {
    guard_value((), crate::register_uri);
}

/// The reason why no environment could be made.
#[derive(Debug)]
pub(crate) struct EnvError(pub String);

/// Converts a text that C++ has written.
fn written(text: &[u8]) -> String {
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    String::from_utf8_lossy(&text[..end]).into_owned()
}

/// Checks that the two sides and the linked RocksDB belong together.
fn check() -> std::result::Result<(), EnvError> {
    let mut error = [0_u8; 512];
    let (text, room) = (error.as_mut_ptr().cast(), error.len());
    // SAFETY: the pointer goes with its length.
    match unsafe { pumice_check(PUMICE_CONTRACT, text, room) } {
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
) -> std::result::Result<(NonNull<c_void>, Arc<Binding>), EnvError> {
    check()?;
    let binding = Arc::<Binding>::default();
    let mounted = Mounted {
        fs,
        root,
        binding: Arc::clone(&binding),
    };
    let fs = Box::into_raw(Box::new(mounted));
    // SAFETY: the handle is given away.
    let env = unsafe { pumice_env_new(fs.cast_const().cast(), offers) };
    let env = NonNull::new(env).ok_or_else(out_of_memory)?;
    Ok((env, binding))
}

/// Makes an environment as [`make_cpp_env`] does, as that of the `rocksdb` crate.
pub(crate) fn make_env(
    fs: FileSystem,
    root: String,
    offers: u32,
) -> std::result::Result<(rocksdb::Env, Arc<Binding>), EnvError> {
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
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: the function takes no arguments.
    ONCE.call_once(|| unsafe { pumice_register_uri() });
}

/// Returns the environment that RocksDB makes for a registered URI.
pub(crate) fn env_from_uri(uri: &str) -> std::result::Result<rocksdb::Env, EnvError> {
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
    fn another_list_is_refused_with_a_clear_text() {
        let mut error = [0_u8; 512];
        let (text, room) = (error.as_mut_ptr().cast(), error.len());
        // SAFETY: the pointer goes with its length.
        let answer = unsafe { pumice_check(PUMICE_CONTRACT ^ 1, text, room) };
        assert_eq!(answer, 1);
        let text = written(&error);
        assert!(text.contains("cargo clean -p pumice"), "{text}");
        assert!(check().is_ok());
        // A text that does not fit is cut off.
        let mut small = [b'x'; 8];
        // SAFETY: the pointer goes with its length.
        unsafe { pumice_check(PUMICE_CONTRACT ^ 1, small.as_mut_ptr().cast(), 4) };
        assert_eq!(&small[3..], b"\0xxxx");
    }
}
