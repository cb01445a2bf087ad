//! What is durable on the device, and what is in doubt after a failed flush.
//!
//! Completed writes without FUA are numbered. A flush covers those up to the number that was
//! reached when it was sent. After a failed flush, the device may have dropped what the flush was
//! to cover, and a later successful flush says nothing about it: those numbers stay in doubt. The
//! failed flush may be of data or of metadata: [`super::metered`] sees them all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use pumice_bdev::IoError;

use super::error::FsError;
use super::flushes::Flushes;
use super::unflushed::Seqs;

/// Most failed flushes that are distinguished. Older ones become one.
const DOUBTS_MAX: usize = 64;

/// Writes with sequences above `after` and up to `upto` were in the device's cache when a flush
/// failed.
struct Doubt {
    after: u64,
    upto: u64,
    error: FsError,
}

/// Number of failed flushes when a write was sent; see [`Durability::begin`].
#[derive(Clone, Copy)]
pub(crate) struct Begun(u64);

/// A write that has completed.
#[derive(Clone, Copy, Default)]
pub(crate) struct Landed {
    /// The sequence that a flush has to cover, or 0 if none has to.
    pub seq: u64,
    /// The last sequence that was in doubt then.
    pub doubtful: u64,
}

/// The counters of completed writes; see the module. They are separate from the mount, so that
/// completions do not keep it alive.
pub(crate) struct Durability {
    /// Whether the device has a volatile write cache. Otherwise completed writes are durable.
    volatile: bool,
    /// Number of bytes of writes that have not completed.
    pub in_flight: AtomicUsize,
    pub flushes: Flushes,
    failures: AtomicU64,
    doubts: Mutex<Vec<Doubt>>,
}

impl std::fmt::Debug for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Durability({:?})", self.flushes)
    }
}

impl Durability {
    pub fn new(volatile: bool) -> Durability {
        Durability {
            volatile,
            in_flight: AtomicUsize::new(0),
            flushes: Flushes::default(),
            failures: AtomicU64::new(0),
            doubts: Mutex::default(),
        }
    }

    /// Records that a write without FUA is about to be sent.
    pub fn begin(&self) -> Begun {
        Begun(self.failures.load(Ordering::Acquire))
    }

    /// Records that the write has completed.
    pub fn completed(&self, begun: Begun) -> Landed {
        if !self.volatile {
            return Landed::default();
        }
        let mut doubts = self.doubts.lock();
        let seq = self.flushes.completed();
        // A flush failed while the write was in flight, so the write may have been in the cache
        // already.
        if self.failures.load(Ordering::Acquire) != begun.0
            && let Some(error) = doubts.last().map(|d| d.error.clone())
        {
            push(&mut doubts, seq - 1, seq, error);
        }
        let doubtful = doubts.last().map_or(0, |d| d.upto);
        Landed { seq, doubtful }
    }

    /// Records that a flush has failed.
    pub fn flush_failed(&self, error: &IoError) {
        if self.volatile {
            let mut doubts = self.doubts.lock();
            self.failures.fetch_add(1, Ordering::AcqRel);
            let (covered, reached) = (self.flushes.covered(), self.flushes.reached());
            push(&mut doubts, covered, reached, lost(error));
        }
    }

    /// Returns the reason why writes with these sequences may be lost, if a flush of one of them
    /// has failed.
    pub fn doubt(&self, seqs: &Seqs) -> Option<FsError> {
        let doubts = self.doubts.lock();
        let d = doubts
            .iter()
            .find(|d| *seqs.start() <= d.upto && *seqs.end() > d.after)?;
        Some(d.error.clone())
    }
}

/// Returns the error of a failed flush for those who needed it.
pub(crate) fn lost(error: &IoError) -> FsError {
    FsError::Io {
        context: "flush".to_owned(),
        source: Arc::new(error.clone()),
        data_loss: true,
    }
}

fn push(doubts: &mut Vec<Doubt>, after: u64, upto: u64, error: FsError) {
    let full = doubts.len() >= DOUBTS_MAX;
    match doubts.last_mut() {
        Some(last) if last.upto == after || full => {
            last.after = last.after.min(after);
            last.upto = last.upto.max(upto);
            last.error = error;
        }
        _ => doubts.push(Doubt { after, upto, error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pumice_bdev::{IoErrorKind, Op};

    fn failed(d: &Durability) {
        let info = pumice_bdev::open("malloc://1M").unwrap();
        let e = info.info().error(&Op::Flush, IoErrorKind::Media, "test");
        d.flush_failed(&e);
    }

    fn covered(d: &Durability) {
        let sent = || Ok::<(), ()>(());
        d.flushes.cover(d.flushes.reached(), sent).unwrap();
    }

    #[test]
    fn a_failed_flush_is_not_made_good_by_a_later_one() {
        let d = Durability::new(true);
        let one = d.completed(d.begin()).seq;
        covered(&d);
        let two = d.completed(d.begin()).seq;
        let sent_before = d.begin();
        failed(&d);
        let three = d.completed(d.begin()).seq;
        covered(&d);
        assert!(d.doubt(&(one..=one)).is_none());
        assert!(d.doubt(&(two..=two)).is_some_and(|e| e.is_data_loss()));
        assert!(d.doubt(&(three..=three)).is_none());
        let late = d.completed(sent_before).seq;
        assert!(d.doubt(&(late..=late)).is_some(), "it was on its way");
        assert!(d.doubt(&(three..=late)).is_some());
        assert_eq!(Durability::new(false).completed(sent_before).seq, 0);
    }

    /// The oldest of many failed flushes is not forgotten: those that are no longer told apart stay in doubt together.
    #[test]
    fn many_failed_flushes_leave_each_write_in_doubt() {
        let d = Durability::new(true);
        let mut written = Vec::new();
        for _ in 0..2 * DOUBTS_MAX {
            // One between them is not in doubt, so that the doubts do not follow one another.
            d.completed(d.begin());
            covered(&d);
            written.push(d.completed(d.begin()).seq);
            failed(&d);
            covered(&d);
        }
        for seq in written {
            assert!(d.doubt(&(seq..=seq)).is_some(), "{seq}");
        }
    }
}
