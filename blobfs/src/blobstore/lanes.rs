//! The counters of a gate: who is inside, and whether it is closed. `tests/gate_model.rs` compiles this file a
//! second time and tries the orders in which threads can take its steps.

use super::sync::{AtomicUsize, Ordering};

/// Counters of a gate; threads are spread over them.
pub(crate) const LANES: usize = 8;

#[repr(align(128))]
#[derive(Debug, Default)]
struct Lane(AtomicUsize);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    /// By how many it is closed.
    closed: AtomicUsize,
    lanes: [Lane; LANES],
}

impl Lanes {
    /// Enters by a lane, unless it is closed.
    #[inline]
    pub fn enter(&self, lane: usize) -> bool {
        // First counted, then looked, SeqCst on both sides: either the closer sees the count, or the one who
        // enters sees `closed`.
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

    /// Lets nobody in any more.
    pub fn shut(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes one `shut` back. True if it is open now.
    pub fn open(&self) -> bool {
        self.closed.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Is nobody inside?
    pub fn is_empty(&self) -> bool {
        self.lanes
            .iter()
            .all(|lane| lane.0.load(Ordering::SeqCst) == 0)
    }
}
