//! `delay`: a device with added latency, to test the layers above with a slow device.
//!
//! One operation in a hundred takes the tail latency and the others the mean. Both include the time
//! of the device below.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pumice_io::{Completion, Op, OpKind, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::slots::Slots;

/// Shorter waits are spun, because the kernel would sleep too long.
const SPIN_MAX: Duration = Duration::from_micros(60);

/// Latencies of a device in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latencies {
    /// Latency of most reads.
    pub avg_read_us: u64,
    /// Latency of one read in a hundred.
    pub p99_read_us: u64,
    /// Latency of most writes and other operations that change the device.
    pub avg_write_us: u64,
    /// Latency of one write in a hundred.
    pub p99_write_us: u64,
}

pumice_io::setters!(const Latencies: avg_read_us: u64, p99_read_us: u64, avg_write_us: u64, p99_write_us: u64);

/// A device with configurable latencies, which can be changed while it is in use.
#[derive(Debug)]
pub struct Delay {
    info: DeviceInfo,
    base: Arc<dyn BlockDevice>,
    latencies: Arc<SharedLatencies>,
}

#[derive(Debug, Default)]
struct SharedLatencies {
    avg_read_us: AtomicU64,
    p99_read_us: AtomicU64,
    avg_write_us: AtomicU64,
    p99_write_us: AtomicU64,
}

impl Delay {
    /// Puts the device `name` on top of `base`.
    pub fn new(name: &str, base: Arc<dyn BlockDevice>, latencies: Latencies) -> Delay {
        let mut info = base.info().clone();
        name.clone_into(&mut info.name);
        info.aliases.clear();
        info.module = "delay";
        "delay".clone_into(&mut info.product);
        info.uuid = crate::uuid::derived(format!("{name} on {:?}", base.info().uuid).as_bytes());
        let delay = Delay {
            info,
            base,
            latencies: Arc::default(),
        };
        delay.set_latencies(latencies);
        delay
    }

    /// Sets a UUID in place of the one derived from the name and the base.
    #[must_use]
    pub fn with_uuid(mut self, uuid: [u8; 16]) -> Delay {
        self.info.uuid = uuid;
        self
    }

    /// Changes the latencies of operations submitted from now on.
    pub fn set_latencies(&self, latencies: Latencies) {
        let SharedLatencies {
            avg_read_us,
            p99_read_us,
            avg_write_us,
            p99_write_us,
        } = &*self.latencies;
        avg_read_us.store(latencies.avg_read_us, Ordering::Relaxed);
        p99_read_us.store(latencies.p99_read_us, Ordering::Relaxed);
        avg_write_us.store(latencies.avg_write_us, Ordering::Relaxed);
        p99_write_us.store(latencies.p99_write_us, Ordering::Relaxed);
    }

    /// Returns the current latencies.
    pub fn latencies(&self) -> Latencies {
        let SharedLatencies {
            avg_read_us,
            p99_read_us,
            avg_write_us,
            p99_write_us,
        } = &*self.latencies;
        Latencies {
            avg_read_us: avg_read_us.load(Ordering::Relaxed),
            p99_read_us: p99_read_us.load(Ordering::Relaxed),
            avg_write_us: avg_write_us.load(Ordering::Relaxed),
            p99_write_us: p99_write_us.load(Ordering::Relaxed),
        }
    }
}

impl BlockDevice for Delay {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.base)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let base = self.base.open_channel()?;
        Ok(Box::new(DelayChannel::new(base, &self.latencies)))
    }

    fn driver_specific(&self) -> serde_json::Value {
        let l = self.latencies();
        serde_json::json!({ "delay": {
            "name": self.info.name,
            "base_bdev_name": self.base.info().name,
            "avg_read_latency": l.avg_read_us,
            "p99_read_latency": l.p99_read_us,
            "avg_write_latency": l.avg_write_us,
            "p99_write_latency": l.p99_write_us,
        } })
    }
}

struct DelayChannel {
    base: Box<dyn IoChannel>,
    latencies: Arc<SharedLatencies>,
    /// Operations that the device below has.
    below: Slots<Below>,
    /// Operations that have ended below and wait for their time.
    held: Vec<(Instant, Completion)>,
    reaped: Vec<Completion>,
    /// Counts of reads and of writes. Each kind has its own tail, however they alternate.
    reads: u64,
    writes: u64,
}

struct Below {
    /// The submitter's tag.
    tag: u64,
    due: Instant,
    /// The submitter's tag of the operation that an abort aborts.
    target: Option<u64>,
}

impl DelayChannel {
    fn new(base: Box<dyn IoChannel>, latencies: &Arc<SharedLatencies>) -> DelayChannel {
        DelayChannel {
            base,
            latencies: Arc::clone(latencies),
            below: Slots::default(),
            held: Vec::new(),
            reaped: Vec::new(),
            reads: 0,
            writes: 0,
        }
    }

    fn latency(&mut self, kind: OpKind) -> Duration {
        let l = &self.latencies;
        let (avg, p99, count) = match kind {
            OpKind::Reset | OpKind::Abort => return Duration::ZERO,
            OpKind::Read | OpKind::Compare => (&l.avg_read_us, &l.p99_read_us, &mut self.reads),
            _ => (&l.avg_write_us, &l.p99_write_us, &mut self.writes),
        };
        *count += 1;
        let tail = count.is_multiple_of(100);
        let us = if tail { p99 } else { avg }.load(Ordering::Relaxed);
        Duration::from_micros(us)
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let mut given = 0;
        self.base.poll(&mut self.reaped);
        let now = if self.reaped.is_empty() && self.held.is_empty() {
            return 0;
        } else {
            Instant::now()
        };
        for mut completion in self.reaped.drain(..) {
            let Some(Below { tag, due, target }) = self.below.remove(completion.tag) else {
                continue;
            };
            completion.tag = tag;
            completion.op.set_abort_target(target);
            if let Op::Reset = completion.op {
                // Delayed operations ended below before the reset: they complete before it.
                given += self.held.len();
                out.extend(self.held.drain(..).map(|(_, c)| c));
            }
            if due <= now {
                out.push(completion);
                given += 1;
            } else {
                self.held.push((due, completion));
            }
        }
        let mut i = 0;
        while let Some((due, _)) = self.held.get(i) {
            if *due <= now {
                out.push(self.held.swap_remove(i).1);
                given += 1;
            } else {
                i += 1;
            }
        }
        given
    }
}

impl IoChannel for DelayChannel {
    fn submit(&mut self, tag: u64, mut op: Op) -> Result<(), SubmitError> {
        let counts = (self.reads, self.writes);
        let due = Instant::now() + self.latency(op.kind());
        let target = op.abort_target();
        if let Some(target) = target {
            let found = self.below.iter().find(|(_, b)| b.tag == target);
            op.set_abort_target(Some(found.map_or(u64::MAX, |(below, _)| below)));
        }
        let below = self.below.insert(Below { tag, due, target });
        let result = self.base.submit(below, op);
        result.map_err(|mut e| {
            self.below.remove(below);
            // It will be submitted again and has to keep its place in the tail.
            (self.reads, self.writes) = counts;
            e.op_mut().set_abort_target(target);
            e
        })
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.reap(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        let now = Instant::now();
        let next = self
            .held
            .iter()
            .map(|(due, _)| due.saturating_duration_since(now))
            .min();
        let sleep = next.map_or(timeout, |n| n.min(timeout));
        if self.base.in_flight() > 0 {
            // The base may complete at once, and its operation is then delayed: only poll finds
            // out.
            return self.base.wait(sleep);
        }
        if next.is_none() {
            return Ok(());
        }
        if sleep > SPIN_MAX {
            thread::sleep(sleep - SPIN_MAX);
        }
        while now.elapsed() < sleep {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.below.len() + self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DmaBuf;
    use crate::null::Null;

    /// Otherwise a full device would have its submitters try again until none of them met the tail.
    #[test]
    fn what_found_no_room_does_not_count() {
        let null = Null::new(None, 512, 8, None).unwrap();
        let mut channel = DelayChannel::new(null.open_channel().unwrap(), &Arc::default());
        let mut accepted = 0;
        while channel.submit(accepted, Op::Flush).is_ok() {
            accepted += 1;
            assert!(accepted < 100_000);
        }
        let read = Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).unwrap(),
        };
        assert!(matches!(
            channel.submit(7, read),
            Err(SubmitError::Busy(Op::Read { .. }))
        ));
        assert_eq!((channel.reads, channel.writes), (0, accepted));
        assert_eq!(channel.below.len() as u64, accepted);
    }
}
