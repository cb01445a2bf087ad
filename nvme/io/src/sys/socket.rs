//! Unix stream sockets that carry descriptors beside bytes, and the process at their other end.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Most descriptors that one receive takes.
const MAX_FDS: usize = 64;

/// Sends bytes, and descriptors with the first byte. Returns how many bytes the other side's queue
/// accepted. Blocks while the queue is full, at most for the socket's write time-out.
///
/// # Errors
/// Returns the system call's error. Fails for more descriptors than a message carries.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let raw: Vec<libc::c_int> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = Control::default();
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a msghdr of zeroes is valid: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !raw.is_empty() {
        let len = size_of_val(&raw[..]);
        let len32 = u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len32) } as usize;
        // SAFETY: the control buffer is aligned and has room for MAX_FDS descriptors, so the
        // first header lies inside it and its data has room for `len` bytes.
        unsafe {
            let head = libc::CMSG_FIRSTHDR(&raw const message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(len32) as usize;
            std::ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), libc::CMSG_DATA(head), len);
        }
    }
    loop {
        // SAFETY: `message` and all that it points to live through the call; the kernel only
        // reads from the bytes.
        let n =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        if let Ok(n) = usize::try_from(n) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Room for a control message of [`MAX_FDS`] descriptors, aligned as its header requires.
struct Control([u64; (16 + 4 * MAX_FDS).div_ceil(8) + 2]);

impl Default for Control {
    fn default() -> Self {
        Control([0; (16 + 4 * MAX_FDS).div_ceil(8) + 2])
    }
}

/// Receives bytes into the front of `into` and returns their number, which is 0 when the other side
/// has closed the socket. Adds the descriptors that came with them to `fds`.
///
/// # Errors
/// Returns the system call's error. Fails for more descriptors than a message carries.
pub fn receive(socket: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = Control::default();
    let mut part = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    // SAFETY: a msghdr of zeroes is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control.0);
    // SAFETY: `message` describes writable memory that lives through the call.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written whole control messages of the length it left in
    // `message`, which the CMSG macros stay inside.
    let mut head = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !head.is_null() {
        // SAFETY: `head` points to a control message inside `control`.
        let (level, kind, len) =
            unsafe { ((*head).cmsg_level, (*head).cmsg_type, (*head).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN only computes.
            let data_len = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for at in 0..data_len / size_of::<libc::c_int>() {
                // SAFETY: the data of the message holds `data_len` bytes of descriptors.
                let fd = unsafe {
                    libc::CMSG_DATA(head)
                        .cast::<libc::c_int>()
                        .add(at)
                        .read_unaligned()
                };
                if fd >= 0 {
                    // SAFETY: the kernel has just installed this descriptor for us.
                    fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        head = unsafe { libc::CMSG_NXTHDR(&raw const message, head) };
    }
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message carries too many descriptors",
        ));
    }
    Ok(n)
}

/// Connects, and waits at most `timeout` for a place in the other side's queue.
///
/// # Errors
/// Returns `TimedOut` or the system call's error.
pub fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    // SAFETY: creates a descriptor, which is owned from here on.
    let raw = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(raw) });
    // The time-out for sending applies to connect too (unix(7) waits no longer for a full queue).
    socket.set_write_timeout(Some(timeout))?;
    let mut address = libc::sockaddr_un {
        sun_family: libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or(1),
        sun_path: [0; 108],
    };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a socket's path has at most 107 bytes",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let len = u32::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(110);
    // SAFETY: `address` is a sockaddr_un of `len` bytes with a NUL behind the path.
    let result = unsafe { libc::connect(raw, (&raw const address).cast(), len) };
    if result == 0 {
        return Ok(socket);
    }
    let error = io::Error::last_os_error();
    Err(match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    })
}

fn credentials(socket: &UnixStream) -> Option<libc::ucred> {
    let mut who = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: 0,
    };
    let mut len = u32::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: `who` is writable and `len` says how long it is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(who)
}

/// Returns the process that called listen(2) on the socket, and its name.
pub fn peer(socket: &UnixStream) -> Option<(i32, String)> {
    let who = credentials(socket).filter(|who| who.pid > 0)?;
    let name = std::fs::read_to_string(format!("/proc/{}/comm", who.pid)).unwrap_or_default();
    Some((who.pid, name.trim().escape_debug().to_string()))
}

/// Whether the other side runs as root or as this process's user.
pub fn peer_is_own(socket: &UnixStream) -> bool {
    // SAFETY: geteuid cannot fail and has no arguments.
    let own = unsafe { libc::geteuid() };
    credentials(socket).is_some_and(|who| who.uid == 0 || who.uid == own)
}

/// Whether the other side has closed the socket or ended its own sending. Does not block and takes
/// no bytes.
pub fn is_closed(socket: &UnixStream) -> bool {
    has_ended(socket, libc::POLLRDHUP)
}

/// Whether the other side has closed the socket. A side that has only ended its own sending has
/// not. Does not block and takes no bytes.
pub fn is_hung_up(socket: &UnixStream) -> bool {
    has_ended(socket, 0)
}

fn has_ended(socket: &UnixStream, events: libc::c_short) -> bool {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid entry, which outlives the call.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n == 1 && poll.revents & (events | libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}
