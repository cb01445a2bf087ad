//! A device whose operations fail at random, whether they are carried out, in part or not at all.

use std::sync::Arc;

use parking_lot::Mutex;
use pumice_bdev::{BlockDevice, DeviceInfo, IoErrorKind, Op, OpKind};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::common::between::{Between, End, Rule};

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

/// The rates, and what has failed.
#[derive(Debug)]
pub struct AtRandom {
    rates: Mutex<Rates>,
    rng: Mutex<SmallRng>,
    log: Mutex<Vec<String>>,
}

pub type Chaos = Between<AtRandom>;

impl Chaos {
    pub fn new(base: Arc<dyn BlockDevice>, seed: u64) -> Arc<Chaos> {
        let rule = AtRandom {
            rates: Mutex::default(),
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            log: Mutex::default(),
        };
        Chaos::with(base, rule)
    }

    /// Sets how often operations fail from now on.
    pub fn set(&self, rates: Rates) {
        *self.rule.rates.lock() = rates;
    }

    /// Returns the faults since the last call.
    pub fn faults(&self) -> Vec<String> {
        std::mem::take(&mut self.rule.log.lock())
    }
}

impl Rule for AtRandom {
    fn end_of(&self, op: &Op, info: &DeviceInfo) -> End {
        let rates = self.rates.lock();
        let rate = match op.kind() {
            OpKind::Write => rates.write,
            OpKind::Read => rates.read,
            OpKind::Flush => rates.flush,
            OpKind::WriteZeroes | OpKind::Unmap => rates.clear,
            _ => 0,
        };
        let mut rng = self.rng.lock();
        if rate == 0 || rng.random_range(0..rate) != 0 {
            return End::Below;
        }
        let kind = rates.kinds[rng.random_range(0..rates.kinds.len())];
        let how = rng.random_range(0..3);
        let text = format!("{} at {}: {kind}, {how}", op.kind(), op.lba());
        self.log.lock().push(text);
        match how {
            0 => End::Undone(kind),
            1 => End::Done(kind),
            _ => match beginning(op, rates.unit.max(1), info, &mut rng) {
                Some(part) => End::Part(kind, part),
                None => End::Done(kind),
            },
        }
    }
}

/// Returns a beginning of a write, of so many units of `unit` blocks as chance has it.
fn beginning(op: &Op, unit: u64, info: &DeviceInfo, rng: &mut SmallRng) -> Option<Op> {
    let Op::Write { lba, data, .. } = op else {
        return None;
    };
    let bs = u64::from(info.block_size);
    let units = data.len() as u64 / bs / unit;
    let len = usize::try_from(rng.random_range(0..=units) * unit * bs).unwrap();
    (0 < len && len < data.len()).then(|| Op::Write {
        lba: *lba,
        data: data.slice(0..len),
        fua: false,
    })
}
