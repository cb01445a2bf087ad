//! A device on which chosen writes and flushes fail, whether they are carried out or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op, OpKind, SubmitError,
};

/// The operations that fail, counted among those that change the medium since the arming.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Number of the first operation that fails.
    pub from: u64,
    /// Number of operations that fail.
    pub count: u64,
    /// The error.
    pub kind: IoErrorKind,
    /// Whether the device carries out the operations nevertheless.
    pub done: bool,
}

#[derive(Debug)]
struct Faults {
    plan: Mutex<Option<Plan>>,
    seen: AtomicU64,
}

#[derive(Debug)]
pub struct Flaky {
    base: Arc<dyn BlockDevice>,
    faults: Arc<Faults>,
}

impl Flaky {
    pub fn new(base: Arc<dyn BlockDevice>) -> Arc<Flaky> {
        Arc::new(Flaky {
            base,
            faults: Arc::new(Faults {
                plan: Mutex::new(None),
                seen: AtomicU64::new(0),
            }),
        })
    }

    /// Sets the plan for operations from now on; with `None` none fails.
    pub fn arm(&self, plan: Option<Plan>) {
        *self.faults.plan.lock() = plan;
        self.faults.seen.store(0, Ordering::SeqCst);
    }

    /// Number of operations that change the medium since the arming.
    #[allow(dead_code, reason = "each test binary uses a part of it")]
    pub fn seen(&self) -> u64 {
        self.faults.seen.load(Ordering::SeqCst)
    }
}

impl BlockDevice for Flaky {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn host_name(&self) -> Option<String> {
        self.base.host_name()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(FlakyChannel {
            info: self.base.info().clone(),
            base: self.base.open_channel()?,
            faults: Arc::clone(&self.faults),
            failing: Vec::new(),
            ended: Vec::new(),
        }))
    }
}

struct FlakyChannel {
    info: DeviceInfo,
    base: Box<dyn IoChannel>,
    faults: Arc<Faults>,
    /// Tags of operations that were carried out and are reported as failed.
    failing: Vec<(u64, IoErrorKind)>,
    ended: Vec<Completion>,
}

impl IoChannel for FlakyChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let counts = !matches!(op.kind(), OpKind::Read | OpKind::Unmap);
        let plan = *self.faults.plan.lock();
        if let (true, Some(plan)) = (counts, plan) {
            let number = self.faults.seen.fetch_add(1, Ordering::SeqCst);
            if number >= plan.from && number - plan.from < plan.count {
                if !plan.done {
                    let error = self.info.error(&op, plan.kind, "planned");
                    let result = Err(error);
                    self.ended.push(Completion { tag, op, result });
                    return Ok(());
                }
                self.failing.push((tag, plan.kind));
            }
        }
        self.base.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        self.base.poll(out);
        for completion in &mut out[start..] {
            let found = self
                .failing
                .iter()
                .position(|(tag, _)| *tag == completion.tag);
            if let Some(i) = found {
                let (_, kind) = self.failing.swap_remove(i);
                completion.result = Err(self.info.error(&completion.op, kind, "planned, but done"));
            }
        }
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
