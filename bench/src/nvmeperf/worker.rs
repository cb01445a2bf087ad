//! One thread with one queue pair.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::queue::QueueStats;
use pumice_nvme::{Completion, Controller, Namespace, Op, QueueOptions, QueuePair, SubmitError};

use super::counter::Instructions;
use super::{Pattern, Workload};

/// The result of a worker.
#[derive(Debug)]
pub struct Result {
    /// Number of I/Os that ended.
    pub ios: u64,
    /// Time from the first submission to the last completion.
    pub elapsed: Duration,
    /// Latencies in nanoseconds.
    pub latency: Option<Histogram<u64>>,
    /// The queue pair's counters.
    pub queue: QueueStats,
    /// User-mode instructions of the thread, or the reason why they are not known.
    pub instructions: std::result::Result<u64, String>,
}

/// State that all workers share.
#[derive(Debug)]
pub struct SharedRun {
    /// The controller.
    pub controller: Arc<Controller>,
    /// The namespace.
    pub ns: Arc<Namespace>,
    /// The workload.
    pub workload: Workload,
    /// Set when the time is over.
    pub stop: AtomicBool,
    /// Number of I/Os that have ended, of all workers, for the progress line.
    pub progress: AtomicU64,
}

/// The blocks in the worker's order.
struct Blocks {
    random: u64,
    next: u64,
    first: u64,
    count: u64,
    step: u64,
    pattern: Pattern,
}

impl Blocks {
    fn draw(&mut self) -> u64 {
        // The generator is xorshift64*.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn next(&mut self) -> u64 {
        match self.pattern {
            Pattern::Random => {
                let wide = u128::from(self.draw()) * u128::from(self.count);
                let n = u64::try_from(wide >> 64).unwrap_or(0);
                (self.first + n) * self.step
            }
            Pattern::Sequential => {
                let n = self.next;
                self.next = if n + 1 == self.count { 0 } else { n + 1 };
                (self.first + n) * self.step
            }
        }
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Runs worker `index` until it is told to stop.
pub fn run(shared: &SharedRun, index: u16) -> std::result::Result<Result, Error> {
    let w = &shared.workload;
    let ns = &shared.ns;
    let options = {
        let mut options = QueueOptions::default().depth(w.depth);
        options.histogram = w.latency;
        options.interrupt = w.wait;
        options
    };
    let mut q = shared.controller.queue_pair(&options)?;
    let step = (w.io_bytes / ns.block_size() as usize) as u64;
    let slots = ns.num_blocks() / step;
    let mut blocks = match w.pattern {
        Pattern::Random => Blocks {
            random: (w.seed + u64::from(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            next: 0,
            first: 0,
            count: slots,
            step,
            pattern: w.pattern,
        },
        Pattern::Sequential => {
            let share = (slots / u64::from(w.queues)).max(1);
            Blocks {
                random: (w.seed + u64::from(index)) | 1,
                next: 0,
                first: (share * u64::from(index)) % slots,
                count: share,
                step,
                pattern: w.pattern,
            }
        }
    };
    let mut out: Vec<Completion> = Vec::with_capacity(usize::from(w.depth) * 2);
    let mut counter = Instructions::start();
    let start = Instant::now();
    let mut sent = 0u64;
    for tag in 0..q.depth() as u64 {
        let io = make(&mut blocks, w, DmaBuf::zeroed(w.io_bytes)?);
        submit(&mut q, ns, tag, io)?;
        sent += 1;
    }
    let mut ios = 0u64;
    let mut told = 0u64;
    let mut stopping = false;
    while q.in_flight() > 0 {
        if poll(&mut q, &mut out) == 0 && w.wait {
            q.wait(Duration::from_millis(100))?;
            continue;
        }
        for done in out.drain(..) {
            if let Err(error) = done.result {
                return Err(error.into());
            }
            ios += 1;
            if stopping {
                continue;
            }
            let io = again(&mut blocks, w, done.op)?;
            submit(&mut q, ns, done.tag, io)?;
            sent += 1;
        }
        stopping =
            stopping || shared.stop.load(Ordering::Relaxed) || (w.count > 0 && sent >= w.count);
        if ios - told >= 4096 {
            shared.progress.fetch_add(ios - told, Ordering::Relaxed);
            told = ios;
        }
    }
    let elapsed = start.elapsed();
    shared.progress.fetch_add(ios - told, Ordering::Relaxed);
    Ok(Result {
        ios,
        elapsed,
        latency: q.histogram().cloned(),
        queue: q.stats(),
        instructions: match &mut counter {
            Ok(counter) => counter.read().map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        },
    })
}

fn is_read(blocks: &mut Blocks, w: &Workload) -> bool {
    match w.read_percent {
        0 => false,
        100 => true,
        percent => blocks.draw() >> 33 < (u64::from(percent) << 31) / 100,
    }
}

fn make(blocks: &mut Blocks, w: &Workload, buf: DmaBuf) -> Op {
    let lba = blocks.next();
    if is_read(blocks, w) {
        Op::Read { lba, buf }
    } else {
        Op::Write {
            lba,
            data: buf.freeze(),
            fua: false,
        }
    }
}

/// Returns the next I/O, with the buffer of one that has ended.
fn again(blocks: &mut Blocks, w: &Workload, io: Op) -> std::result::Result<Op, Error> {
    let lba = blocks.next();
    let read = is_read(blocks, w);
    Ok(match io {
        Op::Read { buf, .. } if read => Op::Read { lba, buf },
        Op::Write { data, .. } if !read => Op::Write {
            lba,
            data,
            fua: false,
        },
        Op::Read { buf, .. } => Op::Write {
            lba,
            data: buf.freeze(),
            fua: false,
        },
        Op::Write { data, .. } => Op::Read {
            lba,
            buf: match data.try_into_buf() {
                Ok(buf) => buf,
                Err(_) => DmaBuf::new(w.io_bytes)?,
            },
        },
        _ => return Err("an I/O came back as something else".into()),
    })
}

/// The driver's two calls, out of line, so that a profiler separates their share from this tool's.
#[inline(never)]
fn accept(
    q: &mut QueuePair,
    ns: &Namespace,
    tag: u64,
    io: Op,
) -> std::result::Result<(), SubmitError> {
    q.submit(ns, tag, io)
}

#[inline(never)]
fn poll(q: &mut QueuePair, out: &mut Vec<Completion>) -> usize {
    q.poll(out)
}

/// One slot is free for every I/O that ended. Only a reset in between makes the queue busy.
fn submit(q: &mut QueuePair, ns: &Namespace, tag: u64, io: Op) -> std::result::Result<(), Error> {
    let mut io = io;
    loop {
        match accept(q, ns, tag, io) {
            Ok(()) => return Ok(()),
            Err(SubmitError::Busy(back)) => {
                io = back;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(other) => return Err(other.to_string().into()),
        }
    }
}
