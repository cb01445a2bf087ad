//! `file`: an image file, a block device or a loop device.
//!
//! I/O uses io_uring with `O_DIRECT`. Where the kernel or the file system refuses either, the
//! module uses buffered I/O, or threads that call `pread` and `pwrite`. A
//! write with FUA is a write with `RWF_DSYNC`. A flush is `fdatasync`, which on a block device
//! sends the device its own flush command. Both hold whatever caches lie between.
//!
//! The open file that does the I/O carries an exclusive `flock` lock, which the kernel holds until
//! the last write of a killed process has ended. A block device is also opened with `O_EXCL`, so
//! that nobody can mount it meanwhile.

mod call;
mod lock;
mod make;
mod open;
mod probe;
mod ring;
mod slot;
#[cfg(test)]
mod tests;
mod threads;

use std::fs::File as StdFile;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use pumice_io::process::Birth;
use pumice_io::sys::file as sys;
use pumice_io::{IoError, IoErrorKind, Op};

use crate::DmaSlice;
use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::flush_fault::FlushFault;
use probe::Discard;

pub use lock::lock_unused;
pub(crate) use open::MODULE;
pub use open::{FileOptions, Prealloc, uuid_of};

/// A block device on a file or on a block device of the kernel.
#[derive(Debug, Clone)]
pub struct File {
    shared: Arc<SharedFile>,
}

/// State that the channels of a device share.
#[derive(Debug)]
struct SharedFile {
    info: DeviceInfo,
    file: StdFile,
    path: PathBuf,
    direct: bool,
    /// Alignment of memory that direct I/O requires; 1 when buffered.
    mem_align: usize,
    is_block_device: bool,
    discard: Discard,
    use_io_uring: bool,
    /// The way to write zeroes: a [`Zeroing`] as a number.
    zeroing: AtomicU8,
    zeroes: OnceLock<DmaSlice>,
    /// Whether a flush has failed.
    flush_fault: FlushFault,
    /// Name of the file, if this opening has created it.
    made: Option<PathBuf>,
    /// Whether a created file stays.
    keep: AtomicBool,
    /// The process that opened it.
    birth: Birth,
}

/// The ways to write zeroes: the best one, and one that always works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Zeroing {
    /// `fallocate(ZERO_RANGE)`: a file keeps its blocks, and a block device is asked to zero them.
    ZeroRange = 0,
    /// Writing zeroes. A hole would not do: zeroed blocks are written soon, and the file system
    /// must have space for them.
    Write = 1,
}

impl File {
    /// Opens `options.path`, and creates it if requested. Blocks while writes of a killed process
    /// are still in flight (at most ten seconds).
    ///
    /// # Errors
    /// [`BdevError::InUse`] with the owner's pid; [`BdevError::Unsafe`] for a mounted device or the
    /// backing file of a loop device; [`BdevError::NoSuchFile`]; or the system's error with the
    /// path.
    pub fn open(options: &FileOptions) -> Result<File, BdevError> {
        Ok(File {
            shared: Arc::new(open::open(options)?),
        })
    }

    /// Whether I/O bypasses the kernel's page cache.
    pub fn is_direct(&self) -> bool {
        self.shared.direct
    }
}

impl BlockDevice for File {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn host_name(&self) -> Option<String> {
        let meta = self.shared.file.metadata().ok()?;
        Some(if self.shared.is_block_device {
            format!("block-{:x}", meta.rdev())
        } else {
            format!("file-{:x}-{:x}", meta.dev(), meta.ino())
        })
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        let shared = &self.shared;
        if shared.is_block_device {
            return None;
        }
        let allocated_bytes = shared.file.metadata().ok()?.blocks() * 512;
        if allocated_bytes >= shared.info.len_bytes() {
            return None;
        }
        Some(crate::HostSpace {
            free_bytes: sys::free_bytes(&shared.file).ok()?,
            allocated_bytes,
        })
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        if self.shared.use_io_uring {
            match ring::RingChannel::new(Arc::clone(&self.shared)) {
                Ok(channel) => return Ok(Box::new(channel)),
                Err(error) => self.shared.log_no_ring(&error),
            }
        }
        let channel = threads::ThreadChannel::new(Arc::clone(&self.shared));
        Ok(Box::new(channel.map_err(|e| {
            BdevError::os(&self.shared.info.name, "starting an I/O thread", e)
        })?))
    }

    fn driver_specific(&self) -> serde_json::Value {
        let shared = &self.shared;
        serde_json::json!({
            "aio": {
                "filename": shared.path.display().to_string(),
                "block_size_override": false,
                "readonly": !shared.info.ops.has(crate::OpKind::Write),
                "fallocate": shared.discard == Discard::PunchHole,
                "direct": shared.direct,
                "io_uring": shared.use_io_uring,
            }
        })
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        let (shared, info) = (&self.shared, &self.shared.info);
        let failed = |e| BdevError::os(&info.name, "looking for data", e);
        let block = u64::from(info.block_size);
        let found = shared
            .next_written(lba.saturating_mul(block))
            .map_err(failed)?;
        if let Some(range) = found
            && range.start < info.len_bytes()
        {
            let end = range.end.div_ceil(block).min(info.num_blocks);
            return Ok(Some((range.start / block).max(lba)..end));
        }
        let tail = shared.has_tail().map_err(failed)?;
        Ok(tail.then_some(info.num_blocks..info.num_blocks + 1))
    }

    fn keep_file(&self, keep: bool) {
        self.shared.keep.store(keep, Ordering::Relaxed);
    }
}

impl SharedFile {
    fn new(info: DeviceInfo, found: open::Found, options: &FileOptions) -> SharedFile {
        let path = std::path::absolute(&options.path).unwrap_or_else(|_| options.path.clone());
        SharedFile {
            info,
            direct: found.direct,
            mem_align: usize::try_from(found.mem_align).unwrap_or(4096),
            is_block_device: found.backing.is_block_device,
            discard: found.backing.discard,
            use_io_uring: !options.no_io_uring,
            zeroing: AtomicU8::new(Zeroing::ZeroRange as u8),
            zeroes: OnceLock::new(),
            file: found.file,
            made: found.made.then_some(path),
            path: options.path.clone(),
            keep: AtomicBool::new(true),
            birth: Birth::now(),
            flush_fault: FlushFault::default(),
        }
    }

    /// Whether the bytes of the file behind its last whole block are not all zeroes.
    fn has_tail(&self) -> io::Result<bool> {
        let (len, end) = (self.file.metadata()?.len(), self.info.len_bytes());
        if self.is_block_device || len <= end {
            return Ok(false);
        }
        let mut tail = crate::DmaBuf::zeroed(64 << 10).map_err(io::Error::other)?;
        let n = self.file.read_at(&mut tail, end)?;
        Ok(crate::contents::first_nonzero(&tail[..n]).is_some())
    }

    /// Returns the next bytes at or behind `offset` that may be other than zeroes.
    fn next_written(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.info.len_bytes();
        if self.is_block_device {
            return Ok((offset < end).then_some(offset..end));
        }
        match sys::seek_data(&self.file, offset) {
            Ok(None) => Ok(None),
            Ok(Some(start)) => {
                let hole = sys::seek_hole(&self.file, start)?.unwrap_or(end);
                Ok(Some(start..hole.max(start + 1)))
            }
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                Ok((offset < end).then_some(offset..end))
            }
            Err(e) => Err(e),
        }
    }

    fn log_no_ring(&self, error: &io::Error) {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let device = &self.info.name;
            tracing::warn!(
                device, %error,
                "no io_uring here; I/O goes through threads with pread and pwrite"
            );
        });
    }

    /// Explains a short transfer, if the file is now shorter.
    fn shrunk(&self) -> String {
        if self.is_block_device {
            return String::new();
        }
        let expected = self.info.len_bytes();
        match self.file.metadata() {
            Ok(meta) if meta.len() < expected => format!(
                "{} is {} bytes long now, {expected} when it was opened: something truncated it",
                self.path.display(),
                meta.len()
            ),
            _ => String::new(),
        }
    }

    fn zeroing(&self) -> Zeroing {
        match self.zeroing.load(Ordering::Relaxed) {
            0 => Zeroing::ZeroRange,
            _ => Zeroing::Write,
        }
    }

    /// Changes the way to write zeroes, because the file system has refused to zero a range.
    fn zeroing_refused(&self) -> Zeroing {
        let device = &self.info.name;
        tracing::debug!(device, "no FALLOC_FL_ZERO_RANGE here; zeroes are written");
        self.zeroing.store(Zeroing::Write as u8, Ordering::Relaxed);
        Zeroing::Write
    }

    /// Checks an operation for every channel before it is accepted.
    fn check(&self, op: &Op) -> Result<(), Box<IoError>> {
        self.info.check(op)?;
        self.flush_fault.check(&self.info, op)?;
        self.check_buffers(op)
    }

    /// Checks buffers: direct I/O requires aligned memory, and a vector has at most `IOV_MAX` parts.
    fn check_buffers(&self, op: &Op) -> Result<(), Box<IoError>> {
        let mask = self.mem_align - 1;
        let parts = |n: usize| {
            if n <= 1024 {
                return Ok(());
            }
            Err(self.info.error(
                op,
                IoErrorKind::TooLong,
                format!("{n} buffers, at most 1024"),
            ))
        };
        let aligned = match op {
            Op::Read { buf, .. } => buf.as_ptr().addr() & mask == 0,
            Op::Write { data, .. } => data.as_ptr().addr() & mask == 0,
            Op::ReadV { bufs, .. } => {
                parts(bufs.len())?;
                bufs.iter().all(|b| b.as_ptr().addr() & mask == 0)
            }
            Op::WriteV { data, .. } => {
                parts(data.len())?;
                data.iter().all(|d| d.as_ptr().addr() & mask == 0)
            }
            _ => true,
        };
        if aligned {
            return Ok(());
        }
        let detail = format!(
            "direct I/O needs buffers aligned to {} bytes",
            self.mem_align
        );
        Err(self.info.error(op, IoErrorKind::Misaligned, detail))
    }

    /// Returns a buffer of zeroes to write from.
    fn zeroes(&self) -> Result<&DmaSlice, crate::DmaError> {
        const LEN: usize = 256 << 10;
        if self.zeroes.get().is_none() {
            let zeroes = crate::DmaBuf::zeroed(LEN)?.freeze();
            let _ = self.zeroes.set(zeroes);
        }
        Ok(self.zeroes.get().expect("was just set"))
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // A forked child shares the open file: unlocking it would release the parent's lock.
        if !self.birth.is_here() {
            return;
        }
        if let Some(path) = &self.made
            && !*self.keep.get_mut()
        {
            make::remove(&self.file, path);
        }
        // No channel is left. A ring releases the open file some time after it is closed, and the
        // lock must not wait for that.
        sys::unlock(&self.file);
    }
}
