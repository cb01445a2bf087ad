//! `error`: a device that injects faults by kind of operation, count and place: errors, corrupt
//! data, or operations that hang until they are resumed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::{Completion, IoErrorKind, Op, OpKind, OpSet, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::slots::Slots;
use crate::{DmaBuf, DmaSlice};

/// The effect of an injected fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The operation completes with a media error. The device below does not get it.
    Fail,
    /// The operation completes with [`IoErrorKind::NoMemory`], after which it may be tried again.
    NoMemory,
    /// The operation does not complete until [`ErrorDevice::resume`], a reset or the device's
    /// removal. It has not reached the device below, and a reset or an abort keeps it from doing
    /// so: also if it was resumed and the device below has been too busy since.
    Hang,
    /// A read or write is carried out with one byte of its data changed: the one at `offset`, by
    /// exclusive or with `value`. Other operations are not affected.
    Corrupt {
        /// Position of the byte in the operation's data. Beyond its end nothing changes.
        offset: u64,
        /// The bits that change; 0 changes nothing.
        value: u8,
    },
}

/// A fault, and the operations that it applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Injection {
    /// The kind of operation; `None`: all but reset and abort.
    pub op: Option<OpKind>,
    /// The effect.
    pub failure: Failure,
    /// Number of operations.
    pub count: u64,
    /// Restricts the fault to operations that touch these blocks: first block, number of blocks.
    pub range: Option<(u64, u64)>,
    /// Applies the fault only while at least this many operations are in flight on the channel; 0:
    /// always.
    pub queue_depth: usize,
}

pumice_io::setters!(Injection: op: Option<OpKind>, count: u64, range: Option<(u64, u64)>, queue_depth: usize);

/// A device that injects faults.
#[derive(Debug)]
pub struct ErrorDevice {
    info: Arc<DeviceInfo>,
    base: Arc<dyn BlockDevice>,
    faults: Arc<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    list: Mutex<Vec<Injection>>,
    /// Length of `list`, so that an operation without faults takes no lock.
    armed: AtomicU64,
    resumed: AtomicU64,
}

impl ErrorDevice {
    /// Puts the device `name` (`None`: `EE_` and the base's name) on top of `base`.
    pub fn new(name: Option<&str>, base: Arc<dyn BlockDevice>) -> ErrorDevice {
        let mut info = base.info().clone();
        info.name = name.map_or_else(|| format!("EE_{}", info.name), ToOwned::to_owned);
        info.aliases.clear();
        info.module = "error";
        "Error Injection Disk".clone_into(&mut info.product);
        let what = format!("{} on {:?}", info.name, base.info().uuid);
        info.uuid = crate::uuid::derived(what.as_bytes());
        info.ops = info.ops.with(OpKind::Reset).with(OpKind::Abort);
        ErrorDevice {
            info: Arc::new(info),
            base,
            faults: Arc::default(),
        }
    }

    /// Sets a UUID in place of the one derived from the name and the base.
    #[must_use]
    pub fn with_uuid(mut self, uuid: [u8; 16]) -> ErrorDevice {
        Arc::make_mut(&mut self.info).uuid = uuid;
        self
    }

    /// Adds a fault. A count of 0 adds none.
    pub fn inject(&self, injection: Injection) {
        self.faults.change(|list| list.push(injection));
    }

    /// Replaces the faults of the same kind of operation: those of the same blocks, or all of them
    /// if it is for every block. A count of 0 only removes them. `None` as the kind replaces those
    /// of every kind.
    pub fn replace(&self, injection: Injection) {
        self.faults.change(|list| {
            list.retain(|old| {
                let of_blocks = injection.range.is_none() || old.range == injection.range;
                !of_blocks || (injection.op.is_some() && old.op != injection.op)
            });
            list.push(injection);
        });
    }

    /// Removes all faults. Hanging operations continue to hang.
    pub fn clear(&self) {
        self.faults.change(Vec::clear);
    }

    /// Resumes hanging operations, as if they had been slow.
    pub fn resume(&self) {
        self.faults.resumed.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the faults that are still armed.
    pub fn injections(&self) -> Vec<Injection> {
        self.faults.list.lock().clone()
    }
}

impl Injection {
    /// Makes a fault of the next operation, whatever its kind and its blocks.
    pub fn new(failure: Failure) -> Injection {
        Injection {
            op: None,
            failure,
            count: 1,
            range: None,
            queue_depth: 0,
        }
    }

    fn is_for(&self, op: &Op, block_size: u32, in_flight: usize) -> bool {
        let kind = op.kind();
        let of_kind = match self.op {
            Some(wanted) => wanted == kind,
            None => !matches!(kind, OpKind::Reset | OpKind::Abort),
        };
        let can = match self.failure {
            Failure::Corrupt { .. } => matches!(kind, OpKind::Read | OpKind::Write),
            _ => true,
        };
        let blocks = op.len_bytes(block_size) / u64::from(block_size);
        let touches = |(at, n): (u64, u64)| {
            let meets = |lba: u64| lba < at.saturating_add(n) && at < lba.saturating_add(blocks);
            let source = match op {
                Op::Copy { src_lba, .. } => meets(*src_lba),
                _ => false,
            };
            source || meets(op.lba())
        };
        of_kind && can && in_flight + 1 >= self.queue_depth && self.range.is_none_or(touches)
    }
}

impl Faults {
    fn change(&self, change: impl FnOnce(&mut Vec<Injection>)) {
        let mut list = self.list.lock();
        change(&mut list);
        list.retain(|f| f.count > 0);
        self.armed.store(list.len() as u64, Ordering::Release);
    }

    fn take(&self, op: &Op, block_size: u32, in_flight: usize) -> Option<Injection> {
        if self.armed.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut taken = None;
        self.change(|list| {
            if let Some(f) = list
                .iter_mut()
                .find(|f| f.is_for(op, block_size, in_flight))
            {
                f.count -= 1;
                taken = Some(f.clone().count(1));
            }
        });
        taken
    }

    /// Puts a fault back whose operation the device below did not accept: it will be submitted
    /// again.
    fn give_back(&self, taken: Injection) {
        self.change(|list| list.insert(0, taken));
    }
}

impl BlockDevice for ErrorDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.base)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(ErrorChannel {
            info: Arc::clone(&self.info),
            base: self.base.open_channel()?,
            base_ops: self.base.info().ops,
            faults: Arc::clone(&self.faults),
            resumed: self.faults.resumed.load(Ordering::Acquire),
            below: Slots::default(),
            hung: Vec::new(),
            waiting: Vec::new(),
            ended: Vec::new(),
        }))
    }

    fn driver_specific(&self) -> serde_json::Value {
        let base = &self.base.info().name;
        serde_json::json!({ "error_disk": { "base_bdev": base } })
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        if !self.info.keeps_data {
            return self.base.next_data(lba);
        }
        // Everything is read, so that injected faults are met.
        let end = self.info.num_blocks;
        Ok((lba < end).then_some(lba..end))
    }
}

struct ErrorChannel {
    info: Arc<DeviceInfo>,
    base: Box<dyn IoChannel>,
    base_ops: OpSet,
    faults: Arc<Faults>,
    resumed: u64,
    below: Slots<Below>,
    hung: Vec<(u64, Op)>,
    /// Resumed operations that the device below has not accepted yet.
    waiting: Vec<(u64, Op)>,
    ended: Vec<Completion>,
}

struct Below {
    tag: u64,
    target: Option<u64>,
    /// The submitter's own operation, where a write was corrupted. The submitter gets it back.
    original: Option<Op>,
    /// Position and bits of a corrupted read.
    corrupt: Option<(u64, u8)>,
}

impl ErrorChannel {
    fn pass(&mut self, tag: u64, op: Op, corrupt: Option<(u64, u8)>) -> Result<(), SubmitError> {
        let mut below = Below {
            tag,
            target: op.abort_target(),
            original: None,
            corrupt: None,
        };
        let mut op = op;
        if let Some(target) = below.target {
            let found = self.below.iter().find(|(_, b)| b.tag == target);
            op.set_abort_target(Some(found.map_or(u64::MAX, |(i, _)| i)));
        }
        match (op.kind(), corrupt) {
            (OpKind::Write, Some((at, value))) => match corrupted_write(&op, at, value) {
                Ok(changed) => below.original = Some(std::mem::replace(&mut op, changed)),
                Err(reason) => {
                    let e = self.info.error(&op, IoErrorKind::NoMemory, reason);
                    return Err(SubmitError::Refused(op, e));
                }
            },
            _ => below.corrupt = corrupt,
        }
        let i = self.below.insert(below);
        let result = self.base.submit(i, op);
        result.map_err(|mut e| {
            if let Some(below) = self.below.remove(i) {
                e.op_mut().set_abort_target(below.target);
                if let Some(original) = below.original {
                    *e.op_mut() = original;
                }
            }
            e
        })
    }

    fn end(&mut self, tag: u64, op: Op, kind: IoErrorKind, why: &str) {
        let e = self.info.error(&op, kind, why);
        self.ended.push(Completion {
            tag,
            op,
            result: Err(e),
        });
    }

    /// Submits resumed operations to the device below.
    fn go_on(&mut self) {
        let resumed = self.faults.resumed.load(Ordering::Acquire);
        if resumed != self.resumed {
            self.resumed = resumed;
            self.waiting.append(&mut self.hung);
        }
        let mut waiting = std::mem::take(&mut self.waiting).into_iter();
        for (tag, op) in waiting.by_ref() {
            match self.pass(tag, op, None) {
                Ok(()) => {}
                Err(SubmitError::Busy(op)) => {
                    self.waiting.push((tag, op));
                    break;
                }
                Err(SubmitError::Refused(op, e)) => {
                    self.ended.push(Completion {
                        tag,
                        op,
                        result: Err(e),
                    });
                }
            }
        }
        self.waiting.extend(waiting);
    }
}

/// Returns a copy of the write with one byte changed.
fn corrupted_write(op: &Op, at: u64, value: u8) -> Result<Op, String> {
    let (lba, fua) = (op.lba(), op.fua());
    let parts: &[DmaSlice] = match op {
        Op::Write { data, .. } => std::slice::from_ref(data),
        Op::WriteV { data, .. } => data,
        _ => &[],
    };
    let len = parts.iter().map(DmaSlice::len).sum();
    let mut buf = DmaBuf::new(len).map_err(|e| e.to_string())?;
    let mut done = 0;
    for part in parts {
        buf[done..done + part.len()].copy_from_slice(part);
        done += part.len();
    }
    corrupt(&mut buf, at, value);
    Ok(Op::Write {
        lba,
        data: buf.freeze(),
        fua,
    })
}

fn corrupt(bytes: &mut [u8], at: u64, value: u8) {
    if let Some(byte) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at)) {
        *byte ^= value;
    }
}

impl IoChannel for ErrorChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.info.check(&op) {
            return crate::queue::refuse(op, e);
        }
        match &op {
            Op::Reset => {
                let mut held = std::mem::take(&mut self.hung);
                held.append(&mut self.waiting);
                for (tag, op) in held {
                    self.end(
                        tag,
                        op,
                        IoErrorKind::Aborted,
                        "it hung, and the device was reset",
                    );
                }
                if !self.base_ops.has(OpKind::Reset) {
                    self.ended.push(Completion {
                        tag,
                        op,
                        result: Ok(()),
                    });
                    return Ok(());
                }
            }
            Op::Abort { tag: target } => {
                let named = |(tag, _): &mut (u64, Op)| tag == target;
                let mut held = self.hung.extract_if(.., named);
                let found = held.next();
                drop(held);
                let found = found.or_else(|| self.waiting.extract_if(.., named).next());
                if let Some((hung_tag, hung)) = found {
                    self.end(
                        hung_tag,
                        hung,
                        IoErrorKind::Aborted,
                        "it hung, and was aborted",
                    );
                    self.ended.push(Completion {
                        tag,
                        op,
                        result: Ok(()),
                    });
                    return Ok(());
                }
                // The device below may not support aborts: then there is nothing to pass on.
                if !self.base_ops.has(OpKind::Abort) {
                    self.ended.push(Completion {
                        tag,
                        op,
                        result: Ok(()),
                    });
                    return Ok(());
                }
            }
            _ => {}
        }
        let in_flight = self.in_flight();
        let Some(taken) = self.faults.take(&op, self.info.block_size, in_flight) else {
            return self.pass(tag, op, None);
        };
        match taken.failure {
            Failure::Corrupt { offset, value } => {
                let result = self.pass(tag, op, Some((offset, value)));
                if let Err(SubmitError::Busy(_)) = &result {
                    self.faults.give_back(taken);
                }
                return result;
            }
            Failure::Hang => self.hung.push((tag, op)),
            Failure::Fail => self.end(tag, op, IoErrorKind::Media, "injected"),
            Failure::NoMemory => self.end(tag, op, IoErrorKind::NoMemory, "injected"),
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.go_on();
        let before = out.len();
        // Hanging operations complete before the reset that ended them.
        out.append(&mut self.ended);
        let from = out.len();
        self.base.poll(out);
        for completion in &mut out[from..] {
            let Some(below) = self.below.remove(completion.tag) else {
                continue;
            };
            completion.tag = below.tag;
            completion.op.set_abort_target(below.target);
            if let Some(original) = below.original {
                completion.op = original;
            }
            if let (Some((at, value)), Ok(())) = (below.corrupt, &completion.result) {
                let mut at = at;
                match &mut completion.op {
                    Op::Read { buf, .. } => corrupt(buf, at, value),
                    Op::ReadV { bufs, .. } => {
                        for buf in bufs {
                            if at < buf.len() as u64 {
                                corrupt(buf, at, value);
                                break;
                            }
                            at -= buf.len() as u64;
                        }
                    }
                    _ => {}
                }
            }
        }
        out.len() - before
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        const STEP: Duration = Duration::from_millis(1);
        let start = Instant::now();
        while self.ended.is_empty()
            && self.waiting.is_empty()
            && self.faults.resumed.load(Ordering::Acquire) == self.resumed
        {
            let left = timeout.saturating_sub(start.elapsed());
            if self.base.in_flight() > 0 {
                let step = if self.hung.is_empty() {
                    left
                } else {
                    left.min(STEP)
                };
                return self.base.wait(step);
            }
            if self.hung.is_empty() || left.is_zero() {
                break;
            }
            thread::sleep(left.min(STEP));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.below.len() + self.hung.len() + self.waiting.len() + self.ended.len()
    }
}
