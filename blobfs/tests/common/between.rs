//! A device between a store and another device. Its rule decides how each operation ends.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op, SubmitError,
};

/// The end of an operation.
pub enum End {
    /// That on the device below.
    Below,
    /// An error. Nothing was done.
    Undone(IoErrorKind),
    /// An error, although everything was done.
    Done(IoErrorKind),
    /// An error, although this was done in its place.
    Part(IoErrorKind, Op),
}

/// A rule about the ends of operations.
pub trait Rule: Debug + Send + Sync + 'static {
    fn end_of(&self, op: &Op, info: &DeviceInfo) -> End;
}

/// The device.
#[derive(Debug)]
pub struct Between<R> {
    pub base: Arc<dyn BlockDevice>,
    pub rule: Arc<R>,
}

impl<R: Rule> Between<R> {
    pub fn with(base: Arc<dyn BlockDevice>, rule: R) -> Arc<Between<R>> {
        let rule = Arc::new(rule);
        Arc::new(Between { base, rule })
    }
}

impl<R: Rule> BlockDevice for Between<R> {
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
        Ok(Box::new(BetweenChannel {
            info: self.base.info().clone(),
            base: self.base.open_channel()?,
            rule: Arc::clone(&self.rule),
            failing: Vec::new(),
            ended: Vec::new(),
        }))
    }
}

struct BetweenChannel<R> {
    info: DeviceInfo,
    base: Box<dyn IoChannel>,
    rule: Arc<R>,
    /// Tags of operations that fail when the device below has ended them, with the whole of those that it does a part of.
    failing: Vec<(u64, IoErrorKind, Option<Op>)>,
    ended: Vec<Completion>,
}

impl<R: Rule> IoChannel for BetweenChannel<R> {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        match self.rule.end_of(&op, &self.info) {
            End::Below => return self.base.submit(tag, op),
            End::Undone(kind) => {
                let result = Err(self.info.error(&op, kind, "planned"));
                self.ended.push(Completion { tag, op, result });
            }
            End::Done(kind) => {
                self.base.submit(tag, op)?;
                self.failing.push((tag, kind, None));
            }
            End::Part(kind, part) => match self.base.submit(tag, part) {
                Ok(()) => self.failing.push((tag, kind, Some(op))),
                Err(_) => return Err(SubmitError::Busy(op)),
            },
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        self.base.poll(out);
        for done in &mut out[start..] {
            let Some(i) = self.failing.iter().position(|(tag, ..)| *tag == done.tag) else {
                continue;
            };
            let (_, kind, whole) = self.failing.swap_remove(i);
            if let Some(whole) = whole {
                done.op = whole;
            }
            done.result = Err(self.info.error(&done.op, kind, "planned, but done"));
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
