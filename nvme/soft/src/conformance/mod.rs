//! The driver's suite, for any controller behind any transport. `cargo test` runs it on the soft
//! controller, and the `nvme-suite` program runs it in a virtual machine on real VFIO.
//!
//! The suite writes to every namespace. A test that does not apply to a device is skipped with the
//! reason.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_io::dma::{DmaBuf, DmaSlice};
use pumice_nvme::controller::{Controller, ControllerOptions, Weights};
use pumice_nvme::queue::{QueueOptions, QueuePair};
use pumice_nvme::{Completion, Namespace, NvmeError, Op, SubmitError};

mod admin;
mod commands;
pub mod fuzz;
mod load;
mod model;
mod queues;

/// The result of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The device does what it must.
    Passed,
    /// The device does not do what it must; the text says what.
    Failed(String),
    /// The test does not apply to this device; the text says why.
    Skipped(String),
}

/// The reason why a test stopped early.
#[derive(Debug)]
pub enum Stop {
    /// The test failed.
    Failed(String),
    /// The test does not apply.
    Skip(String),
}

impl<E: std::error::Error> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed(error.to_string())
    }
}

/// The result of a test's function.
pub type Outcome = Result<(), Stop>;

/// Opens the controller under test with options. It is called again for each group of tests, when
/// the earlier controller was dropped.
pub type Opener<'a> = &'a dyn Fn(ControllerOptions) -> Result<Arc<Controller>, NvmeError>;

/// A test of the suite.
pub struct Test {
    /// Name of the test.
    pub name: &'static str,
    run: fn(&Bench) -> Outcome,
}

/// The controller and the seed that a test uses.
pub struct Bench {
    /// The controller under test.
    pub controller: Arc<Controller>,
    /// Seed of random choices.
    pub seed: u64,
}

/// Counts of a run's results.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Number of tests that passed.
    pub passed: usize,
    /// Number of tests that failed.
    pub failed: usize,
    /// Number of tests that were skipped.
    pub skipped: usize,
}

/// Returns the tests that run under every set of options.
pub fn tests() -> Vec<Test> {
    [admin::TESTS, commands::TESTS, queues::TESTS, load::TESTS]
        .concat()
        .into_iter()
        .map(|(name, run)| Test { name, run })
        .collect()
}

type Entry = (&'static str, fn(&Bench) -> Outcome);

/// Returns the sets of options that the suite runs under.
pub fn variants() -> Vec<(&'static str, ControllerOptions)> {
    let with = |change: fn(&mut ControllerOptions)| {
        let mut options = ControllerOptions::default();
        change(&mut options);
        options
    };
    vec![
        ("default", with(|_| {})),
        ("prp-only", with(|o| o.sgl = false)),
        ("mmio-doorbells", with(|o| o.shadow_doorbells = false)),
        ("polled", with(|o| o.vectors = 0)),
        (
            "weighted",
            with(|o| {
                o.arbitration = Some(Weights {
                    high: 32,
                    medium: 16,
                    low: 8,
                });
            }),
        ),
    ]
}

/// Runs every test whose `variant/name` contains `filter`, and reports each result.
pub fn run(
    open: Opener<'_>,
    filter: &str,
    seed: u64,
    tell: &mut dyn FnMut(&str, &Verdict, Duration),
) -> Summary {
    let mut summary = Summary::default();
    for (variant, options) in variants() {
        let wanted: Vec<Test> = tests()
            .into_iter()
            .filter(|t| format!("{variant}/{}", t.name).contains(filter))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let controller = match open(options) {
            Ok(controller) => controller,
            Err(error) => {
                summary.failed += 1;
                let verdict = Verdict::Failed(error.to_string());
                tell(&format!("{variant}/open"), &verdict, Duration::ZERO);
                continue;
            }
        };
        let bench = Bench { controller, seed };
        for test in wanted {
            let start = Instant::now();
            let verdict = match (test.run)(&bench) {
                Ok(()) => Verdict::Passed,
                Err(Stop::Skip(why)) => Verdict::Skipped(why),
                Err(Stop::Failed(what)) => Verdict::Failed(what),
            };
            match verdict {
                Verdict::Passed => summary.passed += 1,
                Verdict::Failed(_) => summary.failed += 1,
                Verdict::Skipped(_) => summary.skipped += 1,
            }
            tell(
                &format!("{variant}/{}", test.name),
                &verdict,
                start.elapsed(),
            );
        }
    }
    summary
}

/// Fails with a text.
pub(crate) fn fail<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Failed(what.into()))
}

/// Skips with a reason.
pub(crate) fn skip<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Skip(why.into()))
}

/// Fails unless the condition holds.
pub(crate) fn check(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(Stop::Failed(what()))
    }
}

/// Longest wait for an I/O.
const PATIENCE: Duration = Duration::from_secs(60);

impl Bench {
    /// Returns the namespaces whose format the driver uses.
    pub(crate) fn namespaces(&self) -> Result<Vec<Arc<Namespace>>, Stop> {
        let list: Vec<_> = self
            .controller
            .namespaces()
            .into_iter()
            .filter(|n| n.unusable().is_none())
            .collect();
        if list.is_empty() {
            return skip("no usable namespace");
        }
        Ok(list)
    }

    /// Makes a queue pair.
    pub(crate) fn queue(&self, depth: u16) -> Result<QueuePair, Stop> {
        Ok(self
            .controller
            .queue_pair(&QueueOptions::default().depth(depth))?)
    }
}

/// Submits, polling while the queue is full.
pub(crate) fn submit(
    q: &mut QueuePair,
    ns: &Namespace,
    tag: u64,
    io: Op,
    out: &mut Vec<Completion>,
) -> Outcome {
    let start = Instant::now();
    let mut io = io;
    loop {
        match q.submit(ns, tag, io) {
            Ok(()) => return Ok(()),
            Err(SubmitError::Busy(back)) => io = back,
            Err(other) => return fail(other.to_string()),
        }
        if q.poll(out) == 0 {
            q.wait(Duration::from_millis(100))?;
        }
        if start.elapsed() > PATIENCE {
            return fail("the queue stays full");
        }
    }
}

/// Polls until nothing is in flight.
pub(crate) fn settle(q: &mut QueuePair, out: &mut Vec<Completion>) -> Outcome {
    let start = Instant::now();
    while q.in_flight() > 0 {
        if q.poll(out) == 0 {
            q.wait(Duration::from_millis(100))?;
        }
        if start.elapsed() > PATIENCE {
            return fail(format!("{} I/Os do not end", q.in_flight()));
        }
    }
    Ok(())
}

/// Runs one I/O to its end.
pub(crate) fn one(q: &mut QueuePair, ns: &Namespace, io: Op) -> Result<Completion, Stop> {
    let mut out = Vec::new();
    submit(q, ns, 1, io, &mut out)?;
    settle(q, &mut out)?;
    match out.len() {
        1 => Ok(out.remove(0)),
        n => fail(format!("one I/O was handed back {n} times")),
    }
}

/// Runs one I/O that must succeed.
pub(crate) fn good(q: &mut QueuePair, ns: &Namespace, io: Op) -> Result<Op, Stop> {
    let done = one(q, ns, io)?;
    match done.result {
        Ok(()) => Ok(done.op),
        Err(error) => fail(error.to_string()),
    }
}

/// Reads blocks.
pub(crate) fn read(
    q: &mut QueuePair,
    ns: &Namespace,
    lba: u64,
    blocks: usize,
) -> Result<DmaBuf, Stop> {
    let mut buf = DmaBuf::new(blocks * ns.block_size() as usize)?;
    buf.fill(0xee);
    match good(q, ns, Op::Read { lba, buf })? {
        Op::Read { buf, .. } => Ok(buf),
        _ => fail("a read came back as something else"),
    }
}

/// Writes bytes.
pub(crate) fn write(
    q: &mut QueuePair,
    ns: &Namespace,
    lba: u64,
    data: DmaSlice,
    fua: bool,
) -> Outcome {
    good(q, ns, Op::Write { lba, data, fua }).map(|_| ())
}

/// Makes blocks that identify themselves: namespace, block and seed in every 16 bytes.
pub(crate) fn pattern(ns: &Namespace, lba: u64, blocks: usize, seed: u64) -> Result<DmaBuf, Stop> {
    let size = ns.block_size() as usize;
    let mut buf = DmaBuf::new(blocks * size)?;
    for (n, block) in buf.chunks_exact_mut(size).enumerate() {
        for (i, piece) in block.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let a = (lba + n as u64) ^ seed.rotate_left(17);
            let b = u64::from(ns.nsid()) << 32 | i as u64;
            piece[..8].copy_from_slice(&a.to_le_bytes());
            piece[8..].copy_from_slice(&(b ^ seed).to_le_bytes());
        }
    }
    Ok(buf)
}

/// Compares, and names the first byte that differs.
pub(crate) fn same(what: &str, got: &[u8], want: &[u8]) -> Outcome {
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None if got.len() == want.len() => Ok(()),
        None => fail(format!(
            "{what}: {} bytes instead of {}",
            got.len(),
            want.len()
        )),
        Some(at) => fail(format!(
            "{what}: byte {at} is {:#04x} instead of {:#04x}",
            got[at], want[at]
        )),
    }
}

/// A small random number generator (xorshift64*), so that a seed gives the same run everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
}
