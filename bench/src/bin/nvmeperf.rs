//! Measures the NVMe driver on a namespace, through any transport.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{CommandFactory as _, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use pumice_bdev::contents::{self, Overwrite};
use pumice_io::uri::parse_size;
use pumice_nvme::ControllerOptions;
use pumice_nvme_soft::open_with;

use pumice_bench::nvmeperf::report::Report;
use pumice_bench::nvmeperf::worker::{self, SharedRun};
use pumice_bench::nvmeperf::{Kind, Workload};

/// Measure the NVMe driver alone on a namespace: rates, latencies, doorbells, instructions
#[derive(Parser)]
#[command(name = "nvmeperf", version)]
struct Args {
    /// Namespace: soft://null?size=1G, soft://memory, nvme://0000:00:03.0/1,
    /// vfio-user:///run/cntrl/1
    #[arg(default_value = "soft://null?size=1G")]
    uri: String,
    /// read, write, rw, randread, randwrite, randrw. Writes need --force unless the namespace holds
    /// only zeroes.
    #[arg(short, long, default_value = "randread")]
    workload: Kind,
    /// Percentage of reads, for rw and randrw
    #[arg(short = 'm', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    read_percent: u32,
    /// Bytes of an I/O, such as 4096 or 128K
    #[arg(short = 'o', long, default_value = "4096")]
    io_size: String,
    /// I/Os in flight per queue pair
    #[arg(short = 'q', long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4095))]
    depth: u16,
    /// Queue pairs, each with a thread of its own
    #[arg(short = 'c', long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    queues: u16,
    /// Duration in seconds
    #[arg(short, long, default_value_t = 5.0)]
    time: f64,
    /// Stop each queue pair after this many I/Os, if that comes first
    #[arg(short = 'n', long, default_value_t = 0)]
    count: u64,
    /// Sleep until interrupts when nothing completes, instead of polling
    #[arg(long)]
    wait: bool,
    /// Do not measure the time of each I/O
    #[arg(long)]
    no_latency: bool,
    /// Do not use SGLs
    #[arg(long)]
    no_sgl: bool,
    /// Do not use shadow doorbells
    #[arg(long)]
    no_shadow: bool,
    /// Seed of the random blocks
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write even to a namespace that does not hold only zeroes: its content is lost
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(Args::command) {
        return code;
    }
    match run(&Args::parse()) {
        Ok(()) => pumice_bdev_control::terminal::finished("nvmeperf", ExitCode::SUCCESS),
        Err(error) => {
            pumice_bdev_control::complain!("nvmeperf: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether data may be lost: reads lose nothing, and these devices belong to this process only.
fn writes(args: &Args) -> bool {
    let read_percent = args.workload.read_percent.unwrap_or(args.read_percent);
    let own = ["soft://null", "soft://memory"];
    read_percent < 100 && !own.iter().any(|scheme| args.uri.starts_with(scheme))
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut options = ControllerOptions::default();
    options.sgl = !args.no_sgl;
    options.shadow_doorbells = !args.no_shadow;
    if writes(args) {
        // The block devices have the one rule for what may be overwritten.
        let dev = pumice_bdev::open(&args.uri)?;
        contents::may_overwrite(&*dev, Overwrite::forced(args.force))?;
    }
    let opened = open_with(&args.uri, options)?;
    let ns = opened.namespace()?;
    let io_bytes = parse_size(&args.io_size)
        .ok()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| *n > 0 && n.is_multiple_of(ns.block_size() as usize))
        .ok_or_else(|| {
            format!(
                "I/O size {} is not a multiple of the block size {}",
                args.io_size,
                ns.block_size()
            )
        })?;
    if io_bytes as u64 > ns.len_bytes() {
        return Err("the namespace is smaller than one I/O".into());
    }
    if !(args.time > 0.0 && args.time < 1e7) {
        return Err("--time needs a number of seconds above 0".into());
    }
    let workload = Workload {
        pattern: args.workload.pattern,
        read_percent: args.workload.read_percent.unwrap_or(args.read_percent),
        io_bytes,
        depth: args.depth,
        queues: args.queues,
        wait: args.wait,
        latency: !args.no_latency,
        seed: args.seed,
        count: args.count,
    };
    let shared = SharedRun {
        controller: opened.controller,
        ns,
        workload,
        stop: AtomicBool::new(false),
        progress: AtomicU64::new(0),
    };
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..args.queues)
            .map(|n| {
                let shared = &shared;
                scope.spawn(move || worker::run(shared, n))
            })
            .collect();
        watch(&shared, Duration::from_secs_f64(args.time), &|| {
            workers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        });
        shared.stop.store(true, Ordering::Relaxed);
        workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| Err("a worker panicked".into())))
            .collect::<Result<Vec<_>, _>>()
    })
    .map_err(|e| e.to_string())?;
    let report = Report::new(&shared.workload, &results);
    if args.json {
        pumice_bdev_control::say!("{:#}", report.json(&args.uri, &shared.workload));
    } else {
        pumice_bdev_control::terminal::print(&report.table());
    }
    Ok(())
}

/// Waits for the end, and shows the progress on a terminal.
fn watch(shared: &SharedRun, time: Duration, done: &dyn Fn() -> bool) {
    let start = Instant::now();
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::new(100)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent}% {msg}") {
        bar.set_style(style);
    }
    while start.elapsed() < time && !done() {
        let left = time.saturating_sub(start.elapsed());
        std::thread::sleep(left.min(Duration::from_millis(100)));
        let ios = shared.progress.load(Ordering::Relaxed);
        let seconds = start.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a figure for reading")]
        let rate = ios as f64 / seconds.max(1e-9);
        bar.set_message(format!("{rate:.0} I/Os per second"));
        let percent = seconds / time.as_secs_f64() * 100.0;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 100"
        )]
        bar.set_position(percent.clamp(0.0, 100.0) as u64);
    }
    bar.finish_and_clear();
}
