//! RocksDB's own `db_bench` on Pumice's file system, the kernel's, or in memory.

use std::io::{IsTerminal as _, Write};
use std::process::ExitCode;

use pumice_bench::db_bench::flags::{self, Flags};
use pumice_bench::db_bench::gflags::{self, Parsed};
use pumice_bench::db_bench::listen::Listener;
use pumice_bench::db_bench::ours::Ours;
use pumice_bench::db_bench::report::{self, Report, RunInfo};
use pumice_bench::db_bench::target::Target;
use pumice_bench::db_bench::workload::Workload;
use pumice_rocksdb_tools::db_bench;

/// Benchmarks that run without `--benchmarks`.
const DEFAULT_BENCHMARKS: &str = "fillrandom,readrandom";

const INTRO: &str = "db_bench: RocksDB's own benchmark tool, on Pumice's file system (--env=pumice, the default), on the kernel's\n(--env=kernel) or in memory (--env=mem). Without --benchmarks: fillrandom, readrandom, and a look at every key.";

fn main() -> ExitCode {
    let known = db_bench::flags();
    // Without the other programs it is built without clap.
    #[cfg(feature = "compare")]
    if let Some(code) =
        pumice_describe::asked(|| gflags::command::<Flags>("db_bench", INTRO, &known))
    {
        return code;
    }
    let (own, given, ignored) = match flags::parse(std::env::args().skip(1), &known) {
        Ok(Parsed::Run {
            own,
            others,
            ignored,
        }) => (own, others, ignored),
        Ok(Parsed::Help) => {
            pumice_bdev_control::terminal::print(&gflags::help::<Flags>(INTRO, &known));
            return ExitCode::SUCCESS;
        }
        Ok(Parsed::Version) => {
            pumice_bdev_control::say!(
                "db_bench {} (RocksDB {})",
                env!("CARGO_PKG_VERSION"),
                pumice_rocksdb_tools::rocksdb_version()
            );
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            pumice_bdev_control::complain!("db_bench: {e}");
            return ExitCode::from(2);
        }
    };
    for word in ignored {
        pumice_bdev_control::complain!("db_bench: '{word}' is ignored: flags start with --");
    }
    for (name, value) in &given {
        if db_bench::set(name, value).is_err() {
            pumice_bdev_control::complain!(
                "db_bench: --{name}={value}: not a value that it can have"
            );
            return ExitCode::from(2);
        }
    }
    if !given.iter().any(|(name, _)| name == "benchmarks")
        && db_bench::set("benchmarks", DEFAULT_BENCHMARKS).is_err()
    {
        return ExitCode::FAILURE;
    }
    // Its counter goes back to the start of the line each time, which is of no use in a file.
    let progress = [
        "progress_reports",
        "stats_interval",
        "stats_interval_seconds",
    ];
    if !std::io::stderr().is_terminal()
        && !given.iter().any(|(name, _)| progress.contains(&&name[..]))
        && db_bench::set("progress_reports", "false").is_err()
    {
        return ExitCode::FAILURE;
    }
    if let Err(e) = flags::check(&own) {
        pumice_bdev_control::complain!("db_bench: {e}");
        return ExitCode::from(2);
    }
    match run(&own, given) {
        Ok(code) => pumice_bdev_control::terminal::finished("db_bench", code),
        Err(e) => {
            pumice_bdev_control::complain!("db_bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(own: &Flags, given: Vec<(String, String)>) -> Result<ExitCode, String> {
    pumice::register_uri();
    let workload = Workload::of_process();
    let target = Target::open(own, &workload)?;
    let inspection = target.inspection(own)?;
    set("db", &target.db)?;
    let report_file = workload.report_file.filter(|_| target.ours.is_some());
    if report_file.is_some() {
        set("report_file", Ours::report_path())?;
    }
    let info = RunInfo {
        env: target.env,
        file_system: target.words.clone(),
        db: target.db.clone(),
        durability: target.durability.clone(),
        built_for: report::built_for(),
        flags: given.into_iter().collect(),
    };
    let mut out: Box<dyn Write + Send> = if own.json == "-" {
        Box::new(std::io::stderr())
    } else {
        Box::new(std::io::stdout())
    };
    // A closed pipe is not a reason to stop, here and below.
    let _ = writeln!(out, "{}", report::header(&info));
    let io = || target.io();
    let mut listener = Listener::new(out, &io, workload.sync);
    let code =
        db_bench::run(&target.files, |text| listener.hear(text)).map_err(|e| e.to_string())?;
    let results = std::mem::take(&mut listener.results);
    if code == 0 && !results.is_empty() {
        listener.hear(report::summary(&results).as_bytes());
        listener.hear(b"\n");
    }
    let verified = (code == 0 && own.verify).then(db_bench::verify);
    if let Some(Ok(keys)) = &verified {
        listener.hear(
            format!("  verified: {keys} keys, each the same by a scan and by Get\n").as_bytes(),
        );
    }
    drop(listener);
    if let (Some(path), Some(ours)) = (&report_file, &target.ours) {
        ours.copy_report(path)?;
    }
    drop(inspection);
    target.close()?;
    let report = Report {
        info,
        results,
        verified_keys: verified
            .as_ref()
            .and_then(|keys| keys.as_ref().ok().copied()),
        verify_error: verified.and_then(Result::err),
    };
    write_json(&own.json, &report)?;
    if let Some(error) = report.verify_error {
        return Err(format!("--verify: {error}"));
    }
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn set(name: &str, value: &str) -> Result<(), String> {
    db_bench::set(name, value).map_err(|_| format!("--{name}={value}: refused by RocksDB's tool"))
}

fn write_json(path: &str, report: &Report) -> Result<(), String> {
    if path.is_empty() {
        return Ok(());
    }
    let text = serde_json::to_string_pretty(report).map_err(|e| format!("--json: {e}"))?;
    if path == "-" {
        pumice_bdev_control::say!("{text}");
        return Ok(());
    }
    std::fs::write(path, text + "\n").map_err(|e| format!("--json={path}: {e}"))
}
