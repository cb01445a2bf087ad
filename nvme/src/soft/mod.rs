//! A complete NVMe controller in this process.
//!
//! It has registers, doorbells and queues in shared memory and a thread of its own, so the
//! driver above runs the very code that it runs on hardware. Namespaces lie on a [`Backend`]:
//! memory, nothing, a file, or whatever implements the trait. [`Faults`] make it misbehave on
//! demand; [`SoftController::power_cut`] and [`SoftController::unplug`] end it.
//!
//! ```
//! use pumice_nvme::soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};
//! use pumice_nvme::{Controller, ControllerOptions};
//! let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
//! let soft = SoftController::new(SoftConfig::new(vec![disk]))?;
//! let nvme = Controller::new(soft.transport(), ControllerOptions::default())?;
//! assert_eq!(nvme.namespace(1)?.num_blocks(), 2048);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! As a URI ([`open`]): `soft://memory?size=64M`, `soft://null?size=1G`, `soft:///image-file`,
//! with these parameters:
//!
//! | parameter | meaning | default |
//! | --- | --- | --- |
//! | `size` | bytes of each namespace; a file that is there keeps its own | 64M |
//! | `block_size` | 512 or 4096 | 512 |
//! | `namespaces` | how many (memory, null) | 1 |
//! | `write_cache` | 1: volatile write cache | 0, files 1 |
//! | `mdts` | largest transfer, 4 KiB << mdts; 0: no limit | 5 |
//! | `boundary` | optimal I/O boundary in blocks | 0 |
//! | `queues` | I/O queue pairs | 16 |
//! | `entries` | entries of a queue | 1024 |
//! | `shadow` | shadow doorbells | 1 |
//! | `sgl` | SGLs | 1 |
//! | `cmb` | bytes of controller memory buffer | 0 |
//! | `create` | 1: make the file if it is not there | 0 |

use std::path::Path;
use std::time::Duration;

use crate::transport::{NvmeUri, OpenTransport, TransportError};

mod admin;
mod backend;
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

/// What a soft controller shall be like.
#[derive(Debug)]
#[non_exhaustive]
pub struct SoftConfig {
    /// Namespaces, the first is nsid 1.
    pub namespaces: Vec<SoftNamespace>,
    /// Largest transfer: 4 KiB << mdts; 0: no limit.
    pub mdts: u8,
    /// I/O queue pairs.
    pub queues: u16,
    /// Entries of a queue at most, 2 to 65535.
    pub entries: u16,
    /// Offer shadow doorbells.
    pub shadow_doorbells: bool,
    /// Offer SGLs.
    pub sgl: bool,
    /// Have a volatile write cache.
    pub write_cache: bool,
    /// Bytes of controller memory buffer.
    pub cmb_len: usize,
    /// Offer weighted round robin.
    pub weighted: bool,
    /// Interrupt vectors; 0: can only be polled.
    pub vectors: u16,
    /// How long enabling and disabling take.
    pub ready_delay: Duration,
    /// CAP.TO, in 500 ms.
    pub timeout_500ms: u8,
    /// How long the thread spins without work before it sleeps.
    pub spin: Duration,
    /// Made to be served to another process, see [`SoftConfig::served`].
    pub(crate) served: bool,
}

impl SoftConfig {
    /// Defaults with these namespaces.
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
            spin: Duration::from_micros(100),
            served: false,
        }
    }

    /// Registers that another process can map, for [`SoftServer`]. That process's doorbells wake
    /// nobody, so the controller's thread looks at them every 50 µs when it has nothing to do.
    #[must_use]
    pub fn served(mut self) -> SoftConfig {
        self.served = true;
        self.vectors = server::VECTORS;
        self.queues = self.queues.min(server::VECTORS - 1);
        self.cmb_len = 0;
        self
    }
}

/// Makes the soft controller that a `soft:` URI describes.
pub fn open(uri: &NvmeUri) -> Result<OpenTransport, TransportError> {
    Ok(SoftController::new(config(uri)?)?.transport())
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

/// What a `soft:` URI describes.
pub fn config(uri: &NvmeUri) -> Result<SoftConfig, TransportError> {
    uri.only(&[
        "size",
        "block_size",
        "namespaces",
        "write_cache",
        "mdts",
        "boundary",
        "queues",
        "entries",
        "shadow",
        "sgl",
        "cmb",
        "create",
    ])?;
    let size = uri.size("size", 64 << 20)?;
    let block_size = uri.number("block_size", 512, 4096)?;
    if !matches!(block_size, 512 | 4096) {
        return Err(uri.error("block_size is 512 or 4096"));
    }
    let boundary = uri.number("boundary", 0, 65_535)?;
    let is_file = uri.address.starts_with('/');
    let count = uri.number("namespaces", 1, 1024)?;
    let mut namespaces = Vec::new();
    for _ in 0..count {
        let backend: Box<dyn Backend> = match uri.address.as_str() {
            "memory" | "" => Box::new(MemoryBackend::new(size)),
            "null" => Box::new(NullBackend(size)),
            path if is_file => {
                if count != 1 {
                    return Err(uri.error("a file is one namespace"));
                }
                let create = (uri.number("create", 0, 1)? == 1).then_some(size);
                let file =
                    FileBackend::open(Path::new(path), create).map_err(|e| cannot_open(path, e))?;
                Box::new(file)
            }
            other => {
                return Err(uri.error(format!(
                    "'{other}' is no kind of soft controller; use memory, null or an absolute path"
                )));
            }
        };
        let ns = SoftNamespace::new(backend, block_size);
        if ns.num_blocks() == 0 {
            return Err(uri.error("smaller than a block; give a size=, or create=1 for a new file"));
        }
        namespaces.push(ns.boundary(u16::try_from(boundary).unwrap_or(0)));
    }
    let mut config = SoftConfig::new(namespaces);
    let byte = |key, default| {
        uri.number(key, default, 255)
            .map(|n| u8::try_from(n).unwrap_or(0))
    };
    let short = |key, default| {
        uri.number(key, default, 65_535)
            .map(|n| u16::try_from(n).unwrap_or(0))
    };
    config.mdts = byte("mdts", 5)?;
    config.queues = short("queues", 16)?.clamp(1, 1024);
    config.entries = short("entries", 1024)?.max(2);
    config.write_cache = byte("write_cache", u32::from(is_file))? != 0;
    config.shadow_doorbells = byte("shadow", 1)? != 0;
    config.sgl = byte("sgl", 1)? != 0;
    config.cmb_len = usize::try_from(uri.size("cmb", 0)?.min(64 << 20)).unwrap_or(0);
    Ok(config)
}
