//! Errors of devices as a whole.

use std::io;
use std::path::{Path, PathBuf};

use pumice_io::IoError;
use pumice_io::uri::UriError;

/// An error of a device, a name or a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BdevError {
    /// A URI that does not name a device.
    #[error("{uri}: {reason}")]
    InvalidUri {
        /// The URI.
        uri: String,
        /// The reason, and a correct form.
        reason: String,
    },
    /// An option or parameter with an invalid value.
    #[error("{name}: {reason}")]
    InvalidOption {
        /// Name of the option.
        name: String,
        /// The reason, and a correct value.
        reason: String,
    },
    /// Another process, or another part of this one, has the device.
    #[error("{device}: in use by {}", owner(*.pid))]
    InUse {
        /// Name of the device, or the path.
        device: String,
        /// The process that has it, where the kernel says.
        pid: Option<u32>,
    },
    /// A block device that is mounted, or a backing file of a loop device.
    #[error("{device}: {reason}")]
    Unsafe {
        /// Name of the device, or the path.
        device: String,
        /// The reason why it must not be used, and what to do.
        reason: String,
    },
    /// A system call failed.
    #[error("{device}: {what}: {source}")]
    Os {
        /// Name of the device, or the path.
        device: String,
        /// The operation that failed.
        what: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The device has content, or could not be read as a whole, and may not be overwritten without
    /// permission.
    #[error(
        "{device}: holds {contents}; nothing was changed; to lose that, say so: --force \
         (`force`, `Overwrite::Anything` in the library)"
    )]
    NotBlank {
        /// Name of the device, or the path.
        device: String,
        /// The content.
        contents: crate::contents::Contents,
    },
    /// A file's size differs from the requested one.
    #[error(
        "{}: the file has {found_bytes} bytes, size= says {wanted_bytes}; nothing was changed; leave \
         size= out{}",
        .path.display(), how_to_lengthen(.path, *.found_bytes, *.wanted_bytes)
    )]
    WrongSize {
        /// Path of the file.
        path: PathBuf,
        /// Size of the file.
        found_bytes: u64,
        /// The requested size.
        wanted_bytes: u64,
    },
    /// The path does not exist.
    #[error("{}: {hint}", .path.display())]
    NoSuchFile {
        /// The path that was given.
        path: PathBuf,
        /// The missing file, and what to do.
        hint: String,
    },
    /// An error of the NVMe driver.
    #[cfg(feature = "nvme")]
    #[error(transparent)]
    Nvme {
        /// The driver's error.
        source: pumice_nvme::NvmeError,
    },
    /// There is no device of that name.
    #[error("there is no bdev `{name}`{hint}")]
    NotFound {
        /// The requested name.
        name: String,
        /// The devices that exist. It begins with punctuation.
        hint: String,
    },
    /// A device has this name or alias already.
    #[error("bdev `{name}` exists already")]
    Exists {
        /// The name or alias.
        name: String,
    },
    /// Another module claims the device.
    #[error("bdev `{name}` is claimed by {by}")]
    Claimed {
        /// Name of the device.
        name: String,
        /// The module that claims it.
        by: String,
    },
    /// The device was removed.
    #[error("bdev `{name}` was removed")]
    Removed {
        /// Name of the device.
        name: String,
    },
    /// This build, machine or module does not support the request.
    #[error("{device}: {reason}")]
    Unsupported {
        /// Name of the device or module, or the path.
        device: String,
        /// The reason, and what would work.
        reason: String,
    },
    /// There is no DMA memory.
    #[error("{device}: {source}")]
    Dma {
        /// Name of the device.
        device: String,
        /// The reason.
        #[source]
        source: crate::DmaError,
    },
    /// An error of a single operation.
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

/// Returns the part of the message that is true where the requested size is larger than the file.
fn how_to_lengthen(path: &Path, found_bytes: u64, wanted_bytes: u64) -> String {
    if wanted_bytes < found_bytes {
        return String::new();
    }
    let path = path.display();
    format!(", or make the file and what is on it longer: pumice grow {path} {wanted_bytes}")
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
    /// Returns the errno that corresponds to the error.
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
