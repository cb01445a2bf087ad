//! Random operations compared with a byte array.

use std::collections::HashMap;

use pumice_bdev::{BlockDevice, DmaBuf, DmaSlice, Op, OpKind, SubmitError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::driver::{Driver, pattern};

/// Options of a random run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Seed of all random choices. It is printed when the run fails.
    pub seed: u64,
    /// Number of operations.
    pub count: u64,
    /// Number of blocks to use, from the first on.
    pub span_blocks: u64,
    /// Most operations in flight. They never overlap.
    pub depth: usize,
    /// Whether errors are expected: a failed operation leaves its blocks undefined until they are
    /// written again.
    pub tolerate_errors: bool,
}

pumice_bdev::setters!(ModelOptions: seed: u64, count: u64, span_blocks: u64, depth: usize, tolerate_errors: bool);

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            seed: 1,
            count: 400,
            span_blocks: 2048,
            depth: 8,
            tolerate_errors: false,
        }
    }
}

struct Model {
    bytes: Vec<u8>,
    /// Whether each block's content is known.
    known: Vec<bool>,
    bs: usize,
}

impl Model {
    fn set(&mut self, lba: usize, data: &[u8]) {
        self.bytes[lba * self.bs..lba * self.bs + data.len()].copy_from_slice(data);
        self.known[lba..lba + data.len() / self.bs].fill(true);
    }

    fn forget(&mut self, lba: usize, blocks: usize) {
        self.known[lba..lba + blocks].fill(false);
    }

    fn check(&self, lba: usize, data: &[u8], what: &str) {
        for (i, block) in data.chunks(self.bs).enumerate() {
            let at = lba + i;
            let expected = &self.bytes[at * self.bs..(at + 1) * self.bs];
            assert!(
                !self.known[at] || block == expected,
                "{what}: block {at} differs"
            );
        }
    }
}

pub(super) fn run(dev: &dyn BlockDevice, options: &ModelOptions) {
    let info = dev.info();
    let bs = info.block_size as usize;
    let span = options.span_blocks.min(info.num_blocks);
    let blocks = usize::try_from(span).expect("a model fits memory");
    let mut model = Model {
        bytes: vec![0; blocks * bs],
        known: vec![false; blocks],
        bs,
    };
    let mut rng = SmallRng::seed_from_u64(options.seed);
    let mut d = Driver::new(dev);
    let mut flying: HashMap<u64, (u64, u64)> = HashMap::new();
    let max = info.limits.at_most(span);
    let mut n = 0;
    while n < options.count || !flying.is_empty() {
        if n < options.count && flying.len() < options.depth {
            n += 1;
            let len = if rng.random_ratio(1, 4) {
                rng.random_range(1..=max.min(300))
            } else {
                rng.random_range(1..=max.min(9))
            };
            let lba = rng.random_range(0..=span - len);
            if flying.values().any(|(l, c)| *l < lba + len && lba < l + c) {
                continue;
            }
            let op = random_op(&mut rng, dev, lba, len);
            match d.submit(op) {
                Ok(tag) => {
                    flying.insert(tag, (lba, len));
                    continue;
                }
                Err(SubmitError::Busy(_)) => {}
                Err(SubmitError::Refused(_, _)) if options.tolerate_errors => continue,
                Err(e) => panic!("seed {}: {e}", options.seed),
            }
        }
        for c in d.reap() {
            let what = format!("seed {}, {:?}", options.seed, c.op);
            let Some((lba, len)) = flying.remove(&c.tag) else {
                panic!("{what}: not in flight")
            };
            let at = usize::try_from(lba).expect("in the model");
            let len = usize::try_from(len).expect("in the model");
            if let Err(e) = &c.result {
                assert!(options.tolerate_errors, "{what}: {e}");
                if c.op.kind() != OpKind::Read {
                    model.forget(at, len);
                }
                continue;
            }
            match &c.op {
                Op::Read { buf, .. } => model.check(at, buf, &what),
                Op::ReadV { bufs, .. } => {
                    let all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
                    model.check(at, &all, &what);
                }
                Op::Write { data, .. } => model.set(at, data),
                Op::WriteV { data, .. } => {
                    let all: Vec<u8> = data.iter().flat_map(|d| d.iter().copied()).collect();
                    model.set(at, &all);
                }
                Op::WriteZeroes { .. } => model.set(at, &vec![0; len * bs]),
                Op::Unmap { .. } if info.unmap_zeroes => model.set(at, &vec![0; len * bs]),
                Op::Unmap { .. } => model.forget(at, len),
                _ => {}
            }
        }
    }
    for lba in (0..span).step_by(64) {
        let len = usize::try_from(64.min(span - lba)).expect("small") * bs;
        let buf = DmaBuf::new(len).expect("DMA memory");
        if let (Op::Read { buf, .. }, Ok(())) = d.run(Op::Read { lba, buf }) {
            let at = usize::try_from(lba).expect("in the model");
            model.check(at, &buf, &format!("seed {}, at the end", options.seed));
        } else {
            assert!(
                options.tolerate_errors,
                "seed {}: the last reads fail",
                options.seed
            );
        }
    }
}

fn random_op(rng: &mut SmallRng, dev: &dyn BlockDevice, lba: u64, len: u64) -> Op {
    let info = dev.info();
    let bs = info.block_size as usize;
    let bytes = usize::try_from(len).expect("small") * bs;
    let fua = info.ops.has(OpKind::Fua) && rng.random_ratio(1, 4);
    // The places where a vector is divided.
    let cut = rng.random_range(0..=bytes / bs) * bs;
    let cuts = [0..cut, cut..bytes].into_iter().filter(|r| !r.is_empty());
    let buf = |n: usize| DmaBuf::new(n).expect("DMA memory");
    match rng.random_range(0..12) {
        0 if info.ops.has(OpKind::WriteZeroes) => Op::WriteZeroes {
            lba,
            len_blocks: len,
            fua,
        },
        1 if info.ops.has(OpKind::Unmap) => Op::Unmap {
            lba,
            len_blocks: len,
        },
        2 if info.ops.has(OpKind::Flush) => Op::Flush,
        3..=6 if info.ops.has(OpKind::Write) => Op::Write {
            lba,
            data: pattern(bytes, rng.random()),
            fua,
        },
        7 if info.ops.has(OpKind::Write) => {
            let whole = pattern(bytes, rng.random());
            let data: Vec<DmaSlice> = cuts.map(|r| whole.slice(r)).collect();
            Op::WriteV { lba, data, fua }
        }
        8 => Op::ReadV {
            lba,
            bufs: cuts.map(|r| buf(r.len())).collect(),
        },
        _ => Op::Read {
            lba,
            buf: buf(bytes),
        },
    }
}
