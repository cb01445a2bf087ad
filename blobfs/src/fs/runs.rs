//! What is being read of a file in advance.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pumice_bdev::Ticket;

/// Reads of a file that are on their way to the cache although nobody waits for them yet.
#[derive(Default)]
pub(crate) struct Ahead {
    runs: Mutex<Vec<(Range<u64>, Ticket)>>,
    /// The number of runs, so that a miss of a file without any takes no lock.
    count: AtomicUsize,
}

impl Ahead {
    /// Returns the run in flight that covers `off`, if there is one.
    pub fn covering(&self, off: u64) -> Option<(Range<u64>, Ticket)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut runs = self.runs.lock();
        runs.retain(|(_, ticket)| !ticket.is_done());
        self.count.store(runs.len(), Ordering::Release);
        runs.iter().find(|(run, _)| run.contains(&off)).cloned()
    }

    /// Calls `start` with each part of `range` that is not in flight, cut where `cut` says, and
    /// keeps the tickets that it returns. Ends when `most` bytes are in flight.
    ///
    /// # Errors
    /// Stops at the first error of `start`.
    pub fn fill<E>(
        &self,
        range: Range<u64>,
        cut: u64,
        most: u64,
        mut start: impl FnMut(Range<u64>) -> Result<Option<Ticket>, E>,
    ) -> Result<(), E> {
        let mut runs = self.runs.lock();
        runs.retain(|(_, ticket)| !ticket.is_done());
        let in_flight: u64 = runs.iter().map(|(run, _)| run.end - run.start).sum();
        let mut room = most.saturating_sub(in_flight);
        let mut at = range.start;
        let mut result = Ok(());
        while at < range.end && room > 0 {
            if let Some((run, _)) = runs.iter().find(|(run, _)| run.contains(&at)) {
                at = run.end;
                continue;
            }
            let later = runs.iter().map(|(run, _)| run.start).filter(|s| *s > at);
            let end = later
                .min()
                .unwrap_or(range.end)
                .min(range.end)
                .min((at / cut + 1) * cut)
                .min(at.saturating_add(room));
            match start(at..end) {
                Ok(None) => {}
                Ok(Some(ticket)) => {
                    runs.push((at..end, ticket));
                    room -= end - at;
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
            at = end;
        }
        self.count.store(runs.len(), Ordering::Release);
        result
    }
}
