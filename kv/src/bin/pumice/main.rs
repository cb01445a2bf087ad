//! The `pumice` command: one subcommand per module.

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
enum Command {}

fn main() -> ExitCode {
    match Cli::parse().command {}
}
