//! NVMe driver: spec types, DMA memory, transports, controller, queue pairs.

pub mod controller;
pub mod dma;
<<<<<<< HEAD
pub mod pci;
=======
mod error;
mod io;
mod namespace;
pub mod queue;
>>>>>>> e421dcc (nvme: controllers and queue pairs)
pub mod spec;
pub mod transport;

pub use controller::{Controller, ControllerEvent, ControllerOptions};
pub use error::{InvalidIo, IoError, IoErrorKind, NvmeError, SubmitError};
pub use io::{BlockRange, Io, IoDone};
pub use namespace::{Limits, Namespace, Supports};
pub use queue::{AsyncQueue, QueueOptions, QueuePair};
