//! Writes that have timed out and may still land: what they may reach is given to nobody until the next load.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{IoError, IoErrorKind, Op, OpKind};

/// The blocks of the writes of a store that have timed out, whatever they were a part of.
#[derive(Debug)]
pub(crate) struct LateWrites {
    block_size: u32,
    /// Whether there are some, so that a change looks without a lock.
    any: AtomicBool,
    blocks: Mutex<Vec<Range<u64>>>,
}

impl LateWrites {
    pub fn new(block_size: u32) -> LateWrites {
        LateWrites {
            block_size,
            any: AtomicBool::new(false),
            blocks: Mutex::default(),
        }
    }

    /// Records an operation that has failed for good, if it may still change the medium.
    pub fn note(&self, op: &Op, error: &IoError) {
        let changes = !matches!(
            op.kind(),
            OpKind::Read
                | OpKind::Flush
                | OpKind::Compare
                | OpKind::Verify
                | OpKind::Reset
                | OpKind::Abort
        );
        if error.kind != IoErrorKind::TimedOut || !changes {
            return;
        }
        let len = op.len_bytes(self.block_size) / u64::from(self.block_size);
        let range = op.lba()..op.lba().saturating_add(len);
        let mut blocks = self.blocks.lock();
        // A file system sends a failed write again, which may time out again.
        if !blocks.contains(&range) {
            blocks.push(range);
        }
        self.any.store(true, Ordering::Release);
    }

    /// Whether one of them may still reach these blocks.
    pub fn reach(&self, blocks: &Range<u64>) -> bool {
        self.any.load(Ordering::Acquire)
            && self
                .blocks
                .lock()
                .iter()
                .any(|late| late.start < blocks.end && blocks.start < late.end)
    }
}
