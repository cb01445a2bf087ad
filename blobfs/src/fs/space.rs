//! Space: what can still be written, what is kept back, what is given back, and growing.
//!
//! A file system has space of three kinds: clusters, metadata pages, and, below a sparse image, room on the
//! kernel's file system. Whatever ran out, files can be deleted and truncated, the file system mounted and
//! unmounted: those changes may use the reserve, and giving space back is never an error.

use std::sync::Arc;

use pumice_bdev::{OpenOptions, open_with};

use super::core::Core;
use super::error::{FsError, Result, SpaceKind};
use super::file::File;
use super::inode::Inode;
use super::mount::{FileSystem, StatFs};
use super::options::MountOptions;
use crate::blobstore::SpacePolicy;

/// How long an essential file may get at the expense of the reserve.
pub(crate) const ESSENTIAL_MAX: u64 = 1 << 20;
/// What a mounted file system keeps back, and that its metadata grows.
pub(crate) const POLICY: SpacePolicy = SpacePolicy {
    reserve: true,
    grow_metadata: true,
};

impl Core {
    /// Bytes that the file system below a sparse image has room for, beyond what files have been promised.
    /// `None`: nothing can run out there.
    pub fn host_room(&self) -> Option<u64> {
        let host = self.dev.host_space()?;
        let unused = self.store.free_clusters() * self.cluster;
        let used = self.dev.info().len_bytes().saturating_sub(unused);
        Some((host.free_bytes + host.allocated_bytes).saturating_sub(used))
    }

    /// Refuses to promise a file more than the file system below has room for.
    pub fn check_host(&self, ino: &Inode, bytes: u64) -> Result<()> {
        match self.host_room() {
            Some(free_bytes) if free_bytes < bytes => Err(FsError::NoSpace {
                what: format!("{}: {bytes} bytes more", ino.path()),
                kind: SpaceKind::Host,
                free_bytes,
            }),
            _ => Ok(()),
        }
    }

    /// Bytes that files can still take.
    pub fn free_bytes(&self) -> u64 {
        if !self.store.can_take_md_page() {
            return 0;
        }
        let free = self.store.available_clusters() * self.cluster;
        self.host_room().map_or(free, |host| free.min(host))
    }

    /// Nobody is going to append any more: gives back what was allocated past the end. That it could not
    /// be is no error.
    pub fn finish_writing(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        tail.reserved = false;
        self.trim(ino, tail);
    }
}

impl File {
    /// Says that nobody is going to append to the file any more: what was allocated past its end, ahead or
    /// by [`File::allocate`], goes back at once. Appending stays possible. Blocks while the new size is
    /// made durable.
    pub fn finish_writing(&self) {
        self.core().finish_writing(self.ino());
    }
}

impl FileSystem {
    /// Space and counts. Linear in the number of files; [`FileSystem::free_bytes`] is not. In a forked child,
    /// which has no mount, nothing is there: all are 0.
    pub fn statfs(&self) -> StatFs {
        let core = self.core();
        if core.check_fork().is_err() {
            return StatFs::default();
        }
        let pages = core.store.md_pages();
        StatFs {
            total: (core.store.total_clusters() - core.store.reserved_clusters()) * core.cluster,
            free: core.free_bytes(),
            used: (core.store.total_clusters() - core.store.free_clusters()) * core.cluster,
            unused: core.store.free_clusters() * core.cluster,
            host_free: core.host_room(),
            cluster: core.cluster,
            files: core.names.inodes().len() as u64,
            md_pages: pages.total,
            md_pages_used: pages.used,
        }
    }

    /// Bytes that can still be written; see [`StatFs::free`]. In a forked child 0.
    pub fn free_bytes(&self) -> u64 {
        match self.core().check_fork() {
            Ok(()) => self.core().free_bytes(),
            Err(_) => 0,
        }
    }

    /// Takes what the device has beyond the file system, and gives it metadata pages for its size, or
    /// twice as many if three quarters are used. Gives the bytes gained. May be repeated, also after a power
    /// cut; durable on return. Blocks.
    ///
    /// # Errors
    /// Device errors. That there is no room for more metadata pages is none.
    pub fn grow(&self) -> Result<u64> {
        let core = self.core();
        core.check_writable(|| core.dev.info().name.clone())?;
        let gained = core
            .store
            .grow()
            .map_err(|e| core.store_error("growing the file system", e))?;
        let pages = core.store.md_pages();
        let wanted = if pages.used * 4 >= pages.total * 3 {
            pages.total * 2
        } else {
            core.store.fitting_md_pages()
        };
        if wanted > pages.total {
            let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
            match core.store.grow_md_pages(wanted) {
                Ok(_) => {}
                Err(error @ crate::blobstore::Error::NoMdPages { .. }) => {
                    tracing::warn!(%error, "the metadata pages could not be made more");
                }
                Err(e) => return Err(core.store_error("growing the metadata pages", e)),
            }
        }
        core.store.set_space_policy(POLICY);
        Ok(gained * core.cluster)
    }
}

/// Makes the file system on the device that `uri` names larger. With `size_bytes` the device is an image
/// file, which is made that long first; without, the file system takes what the device has become. Gives
/// what the file system has then.
///
/// It may be repeated, after a crash too: what is done already is left as it is. Nothing is changed if
/// there is no file system that can be mounted, or if it is in use. Durable on return. Blocks.
///
/// # Errors
/// The device cannot be opened, is no image file, or is longer than `size_bytes`; there is no file system;
/// device errors.
pub fn grow(uri: &str, size_bytes: Option<u64>) -> Result<StatFs> {
    // A look first: what holds no file system is not made longer.
    let look = MountOptions {
        read_only: true,
        ..MountOptions::default()
    };
    let device = open_with(uri, OpenOptions::new().read_only(true))?;
    FileSystem::mount(device, &look)?.unmount()?;
    let device = match size_bytes {
        Some(bytes) => open_with(uri, OpenOptions::new().grow_to(bytes))?,
        None => open_with(uri, OpenOptions::new())?,
    };
    let fs = FileSystem::mount(device, &MountOptions::default())?;
    fs.grow()?;
    let space = fs.statfs();
    fs.unmount()?;
    Ok(space)
}
