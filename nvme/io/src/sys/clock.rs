//! A clock that is read in a few nanoseconds: the processor's time stamp counter, where it runs at
//! one rate on all processors, otherwise the operating system's clock.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The clock of this process.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
    start_ticks: u64,
    counter: bool,
}

impl Clock {
    /// Returns the clock. The first call reads /proc/cpuinfo.
    pub fn get() -> Clock {
        static CLOCK: OnceLock<Clock> = OnceLock::new();
        *CLOCK.get_or_init(|| {
            let counter = has_steady_counter();
            let start = Instant::now();
            let start_ticks = if counter { read_counter() } else { 0 };
            Clock {
                start,
                start_ticks,
                counter,
            }
        })
    }

    /// The current time in ticks.
    #[inline]
    pub fn now(self) -> u64 {
        if self.counter {
            read_counter()
        } else {
            self.nanos()
        }
    }

    #[cold]
    fn nanos(self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Number of ticks per second. Sleeps if the process is younger than 10 ms, to measure
    /// precisely.
    pub fn ticks_per_second(self) -> u64 {
        static RATE: OnceLock<u64> = OnceLock::new();
        if !self.counter {
            return 1_000_000_000;
        }
        *RATE.get_or_init(|| {
            let young = Duration::from_millis(10).saturating_sub(self.start.elapsed());
            std::thread::sleep(young);
            let (ticks, time) = (read_counter() - self.start_ticks, self.start.elapsed());
            let rate = u128::from(ticks) * 1_000_000_000 / time.as_nanos().max(1);
            u64::try_from(rate).unwrap_or(u64::MAX).max(1)
        })
    }

    /// Converts ticks to nanoseconds.
    pub fn to_ns(self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * 1_000_000_000 / u128::from(self.ticks_per_second());
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Converts a duration to ticks.
    pub fn ticks(self, duration: Duration) -> u64 {
        let ticks = duration.as_nanos() * u128::from(self.ticks_per_second()) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn read_counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, which reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn read_counter() -> u64 {
    0
}

fn has_steady_counter() -> bool {
    if !cfg!(target_arch = "x86_64") {
        return false;
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|f| flags.split(' ').any(|word| word == *f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_time_agree() {
        let clock = Clock::get();
        let (start, ticks) = (Instant::now(), clock.now());
        std::thread::sleep(Duration::from_millis(20));
        let (time, ns) = (start.elapsed().as_nanos(), clock.to_ns(clock.now() - ticks));
        let ratio = ns as f64 / time as f64;
        assert!((0.8..1.25).contains(&ratio), "{ns} against {time}");
        assert!(
            clock
                .to_ns(clock.ticks(Duration::from_secs(1)))
                .abs_diff(1_000_000_000)
                < 1000
        );
    }
}
