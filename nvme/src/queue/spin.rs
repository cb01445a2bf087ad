//! The time to spin before a sleep.

use std::time::Duration;

/// Adapts the time to spin to the waits of the recent past.
#[derive(Debug)]
pub(super) struct Spin {
    /// Moving average of the waits, in nanoseconds.
    average_ns: u64,
    waits: u32,
}

impl Spin {
    pub fn new() -> Spin {
        Spin {
            average_ns: 5_000,
            waits: 0,
        }
    }

    /// Returns how long to spin now: about twice the usual wait, hardly at all when waits are
    /// usually longer than `max`, and occasionally `max` itself, to notice that they became
    /// shorter.
    pub fn budget(&mut self, max: Duration) -> Duration {
        self.waits = self.waits.wrapping_add(1);
        let max_ns = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        if self.waits.is_multiple_of(64) {
            return max;
        }
        if self.average_ns > max_ns {
            return max / 16;
        }
        Duration::from_nanos((self.average_ns * 2 + 2_000).min(max_ns))
    }

    pub fn learn(&mut self, took: Duration) {
        let took = u64::try_from(took.as_nanos())
            .unwrap_or(u64::MAX)
            .min(1_000_000_000);
        self.average_ns = self.average_ns - self.average_ns / 8 + took / 8;
    }
}
