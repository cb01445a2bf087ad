//! Waiting for several channels at once, and the few calls of the JSON-RPC server that the standard
//! library does not have.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Whether the other side of the socket is gone; one that has only ended its own sending is there.
/// Takes no bytes and does not block.
pub(crate) fn is_hung_up(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid entry, which outlives the call.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}

/// Sends this process a signal.
pub(crate) fn raise(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved, and this process may signal itself.
    match unsafe { libc::kill(libc::getpid(), signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

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
