//! The two traits that a module implements, and the description of a device.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use pumice_io::process::Birth;
use pumice_io::{Completion, IoError, IoErrorKind, Limits, Op, OpKind, OpSet, SubmitError};

use crate::error::BdevError;

/// The properties of a device. They are fixed for the life of the [`BlockDevice`].
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// Name of the device, unique in a registry.
    pub name: String,
    /// Other names by which it can be opened.
    pub aliases: Vec<String>,
    /// Description for people: "Malloc disk", "File", or the model number of an NVMe namespace.
    pub product: String,
    /// Name of the module that made it: "malloc", "file", "nvme", …
    pub module: &'static str,
    /// UUID of the device.
    pub uuid: [u8; 16],
    /// Bytes per block: a power of two, at least 512.
    pub block_size: u32,
    /// Capacity in blocks.
    pub num_blocks: u64,
    /// Whether there is a volatile write cache: a completed write is durable only after a flush, or
    /// with FUA.
    pub write_cache: bool,
    /// A power cut tears no write of one buffer that lies within an aligned group of this many
    /// blocks.
    pub atomic_unit_blocks: u32,
    /// The longest read, write or compare, and the boundary that I/O should not cross.
    pub limits: Limits,
    /// Addresses of buffers must be multiples of this. [`crate::DmaBuf`] always satisfies 512.
    pub buf_align: u32,
    /// The operations that it supports.
    pub ops: OpSet,
    /// Whether written data can be read back (false: `null`).
    pub keeps_data: bool,
    /// Whether written data is still there when the process has ended (false: `malloc`, `null`).
    pub outlives_process: bool,
    /// Whether unmapped blocks read as zeroes.
    pub unmap_zeroes: bool,
    /// The process that opened the device.
    birth: Birth,
}

impl DeviceInfo {
    /// Makes a description with the usual properties: no volatile cache, one atomic block, no
    /// limits.
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
            outlives_process: true,
            unmap_zeroes: false,
            birth: Birth::now(),
        }
    }

    /// Whether this is the process that opened the device, and not a forked child of it. The
    /// resources of the device (a ring, threads, queues, a lock on a file) are not a child's.
    #[inline]
    pub fn is_here(&self) -> bool {
        self.birth.is_here()
    }

    /// Returns an error in a forked child, see [`is_here`](Self::is_here).
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

    /// Returns the capacity in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.num_blocks.saturating_mul(u64::from(self.block_size))
    }

    /// Returns the longest read or write in blocks: at most what the device accepts, and at most
    /// `cap_bytes` or one block.
    pub fn transfer_blocks(&self, cap_bytes: u64) -> u64 {
        let cap = (cap_bytes / u64::from(self.block_size)).max(1);
        self.limits.at_most(cap)
    }

    /// Makes an error of this device.
    pub fn error(&self, op: &Op, kind: IoErrorKind, detail: impl Into<String>) -> Box<IoError> {
        IoError::new(&self.name, self.block_size, op, kind, detail)
    }

    /// Checks whether the device can do `op`: it is supported, inside the device, aligned and not
    /// too long. A module calls this first in [`IoChannel::submit`] and can rely on it afterwards.
    #[inline]
    pub fn check(&self, op: &Op) -> Result<(), Box<IoError>> {
        // The common cases come first, without a table: whole blocks inside the device.
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

/// A block device. Threads share it, and each of them does I/O through a channel of its own.
pub trait BlockDevice: Send + Sync + std::fmt::Debug {
    /// The device's properties.
    fn info(&self) -> &DeviceInfo;

    /// Opens a channel for one thread. May block (NVMe creates a queue pair).
    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError>;

    /// The device below a wrapper over the whole of one device. What a wrapper does not answer itself,
    /// by a method of its own, that device answers for it.
    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    /// The number of channels that have a queue of the hardware for themselves; further ones share
    /// one. `None` says that there is no such limit. A device on several others returns the least.
    fn own_channels(&self) -> Option<usize> {
        self.below()?.own_channels()
    }

    /// A number that identifies the device through every wrapper and clone. Users that must be a
    /// device's only one compare it. It is valid as long as the device lives.
    fn identity(&self) -> usize {
        match self.below() {
            Some(below) => below.identity(),
            None => std::ptr::from_ref(self).cast::<()>().addr(),
        }
    }

    /// A text that names the device to every process of this machine, for as long as it is there; it can be part of a file's
    /// name. `None` if the device is gone when its process ends, or has no such name.
    fn host_name(&self) -> Option<String> {
        self.below()?.host_name()
    }

    /// Properties that only the device's module knows, for `driver_specific` of `bdev_get_bdevs`.
    fn driver_specific(&self) -> serde_json::Value {
        match self.below() {
            Some(below) => below.driver_specific(),
            None => serde_json::Value::Object(serde_json::Map::new()),
        }
    }

    /// Returns the first range of blocks, at or behind `lba`, that may hold anything but zeroes.
    /// `None` says that everything from `lba` on reads as zeroes, as the device knows without
    /// reading. A range that begins at the device's end says that there is data which no block
    /// shows (the end of a file that is not whole blocks). A device that keeps no data has none,
    /// unless a device below keeps some. May block.
    ///
    /// # Errors
    /// Fails when the device cannot determine it.
    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        if let Some(below) = self.below() {
            return below.next_data(lba);
        }
        let end = self.info().num_blocks;
        Ok((lba < end && self.info().keeps_data).then_some(lba..end))
    }

    /// Sets whether a file that opening this device has created stays when the device is closed. It
    /// stays unless this is called with `false`; the last call counts. A file that existed before
    /// always stays.
    fn keep_file(&self, keep: bool) {
        if let Some(below) = self.below() {
            below.keep_file(keep);
        }
    }

    /// Returns the space that a device which allocates on writing (a sparse image) can still get
    /// from the file system below. `None` when all its blocks are allocated, or when it is not
    /// known. Asks the kernel; does not block on the device.
    fn host_space(&self) -> Option<HostSpace> {
        self.below()?.host_space()
    }
}

/// The space below a device; see [`BlockDevice::host_space`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSpace {
    /// Bytes that are free in the file system below.
    pub free_bytes: u64,
    /// Bytes of the device that are allocated there already.
    pub allocated_bytes: u64,
}

/// A channel of one thread to a device. Dropping it with operations in flight blocks until the
/// device no longer uses their buffers, or keeps the buffers alive until then.
pub trait IoChannel: Send {
    /// Submits an operation. Never blocks. `tag` comes back with the completion. Tags of operations
    /// in flight on a channel must differ.
    ///
    /// # Errors
    /// [`SubmitError::Busy`] when the queue is full, [`SubmitError::Refused`] when the operation
    /// cannot be done. Both return the operation, of which nothing will complete.
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError>;

    /// Passes submitted operations to the device (rings doorbells, enters the ring), then moves
    /// completions into `out`. Never blocks. Returns the number of completions added.
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize;

    /// Passes submitted operations to the device and waits for a completion: spins for a bounded
    /// time, then sleeps. Returns when there may be a completion, when `timeout` is over, or at
    /// once if nothing is in flight. With a time-out of 10 ms or more it may instead block until an
    /// operation has ended, as a system call that reads or writes does.
    ///
    /// # Errors
    /// Fails when sleeping itself fails. Completions can still be polled.
    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError>;

    /// Number of operations that were submitted and not handed back yet.
    fn in_flight(&self) -> usize;

    /// A descriptor that is readable when there may be a completion, for event loops and for
    /// devices that wait for several channels at once. [`IoChannel::poll`] must have passed the
    /// submitted operations to the device before.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use pumice_io::CompareAndWrite;

    use super::*;
    use crate::{DmaBuf, DmaSlice};

    /// A device of 100 blocks that does everything, at most 4 blocks at a time.
    fn info() -> DeviceInfo {
        let mut info = DeviceInfo::new("d", "test", 512, 100);
        info.ops = OpKind::ALL.into_iter().fold(OpSet::NONE, OpSet::with);
        info.limits = Limits::new(4, 0);
        info.atomic_unit_blocks = 2;
        info
    }

    fn data(len: usize) -> DmaSlice {
        DmaBuf::new(4096).expect("memory").freeze().slice(0..len)
    }

    fn write(lba: u64, len: usize, fua: bool) -> Op {
        let data = data(len);
        Op::Write { lba, data, fua }
    }

    fn write_v(lba: u64, lens: &[usize]) -> Op {
        let data = lens.iter().map(|len| data(*len)).collect();
        Op::WriteV {
            lba,
            data,
            fua: false,
        }
    }

    fn swap(compare: usize, write: usize) -> Op {
        let (compare, write) = (data(compare), data(write));
        Op::CompareAndWrite(Box::new(CompareAndWrite {
            lba: 0,
            compare,
            write,
            fua: false,
        }))
    }

    fn copy(src_lba: u64, dst_lba: u64, len_blocks: u64) -> Op {
        Op::Copy {
            src_lba,
            dst_lba,
            len_blocks,
        }
    }

    fn zeroes(lba: u64, len_blocks: u64) -> Op {
        let fua = false;
        Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        }
    }

    #[test]
    fn what_a_device_cannot_do_is_refused() {
        let info = info();
        let (odd, outside, long) = (
            Some(IoErrorKind::Misaligned),
            Some(IoErrorKind::OutOfRange),
            Some(IoErrorKind::TooLong),
        );
        for (op, want) in [
            (write(99, 512, false), None),
            (write(99, 1024, false), outside),
            (write(100, 512, false), outside),
            (write(u64::MAX, 512, false), outside),
            (write(0, 0, false), odd),
            (write(0, 513, false), odd),
            (write(0, 2048, true), None),
            (write(0, 2560, false), long),
            (write_v(0, &[1024, 1024]), None),
            (write_v(0, &[2048, 512]), long),
            (write_v(0, &[]), odd),
            (write_v(0, &[512, 0]), odd),
            (write_v(0, &[256, 256]), odd),
            (write_v(99, &[512, 512]), outside),
            (swap(1024, 1024), None),
            (swap(1024, 512), odd),
            (swap(512, 1024), odd),
            (swap(1536, 1536), long),
            (copy(0, 50, 50), None),
            (copy(50, 0, 50), None),
            (copy(0, 49, 50), outside),
            (copy(49, 0, 50), outside),
            (copy(0, 51, 50), outside),
            (copy(51, 0, 50), outside),
            (copy(0, 50, 0), odd),
            (copy(0, u64::MAX, 1), outside),
            (zeroes(0, 100), None),
            (zeroes(1, 100), outside),
            (zeroes(100, 1), outside),
            (zeroes(0, 0), odd),
        ] {
            let refused = info.check(&op).err().map(|error| error.kind);
            assert_eq!(refused, want, "{op:?}");
        }
    }

    /// A write that has to be durable is refused where it cannot be.
    #[test]
    fn what_is_not_supported_is_refused() {
        let mut info = info();
        info.ops = OpSet::NONE.with(OpKind::Write);
        let refused = |op| info.check(&op).err().map(|error| error.kind);
        assert_eq!(refused(write(0, 512, false)), None);
        let read = Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).expect("memory"),
        };
        for op in [write(0, 512, true), read, Op::Flush, zeroes(0, 1)] {
            assert_eq!(refused(op), Some(IoErrorKind::Unsupported));
        }
    }

    #[test]
    fn a_transfer_has_at_least_a_block() {
        let info = info();
        let blocks = [0, 511, 512, 1024, u64::MAX].map(|cap| info.transfer_blocks(cap));
        assert_eq!(blocks, [1, 1, 1, 2, 4]);
    }
}
