//! Threads that have to end, and what has to happen in the end.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longer than anything takes that uses this: a hang is a failure.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits until it is so.
pub fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A thread whose end can be polled, and waited for with a limit.
pub struct Task<T> {
    thread: JoinHandle<T>,
    ended: mpsc::Receiver<()>,
}

/// Starts a thread.
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (tell, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let result = work();
        let _ = tell.send(());
        result
    });
    Task { thread, ended }
}

impl<T> Task<T> {
    /// Whether it is still running a while later. This is never wrong if it has to be.
    pub fn still_waits(&self) -> bool {
        self.ended.recv_timeout(Duration::from_millis(100)).is_err() && !self.thread.is_finished()
    }

    /// Waits for the end and returns the result.
    pub fn join(self, what: &str) -> T {
        wait_for(what, || self.thread.is_finished());
        self.thread.join().unwrap()
    }
}
