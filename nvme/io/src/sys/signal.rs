//! Signals.
#![allow(unsafe_code)]

use std::io;

/// Sends this process a signal.
///
/// # Errors
/// Returns the system call's error for a number that is not a signal.
pub fn raise(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved, and this process may signal itself.
    match unsafe { libc::kill(libc::getpid(), signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
