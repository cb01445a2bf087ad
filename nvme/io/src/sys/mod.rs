//! System calls and instructions that the standard library does not offer, each behind a safe function.

pub mod barrier;
mod clock;
mod eventfd;
pub mod file;
mod mapping;
mod mmio;
mod poll;
mod private_socket;
mod signal;
pub mod socket;
mod zeroed;

pub use clock::Clock;
pub use eventfd::EventFd;
pub use mapping::{Absent, DeviceMapping, keeps_its_length, shared_file};
pub use mmio::{Doorbell, Kick, MmioMap};
pub use poll::{any_readable, wait_readable};
pub use private_socket::bind_private;
pub use signal::raise;
pub use zeroed::Zeroed;
