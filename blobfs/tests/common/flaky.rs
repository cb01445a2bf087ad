//! A device on which chosen writes and flushes fail, whether they are carried out or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{BlockDevice, DeviceInfo, IoErrorKind, Op, OpKind};

use crate::common::between::{Between, End, Rule};

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

/// The plan, and what has been seen of it.
#[derive(Debug, Default)]
pub struct Planned {
    plan: Mutex<Option<Plan>>,
    seen: AtomicU64,
}

pub type Flaky = Between<Planned>;

impl Flaky {
    pub fn new(base: Arc<dyn BlockDevice>) -> Arc<Flaky> {
        Flaky::with(base, Planned::default())
    }

    /// Sets the plan for operations from now on; with `None` none fails.
    pub fn arm(&self, plan: Option<Plan>) {
        *self.rule.plan.lock() = plan;
        self.rule.seen.store(0, Ordering::SeqCst);
    }

    /// Number of operations that change the medium since the arming.
    #[allow(dead_code, reason = "each test binary uses a part of it")]
    pub fn seen(&self) -> u64 {
        self.rule.seen.load(Ordering::SeqCst)
    }
}

impl Rule for Planned {
    fn end_of(&self, op: &Op, _: &DeviceInfo) -> End {
        if matches!(op.kind(), OpKind::Read | OpKind::Unmap) {
            return End::Below;
        }
        let Some(plan) = *self.plan.lock() else {
            return End::Below;
        };
        let number = self.seen.fetch_add(1, Ordering::SeqCst);
        let fails = number >= plan.from && number - plan.from < plan.count;
        match plan.done {
            _ if !fails => End::Below,
            true => End::Done(plan.kind),
            false => End::Undone(plan.kind),
        }
    }
}
