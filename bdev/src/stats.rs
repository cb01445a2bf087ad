//! Statistics: counters and latency histograms, written by one channel and read by any thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use pumice_io::OpKind;

/// log2 of the number of buckets for each power of two of a latency, as in SPDK's histograms
/// (include/spdk/histogram_data.h), so that SPDK's scripts can read ours.
pub const BUCKET_SHIFT: u32 = 7;
const RANGES: usize = 64 - BUCKET_SHIFT as usize + 1;
/// Number of buckets.
pub const BUCKETS: usize = RANGES << BUCKET_SHIFT;

/// Counters of one kind of operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpStats {
    /// Number of operations that ended.
    pub ops: u64,
    /// Bytes of the operations that succeeded.
    pub bytes: u64,
    /// Number of operations that failed.
    pub errors: u64,
    /// Sum of latencies, in ticks of [`pumice_io::sys::Clock`].
    pub latency_ticks: u64,
    /// Shortest latency; 0 without any operation.
    pub min_latency_ticks: u64,
    /// Longest latency.
    pub max_latency_ticks: u64,
}

impl OpStats {
    fn add(&mut self, other: &OpStats) {
        let mins = [self.min_latency_ticks, other.min_latency_ticks];
        self.min_latency_ticks = mins.into_iter().filter(|m| *m > 0).min().unwrap_or(0);
        self.max_latency_ticks = self.max_latency_ticks.max(other.max_latency_ticks);
        self.ops += other.ops;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.latency_ticks += other.latency_ticks;
    }
}

/// Counters of a channel or of a device, by kind of operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    kinds: [OpStats; OpKind::ALL.len()],
}

impl Stats {
    /// The counters of one kind.
    pub fn of(&self, kind: OpKind) -> &OpStats {
        &self.kinds[kind as usize]
    }

    /// Clears the shortest and longest latencies.
    pub(crate) fn clear_extremes(&mut self) {
        for kind in &mut self.kinds {
            (kind.min_latency_ticks, kind.max_latency_ticks) = (0, 0);
        }
    }

    /// Subtracts earlier counts. The shortest and longest latencies stay.
    pub(crate) fn subtract(&mut self, earlier: &Stats) {
        for (a, b) in self.kinds.iter_mut().zip(&earlier.kinds) {
            a.ops -= b.ops.min(a.ops);
            a.bytes -= b.bytes.min(a.bytes);
            a.errors -= b.errors.min(a.errors);
            a.latency_ticks -= b.latency_ticks.min(a.latency_ticks);
        }
    }

    /// Adds other counters to these.
    pub fn add(&mut self, other: &Stats) {
        for (a, b) in self.kinds.iter_mut().zip(&other.kinds) {
            a.add(b);
        }
    }
}

#[derive(Debug, Default)]
struct Cell {
    ops: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: AtomicU64,
    min: AtomicU64,
    max: AtomicU64,
}

/// The counters of a channel. Only one thread writes, so additions need no locked instruction.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct ChannelStats {
    kinds: [Cell; OpKind::ALL.len()],
    histogram: OnceLock<Box<[AtomicU64]>>,
    histogram_on: AtomicBool,
    /// The kind of operation that the histogram counts, as a number; `ALL_KINDS`: all.
    histogram_kind: AtomicU8,
    /// The channel's number, unique for its device.
    pub(crate) id: u64,
    /// The name of the thread that opened the channel.
    opened_by: String,
    in_flight: AtomicU64,
}

/// The queue of an open channel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Queue {
    /// The channel's number, unique for its device.
    pub id: u64,
    /// The name of the thread that opened the channel; empty if it has none. Other threads may share the channel.
    pub opened_by: String,
    /// The number of operations in flight.
    pub in_flight: u64,
}

const ALL_KINDS: u8 = u8::MAX;

#[inline]
fn bump(cell: &AtomicU64, by: u64) {
    cell.store(
        cell.load(Ordering::Relaxed).wrapping_add(by),
        Ordering::Relaxed,
    );
}

impl ChannelStats {
    pub(crate) fn new(id: u64) -> ChannelStats {
        ChannelStats {
            kinds: Default::default(),
            histogram: OnceLock::new(),
            histogram_on: AtomicBool::new(false),
            histogram_kind: AtomicU8::new(ALL_KINDS),
            id,
            opened_by: std::thread::current().name().unwrap_or_default().to_owned(),
            in_flight: AtomicU64::new(0),
        }
    }

    /// Notes the number of operations in flight. Only the channel's own thread may call it.
    #[inline]
    pub(crate) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn queue(&self) -> Queue {
        Queue {
            id: self.id,
            opened_by: self.opened_by.clone(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
        }
    }

    /// Switches the histogram, which is empty when it is switched on.
    pub(crate) fn set_histogram(&self, on: bool, only: Option<OpKind>) {
        let kind = only.map_or(ALL_KINDS, |k| k as u8);
        self.histogram_kind.store(kind, Ordering::Relaxed);
        if on && !self.histogram_on.load(Ordering::Relaxed) {
            for bucket in self.histogram.get().into_iter().flatten() {
                bucket.store(0, Ordering::Relaxed);
            }
        }
        self.histogram_on.store(on, Ordering::Relaxed);
    }

    /// Clears the shortest and longest latencies. Any thread may call it: at worst the channel
    /// misses one operation, or keeps one that ends at this moment.
    pub(crate) fn clear_extremes(&self) {
        for cell in &self.kinds {
            cell.min.store(0, Ordering::Relaxed);
            cell.max.store(0, Ordering::Relaxed);
        }
    }

    /// Counts an operation. Only the channel's own thread may call it.
    #[inline]
    pub(crate) fn record(&self, kind: OpKind, bytes: u64, ok: bool, latency: u64) {
        let cell = &self.kinds[kind as usize];
        bump(&cell.ops, 1);
        if ok {
            bump(&cell.bytes, bytes);
        } else {
            bump(&cell.errors, 1);
        }
        bump(&cell.latency, latency);
        if latency > cell.max.load(Ordering::Relaxed) {
            cell.max.store(latency, Ordering::Relaxed);
        }
        let min = cell.min.load(Ordering::Relaxed);
        if latency < min || min == 0 {
            cell.min.store(latency.max(1), Ordering::Relaxed);
        }
        if self.histogram_on.load(Ordering::Relaxed) {
            self.tally(kind, latency);
        }
    }

    #[cold]
    fn tally(&self, kind: OpKind, latency: u64) {
        let only = self.histogram_kind.load(Ordering::Relaxed);
        if only != ALL_KINDS && only != kind as u8 {
            return;
        }
        let fresh = || (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        if let Some(bucket) = self.histogram.get_or_init(fresh).get(bucket_of(latency)) {
            bump(bucket, 1);
        }
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let mut stats = Stats::default();
        for (to, from) in stats.kinds.iter_mut().zip(&self.kinds) {
            *to = OpStats {
                ops: from.ops.load(Ordering::Relaxed),
                bytes: from.bytes.load(Ordering::Relaxed),
                errors: from.errors.load(Ordering::Relaxed),
                latency_ticks: from.latency.load(Ordering::Relaxed),
                min_latency_ticks: from.min.load(Ordering::Relaxed),
                max_latency_ticks: from.max.load(Ordering::Relaxed),
            };
        }
        stats
    }

    pub(crate) fn add_histogram_to(&self, buckets: &mut [u64]) {
        for (to, from) in buckets
            .iter_mut()
            .zip(self.histogram.get().into_iter().flatten())
        {
            *to += from.load(Ordering::Relaxed);
        }
    }
}

/// Returns the bucket of a latency.
#[expect(
    clippy::cast_possible_truncation,
    reason = "masked to the bucket's bits"
)]
fn bucket_of(latency: u64) -> usize {
    let lsb = 64 - BUCKET_SHIFT;
    let range = lsb.saturating_sub(latency.leading_zeros());
    let shift = range.saturating_sub(1);
    let mask = (1 << BUCKET_SHIFT) - 1;
    ((range as usize) << BUCKET_SHIFT) + ((latency >> shift) as usize & mask)
}

/// Returns the upper end of a bucket, in ticks.
pub fn bucket_end(bucket: usize) -> u64 {
    let range = bucket >> BUCKET_SHIFT;
    let index = (bucket & ((1 << BUCKET_SHIFT) - 1)) as u64;
    if range == 0 {
        return index + 1;
    }
    let base = (index | 1 << BUCKET_SHIFT) + 1;
    let end = u128::from(base) << (range - 1);
    u64::try_from(end).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_values() {
        let mut last = 0;
        for exponent in 0..64 {
            for low in [0, 1, 5] {
                let value = (1_u64 << exponent).saturating_add(low << exponent >> 4);
                let bucket = bucket_of(value);
                assert!(bucket < BUCKETS && bucket >= last, "{value}");
                last = bucket;
                assert!(
                    value < bucket_end(bucket) || bucket_end(bucket) == u64::MAX,
                    "{value}"
                );
                assert!(bucket == 0 || bucket_end(bucket - 1) <= value, "{value}");
            }
        }
        assert_eq!(bucket_of(0), 0);
    }

    #[test]
    fn counters_add_up() {
        let a = ChannelStats::new(1);
        a.record(OpKind::Read, 512, true, 10);
        a.record(OpKind::Read, 512, false, 30);
        let mut sum = a.snapshot();
        sum.add(&a.snapshot());
        let reads = *sum.of(OpKind::Read);
        assert_eq!((reads.ops, reads.bytes, reads.errors), (4, 1024, 2));
        assert_eq!(
            (
                reads.latency_ticks,
                reads.min_latency_ticks,
                reads.max_latency_ticks
            ),
            (80, 10, 30)
        );
    }

    #[test]
    fn what_was_before_is_not_counted_again() {
        let a = ChannelStats::new(1);
        a.record(OpKind::Write, 512, true, 10);
        a.record(OpKind::Write, 512, false, 20);
        let earlier = a.snapshot();
        a.record(OpKind::Write, 1024, true, 5);
        a.record(OpKind::Write, 512, false, 40);
        let mut later = a.snapshot();
        later.subtract(&earlier);
        let w = *later.of(OpKind::Write);
        assert_eq!(
            (w.ops, w.bytes, w.errors, w.latency_ticks),
            (2, 1024, 1, 45)
        );
        assert_eq!((w.min_latency_ticks, w.max_latency_ticks), (5, 40));
        later.clear_extremes();
        let w = *later.of(OpKind::Write);
        assert_eq!((w.ops, w.min_latency_ticks, w.max_latency_ticks), (2, 0, 0));
    }

    #[test]
    fn the_extremes_begin_anew() {
        let a = ChannelStats::new(1);
        let extremes = |a: &ChannelStats| {
            let reads = *a.snapshot().of(OpKind::Read);
            (reads.min_latency_ticks, reads.max_latency_ticks)
        };
        a.record(OpKind::Read, 512, true, 10);
        a.record(OpKind::Read, 512, true, 30);
        a.record(OpKind::Read, 512, true, 20);
        assert_eq!(extremes(&a), (10, 30));
        a.clear_extremes();
        assert_eq!(extremes(&a), (0, 0));
        // A latency of no tick is one, since 0 says that there was none.
        a.record(OpKind::Read, 512, true, 0);
        a.record(OpKind::Read, 512, true, 15);
        assert_eq!(extremes(&a), (1, 15));
        // A sum takes the least and the greatest of both, and nothing of a channel that did nothing.
        let mut sum = ChannelStats::new(2).snapshot();
        sum.add(&a.snapshot());
        sum.add(&ChannelStats::new(3).snapshot());
        let reads = sum.of(OpKind::Read);
        assert_eq!((reads.min_latency_ticks, reads.max_latency_ticks), (1, 15));
    }

    #[test]
    fn a_histogram_counts_its_kind_and_starts_empty() {
        let a = ChannelStats::new(1);
        let count = |a: &ChannelStats| {
            let mut buckets = vec![0; BUCKETS];
            a.add_histogram_to(&mut buckets);
            buckets.iter().sum::<u64>()
        };
        a.set_histogram(true, Some(OpKind::Read));
        a.record(OpKind::Write, 512, true, 10);
        a.record(OpKind::Read, 512, true, 10);
        assert_eq!(count(&a), 1);
        // Switched on once more, it goes on.
        a.set_histogram(true, None);
        a.record(OpKind::Write, 512, true, 10);
        assert_eq!(count(&a), 2);
        a.set_histogram(false, None);
        a.record(OpKind::Write, 512, true, 10);
        assert_eq!(count(&a), 2);
        a.set_histogram(true, None);
        assert_eq!(count(&a), 0);
    }
}
