//! The `pumice` command: one subcommand per module.

mod doctor;
#[cfg(test)]
mod fake_host;
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
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}
