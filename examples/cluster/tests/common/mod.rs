//! Helpers of the tests.

use std::sync::mpsc;
use std::time::Duration;

/// The longest time of a test on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Ends the process with the test's name if this is not dropped within [`LIMIT`].
#[must_use]
pub fn watchdog() -> mpsc::Sender<()> {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let (alive, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        if dropped.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name}: hangs: not done after {LIMIT:?}");
            std::process::abort();
        }
    });
    alive
}
