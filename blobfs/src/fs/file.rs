//! Handles of open files.

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::ahead::{Pattern, ReadHandle};
use super::attributes::Attributes;
use super::core::Core;
use super::error::{FsError, Result};
use super::frame::Frame;
use super::inode::{Inode, ns};
use super::options::Access;
use super::read::ReadRequest;
use super::stat::Stat;

/// State that the clones of a handle share.
pub(crate) struct Open {
    pub core: Arc<Core>,
    pub ino: Arc<Inode>,
    pattern: Pattern,
    direct: AtomicBool,
    access: AtomicU8,
}

impl Open {
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.core.lives.close(&self.ino);
    }
}

const NORMAL: u8 = 0;
const RANDOM: u8 = 1;
const SEQUENTIAL: u8 = 2;

/// An open file. Clones share one handle. It can be used after the file has lost its name, until
/// the last handle is dropped. Many threads may use it at once: a lock of the file orders appends,
/// and reads take no lock.
#[derive(Clone)]
pub struct File {
    open: Arc<Open>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "File({:?})", self.open.ino)
    }
}

/// Bytes of a file in memory, which stay there as long as this lives.
pub struct Pinned {
    frame: Arc<Frame>,
    range: Range<usize>,
}

impl Deref for Pinned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.frame.bytes.get(self.range.clone()).unwrap_or_default()
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pinned({} bytes)", self.range.len())
    }
}

impl File {
    pub(crate) fn new(core: Arc<Core>, ino: Arc<Inode>) -> File {
        File {
            open: Arc::new(Open {
                core,
                ino,
                pattern: Pattern::new(),
                direct: AtomicBool::new(false),
                access: AtomicU8::new(NORMAL),
            }),
        }
    }

    pub(super) fn ino(&self) -> &Arc<Inode> {
        &self.open.ino
    }

    pub(super) fn core(&self) -> &Core {
        &self.open.core
    }

    /// Length in bytes. Costs one atomic load.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a file is not a container")]
    pub fn len(&self) -> u64 {
        self.open.ino.len()
    }

    /// Returns a path of the file, or a text in its place when it has none, and in a forked child.
    pub fn path(&self) -> String {
        match self.core().vol.check_fork() {
            Ok(()) => self.ino().path(),
            Err(_) => format!("file of the parent (blob {})", self.ino().id),
        }
    }

    /// Returns the blob that stores the file.
    pub fn blob_id(&self) -> crate::blobstore::BlobId {
        self.ino().id
    }

    /// Whether both handles belong to the same file.
    pub fn same_file(&self, other: &File) -> bool {
        Arc::ptr_eq(self.ino(), other.ino())
    }

    /// Appends bytes, usually by a copy into the tail buffer. Blocks when a buffer is full and more
    /// than the writeback limit is in flight, and when clusters are allocated.
    ///
    /// # Errors
    /// Fails when there is no space (the file is then unchanged), and with a device error during
    /// the allocation.
    #[inline]
    pub fn append(&self, data: &[u8]) -> Result<()> {
        self.open.core.appender.append(&self.open.ino, data)
    }

    /// Writes at `off`. A gap past the end becomes zeroes. Bytes inside the file are written to the
    /// device before this returns (not durably), unless they are in the tail buffer.
    ///
    /// # Errors
    /// Fails as [`File::append`] does, and with the device's error.
    pub fn write_at(&self, off: u64, data: &[u8]) -> Result<()> {
        self.core().vol.check_fork()?;
        self.core().overwriter.write_at(self.ino(), off, data)
    }

    /// Reads at `off` into `buf`. Returns the number of bytes, which is less than the length of
    /// `buf` only at the end of the file.
    ///
    /// # Errors
    /// Returns the device's error.
    #[inline]
    pub fn read_at(&self, off: u64, buf: &mut [u8]) -> Result<usize> {
        let open = &*self.open;
        open.core.vol.check_fork()?;
        let len = open.ino.len();
        if off >= len {
            return Ok(0);
        }
        let n = usize::try_from(len - off).map_or(buf.len(), |rest| rest.min(buf.len()));
        let end = off + n as u64;
        if open.ino.frames.copy(off, &mut buf[..n]) == n {
            open.core.cache.count_hit();
            if open.pattern.passed(end) {
                open.pattern.hit(&open.core.reader, &open.ino, end);
            }
            return Ok(n);
        }
        self.read_missed(off, buf, n)
    }

    #[cold]
    fn read_missed(&self, off: u64, buf: &mut [u8], n: usize) -> Result<usize> {
        let open = &*self.open;
        let direct = open.is_direct();
        let access = open.access.load(Ordering::Relaxed);
        if !direct && access != RANDOM {
            open.pattern
                .missed(&open.core.reader, &open.ino, off, n, access == SEQUENTIAL);
        }
        open.core.reader.read_at(&open.ino, off, buf, !direct)
    }

    /// Returns the bytes without a copy, if all of them are in one buffer in memory.
    #[inline]
    pub fn read_pinned(&self, off: u64, len: usize) -> Option<Pinned> {
        let end = off.checked_add(len as u64)?;
        if end > self.len() || self.core().vol.check_fork().is_err() {
            return None;
        }
        let frame = self.ino().frames.find(off)?;
        let from = super::frame::split(off).1 - frame.start;
        let range = from..from + len;
        frame.bytes.get(range.clone())?;
        self.core().cache.count_hit();
        if self.open.pattern.passed(end) {
            self.open.pattern.hit(&self.core().reader, self.ino(), end);
        }
        Some(Pinned { frame, range })
    }

    /// Carries out several reads. Those that are not in memory are in flight together.
    pub fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        if let Err(error) = self.core().vol.check_fork() {
            for request in requests {
                request.result = Err(error.clone());
            }
            return;
        }
        self.core()
            .reader
            .read_many(self.ino(), requests, !self.open.is_direct());
    }

    /// Starts a read and returns without waiting for it.
    ///
    /// # Errors
    /// Fails when there is no memory for it, or the file system was unmounted.
    pub fn read_async(&self, off: u64, len: usize) -> Result<ReadHandle> {
        ReadHandle::start(&self.open, off, len)
    }

    /// Sets the length. New bytes are zeroes. A shorter length is durable on return.
    ///
    /// # Errors
    /// Fails when there is no space for a longer file, and with device errors. The file is then
    /// unchanged.
    pub fn truncate(&self, len: u64) -> Result<()> {
        self.core().vol.check_fork()?;
        self.core().truncater.truncate(self.ino(), len)
    }

    /// Allocates space up to `off + len`, so that writes there cannot fail for lack of it. The
    /// length stays.
    ///
    /// # Errors
    /// Fails when there is no space.
    pub fn allocate(&self, off: u64, len: u64) -> Result<()> {
        self.core().vol.check_fork()?;
        self.core().truncater.allocate(self.ino(), off, len)
    }

    /// Starts writing appended bytes, if there are at least 256 KiB. Only [`File::sync`] makes them
    /// durable. With less, it costs two loads, so it may be called after each record.
    ///
    /// # Errors
    /// Fails as [`File::append`] does.
    #[inline]
    pub fn flush(&self) -> Result<()> {
        const WORTH: u64 = 256 << 10;
        self.core().vol.check_fork()?;
        let started = self.open.ino.started.load(Ordering::Relaxed);
        if self.len() < started + WORTH {
            return Ok(());
        }
        self.core()
            .buffers
            .start_write_behind(self.ino(), WORTH, u64::MAX)
    }

    /// Makes data and length durable. Costs nothing if nothing has changed.
    ///
    /// # Errors
    /// Returns the device's error. The data stays in memory, and the next sync writes it again.
    pub fn sync(&self) -> Result<()> {
        self.core().syncer.sync(self.ino())
    }

    /// Makes the data durable, and the length if it has changed. Attributes that were set are only written with a length.
    ///
    /// # Errors
    /// Fails as [`File::sync`] does.
    pub fn sync_data(&self) -> Result<()> {
        self.core().syncer.sync_data(self.ino())
    }

    /// Returns the properties of the file, which may have lost its name. In a forked child, which has
    /// no mount, it leaves out those that a lock protects: the names and the mode.
    #[must_use]
    pub fn stat(&self) -> Stat {
        match self.core().vol.check_fork() {
            Ok(()) => Stat::of_file(self.ino()),
            Err(_) => Stat::of_inherited_file(self.ino()),
        }
    }

    /// Sets the mode or the time of the last change. They are durable after [`File::sync`]. The time stays until the file
    /// is changed.
    ///
    /// # Errors
    /// The file system is mounted read-only or was unmounted, or the file is a read-only blob.
    pub fn set_attributes(&self, attributes: &Attributes) -> Result<()> {
        let ino = self.ino();
        self.core().vol.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let mut own = ino.own.lock();
        if let Some(modified) = attributes.modified {
            ino.mtime_ns.store(ns(modified), Ordering::Relaxed);
        }
        own.change(attributes.mode, attributes.modified.map(|_| ino.len()));
        Ok(())
    }

    /// Starts writing the whole blocks of `[off, off + len)` and everything before them, without
    /// waiting.
    ///
    /// # Errors
    /// Fails as [`File::append`] does.
    pub fn range_sync(&self, off: u64, len: u64) -> Result<()> {
        self.core().vol.check_fork()?;
        self.core()
            .buffers
            .start_write_behind(self.ino(), 1, off.saturating_add(len))
    }

    /// Starts to read a range into the page cache, and returns without waiting for it. Of a file, no more is in flight than half
    /// of what the cache may hold: what is beyond is left out.
    ///
    /// # Errors
    /// Fails when there is no memory for it.
    pub fn prefetch(&self, off: u64, len: u64) -> Result<()> {
        if self.open.is_direct() {
            Ok(())
        } else {
            self.core().reader.prefetch(self.ino(), off, len)
        }
    }

    /// Drops cached bytes of a range that need not stay in memory.
    pub fn invalidate(&self, off: u64, len: u64) {
        if self.core().vol.check_fork().is_err() {
            return;
        }
        let end = off.saturating_add(len).min(self.len());
        self.ino().frames.drop_clean(off, end);
    }

    /// Sets the expected access pattern of the handle.
    pub fn advise(&self, access: Access) {
        let value = match access {
            Access::Normal | Access::WillNeed => NORMAL,
            Access::Random => RANDOM,
            Access::Sequential => SEQUENTIAL,
            Access::DontNeed => {
                self.invalidate(0, u64::MAX);
                return;
            }
            Access::NoReuse => {
                self.ino().frames.set_transient(true);
                return;
            }
        };
        self.open.access.store(value, Ordering::Relaxed);
    }

    /// Sets direct I/O for this handle: data that it reads and writes does not stay in memory. Data
    /// in memory is still used, so direct and buffered handles agree.
    pub fn set_direct(&self, on: bool) {
        self.open.direct.store(on, Ordering::Relaxed);
        self.ino().frames.set_transient(on);
    }

    /// Returns the space that the file uses, in bytes.
    pub fn allocated(&self) -> u64 {
        self.ino().allocated.load(Ordering::Acquire)
    }

    /// Declares that nobody will append to the file: what was allocated past its end, ahead or by
    /// [`File::allocate`], is freed at once. Appending stays possible. Blocks while the new size is
    /// made durable.
    pub fn finish_writing(&self) {
        if self.core().vol.check_fork().is_ok() {
            self.core().space.finish_writing(self.ino());
        }
    }
}
