//! `pumice grow`: makes a file system larger, and the image file below it longer.

use std::process::ExitCode;

use clap::Args;
use pumice_bdev::parse_size;
use pumice_bdev_control::say;
use pumice_bdev_control::terminal::print_json;
use serde_json::json;

use crate::failure::{Failure, fail};
use crate::files::human;

/// Make a file system larger, and the image file below it longer
#[derive(Args)]
pub struct Grow {
    /// Device, which must not be mounted
    uri: String,
    /// New size of an image file: 8G. Without it the file system uses the current size of its
    /// device
    #[arg(value_parser = size)]
    size: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text)
}

/// Runs the command.
pub fn run(args: &Grow) -> ExitCode {
    match pumice_blobfs::fs::grow(&args.uri, args.size) {
        Ok(space) if args.json => {
            print_json(&json!({
                "device": args.uri,
                "total_bytes": space.total,
                "free_bytes": space.free,
                "md_pages": space.md_pages,
            }));
            ExitCode::SUCCESS
        }
        Ok(space) => {
            say!(
                "{}: BlobFS of {}, {} free, {} pages of metadata",
                args.uri,
                human(space.total),
                human(space.free),
                space.md_pages
            );
            ExitCode::SUCCESS
        }
        Err(e) => fail("grow", &Failure::from(e)),
    }
}
