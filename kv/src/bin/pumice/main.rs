//! The `pumice` command: one subcommand per module.

mod blob;
mod doctor;
#[cfg(test)]
mod fake_host;
mod fsck;
mod setup;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tools for Pumice's devices, blobstores and file systems.
#[derive(Parser)]
#[command(name = "pumice", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Setup),
    Doctor(doctor::Doctor),
    Blob(blob::BlobArgs),
    Fsck(fsck::Fsck),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // fsck's exit codes have one for a wrong command line.
            let is_fsck = std::env::args().nth(1).is_some_and(|arg| arg == "fsck");
            let _ = error.print();
            return match (error.exit_code(), is_fsck) {
                (0, _) => ExitCode::SUCCESS,
                (_, true) => ExitCode::from(fsck::USAGE),
                (_, false) => ExitCode::from(2),
            };
        }
    };
    match cli.command {
        Command::Setup(args) => setup::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Blob(args) => blob::run(&args),
        Command::Fsck(args) => fsck::run(&args),
    }
}
