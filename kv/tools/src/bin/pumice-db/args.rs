//! The arguments of `pumice db`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Look into a database on a device, and change, copy and check it
#[derive(Parser)]
#[command(name = "pumice-db", bin_name = "pumice db", version)]
pub struct DbTool {
    /// Configuration file (SPDK's JSON): the device may be the name of one of its devices, as `Nvme0n1`
    #[arg(long = "json", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: DbCommand,
}

#[derive(Subcommand)]
pub enum DbCommand {
    Get(Get),
    Put(Put),
    Delete(Delete),
    Scan(Scan),
    Dump(Dump),
    Load(Load),
    Stats(Look),
    Verify(Verify),
    Checkpoint(CopyTo),
    Backup(Backup),
    Restore(Restore),
    Export(Export),
}

/// The place of the database.
#[derive(Args)]
pub struct DbPlace {
    /// Device: an image file, a block device or a URI
    pub device: String,
    /// Directory of the database in the device's file system
    #[arg(long, default_value = "/")]
    pub path: String,
}

/// The keys, and how they are written.
#[derive(Args)]
pub struct Keys {
    /// Column family
    #[arg(long, default_value = "default")]
    pub cf: String,
    /// Keys and values are hexadecimal digits
    #[arg(long)]
    pub hex: bool,
}

/// Print the value of a key
#[derive(Args)]
pub struct Get {
    #[command(flatten)]
    pub place: DbPlace,
    /// Key
    pub key: String,
    #[command(flatten)]
    pub keys: Keys,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Set the value of a key, durably, with the database's own options
#[derive(Args)]
pub struct Put {
    #[command(flatten)]
    pub place: DbPlace,
    /// Key
    pub key: String,
    /// Value
    pub value: String,
    #[command(flatten)]
    pub keys: Keys,
    /// Make the database if there is none
    #[arg(long)]
    pub create: bool,
}

/// Delete a key, durably
#[derive(Args)]
pub struct Delete {
    #[command(flatten)]
    pub place: DbPlace,
    /// Key
    pub key: String,
    #[command(flatten)]
    pub keys: Keys,
}

/// Print keys and values in order, a line each, with a tab between them and `\xNN` for bytes that cannot be printed
#[derive(Args)]
pub struct Scan {
    #[command(flatten)]
    pub place: DbPlace,
    #[command(flatten)]
    pub keys: Keys,
    /// First key
    #[arg(long)]
    pub from: Option<String>,
    /// Key before which to stop
    #[arg(long)]
    pub to: Option<String>,
    /// Most keys
    #[arg(long)]
    pub limit: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Write everything to standard output as text, which `load` reads
#[derive(Args)]
pub struct Dump {
    #[command(flatten)]
    pub place: DbPlace,
    /// Only this column family
    #[arg(long)]
    pub cf: Option<String>,
    /// Write hexadecimal digits
    #[arg(long)]
    pub hex: bool,
}

/// Put everything from standard input, which `dump` has written, into the database
#[derive(Args)]
pub struct Load {
    #[command(flatten)]
    pub place: DbPlace,
    /// Make the database, and column families, if there are none
    #[arg(long)]
    pub create: bool,
}

/// Show sizes and counts
#[derive(Args)]
pub struct Look {
    #[command(flatten)]
    pub place: DbPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Read every record with its checksum
#[derive(Args)]
pub struct Verify {
    #[command(flatten)]
    pub look: Look,
}

/// Make a second database with the same content, which shares the tables, in the same file system
#[derive(Args)]
pub struct CopyTo {
    #[command(flatten)]
    pub place: DbPlace,
    /// Directory in the file system, which must not exist
    pub to: String,
}

/// Add a backup to those in a directory of the same file system
#[derive(Args)]
pub struct Backup {
    #[command(flatten)]
    pub place: DbPlace,
    /// Directory of backups in the file system
    pub to: String,
}

/// Restore a backup into --path, which must be missing or empty, and print its number
#[derive(Args)]
pub struct Restore {
    /// Device: an image file, a block device or a URI
    pub device: String,
    /// Directory of backups in the file system
    pub from: String,
    /// New directory of the database in the device's file system, for example `/restored`
    #[arg(long)]
    pub path: String,
    /// Number of the backup; the latest one by default, which must not be damaged
    #[arg(long)]
    pub backup: Option<u32>,
}

/// Copy the database to a directory of the kernel's file system, where RocksDB opens it without Pumice
#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    pub place: DbPlace,
    /// Directory, missing or empty
    pub to: PathBuf,
}
