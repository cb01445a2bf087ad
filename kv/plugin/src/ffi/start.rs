//! The first calls: the check of the ABI, and file systems for the shim.

use std::ffi::{c_char, c_void};
use std::slice;
use std::sync::Arc;

use pumice_blobfs::fs::FileSystem;

use super::{Mounted, guard, guard_value, text};
use crate::Use;
use crate::abi;
use crate::binding::Binding;
use crate::contract::pumice_abi;

/// The size of `pumice_abi` in the first version. Fields that are added later come after these.
const FIRST_SIZE: u32 = 32;

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_abi_check(
    needed: *const pumice_abi,
    error: *mut c_char,
    error_len: usize,
) -> u32 {
    guard_value(1, || {
        // SAFETY: every version of the shim passes a struct that begins with its size.
        let size = unsafe { needed.cast::<u32>().read() };
        let wrong = if size < FIRST_SIZE {
            Some(format!(
                "the RocksDB plugin passes a pumice_abi of {size} bytes, which no version of Pumice's C ABI has"
            ))
        } else {
            // SAFETY: it has at least the fields that are known here, see FIRST_SIZE.
            abi::misfit(unsafe { &*needed })
        };
        let Some(wrong) = wrong else { return 0 };
        if error_len > 0 {
            // SAFETY: the shim passes writable memory of this length, which nobody else uses.
            let out = unsafe { slice::from_raw_parts_mut(error.cast::<u8>(), error_len) };
            let len = wrong.len().min(error_len - 1);
            out[..len].copy_from_slice(&wrong.as_bytes()[..len]);
            out[len] = 0;
        }
        1
    })
}

/// Returns a file system as the shim holds it, which calls its directory `root` (normalised) `/`.
/// `binding` ends its use. The shim's `rocksdb::FileSystem` releases it.
#[must_use]
pub fn handle(fs: FileSystem, root: String, binding: Arc<Binding>) -> *const c_void {
    give(Mounted {
        fs,
        root,
        binding,
        share: None,
    })
}

/// Returns the file system of a share as [`handle`] does. It holds the share.
#[must_use]
pub fn handle_of(share: Use, root: String) -> *const c_void {
    give(Mounted {
        fs: share.fs().clone(),
        root,
        binding: Arc::default(),
        share: Some(Arc::new(share)),
    })
}

fn give(mounted: Mounted) -> *const c_void {
    Box::into_raw(Box::new(mounted)).cast_const().cast()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pumice_mount_uri(
    uri: *const c_char,
    len: usize,
    out: *mut *const c_void,
) -> i64 {
    guard(|| {
        #[cfg(feature = "log")]
        log_to_stderr();
        // SAFETY: the shim passes readable text.
        let (share, root) = crate::mount_uri(unsafe { text(uri, len) }?)?;
        // SAFETY: the shim passes a place for the handle, which is given away.
        unsafe { out.write(handle_of(share, root)) };
        Ok(0)
    })
}

/// Lets warnings and errors be seen, if the program takes no care of them itself.
#[cfg(feature = "log")]
fn log_to_stderr() {
    let log = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr);
    // Another one is there if this was done before.
    let _ = log.try_init();
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::contract::{
        PUMICE_ABI_VERSION, PUMICE_OPEN_CREATE, pumice_fault, pumice_read, pumice_stat,
    };
    use crate::ffi::{pumice_append, pumice_file_release, pumice_fs_release, pumice_open};

    fn size_of_u32<T>() -> u32 {
        u32::try_from(size_of::<T>()).unwrap()
    }

    /// Asks as the shim does, with room for `room` bytes of text.
    fn asked(size: u32, version: u32, room: usize) -> (u32, String) {
        let needed = pumice_abi {
            size,
            version,
            features: 1,
            fault_size: size_of_u32::<pumice_fault>(),
            read_size: size_of_u32::<pumice_read>(),
            stat_size: size_of_u32::<pumice_stat>(),
            reserved: 0,
        };
        let mut error = vec![b'x'; room + 4];
        // SAFETY: the struct is complete, and the pointer goes with a length that it has.
        let answer =
            unsafe { pumice_abi_check(&raw const needed, error.as_mut_ptr().cast(), room) };
        assert_eq!(&error[room..], b"xxxx", "no byte after the room is written");
        let end = error.iter().position(|byte| *byte == 0).unwrap_or(0);
        (answer, String::from_utf8_lossy(&error[..end]).into_owned())
    }

    #[test]
    fn the_check_of_the_abi_answers_and_cuts_its_text_off() {
        assert_eq!(size_of_u32::<pumice_abi>(), FIRST_SIZE);
        assert_eq!(asked(FIRST_SIZE, PUMICE_ABI_VERSION, 100).0, 0);
        // A later header's struct is longer.
        assert_eq!(asked(FIRST_SIZE + 8, PUMICE_ABI_VERSION, 100).0, 0);
        let (answer, text) = asked(FIRST_SIZE, 77, 1000);
        assert_eq!(answer, 1);
        assert!(text.contains("version 77"), "{text}");
        assert_eq!(asked(FIRST_SIZE, 77, 4), (1, "the".to_owned()));
        assert_eq!(asked(FIRST_SIZE, 77, 0), (1, String::new()));
        let (answer, text) = asked(8, PUMICE_ABI_VERSION, 1000);
        assert_eq!(answer, 1);
        assert!(text.contains("of 8 bytes"), "{text}");
    }

    /// RocksDB's logger may write to its file after its environment is gone.
    #[test]
    fn an_open_file_keeps_its_file_system_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let uri = format!(
            "blobfs://{}?size:64M&create",
            dir.path().join("kv.img").display()
        );
        let (mut fs, mut file) = (ptr::null(), ptr::null());
        // SAFETY: texts and places are readable and writable, and each handle is released once.
        unsafe {
            assert_eq!(
                pumice_mount_uri(uri.as_ptr().cast(), uri.len(), &raw mut fs),
                0
            );
            let opened = pumice_open(fs, c"/f".as_ptr(), 2, PUMICE_OPEN_CREATE, &raw mut file);
            assert_eq!(opened, 0);
            pumice_fs_release(fs);
            assert_eq!(pumice_append(file, c"text".as_ptr(), 4), 0);
            pumice_file_release(file);
        }
        let (again, _) = crate::mount_uri(&uri).unwrap();
        assert_eq!(again.fs().stat("/f").unwrap().len, 4);
    }
}
