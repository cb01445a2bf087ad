//! Event counters for interrupts and notices.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use super::wait_readable;

/// A non-blocking Linux eventfd.
///
/// A source in this process may use [`signal_if_armed`](Self::signal_if_armed), which saves the
/// system call while nobody sleeps. Other sources always signal.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    armed: AtomicBool,
}

impl EventFd {
    /// Makes a counter at zero.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(EventFd {
            fd,
            armed: AtomicBool::new(true),
        })
    }

    /// Returns the first `count` of the existing counters, and new ones for those that are missing.
    pub fn extend(have: &[Arc<EventFd>], count: usize) -> io::Result<Vec<Arc<EventFd>>> {
        let mut all: Vec<Arc<EventFd>> = have.iter().take(count).cloned().collect();
        while all.len() < count {
            all.push(Arc::new(EventFd::new()?));
        }
        Ok(all)
    }

    /// Adds one. Does not block. A full counter stays full, which wakes as well.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. The only failure is a full counter (EAGAIN).
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), 8) };
    }

    /// Sets whether sources in this process signal. A new counter is armed.
    pub fn arm(&self, on: bool) {
        self.armed.store(on, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Signals as [`signal`](Self::signal) does, unless the waiting side has disarmed the counter.
    /// Stores before the call are visible to a waiter that arms, looks and then sleeps.
    #[inline]
    pub fn signal_if_armed(&self) {
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) {
            self.signal();
        }
    }

    /// Sets the counter to zero and returns its earlier value.
    pub fn drain(&self) -> u64 {
        let mut value = [0u8; 8];
        // SAFETY: eight writable bytes.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), value.as_mut_ptr().cast(), 8) };
        if n == 8 { u64::from_ne_bytes(value) } else { 0 }
    }

    /// Sleeps until the counter is not zero or the time is over. Returns whether it is not zero.
    /// Does not change the counter.
    pub fn wait(&self, timeout: Duration) -> bool {
        wait_readable(&[self.as_fd()], Some(timeout)).is_ok_and(|ready| ready[0])
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_wakes() {
        let event = EventFd::new().unwrap();
        assert!(!event.wait(Duration::ZERO));
        event.signal();
        event.signal();
        assert!(event.wait(Duration::from_secs(5)));
        assert_eq!(event.drain(), 2);
        assert_eq!(event.drain(), 0);
    }
}
