//! A device on which writes time out, and reach the medium when the test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{AsyncChannel, BlockDevice, DeviceInfo, DmaBuf, IoErrorKind, Op, OpKind};

use crate::common::between::{Between, End, Rule};

/// The writes that time out.
#[derive(Debug, Default)]
pub struct TimesOut {
    /// Number of operations that are still to time out.
    armed: AtomicU64,
    /// Those from this block on.
    from: AtomicU64,
    /// The writes that have timed out and not landed.
    held: Mutex<Vec<(u64, Vec<u8>)>>,
}

pub type Late = Between<TimesOut>;

impl Late {
    pub fn new(base: Arc<dyn BlockDevice>) -> Arc<Late> {
        Late::with(base, TimesOut::default())
    }

    /// Has the next `count` writes from block `from` on time out.
    pub fn arm(&self, count: u64, from: u64) {
        self.rule.from.store(from, Ordering::SeqCst);
        self.rule.armed.store(count, Ordering::SeqCst);
    }

    /// Returns the number of writes that have timed out and not landed.
    pub fn held(&self) -> usize {
        self.rule.held.lock().len()
    }

    /// Has what has timed out reach the medium.
    pub fn land(&self) {
        let ch = AsyncChannel::new(self.base.open_channel().unwrap());
        for (lba, bytes) in std::mem::take(&mut *self.rule.held.lock()) {
            let mut buf = DmaBuf::new(bytes.len()).unwrap();
            buf.copy_from_slice(&bytes);
            ch.block_on(ch.write(lba, buf.freeze(), false)).unwrap();
        }
    }
}

impl Rule for TimesOut {
    fn end_of(&self, op: &Op, info: &DeviceInfo) -> End {
        let of_kind = matches!(op.kind(), OpKind::Write | OpKind::WriteZeroes);
        let one_less = |n: u64| n.checked_sub(1);
        if !of_kind
            || op.lba() < self.from.load(Ordering::SeqCst)
            || self
                .armed
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
                .is_err()
        {
            return End::Below;
        }
        let bytes = match op {
            Op::Write { data, .. } => data.to_vec(),
            Op::WriteV { data, .. } => data.iter().flat_map(|d| d.iter().copied()).collect(),
            _ => vec![0; usize::try_from(op.len_bytes(info.block_size)).unwrap()],
        };
        self.held.lock().push((op.lba(), bytes));
        End::Undone(IoErrorKind::TimedOut)
    }
}
