//! A device whose operations fail at random, whether they are carried out, in part or not at all.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op, OpKind, SubmitError,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The rates of failures.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    /// One in so many of this kind fails; 0: none.
    pub write: u32,
    pub read: u32,
    pub flush: u32,
    pub clear: u32,
    /// The errors, of which each is as likely as the others.
    pub kinds: Vec<IoErrorKind>,
    /// A write that fails may have been done up to a multiple of so many blocks.
    pub unit: u64,
}

#[derive(Debug)]
struct Shared {
    rates: Mutex<Rates>,
    rng: Mutex<SmallRng>,
    log: Mutex<Vec<String>>,
}

#[derive(Debug)]
pub struct Chaos {
    base: Arc<dyn BlockDevice>,
    shared: Arc<Shared>,
}

impl Chaos {
    pub fn new(base: Arc<dyn BlockDevice>, seed: u64) -> Arc<Chaos> {
        Arc::new(Chaos {
            base,
            shared: Arc::new(Shared {
                rates: Mutex::default(),
                rng: Mutex::new(SmallRng::seed_from_u64(seed)),
                log: Mutex::default(),
            }),
        })
    }

    /// Sets how often operations fail from now on.
    pub fn set(&self, rates: Rates) {
        *self.shared.rates.lock() = rates;
    }

    /// Returns the faults since the last call.
    pub fn faults(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.log.lock())
    }
}

impl BlockDevice for Chaos {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(ChaosChannel {
            info: self.base.info().clone(),
            base: self.base.open_channel()?,
            shared: Arc::clone(&self.shared),
            below: Vec::new(),
            ended: Vec::new(),
        }))
    }
}

struct ChaosChannel {
    info: DeviceInfo,
    base: Box<dyn IoChannel>,
    shared: Arc<Shared>,
    /// Tags of operations that are going to fail when they are done, and the whole of those that are done in part.
    below: Vec<(u64, IoErrorKind, Option<Op>)>,
    ended: Vec<Completion>,
}

impl ChaosChannel {
    fn plan(&self, op: &Op) -> Option<(IoErrorKind, u8)> {
        let rates = self.shared.rates.lock();
        let rate = match op.kind() {
            OpKind::Write => rates.write,
            OpKind::Read => rates.read,
            OpKind::Flush => rates.flush,
            OpKind::WriteZeroes | OpKind::Unmap => rates.clear,
            _ => 0,
        };
        let mut rng = self.shared.rng.lock();
        if rate == 0 || rng.random_range(0..rate) != 0 {
            return None;
        }
        let kind = rates.kinds[rng.random_range(0..rates.kinds.len())];
        let how = rng.random_range(0..3);
        let text = format!("{} at {}: {kind}, {how}", op.kind(), op.lba());
        self.shared.log.lock().push(text);
        Some((kind, how))
    }

    /// Returns the beginning of a write.
    fn part(&self, op: &Op) -> Option<Op> {
        let bs = u64::from(self.info.block_size);
        let unit = self.shared.rates.lock().unit.max(1);
        let Op::Write { lba, data, .. } = op else {
            return None;
        };
        let units = data.len() as u64 / bs / unit;
        let n = self.shared.rng.lock().random_range(0..=units) * unit;
        let len = usize::try_from(n * bs).unwrap();
        (0 < len && len < data.len()).then(|| Op::Write {
            lba: *lba,
            data: data.slice(0..len),
            fua: false,
        })
    }
}

impl IoChannel for ChaosChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let Some((kind, how)) = self.plan(&op) else {
            return self.base.submit(tag, op);
        };
        let part = if how == 2 { self.part(&op) } else { None };
        if let Some(part) = part {
            match self.base.submit(tag, part) {
                Ok(()) => self.below.push((tag, kind, Some(op))),
                Err(_) => return Err(SubmitError::Busy(op)),
            }
            return Ok(());
        }
        if how == 0 {
            let result = Err(self.info.error(&op, kind, "planned"));
            self.ended.push(Completion { tag, op, result });
            return Ok(());
        }
        self.base.submit(tag, op)?;
        self.below.push((tag, kind, None));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        self.base.poll(out);
        for done in &mut out[start..] {
            let Some(i) = self.below.iter().position(|(tag, ..)| *tag == done.tag) else {
                continue;
            };
            let (_, kind, whole) = self.below.swap_remove(i);
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
