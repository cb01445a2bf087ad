//! Waiting for several descriptors at once.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Sleeps until one of the descriptors is readable or broken, or the time is over (`None`: no
/// limit). Returns for each whether it is; after an interrupted sleep none is.
///
/// # Errors
/// Returns the system call's error.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs().min(1 << 30)).unwrap_or(1 << 30),
        tv_nsec: libc::c_long::from(t.subsec_nanos()),
    });
    let spec_ptr = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `polls` is a valid array of its length, `spec_ptr` null or a timespec that lives
    // to the end of the function, no signal mask is given.
    let n = unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            spec_ptr,
            std::ptr::null(),
        )
    };
    let error = io::Error::last_os_error();
    if n < 0 && error.kind() != io::ErrorKind::Interrupted {
        return Err(error);
    }
    Ok(polls.iter().map(|p| n > 0 && p.revents != 0).collect())
}

/// Makes an epoll that is readable while one of the eventfds is, or when the other side of `stream`
/// has closed it: one descriptor to wait on.
///
/// # Errors
/// Returns the error of a system call.
pub fn any_readable(
    events: &[BorrowedFd<'_>],
    stream: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    let raw = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
    let readable = events.iter().map(|fd| (fd, libc::EPOLLIN));
    let closed = stream.iter().map(|fd| (fd, libc::EPOLLRDHUP));
    for (fd, interest) in readable.chain(closed) {
        let mut interest = libc::epoll_event {
            events: interest.cast_unsigned(),
            u64: 0,
        };
        // SAFETY: both descriptors are open, `interest` lives through the call.
        let result = unsafe {
            libc::epoll_ctl(
                epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd.as_raw_fd(),
                &raw mut interest,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(epoll)
}
