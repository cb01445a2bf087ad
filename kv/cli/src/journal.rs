//! `pumice journal`: adds a journal to a file system that has none.

use std::process::ExitCode;

use clap::Args;
use pumice_bdev_control::say;
use pumice_bdev_control::terminal::print_json;
use pumice_blobfs::fs;
use serde_json::json;

use crate::failure::{Failure, fail};
use crate::files::human;
use crate::mkfs::journal;

/// Add a journal to a file system that SPDK or an earlier version has made
///
/// It is used from the next mount on. SPDK refuses the file system then, until it was unmounted in
/// order
#[derive(Args)]
pub struct JournalArgs {
    /// Device, which must not be mounted
    uri: String,
    /// Bytes of the journal, 128K to 256M; `auto` is a 64th of the device, at most 32M
    #[arg(long, value_name = "SIZE|auto", default_value = "auto", value_parser = some_journal)]
    size: fs::Journal,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn some_journal(text: &str) -> Result<fs::Journal, String> {
    match journal(text)? {
        fs::Journal::None => Err("a journal is not removed; `auto`, or a size".to_owned()),
        journal => Ok(journal),
    }
}

/// Runs the command.
pub fn run(args: &JournalArgs) -> ExitCode {
    match fs::add_journal(&args.uri, args.size) {
        Ok(space) if args.json => {
            print_json(&json!({
                "device": args.uri,
                "journal_bytes": space.journal,
                "free_bytes": space.free,
            }));
            ExitCode::SUCCESS
        }
        Ok(space) => {
            say!(
                "{}: a journal of {}, {} free",
                args.uri,
                human(space.journal),
                human(space.free)
            );
            ExitCode::SUCCESS
        }
        Err(e) => fail("journal", &Failure::from(e)),
    }
}
