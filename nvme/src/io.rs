//! What a queue pair is asked to do, and what comes back.

use crate::dma::{DmaBuf, DmaSlice};
use crate::error::IoError;

/// A range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub lba: u64,
    /// Number of blocks.
    pub blocks: u64,
}

/// An I/O on a namespace. It owns its buffers, which move in with it and come back with its
/// completion, so no buffer can be freed or reused while the device may still touch it.
///
/// Lengths are free: what exceeds the controller's limits is split into several commands.
#[derive(Debug)]
#[non_exhaustive]
pub enum Io {
    /// Reads `buf.len()` bytes.
    Read {
        /// First block.
        lba: u64,
        /// Filled on success; whole blocks.
        buf: DmaBuf,
    },
    /// Reads into several buffers, one after the other.
    ReadV {
        /// First block.
        lba: u64,
        /// Each of whole blocks.
        bufs: Vec<DmaBuf>,
    },
    /// Writes `data`.
    Write {
        /// First block.
        lba: u64,
        /// Whole blocks.
        data: DmaSlice,
        /// Durable on completion (force unit access).
        fua: bool,
    },
    /// Writes several buffers, one after the other.
    WriteV {
        /// First block.
        lba: u64,
        /// Each of whole blocks.
        data: Vec<DmaSlice>,
        /// Durable on completion.
        fua: bool,
    },
    /// Compares; a difference is the status COMPARE FAILURE.
    Compare {
        /// First block.
        lba: u64,
        /// Whole blocks.
        data: DmaSlice,
    },
    /// Makes all completed writes durable.
    Flush,
    /// Writes zeroes without data.
    WriteZeroes {
        /// First block.
        lba: u64,
        /// Blocks, any number.
        blocks: u64,
        /// Durable on completion.
        fua: bool,
        /// The device may deallocate the blocks, as long as they then read as zeroes.
        deallocate: bool,
    },
    /// Tells the device that the blocks' contents are not needed (TRIM).
    Deallocate {
        /// What to deallocate.
        ranges: Vec<BlockRange>,
    },
    /// Reads and checks without transferring.
    Verify {
        /// First block.
        lba: u64,
        /// Blocks, any number.
        blocks: u64,
    },
    /// Copies ranges, one after the other, to `lba`, inside the device. Source and destination
    /// must not overlap.
    Copy {
        /// Sources.
        ranges: Vec<BlockRange>,
        /// First block of the destination.
        lba: u64,
        /// Durable on completion.
        fua: bool,
    },
}

/// An I/O that has ended.
#[derive(Debug)]
pub struct IoDone {
    /// As given to `submit`.
    pub tag: u64,
    /// The I/O, with its buffers.
    pub io: Io,
    /// How it ended.
    pub result: Result<(), Box<IoError>>,
}
