//! `bdevperf` measures block devices, with the flags of SPDK's tool of that name.

mod affinity;
mod args;
mod job;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{CommandFactory as _, Parser};
use pumice_bdev::OpenOptions;
use pumice_bdev::contents::{self, Overwrite};
use pumice_bdev::registry::{Bdev, TimeoutAction};
use pumice_bdev_control::config::{self, App};
use pumice_bdev_control::metrics::MetricsServer;
use pumice_bdev_control::rpc::{RpcServer, ServerOptions};

use args::Args;
use job::{Job, Outcome};

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(Args::command) {
        return code;
    }
    let start = Instant::now();
    let args = Args::parse();
    match run(&args, start) {
        Ok(true) => pumice_bdev_control::terminal::finished("bdevperf", ExitCode::SUCCESS),
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            pumice_bdev_control::complain!("bdevperf: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, start: Instant) -> Result<bool, String> {
    pumice_bdev_control::logging::init("WARNING", &args.log_flags)?;
    let settings = args.settings()?;
    let app = Arc::new(App::new());
    if let Some(file) = args.config_file() {
        config::load_file(&app, file).map_err(|e| e.to_string())?;
    }
    let mut names = args.bdev.clone();
    let options = OpenOptions::new().read_only(!settings.work.writes());
    for uri in args.uris() {
        let dev = app.open_with(uri, options).map_err(|e| e.to_string())?;
        names.push(dev.info().name.clone());
    }
    let bdevs = chosen(&app, &names)?;
    if settings.work.writes() {
        for bdev in &bdevs {
            contents::may_overwrite(bdev, Overwrite::forced(args.force))
                .map_err(|e| e.to_string())?;
        }
    }
    if let Some(us) = args.timeout_s.map(|s| s * 1_000_000) {
        app.registry
            .set_timeout(Duration::from_micros(us), TimeoutAction::Log);
    }
    let _rpc = match &args.rpc_socket {
        None => None,
        Some(path) => Some(
            RpcServer::start(Arc::clone(&app), path, ServerOptions::default())
                .map_err(|e| e.to_string())?,
        ),
    };
    let _metrics = match &args.metrics {
        None => None,
        Some(address) => {
            Some(MetricsServer::start(app.registry.clone(), address).map_err(|e| e.to_string())?)
        }
    };
    if args.latency {
        bdevs.iter().for_each(|b| b.enable_histogram(true, None));
    }
    let cores = args.cores()?;
    let plan = plan(&bdevs, &cores, args.every_core);
    if !args.json_output() {
        report::heading(&settings, &plan);
    }
    let outcomes = run_jobs(args, &settings, &plan, start)?;
    let failed = outcomes.iter().any(Outcome::is_failure);
    if args.json_output() {
        pumice_bdev_control::say!("{}", report::json(&settings, &outcomes, cores.len()));
    } else {
        report::table(&settings, &outcomes);
        if args.latency {
            report::percentiles(&bdevs);
        }
    }
    Ok(!failed)
}

/// Returns the named devices, or all that no other is built on.
fn chosen(app: &App, names: &[String]) -> Result<Vec<Bdev>, String> {
    let registry = &app.registry;
    if names.is_empty() {
        let free: Vec<Bdev> = registry
            .list()
            .into_iter()
            .filter(|b| b.claimed_by().is_none())
            .collect();
        if free.is_empty() {
            return Err("no bdevs configured: pass --json or a URI".to_owned());
        }
        return Ok(free);
    }
    names
        .iter()
        .map(|name| {
            registry.open(name).map_err(|e| e.to_string())?;
            registry
                .get(name)
                .ok_or_else(|| registry.not_found(name).to_string())
        })
        .collect()
}

/// A device and the core that it runs on.
struct Placed {
    bdev: Bdev,
    core: usize,
}

fn plan(bdevs: &[Bdev], cores: &[usize], every_core: bool) -> Vec<Placed> {
    if every_core {
        let pairs = bdevs
            .iter()
            .flat_map(|b| cores.iter().map(move |c| (b, *c)));
        return pairs
            .map(|(b, core)| Placed {
                bdev: b.clone(),
                core,
            })
            .collect();
    }
    let cores = cores.iter().cycle();
    bdevs
        .iter()
        .zip(cores)
        .map(|(b, core)| Placed {
            bdev: b.clone(),
            core: *core,
        })
        .collect()
}

/// Runs one thread per core, with all the jobs of that core.
fn run_jobs(
    args: &Args,
    settings: &args::Settings,
    plan: &[Placed],
    start: Instant,
) -> Result<Vec<Outcome>, String> {
    let (stop, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut cores: Vec<usize> = plan.iter().map(|p| p.core).collect();
    cores.sort_unstable();
    cores.dedup();
    let results: Vec<Result<Vec<Outcome>, String>> = std::thread::scope(|scope| {
        if let Some(period_s) = args.period_s.filter(|s| *s > 0) {
            let (over, period) = (&over, Duration::from_secs(period_s));
            scope.spawn(move || report::live(plan, settings, period, over));
        }
        let handles: Vec<_> = cores
            .into_iter()
            .map(|core| {
                let mine: Vec<&Placed> = plan.iter().filter(|p| p.core == core).collect();
                let stop = &stop;
                scope.spawn(move || {
                    if args.core_mask.is_some() {
                        affinity::pin(core).map_err(|e| format!("core {core}: {e}"))?;
                    }
                    let mut jobs = Vec::new();
                    for (i, placed) in mine.into_iter().enumerate() {
                        let seed = (core * 1000 + i + 1) as u64;
                        jobs.push(Job::new(&placed.bdev, core, settings, seed)?);
                    }
                    Ok(job::run(&mut jobs, settings, stop, start))
                })
            })
            .collect();
        let joined = handles.into_iter().map(|h| {
            let result = h
                .join()
                .unwrap_or_else(|_| Err("a worker panicked".to_owned()));
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            result
        });
        let results = joined.collect();
        over.store(true, Ordering::Relaxed);
        results
    });
    let mut outcomes = Vec::new();
    for result in results {
        outcomes.extend(result?);
    }
    Ok(outcomes)
}
