//! Compares file systems under RocksDB on the same disk.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};
use pumice_bench::fscompare::{self, Interrupt, args::Args, table::Comparison};

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(Args::command) {
        return code;
    }
    let args = Args::parse();
    let done = Interrupt::on_signals()
        .and_then(|stop| fscompare::run(&args, &stop))
        .and_then(|comparison| {
            show(&args, &comparison)?;
            comparison.cut_short.map_or(Ok(()), Err)
        });
    match done {
        Ok(()) => pumice_bdev_control::terminal::finished("fscompare", ExitCode::SUCCESS),
        Err(e) => {
            pumice_bdev_control::complain!("fscompare: {e}");
            ExitCode::FAILURE
        }
    }
}

fn show(args: &Args, comparison: &Comparison) -> Result<(), String> {
    let table = comparison.render();
    if args.json.as_deref() == Some("-") {
        pumice_bdev_control::complain!("{table}");
    } else {
        pumice_bdev_control::say!("{table}");
    }
    // The page goes first: a reader of standard output may have gone.
    if let Some(path) = &args.html {
        std::fs::write(path, comparison.page())
            .map_err(|e| format!("--html={}: {e}", path.display()))?;
    }
    let Some(path) = &args.json else {
        return Ok(());
    };
    let json = serde_json::to_string_pretty(comparison).map_err(|e| e.to_string())?;
    if path == "-" {
        pumice_bdev_control::say!("{json}");
        return Ok(());
    }
    std::fs::write(path, json + "\n").map_err(|e| format!("--json={path}: {e}"))
}
