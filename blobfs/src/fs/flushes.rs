//! Which completed writes a flush has covered. `tests/flush_model.rs` compiles this file a second time and tries
//! the orders in which threads can take its steps.

use super::primitives::{AtomicU64, Mutex, Ordering};

/// Numbers completed writes; a flush covers those up to the number that was reached when it was sent.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    reached: AtomicU64,
    covered: AtomicU64,
    /// One flush at a time; who waits for it is mostly served by the one before.
    one: Mutex<()>,
}

impl Flushes {
    /// A write has completed; returns its number.
    pub fn completed(&self) -> u64 {
        self.reached.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The largest number: what a flush that is sent from now on covers.
    pub fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    /// The largest number that a flush has covered.
    pub fn covered(&self) -> u64 {
        self.covered.load(Ordering::Acquire)
    }

    /// Sees to it that the writes up to `seq` are covered; `send` flushes the device. Who comes meanwhile
    /// shares the flushes.
    ///
    /// # Errors
    /// That of `send`.
    pub fn cover<E>(&self, seq: u64, send: impl Fn() -> Result<(), E>) -> Result<(), E> {
        while self.covered() < seq {
            let _one = self.one.lock();
            if self.covered() >= seq {
                return Ok(());
            }
            // Before the flush is sent: what completes while it is under way may not be in it.
            let upto = self.reached();
            send()?;
            self.covered.fetch_max(upto, Ordering::AcqRel);
        }
        Ok(())
    }
}
