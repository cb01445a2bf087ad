//! `nvmeperf`: I/O on an NVMe namespace through the driver alone, nothing above it.

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

/// What the workers do.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Access pattern.
    pub pattern: Pattern,
    /// Reads of a hundred I/Os.
    pub read_percent: u32,
    /// Bytes of an I/O.
    pub io_bytes: usize,
    /// I/Os in flight per queue pair.
    pub depth: u16,
    /// Queue pairs, one thread each.
    pub queues: u16,
    /// Sleep when nothing is there, instead of polling on.
    pub wait: bool,
    /// Count latencies.
    pub latency: bool,
    /// Seed of the random blocks.
    pub seed: u64,
    /// Stop each worker after so many I/Os; 0: by time only.
    pub count: u64,
}

/// The names that SPDK's and fio's users know: `read`, `randwrite`, `randrw`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Access pattern.
    pub pattern: Pattern,
    /// Reads of a hundred, where the name says it.
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
                    "'{text}' is none of read, write, rw, randread, randwrite, randrw"
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
