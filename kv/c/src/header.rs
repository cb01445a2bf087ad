//! The check that a program was compiled for this library.

use std::ffi::c_char;

use crate::error::{done, invalid, live, pumice_error};
use crate::options::{check_version, pumice_options, size};
use crate::store::{pumice_entry, pumice_info, pumice_space};

/// Describes what a program was compiled for. Begin with `pumice_header header = PUMICE_HEADER;`.
#[repr(C)]
pub struct pumice_header {
    /// The size of this struct. A longer one of a later header has more fields at its end.
    pub size: u32,
    /// PUMICE_HEADER_VERSION.
    pub version: u32,
    /// The sizes of the structs that cross.
    pub error_size: u32,
    /// The size of `pumice_options`.
    pub options_size: u32,
    /// The size of `pumice_info`.
    pub info_size: u32,
    /// The size of `pumice_entry`.
    pub entry_size: u32,
    /// The size of `pumice_space`.
    pub space_size: u32,
    /// Zero.
    pub reserved: u32,
}

/// Returns the version of the library as text, such as "0.1.0". It is valid for ever, and not freed.
#[unsafe(no_mangle)]
pub extern "C" fn pumice_release() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Tells whether the library is the one that the program's header describes. Call it before anything
/// else. Returns 0, or `-EINVAL` with a text in `error` that names the difference.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pumice_header_check(
    header: *const pumice_header,
    error: *mut pumice_error,
) -> i32 {
    let check = || {
        // SAFETY: by the contract of the header, the struct has the size that it begins with.
        let given = unsafe { *live("header", header.cast::<u32>())? };
        if given < size::<pumice_header>() {
            return Err(invalid(format!(
                "the program passes a pumice_header of {given} bytes, which no version of pumice.h has: use its PUMICE_HEADER"
            )));
        }
        // SAFETY: it is not null, and has the fields that are known here.
        let header = unsafe { &*header };
        check_version(header.version)?;
        for (name, theirs, ours) in [
            ("pumice_error", header.error_size, size::<pumice_error>()),
            (
                "pumice_options",
                header.options_size,
                size::<pumice_options>(),
            ),
            ("pumice_info", header.info_size, size::<pumice_info>()),
            ("pumice_entry", header.entry_size, size::<pumice_entry>()),
            ("pumice_space", header.space_size, size::<pumice_space>()),
        ] {
            // Options may have more fields in a later header. What the library writes may not.
            let fits = theirs == ours || (name == "pumice_options" && theirs > ours);
            if !fits {
                return Err(invalid(format!(
                    "{name} has {theirs} bytes in the program and {ours} in the library: compile the program again with the \
                     pumice.h of this library"
                )));
            }
        }
        Ok(())
    };
    // SAFETY: by the contract of the header.
    unsafe { done(error, check) }
}
