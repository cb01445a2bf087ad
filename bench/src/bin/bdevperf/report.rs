//! The results as a table or as JSON.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pumice_bdev::registry::Bdev;
use pumice_bdev::stats::bucket_end;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_io::sys::Clock;
use serde_json::{Value, json};

use super::Placed;
use super::args::Settings;
use super::job::Outcome;

pub fn heading(settings: &Settings, plan: &[Placed]) {
    pumice_bdev_control::say!(
        "Running {} of {} bytes, depth {}, for {} s on {} job(s)",
        settings.name,
        settings.io_bytes,
        settings.depth,
        settings.time.as_secs(),
        plan.len()
    );
}

/// Prints the rate of each `period`, until `over`.
pub fn live(plan: &[Placed], settings: &Settings, period: Duration, over: &AtomicBool) {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    let mut bdevs: Vec<&Bdev> = Vec::new();
    for placed in plan {
        let name = &placed.bdev.info().name;
        if bdevs.iter().all(|b| b.info().name != *name) {
            bdevs.push(&placed.bdev);
        }
    }
    let ops = || -> u64 {
        let of = |b: &&Bdev| OpKind::ALL.map(|k| b.stats().of(k).ops).iter().sum::<u64>();
        bdevs.iter().map(of).sum()
    };
    let (mut last, mut at, mut due) = (ops(), Instant::now(), period);
    let start = at;
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK_EVERY);
        if start.elapsed() < due {
            continue;
        }
        due += period;
        let (now, seconds) = (ops(), at.elapsed().as_secs_f64());
        let iops = (now - last) as f64 / seconds;
        pumice_bdev_control::complain!(
            "{:>8.1} s {iops:>14.2} IOPS {:>11.2} MiB/s",
            start.elapsed().as_secs_f64(),
            iops * settings.io_bytes as f64 / (1 << 20) as f64
        );
        (last, at) = (now, Instant::now());
    }
}

struct Figures {
    iops: f64,
    mibps: f64,
    failed: f64,
    average_us: f64,
    min_us: f64,
    max_us: f64,
}

fn figures(settings: &Settings, o: &Outcome) -> Figures {
    let seconds = o.runtime.as_secs_f64().max(1e-9);
    let clock = Clock::get();
    let us = |ticks: u64| clock.to_ns(ticks) as f64 / 1000.0;
    let iops = o.ops as f64 / seconds;
    Figures {
        iops,
        mibps: iops * settings.io_bytes as f64 / (1 << 20) as f64,
        failed: o.failed as f64 / seconds,
        average_us: us(o.latency.latency_ticks) / o.latency.ops.max(1) as f64,
        min_us: us(o.latency.min_latency_ticks),
        max_us: us(o.latency.max_latency_ticks),
    }
}

pub fn table(settings: &Settings, outcomes: &[Outcome]) {
    pumice_bdev_control::say!(
        "{:<24} {:>4} {:>10} {:>14} {:>11} {:>9} {:>10} {:>9} {:>11}",
        "Device",
        "Core",
        "Runtime s",
        "IOPS",
        "MiB/s",
        "Fail/s",
        "Average us",
        "Min us",
        "Max us"
    );
    let (mut iops, mut mibps) = (0.0, 0.0);
    for o in outcomes {
        let f = figures(settings, o);
        iops += f.iops;
        mibps += f.mibps;
        pumice_bdev_control::say!(
            "{:<24} {:>4} {:>10.2} {:>14.2} {:>11.2} {:>9.2} {:>10.3} {:>9.3} {:>11.3}",
            o.bdev,
            o.core,
            o.runtime.as_secs_f64(),
            f.iops,
            f.mibps,
            f.failed,
            f.average_us,
            f.min_us,
            f.max_us
        );
        if let Some(e) = &o.first_error {
            pumice_bdev_control::say!(
                "  {} failed, {} miscompares; first: {e}",
                o.failed,
                o.miscompares
            );
        }
    }
    pumice_bdev_control::say!(
        "{:<24} {:>4} {:>10} {iops:>14.2} {mibps:>11.2}",
        "Total",
        "",
        ""
    );
    for o in outcomes.iter().filter(|o| o.cpu_ns_per_io > 0.0) {
        pumice_bdev_control::say!(
            "{}: {:.1} ns of processor time per I/O",
            o.bdev,
            o.cpu_ns_per_io
        );
    }
    if let Some(first) = outcomes.iter().map(|o| o.first_io).min() {
        pumice_bdev_control::say!(
            "First I/O {:.1} ms after the start",
            first.as_secs_f64() * 1000.0
        );
    }
}

pub fn percentiles(bdevs: &[Bdev]) {
    let clock = Clock::get();
    for bdev in bdevs {
        let Some(buckets) = bdev.histogram() else {
            continue;
        };
        let total: u64 = buckets.iter().sum();
        pumice_bdev_control::say!("Latency of {}:", bdev.info().name);
        for percent in [1.0, 10.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999] {
            let wanted = total as f64 * percent / 100.0;
            let mut seen = 0;
            let bucket = buckets.iter().position(|n| {
                seen += n;
                seen as f64 >= wanted
            });
            let ns = clock.to_ns(bucket_end(bucket.unwrap_or(0)));
            pumice_bdev_control::say!("{percent:>9} % : {:>10.3} us", ns as f64 / 1000.0);
        }
    }
}

pub fn json(settings: &Settings, outcomes: &[Outcome], cores: usize) -> Value {
    let results: Vec<Value> = outcomes
        .iter()
        .map(|o| {
            let f = figures(settings, o);
            json!({
                "job": o.bdev,
                "core_mask": format!("{:#x}", 1_u128.checked_shl(u32::try_from(o.core).unwrap_or(0)).unwrap_or(0)),
                "workload": settings.name,
                "status": if o.is_failure() { "failed" } else { "finished" },
                "queue_depth": settings.depth,
                "io_size": settings.io_bytes,
                "runtime": o.runtime.as_secs_f64(),
                "iops": f.iops,
                "mibps": f.mibps,
                "io_failed": o.failed,
                "miscompares": o.miscompares,
                "error": o.first_error,
                "avg_latency_us": f.average_us,
                "min_latency_us": f.min_us,
                "max_latency_us": f.max_us,
                "cpu_ns_per_io": o.cpu_ns_per_io,
                "first_io_ms": o.first_io.as_secs_f64() * 1000.0,
            })
        })
        .collect();
    json!({ "results": results, "core_count": cores })
}
