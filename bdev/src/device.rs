//! The two traits that a module implements, and what a device says of itself.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use pumice_io::process::Birth;
use pumice_io::{Completion, IoError, IoErrorKind, Limits, Op, OpKind, OpSet, SubmitError};

use crate::error::BdevError;

/// What a device is. Fixed for the life of the [`BlockDevice`].
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// Its name, unique in a registry.
    pub name: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
    /// What it is, for people: "Malloc disk", "File", the model number of an NVMe namespace.
    pub product: String,
    /// The module that made it: "malloc", "file", "nvme", …
    pub module: &'static str,
    /// Its identity.
    pub uuid: [u8; 16],
    /// Bytes per block: a power of two, at least 512.
    pub block_size: u32,
    /// Capacity in blocks.
    pub num_blocks: u64,
    /// Volatile write cache: a completed write is durable only after a flush, or with FUA.
    pub write_cache: bool,
    /// A write of at most so many blocks is never torn by a power cut.
    pub atomic_unit_blocks: u32,
    /// How long a read, write or compare may be, and what I/O had better not cross.
    pub limits: Limits,
    /// Addresses of buffers must be multiples of this. [`crate::DmaBuf`] always satisfies 512.
    pub buf_align: u32,
    /// Operations it supports.
    pub ops: OpSet,
    /// Whether what is written can be read back (false: `null`).
    pub keeps_data: bool,
    /// Whether unmapped blocks read as zeroes.
    pub unmap_zeroes: bool,
    /// The process that opened it.
    birth: Birth,
}

impl DeviceInfo {
    /// A device with the usual properties: no volatile cache, one block atomic, no limits.
    pub fn new(name: &str, module: &'static str, block_size: u32, num_blocks: u64) -> DeviceInfo {
        DeviceInfo {
            name: name.to_owned(),
            aliases: Vec::new(),
            product: String::new(),
            module,
            uuid: [0; 16],
            block_size,
            num_blocks,
            write_cache: false,
            atomic_unit_blocks: 1,
            limits: Limits::default(),
            buf_align: 1,
            ops: OpSet::BASIC,
            keeps_data: true,
            unmap_zeroes: false,
            birth: Birth::now(),
        }
    }

    /// Whether this is still the process that opened the device, and not a forked child of it. What
    /// the device is made of (a ring, threads, queues, a lock on a file) is not a child's.
    #[inline]
    pub fn is_here(&self) -> bool {
        self.birth.is_here()
    }

    /// An error in a forked child, see [`is_here`](Self::is_here).
    pub(crate) fn still_here(&self) -> Result<(), BdevError> {
        if self.is_here() {
            return Ok(());
        }
        Err(BdevError::Unsupported {
            device: self.name.clone(),
            reason: "it was opened before the fork that made this process, so it is the parent's; \
                     open it in the child"
                .to_owned(),
        })
    }

    /// Capacity in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.num_blocks.saturating_mul(u64::from(self.block_size))
    }

    /// The longest read or write in blocks: what the device takes at once, and not more than `cap_bytes` or
    /// one block.
    pub fn transfer_blocks(&self, cap_bytes: u64) -> u64 {
        let cap = (cap_bytes / u64::from(self.block_size)).max(1);
        self.limits.at_most(cap)
    }

    /// An error of this device.
    pub fn error(&self, op: &Op, kind: IoErrorKind, detail: impl Into<String>) -> Box<IoError> {
        IoError::new(&self.name, self.block_size, op, kind, detail)
    }

    /// Whether the device can do `op`: supported, inside the device, aligned, not too long. A
    /// module calls this first in [`IoChannel::submit`]; what passes, it can rely on.
    #[inline]
    pub fn check(&self, op: &Op) -> Result<(), Box<IoError>> {
        // The common cases first, without a table: whole blocks inside the device.
        let mask = u64::from(self.block_size) - 1;
        let (lba, len) = match op {
            Op::Read { lba, buf } => (*lba, buf.len() as u64),
            Op::Write { lba, data, .. } => (*lba, data.len() as u64),
            _ => return self.check_slow(op),
        };
        let blocks = len >> self.block_size.trailing_zeros();
        let fits = lba < self.num_blocks && blocks <= self.num_blocks - lba;
        let short = blocks == self.limits.at_most(blocks);
        let plain = self.ops.has(op.kind()) && !op.fua() && self.is_here();
        if len & mask == 0 && len != 0 && fits && short && plain {
            return Ok(());
        }
        self.check_slow(op)
    }

    #[cold]
    fn check_slow(&self, op: &Op) -> Result<(), Box<IoError>> {
        if !self.is_here() {
            let detail = "the device was opened before the fork that made this process, so it is \
                          the parent's; open it in the child";
            return Err(self.error(op, IoErrorKind::Removed, detail));
        }
        let kind = op.kind();
        if !self.ops.has(kind) || (op.fua() && !self.ops.has(OpKind::Fua)) {
            let what = if self.ops.has(kind) {
                "force unit access"
            } else {
                kind.name()
            };
            let detail = format!("{what}; it supports {:?}", self.ops);
            return Err(self.error(op, IoErrorKind::Unsupported, detail));
        }
        if matches!(kind, OpKind::Flush | OpKind::Reset | OpKind::Abort) {
            return Ok(());
        }
        let bs = u64::from(self.block_size);
        let len = op.len_bytes(self.block_size);
        let aligned = |n: usize| n != 0 && (n as u64).is_multiple_of(bs);
        let whole = match op {
            Op::ReadV { bufs, .. } => !bufs.is_empty() && bufs.iter().all(|b| aligned(b.len())),
            Op::WriteV { data, .. } => !data.is_empty() && data.iter().all(|d| aligned(d.len())),
            Op::CompareAndWrite(c) => aligned(c.write.len()) && c.compare.len() == c.write.len(),
            Op::WriteZeroes { len_blocks, .. }
            | Op::Unmap { len_blocks, .. }
            | Op::Verify { len_blocks, .. }
            | Op::Copy { len_blocks, .. } => *len_blocks != 0,
            Op::Zone { .. } => true,
            _ => len != 0 && len.is_multiple_of(bs),
        };
        if !whole {
            let detail = format!("lengths must be non-zero multiples of {bs} bytes");
            return Err(self.error(op, IoErrorKind::Misaligned, detail));
        }
        let blocks = match op {
            Op::WriteZeroes { len_blocks, .. }
            | Op::Unmap { len_blocks, .. }
            | Op::Verify { len_blocks, .. }
            | Op::Copy { len_blocks, .. } => *len_blocks,
            _ => len / bs,
        };
        let inside = |lba: u64| lba < self.num_blocks && blocks <= self.num_blocks - lba;
        let src_inside = match op {
            Op::Copy { src_lba, .. } => inside(*src_lba),
            _ => true,
        };
        if !inside(op.lba()) || !src_inside {
            let detail = format!("the device has {} blocks of {bs} bytes", self.num_blocks);
            return Err(self.error(op, IoErrorKind::OutOfRange, detail));
        }
        if let Op::Copy {
            src_lba,
            dst_lba,
            len_blocks,
        } = op
            && src_lba.abs_diff(*dst_lba) < *len_blocks
        {
            return Err(self.error(op, IoErrorKind::OutOfRange, "the ranges of a copy overlap"));
        }
        let max = if kind == OpKind::CompareAndWrite {
            blocks.min(self.atomic_unit_blocks.into())
        } else {
            self.limits.at_most(blocks)
        };
        let transfers = !matches!(
            kind,
            OpKind::WriteZeroes | OpKind::Unmap | OpKind::Verify | OpKind::Copy
        );
        if transfers && blocks > max {
            let detail = format!("at most {max} blocks of {bs} bytes in one {kind}");
            return Err(self.error(op, IoErrorKind::TooLong, detail));
        }
        Ok(())
    }
}

/// A block device: shared by threads, each of which does I/O through a channel of its own.
pub trait BlockDevice: Send + Sync + std::fmt::Debug {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// A channel for one thread. May block (NVMe: creates a queue pair).
    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError>;

    /// A number by which the same device is known through every wrapper and clone: users of a device that must
    /// be its only one compare it. Wrappers over the whole of one device give that device's. Valid as long as
    /// the device lives.
    fn identity(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>().addr()
    }

    /// Facts about the device that only its module knows, for `bdev_get_bdevs`'
    /// `driver_specific`.
    fn driver_specific(&self) -> serde_json::Value {
        serde_json::Value::Object(serde_json::Map::new())
    }

    /// The first range of blocks, at or behind `lba`, that may hold anything but zeroes; `None`:
    /// everything from `lba` on reads as zeroes, and the device knows that without reading. A range
    /// that begins at the device's end says that there is data which no block shows (the end of a
    /// file that is not whole blocks). May block.
    ///
    /// # Errors
    /// When the device cannot say.
    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        let end = self.info().num_blocks;
        Ok((lba < end).then_some(lba..end))
    }

    /// Whether the file that opening this device has made, if it has, stays when the device is
    /// closed. It does unless this is called with `false`; the last call counts. A file that was
    /// there before always stays.
    fn keep_file(&self, keep: bool) {
        let _ = keep;
    }

    /// What a device that takes its space only when it is written (a sparse image) can still get from
    /// the file system below. `None` for one whose blocks are all there, or where that is not known.
    /// Asks the kernel, does not block on the device.
    fn host_space(&self) -> Option<HostSpace> {
        None
    }
}

/// Space below a device; see [`BlockDevice::host_space`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSpace {
    /// Bytes that the file system below has left.
    pub free_bytes: u64,
    /// Bytes of the device that have blocks there already.
    pub allocated_bytes: u64,
}

/// The way of one thread to a device. Dropping it with operations in flight blocks until the
/// device is done with their buffers, or keeps these alive until it is.
pub trait IoChannel: Send {
    /// Takes an operation. Never blocks. `tag` comes back with the completion; tags of operations
    /// in flight on a channel must differ.
    ///
    /// # Errors
    /// [`SubmitError::Busy`] when the queue is full, [`SubmitError::Refused`] when the operation
    /// cannot be done; both give the operation back, and nothing of it will complete.
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError>;

    /// Hands what was submitted to the device (rings doorbells, enters the ring), then moves what
    /// has completed into `out`. Never blocks. Returns how many were added.
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize;

    /// Hands what was submitted to the device, then returns when a completion may be there, after
    /// a bounded spin and then asleep, or when `timeout` is over, or at once if nothing is in
    /// flight.
    ///
    /// # Errors
    /// When sleeping itself fails; completions may still be polled for.
    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError>;

    /// Operations submitted and not yet handed back.
    fn in_flight(&self) -> usize;

    /// A descriptor that polls readable when a completion may be there, for event loops and for
    /// devices that wait for several channels at once. What was submitted must have been handed to
    /// the device by [`IoChannel::poll`] before.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
