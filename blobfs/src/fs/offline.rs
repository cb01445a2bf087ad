//! Changes of a file system that is not mounted.

use super::error::{FsError, Result};
use super::mount::{FileSystem, StatFs};
use super::options::{Journal, MountOptions};
use super::volume::store_error;

/// Makes the file system on the device that `uri` names larger. With `size_bytes` the device is an
/// image file, which is first made that long. Otherwise the file system uses the current size of
/// the device. Returns the new sizes.
///
/// It may be repeated, also after a crash: completed steps are left as they are. Nothing is changed
/// if there is no file system that can be mounted, or if it is in use. Durable on return. Blocks.
///
/// # Errors
/// Fails when the device cannot be opened, is not an image file, or is longer than `size_bytes`;
/// when there is no file system; and with device errors.
pub fn grow(uri: &str, size_bytes: Option<u64>) -> Result<StatFs> {
    // Look first: a device without a file system is not made longer.
    let look = MountOptions {
        read_only: true,
        ..MountOptions::default()
    };
    let device = pumice_bdev::open_with(uri, pumice_bdev::OpenOptions::new().read_only(true))?;
    FileSystem::mount(device, &look)?.unmount()?;
    let device = match size_bytes {
        Some(bytes) => pumice_bdev::open_with(uri, pumice_bdev::OpenOptions::new().grow_to(bytes))?,
        None => pumice_bdev::open_with(uri, pumice_bdev::OpenOptions::new())?,
    };
    let fs = FileSystem::mount(device, &MountOptions::default())?;
    fs.grow()?;
    let space = fs.statfs();
    fs.unmount()?;
    Ok(space)
}

/// Adds a journal to the file system on the device that `uri` names, which has none: one that SPDK or an earlier version has
/// made. It is used from the next mount on. SPDK then refuses the file system until it was unmounted in order. Durable on
/// return. Blocks.
///
/// # Errors
/// Fails, and changes nothing, when the device cannot be opened; when there is no file system or it is damaged; when it has a
/// journal; for a size that does not fit, or for which there is no run of free clusters. After a power cut in the middle there
/// may be a file `pumice.journal`, which the next call removes.
pub fn add_journal(uri: &str, journal: Journal) -> Result<StatFs> {
    let read = || {
        let look = MountOptions {
            read_only: true,
            ..MountOptions::default()
        };
        let how = pumice_bdev::OpenOptions::new().read_only(true);
        FileSystem::mount(pumice_bdev::open_with(uri, how)?, &look)
    };
    let fs = read()?;
    let name = fs.device_name();
    let bytes = {
        let geometry = fs.core().vol.store.super_block();
        journal.bytes(geometry.size.get(), geometry.cluster_size.get())
    };
    let has = fs.statfs().journal > 0;
    fs.unmount()?;
    if has {
        return Err(FsError::invalid(name, "the file system has a journal"));
    }
    let Some(bytes) = bytes else {
        let reason = "no size was given, and the file system is too small for one of its own; 128 KiB is the least";
        return Err(FsError::invalid(name, reason));
    };
    let device = pumice_bdev::open_with(uri, pumice_bdev::OpenOptions::new())?;
    let fs = FileSystem::mount(device, &MountOptions::default())?;
    let added = fs.core().vol.store.add_journal(bytes);
    let unmounted = fs.unmount();
    added.map_err(|e| store_error(format!("{name}: adding a journal"), e, 0))?;
    unmounted?;
    let fs = read()?;
    let space = fs.statfs();
    fs.unmount()?;
    Ok(space)
}
