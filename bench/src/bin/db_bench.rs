//! RocksDB's `db_bench` on the kernel's file system, in memory, or on Pumice's own.

use std::io::Write as _;
use std::process::ExitCode;

use pumice_bench::db_bench::{flags, gflags, plan, report::Report, runner};

fn main() -> ExitCode {
    let flags = match flags::parse(std::env::args().skip(1)) {
        Ok(gflags::Parsed::Run(flags, _)) => flags,
        Ok(gflags::Parsed::Help) => {
            pumice_bdev_control::terminal::print(&gflags::help::<flags::Flags>(&intro()));
            return ExitCode::SUCCESS;
        }
        Ok(gflags::Parsed::Version) => {
            pumice_bdev_control::say!(
                "db_bench {} (RocksDB {})",
                env!("CARGO_PKG_VERSION"),
                runner::ROCKSDB_VERSION
            );
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            pumice_bdev_control::complain!("db_bench: {e}");
            return ExitCode::from(2);
        }
    };
    let to_stderr = flags.json == "-";
    let mut say = |line: &str| {
        // A closed pipe is no reason to stop in the middle of a benchmark.
        if to_stderr {
            let _ = writeln!(std::io::stderr(), "{line}");
        } else {
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    };
    let done = runner::run(&flags, &mut say).and_then(|r| write_json(&flags.json, &r));
    match done {
        Ok(()) => pumice_bdev_control::terminal::finished("db_bench", ExitCode::SUCCESS),
        Err(e) => {
            pumice_bdev_control::complain!("db_bench: {e}");
            ExitCode::FAILURE
        }
    }
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

fn intro() -> String {
    let mut text = "db_bench: RocksDB's benchmarks on the kernel's file system (--env=kernel), in memory (--env=mem)\nor on Pumice's own (the default). Flags and results are those of RocksDB's tool.\n\nBenchmarks for --benchmarks:\n".to_owned();
    for (name, what) in plan::BENCHMARKS {
        text.push_str(&format!("  {name:<23} {what}\n"));
    }
    text
}
