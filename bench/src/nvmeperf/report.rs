//! The results as a table and as JSON.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::Workload;
use super::worker::Result;

/// The percentiles shown.
const PERCENTILES: [f64; 7] = [1.0, 10.0, 50.0, 90.0, 99.0, 99.9, 99.99];

/// The sum over all workers.
#[derive(Debug)]
pub struct Report {
    ios: u64,
    iops: f64,
    bytes_per_second: f64,
    sq_doorbells_per_io: f64,
    cq_doorbells_per_io: f64,
    instructions_per_io: std::result::Result<f64, String>,
    latency: Option<Histogram<u64>>,
    retries: u64,
    sleeps: u64,
    queues: Vec<(u64, f64)>,
}

#[expect(clippy::cast_precision_loss, reason = "figures for reading")]
fn float(n: u64) -> f64 {
    n as f64
}

impl Report {
    /// Adds up the results of the workers.
    pub fn new(workload: &Workload, results: &[Result]) -> Report {
        let ios: u64 = results.iter().map(|r| r.ios).sum();
        let per_io = |n: u64| float(n) / float(ios.max(1));
        let queues: Vec<(u64, f64)> = results
            .iter()
            .map(|r| (r.ios, float(r.ios) / r.elapsed.as_secs_f64().max(1e-9)))
            .collect();
        let iops: f64 = queues.iter().map(|q| q.1).sum();
        let mut latency: Option<Histogram<u64>> = None;
        for h in results.iter().filter_map(|r| r.latency.as_ref()) {
            match &mut latency {
                None => latency = Some(h.clone()),
                Some(sum) => {
                    if let Err(error) = sum.add(h) {
                        pumice_bdev_control::complain!(
                            "nvmeperf: latencies not added up: {error:?}"
                        );
                    }
                }
            }
        }
        let instructions: std::result::Result<u64, String> =
            results.iter().map(|r| r.instructions.clone()).sum();
        Report {
            ios,
            iops,
            bytes_per_second: iops * float(workload.io_bytes as u64),
            sq_doorbells_per_io: per_io(results.iter().map(|r| r.queue.sq_doorbells).sum()),
            cq_doorbells_per_io: per_io(results.iter().map(|r| r.queue.cq_doorbells).sum()),
            instructions_per_io: instructions.map(per_io),
            latency,
            retries: results.iter().map(|r| r.queue.retries).sum(),
            sleeps: results.iter().map(|r| r.queue.sleeps).sum(),
            queues,
        }
    }

    /// Returns the results as JSON.
    pub fn json(&self, uri: &str, w: &Workload) -> Value {
        let latency = self.latency.as_ref().map(|h| {
            let mut map = serde_json::Map::new();
            map.insert("mean_ns".into(), json!(h.mean()));
            map.insert("min_ns".into(), json!(h.min()));
            map.insert("max_ns".into(), json!(h.max()));
            for p in PERCENTILES {
                map.insert(format!("p{p}_ns"), json!(h.value_at_quantile(p / 100.0)));
            }
            Value::Object(map)
        });
        json!({
            "device": uri,
            "pattern": format!("{:?}", w.pattern).to_lowercase(),
            "read_percent": w.read_percent,
            "io_bytes": w.io_bytes,
            "depth": w.depth,
            "queues": w.queues,
            "ios": self.ios,
            "iops": self.iops,
            "bytes_per_second": self.bytes_per_second,
            "sq_doorbell_writes_per_io": self.sq_doorbells_per_io,
            "cq_doorbell_writes_per_io": self.cq_doorbells_per_io,
            "instructions_per_io": self.instructions_per_io.as_ref().ok(),
            "retries": self.retries,
            "sleeps": self.sleeps,
            "latency": latency,
            "per_queue": self.queues.iter().map(|(ios, iops)| json!({"ios": ios, "iops": iops})).collect::<Vec<_>>(),
        })
    }

    /// Returns the results as a table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:<28} {value}");
        };
        line("I/Os", format!("{}", self.ios));
        line("I/Os per second", format!("{:.0}", self.iops));
        line(
            "MiB per second",
            format!("{:.1}", self.bytes_per_second / 1_048_576.0),
        );
        if self.queues.len() > 1 {
            for (n, (_, iops)) in self.queues.iter().enumerate() {
                line(&format!("  queue pair {}", n + 1), format!("{iops:.0}"));
            }
        }
        line(
            "doorbell writes per I/O",
            format!(
                "{:.3} submission, {:.3} completion",
                self.sq_doorbells_per_io, self.cq_doorbells_per_io
            ),
        );
        line(
            "instructions per I/O",
            match &self.instructions_per_io {
                Ok(n) => format!("{n:.0} (this program and the driver, user mode)"),
                Err(why) => format!("not counted here: {why}"),
            },
        );
        if self.retries > 0 {
            line("retries", format!("{}", self.retries));
        }
        if self.sleeps > 0 {
            line("sleeps", format!("{}", self.sleeps));
        }
        if let Some(h) = &self.latency {
            line("latency mean", format!("{:.2} us", h.mean() / 1000.0));
            for p in PERCENTILES {
                let ns = h.value_at_quantile(p / 100.0);
                line(
                    &format!("latency p{p}"),
                    format!("{:.2} us", float(ns) / 1000.0),
                );
            }
            line("latency max", format!("{:.2} us", float(h.max()) / 1000.0));
        }
        text
    }
}
