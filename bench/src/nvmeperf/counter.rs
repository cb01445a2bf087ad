//! Counts the instructions of the calling thread, where the machine supports it:
//! perf_event_open(2).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;

/// A counter of user-mode instructions of the thread that made it.
#[derive(Debug)]
pub struct Instructions(File);

impl Instructions {
    /// Starts counting.
    ///
    /// # Errors
    /// Fails when the machine or the kernel's `perf_event_paranoid` does not allow it.
    pub fn start() -> io::Result<Instructions> {
        // struct perf_event_attr, version 0 (64 bytes): type, size, config; the flags are the sixth
        // word.
        let mut attr = [0u64; 8];
        const HARDWARE: u64 = 0;
        attr[0] = HARDWARE | 64 << 32;
        const INSTRUCTIONS: u64 = 1;
        attr[1] = INSTRUCTIONS;
        const EXCLUDE_KERNEL: u64 = 1 << 5;
        const EXCLUDE_HYPERVISOR: u64 = 1 << 6;
        attr[5] = EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR;
        // SAFETY: `attr` is a readable attribute of the size that it names; this thread, any
        // processor, no group, no flags.
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 0) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor.
        Ok(Instructions(unsafe { File::from_raw_fd(fd) }))
    }

    /// Returns the number so far.
    pub fn read(&mut self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.0.read_exact(&mut value)?;
        Ok(u64::from_ne_bytes(value))
    }
}
