//! The `pumice` command: each module has a subcommand, or several that are alike.

// `pumice_bdev_control::say!` and `complain!` print: see `pumice_bdev_control::terminal`.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod access;
mod bdev;
mod blob;
mod config;
mod copy;
mod doctor;
mod failure;
#[cfg(test)]
mod fake_host;
mod files;
mod fsck;
mod grow;
mod holder;
mod journal;
mod mkfs;
mod mount;
mod nvme;
mod rescue;
mod rocksdb;
mod rpc;
mod serve;
mod setup;
mod signals;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use pumice_bdev_control::config::NamedDevices;

/// Tools for Pumice's devices, blobstores and file systems.
#[derive(Parser)]
#[command(name = "pumice", version)]
struct Cli {
    /// Configuration file (SPDK's JSON): DEVICE may be the name of one of its devices, as `Nvme0n1`
    #[arg(long = "json", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Setup),
    Doctor(doctor::Doctor),
    Blob(blob::BlobArgs),
    Fsck(fsck::Fsck),
    Rescue(rescue::Rescue),
    Mkfs(mkfs::Mkfs),
    Grow(grow::Grow),
    Journal(journal::JournalArgs),
    Mount(mount::MountArgs),
    Ls(files::Ls),
    Cat(files::Cat),
    Cp(copy::Cp),
    Rm(files::Rm),
    Mv(files::Mv),
    Df(files::Df),
    Stat(files::StatArgs),
    Mkdir(files::Mkdir),
    Rmdir(files::Rmdir),
    Nvme(nvme::Nvme),
    Bdev(bdev::Bdev),
    Config(config::Config),
    Rpc(rpc::Rpc),
    Top(top::Top),
    Db(rocksdb::DbTool),
    Ldb(rocksdb::Ldb),
    #[command(name = "sst_dump")]
    SstDump(rocksdb::SstDump),
}

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(Cli::command) {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match (error.exit_code(), is_fsck()) {
                (0, _) => ExitCode::SUCCESS,
                (_, true) => ExitCode::from(fsck::USAGE),
                (_, false) => ExitCode::from(2),
            };
        }
    };
    let code = signals::exit_code(run(cli.command, cli.config));
    match pumice_bdev_control::terminal::outcome() {
        Ok(()) => code,
        Err(e) => {
            pumice_bdev_control::complain!("pumice: standard output: {e}");
            ExitCode::from(if is_fsck() { fsck::OPERATIONAL } else { 1 })
        }
    }
}

/// Whether the command is fsck, which has exit codes of its own.
fn is_fsck() -> bool {
    std::env::args().nth(1).is_some_and(|arg| arg == "fsck")
}

fn run(command: Command, config: Option<PathBuf>) -> ExitCode {
    // `bdev` names its devices itself.
    let names = config
        .as_deref()
        .filter(|_| !matches!(command, Command::Bdev(_)));
    let _named = names.map(NamedDevices::new);
    match command {
        Command::Setup(args) => setup::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Blob(args) => blob::run(&args),
        Command::Fsck(args) => fsck::run(&args),
        Command::Rescue(args) => rescue::run(&args),
        Command::Mkfs(args) => mkfs::run(&args),
        Command::Grow(args) => grow::run(&args),
        Command::Journal(args) => journal::run(&args),
        Command::Mount(args) => mount::run(&args),
        Command::Ls(args) => files::ls(&args),
        Command::Cat(args) => files::cat(&args),
        Command::Cp(args) => copy::cp(&args),
        Command::Rm(args) => files::rm(&args),
        Command::Mv(args) => files::mv(&args),
        Command::Df(args) => files::df(&args),
        Command::Stat(args) => files::stat(&args),
        Command::Mkdir(args) => files::mkdir(&args),
        Command::Rmdir(args) => files::rmdir(&args),
        Command::Nvme(args) => nvme::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Rpc(args) => rpc::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Bdev(args) => bdev::run(&args.or_config(config)),
        Command::Db(args) => rocksdb::db(&args, config.as_deref()),
        Command::Ldb(args) => rocksdb::ldb(&args, config.as_deref()),
        Command::SstDump(args) => rocksdb::sst_dump(&args, config.as_deref()),
    }
}
