//! Mounting a file system by URI.

use std::sync::Arc;

use pumice_bdev::contents::{self, Contents};
use pumice_bdev::{BlockDevice, OpenOptions};
use pumice_blobfs::fs::{self, FileSystem, FormatOptions, FsError};

use crate::MountError;

/// Options of [`mount`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    fs: fs::MountOptions,
    format_empty: Option<FormatOptions>,
}

/// Options of a file system whose cache follows the memory that is free.
fn default_fs() -> fs::MountOptions {
    let mut options = fs::MountOptions::default();
    options.cache_most_bytes = Some(fs::cache_most_bytes());
    options
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions {
            fs: default_fs(),
            format_empty: Some(FormatOptions::default()),
        }
    }
}

impl MountOptions {
    /// Reads and writes; an empty device is formatted.
    #[must_use]
    pub fn new() -> MountOptions {
        MountOptions::default()
    }

    /// Sets the size of the page cache in bytes. By default it begins with an eighth of the memory that this process may
    /// use (the machine's, or the limit of its control group), at most a quarter of what is free,
    /// between 8 and 256 MiB, and follows the memory that is free up to three quarters of it.
    #[must_use]
    pub fn cache_bytes(self, bytes: u64) -> MountOptions {
        self.cache_between(bytes, bytes)
    }

    /// Sets the sizes in bytes between which the page cache follows the memory that is free; see
    /// [`fs::MountOptions::cache_most_bytes`].
    #[must_use]
    pub fn cache_between(mut self, least: u64, most: u64) -> MountOptions {
        self.fs.cache_bytes = least;
        self.fs.cache_most_bytes = Some(most);
        self
    }

    /// Whether the page cache's memory becomes huge pages while it is in use; see [`fs::MountOptions::huge_pages`].
    #[must_use]
    pub fn huge_pages(mut self, huge_pages: bool) -> MountOptions {
        self.fs.huge_pages = huge_pages;
        self
    }

    /// Writes nothing to the device and creates nothing: [`mount`] opens the device for reading
    /// only, and several processes may read one image at a time.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> MountOptions {
        self.fs.read_only = read_only;
        self
    }

    /// Whether nothing is written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.fs.read_only
    }

    /// Mounts for writing although blobs are damaged, without their files. Otherwise such a mount
    /// is refused, with an error that names the damage. Reading needs no permission.
    #[must_use]
    pub fn accept_damage(mut self, accept: bool) -> MountOptions {
        self.fs.accept_damage = accept;
        self
    }

    /// Whether what is not synced may be lost when the process is killed, as it is by a power cut. Otherwise it is kept in shared
    /// memory too, which costs a copy of each write; see [`fs::MountOptions::volatile`].
    #[must_use]
    pub fn volatile(mut self, volatile: bool) -> MountOptions {
        self.fs.volatile = volatile;
        self
    }

    /// Sets how a device that holds nothing but zeroes is formatted; `None`: not at all. A device
    /// with other content is never formatted: that is `pumice mkfs --force`. To find out, every
    /// block that may hold data is read: of an image file everything that was ever written, of a
    /// block device without a file system all of it.
    #[must_use]
    pub fn format_empty(mut self, how: Option<FormatOptions>) -> MountOptions {
        self.format_empty = how;
        self
    }

    /// Replaces the file system's own options.
    #[must_use]
    pub fn file_system(mut self, options: fs::MountOptions) -> MountOptions {
        self.fs = options;
        self
    }
}

/// Mounts the file system on the device that `uri` names: `file:///path/to/image?size=4G&create=1`,
/// `file:///dev/nvme0n1`, `malloc://1G`, … ([`pumice_bdev::open`] has them all).
///
/// The file system is unmounted by [`FileSystem::unmount`], or when the last handle, environment
/// and database on it are dropped.
///
/// # Errors
/// [`MountError::Device`] if the device cannot be opened, for instance because another process has it;
/// [`MountError::NotEmpty`] if it holds something else; [`MountError::FileSystem`].
pub fn mount(uri: &str, options: &MountOptions) -> Result<FileSystem, MountError> {
    mount_device(&open_device(uri, options)?, options)
}

/// Opens the device that `uri` names as `options` need it.
///
/// # Errors
/// [`MountError::Device`].
pub fn open_device(uri: &str, options: &MountOptions) -> Result<Arc<dyn BlockDevice>, MountError> {
    let how = OpenOptions::new().read_only(options.fs.read_only);
    pumice_bdev::open_with(uri, how).map_err(|source| MountError::Device {
        uri: uri.to_owned(),
        source,
    })
}

/// Mounts as [`mount`] does, on an open device.
///
/// # Errors
/// Fails as [`mount`] does.
pub fn mount_device(
    device: &Arc<dyn BlockDevice>,
    options: &MountOptions,
) -> Result<FileSystem, MountError> {
    if let (Some(format), false) = (&options.format_empty, options.fs.read_only) {
        let name = &device.info().name;
        let found = contents::recognise(&**device).map_err(|source| MountError::Device {
            uri: name.clone(),
            source,
        })?;
        if !matches!(found, Some(Contents::Ours(_))) {
            tracing::info!(
                device = name,
                "no file system: formatting, if the device is blank"
            );
            FileSystem::format(Arc::clone(device), format).map_err(|e| match e {
                FsError::Foreign { device, found, .. } => MountError::NotEmpty { device, found },
                e => MountError::FileSystem(e),
            })?;
        }
    }
    Ok(FileSystem::mount(Arc::clone(device), &options.fs)?)
}
