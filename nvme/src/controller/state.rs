//! The controller's state in one word, which a queue pair checks with one load.
//!
//! The low two bits are the phase and the others the generation, which every reset increments. A
//! queue pair's rings are valid for the word under which its queues were created.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::link::Link;
use crate::error::{Cause, NvmeError};

/// The phase of a controller's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Commands are accepted.
    Live,
    /// The controller is being reset.
    Resetting,
    /// A reset did not bring the controller back.
    Failed,
    /// The controller was removed.
    Removed,
}

pub(crate) fn phase(word: u64) -> Phase {
    match word & 3 {
        0 => Phase::Live,
        1 => Phase::Resetting,
        2 => Phase::Failed,
        _ => Phase::Removed,
    }
}

pub(crate) fn generation(word: u64) -> u64 {
    word >> 2
}

/// Whether a reset that was requested in the state `asked` is done in the state `now`, because the
/// state has changed since.
pub(crate) fn is_due(now: u64, asked: u64) -> bool {
    now == asked && phase(now) == Phase::Live
}

pub(crate) fn word(generation: u64, phase: Phase) -> u64 {
    let bits = match phase {
        Phase::Live => 0,
        Phase::Resetting => 1,
        Phase::Failed => 2,
        Phase::Removed => 3,
    };
    generation << 2 | bits
}

/// The state of a controller, for everybody who waits for another one.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    link: Arc<Link>,
    /// The state word. [`set`](Self::set) changes it.
    pub state: AtomicU64,
    changed: Condvar,
    changed_lock: Mutex<()>,
    failure: Mutex<Option<String>>,
}

impl Lifecycle {
    pub fn new(link: &Arc<Link>) -> Lifecycle {
        Lifecycle {
            link: Arc::clone(link),
            state: AtomicU64::new(word(0, Phase::Resetting)),
            changed: Condvar::new(),
            changed_lock: Mutex::new(()),
            failure: Mutex::new(None),
        }
    }

    #[inline]
    pub fn word(&self) -> u64 {
        self.state.load(Ordering::Acquire)
    }

    pub fn phase(&self) -> Phase {
        phase(self.word())
    }

    pub fn set(&self, word: u64) {
        {
            let _guard = self.changed_lock.lock();
            self.state.store(word, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }

    /// Notes why the controller is about to fail.
    pub fn set_failure(&self, reason: &str) {
        *self.failure.lock() = Some(reason.to_owned());
    }

    /// Returns the error that says why the controller can do nothing.
    pub fn gone(&self, cause: Cause) -> NvmeError {
        let device = self.link.name().to_owned();
        match cause {
            Cause::Removed => NvmeError::Removed { device },
            Cause::OtherProcess => NvmeError::OtherProcess { device },
            _ => NvmeError::Failed {
                device,
                reason: self
                    .failure
                    .lock()
                    .clone()
                    .unwrap_or_else(|| "no reason noted".into()),
            },
        }
    }

    /// Blocks while the controller is being reset. Then returns the state word, or the reason why
    /// the controller is not available.
    pub fn wait_live(&self) -> Result<u64, NvmeError> {
        if !self.link.birth.is_here() {
            return Err(self.gone(Cause::OtherProcess));
        }
        loop {
            let word = self.word();
            match phase(word) {
                Phase::Live => return Ok(word),
                Phase::Failed => return Err(self.gone(Cause::ControllerFailed)),
                Phase::Removed => return Err(self.gone(Cause::Removed)),
                Phase::Resetting => self.wait_changed(word, Duration::from_millis(100)),
            }
        }
    }

    /// Sleeps until the state word differs from `word`, or the time is over.
    pub fn wait_changed(&self, word: u64, timeout: Duration) {
        let mut guard = self.changed_lock.lock();
        if self.word() == word {
            self.changed.wait_for(&mut guard, timeout);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_done_once_for_all_who_asked() {
        let (mut now, asked) = (word(3, Phase::Live), word(3, Phase::Live));
        let mut resets = 0;
        for _ in 0..3 {
            if is_due(now, asked) {
                now = word(generation(now) + 1, Phase::Live);
                resets += 1;
            }
        }
        assert_eq!(resets, 1);
        for phase in [Phase::Resetting, Phase::Failed, Phase::Removed] {
            assert!(!is_due(word(3, phase), word(3, phase)));
        }
    }
}
