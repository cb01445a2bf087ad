//! The report of what happened between two samples of a process.

use serde_json::{Value, json};

/// The figures of a process at one moment, as it reports them.
pub struct Sample {
    stats: Value,
}

impl Sample {
    pub fn new(stats: &Value) -> Sample {
        Sample {
            stats: stats.clone(),
        }
    }

    fn number(&self, group: &str, name: &str) -> u64 {
        self.stats[group][name].as_u64().unwrap_or(0)
    }

    fn uptime_ms(&self) -> u64 {
        self.stats["uptime_ms"].as_u64().unwrap_or(0)
    }

    /// Returns latencies in ns, each with the number of operations that took at most that and more
    /// than the one before.
    fn latency(&self) -> impl Iterator<Item = (u64, u64)> {
        let pairs = self.stats["latency"].as_array().into_iter().flatten();
        pairs.filter_map(|pair| Some((pair[0].as_u64()?, pair[1].as_u64()?)))
    }

    fn channel(&self, id: u64) -> Option<&Value> {
        let mut channels = self.stats["channels"].as_array()?.iter();
        channels.find(|channel| channel["id"].as_u64() == Some(id))
    }
}

/// The queue of a channel, and its operations in a second.
pub struct Channel {
    pub id: u64,
    pub opened_by: String,
    pub in_flight: u64,
    pub reads: f64,
    pub writes: f64,
    pub bytes: f64,
}

/// Rates between two samples, and levels at the second one.
pub struct Report {
    pub seconds: f64,
    pub reads: f64,
    pub read_bytes: f64,
    pub writes: f64,
    pub written_bytes: f64,
    pub flushes: f64,
    /// The part of reads that the page cache answered; `None` if there were none.
    pub hit_rate: Option<f64>,
    /// Latencies of the device in ns: 50, 99 and 99.9 % and the longest; `None` if there was no
    /// operation.
    pub latency_ns: Option<[u64; 4]>,
    /// Whether the process counts latencies.
    pub counts_latency: bool,
    pub writeback_bytes: u64,
    /// Bytes that were written and are not in their place on the device.
    pub dirty_bytes: u64,
    pub cache: (u64, u64),
    pub space: (u64, u64),
    pub channels: Vec<Channel>,
    /// RocksDB's figures by name; empty if there is no database.
    pub rocksdb: Vec<(String, u64)>,
}

/// For people, and in JSON with the precision of a double.
fn double(n: u64) -> f64 {
    n as f64
}

impl Report {
    pub const HEADING: &str = "   reads/s  read MiB/s   writes/s write MiB/s  flushes/s  hit %   p50 us   p99 us      dirty MiB";

    /// Returns the averages since the process began to answer.
    pub fn since_the_start(sample: &Sample) -> Report {
        Report::between(&Sample::new(&Value::Null), sample)
    }

    pub fn between(before: &Sample, after: &Sample) -> Report {
        let ms = after.uptime_ms().saturating_sub(before.uptime_ms()).max(1);
        let seconds = double(ms) / 1000.0;
        let rose = |name| {
            after
                .number("fs", name)
                .saturating_sub(before.number("fs", name))
        };
        let rate = |name| double(rose(name)) / seconds;
        let (hits, misses) = (rose("cache_hits"), rose("cache_misses"));
        let level = |name| after.number("fs", name);
        let rocksdb = after.stats["rocksdb"].as_object().into_iter().flatten();
        Report {
            seconds,
            reads: rate("device_reads"),
            read_bytes: rate("device_read_bytes"),
            writes: rate("device_writes"),
            written_bytes: rate("device_written_bytes"),
            flushes: rate("device_flushes"),
            hit_rate: (hits > 0 || misses > 0)
                .then(|| double(hits) / (double(hits) + double(misses))),
            latency_ns: percentiles(before, after),
            counts_latency: after.stats["latency"].is_array(),
            writeback_bytes: level("writeback_bytes"),
            dirty_bytes: level("dirty_bytes"),
            cache: (level("cache_used_bytes"), level("cache_capacity_bytes")),
            space: (level("used_bytes"), level("total_bytes")),
            channels: channels(before, after, seconds),
            rocksdb: rocksdb
                .filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)))
                .collect(),
        }
    }

    pub fn line(&self) -> String {
        let mib = |bytes: f64| bytes / 1_048_576.0;
        let us = |at: usize| {
            let us = |latency: [u64; 4]| format!("{:.1}", double(latency[at]) / 1000.0);
            self.latency_ns.map_or("-".to_owned(), us)
        };
        let hit = |rate: f64| format!("{:.1}", rate * 100.0);
        format!(
            "{:>10.0} {:>11.1} {:>10.0} {:>11.1} {:>10.0} {:>6} {:>8} {:>8} {:>14.1}",
            self.reads,
            mib(self.read_bytes),
            self.writes,
            mib(self.written_bytes),
            self.flushes,
            self.hit_rate.map_or("-".to_owned(), hit),
            us(0),
            us(1),
            mib(double(self.dirty_bytes)),
        )
    }

    pub fn json(&self) -> Value {
        let latency = self.latency_ns.map(
            |[p50, p99, p999, max]| json!({ "p50": p50, "p99": p99, "p99.9": p999, "max": max }),
        );
        let rocksdb: serde_json::Map<String, Value> = self
            .rocksdb
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        let channels: Vec<Value> = self
            .channels
            .iter()
            .map(|c| {
                json!({
                    "id": c.id,
                    "opened_by": c.opened_by,
                    "in_flight": c.in_flight,
                    "reads_per_s": c.reads,
                    "writes_per_s": c.writes,
                    "bytes_per_s": c.bytes,
                })
            })
            .collect();
        json!({
            "seconds": self.seconds,
            "reads_per_s": self.reads,
            "read_bytes_per_s": self.read_bytes,
            "writes_per_s": self.writes,
            "written_bytes_per_s": self.written_bytes,
            "flushes_per_s": self.flushes,
            "cache_hit_rate": self.hit_rate,
            "latency_ns": latency,
            "writeback_bytes": self.writeback_bytes,
            "dirty_bytes": self.dirty_bytes,
            "cache_used_bytes": self.cache.0,
            "cache_capacity_bytes": self.cache.1,
            "used_bytes": self.space.0,
            "total_bytes": self.space.1,
            "channels": channels,
            "rocksdb": rocksdb,
        })
    }
}

/// Returns the latencies of operations that ended between two samples.
fn percentiles(before: &Sample, after: &Sample) -> Option<[u64; 4]> {
    let earlier: std::collections::BTreeMap<u64, u64> = before.latency().collect();
    let counts: Vec<(u64, u64)> = after
        .latency()
        .map(|(ns, count)| {
            (
                ns,
                count.saturating_sub(earlier.get(&ns).copied().unwrap_or(0)),
            )
        })
        .filter(|(_, count)| *count > 0)
        .collect();
    let total: u128 = counts.iter().map(|(_, count)| u128::from(*count)).sum();
    let longest = counts.last()?.0;
    let at = |permille: u128| {
        let rank = (total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        counts
            .iter()
            .find(|(_, count)| {
                seen += u128::from(*count);
                seen >= rank
            })
            .map_or(longest, |(ns, _)| *ns)
    };
    Some([at(500), at(990), at(999), longest])
}

/// Returns the operations of each open channel, the busiest first.
fn channels(before: &Sample, after: &Sample, seconds: f64) -> Vec<Channel> {
    let all = after.stats["channels"].as_array().into_iter().flatten();
    let mut channels: Vec<Channel> = all
        .filter_map(|now| {
            let id = now["id"].as_u64()?;
            let earlier = before.channel(id);
            let rate = |name: &str| {
                let was = earlier.and_then(|c| c[name].as_u64()).unwrap_or(0);
                double(now[name].as_u64().unwrap_or(0).saturating_sub(was)) / seconds
            };
            Some(Channel {
                id,
                opened_by: now["opened_by"].as_str().unwrap_or_default().to_owned(),
                in_flight: now["in_flight"].as_u64().unwrap_or(0),
                reads: rate("reads"),
                writes: rate("writes"),
                bytes: rate("read_bytes") + rate("written_bytes"),
            })
        })
        .collect();
    channels.sort_by(|a, b| b.bytes.total_cmp(&a.bytes).then(a.id.cmp(&b.id)));
    channels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ms: u64, reads: u64, hits: u64, latency: &Value) -> Sample {
        Sample::new(&json!({
            "uptime_ms": ms,
            "fs": { "device_reads": reads, "cache_hits": hits, "cache_misses": reads, "writeback_bytes": 5, "dirty_bytes": 7 },
            "latency": latency,
            "channels": [{
                "id": 1, "opened_by": "main", "in_flight": 4,
                "reads": reads, "writes": 0, "read_bytes": 0, "written_bytes": 0,
            }],
            "rocksdb": { "num_snapshots": 3 },
        }))
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let before = sample(1000, 100, 0, &json!([[1000, 50], [2000, 50]]));
        let after = sample(
            3000,
            300,
            600,
            &json!([[1000, 50], [2000, 248], [9000, 1], [50_000, 1]]),
        );
        let report = Report::between(&before, &after);
        assert!((report.reads - 100.0).abs() < 1e-9, "{}", report.reads);
        assert_eq!(report.hit_rate, Some(0.75));
        // There are 198 operations at 2 us, one at 9, and one at 50.
        assert_eq!(report.latency_ns, Some([2000, 2000, 50_000, 50_000]));
        assert!((report.channels[0].reads - 100.0).abs() < 1e-9);
        let channel = &report.json()["channels"][0];
        assert_eq!(
            (&channel["opened_by"], &channel["in_flight"]),
            (&json!("main"), &json!(4))
        );
        assert_eq!(report.rocksdb, [("num_snapshots".to_owned(), 3)]);
        assert_eq!(report.json()["writeback_bytes"], 5);
        assert_eq!(report.json()["dirty_bytes"], 7);
        let width = |text: &str| text.chars().count();
        assert_eq!(width(&report.line()), width(Report::HEADING));
    }

    #[test]
    fn what_does_not_happen_has_no_rate() {
        let sample = sample(1000, 0, 0, &json!([]));
        let report = Report::between(&sample, &sample);
        assert_eq!((report.hit_rate, report.latency_ns), (None, None));
        assert!(report.reads.abs() < 1e-9);
        assert!(report.line().contains('-'));
        // An answer of another kind must not cause a panic.
        let odd = Sample::new(&json!({ "latency": 7, "channels": { "a": 1 }, "fs": [] }));
        Report::between(&sample, &odd);
        Report::since_the_start(&odd);
    }
}
