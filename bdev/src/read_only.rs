//! `read_only`: a device that can only be read.

use std::sync::Arc;
use std::time::Duration;

use pumice_io::{Completion, Op, OpKind, OpSet, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::queue::refuse;

/// A view of another device that cannot be written through this one.
#[derive(Debug)]
pub struct ReadOnly {
    info: Arc<DeviceInfo>,
    base: Arc<dyn BlockDevice>,
}

impl ReadOnly {
    /// Makes a view of `base` under its name. A base that cannot be written is returned as it is.
    pub fn of(base: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        if !base.info().ops.has(OpKind::Write) {
            return base;
        }
        let mut info = base.info().clone();
        let reading = [OpKind::Read, OpKind::Compare, OpKind::Reset, OpKind::Abort];
        info.ops = reading
            .into_iter()
            .filter(|kind| base.info().ops.has(*kind))
            .fold(OpSet::NONE, OpSet::with);
        Arc::new(ReadOnly {
            info: Arc::new(info),
            base,
        })
    }
}

impl BlockDevice for ReadOnly {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.base)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(ReadOnlyChannel {
            info: Arc::clone(&self.info),
            base: self.base.open_channel()?,
        }))
    }

    /// Does nothing: who only reads does not decide that a file goes.
    fn keep_file(&self, _keep: bool) {}
}

struct ReadOnlyChannel {
    info: Arc<DeviceInfo>,
    base: Box<dyn IoChannel>,
}

impl IoChannel for ReadOnlyChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.info.check(&op) {
            return refuse(op, e);
        }
        self.base.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.base.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn event_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.base.event_fd()
    }
}
