//! [`FileSystem`]: the mount and its operations by path.

use std::sync::Arc;
use std::sync::atomic::Ordering;

#[cfg(doc)]
use pumice_bdev::contents;
use pumice_bdev::contents::{Formatting, Overwrite};
use pumice_bdev::{BdevError, BlockDevice};

use super::attributes::Attributes;
use super::cache::CacheStats;
use super::core::Core;
use super::error::{FsError, Result};
use super::file::File;
use super::inode::Inode;
use super::metered::IoStats;
use super::names::Entry;
use super::options::{FormatOptions, MountOptions, OpenOptions};
use super::stat::Stat;
use super::view::StoreView;
use super::volume::store_error;
use super::{exit, load, path};
use crate::blobstore::{BlobId, Blobstore, BsType, InitOptions, default_md_pages};

/// A mounted file system. Clones are handles of the same mount. When the last handle (of it, or of
/// a file in it) is dropped without [`FileSystem::unmount`], the file system is unmounted as far as
/// possible.
#[derive(Clone)]
pub struct FileSystem {
    core: Arc<Core>,
}

impl std::fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirEntry {
    /// The last component of its path.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Length in bytes.
    pub len: u64,
}

/// Space and counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StatFs {
    /// Bytes for files, without the reserve and the journal.
    pub total: u64,
    /// Bytes that can be written: without the reserve for opening, and at most what the file system
    /// below a sparse image has room for. 0 if no file can be made for lack of metadata pages.
    pub free: u64,
    /// Bytes of the files' clusters, including those allocated ahead.
    pub used: u64,
    /// Bytes that belong to no file, including the reserve.
    pub unused: u64,
    /// Bytes of the journal.
    pub journal: u64,
    /// Bytes that the file system below a sparse image has room for.
    pub host_free: Option<u64>,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Number of files.
    pub files: u64,
    /// Number of metadata pages.
    pub md_pages: u64,
    /// Number of used metadata pages.
    pub md_pages_used: u64,
}

/// An exclusive lock on a path; see [`FileSystem::lock`]. Dropping it unlocks.
#[derive(Debug)]
pub struct FileLock {
    core: Arc<Core>,
    file: Option<File>,
    id: BlobId,
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if self.core.vol.check_fork().is_ok() {
            self.core.names.locked.lock().remove(&self.id.0);
        }
        self.file = None;
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.is_unfinished()
            // There is nobody left to try again.
            && let Err(error) = self.unmount_anyway()
        {
            tracing::error!(device = self.vol.dev.info().name, %error, "the file system could not be unmounted in order");
        }
        // Operations in flight keep their file alive, and that keeps the channels.
        if self.vol.check_fork().is_ok() {
            self.vol.shared().drain();
        }
        self.ended.set();
    }
}

/// Returns the reason why a device is not formatted.
fn refuse_format(e: BdevError) -> FsError {
    match e {
        BdevError::NotBlank { device, contents } => FsError::Foreign {
            device,
            found: contents.to_string(),
            hint: "nothing was changed; format over it with force (`--force`)".to_owned(),
        },
        e => FsError::from(e),
    }
}

impl FileSystem {
    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Makes an empty file system on the device. Without [`FormatOptions::force`] the device must
    /// be blank, by the rule of [`contents`]: every block that may hold data is read. Blocks.
    ///
    /// # Errors
    /// [`FsError::Foreign`] when the device holds anything but zeroes, or could not be read as a
    /// whole; sizes that do not fit; device errors. An image file that opening the device has
    /// created is then removed when the device is closed.
    pub fn format(dev: Arc<dyn BlockDevice>, opts: &FormatOptions) -> Result<()> {
        let info = dev.info();
        let formatting =
            Formatting::begin(&dev, Overwrite::forced(opts.force)).map_err(refuse_format)?;
        if info.block_size > 4096 {
            let reason = format!(
                "blocks of {} bytes; BlobFS needs 512 to 4096",
                info.block_size
            );
            return Err(FsError::invalid(&info.name, reason));
        }
        if opts
            .md_pages
            .is_some_and(|pages| pages < FormatOptions::MIN_MD_PAGES)
        {
            let reason = format!(
                "{} metadata pages are too few to hold files; at least {}, or leave the number out",
                opts.md_pages.unwrap_or_default(),
                FormatOptions::MIN_MD_PAGES
            );
            return Err(FsError::invalid(&info.name, reason));
        }
        let name = info.name.clone();
        let md_pages = opts
            .md_pages
            .unwrap_or_else(|| default_md_pages(info.len_bytes(), opts.cluster_size));
        // It has been examined, hence the force.
        let init = InitOptions::default()
            .cluster_size(opts.cluster_size)
            .md_pages(Some(md_pages))
            .bstype(BsType::BLOBFS)
            .journal(opts.journal.bytes(info.len_bytes(), opts.cluster_size))
            .force(true);
        let store = Blobstore::init(dev, &init)
            .map_err(|e| store_error(format!("{name}: format"), e, 0))?;
        store
            .unload()
            .map_err(|e| store_error(format!("{name}: format"), e, 0))?;
        formatting.finish();
        Ok(())
    }

    /// Mounts. Completes what a crash has interrupted, and writes nothing if there is nothing to
    /// complete. Blocks.
    ///
    /// # Errors
    /// There is no file system, or other content; damaged global metadata; device errors.
    #[expect(clippy::needless_pass_by_value, reason = "the mount owns the device")]
    pub fn mount(dev: Arc<dyn BlockDevice>, opts: &MountOptions) -> Result<FileSystem> {
        let core = Arc::new(load::mount(&dev, opts)?);
        exit::register(&core);
        Ok(FileSystem { core })
    }

    /// Makes everything durable and ends the use of the device in order: its lock is free on
    /// return, whatever handles are left. They return [`FsError::Unmounted`] from then on.
    ///
    /// # Errors
    /// Device errors, with the file and the bytes that could not be made durable. Nothing is lost
    /// then: the file system stays mounted or, where only the blobstore's last page is missing,
    /// waits for the next call of this. [`FileSystem::unmount_anyway`] ends the mount without those
    /// bytes.
    pub fn unmount(&self) -> Result<()> {
        self.core.unmount()
    }

    /// Unmounts as [`FileSystem::unmount`] does, but drops what cannot be made durable: the file
    /// keeps its durable length. Returns an error for each such file, and none if nothing was lost.
    ///
    /// # Errors
    /// The metadata could not be written, or what the journal has could not be put in place. The mount has ended
    /// all the same, and what is durable stays so: the next one recovers. Only while I/O does not end, it has not.
    pub fn unmount_anyway(&self) -> Result<Vec<FsError>> {
        self.core.unmount_anyway()
    }

    /// Whether a killed process has written what this mount, which only reads, does not show: its log in shared memory cannot be
    /// read, or there is no memory for it. The next mount for writing puts it in place, or says why not.
    #[must_use]
    pub fn hides_writes(&self) -> bool {
        self.core.hides_writes
    }

    /// Returns a line for each problem that the mount found and left alone.
    pub fn problems(&self) -> &[String] {
        &self.core.problems
    }

    /// Opens a file, or creates it, as `how` says. A created file is durable, and empty, on return.
    ///
    /// # Errors
    /// [`FsError::NotFound`] also for a missing directory, [`FsError::IsDir`], [`FsError::Exists`],
    /// [`FsError::NoSpace`], name errors.
    pub fn open(&self, path: &str, how: OpenOptions) -> Result<File> {
        let path = path::normalise(path)?;
        let ino = self.core.namespace.open(&path, how)?;
        let file = File::new(Arc::clone(&self.core), ino);
        if how.truncate {
            file.truncate(0)?;
        }
        Ok(file)
    }

    /// Removes a name of a file. Durable on return.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDir`], device errors.
    pub fn unlink(&self, path: &str) -> Result<()> {
        self.core.namespace.unlink(&path::normalise(path)?)
    }

    /// Renames a file, replacing a file of the new name, or a directory, replacing an empty one. It
    /// is one step, even across a crash. Durable on return.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDir`], [`FsError::NotDir`], [`FsError::NotEmpty`], name
    /// and device errors.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.core
            .namespace
            .rename(&path::normalise(from)?, &path::normalise(to)?)
    }

    /// Gives a file another name. Durable on return.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::Exists`], [`FsError::IsDir`], too many links, device errors.
    pub fn link(&self, from: &str, to: &str) -> Result<()> {
        self.core
            .namespace
            .link(&path::normalise(from)?, &path::normalise(to)?)
    }

    /// Returns the number of names of a file.
    ///
    /// # Errors
    /// Fails as [`FileSystem::stat`] does.
    pub fn num_links(&self, path: &str) -> Result<u64> {
        Ok(self.stat(path)?.links as u64)
    }

    /// Returns the properties of a path.
    ///
    /// # Errors
    /// [`FsError::NotFound`], name errors.
    pub fn stat(&self, path: &str) -> Result<Stat> {
        let path = path::normalise(path)?;
        self.core.vol.check_mounted(|| path.clone())?;
        match self.core.names.get(&path) {
            Some(Entry::File(ino)) => Ok(Stat::of_file(&ino)),
            Some(Entry::Dir(dir)) => Ok(Stat::of_dir(&dir)),
            None if path == "/" => Ok(Stat::of_dir(&self.core.names.root)),
            None => Err(FsError::not_found(&path)),
        }
    }

    /// Returns all paths of the file at `path`, or `path` itself for a directory.
    ///
    /// # Errors
    /// Fails as [`FileSystem::stat`] does.
    pub fn names(&self, path: &str) -> Result<Vec<String>> {
        let path = path::normalise(path)?;
        self.core.vol.check_mounted(|| path.clone())?;
        match self.core.names.get(&path) {
            Some(Entry::File(ino)) => Ok(ino.names.lock().clone()),
            None if path != "/" => Err(FsError::not_found(&path)),
            _ => Ok(vec![path]),
        }
    }

    /// Sets the mode or the time of the last change. Durable on return for a directory other than the root, which keeps them
    /// until the unmount; for a file after the next sync.
    ///
    /// # Errors
    /// Fails as [`FileSystem::stat`] does, and with the device's error.
    pub fn set_attributes(&self, path: &str, attributes: &Attributes) -> Result<()> {
        let path = path::normalise(path)?;
        self.core.vol.check_fork()?;
        if matches!(self.core.names.get(&path), Some(Entry::File(_))) {
            return self
                .open(&path, OpenOptions::READ)?
                .set_attributes(attributes);
        }
        self.core.namespace.set_dir_attributes(&path, attributes)
    }

    /// Whether there is a file or directory of that path.
    ///
    /// # Errors
    /// Name errors, the file system was unmounted.
    pub fn exists(&self, path: &str) -> Result<bool> {
        match self.stat(path) {
            Ok(_) => Ok(true),
            Err(FsError::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Creates a directory. Durable on return.
    ///
    /// # Errors
    /// [`FsError::Exists`], [`FsError::NotFound`] for its parent, [`FsError::NoSpace`], device errors.
    pub fn mkdir(&self, path: &str) -> Result<()> {
        self.core.namespace.mkdir(&path::normalise(path)?)
    }

    /// Removes an empty directory. Durable on return.
    ///
    /// # Errors
    /// [`FsError::NotEmpty`], [`FsError::NotFound`], [`FsError::NotDir`], device errors.
    pub fn rmdir(&self, path: &str) -> Result<()> {
        self.core.namespace.rmdir(&path::normalise(path)?)
    }

    /// Returns the entries of a directory, in order of their names.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDir`].
    pub fn list(&self, dir: &str) -> Result<Vec<DirEntry>> {
        let dir = path::normalise(dir)?;
        self.core.vol.check_mounted(|| dir.clone())?;
        self.core.names.check_dir(&dir)?;
        let entry = |(p, e): (String, Entry)| {
            let name = path::base(&p).to_owned();
            match e {
                Entry::File(ino) => DirEntry {
                    name,
                    is_dir: false,
                    len: ino.len(),
                },
                Entry::Dir(_) => DirEntry {
                    name,
                    is_dir: true,
                    len: 0,
                },
            }
        };
        Ok(self
            .core
            .names
            .children(&dir)
            .into_iter()
            .map(entry)
            .collect())
    }

    /// Makes the names in a directory durable, which they are already.
    ///
    /// # Errors
    /// Fails as [`FileSystem::list`] does.
    pub fn sync_dir(&self, dir: &str) -> Result<()> {
        let dir = path::normalise(dir)?;
        self.core.vol.check_mounted(|| dir.clone())?;
        self.core.names.check_dir(&dir)
    }

    /// Syncs every file.
    ///
    /// # Errors
    /// Returns the error of the first file that fails. The others are synced nevertheless.
    pub fn sync(&self) -> Result<()> {
        self.core.vol.check_fork()?;
        let mut result = Ok(());
        for ino in self.core.names.hold_files() {
            result = result.and(self.core.syncer.sync(&ino));
            self.core.lives.close(&ino);
        }
        result
    }

    /// Whether both paths are names of one file.
    ///
    /// # Errors
    /// Fails as [`FileSystem::stat`] does.
    pub fn same_file(&self, a: &str, b: &str) -> Result<bool> {
        let (a, b) = (path::normalise(a)?, path::normalise(b)?);
        let (x, y) = (self.stat(&a)?, self.stat(&b)?);
        Ok(a == b || (x.blob_id.is_some() && x.blob_id == y.blob_id))
    }

    /// Locks a path exclusively, creating the file if necessary. The lock on the device excludes
    /// other processes.
    ///
    /// # Errors
    /// [`FsError::Locked`] at once if it is locked; otherwise as [`FileSystem::open`].
    pub fn lock(&self, path: &str) -> Result<FileLock> {
        let how = OpenOptions::CREATE.essential(true);
        let file = self.open(path, how)?;
        let id = file.blob_id();
        if !self.core.names.locked.lock().insert(id.0) {
            return Err(FsError::Locked {
                path: path.to_owned(),
            });
        }
        Ok(FileLock {
            core: Arc::clone(&self.core),
            file: Some(file),
            id,
        })
    }

    /// Whether the mount was made by the process that this one was forked from: every call answers
    /// [`FsError::Forked`] then.
    pub fn is_inherited(&self) -> bool {
        self.core().vol.check_fork().is_err()
    }

    /// The name of the device.
    #[must_use]
    pub fn device_name(&self) -> &str {
        &self.core.vol.dev.info().name
    }

    /// Bytes that were appended and are on their way to the device.
    #[must_use]
    pub fn writeback_bytes(&self) -> u64 {
        let in_flight = &self.core.space.writeback.writes.in_flight;
        in_flight.load(Ordering::Relaxed) as u64
    }

    /// Bytes that were written by the program and are not in their place on the device: those in memory, on their way, or in the
    /// journal. Linear in the number of files that are in memory. In a forked child nothing is there: 0.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        if self.is_inherited() {
            return 0;
        }
        let unsent = |ino: &Arc<Inode>| {
            let started = ino.started.load(Ordering::Relaxed);
            ino.len().saturating_sub(started)
        };
        let unsent: u64 = self.core.names.inodes().iter().map(unsent).sum();
        unsent + self.writeback_bytes() + self.core.vol.store.owed_bytes()
    }

    /// Counters of the page cache.
    pub fn cache_stats(&self) -> CacheStats {
        self.core.cache.stats()
    }

    /// Operations sent to the device since the mount.
    pub fn io_stats(&self) -> IoStats {
        self.core.vol.metered.stats()
    }

    /// A read-only view of the blobstore.
    pub fn blobstore(&self) -> StoreView<'_> {
        StoreView::new(&self.core)
    }

    /// Space and counts, in a time that does not depend on the number of files. In a forked child,
    /// which has no mount, nothing is there: all are 0.
    pub fn statfs(&self) -> StatFs {
        let core = self.core();
        if core.vol.check_fork().is_err() {
            return StatFs::default();
        }
        let store = &core.vol.store;
        let (pages, journal) = (store.md_pages(), store.journal_clusters());
        let all = store.total_clusters().saturating_sub(journal);
        StatFs {
            total: all.saturating_sub(store.reserved_clusters()) * core.vol.cluster,
            free: core.space.free_bytes(),
            used: all.saturating_sub(store.free_clusters()) * core.vol.cluster,
            unused: store.free_clusters() * core.vol.cluster,
            journal: journal * core.vol.cluster,
            host_free: core.space.host_room(),
            cluster: core.vol.cluster,
            files: core.names.map.read().files(),
            md_pages: pages.total,
            md_pages_used: pages.used,
        }
    }

    /// Bytes that can still be written; see [`StatFs::free`]. In a forked child 0.
    pub fn free_bytes(&self) -> u64 {
        match self.core().vol.check_fork() {
            Ok(()) => self.core().space.free_bytes(),
            Err(_) => 0,
        }
    }

    /// Uses the part of the device beyond the file system, and adds metadata pages for its size, or
    /// doubles them if three quarters are used. Returns the bytes gained. May be repeated, also
    /// after a power cut. Durable on return. Blocks.
    ///
    /// # Errors
    /// Returns device errors. Lack of room for more metadata pages is not an error.
    pub fn grow(&self) -> Result<u64> {
        let core = self.core();
        core.vol
            .check_writable(|| core.vol.dev.info().name.clone())?;
        let gained = core
            .vol
            .store
            .grow()
            .map_err(|e| core.vol.store_error("growing the file system", e))?;
        let pages = core.vol.store.md_pages();
        let wanted = if pages.used * 4 >= pages.total * 3 {
            pages.total * 2
        } else {
            core.vol.store.fitting_md_pages()
        };
        if wanted > pages.total {
            let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
            match core.vol.store.grow_md_pages(wanted) {
                Ok(_) => {}
                Err(error @ crate::blobstore::Error::NoMdPages { .. }) => {
                    tracing::warn!(%error, "the metadata pages could not be made more");
                }
                Err(e) => return Err(core.vol.store_error("growing the metadata pages", e)),
            }
        }
        core.vol.store.set_space_policy(super::space::POLICY);
        Ok(gained * core.vol.cluster)
    }
}
