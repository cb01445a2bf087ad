//! The syncs of one file: one at a time, and each counts for everybody who asked before it began.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::error::Result;

/// Orders the syncs and truncations of a file; see the module.
#[derive(Default)]
pub(crate) struct Syncs {
    /// Number of syncs that have begun.
    begun: AtomicU64,
    /// Number of the last sync that succeeded. The thread that holds the lock syncs, or truncates.
    good: Mutex<u64>,
}

/// A moment: the number of syncs that had begun.
#[derive(Clone, Copy)]
pub(crate) struct Asked(u64);

impl Syncs {
    /// Returns the present moment. A sync that begins later covers what the caller has written.
    pub fn ask(&self) -> Asked {
        Asked(self.begun.load(Ordering::SeqCst))
    }

    /// Keeps syncs away while the result lives.
    pub fn hold_off(&self) -> MutexGuard<'_, u64> {
        self.good.lock()
    }

    /// Waits for the caller's turn, and runs `sync` unless one that began after `asked` has
    /// succeeded meanwhile.
    ///
    /// # Errors
    /// Returns the error of `sync`, which then counts for nobody.
    pub fn once_since(&self, asked: Asked, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut good = self.good.lock();
        if *good > asked.0 {
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        sync()?;
        *good = number;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::FsError;
    use super::*;

    fn runs(syncs: &Syncs, asked: Asked) -> bool {
        let mut ran = false;
        let result = syncs.once_since(asked, || {
            ran = true;
            Ok(())
        });
        assert!(result.is_ok());
        ran
    }

    #[test]
    fn a_sync_counts_for_those_who_asked_before_it_began() {
        let syncs = Syncs::default();
        let (first, second) = (syncs.ask(), syncs.ask());
        assert!(runs(&syncs, first));
        assert!(!runs(&syncs, second), "the first began after it had asked");
        assert!(runs(&syncs, syncs.ask()), "nothing has begun since");
    }

    #[test]
    fn a_sync_that_has_begun_covers_nobody_who_asks_meanwhile() {
        let syncs = Syncs::default();
        let mut late = None;
        let begun = syncs.once_since(syncs.ask(), || {
            late = Some(syncs.ask());
            Ok(())
        });
        assert!(begun.is_ok());
        assert!(runs(&syncs, late.unwrap()));
    }

    #[test]
    fn a_sync_that_fails_covers_nobody() {
        let syncs = Syncs::default();
        let waiting = syncs.ask();
        let failed = syncs.once_since(syncs.ask(), || Err(FsError::invalid("/f", "a test")));
        assert!(failed.is_err());
        assert!(runs(&syncs, waiting));
    }
}
