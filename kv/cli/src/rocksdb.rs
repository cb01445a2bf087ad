//! What needs RocksDB: `pumice db`, and RocksDB's own tools. They are programs of their own, since this one does not link it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;
use pumice_bdev_control::complain;

/// Look into a database on a device, and change, copy and check it: get, scan, dump, verify, backup and the rest
#[derive(Args)]
#[command(name = "db", disable_help_flag = true)]
pub struct DbTool {
    /// A command and its arguments, the device first: `scan disk.img --limit 10`; `--help` lists them
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Run RocksDB's ldb on the databases of a file system: get, put, scan, dump, repair and the rest
#[derive(Args)]
#[command(name = "ldb")]
pub struct Ldb {
    /// The device, then ldb's own arguments, whose paths are paths of the file system: `disk.img --db=/ scan`
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "DEVICE ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Run RocksDB's sst_dump on the tables of a file system
#[derive(Args)]
#[command(name = "sst_dump")]
pub struct SstDump {
    /// The device, then sst_dump's own arguments: `disk.img --file=/000010.sst --command=check`
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "DEVICE ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Becomes `pumice-db`.
pub fn db(args: &DbTool, config: Option<&Path>) -> ExitCode {
    become_program("db", config, &args.arguments)
}

/// Becomes `pumice-ldb`.
pub fn ldb(args: &Ldb, config: Option<&Path>) -> ExitCode {
    become_program("ldb", config, &args.arguments)
}

/// Becomes `pumice-sst_dump`.
pub fn sst_dump(args: &SstDump, config: Option<&Path>) -> ExitCode {
    become_program("sst_dump", config, &args.arguments)
}

fn become_program(tool: &str, config: Option<&Path>, arguments: &[OsString]) -> ExitCode {
    let name = format!("pumice-{tool}");
    let beside = std::env::current_exe().map(|this| this.with_file_name(&name));
    let program = match beside {
        Ok(path) if path.is_file() => path,
        // Wherever the PATH has it.
        _ => PathBuf::from(&name),
    };
    let mut command = Command::new(program);
    if let Some(config) = config {
        command.arg("--json").arg(config);
    }
    let error = command.args(arguments).exec();
    complain!(
        "pumice {tool}: the program {name} could not be run: {error}; \
         `cargo install --path kv/tools` installs it"
    );
    ExitCode::FAILURE
}
