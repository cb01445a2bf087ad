//! The wake-up of a controller thread of this process. `tests/kick_model.rs` compiles this file
//! again and tries the orders in which two threads can see each other's steps.

use std::time::Duration;

use super::sync::{AtomicBool, Mutex, Ordering, Thread, current, fence, park_timeout};

/// Wakes a controller thread of this process that went to sleep.
#[derive(Debug, Default)]
pub struct Kick {
    asleep: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Kick {
    /// Registers the calling thread as the one that sleeps. Called once, before the first
    /// [`sleep_unless`](Self::sleep_unless).
    pub fn attach(&self) {
        *self.thread.lock() = Some(current());
    }

    /// Sleeps until woken or until the time is over, unless `busy` finds work after the intention
    /// to sleep was announced.
    pub fn sleep_unless(&self, timeout: Duration, busy: impl FnOnce() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !busy() {
            park_timeout(timeout);
        }
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Wakes the thread if it sleeps. Stores before the call are visible to its `busy`.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.wake_slow();
        }
    }

    #[cold]
    fn wake_slow(&self) {
        if let Some(thread) = &*self.thread.lock() {
            thread.unpark();
        }
    }
}
