//! System calls and instructions that the standard library does not offer, each behind a safe function.

pub mod barrier;
mod clock;
mod eventfd;
pub mod file;
mod kick;
mod mapping;
mod mmio;
mod poll;
mod prefetch;
mod private_socket;
mod signal;
pub mod socket;
mod zeroed;

pub use clock::Clock;
pub use eventfd::EventFd;
pub use kick::Kick;
pub use mapping::{Absent, DeviceMapping, SharedMemory, keeps_its_length, shared_file};
pub use mmio::{Doorbell, MmioMap};
pub use poll::{any_readable, wait_readable};
pub use prefetch::prefetch;
pub use private_socket::bind_private;
pub use signal::raise;
pub use zeroed::Zeroed;

mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
    pub(super) use std::thread::{Thread, current, park_timeout};

    pub(super) use parking_lot::Mutex;
}
