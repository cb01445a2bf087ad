#![doc = include_str!("../README.md")]

pub mod controller;
mod error;
mod namespace;
mod open;
pub mod pci;
pub mod queue;
pub mod spec;
pub mod transport;

pub use controller::{Controller, ControllerEvent, ControllerOptions};
pub use error::NvmeError;
pub use namespace::{CommandLimits, Namespace, Supports};
pub use open::{Opened, open, open_with};
pub use pumice_io::{Completion, IoError, IoErrorKind, Op, SubmitError, dma};
pub use queue::{QueueOptions, QueuePair};
