//! A channel that checks everything that it gets back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pumice_bdev::{
    BlockDevice, Completion, DmaBuf, DmaSlice, IoChannel, IoError, Op, OpKind, SubmitError,
};

/// Time after which an operation counts as hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// The form of an operation when it was submitted.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    kind: OpKind,
    lba: u64,
    len_bytes: u64,
    /// Address and length of each buffer.
    bufs: Vec<(usize, usize)>,
}

fn shape(op: &Op, block_size: u32) -> Shape {
    let slice = |d: &DmaSlice| (d.as_ptr().addr(), d.len());
    let bufs = match op {
        Op::Read { buf, .. } => vec![(buf.as_ptr().addr(), buf.len())],
        Op::ReadV { bufs, .. } => bufs.iter().map(|b| (b.as_ptr().addr(), b.len())).collect(),
        Op::Write { data, .. } | Op::Compare { data, .. } => vec![slice(data)],
        Op::WriteV { data, .. } => data.iter().map(slice).collect(),
        Op::CompareAndWrite(c) => vec![slice(&c.compare), slice(&c.write)],
        _ => Vec::new(),
    };
    Shape {
        kind: op.kind(),
        lba: op.lba(),
        len_bytes: op.len_bytes(block_size),
        bufs,
    }
}

pub(super) struct Driver {
    channel: Box<dyn IoChannel>,
    block_size: u32,
    name: String,
    flying: HashMap<u64, Shape>,
    next_tag: u64,
    out: Vec<Completion>,
}

impl Driver {
    pub(super) fn new(dev: &dyn BlockDevice) -> Driver {
        let channel = dev
            .open_channel()
            .unwrap_or_else(|e| panic!("open_channel: {e}"));
        Driver {
            channel,
            block_size: dev.info().block_size,
            name: dev.info().name.clone(),
            flying: HashMap::new(),
            // The submitter chooses the tags; large ones must work as well as small ones.
            next_tag: u64::MAX - 7,
            out: Vec::new(),
        }
    }

    /// Submits. An operation that the device does not accept must come back unchanged.
    pub(super) fn submit(&mut self, op: Op) -> Result<u64, SubmitError> {
        self.next_tag = self.next_tag.wrapping_add(1);
        let tag = self.next_tag;
        let shape_in = shape(&op, self.block_size);
        let before = self.channel.in_flight();
        match self.channel.submit(tag, op) {
            Ok(()) => {
                assert_eq!(
                    self.channel.in_flight(),
                    before + 1,
                    "{}: in_flight counts what was submitted",
                    self.name
                );
                self.flying.insert(tag, shape_in);
                Ok(tag)
            }
            Err(e) => {
                let (SubmitError::Busy(op) | SubmitError::Refused(op, _)) = &e;
                assert_eq!(
                    shape(op, self.block_size),
                    shape_in,
                    "{}: an operation that was not taken comes back whole",
                    self.name
                );
                assert_eq!(
                    self.channel.in_flight(),
                    before,
                    "{}: and is not in flight",
                    self.name
                );
                Err(e)
            }
        }
    }

    /// Takes at least one completion if anything is in flight.
    pub(super) fn reap(&mut self) -> Vec<Completion> {
        let start = Instant::now();
        loop {
            let n = self.channel.poll(&mut self.out);
            assert_eq!(
                n,
                self.out.len(),
                "{}: poll returns how many it added",
                self.name
            );
            for c in &self.out {
                let shape_in = self.flying.remove(&c.tag);
                let Some(shape_in) = shape_in else {
                    panic!(
                        "{}: tag {:#x} completed, but is not in flight",
                        self.name, c.tag
                    );
                };
                assert_eq!(
                    shape(&c.op, self.block_size),
                    shape_in,
                    "{}: a completed operation comes back whole",
                    self.name
                );
            }
            assert_eq!(
                self.channel.in_flight(),
                self.flying.len(),
                "{}: in_flight",
                self.name
            );
            if !self.out.is_empty() || self.flying.is_empty() {
                return std::mem::take(&mut self.out);
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{}: I/O hangs: {:?}",
                self.name,
                self.flying
            );
            let waited = self.channel.wait(Duration::from_millis(100));
            waited.unwrap_or_else(|e| panic!("{}: wait: {e}", self.name));
        }
    }

    /// Runs one operation to its end.
    pub(super) fn run(&mut self, op: Op) -> (Op, Result<(), Box<IoError>>) {
        let mut op = op;
        let tag = loop {
            match self.submit(op) {
                Ok(tag) => break tag,
                Err(SubmitError::Busy(back)) => {
                    op = back;
                    self.reap();
                }
                Err(SubmitError::Refused(op, e)) => return (op, Err(e)),
            }
        };
        loop {
            for c in self.reap() {
                if c.tag == tag {
                    return (c.op, c.result);
                }
            }
            assert!(
                !self.flying.is_empty(),
                "{}: an operation never completed",
                self.name
            );
        }
    }

    pub(super) fn drain(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        while !self.flying.is_empty() {
            all.extend(self.reap());
        }
        all
    }

    pub(super) fn wait(&mut self, timeout: Duration) {
        let waited = self.channel.wait(timeout);
        waited.unwrap_or_else(|e| panic!("{}: wait: {e}", self.name));
    }

    pub(super) fn read(&mut self, lba: u64, len: usize) -> DmaBuf {
        let mut buf = DmaBuf::new(len).expect("DMA memory");
        buf.fill(0xee);
        match self.run(Op::Read { lba, buf }) {
            (Op::Read { buf, .. }, Ok(())) => buf,
            (_, result) => panic!("{}: read of {len} bytes at {lba}: {result:?}", self.name),
        }
    }

    /// Runs an operation that must succeed.
    pub(super) fn must(&mut self, op: Op) -> Op {
        let (op, result) = self.run(op);
        if let Err(e) = result {
            panic!("{}: {e}", self.name);
        }
        op
    }
}

/// Makes `len` bytes that depend on their position and `seed`.
pub(super) fn pattern(len: usize, seed: u64) -> DmaSlice {
    let mut buf = DmaBuf::new(len).expect("DMA memory");
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in buf.chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let bytes = x.to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
    buf.freeze()
}
