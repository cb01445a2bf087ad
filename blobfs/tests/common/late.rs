//! A device on which writes time out, and reach the medium when the test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, IoChannel, IoErrorKind,
    Op, OpKind, SubmitError,
};

#[derive(Debug)]
pub struct Late {
    base: Arc<dyn BlockDevice>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Number of operations that are still to time out.
    armed: AtomicU64,
    /// Those from this block on.
    from: AtomicU64,
    /// The writes that have timed out and not landed.
    held: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Late {
    pub fn new(base: Arc<dyn BlockDevice>) -> Arc<Late> {
        Arc::new(Late {
            base,
            shared: Arc::default(),
        })
    }

    /// Has the next `count` writes from block `from` on time out.
    pub fn arm(&self, count: u64, from: u64) {
        self.shared.from.store(from, Ordering::SeqCst);
        self.shared.armed.store(count, Ordering::SeqCst);
    }

    /// Returns the number of writes that have timed out and not landed.
    pub fn held(&self) -> usize {
        self.shared.held.lock().len()
    }

    /// Has what has timed out reach the medium.
    pub fn land(&self) {
        let ch = AsyncChannel::new(self.base.open_channel().unwrap());
        for (lba, bytes) in std::mem::take(&mut *self.shared.held.lock()) {
            let mut buf = DmaBuf::new(bytes.len()).unwrap();
            buf.copy_from_slice(&bytes);
            ch.block_on(ch.write(lba, buf.freeze(), false)).unwrap();
        }
    }
}

impl BlockDevice for Late {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(LateChannel {
            info: self.base.info().clone(),
            base: self.base.open_channel()?,
            shared: Arc::clone(&self.shared),
            ended: Vec::new(),
        }))
    }
}

struct LateChannel {
    info: DeviceInfo,
    base: Box<dyn IoChannel>,
    shared: Arc<Shared>,
    ended: Vec<Completion>,
}

impl LateChannel {
    /// Whether the operation is to time out.
    fn takes(&self, op: &Op) -> bool {
        let of_kind = matches!(op.kind(), OpKind::Write | OpKind::WriteZeroes);
        of_kind
            && op.lba() >= self.shared.from.load(Ordering::SeqCst)
            && self
                .shared
                .armed
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
    }
}

impl IoChannel for LateChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if !self.takes(&op) {
            return self.base.submit(tag, op);
        }
        let bytes = match &op {
            Op::Write { data, .. } => data.to_vec(),
            Op::WriteV { data, .. } => data.iter().flat_map(|d| d.iter().copied()).collect(),
            _ => vec![0; usize::try_from(op.len_bytes(self.info.block_size)).unwrap()],
        };
        self.shared.held.lock().push((op.lba(), bytes));
        let error = self.info.error(&op, IoErrorKind::TimedOut, "it may land");
        let result = Err(error);
        self.ended.push(Completion { tag, op, result });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        self.base.poll(out);
        out.append(&mut self.ended);
        out.len() - start
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if self.ended.is_empty() {
            self.base.wait(timeout)
        } else {
            Ok(())
        }
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight() + self.ended.len()
    }
}
