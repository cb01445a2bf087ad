//! The device as the file system and its blobstore use it, with every operation counted and every
//! failed flush recorded.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoError, Op, OpKind, SubmitError,
};

use super::durable::Durability;

/// Operations sent to the device since the mount, including those of the metadata.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoStats {
    /// Number of read operations.
    pub reads: u64,
    /// Number of bytes read.
    pub read_bytes: u64,
    /// Number of write operations.
    pub writes: u64,
    /// Number of write operations with force unit access.
    pub fua_writes: u64,
    /// Number of bytes written.
    pub written_bytes: u64,
    /// Number of flushes.
    pub flushes: u64,
    /// Number of write-zeroes operations.
    pub write_zeroes: u64,
    /// Number of unmaps.
    pub unmaps: u64,
}

impl IoStats {
    /// Returns the difference to an earlier snapshot. Where that one is not earlier, because the
    /// counters began again with another mount, the difference is 0.
    #[must_use]
    pub fn since(&self, earlier: &IoStats) -> IoStats {
        IoStats {
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            writes: self.writes.saturating_sub(earlier.writes),
            fua_writes: self.fua_writes.saturating_sub(earlier.fua_writes),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
            flushes: self.flushes.saturating_sub(earlier.flushes),
            write_zeroes: self.write_zeroes.saturating_sub(earlier.write_zeroes),
            unmaps: self.unmaps.saturating_sub(earlier.unmaps),
        }
    }
}

/// The counters of one channel. Only that channel adds to them, so there is no contention.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    fua_writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    write_zeroes: AtomicU64,
    unmaps: AtomicU64,
}

impl Counters {
    fn add_to(&self, sum: &mut IoStats) {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        sum.reads += get(&self.reads);
        sum.read_bytes += get(&self.read_bytes);
        sum.writes += get(&self.writes);
        sum.fua_writes += get(&self.fua_writes);
        sum.written_bytes += get(&self.written_bytes);
        sum.flushes += get(&self.flushes);
        sum.write_zeroes += get(&self.write_zeroes);
        sum.unmaps += get(&self.unmaps);
    }
}

#[derive(Debug, Default)]
struct All {
    live: Vec<Arc<CachePadded<Counters>>>,
    /// Sums of the dropped channels.
    past: IoStats,
}

/// A device that counts; see the module.
#[derive(Debug)]
pub(crate) struct Metered {
    info: DeviceInfo,
    /// The only reference of a mount to the device, which the unmount drops.
    identity: usize,
    inner: parking_lot::Mutex<Option<Arc<dyn BlockDevice>>>,
    durability: Arc<Durability>,
    all: parking_lot::Mutex<All>,
}

impl Metered {
    pub fn new(inner: Arc<dyn BlockDevice>, durability: Arc<Durability>) -> Arc<Metered> {
        Arc::new(Metered {
            identity: inner.identity(),
            info: inner.info().clone(),
            inner: parking_lot::Mutex::new(Some(inner)),
            durability,
            all: parking_lot::Mutex::default(),
        })
    }

    /// Releases the device: no channel can be opened from now on. Open ones keep it.
    pub fn release(&self) {
        let device = self.inner.lock().take();
        drop(device);
    }

    pub fn stats(&self) -> IoStats {
        let mut all = self.all.lock();
        let mut past = all.past;
        // A channel whose counters have no other reference was dropped.
        all.live.retain(|c| {
            let live = Arc::strong_count(c) > 1;
            if !live {
                c.add_to(&mut past);
            }
            live
        });
        all.past = past;
        let mut sum = past;
        for c in &all.live {
            c.add_to(&mut sum);
        }
        sum
    }
}

impl BlockDevice for Metered {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn host_space(&self) -> Option<pumice_bdev::HostSpace> {
        self.inner.lock().as_ref()?.host_space()
    }

    fn host_name(&self) -> Option<String> {
        self.inner.lock().as_ref()?.host_name()
    }

    fn identity(&self) -> usize {
        self.identity
    }

    fn own_channels(&self) -> Option<usize> {
        self.inner.lock().as_ref()?.own_channels()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let device = self.inner.lock().clone();
        let inner = device
            .ok_or_else(|| BdevError::Removed {
                name: self.info.name.clone(),
            })?
            .open_channel()?;
        let counters = Arc::<CachePadded<Counters>>::default();
        self.all.lock().live.push(Arc::clone(&counters));
        let block_size = self.info().block_size;
        Ok(Box::new(MeteredChannel {
            inner,
            counters,
            durability: Arc::clone(&self.durability),
            block_size,
        }))
    }
}

struct MeteredChannel {
    inner: Box<dyn IoChannel>,
    counters: Arc<CachePadded<Counters>>,
    durability: Arc<Durability>,
    block_size: u32,
}

impl MeteredChannel {
    /// A transient error means that the flush was not carried out, and its sender tries again.
    fn flush_failed(&self, error: &IoError) {
        if !error.is_retryable() {
            self.durability.flush_failed(error);
        }
    }
}

impl IoChannel for MeteredChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let (kind, bytes, fua) = (op.kind(), op.len_bytes(self.block_size), op.fua());
        if let Err(e) = self.inner.submit(tag, op) {
            if let SubmitError::Refused(Op::Flush, error) = &e {
                self.flush_failed(error);
            }
            return Err(e);
        }
        // There is one writer, so a plain addition would do, but others read the sum.
        let add = |c: &AtomicU64, n: u64| c.store(c.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        let c = &self.counters;
        match kind {
            OpKind::Read => {
                add(&c.reads, 1);
                add(&c.read_bytes, bytes);
            }
            OpKind::Write => {
                add(&c.writes, 1);
                add(&c.written_bytes, bytes);
                add(&c.fua_writes, u64::from(fua));
            }
            OpKind::Flush => add(&c.flushes, 1),
            OpKind::WriteZeroes => add(&c.write_zeroes, 1),
            OpKind::Unmap => add(&c.unmaps, 1),
            _ => {}
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let first = out.len();
        let n = self.inner.poll(out);
        for c in &out[first..] {
            if let (Op::Flush, Err(error)) = (&c.op, &c.result) {
                self.flush_failed(error);
            }
        }
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.inner.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_began_again_give_no_difference() {
        let earlier = IoStats {
            reads: 7,
            writes: 1,
            ..IoStats::default()
        };
        let now = IoStats {
            reads: 2,
            writes: 3,
            ..IoStats::default()
        };
        let since = now.since(&earlier);
        assert_eq!((since.reads, since.writes), (0, 2));
    }
}
