//! Result lines and header as RocksDB's tool prints them, and the same for machines.

use std::collections::BTreeMap;

use serde::Serialize;

use super::flags::Flags;
use super::histogram::{Histogram, Summary};
use super::meter::{Count, OpKind};
use super::target::Durability;

/// The result of one benchmark.
#[derive(Debug, Clone, Serialize)]
pub struct BenchResult {
    /// The benchmark.
    pub name: String,
    /// Microseconds per operation of one thread.
    pub micros_per_op: f64,
    /// Operations per second of all threads.
    pub ops_per_sec: f64,
    /// From the first thread's start to the last one's end.
    pub seconds: f64,
    /// Operations of all threads.
    pub operations: u64,
    /// MiB of keys and values per second, when the benchmark counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mb_per_sec: Option<f64>,
    /// Keys that were there and keys that were asked for, when the benchmark counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<(u64, u64)>,
    /// Words at the end of the line, such as "(632 of 1000 found)".
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Writes of this benchmark that were made durable before they were acknowledged: all or none.
    pub synced: bool,
    /// Times by kind of operation, with --histogram.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub latency: BTreeMap<&'static str, Summary>,
    /// Microseconds of processor time per operation, of all threads of the process and of the kernel
    /// on their behalf: steadier than time on a busy machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_op: Option<f64>,
    /// What the file system did during the benchmark, where it counts that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoCount>,
    /// Histograms for the text.
    #[serde(skip)]
    pub histograms: Vec<(OpKind, Histogram)>,
}

/// Device operations.
#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
pub struct IoCount {
    /// Read operations.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write operations.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes of the device's write cache.
    pub flushes: u64,
    /// Counted at the kernel's block device: what others did there is in it.
    pub whole_device: bool,
}

impl IoCount {
    /// What was added since `earlier`.
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

impl BenchResult {
    /// From what the threads counted.
    #[must_use]
    pub fn new(name: &str, count: Count, synced: bool) -> Self {
        // A benchmark that counts nothing did one thing.
        let operations = count.done.max(1);
        let seconds = count.elapsed().max(1e-9);
        let found = count.found.map(|(f, a)| format!("({f} of {a} found)"));
        let words = [found.unwrap_or_default(), count.message];
        let mb_per_sec = (count.bytes > 0).then(|| count.bytes as f64 / 1_048_576.0 / seconds);
        Self {
            name: name.to_owned(),
            micros_per_op: count.seconds * 1e6 / operations as f64,
            ops_per_sec: operations as f64 / seconds,
            seconds,
            operations,
            mb_per_sec,
            found: count.found,
            message: words.join(" ").trim().to_owned(),
            synced,
            latency: count
                .histograms
                .iter()
                .map(|(k, h)| (k.word(), h.summary()))
                .collect(),
            cpu_us_per_op: None,
            io: None,
            histograms: count.histograms.into_iter().collect(),
        }
    }

    /// The result line, and histograms below it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut line = format!(
            "{:<12} : {:>11.3} micros/op {:.0} ops/sec {:.3} seconds {} operations;",
            self.name,
            self.micros_per_op,
            self.ops_per_sec.trunc(),
            self.seconds,
            self.operations
        );
        if let Some(rate) = self.mb_per_sec {
            line.push_str(&format!(" {rate:>6.1} MB/s"));
        }
        if !self.message.is_empty() {
            line.push(' ');
            line.push_str(&self.message);
        }
        for (kind, h) in &self.histograms {
            line.push_str(&format!(
                "\nMicroseconds per {}:\n{}",
                kind.word(),
                h.render()
            ));
        }
        line
    }
}

/// Several runs of one benchmark: `name[X3]`.
#[must_use]
pub fn repeats(name: &str, runs: &[BenchResult], interval_only: bool, last: bool) -> String {
    let n = runs.len();
    if n < 2 {
        return String::new();
    }
    let ops: Vec<f64> = runs.iter().map(|r| r.ops_per_sec).collect();
    let mbs: Option<Vec<f64>> = runs.iter().map(|r| r.mb_per_sec).collect();
    let (avg, conf) = (mean(&ops), confidence(&ops));
    if last {
        let ms = if avg > 0.0 { 1000.0 / avg } else { 0.0 };
        let (rate, rate_median) = mbs.map_or((String::new(), String::new()), |m| {
            (
                format!("; {:>6.1} (± {:.1}) MB/sec", mean(&m), confidence(&m)),
                format!("; {:>6.1} MB/sec", median(&m)),
            )
        });
        return format!(
            "\n{name} [AVG    {n} runs] : {avg:.0} (± {conf:.0}) ops/sec; {ms:.3} ms/op{rate}\n\
             {name} [MEDIAN {n} runs] : {:.0} ops/sec{rate_median}",
            median(&ops)
        );
    }
    if interval_only {
        let rate = mbs.map_or(String::new(), |m| {
            let (a, c) = (mean(&m), confidence(&m));
            format!("; ({:.1}, {:.1}) MB/sec", a - c, a + c)
        });
        let (low, high) = (avg - conf, avg + conf);
        return format!("{name} [CI95 {n} runs] : ({low:.0}, {high:.0}) ops/sec{rate}");
    }
    let rate = mbs.map_or(String::new(), |m| {
        format!("; {:>6.1} (± {:.1}) MB/sec", mean(&m), confidence(&m))
    });
    format!("{name} [AVG {n} runs] : {avg:.0} (± {conf:.0}) ops/sec{rate}")
}

/// The mean; 0 of nothing.
#[must_use]
pub fn mean(v: &[f64]) -> f64 {
    if v.is_empty() {
        return 0.0;
    }
    v.iter().sum::<f64>() / v.len() as f64
}

/// The middle value, the mean of the two middle ones when their number is even; 0 of nothing.
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

/// Half the width of the 95 % confidence interval of a normal distribution's mean.
fn confidence(v: &[f64]) -> f64 {
    if v.len() < 2 {
        return 0.0;
    }
    let m = mean(v);
    let variance = v.iter().map(|x| (x - m) * (x - m)).sum::<f64>() / (v.len() - 1) as f64;
    1.959_964 * (variance / v.len() as f64).sqrt()
}

/// What ran, where and how durably.
#[derive(Debug, Clone, Serialize)]
pub struct RunInfo {
    /// Version of RocksDB.
    pub rocksdb_version: String,
    /// `pumice`, `kernel` or `mem`.
    pub env: String,
    /// The file system below RocksDB, in words.
    pub file_system: String,
    /// The database's directory.
    pub db: String,
    /// What a completed write is worth.
    pub durability: Durability,
    /// Number of processors and their name.
    pub cpu: String,
    /// Seed of this run.
    pub seed: u64,
    /// The flags that differ from their defaults.
    pub flags: BTreeMap<String, String>,
}

/// Everything, for machines.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What ran.
    #[serde(flatten)]
    pub info: RunInfo,
    /// The results in the order of the run.
    pub results: Vec<BenchResult>,
}

/// The header above the results.
#[must_use]
pub fn header(f: &Flags, info: &RunInfo) -> String {
    let value = super::runner::value_size(f);
    let average = value.average();
    let compressed = average as f64 * f.compression_ratio;
    let entry = f64::from(f.key_size) + average as f64;
    let packed = f64::from(f.key_size) + compressed;
    let num = f.num as f64;
    let mut out = format!(
        "RocksDB:    version {}\nCPU:        {}\nBuilt for:  {}\nFile system: {}\nDurability: {}\n\
         Keys:       {} bytes each (+ 0 bytes user-defined timestamp)\n",
        info.rocksdb_version,
        info.cpu,
        built_for(),
        info.file_system,
        info.durability.words,
        f.key_size
    );
    let rounded = (compressed + 0.5).floor();
    let avg = if f.value_size_distribution_type == "fixed" {
        ""
    } else {
        "avg "
    };
    out.push_str(&format!(
        "Values:     {average} {avg}bytes each ({rounded:.0} bytes after compression)\n"
    ));
    if !avg.is_empty() {
        out.push_str(&format!(
            "Values Distribution: {} (min: {}, max: {})\n",
            f.value_size_distribution_type, f.value_size_min, f.value_size_max
        ));
    }
    out.push_str(&format!(
        "Entries:    {}\nPrefix:    {} bytes\nKeys per prefix:    {}\n\
         RawSize:    {:.1} MB (estimated)\nFileSize:   {:.1} MB (estimated)\n\
         Write rate: {} bytes/second\nRead rate: {} ops/second\nCompression: {}\n\
         Memtablerep: {}\n------------------------------------------------",
        f.num,
        f.prefix_size,
        f.keys_per_prefix,
        entry * num / 1_048_576.0,
        packed * num / 1_048_576.0,
        f.benchmark_write_rate_limit,
        f.benchmark_read_rate_limit,
        f.compression_type,
        f.memtablerep
    ));
    out
}

/// The instructions that the build uses, and what that means for RocksDB's checksums.
fn built_for() -> String {
    let crc32c = if pumice_io::cpu::has_fast_crc32c() {
        "three-way CRC-32C"
    } else {
        "slow CRC-32C"
    };
    format!("{} ({crc32c})", pumice_io::cpu::built_for())
}

/// Processor time of this process so far, in seconds (proc(5): utime and stime in `/proc/self/stat`,
/// hundredths of a second on Linux).
#[must_use]
pub fn cpu_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in brackets, may hold spaces.
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / 100.0)
}

/// "2 * AMD EPYC".
#[must_use]
pub fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map(|(_, m)| m.trim())
        .collect();
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match models.first() {
        Some(m) => format!("{} * {m}", models.len()),
        None => format!("{count} processors"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> BenchResult {
        BenchResult {
            name: "fillseq".into(),
            micros_per_op: 2.345,
            ops_per_sec: 426_439.7,
            seconds: 2.345,
            operations: 1_000_000,
            mb_per_sec: Some(47.2),
            found: None,
            message: String::new(),
            synced: false,
            latency: BTreeMap::new(),
            cpu_us_per_op: None,
            io: None,
            histograms: Vec::new(),
        }
    }

    #[test]
    fn the_line_is_rocksdbs() {
        assert_eq!(
            result().render(),
            "fillseq      :       2.345 micros/op 426439 ops/sec 2.345 seconds 1000000 operations;   47.2 MB/s"
        );
        let read = BenchResult {
            name: "readrandom".into(),
            mb_per_sec: None,
            message: "(632 of 1000 found)".into(),
            ..result()
        };
        assert!(
            read.render()
                .ends_with("1000000 operations; (632 of 1000 found)")
        );
    }

    #[test]
    fn repeated_runs_are_averaged() {
        let runs: Vec<_> = [100.0, 200.0, 600.0]
            .map(|ops_per_sec| BenchResult {
                ops_per_sec,
                ..result()
            })
            .into();
        assert_eq!(repeats("x", &runs[..1], false, false), "");
        assert!(
            repeats("x", &runs, false, false).starts_with("x [AVG 3 runs] : 300 (± 299) ops/sec;")
        );
        assert!(repeats("x", &runs, true, false).starts_with("x [CI95 3 runs] : (1, 599) ops/sec"));
        let last = repeats("x", &runs, false, true);
        assert!(
            last.contains("x [MEDIAN 3 runs] : 200 ops/sec;   47.2 MB/sec"),
            "{last}"
        );
        assert!((median(&[1.0, 2.0]) - 1.5).abs() < 1e-12);
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
}
