//! The process's limit on locked memory.
#![allow(unsafe_code)]

use std::fmt;

/// `RLIMIT_MEMLOCK`: the number of bytes that a process without CAP_IPC_LOCK may pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memlock {
    /// No limit.
    Unlimited,
    /// At most this many bytes.
    Bytes(u64),
    /// The limit could not be read.
    Unknown,
}

impl fmt::Display for Memlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Memlock::Unlimited => f.write_str("unlimited"),
            Memlock::Bytes(b) => write!(f, "{b} bytes"),
            Memlock::Unknown => f.write_str("unknown"),
        }
    }
}

/// Reads the soft limit of this process. Does not block.
pub fn memlock() -> Memlock {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid, writable rlimit for the duration of the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return Memlock::Unknown;
    }
    if limit.rlim_cur == libc::RLIM_INFINITY {
        Memlock::Unlimited
    } else {
        Memlock::Bytes(limit.rlim_cur)
    }
}
