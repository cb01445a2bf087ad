//! `pumice grow`: a larger file system, and a longer image file below it.

use std::process::ExitCode;

use clap::Args;
use pumice_bdev::parse_size;
use pumice_bdev_control::say;
use pumice_bdev_control::terminal::print_json;
use serde_json::json;

use crate::files::{Failure, fail, human};

/// Make a file system larger, and the image file that it is on longer
#[derive(Args)]
pub struct Grow {
    /// The device, which nobody may have mounted
    uri: String,
    /// Size that an image file gets: 8G. Without it the file system takes what its device has become
    #[arg(value_parser = size)]
    size: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text)
}

/// Runs it.
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
