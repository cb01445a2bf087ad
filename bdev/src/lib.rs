//! Block devices: one trait, a channel per thread, modules, a registry.
//!
//! ```
//! use pumice_bdev::{AsyncChannel, DmaBuf};
//!
//! let dev = pumice_bdev::open("malloc://64M?block_size=4096")?;
//! let ch = AsyncChannel::new(dev.open_channel()?);
//! ch.block_on(async {
//!     let mut buf = DmaBuf::zeroed(4096).unwrap();
//!     buf[..5].copy_from_slice(b"hello");
//!     ch.write(7, buf.freeze(), true).await?;
//!     let back = ch.read(7, DmaBuf::new(4096).unwrap()).await?;
//!     assert_eq!(&back[..5], b"hello");
//!     Ok::<(), Box<pumice_bdev::IoError>>(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The contract
//!
//! Threads share a [`BlockDevice`]. An [`IoChannel`] belongs to one thread at a time (it may be
//! moved). `conformance::run` of the crate `pumice-bdev-testkit` checks the following in one call.
//!
//! **Geometry.** [`DeviceInfo::block_size`] is a power of two, at least 512. Addresses and
//! `len_blocks` count blocks; lengths of data are those of the buffers and are whole blocks.
//! [`DeviceInfo::limits`] bound one read, write or compare, and name
//! what I/O had better not cross;
//! [`DeviceInfo::buf_align`] is what the address of each buffer must be a multiple of.
//!
//! **Buffers** are owned: they move into an [`Op`] and come back with its [`Completion`], unchanged
//! in number and length, whatever its result. A channel that is dropped with operations in flight
//! waits for the device, or keeps the buffers until the device no longer uses them.
//!
//! **Operations.** [`DeviceInfo::ops`] lists the supported ones. Others are refused as
//! [`IoErrorKind::Unsupported`]. Verify and
//! zone commands are declared, and every module refuses them.
//!
//! | operation | meaning |
//! | --- | --- |
//! | read, write | one buffer or several, consecutive blocks |
//! | flush | every write that had completed when it was submitted is durable when it completes |
//! | FUA | of a write or write zeroes: durable when it completes |
//! | write zeroes | the blocks read as zeroes |
//! | unmap | the blocks' contents are discarded; they read as zeroes if [`DeviceInfo::unmap_zeroes`] |
//! | compare, compare-and-write | differences are [`IoErrorKind::Miscompare`]; the latter is atomic, for at most [`DeviceInfo::atomic_unit_blocks`] |
//! | copy | inside the device; ranges that overlap are refused |
//! | reset | everything in flight on the channel ends first |
//! | abort | the device is asked; the operation still completes by itself, once |
//!
//! **Durability.** With [`DeviceInfo::write_cache`], a completed write is durable only after a flush
//! or with FUA. A power cut tears no write of one buffer within an aligned group of
//! [`DeviceInfo::atomic_unit_blocks`].
//!
//! **Order.** There is none between operations in flight: those that overlap have undefined results.
//! What is submitted after a completion was handed back sees that operation's effect, on any
//! channel.
//!
//! **Flow.** [`IoChannel::submit`] and [`IoChannel::poll`] never block. A full queue returns the
//! operation as [`SubmitError::Busy`], at once. An operation that can never be done is returned as
//! [`SubmitError::Refused`]. Each accepted operation completes once. [`IoChannel::wait`] spins
//! briefly, then sleeps.
//!
//! **Errors** name the device, the operation, the place and the cause ([`IoError`]). An operation
//! that failed, timed out or was aborted may have been done in part, or may still take effect.
//!
//! # Modules
//!
//! | module | device |
//! | --- | --- |
//! | [`malloc`] | memory of this process |
//! | [`mod@null`] | nothing; for measurements |
//! | [`mod@file`] | an image file, block or loop device, through io_uring |
//! | [`nvme`] | a namespace of an NVMe controller: PCIe, vfio-user, soft |
//! | [`passthru`] | another device; a template for your own module |
//! | [`delay`] | another device, slower |
//! | [`error_inject`] | another device, with injected faults |
//! | [`split`] | a part of another device |
//! | [`raid0`] | several devices, striped |
//!
//! Further modules (mirrors, encryption, partitions, logical volumes) go beside these: a file or
//! folder here, one in the control crate's `config/modules`, each with a row, and a test that runs
//! `conformance::run`.
//!
//! The [`registry`] has names, claims, hot removal and statistics. Every I/O is a `tracing` span at
//! trace level, target `pumice_bdev::io`. The crate `pumice-bdev-control` has SPDK's JSON files,
//! JSON-RPC, metrics and logging.

pub mod contents;
pub mod delay;
mod device;
mod engine;
mod error;
pub mod error_inject;
mod executor;
pub mod file;
mod flush_fault;
mod join;
pub mod malloc;
mod module;
mod named;
pub mod null;
#[cfg(feature = "nvme")]
pub mod nvme;
pub mod passthru;
mod queue;
pub mod raid0;
pub mod read_only;
pub mod registry;
mod shared;
mod slots;
pub mod split;
pub mod stats;
mod uri;
pub mod uuid;

pub use device::{BlockDevice, DeviceInfo, HostSpace, IoChannel};
pub use engine::{Engine, Refused};
pub use error::BdevError;
pub use executor::{AsyncChannel, Io, IoOutcome};
pub use join::join_all;
pub use module::{Call, OpenOptions};
pub use named::{Names, forget_names, name_devices};
pub use pumice_io::dma::{self, DmaBuf, DmaError, DmaSlice};
pub use pumice_io::process;
pub use pumice_io::sys::SharedMemory;
pub use pumice_io::uri::{file_uri, parse_size};
pub use pumice_io::{
    CompareAndWrite, Completion, IoError, IoErrorKind, Limits, NvmeStatus, Op, OpKind, OpSet,
    SubmitError, ZoneAction, setters,
};
pub use shared::{Outcome, SharedChannels, Ticket, thread_number};
pub use uri::{call_for, open, open_with};

/// The README's example, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
