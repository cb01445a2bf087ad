//! The results as JSON, and the summary at the end.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::target::Durability;

/// The result of one benchmark.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchResult {
    /// Name of the benchmark.
    pub name: String,
    /// Microseconds per operation of one thread.
    pub micros_per_op: f64,
    /// Operations per second of all threads.
    pub ops_per_sec: f64,
    /// Seconds from the first thread's start to the last one's end.
    pub seconds: f64,
    /// Number of operations of all threads.
    pub operations: u64,
    /// MB of keys and values per second, when the benchmark counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mb_per_sec: Option<f64>,
    /// The rest of the line, such as "(632 of 1000 found)".
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Whether this benchmark's writes were durable before they were acknowledged: all or none.
    pub synced: bool,
    /// Microseconds of processor time per operation, of all threads of the process and of the
    /// kernel on their behalf. They vary less than time on a busy machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_op: Option<f64>,
    /// The part of that processor time that was spent in the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_us_per_op: Option<f64>,
    /// Voluntary context switches per operation: a thread of the process waited and gave up its processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub voluntary_switches_per_op: Option<f64>,
    /// The operations of the device during the benchmark, if they can be counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoCount>,
}

/// Numbers of device operations.
#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
pub struct IoCount {
    /// Number of reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Number of writes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Number of flushes of the device's write cache.
    pub flushes: u64,
    /// Whether they were counted at the kernel's block device, which includes the operations of
    /// others.
    pub whole_device: bool,
}

impl IoCount {
    /// Returns the difference to `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            writes: self.writes.saturating_sub(earlier.writes),
            write_bytes: self.write_bytes.saturating_sub(earlier.write_bytes),
            flushes: self.flushes.saturating_sub(earlier.flushes),
            whole_device: self.whole_device,
        }
    }
}

/// The conditions of a run: what ran, where and how durably.
#[derive(Debug, Clone, Serialize)]
pub struct RunInfo {
    /// `pumice`, `kernel`, `mem`, or `uri`: what RocksDB's own `--fs_uri` or `--env_uri` names.
    pub env: &'static str,
    /// Description of the file system below RocksDB.
    pub file_system: String,
    /// Directory of the database.
    pub db: String,
    /// The guarantee of a completed write.
    pub durability: Durability,
    /// The instructions that the program was compiled for.
    pub built_for: String,
    /// RocksDB's flags that were given.
    pub flags: BTreeMap<String, String>,
}

/// The results of a run, for JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The conditions of the run.
    #[serde(flatten)]
    pub info: RunInfo,
    /// The results in the order of the run.
    pub results: Vec<BenchResult>,
    /// Number of keys on which a scan and `Get` agree, with --verify.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_keys: Option<u64>,
    /// The findings of `--verify`, if it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify_error: Option<String>,
}

/// Returns the lines above RocksDB's own header.
#[must_use]
pub fn header(info: &RunInfo) -> String {
    format!(
        "Built for:  {}\nFile system: {}\nDurability: {}",
        info.built_for, info.file_system, info.durability.words
    )
}

/// Returns the table at the end. No line of it begins with a benchmark's name, since scripts look
/// for lines that do.
#[must_use]
pub fn summary(results: &[BenchResult]) -> String {
    let mut out = format!(
        "------------------------------------------------\n  {:<24} {:>10} {:>10} {:>10} {:>28}",
        "per operation", "µs", "CPU µs", "ops/s", "device writes/reads/flushes"
    );
    let mut whole_device = false;
    for r in results {
        let cpu = r
            .cpu_us_per_op
            .map_or("-".to_owned(), |us| format!("{us:.3}"));
        let io = r.io.map_or("-".to_owned(), |io| {
            whole_device |= io.whole_device;
            let per = |n: u64| n as f64 / r.operations.max(1) as f64;
            format!(
                "{:.3} / {:.3} / {:.3}",
                per(io.writes),
                per(io.reads),
                per(io.flushes)
            )
        });
        let _ = write!(
            out,
            "\n  {:<24} {:>10.3} {:>10} {:>10.0} {:>28}",
            r.name, r.micros_per_op, cpu, r.ops_per_sec, io
        );
    }
    if whole_device {
        out.push_str("\n  (counted at the kernel's block device, with whatever else used it)");
    }
    out
}

/// Describes the instructions that the build uses, and what that means for RocksDB's checksums.
#[must_use]
pub fn built_for() -> String {
    let crc32c = if pumice_io::cpu::has_fast_crc32c() {
        "three-way CRC-32C"
    } else {
        "slow CRC-32C"
    };
    format!("{} ({crc32c})", pumice_io::cpu::built_for())
}

/// Returns the median, which is the mean of the two middle values if their number is even; 0 for no
/// values.
#[must_use]
pub fn median(v: &[f64]) -> f64 {
    let mut s = v.to_vec();
    s.sort_by(f64::total_cmp);
    match (s.len() / 2, s.len() % 2) {
        (0, 0) => 0.0,
        (mid, 0) => f64::midpoint(s[mid - 1], s[mid]),
        (mid, _) => s[mid],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&[1.0, 2.0]) - 1.5).abs() < 1e-12);
        assert!((median(&[9.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!(median(&[]).abs() < 1e-12);
    }

    #[test]
    fn io_counts_are_differences() {
        let a = IoCount {
            reads: 1,
            writes: 5,
            flushes: 2,
            ..IoCount::default()
        };
        let b = IoCount {
            reads: 4,
            writes: 9,
            flushes: 2,
            ..IoCount::default()
        };
        assert_eq!(
            b.since(a),
            IoCount {
                reads: 3,
                writes: 4,
                ..IoCount::default()
            }
        );
    }

    #[test]
    fn no_line_of_the_summary_looks_like_a_result() {
        let result = BenchResult {
            name: "fillseq".into(),
            micros_per_op: 2.0,
            ops_per_sec: 500_000.0,
            seconds: 1.0,
            operations: 100,
            mb_per_sec: None,
            message: String::new(),
            synced: false,
            cpu_us_per_op: Some(1.5),
            system_us_per_op: Some(0.5),
            voluntary_switches_per_op: Some(2.0),
            io: Some(IoCount {
                writes: 50,
                whole_device: true,
                ..IoCount::default()
            }),
        };
        let text = summary(&[result]);
        assert!(text.contains("0.500 / 0.000 / 0.000"), "{text}");
        assert!(text.contains("whatever else used it"), "{text}");
        assert!(text.lines().all(|l| !l.starts_with("fillseq")), "{text}");
    }
}
