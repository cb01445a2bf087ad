//! How the driver reaches a controller.
//!
//! [`Transport`] is the seam: everything above it (controller, queue pairs) is the same code
//! whether the controller is a PCIe function, another process or a thread of this one, and
//! contains no `unsafe`. A transport offers
//!
//! | part | how |
//! | --- | --- |
//! | registers | [`Transport::read32`] … [`Transport::write64`]: checked accesses to BAR 0, may be messages |
//! | doorbells | [`Transport::doorbell`]: a [`Doorbell`], one store where the page is mapped |
//! | DMA | [`Transport::addresses`]: where the device sees each byte of the arena; the transport registers itself as a [`DmaMapper`](crate::dma::DmaMapper) |
//! | interrupts | [`Transport::enable_interrupts`]: one [`EventFd`] per vector; [`Transport::switch_interrupt`] |
//! | reset | [`Transport::reset`]: function level reset |
//! | removal, errors | [`Transport::is_gone`], [`Transport::events`], [`Transport::take_event`] |
//! | controller memory | [`Transport::map_memory`]: a CMB as atomics |
//!
//! What a transport may assume of the driver: queue memory, PRP lists and data come from
//! [`dma`](crate::dma) and lie inside one region each; no register outside BAR 0 is touched;
//! `enable_interrupts` is called at most once between resets, before any I/O queue exists.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pumice_io::dma::{AddressTable, DmaDomain, DmaError};
use pumice_io::sys::{Doorbell, EventFd, MmioMap};
use pumice_io::uri::UriError;

mod iova;
mod open;
mod registers;
mod uio;
mod uri;
mod vfio;
mod vfio_user;

pub(crate) use iova::IovaSpace;
pub(crate) use open::check_parameters;
pub use open::open_transport;
pub(crate) use uio::Uio;
pub use uri::NvmeUri;
pub(crate) use vfio::Vfio;
pub use vfio_user::wire as vfio_user_wire;
pub(crate) use vfio_user::{VfioUser, socket_path as vfio_user_socket};

/// Why a transport could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device is not there any more.
    #[error("{device}: the controller was removed")]
    Removed {
        /// The device.
        device: String,
    },
    /// Somebody else has the device.
    #[error("{device} is in use: {detail}")]
    InUse {
        /// The device.
        device: String,
        /// By whom, or how to find out.
        detail: String,
        /// The process, where it is known.
        pid: Option<u32>,
    },
    /// There is no such file or socket.
    #[error("{device}: {what}")]
    NotFound {
        /// Its path.
        device: String,
        /// What is missing, and what to do.
        what: String,
    },
    /// The device or this system cannot do it; the text names the remedy if there is one.
    #[error("{device}: {what}")]
    Unsupported {
        /// The device.
        device: String,
        /// What is missing.
        what: String,
    },
    /// A register, memory or vector outside what the device has.
    #[error("{device}: {what} {offset:#x} is outside the device's {limit:#x}")]
    OutOfRange {
        /// The device.
        device: String,
        /// What was addressed.
        what: &'static str,
        /// Where.
        offset: u64,
        /// The end.
        limit: u64,
    },
    /// The other side did not answer in time.
    #[error("{device}: no answer to {what} within {timeout_ms} ms")]
    Timeout {
        /// The device.
        device: String,
        /// The request.
        what: String,
        /// How long was waited.
        timeout_ms: u64,
    },
    /// The other side broke the transport's protocol.
    #[error("{device}: {detail}")]
    Protocol {
        /// The device.
        device: String,
        /// What was wrong.
        detail: String,
    },
    /// A system call failed.
    #[error("{device}: {what}: {source}")]
    Io {
        /// The device.
        device: String,
        /// The call and its object.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Memory could not be made reachable for the device.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The URI does not name a device.
    #[error("'{uri}': {detail}")]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it and what would be right.
        detail: String,
    },
}

impl From<UriError> for TransportError {
    fn from(e: UriError) -> TransportError {
        TransportError::Uri {
            uri: e.uri,
            detail: e.reason,
        }
    }
}

/// Something that happened to the device, not to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportEvent {
    /// Somebody (the kernel's unbind, a hot-unplug button) wants the device back. The driver
    /// ends what is in flight and calls [`Transport::detach`].
    RemovalRequested,
    /// The device is gone.
    Removed,
    /// The bus or the transport reports an error (AER, a broken socket); a reset may mend it.
    Error(String),
}

/// An open way to a controller, for [`Controller::new`](crate::Controller::new). What can be done
/// with registers and addresses is the driver's alone: a wrong one would let the device write
/// anywhere.
#[derive(Debug, Clone)]
pub struct OpenTransport(pub(crate) Arc<dyn Transport>);

impl OpenTransport {
    /// A transport that is open.
    pub fn new(transport: Arc<dyn Transport>) -> OpenTransport {
        OpenTransport(transport)
    }

    /// The device for logs and errors: `0000:00:03.0`, `/run/vfio-user`, `soft-0`.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Which kind of transport: `vfio`, `uio`, `vfio-user`, `soft`.
    pub fn kind(&self) -> &'static str {
        self.0.kind()
    }
}

/// A way to one controller. Shared by the controller and its queue pairs; every method may be
/// called from any thread.
///
/// # Safety
/// The driver puts what [`addresses`](Self::addresses) says into commands, and the device writes there. So each address is the
/// device's own for that byte of the arena, and the device reaches no other memory of this process.
#[allow(unsafe_code, reason = "implementations promise something")]
pub unsafe trait Transport: Send + Sync + fmt::Debug {
    /// The device for logs and errors: `0000:00:03.0`, `/run/vfio-user`, `soft-0`.
    fn name(&self) -> &str;

    /// Which kind of transport: `vfio`, `uio`, `vfio-user`, `soft`.
    fn kind(&self) -> &'static str;

    /// Reads the 32-bit register at `offset` of BAR 0. All ones when the device is gone.
    fn read32(&self, offset: u32) -> Result<u32, TransportError>;

    /// Reads the 64-bit register at `offset` of BAR 0, in one access where the device takes
    /// one, else low half first.
    fn read64(&self, offset: u32) -> Result<u64, TransportError>;

    /// Writes the 32-bit register at `offset` of BAR 0.
    fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError>;

    /// Writes the 64-bit register at `offset` of BAR 0 in one access (CMBMSC wants that).
    fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError>;

    /// The doorbell register at `offset` of BAR 0, for as long as the caller likes: ringing it
    /// after the device is gone or detached does nothing.
    fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError>;

    /// Where the device sees the arena's memory. The transport keeps it up to date from its
    /// own [`DmaMapper`](crate::dma::DmaMapper).
    fn addresses(&self) -> &Arc<AddressTable>;

    /// The memory that the device may reach, where it may not reach the process's arena: queues
    /// are made there, and data is copied.
    fn domain(&self) -> Option<&DmaDomain> {
        None
    }

    /// Enables up to `want` interrupt vectors and returns their eventfds, vector 0 first;
    /// fewer when the device has fewer, none when it can only be polled. On removal the
    /// transport signals all of them, so that no sleeper is left behind. After a
    /// [`reset`](Self::reset) it is called again and returns the same eventfds.
    fn enable_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, TransportError>;

    /// Whether an interrupt is a message of a controller in another process, which sends one for
    /// each completion, so that a thread that polls does better without.
    fn interrupts_are_messages(&self) -> bool {
        false
    }

    /// Lets one vector signal its eventfd, or keeps it from it: to a thread that polls, interrupts
    /// are only kernel time. Whether it was done: not now, during a reset, and not at all where
    /// the transport cannot, which is the default. Costs system calls, does not block.
    ///
    /// # Errors
    /// The system call's.
    fn switch_interrupt(&self, vector: u16, on: bool) -> Result<bool, TransportError> {
        let _ = (vector, on);
        Ok(false)
    }

    /// Function level reset (or what comes nearest). Afterwards the controller is disabled,
    /// its queues are gone, bus mastering is on; interrupts have to be enabled again. Blocks.
    fn reset(&self) -> Result<(), TransportError>;

    /// Whether the device is known to be gone (or detached). A load; may be called per I/O.
    fn is_gone(&self) -> bool;

    /// Becomes readable when [`take_event`](Self::take_event) has something; `None` when the
    /// transport has no such events.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The next event, if any. Does not block.
    fn take_event(&self) -> Option<TransportEvent> {
        None
    }

    /// Lets go of the device: DMA is off when it returns, the kernel or the other process has
    /// it back. Register reads then give all ones, doorbells go nowhere, `is_gone` is true.
    /// A second call does nothing.
    fn detach(&self);

    /// Maps `len` bytes at `offset` of BAR `bar` (controller memory buffer).
    fn map_memory(&self, bar: u8, offset: u64, len: usize) -> Result<MmioMap, TransportError> {
        let _ = (bar, offset, len);
        Err(TransportError::Unsupported {
            device: self.name().to_owned(),
            what: "the transport cannot map controller memory".into(),
        })
    }
}
