//! Counts of writes that keep a frame in memory because they have not completed.
//! `tests/pins_model.rs` compiles this file a second time and tries the orders in which threads can
//! see its steps.

use super::primitives::{AtomicUsize, Ordering};

/// Number of writes that must complete before a frame may be evicted, plus one while it is appended
/// to.
#[derive(Debug)]
pub(crate) struct Pins(AtomicUsize);

impl Pins {
    /// Makes a count of 1 if `first`, else of 0.
    pub fn new(first: bool) -> Pins {
        Pins(AtomicUsize::new(usize::from(first)))
    }

    /// Adds one. The caller holds one already, or nobody else has the frame.
    pub fn hold(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Subtracts one. Returns `true` for the last one, which sees everything that was done under
    /// the others.
    ///
    /// # Panics
    /// Panics if the count is 0.
    pub fn release(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a frame was released that nobody held");
        before == 1
    }

    /// Whether the count is not 0.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }
}
