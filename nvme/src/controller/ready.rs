//! How long a controller may take to become ready or to shut down.

use std::fmt;
use std::time::Duration;

/// The unit of CAP.TO and CRTO.CRWMT, in milliseconds.
const UNIT_MS: u64 = 500;
/// Most units that CAP.TO can say, about 128 s.
const CAP_TO_MAX: u64 = 255;
/// Longest wait for a shutdown that RTD3E names.
const RTD3E_MAX: Duration = Duration::from_secs(60);
/// Shortest wait for a shutdown.
const SHUTDOWN_MIN: Duration = Duration::from_secs(2);

/// The length of a wait for the controller's state, and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadyWait {
    pub time: Duration,
    pub limit: Limit,
}

/// The origin of the length of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// CAP.TO names it.
    CapTo,
    /// CRTO.CRWMT names it.
    Crwmt,
    /// CRTO.CRWMT names this many milliseconds, which is longer than the driver waits.
    Bounded { crwmt_ms: u64 },
    /// RTD3E names it.
    Rtd3e,
    /// It is the shortest wait for a shutdown.
    Shutdown,
}

impl ReadyWait {
    /// Returns the longest wait for CSTS.RDY to change (Base section 3.5.3), which is CAP.TO, or
    /// CRTO.CRWMT where the controller has it and names more. CRTO.CRWMT counts up to the largest
    /// CAP.TO or the admin time-out, whichever is longer, because it may name nine hours.
    pub fn new(cap_to: u8, crwmt: Option<u16>, admin_timeout: Duration) -> ReadyWait {
        // One more unit, because the time is rounded to units and a device may use all of it.
        let with_grace = |units: u64| Duration::from_millis((units + 1) * UNIT_MS);
        let to = ReadyWait {
            time: with_grace(cap_to.into()),
            limit: Limit::CapTo,
        };
        let Some(units) = crwmt.filter(|units| *units > cap_to.into()) else {
            return to;
        };
        let units = u64::from(units);
        let most = with_grace(CAP_TO_MAX).max(admin_timeout);
        match with_grace(units) {
            time if time <= most => ReadyWait {
                time,
                limit: Limit::Crwmt,
            },
            _ => ReadyWait {
                time: most,
                limit: Limit::Bounded {
                    crwmt_ms: units * UNIT_MS,
                },
            },
        }
    }

    /// Returns the longest wait for a shutdown, which RTD3E may extend (Base figure 275).
    pub fn or_for_shutdown(self, rtd3e_us: u64) -> ReadyWait {
        let rtd3e = ReadyWait {
            time: Duration::from_micros(rtd3e_us).min(RTD3E_MAX),
            limit: Limit::Rtd3e,
        };
        let least = ReadyWait {
            time: SHUTDOWN_MIN,
            limit: Limit::Shutdown,
        };
        [rtd3e, least].into_iter().fold(self, |longest, other| {
            if other.time > longest.time {
                other
            } else {
                longest
            }
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::CapTo => f.write_str("the time that CAP.TO names"),
            Limit::Crwmt => f.write_str("the time that CRTO.CRWMT names"),
            Limit::Bounded { crwmt_ms } => write!(
                f,
                "the longest wait for a controller, although CRTO.CRWMT names {crwmt_ms} ms; a \
                 longer admin_timeout extends it"
            ),
            Limit::Rtd3e => f.write_str("the time that RTD3E names, up to 60 s"),
            Limit::Shutdown => f.write_str("the shortest wait for a shutdown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A register cannot make the driver wait for hours.
    #[test]
    fn a_controller_may_take_what_it_names_within_bounds() {
        let short = Duration::from_secs(20);
        for (cap_to, crwmt, admin_timeout, time_ms, limit) in [
            (0, None, short, 500, Limit::CapTo),
            (10, Some(10), short, 5_500, Limit::CapTo),
            (10, Some(0), short, 5_500, Limit::CapTo),
            (255, None, short, 128_000, Limit::CapTo),
            (10, Some(60), short, 30_500, Limit::Crwmt),
            (255, Some(255), short, 128_000, Limit::CapTo),
            (1, Some(255), short, 128_000, Limit::Crwmt),
            (
                255,
                Some(256),
                short,
                128_000,
                Limit::Bounded { crwmt_ms: 128_000 },
            ),
            (
                10,
                Some(u16::MAX),
                short,
                128_000,
                Limit::Bounded {
                    crwmt_ms: 32_767_500,
                },
            ),
            (
                10,
                Some(1_000),
                Duration::from_secs(600),
                500_500,
                Limit::Crwmt,
            ),
        ] {
            let wait = ReadyWait::new(cap_to, crwmt, admin_timeout);
            let time = Duration::from_millis(time_ms);
            assert_eq!(wait, ReadyWait { time, limit }, "{cap_to} {crwmt:?}");
        }
        let said = Limit::Bounded { crwmt_ms: 7 }.to_string();
        assert!(said.contains("CRTO.CRWMT names 7 ms"), "{said}");
    }

    #[test]
    fn a_shutdown_takes_the_longest_of_three_times() {
        let ready = ReadyWait::new(3, None, Duration::ZERO);
        for (ready, rtd3e_us, time_ms, limit) in [
            (ready, 0, 2_000, Limit::CapTo),
            (
                ReadyWait::new(0, None, Duration::ZERO),
                0,
                2_000,
                Limit::Shutdown,
            ),
            (ready, 7_000_000, 7_000, Limit::Rtd3e),
            (ready, u64::from(u32::MAX), 60_000, Limit::Rtd3e),
        ] {
            let wait = ready.or_for_shutdown(rtd3e_us);
            assert_eq!(wait.time, Duration::from_millis(time_ms));
            assert_eq!(wait.limit, limit);
        }
    }
}
