//! Compares file systems under RocksDB on the same disk.

use std::process::ExitCode;

use clap::Parser;
use pumice_bench::fscompare::{self, Stop, args::Args};

fn main() -> ExitCode {
    let args = Args::parse();
    let done = Stop::on_signals()
        .and_then(|stop| fscompare::run(&args, &stop))
        .and_then(|comparison| {
            let table = comparison.render();
            let Some(path) = &args.json else {
                println!("{table}");
                return Ok(());
            };
            let json = serde_json::to_string_pretty(&comparison).map_err(|e| e.to_string())?;
            if path == "-" {
                eprintln!("{table}");
                println!("{json}");
                return Ok(());
            }
            println!("{table}");
            std::fs::write(path, json + "\n").map_err(|e| format!("--json={path}: {e}"))
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fscompare: {e}");
            ExitCode::FAILURE
        }
    }
}
