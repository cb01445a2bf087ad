//! A complete NVMe controller in this process, and the [suite](conformance) that checks a controller.
//!
//! It has registers, doorbells and queues in shared memory and a thread of its own, so the driver
//! runs the same code as on hardware. A namespace is stored on a [`Backend`]: memory, nothing, a
//! file, or another implementation of the trait. [`Faults`] are injected on demand.
//! [`SoftController::power_cut`] and [`SoftController::unplug`] end the controller.
//!
//! ```
//! use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};
//! use pumice_nvme::{Controller, ControllerOptions};
//! let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
//! let soft = SoftController::new(SoftConfig::new(vec![disk]))?;
//! let nvme = Controller::new(soft.transport(), ControllerOptions::default())?;
//! assert_eq!(nvme.namespace(1)?.num_blocks(), 2048);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! As a URI ([`open()`]): `soft://memory?size=64M`, `soft://null?size=1G`, `soft:///image-file`,
//! with these parameters:
//!
//! | parameter | meaning | default |
//! | --- | --- | --- |
//! | `size` | bytes of each namespace; an existing file keeps its size | 64M |
//! | `block_size` | 512 or 4096 | 512 |
//! | `namespaces` | number of namespaces (memory, null) | 1 |
//! | `write_cache` | 1: volatile write cache | 0, files 1 |
//! | `mdts` | largest transfer, 4 KiB << mdts; 0: no limit | 5 |
//! | `boundary` | optimal I/O boundary in blocks | 0 |
//! | `queues` | number of I/O queue pairs | 16 |
//! | `entries` | most entries of a queue | 1024 |
//! | `shadow` | 1: shadow doorbells | 1 |
//! | `sgl` | 1: SGLs | 1 |
//! | `cmb` | bytes of the controller memory buffer | 0 |
//! | `create` | 1: create the file if it does not exist | 0 |

use std::path::Path;
use std::time::Duration;

use pumice_nvme::transport::{NvmeUri, TransportError};
use pumice_nvme::{Controller, ControllerOptions, NvmeError, Opened};

mod admin;
mod backend;
pub mod conformance;
mod engine;
mod fault;
mod identify;
mod io;
mod media;
mod memory;
mod queues;
mod server;
mod transport;

pub use backend::{Backend, FileBackend, MemoryBackend, NullBackend, Transfer};
pub use fault::{Fault, FaultRule, Faults};
pub use media::SoftNamespace;
pub use server::SoftServer;
pub use transport::{SoftController, SoftStats};

/// Options of a soft controller.
#[derive(Debug)]
#[non_exhaustive]
pub struct SoftConfig {
    /// The namespaces. The first is nsid 1.
    pub namespaces: Vec<SoftNamespace>,
    /// Largest transfer: 4 KiB << mdts; 0: no limit.
    pub mdts: u8,
    /// Number of I/O queue pairs.
    pub queues: u16,
    /// Most entries of a queue, 2 to 65535.
    pub entries: u16,
    /// Whether to offer shadow doorbells.
    pub shadow_doorbells: bool,
    /// Whether to offer SGLs.
    pub sgl: bool,
    /// Whether to have a volatile write cache.
    pub write_cache: bool,
    /// Bytes of the controller memory buffer; 0 for none.
    pub cmb_len: usize,
    /// Whether to offer weighted round robin arbitration.
    pub weighted: bool,
    /// Number of interrupt vectors; 0: the controller can only be polled.
    pub vectors: u16,
    /// Time that enabling and disabling take.
    pub ready_delay: Duration,
    /// CAP.TO, in units of 500 ms.
    pub timeout_500ms: u8,
    /// Whether a format of one namespace formats all of them.
    pub formats_all: bool,
    /// Whether a format names one namespace, and never all of them by the broadcast value.
    pub formats_one_by_one: bool,
    /// PCI vendor and device identifiers to appear as.
    pub pci_id: Option<(u16, u16)>,
    /// Time that the thread spins without work before it sleeps.
    pub spin: Duration,
    /// Whether it is served to another process, see [`SoftConfig::served`].
    pub(crate) served: bool,
}

pumice_io::setters!(SoftConfig: mdts: u8, queues: u16, entries: u16, shadow_doorbells: bool, sgl: bool, write_cache: bool, cmb_len: usize,
    weighted: bool, vectors: u16, ready_delay: Duration, timeout_500ms: u8, formats_all: bool, formats_one_by_one: bool,
    pci_id: Option<(u16, u16)>, spin: Duration);

impl SoftConfig {
    /// Returns the default options with these namespaces.
    pub fn new(namespaces: Vec<SoftNamespace>) -> SoftConfig {
        SoftConfig {
            namespaces,
            mdts: 5,
            queues: 16,
            entries: 1024,
            shadow_doorbells: true,
            sgl: true,
            write_cache: false,
            cmb_len: 0,
            weighted: true,
            vectors: 65,
            ready_delay: Duration::ZERO,
            timeout_500ms: 10,
            formats_all: false,
            formats_one_by_one: false,
            pci_id: None,
            spin: Duration::from_micros(100),
            served: false,
        }
    }

    /// Makes registers that another process can map, for [`SoftServer`]. That process's doorbells
    /// wake nobody, so the controller's thread looks at them every 50 µs when it is idle.
    #[must_use]
    pub fn served(mut self) -> SoftConfig {
        self.served = true;
        self.vectors = server::VECTORS;
        self.queues = self.queues.min(server::VECTORS - 1);
        self.cmb_len = 0;
        self
    }
}

/// Opens the controller that a URI names, with default options. Accepts the forms of
/// [`pumice_nvme::open`] and `soft:` URIs, each of which makes a controller of its own.
///
/// # Errors
/// Fails as [`pumice_nvme::open`] does; for a `soft:` URI with an unknown parameter; and for an
/// image file that cannot be opened.
pub fn open(uri: &str) -> Result<Opened, NvmeError> {
    open_with(uri, ControllerOptions::default())
}

/// Opens a controller as [`open`] does, with options.
///
/// # Errors
/// Fails as [`open`] does.
pub fn open_with(uri: &str, options: ControllerOptions) -> Result<Opened, NvmeError> {
    let parsed = NvmeUri::parse(uri)?;
    if parsed.scheme() != "soft" {
        return pumice_nvme::open_with(uri, options);
    }
    let soft = SoftController::new(config(&parsed)?)?;
    Ok(Opened {
        controller: Controller::new(soft.transport(), options)?,
        nsid: parsed.nsid,
    })
}

fn cannot_open(path: &str, source: std::io::Error) -> TransportError {
    let device = path.to_owned();
    match source.kind() {
        std::io::ErrorKind::NotFound => TransportError::NotFound {
            device,
            what: "no such file; add create=1 and size=… to make an image there".to_owned(),
        },
        std::io::ErrorKind::ResourceBusy => TransportError::InUse {
            device,
            detail: source.to_string(),
            pid: None,
        },
        _ => TransportError::Io {
            device,
            what: "opening the image".to_owned(),
            source,
        },
    }
}

/// Returns the options that a `soft:` URI describes.
///
/// # Errors
/// Fails for an unknown parameter, an invalid value, and an image file that cannot be opened.
pub fn config(uri: &NvmeUri) -> Result<SoftConfig, TransportError> {
    let mut options = uri.options();
    let is_file = uri.address.starts_with('/');
    let size = options.size("size")?.unwrap_or(64 << 20);
    let block_size = options.number("block_size", 512..=4096)?.unwrap_or(512);
    let boundary = options.number("boundary", 0..=65_535)?.unwrap_or(0);
    let count: u32 = options.number("namespaces", 1..=1024)?.unwrap_or(1);
    let create = options.flag("create")?;
    let mut config = SoftConfig::new(Vec::new());
    config.mdts = options.number("mdts", 0..=255)?.unwrap_or(5);
    config.queues = options.number("queues", 1..=1024)?.unwrap_or(16);
    config.entries = options.number("entries", 2..=65_535)?.unwrap_or(1024);
    config.write_cache = options.flag_or("write_cache", is_file)?;
    config.shadow_doorbells = options.flag_or("shadow", true)?;
    config.sgl = options.flag_or("sgl", true)?;
    let cmb_bytes = options.size("cmb")?.unwrap_or(0).min(64 << 20);
    config.cmb_len = usize::try_from(cmb_bytes).unwrap_or(0);
    options.finish()?;
    if !matches!(block_size, 512 | 4096) {
        return Err(uri.invalid("block_size is 512 or 4096").into());
    }
    if is_file && count != 1 {
        return Err(uri.invalid("a file is one namespace").into());
    }
    for _ in 0..count {
        let backend: Box<dyn Backend> = match uri.address.as_str() {
            "memory" | "" => Box::new(MemoryBackend::new(size)),
            "null" => Box::new(NullBackend(size)),
            path if is_file => {
                let file = FileBackend::open(Path::new(path), create.then_some(size));
                Box::new(file.map_err(|e| cannot_open(path, e))?)
            }
            other => {
                let reason = format!(
                    "'{other}' is not a kind of soft controller; use memory, null or an absolute path"
                );
                return Err(uri.invalid(reason).into());
            }
        };
        let ns = SoftNamespace::new(backend, block_size);
        if ns.num_blocks() == 0 {
            let reason = "smaller than a block; give a size=, or create=1 for a new file";
            return Err(uri.invalid(reason).into());
        }
        config.namespaces.push(ns.boundary(boundary));
    }
    Ok(config)
}
