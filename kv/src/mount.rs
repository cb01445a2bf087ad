//! Mounting a file system by URI.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::FileSystem;
use pumice_rocksdb_fs::MountOptions;

use crate::Error;

/// Mounts the file system on the device that `uri` names: `file:///path/to/image?size=4G&create=1`,
/// `file:///dev/nvme0n1`, `malloc://1G`, … ([`pumice_bdev::open`] has them all).
///
/// The file system is unmounted by [`FileSystem::unmount`], or when the last handle, environment
/// and database on it are dropped.
///
/// # Errors
/// [`Error::Device`] if the device cannot be opened, for instance because another process has it;
/// [`Error::NotEmpty`] if it holds something else; [`Error::FileSystem`].
pub fn mount(uri: &str, options: &MountOptions) -> Result<FileSystem, Error> {
    Ok(pumice_rocksdb_fs::mount(uri, options)?)
}

/// Mounts as [`mount`] does, on an open device.
///
/// # Errors
/// Fails as [`mount`] does.
pub fn mount_device(
    device: &Arc<dyn BlockDevice>,
    options: &MountOptions,
) -> Result<FileSystem, Error> {
    Ok(pumice_rocksdb_fs::mount_device(device, options)?)
}
