//! Which completed writes a flush has covered. `tests/flush_model.rs` compiles this file a second
//! time and tries the orders in which threads can take its steps.

use super::primitives::{AtomicU64, Mutex, Ordering};

/// Numbers completed writes. A flush covers those up to the number that was reached when it was
/// sent.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    reached: AtomicU64,
    covered: AtomicU64,
    /// Allows one flush at a time. Those who wait for it are usually served by the flush before.
    one: Mutex<()>,
}

impl Flushes {
    /// Records that a write has completed, and returns its number.
    pub fn completed(&self) -> u64 {
        self.reached.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Returns the largest number, which a flush that is sent from now on covers.
    pub fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    /// Returns the largest number that a flush has covered.
    pub fn covered(&self) -> u64 {
        self.covered.load(Ordering::Acquire)
    }

    /// Makes sure that the writes up to `seq` are covered. `send` flushes the device. Threads that
    /// come meanwhile share the flushes.
    ///
    /// # Errors
    /// Fails when `send` does.
    pub fn cover<E>(&self, seq: u64, send: impl Fn() -> Result<(), E>) -> Result<(), E> {
        while self.covered() < seq {
            let _one = self.one.lock();
            if self.covered() >= seq {
                return Ok(());
            }
            // This is read before the flush is sent, because what completes while the flush is in
            // flight may not be covered.
            let upto = self.reached();
            send()?;
            self.covered.fetch_max(upto, Ordering::AcqRel);
        }
        Ok(())
    }
}
