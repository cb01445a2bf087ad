//! Binding threads to cores.
#![allow(unsafe_code)]

use std::io;

/// Binds the calling thread to a core.
pub fn pin(core: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is a plain bit set, for which all zeroes are valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: the core's number lies inside the set, as just checked.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set is valid for reads of the length given; 0 is the calling thread.
    let ret = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
