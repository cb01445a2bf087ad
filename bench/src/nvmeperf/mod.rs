//! `nvmeperf`: I/O on an NVMe namespace through the driver alone.

pub mod counter;
pub mod report;
pub mod worker;

use std::str::FromStr;

/// Access pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Each worker goes through its share of the namespace in order.
    Sequential,
    /// Uniformly random blocks.
    Random,
}

/// The work of the threads.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Access pattern.
    pub pattern: Pattern,
    /// Percentage of reads.
    pub read_percent: u32,
    /// Bytes of an I/O.
    pub io_bytes: usize,
    /// I/Os in flight per queue pair.
    pub depth: u16,
    /// Number of queue pairs, with one thread each.
    pub queues: u16,
    /// Whether to sleep when nothing completes, instead of polling.
    pub wait: bool,
    /// Whether to measure latencies.
    pub latency: bool,
    /// Seed of the random blocks.
    pub seed: u64,
    /// Number of I/Os after which each worker stops; 0: by time only.
    pub count: u64,
}

/// A workload by the name that SPDK's and fio's users know: `read`, `randwrite`, `randrw`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Access pattern.
    pub pattern: Pattern,
    /// Percentage of reads, if the name determines it.
    pub read_percent: Option<u32>,
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        let (pattern, rest) = match text.strip_prefix("rand") {
            Some(rest) => (Pattern::Random, rest),
            None => (Pattern::Sequential, text),
        };
        let read_percent = match rest {
            "read" => Some(100),
            "write" => Some(0),
            "rw" => None,
            _ => {
                return Err(format!(
                    "'{text}' is not one of read, write, rw, randread, randwrite, randrw"
                ));
            }
        };
        Ok(Kind {
            pattern,
            read_percent,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let kind: Kind = "randread".parse().unwrap();
        assert_eq!(
            (kind.pattern, kind.read_percent),
            (Pattern::Random, Some(100))
        );
        let kind: Kind = "rw".parse().unwrap();
        assert_eq!(
            (kind.pattern, kind.read_percent),
            (Pattern::Sequential, None)
        );
        assert!("randtrim".parse::<Kind>().is_err());
    }
}
