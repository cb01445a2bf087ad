//! A job: one device on one core, kept at its depth until the time is over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pumice_bdev::registry::Bdev;
use pumice_bdev::stats::OpStats;
use pumice_bdev::{BlockDevice, Completion, DmaBuf, DmaSlice, IoChannel, Op, OpKind, SubmitError};

use super::args::{Settings, Work};

/// The result of a job.
pub struct Outcome {
    pub bdev: String,
    pub core: usize,
    pub runtime: Duration,
    pub ops: u64,
    pub failed: u64,
    pub miscompares: u64,
    pub first_error: Option<String>,
    /// Latencies of all kinds of operations together.
    pub latency: OpStats,
    /// Time from the start of the process to the first operation.
    pub first_io: Duration,
    /// Processor time of the core's thread per operation, for all its jobs together, in
    /// nanoseconds. On a busy machine it says more than the rate does.
    pub cpu_ns_per_io: f64,
}

impl Outcome {
    pub fn is_failure(&self) -> bool {
        self.failed > 0 || self.miscompares > 0
    }
}

pub struct Job {
    bdev: Bdev,
    core: usize,
    channel: Box<dyn IoChannel>,
    work: Work,
    random: bool,
    go_on: bool,
    depth: usize,
    io_blocks: u64,
    io_bytes: usize,
    /// Number of places for operations on the device.
    places: u64,
    next_place: u64,
    rng: u64,
    bufs: Vec<DmaBuf>,
    data: Vec<DmaSlice>,
    out: Vec<Completion>,
    ops: u64,
    failed: u64,
    miscompares: u64,
    first_error: Option<String>,
    stopping: bool,
    first_io: Option<Duration>,
    /// Operations that a full queue returned.
    refused: Vec<(u64, Op)>,
    /// Tags whose operations failed. They continue at the next turn, so that a device that refuses
    /// everything ends the run with the time and not with a stack overflow.
    idle: Vec<u64>,
}

impl Job {
    pub fn new(bdev: &Bdev, core: usize, settings: &Settings, seed: u64) -> Result<Job, String> {
        let info = bdev.info();
        let name = &info.name;
        let bs = info.block_size as usize;
        if !settings.io_bytes.is_multiple_of(bs) {
            return Err(format!(
                "-o {}: `{name}` has blocks of {bs} bytes",
                settings.io_bytes
            ));
        }
        let io_blocks = (settings.io_bytes / bs) as u64;
        let places = info.num_blocks / io_blocks;
        if places == 0 {
            return Err(format!("-o {}: `{name}` is shorter", settings.io_bytes));
        }
        let need: &[OpKind] = match settings.work {
            Work::ReadWrite(100) => &[OpKind::Read],
            Work::ReadWrite(0) => &[OpKind::Write],
            Work::ReadWrite(_) | Work::Verify => &[OpKind::Read, OpKind::Write],
            Work::Reset => &[OpKind::Reset],
            Work::Unmap => &[OpKind::Unmap],
            Work::Flush => &[OpKind::Flush],
            Work::WriteZeroes => &[OpKind::WriteZeroes],
            Work::Copy => &[OpKind::Copy],
        };
        if let Some(kind) = need.iter().find(|k| !info.ops.has(**k)) {
            return Err(format!(
                "-w {}: `{name}` does not support {kind}",
                settings.name
            ));
        }
        if settings.work == Work::Verify && !info.keeps_data {
            return Err(format!("-w verify: `{name}` does not keep written data"));
        }
        if settings.work == Work::Copy && places < 2 {
            return Err(format!(
                "-w copy -o {}: `{name}` has no room for a second one",
                settings.io_bytes
            ));
        }
        let mut depth = settings.depth;
        if matches!(settings.work, Work::Verify | Work::Copy) {
            // Operations in flight must not overlap.
            depth = depth.min(usize::try_from(places / 2).unwrap_or(usize::MAX).max(1));
        }
        let mut job = Job {
            bdev: bdev.clone(),
            core,
            channel: bdev.open_channel().map_err(|e| e.to_string())?,
            work: settings.work,
            random: settings.random,
            go_on: settings.go_on,
            depth,
            io_blocks,
            io_bytes: settings.io_bytes,
            places,
            next_place: 0,
            rng: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            bufs: Vec::new(),
            data: Vec::new(),
            out: Vec::with_capacity(depth),
            ops: 0,
            failed: 0,
            miscompares: 0,
            first_error: None,
            stopping: false,
            first_io: None,
            refused: Vec::new(),
            idle: Vec::new(),
        };
        job.take_memory()?;
        Ok(job)
    }

    fn take_memory(&mut self) -> Result<(), String> {
        let dma = |e: pumice_bdev::DmaError| e.to_string();
        let (reads, writes) = match self.work {
            Work::ReadWrite(100) => (true, false),
            Work::ReadWrite(0) => (false, true),
            Work::ReadWrite(_) => (true, true),
            Work::Verify => (true, false),
            _ => (false, false),
        };
        for i in 0..self.depth {
            if reads {
                self.bufs.push(DmaBuf::zeroed(self.io_bytes).map_err(dma)?);
            }
            if writes {
                let mut buf = DmaBuf::new(self.io_bytes).map_err(dma)?;
                fill(&mut buf, i as u64 + 1);
                self.data.push(buf.freeze());
            }
        }
        Ok(())
    }

    #[inline]
    fn place(&mut self) -> u64 {
        let place = if self.random {
            self.rng ^= self.rng << 13;
            self.rng ^= self.rng >> 7;
            self.rng ^= self.rng << 17;
            // The high half of the product is evenly distributed and needs no division.
            let product = u128::from(self.rng) * u128::from(self.places);
            u64::try_from(product >> 64).unwrap_or(0)
        } else {
            let place = self.next_place;
            self.next_place = if place + 1 >= self.places {
                0
            } else {
                place + 1
            };
            place
        };
        place * self.io_blocks
    }

    /// Returns the next operation, or `None` when its buffers are gone, which errors may cause.
    #[inline]
    fn next_op(&mut self) -> Option<Op> {
        let lba = self.place();
        let len_blocks = self.io_blocks;
        Some(match self.work {
            Work::ReadWrite(percent) => {
                let read = match percent {
                    100 => true,
                    0 => false,
                    percent => {
                        self.rng ^= self.rng << 13;
                        self.rng ^= self.rng >> 7;
                        self.rng ^= self.rng << 17;
                        (self.rng >> 11) % 100 < percent
                    }
                };
                if read {
                    Op::Read {
                        lba,
                        buf: self.bufs.pop()?,
                    }
                } else {
                    Op::Write {
                        lba,
                        data: self.data.pop()?,
                        fua: false,
                    }
                }
            }
            Work::Verify => {
                let mut buf = self.bufs.pop()?;
                fill(&mut buf, lba + 1);
                Op::Write {
                    lba,
                    data: buf.freeze(),
                    fua: false,
                }
            }
            Work::Reset => Op::Reset,
            Work::Flush => Op::Flush,
            Work::Unmap => Op::Unmap { lba, len_blocks },
            Work::WriteZeroes => Op::WriteZeroes {
                lba,
                len_blocks,
                fua: false,
            },
            Work::Copy => {
                let half = self.places / 2 * self.io_blocks;
                let src_lba = if half == 0 { 0 } else { lba % half };
                Op::Copy {
                    src_lba,
                    dst_lba: src_lba + half,
                    len_blocks,
                }
            }
        })
    }

    #[inline]
    fn submit(&mut self, tag: u64, op: Op) {
        match self.channel.submit(tag, op) {
            Ok(()) => {}
            Err(SubmitError::Busy(op)) => self.refused.push((tag, op)),
            Err(SubmitError::Refused(op, e)) => self.ended(tag, op, Err(e.to_string())),
        }
    }

    #[inline]
    fn next(&mut self, tag: u64) {
        if !self.stopping
            && let Some(op) = self.next_op()
        {
            self.submit(tag, op);
        }
    }

    fn start(&mut self, process_start: Instant) {
        for tag in 0..self.depth as u64 {
            self.next(tag);
            self.first_io.get_or_insert_with(|| process_start.elapsed());
        }
    }

    /// Polls once. Returns whether anything is left.
    #[inline]
    fn turn(&mut self) -> bool {
        let mut out = std::mem::take(&mut self.out);
        self.channel.poll(&mut out);
        for Completion { tag, op, result } in out.drain(..) {
            match (op, result) {
                (Op::Read { buf, .. }, Ok(())) if self.work != Work::Verify => {
                    self.ops += 1;
                    self.bufs.push(buf);
                    self.next(tag);
                }
                (Op::Write { data, .. }, Ok(())) if self.work != Work::Verify => {
                    self.ops += 1;
                    self.data.push(data);
                    self.next(tag);
                }
                (op, result) => self.ended(tag, op, result.map_err(|e| e.to_string())),
            }
        }
        self.out = out;
        if !self.refused.is_empty() {
            for (tag, op) in std::mem::take(&mut self.refused) {
                self.submit(tag, op);
            }
        }
        if !self.idle.is_empty() {
            for tag in std::mem::take(&mut self.idle) {
                self.next(tag);
            }
        }
        let waiting = !self.idle.is_empty() && !self.stopping;
        self.channel.in_flight() > 0 || !self.refused.is_empty() || waiting
    }

    #[cold]
    fn ended(&mut self, tag: u64, op: Op, result: Result<(), String>) {
        let ok = result.is_ok();
        if let Err(e) = result {
            self.failed += 1;
            self.first_error.get_or_insert(e);
            self.stopping |= !self.go_on;
        } else {
            self.ops += 1;
        }
        match op {
            Op::Write { lba, data, .. } if self.work == Work::Verify => {
                // The same buffer reads it back, so nothing written is left in it.
                if let Ok(mut buf) = data.try_into_buf() {
                    buf.fill(0);
                    if ok && !self.stopping {
                        return self.submit(tag, Op::Read { lba, buf });
                    }
                    self.bufs.push(buf);
                }
            }
            Op::Read { lba, mut buf } => {
                if self.work == Work::Verify && ok && !check(&mut buf, lba + 1) {
                    self.miscompares += 1;
                    let name = &self.bdev.info().name;
                    let e = format!("{name}: LBA {lba} does not hold what was written");
                    self.first_error.get_or_insert(e);
                    self.stopping |= !self.go_on;
                }
                self.bufs.push(buf);
            }
            Op::Write { data, .. } => self.data.push(data),
            _ => {}
        }
        if ok {
            self.next(tag);
        } else {
            self.idle.push(tag);
        }
    }
}

/// Fills a buffer with bytes that depend on `seed`.
fn fill(bytes: &mut [u8], seed: u64) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes());
    }
}

/// Returns whether a buffer has the bytes of `seed`.
fn check(bytes: &mut [u8], seed: u64) -> bool {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    bytes.chunks_exact(8).all(|word| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word == x.to_le_bytes()
    })
}

/// Runs the jobs of a core to their end.
pub fn run(
    jobs: &mut [Job],
    settings: &Settings,
    stop: &AtomicBool,
    process_start: Instant,
) -> Vec<Outcome> {
    let start = Instant::now();
    let cpu_start = cpu_ns();
    for job in jobs.iter_mut() {
        job.start(process_start);
    }
    let mut turns = 0_u32;
    loop {
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(256)
            && (start.elapsed() >= settings.time || stop.load(Ordering::Relaxed))
        {
            jobs.iter_mut().for_each(|j| j.stopping = true);
        }
        let mut left = false;
        for job in jobs.iter_mut() {
            left |= job.turn();
        }
        if !left {
            break;
        }
    }
    let runtime = start.elapsed();
    let ops: u64 = jobs.iter().map(|j| j.ops).sum();
    let cpu = cpu_ns().saturating_sub(cpu_start) as f64 / ops.max(1) as f64;
    jobs.iter().map(|job| job.outcome(runtime, cpu)).collect()
}

/// Returns the processor time of this thread in nanoseconds; 0 where the kernel does not report it.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

impl Job {
    fn outcome(&self, runtime: Duration, cpu_ns_per_io: f64) -> Outcome {
        let stats = self.bdev.stats();
        let mut latency = OpStats::default();
        for s in OpKind::ALL.map(|k| *stats.of(k)) {
            latency.ops += s.ops;
            latency.latency_ticks += s.latency_ticks;
            latency.max_latency_ticks = latency.max_latency_ticks.max(s.max_latency_ticks);
            if s.ops > 0 {
                let min = s.min_latency_ticks;
                latency.min_latency_ticks = match latency.min_latency_ticks {
                    0 => min,
                    other => other.min(min),
                };
            }
        }
        Outcome {
            bdev: self.bdev.info().name.clone(),
            core: self.core,
            runtime,
            ops: self.ops,
            failed: self.failed,
            miscompares: self.miscompares,
            first_error: self.first_error.clone(),
            latency,
            first_io: self.first_io.unwrap_or_default(),
            cpu_ns_per_io,
        }
    }
}
