//! Errors of devices as a whole.

use std::io;
use std::path::PathBuf;

use pumice_io::IoError;
use pumice_io::uri::UriError;

/// Errors of devices, names, configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BdevError {
    /// A URI that says nothing we can open.
    #[error("{uri}: {reason}")]
    InvalidUri {
        /// The URI.
        uri: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An option or parameter with a value that cannot be.
    #[error("{name}: {reason}")]
    InvalidOption {
        /// Its name.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Somebody else has it.
    #[error("{device}: in use by {}", owner(*.pid))]
    InUse {
        /// Device or path.
        device: String,
        /// Its owner, where the kernel says.
        pid: Option<u32>,
    },
    /// A block device that is mounted, or a backing file that a loop device uses.
    #[error("{device}: {reason}")]
    Unsafe {
        /// Device or path.
        device: String,
        /// Why it must not be touched, and what to do.
        reason: String,
    },
    /// A system call failed.
    #[error("{device}: {what}: {source}")]
    Os {
        /// Device or path.
        device: String,
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The device holds something, or could not be read as a whole, and nobody has said that it may
    /// be written over.
    #[error(
        "{device}: holds {contents}; nothing was changed; to lose that, say so: --force \
         (`force`, `Overwrite::Anything` in the library)"
    )]
    NotBlank {
        /// Device or path.
        device: String,
        /// What was found.
        contents: crate::contents::Contents,
    },
    /// A file has another size than the one that was asked for.
    #[error(
        "{}: the file has {found_bytes} bytes, size= says {wanted_bytes}; nothing was changed; leave \
         size= out, or make the file and what is on it longer: pumice grow {} {wanted_bytes}",
        .path.display(), .path.display()
    )]
    WrongSize {
        /// The path.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The size that was asked for.
        wanted_bytes: u64,
    },
    /// The path does not exist.
    #[error("{}: {hint}", .path.display())]
    NoSuchFile {
        /// The path.
        path: PathBuf,
        /// What is missing, and what to do.
        hint: String,
    },
    /// The NVMe driver's own.
    #[cfg(feature = "nvme")]
    #[error(transparent)]
    Nvme {
        /// What went wrong.
        source: pumice_nvme::NvmeError,
    },
    /// No device of that name.
    #[error("no bdev `{name}`{hint}")]
    NotFound {
        /// The name asked for.
        name: String,
        /// What there is instead; starts with punctuation.
        hint: String,
    },
    /// The name, or the alias, is taken.
    #[error("bdev `{name}` exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Another module claims the device.
    #[error("bdev `{name}` is claimed by {by}")]
    Claimed {
        /// The device.
        name: String,
        /// Who holds it.
        by: String,
    },
    /// The device is gone.
    #[error("bdev `{name}` was removed")]
    Removed {
        /// The device.
        name: String,
    },
    /// Something that this build, machine or module cannot do.
    #[error("{device}: {reason}")]
    Unsupported {
        /// Device, module or path.
        device: String,
        /// What, and what would work.
        reason: String,
    },
    /// No DMA memory.
    #[error("{device}: {source}")]
    Dma {
        /// Device.
        device: String,
        /// Why.
        #[source]
        source: crate::DmaError,
    },
    /// A single operation failed.
    #[error(transparent)]
    Io(#[from] Box<IoError>),
}

impl From<UriError> for BdevError {
    fn from(e: UriError) -> BdevError {
        BdevError::InvalidUri {
            uri: e.uri,
            reason: e.reason,
        }
    }
}

fn owner(pid: Option<u32>) -> String {
    const OTHER: &str = "stop it or use another device";
    match pid {
        Some(pid) if pid == std::process::id() => format!(
            "this process ({pid}), which has it open already: close or unmount it there, or share \
             that handle"
        ),
        Some(pid) => format!("process {pid}; {OTHER}"),
        None => format!("another process; {OTHER}"),
    }
}

impl BdevError {
    /// The errno that says the same.
    pub fn errno(&self) -> i32 {
        match self {
            BdevError::NotFound { .. } | BdevError::Removed { .. } => libc::ENODEV,
            BdevError::Exists { .. } => libc::EEXIST,
            BdevError::Claimed { .. } => libc::EPERM,
            BdevError::InUse { .. } | BdevError::Unsafe { .. } | BdevError::NotBlank { .. } => {
                libc::EBUSY
            }
            BdevError::NoSuchFile { .. } => libc::ENOENT,
            BdevError::Unsupported { .. } => libc::ENOTSUP,
            BdevError::Dma { .. } => libc::ENOMEM,
            BdevError::Os { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            #[cfg(feature = "nvme")]
            BdevError::Nvme { source } => source.errno(),
            BdevError::Io(_) => libc::EIO,
            BdevError::InvalidUri { .. }
            | BdevError::InvalidOption { .. }
            | BdevError::WrongSize { .. } => libc::EINVAL,
        }
    }

    /// A system call failed: on which device or path, what, why.
    pub fn os(device: impl Into<String>, what: impl Into<String>, e: io::Error) -> Self {
        BdevError::Os {
            device: device.into(),
            what: what.into(),
            source: e,
        }
    }
}
