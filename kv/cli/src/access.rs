//! Opening the device of a command and mounting what is on it.

use std::sync::Arc;

use clap::Args;
use pumice_bdev::BlockDevice;
use pumice_bdev_control::complain;
use pumice_blobfs::fs::{FileSystem, FsError, MountOptions};

use crate::failure::Failure;
use crate::signals;

/// The way in which a command mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// For reading only: others may read at the same time, and the file need not be writable.
    Read,
    /// For changes; with `accept_damage` also when blobs are damaged.
    Write { accept_damage: bool },
}

/// Options of commands that change a file system.
#[derive(Args)]
pub struct Change {
    /// Continue although files are damaged: their content counts as lost
    #[arg(long)]
    accept_damage: bool,
}

impl Change {
    /// Whether to continue although files are damaged.
    pub fn accepts_damage(&self) -> bool {
        self.accept_damage
    }

    /// Returns the way to mount for the change.
    pub fn mode(&self) -> Mode {
        Mode::Write {
            accept_damage: self.accept_damage,
        }
    }
}

/// Opens a device for reading, which others may do at the same time.
pub fn open_to_read(uri: &str) -> Result<Arc<dyn BlockDevice>, Failure> {
    Ok(pumice_bdev::open_with(
        uri,
        pumice_bdev::OpenOptions::new().read_only(true),
    )?)
}

/// Mounts, calls `f` and unmounts. Problems that the mount found go to standard error.
pub fn mounted<R>(
    uri: &str,
    mode: Mode,
    f: impl FnOnce(&FileSystem) -> Result<R, Failure>,
) -> Result<R, Failure> {
    let mut opts = MountOptions::default();
    opts.cache_bytes = 64 << 20;
    let dev = match mode {
        Mode::Read => {
            opts.read_only = true;
            open_to_read(uri)?
        }
        Mode::Write { accept_damage } => {
            opts.accept_damage = accept_damage;
            // A command that is killed leaves nothing that has to be kept.
            opts.volatile = true;
            signals::catch()?;
            pumice_bdev::open(uri)?
        }
    };
    on_device(uri, dev, &opts, f)
}

/// Mounts. Problems that are found go to standard error.
pub fn mount_device(
    uri: &str,
    dev: Arc<dyn BlockDevice>,
    opts: &MountOptions,
) -> Result<FileSystem, Failure> {
    let fs = FileSystem::mount(dev, opts).map_err(|e| match e {
        FsError::Damaged { .. } => Failure::from(format!(
            "{e}; this command's option for that is --accept-damage, and `pumice rescue` copies what can be read"
        )),
        e => e.into(),
    })?;
    for problem in fs.problems() {
        complain!("pumice: {uri}: {problem}");
    }
    if fs.hides_writes() {
        complain!(
            "pumice: {uri}: what a killed process had not synced is in shared memory and cannot be shown; \
             the next mount for writing puts it in place, or says why not"
        );
    }
    Ok(fs)
}

/// Mounts, calls `f` and unmounts.
pub fn on_device<R>(
    uri: &str,
    dev: Arc<dyn BlockDevice>,
    opts: &MountOptions,
    f: impl FnOnce(&FileSystem) -> Result<R, Failure>,
) -> Result<R, Failure> {
    let fs = mount_device(uri, dev, opts)?;
    let result = f(&fs);
    let unmounted = fs.unmount();
    let value = result?;
    unmounted?;
    Ok(value)
}
