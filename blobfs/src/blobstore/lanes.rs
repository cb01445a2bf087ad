//! The counters of a gate: who is inside, and whether it is closed. `tests/gate_model.rs` compiles
//! this file again and tries the orders in which threads can take its steps.

use super::sync::{AtomicUsize, Ordering};

/// Number of counters of a gate. Threads are distributed over them.
pub(crate) const LANES: usize = 8;

#[repr(align(128))]
#[derive(Debug, Default)]
struct Lane(AtomicUsize);

/// The counters of a gate.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    /// Number of `shut` calls without `open`.
    closed: AtomicUsize,
    lanes: [Lane; LANES],
}

impl Lanes {
    /// Enters by a lane, unless the gate is closed. Returns whether it did.
    #[inline]
    pub fn enter(&self, lane: usize) -> bool {
        // The entry is counted before the check, with SeqCst on both sides: either the closer sees
        // the count, or the entering thread sees `closed`.
        self.lanes[lane].0.fetch_add(1, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.leave(lane);
        false
    }

    /// Leaves by the lane of the entry.
    #[inline]
    pub fn leave(&self, lane: usize) {
        self.lanes[lane].0.fetch_sub(1, Ordering::Release);
    }

    /// Refuses entries from now on.
    pub fn shut(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    /// Undoes one `shut`. Returns whether the gate is open now.
    pub fn open(&self) -> bool {
        self.closed.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Whether nobody is inside.
    pub fn is_empty(&self) -> bool {
        self.lanes
            .iter()
            .all(|lane| lane.0.load(Ordering::SeqCst) == 0)
    }
}
