//! Transports: the driver's access to a controller.
//!
//! Everything above [`Transport`] (controller, queue pairs) is the same code
//! whether the controller is a PCIe function, another process or a thread of this one, and
//! contains no `unsafe`. A transport offers
//!
//! | part | means |
//! | --- | --- |
//! | registers | [`Transport::read32`] … [`Transport::write64`]: checked accesses to BAR 0, may be messages |
//! | doorbells | [`Transport::doorbell`]: a [`Doorbell`], one store where the page is mapped |
//! | DMA | [`Transport::addresses`]: the device's addresses of the arena; the transport registers itself as a [`DmaMapper`](crate::dma::DmaMapper) |
//! | interrupts | [`Transport::enable_interrupts`]: one [`EventFd`] per vector; [`Transport::switch_interrupt`] |
//! | reset | [`Transport::reset`]: function level reset |
//! | removal, errors | [`Transport::is_gone`], [`Transport::events`], [`Transport::take_event`] |
//! | controller memory | [`Transport::map_memory`]: a CMB as atomics |
//!
//! A transport may rely on the driver for the following. Queue memory, PRP lists and data come from
//! [`dma`](crate::dma) and lie inside one region each. No register outside BAR 0 is accessed.
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

/// The reason why a transport could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device was removed.
    #[error("{device}: the controller was removed")]
    Removed {
        /// Name of the device.
        device: String,
    },
    /// Another process, or another part of this one, has the device.
    #[error("{device} is in use: {detail}")]
    InUse {
        /// Name of the device.
        device: String,
        /// The user of the device, or how to find it.
        detail: String,
        /// The process identifier, where it is known.
        pid: Option<u32>,
    },
    /// There is no such file or socket.
    #[error("{device}: {what}")]
    NotFound {
        /// Path of the file or socket.
        device: String,
        /// The missing file or socket, and what to do.
        what: String,
    },
    /// The device or this system cannot do it. The text names the remedy if there is one.
    #[error("{device}: {what}")]
    Unsupported {
        /// Name of the device.
        device: String,
        /// The missing ability.
        what: String,
    },
    /// The device has no such register, memory or vector.
    #[error("{device}: {what} {offset:#x} is outside the device's {limit:#x}")]
    OutOfRange {
        /// Name of the device.
        device: String,
        /// The kind of object.
        what: &'static str,
        /// The requested offset or number.
        offset: u64,
        /// The first offset or number that does not exist.
        limit: u64,
    },
    /// The other side did not answer in time.
    #[error("{device}: no answer to {what} within {timeout_ms} ms")]
    Timeout {
        /// Name of the device or socket.
        device: String,
        /// The request.
        what: String,
        /// Length of the wait in milliseconds.
        timeout_ms: u64,
    },
    /// The other side broke the transport's protocol.
    #[error("{device}: {detail}")]
    Protocol {
        /// Name of the device or socket.
        device: String,
        /// A description of the violation.
        detail: String,
    },
    /// A system call failed.
    #[error("{device}: {what}: {source}")]
    Io {
        /// Name of the device.
        device: String,
        /// The call and its object.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Memory could not be made accessible to the device.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The URI does not name a device.
    #[error("`{uri}`: {detail}")]
    Uri {
        /// The URI as it was given.
        uri: String,
        /// A description of the error, and the right form.
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

/// An event of the device that does not belong to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportEvent {
    /// The kernel's unbind or a hot-unplug button asks for the device. The driver ends everything
    /// in flight and calls [`Transport::detach`].
    RemovalRequested,
    /// The device was removed.
    Removed,
    /// The bus or the transport reports an error (AER, a broken socket). A reset may repair it.
    Error(String),
}

/// An open transport to a controller, for [`Controller::new`](crate::Controller::new). Only the
/// driver can access registers and addresses through it, because a wrong address would let the
/// device write anywhere.
#[derive(Debug, Clone)]
pub struct OpenTransport(pub(crate) Arc<dyn Transport>);

impl OpenTransport {
    /// Wraps an open transport.
    pub fn new(transport: Arc<dyn Transport>) -> OpenTransport {
        OpenTransport(transport)
    }

    /// The device's name for logs and errors: `0000:00:03.0`, `/run/vfio-user`, `soft-0`.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// The kind of transport: `vfio`, `uio`, `vfio-user` or `soft`.
    pub fn kind(&self) -> &'static str {
        self.0.kind()
    }
}

/// Access to one controller. The controller shares it with its queue pairs. Every method may be
/// called from any thread.
///
/// # Safety
/// The driver puts the addresses of [`addresses`](Self::addresses) into commands, and the device
/// writes there. So each address must be the device's own for that byte of the arena, and the
/// device must be able to access no other memory of this process.
#[allow(unsafe_code, reason = "implementations promise something")]
pub unsafe trait Transport: Send + Sync + fmt::Debug {
    /// The device's name for logs and errors: `0000:00:03.0`, `/run/vfio-user`, `soft-0`.
    fn name(&self) -> &str;

    /// The kind of transport: `vfio`, `uio`, `vfio-user` or `soft`.
    fn kind(&self) -> &'static str;

    /// The PCI vendor and device identifiers, if it is a PCI function. Some controllers deviate
    /// from the specification and are known by them.
    fn pci_id(&self) -> Option<(u16, u16)> {
        None
    }

    /// Reads the 32-bit register at `offset` of BAR 0. Returns all ones when the device is gone.
    fn read32(&self, offset: u32) -> Result<u32, TransportError>;

    /// Reads the 64-bit register at `offset` of BAR 0, in one access where the device allows one,
    /// otherwise the low half first.
    fn read64(&self, offset: u32) -> Result<u64, TransportError>;

    /// Writes the 32-bit register at `offset` of BAR 0.
    fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError>;

    /// Writes the 64-bit register at `offset` of BAR 0 in one access (CMBMSC requires that).
    fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError>;

    /// Returns the doorbell register at `offset` of BAR 0. It can be kept: ringing it after the
    /// device is gone or detached does nothing.
    fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError>;

    /// The device's addresses of the arena's memory. The transport keeps them up to date from its
    /// own [`DmaMapper`](crate::dma::DmaMapper).
    fn addresses(&self) -> &Arc<AddressTable>;

    /// The memory that the device may access, when that is not the process's arena: queues are made
    /// there, and data is copied.
    fn domain(&self) -> Option<&DmaDomain> {
        None
    }

    /// Enables up to `want` interrupt vectors and returns their eventfds, vector 0 first. Returns
    /// fewer when the device has fewer, and none when it can only be polled. On removal the
    /// transport signals all of them, so that nobody sleeps on. After a [`reset`](Self::reset) it
    /// is called again and returns the same eventfds.
    fn enable_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, TransportError>;

    /// Whether an interrupt is a message from a controller in another process. Such a controller
    /// sends one for each completion, so a polling thread is faster without.
    fn interrupts_are_messages(&self) -> bool {
        false
    }

    /// Lets one vector signal its eventfd, or stops it: to a polling thread, interrupts only cost
    /// kernel time. Returns whether it was done. It is not done during a reset, and never where the
    /// transport does not support it, which is the default. Costs system calls; does not block.
    ///
    /// # Errors
    /// Returns the system call's error.
    fn switch_interrupt(&self, vector: u16, on: bool) -> Result<bool, TransportError> {
        let _ = (vector, on);
        Ok(false)
    }

    /// Does a function level reset (or the nearest equivalent). Afterwards the controller is
    /// disabled, its queues are gone and bus mastering is on; interrupts have to be enabled again.
    /// Blocks.
    fn reset(&self) -> Result<(), TransportError>;

    /// Whether the device is known to be gone or detached. Costs one load, so it may be called for
    /// each I/O.
    fn is_gone(&self) -> bool;

    /// A descriptor that is readable when [`take_event`](Self::take_event) has something. `None`
    /// when the transport has no such events.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the next event, if there is one. Does not block.
    fn take_event(&self) -> Option<TransportEvent> {
        None
    }

    /// Releases the device: when it returns, DMA is off and the kernel or the other process has the
    /// device again. Register reads then give all ones, doorbells have no effect and `is_gone` is
    /// true. A second call does nothing.
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
