//! `file`: an image file, a block device or a loop device.
//!
//! I/O goes through io_uring with `O_DIRECT`; where the kernel or the file system refuses either,
//! the module falls back (to buffered I/O, to threads that call `pread` and `pwrite`) and logs the
//! reason. A write with FUA is a write with `RWF_DSYNC`; a flush is `fdatasync`, which on a block
//! device sends the device its own flush command. Both are true whatever caches lie between.
//!
//! The open file that does the I/O carries an exclusive `flock` lock, which the kernel holds until
//! the last write of a killed process has landed. A block device is opened with `O_EXCL` besides,
//! so that nobody can mount it meanwhile.

mod open;
mod probe;
mod ring;
mod slot;
mod sys;
mod threads;

use std::fs::File as StdFile;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU8;

use crate::DmaSlice;
use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use probe::Discard;

pub(crate) use open::open_uri;
pub use open::{FileOptions, Prealloc};

/// A block device on a file or on a block device of the kernel.
#[derive(Debug, Clone)]
pub struct File {
    shared: Arc<Shared>,
}

/// What the channels of a device share.
#[derive(Debug)]
struct Shared {
    info: DeviceInfo,
    file: StdFile,
    path: PathBuf,
    direct: bool,
    /// Alignment that direct I/O needs of memory; 1 when buffered.
    mem_align: usize,
    is_block_device: bool,
    discard: Discard,
    use_io_uring: bool,
    /// How zeroes are written: a [`Zeroing`] as a number; it only ever goes up.
    zeroing: AtomicU8,
    zeroes: OnceLock<DmaSlice>,
}

/// Ways to write zeroes, from the best to the one that always works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
enum Zeroing {
    /// `fallocate(ZERO_RANGE)`: the file keeps its blocks, a block device is told to.
    ZeroRange = 0,
    /// `fallocate(PUNCH_HOLE)`: the blocks go.
    PunchHole = 1,
    /// Writing zeroes.
    Write = 2,
}

impl File {
    /// Opens `options.path`, creating it if asked. Blocks while a process that was killed still
    /// has writes on their way (at most ten seconds).
    ///
    /// # Errors
    /// [`BdevError::InUse`] with the owner's pid; [`BdevError::Unsafe`] for what is mounted or has
    /// a loop device on it; [`BdevError::NoSuchFile`]; what the system says, with the path.
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
}

impl Shared {
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

    /// What follows a short transfer: a file that is shorter now says so.
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
        match self.zeroing.load(std::sync::atomic::Ordering::Relaxed) {
            0 => Zeroing::ZeroRange,
            1 => Zeroing::PunchHole,
            _ => Zeroing::Write,
        }
    }

    /// After `method` was refused: the next one.
    fn zeroing_refused(&self, method: Zeroing) -> Zeroing {
        let next = if method == Zeroing::ZeroRange {
            Zeroing::PunchHole
        } else {
            Zeroing::Write
        };
        let device = &self.info.name;
        tracing::debug!(device, ?method, ?next, "zeroing refused by the file system");
        self.zeroing
            .fetch_max(next as u8, std::sync::atomic::Ordering::Relaxed);
        next
    }

    /// Zeroes to write from.
    fn zeroes(&self) -> Result<&DmaSlice, crate::DmaError> {
        const LEN: usize = 256 << 10;
        if self.zeroes.get().is_none() {
            let zeroes = crate::DmaBuf::zeroed(LEN)?.freeze();
            let _ = self.zeroes.set(zeroes);
        }
        Ok(self.zeroes.get().expect("was just set"))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // No channel is left. A ring lets go of the open file a little after it is closed: the
        // lock must not wait for that.
        sys::unlock(&self.file);
    }
}
