//! What keeps a frame in memory: writes of its bytes that have not arrived. `tests/pins_model.rs` compiles this
//! file a second time and tries the orders in which threads can see its steps.

use super::primitives::{AtomicUsize, Ordering};

/// Writes that must arrive before a frame may leave memory, and one more while it is appended to.
#[derive(Debug)]
pub(crate) struct Pins(AtomicUsize);

impl Pins {
    /// None, or the first.
    pub fn new(first: bool) -> Pins {
        Pins(AtomicUsize::new(usize::from(first)))
    }

    /// One more; whoever calls it holds one already, or has the frame for itself.
    pub fn hold(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// One less. True for the one that was the last: it sees all that was done under the others.
    ///
    /// # Panics
    /// There was none.
    pub fn release(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a frame was released that nobody held");
        before == 1
    }

    /// Whether there is one.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }
}
