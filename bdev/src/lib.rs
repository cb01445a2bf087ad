//! Block devices: one trait, a channel per thread, modules, configuration, RPC.

pub mod clock;
pub mod config;
pub mod conformance;
pub mod crashsim;
pub mod delay;
mod device;
mod error;
pub mod error_inject;
mod executor;

pub mod file;
pub mod logging;
pub mod malloc;
pub mod metrics;
pub mod null;
pub mod nvme;
mod op;
pub mod passthru;
mod pollfd;
mod queue;
pub mod raid0;
pub mod registry;
pub mod rpc;
mod slots;
pub mod split;
pub mod stats;
mod uri;
pub mod uuid;

pub use device::{BlockDevice, DeviceInfo, IoChannel};
pub use error::{BdevError, IoError, IoErrorKind};
pub use executor::{AsyncChannel, Io, IoOutcome, join_all};
pub use op::{CompareAndWrite, Completion, Op, OpKind, OpSet, SubmitError, ZoneAction};
pub use pumice_nvme::dma::{DmaBuf, DmaError, DmaSlice};
pub use uri::{open, parse_size};
