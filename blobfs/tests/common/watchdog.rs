//! A time limit for a test, so that a hang is a failure.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Ends the process with an error unless it is dropped in time; see [`watchdog`].
#[must_use]
pub struct Watchdog {
    _alive: Sender<()>,
}

/// Gives the test `name` `limit_s` seconds from now, many times what it needs: the limit is for
/// hangs, and no machine should be too slow for it. `PUMICE_WATCHDOG_S` sets another limit.
pub fn watchdog(name: &str, limit_s: u64) -> Watchdog {
    let limit = std::env::var("PUMICE_WATCHDOG_S").ok();
    let limit_s = limit.and_then(|s| s.parse().ok()).unwrap_or(limit_s);
    let (alive, dropped) = channel();
    let name = name.to_owned();
    std::thread::spawn(move || {
        let ended = dropped.recv_timeout(Duration::from_secs(limit_s));
        if ended == Err(RecvTimeoutError::Timeout) {
            eprintln!("{name}: not done after {limit_s} s: it hangs");
            std::process::abort();
        }
    });
    Watchdog { _alive: alive }
}
