//! Operations, and sets of them that a device supports.

use std::fmt;

use crate::dma::{DmaBuf, DmaSlice};

/// An I/O operation. Buffers move into it and come back with its [`Completion`](crate::Completion).
///
/// Data is as long as its buffers, in multiples of the block size. Addresses (`lba`) and
/// `len_blocks` count the device's blocks.
#[derive(Debug)]
pub enum Op {
    /// Fills `buf` from the device.
    Read {
        /// First block.
        lba: u64,
        /// The buffer to fill.
        buf: DmaBuf,
    },
    /// Fills several buffers from consecutive blocks. Each is a multiple of the block size.
    ReadV {
        /// First block.
        lba: u64,
        /// The buffers to fill, in order.
        bufs: Vec<DmaBuf>,
    },
    /// Writes `data`.
    Write {
        /// First block.
        lba: u64,
        /// The data to write.
        data: DmaSlice,
        /// Force unit access: the data is durable when the operation completes, whatever the device
        /// caches.
        fua: bool,
    },
    /// Writes several slices to consecutive blocks. Each is a multiple of the block size.
    WriteV {
        /// First block.
        lba: u64,
        /// The data to write, in order.
        data: Vec<DmaSlice>,
        /// Force unit access.
        fua: bool,
    },
    /// Makes every write durable that completed before this was submitted.
    Flush,
    /// Makes the blocks read as zeroes.
    WriteZeroes {
        /// First block.
        lba: u64,
        /// Number of blocks.
        len_blocks: u64,
        /// Force unit access.
        fua: bool,
    },
    /// Discards the blocks' contents. What they read as afterwards depends on the device.
    Unmap {
        /// First block.
        lba: u64,
        /// Number of blocks.
        len_blocks: u64,
    },
    /// Lets the device read and check the blocks without transferring them.
    Verify {
        /// First block.
        lba: u64,
        /// Number of blocks.
        len_blocks: u64,
    },
    /// Compares the blocks with `data`. A difference is [`crate::IoErrorKind::Miscompare`].
    Compare {
        /// First block.
        lba: u64,
        /// The expected content.
        data: DmaSlice,
    },
    /// Compares, and writes if equal, as one atomic step (at most the atomic unit).
    CompareAndWrite(Box<CompareAndWrite>),
    /// Copies blocks inside the device. The ranges must not overlap.
    Copy {
        /// First block to read.
        src_lba: u64,
        /// First block to write.
        dst_lba: u64,
        /// Number of blocks.
        len_blocks: u64,
    },
    /// Resets the device: everything in flight on this channel ends, with success or
    /// [`crate::IoErrorKind::Aborted`], before the reset completes.
    Reset,
    /// Asks the device to end the operation that was submitted on this channel with `tag`. The
    /// operation still completes once. Success of the abort says only that the device was asked.
    Abort {
        /// Tag of the operation.
        tag: u64,
    },
    /// A command of zoned devices. These commands are declared so that their numbers are reserved.
    /// Every module refuses them as unsupported.
    Zone {
        /// First block of the zone.
        lba: u64,
        /// The command.
        action: ZoneAction,
    },
}

/// Operands of [`Op::CompareAndWrite`].
#[derive(Debug)]
pub struct CompareAndWrite {
    /// First block.
    pub lba: u64,
    /// The expected content.
    pub compare: DmaSlice,
    /// The data to write if the content is as expected, of the same length.
    pub write: DmaSlice,
    /// Force unit access for the write.
    pub fua: bool,
}

/// Zone commands (NVM Express Zoned Namespace Command Set 1.1, sections 3.4.1 and 3.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZoneAction {
    /// Closes the zone.
    Close,
    /// Finishes the zone.
    Finish,
    /// Opens the zone.
    Open,
    /// Resets the zone's write pointer.
    Reset,
    /// Takes the zone offline.
    Offline,
    /// Reports zones.
    Report,
}

/// The kind of an [`Op`], without its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum OpKind {
    /// [`Op::Read`] and [`Op::ReadV`].
    Read,
    /// [`Op::Write`] and [`Op::WriteV`].
    Write,
    /// [`Op::Flush`].
    Flush,
    /// [`Op::WriteZeroes`].
    WriteZeroes,
    /// [`Op::Unmap`].
    Unmap,
    /// [`Op::Compare`].
    Compare,
    /// [`Op::CompareAndWrite`].
    CompareAndWrite,
    /// [`Op::Copy`].
    Copy,
    /// [`Op::Reset`].
    Reset,
    /// [`Op::Abort`].
    Abort,
    /// [`Op::Zone`].
    Zone,
    /// Force unit access, which is not an operation of its own: writes have it as `fua`.
    Fua,
    /// [`Op::Verify`].
    Verify,
}

impl OpKind {
    /// All kinds, in order of their numbers.
    pub const ALL: [OpKind; 13] = [
        OpKind::Read,
        OpKind::Write,
        OpKind::Flush,
        OpKind::WriteZeroes,
        OpKind::Unmap,
        OpKind::Compare,
        OpKind::CompareAndWrite,
        OpKind::Copy,
        OpKind::Reset,
        OpKind::Abort,
        OpKind::Zone,
        OpKind::Fua,
        OpKind::Verify,
    ];

    /// The name of the kind in logs, statistics and the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            OpKind::Read => "read",
            OpKind::Write => "write",
            OpKind::Flush => "flush",
            OpKind::WriteZeroes => "write_zeroes",
            OpKind::Unmap => "unmap",
            OpKind::Compare => "compare",
            OpKind::CompareAndWrite => "compare_and_write",
            OpKind::Copy => "copy",
            OpKind::Reset => "reset",
            OpKind::Abort => "abort",
            OpKind::Zone => "zone",
            OpKind::Fua => "fua",
            OpKind::Verify => "verify",
        }
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of [`OpKind`]s.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct OpSet(u16);

impl OpSet {
    /// The empty set.
    pub const NONE: OpSet = OpSet(0);
    /// The operations that every writable device has: read, write, FUA, flush, write zeroes, reset.
    pub const BASIC: OpSet = OpSet::NONE
        .with(OpKind::Read)
        .with(OpKind::Write)
        .with(OpKind::Flush)
        .with(OpKind::WriteZeroes)
        .with(OpKind::Fua)
        .with(OpKind::Reset);

    /// Returns this set with `kind`.
    pub const fn with(self, kind: OpKind) -> OpSet {
        OpSet(self.0 | 1 << kind as u16)
    }

    /// Returns this set without `kind`.
    pub const fn without(self, kind: OpKind) -> OpSet {
        OpSet(self.0 & !(1 << kind as u16))
    }

    /// Returns the kinds that are in both sets.
    pub const fn intersection(self, other: OpSet) -> OpSet {
        OpSet(self.0 & other.0)
    }

    /// Whether `kind` is in the set.
    pub const fn has(self, kind: OpKind) -> bool {
        self.0 & 1 << kind as u16 != 0
    }

    /// Returns the kinds in the set, in order.
    pub fn iter(self) -> impl Iterator<Item = OpKind> {
        OpKind::ALL.into_iter().filter(move |k| self.has(*k))
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Op {
    /// Returns the kind of the operation.
    pub const fn kind(&self) -> OpKind {
        match self {
            Op::Read { .. } | Op::ReadV { .. } => OpKind::Read,
            Op::Write { .. } | Op::WriteV { .. } => OpKind::Write,
            Op::Flush => OpKind::Flush,
            Op::WriteZeroes { .. } => OpKind::WriteZeroes,
            Op::Unmap { .. } => OpKind::Unmap,
            Op::Verify { .. } => OpKind::Verify,
            Op::Compare { .. } => OpKind::Compare,
            Op::CompareAndWrite(_) => OpKind::CompareAndWrite,
            Op::Copy { .. } => OpKind::Copy,
            Op::Reset => OpKind::Reset,
            Op::Abort { .. } => OpKind::Abort,
            Op::Zone { .. } => OpKind::Zone,
        }
    }

    /// Returns the first block of the operation (for a copy: the first block written); 0 if it has
    /// none.
    pub fn lba(&self) -> u64 {
        match self {
            Op::Read { lba, .. }
            | Op::ReadV { lba, .. }
            | Op::Write { lba, .. }
            | Op::WriteV { lba, .. }
            | Op::WriteZeroes { lba, .. }
            | Op::Unmap { lba, .. }
            | Op::Verify { lba, .. }
            | Op::Compare { lba, .. }
            | Op::Zone { lba, .. } => *lba,
            Op::CompareAndWrite(c) => c.lba,
            Op::Copy { dst_lba, .. } => *dst_lba,
            Op::Flush | Op::Reset | Op::Abort { .. } => 0,
        }
    }

    /// Returns the number of the device's bytes that the operation covers, saturating.
    pub fn len_bytes(&self, block_size: u32) -> u64 {
        match self {
            Op::Read { buf, .. } => buf.len() as u64,
            Op::ReadV { bufs, .. } => bufs.iter().map(|b| b.len() as u64).sum(),
            Op::Write { data, .. } | Op::Compare { data, .. } => data.len() as u64,
            Op::WriteV { data, .. } => data.iter().map(|d| d.len() as u64).sum(),
            Op::WriteZeroes { len_blocks, .. }
            | Op::Unmap { len_blocks, .. }
            | Op::Verify { len_blocks, .. }
            | Op::Copy { len_blocks, .. } => len_blocks.saturating_mul(u64::from(block_size)),
            Op::CompareAndWrite(c) => c.write.len() as u64,
            Op::Flush | Op::Reset | Op::Abort { .. } | Op::Zone { .. } => 0,
        }
    }

    /// Whether the operation asks for force unit access.
    pub fn fua(&self) -> bool {
        match self {
            Op::Write { fua, .. } | Op::WriteV { fua, .. } | Op::WriteZeroes { fua, .. } => *fua,
            Op::CompareAndWrite(c) => c.fua,
            _ => false,
        }
    }

    /// Returns the tag of the operation to abort.
    pub fn abort_target(&self) -> Option<u64> {
        match self {
            Op::Abort { tag } => Some(*tag),
            _ => None,
        }
    }

    /// Sets the target of an abort. Does nothing to other operations.
    pub fn set_abort_target(&mut self, target: Option<u64>) {
        if let (Op::Abort { tag }, Some(target)) = (self, target) {
            *tag = target;
        }
    }

    /// Moves the operation forward by `delta` blocks. The addition wraps: callers add an offset
    /// that the device's size bounds.
    pub fn shift(&mut self, delta: u64) {
        match self {
            Op::Read { lba, .. }
            | Op::ReadV { lba, .. }
            | Op::Write { lba, .. }
            | Op::WriteV { lba, .. }
            | Op::WriteZeroes { lba, .. }
            | Op::Unmap { lba, .. }
            | Op::Verify { lba, .. }
            | Op::Compare { lba, .. }
            | Op::Zone { lba, .. } => *lba = lba.wrapping_add(delta),
            Op::CompareAndWrite(c) => c.lba = c.lba.wrapping_add(delta),
            Op::Copy {
                src_lba, dst_lba, ..
            } => {
                *src_lba = src_lba.wrapping_add(delta);
                *dst_lba = dst_lba.wrapping_add(delta);
            }
            Op::Flush | Op::Reset | Op::Abort { .. } => {}
        }
    }
}
