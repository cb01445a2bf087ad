//! Waiting for several channels at once.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Sleeps until one of the descriptors is readable, or the time-out.
pub(crate) fn wait_readable(fds: &[RawFd], timeout: Duration) -> io::Result<()> {
    let pollfd = |fd: &RawFd| libc::pollfd {
        fd: *fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds: Vec<libc::pollfd> = fds.iter().map(pollfd).collect();
    let timeout = libc::timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let n = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
    // SAFETY: the array has `n` entries and outlives the call; the signal mask is left alone.
    let ret = unsafe { libc::ppoll(fds.as_mut_ptr(), n, &raw const timeout, std::ptr::null()) };
    let error = io::Error::last_os_error();
    if ret < 0 && error.kind() != io::ErrorKind::Interrupted {
        return Err(error);
    }
    Ok(())
}
