//! The version of the API, and options.

use pumice_rocksdb_fs::MountOptions;

use crate::error::{Result, invalid};

/// The version of this header. A library with another one has other functions, structs or constants.
/// Functions may be added within a version.
pub const PUMICE_HEADER_VERSION: u32 = 1;

/// Bit of `pumice_options.flags`: write nothing to the device and create nothing. Several processes may
/// read one image at a time.
pub const PUMICE_STORE_READ_ONLY: u32 = 1;
/// Bit of `pumice_options.flags`: do not make a file system on a device that holds nothing but zeroes.
/// Without it that is done. A device with other content is never formatted.
pub const PUMICE_STORE_NO_FORMAT: u32 = 2;
/// Bit of `pumice_options.flags`: what is not synced may be lost when the process is killed, as it is
/// by a power cut. Without it a copy in shared memory outlives the process.
pub const PUMICE_STORE_VOLATILE: u32 = 4;
/// Bit of `pumice_options.flags`: mount for writing although files are damaged, without those files.
pub const PUMICE_STORE_ACCEPT_DAMAGE: u32 = 8;

/// All bits of `pumice_options.flags`.
const STORE_FLAGS: u32 = PUMICE_STORE_READ_ONLY
    | PUMICE_STORE_NO_FORMAT
    | PUMICE_STORE_VOLATILE
    | PUMICE_STORE_ACCEPT_DAMAGE;

/// Options of `pumice_store_open` and `pumice_env_open`. Begin with
/// `pumice_options options = PUMICE_OPTIONS;`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pumice_options {
    /// The size of this struct. A longer one of a later header has more fields at its end.
    pub size: u32,
    /// PUMICE_HEADER_VERSION.
    pub version: u32,
    /// PUMICE_STORE_*.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The size of the page cache in bytes. With 0 it follows the memory that is free. A `cache` in
    /// the URI has precedence.
    pub cache_bytes: u64,
}

/// Returns the size of a struct of this API.
pub(crate) const fn size<T>() -> u32 {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "these structs have at most 512 bytes"
    )]
    let size = size_of::<T>() as u32;
    size
}

/// Checks the version of the header that a program was compiled with.
pub(crate) fn check_version(version: u32) -> Result<()> {
    if version == PUMICE_HEADER_VERSION {
        return Ok(());
    }
    Err(invalid(format!(
        "the program was compiled with version {version} of pumice.h, but this is the library of version \
         {PUMICE_HEADER_VERSION} (Pumice {}): compile it again with the pumice.h of this library, or install the library that the \
         header came with",
        env!("CARGO_PKG_VERSION")
    )))
}

/// Returns what the options of a C program say. Null is every default.
///
/// # Safety
/// `options` is null, or readable with the size that it begins with.
pub(crate) unsafe fn mount_options(options: *const pumice_options) -> Result<MountOptions> {
    let mut mount = MountOptions::new();
    if options.is_null() {
        return Ok(mount);
    }
    // SAFETY: by the contract of this function.
    let given = unsafe { options.cast::<u32>().read() };
    if given < size::<pumice_options>() {
        return Err(invalid(format!(
            "pumice_options.size is {given}: set it to sizeof(pumice_options)"
        )));
    }
    // SAFETY: it has the fields that are known here.
    let options = unsafe { options.read() };
    check_version(options.version)?;
    let unknown = options.flags & !STORE_FLAGS;
    if unknown != 0 || options.reserved != 0 {
        return Err(invalid(format!(
            "pumice_options has the flags {unknown:#x} and the reserved word {:#x}, which this library does not know: leave them out",
            options.reserved
        )));
    }
    let has = |flag| options.flags & flag != 0;
    if options.cache_bytes != 0 {
        mount = mount.cache_bytes(options.cache_bytes);
    }
    if has(PUMICE_STORE_NO_FORMAT) {
        mount = mount.format_empty(None);
    }
    Ok(mount
        .read_only(has(PUMICE_STORE_READ_ONLY))
        .volatile(has(PUMICE_STORE_VOLATILE))
        .accept_damage(has(PUMICE_STORE_ACCEPT_DAMAGE)))
}
