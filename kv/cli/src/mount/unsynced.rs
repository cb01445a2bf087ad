//! Whether something was changed that is not durable yet.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether something was changed since the last look that no program has synced.
#[derive(Default)]
pub struct Unsynced(AtomicBool);

impl Unsynced {
    /// Carries out a change and records it. A sync that begins before the change is complete does not count for it, so it is
    /// recorded afterwards, also if it fails, since a part of it may have been made.
    pub fn after<R>(&self, change: impl FnOnce() -> R) -> R {
        let result = change();
        self.0.store(true, Ordering::Release);
        result
    }

    /// Returns whether there was a change since the last call.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_during_a_change_does_not_count_for_it() {
        let unsynced = Unsynced::default();
        assert!(!unsynced.take());
        unsynced.after(|| assert!(!unsynced.take(), "the periodic sync comes in between"));
        assert!(unsynced.take());
        assert!(!unsynced.take());
        assert_eq!(unsynced.after(|| Err::<(), _>("half")), Err("half"));
        assert!(unsynced.take());
    }
}
