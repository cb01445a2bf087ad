//! From a URI to a mounted file system.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_blobfs::fs::{self, FileSystem, FormatOptions};

use crate::Error;

/// How [`mount`] mounts.
#[derive(Clone, Debug)]
pub struct MountOptions {
    fs: fs::MountOptions,
    format_empty: Option<FormatOptions>,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions {
            fs: fs::MountOptions::default(),
            format_empty: Some(FormatOptions::default()),
        }
    }
}

impl MountOptions {
    /// Read and write; an empty device is formatted.
    #[must_use]
    pub fn new() -> MountOptions {
        MountOptions::default()
    }

    /// Bound of the page cache in bytes.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: u64) -> MountOptions {
        self.fs.cache_bytes = bytes;
        self
    }

    /// Nothing is written to the device.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> MountOptions {
        self.fs.read_only = read_only;
        self
    }

    /// How a device that holds nothing but zeroes is formatted; `None`: not at all. A device with
    /// anything else on it never is: that is `pumice mkfs --force`.
    #[must_use]
    pub fn format_empty(mut self, how: Option<FormatOptions>) -> MountOptions {
        self.format_empty = how;
        self
    }

    /// The file system's own options, in place of the present ones.
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
/// and database on it are gone.
///
/// # Errors
/// [`Error::Device`] if the device cannot be opened, for instance because another process has it;
/// [`Error::NotEmpty`] if it holds something else; [`Error::FileSystem`].
pub fn mount(uri: &str, options: &MountOptions) -> Result<FileSystem, Error> {
    let device = pumice_bdev::open(uri).map_err(|source| Error::Device {
        uri: uri.to_owned(),
        source,
    })?;
    mount_device(&device, options)
}

/// As [`mount`], on a device that is open already.
///
/// # Errors
/// As [`mount`].
pub fn mount_device(
    device: &Arc<dyn BlockDevice>,
    options: &MountOptions,
) -> Result<FileSystem, Error> {
    if let (Some(format), false) = (&options.format_empty, options.fs.read_only)
        && FileSystem::probe(device)?.is_none()
    {
        if !is_blank(device)? {
            return Err(Error::NotEmpty {
                device: device.info().name.clone(),
            });
        }
        tracing::info!(device = device.info().name, "empty: formatting");
        FileSystem::format(Arc::clone(device), format)?;
    }
    Ok(FileSystem::mount(Arc::clone(device), &options.fs)?)
}

/// Whether the first and last MiB, and one block in each of 64 places between, are zeroes: what is
/// unlike any disk in use. `probe` has looked for what it knows before.
fn is_blank(device: &Arc<dyn BlockDevice>) -> Result<bool, Error> {
    let info = device.info();
    let failed = |source| Error::Device {
        uri: info.name.clone(),
        source,
    };
    let channel = AsyncChannel::new(device.open_channel().map_err(failed)?);
    let block = u64::from(info.block_size);
    let end_blocks = ((1 << 20) / block).clamp(1, info.num_blocks.max(1));
    let last = info.num_blocks.saturating_sub(end_blocks);
    let between = (1..=64).map(|n| (info.num_blocks / 66 * n, 1));
    for (lba, blocks) in [(0, end_blocks), (last, end_blocks)]
        .into_iter()
        .chain(between)
    {
        let len = usize::try_from(blocks * block).unwrap_or(usize::MAX);
        let buf = DmaBuf::new(len).map_err(|e| Error::Memory(e.to_string()))?;
        let read = channel
            .block_on(channel.read(lba, buf))
            .map_err(|source| Error::Read {
                device: info.name.clone(),
                source,
            })?;
        if read.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
