//! `pumice rescue`: copies the readable files of a file system to the kernel's, and lists the
//! others.

mod copy;
mod salvage;
mod target;

use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use pumice_bdev::BlockDevice;
use pumice_bdev_control::terminal::{print_json, visible};
use pumice_bdev_control::{complain, say};
use pumice_blobfs::fs::{FileSystem, MountOptions};
use serde_json::{Value, json};

use crate::access::open_to_read;
use crate::failure::Failure;
use crate::files::human;
use target::Target;

/// Copy every file that can still be read to a directory in the kernel's file system, and list the
/// others
///
/// Works on damaged file systems and writes nothing to the device. A part of a file that cannot be
/// read becomes a hole, whose range is listed. What undamaged metadata pages show of a damaged file
/// is also copied, below `damaged` in the directory: check it before you use it. Existing files in
/// the directory are never overwritten.
///
/// Exit codes: 0 everything was copied, 1 something is missing, 2 nothing could be done.
#[derive(Args)]
pub struct Rescue {
    /// Device
    uri: String,
    /// Directory; created if it does not exist
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const INCOMPLETE: u8 = 1;
const NOTHING: u8 = 2;

/// A file or directory that could not be copied completely.
struct Loss {
    /// Path in the file system, or the blob.
    path: String,
    why: String,
    /// Ranges of bytes that are holes in the copy; none if there is no copy.
    holes: Vec<Range<u64>>,
}

/// The result of a rescue.
#[derive(Default)]
struct Outcome {
    files: u64,
    dirs: u64,
    bytes: u64,
    losses: Vec<Loss>,
    /// Problems that the mount found.
    problems: Vec<String>,
}

impl Outcome {
    fn lose(&mut self, path: &str, why: impl Into<String>) {
        self.losses.push(Loss {
            path: path.to_owned(),
            why: why.into(),
            holes: Vec::new(),
        });
    }

    /// Records a copy, with holes where nothing could be read.
    fn copied(&mut self, path: &str, copied: copy::Copied) {
        self.files += 1;
        self.bytes += copied.bytes;
        if !copied.holes.is_empty() {
            self.losses.push(Loss {
                path: path.to_owned(),
                why: copied.why,
                holes: copied.holes,
            });
        }
    }
}

/// Runs the command.
pub fn run(args: &Rescue) -> ExitCode {
    match rescue(args) {
        Ok(outcome) => {
            let whole = outcome.losses.is_empty();
            report(args, &outcome);
            if whole {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(INCOMPLETE)
            }
        }
        Err(e) => {
            complain!("pumice rescue: {e}");
            ExitCode::from(NOTHING)
        }
    }
}

fn rescue(args: &Rescue) -> Result<Outcome, Failure> {
    let dev = open_to_read(&args.uri)?;
    let opts = MountOptions::default()
        .read_only(true)
        .cache_bytes(64 << 20);
    let mut outcome = Outcome::default();
    match FileSystem::mount(Arc::clone(&dev), &opts) {
        Ok(fs) => {
            let target = Target::make(&args.dir)?;
            outcome.problems = fs.problems().to_vec();
            copy::all(&fs, &target, &mut outcome);
            let damaged = fs.blobstore().damaged();
            if let Err(e) = fs.unmount() {
                outcome.problems.push(format!("unmount: {e}"));
            }
            drop(fs);
            if !damaged.is_empty() {
                salvage::blobs(&dev, Some(&damaged), &target, &mut outcome);
            }
        }
        Err(e) => without_mount(&dev, args, &Failure::from(e), &mut outcome)?,
    }
    Ok(outcome)
}

/// Copies from a file system that cannot be mounted, by what its metadata pages show.
fn without_mount(
    dev: &Arc<dyn BlockDevice>,
    args: &Rescue,
    why: &Failure,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    if !salvage::has_pages(dev) {
        return Err(Failure::from(why.to_string()));
    }
    let target = Target::make(&args.dir)?;
    outcome.problems.push(format!("cannot be mounted: {why}"));
    outcome.lose("/", "the file system cannot be mounted");
    salvage::blobs(dev, None, &target, outcome);
    Ok(())
}

fn report(args: &Rescue, outcome: &Outcome) {
    if args.json {
        let losses: Vec<Value> = outcome
            .losses
            .iter()
            .map(|loss| {
                let holes: Vec<Value> =
                    loss.holes.iter().map(|r| json!([r.start, r.end])).collect();
                json!({ "path": loss.path, "why": loss.why, "holes": holes })
            })
            .collect();
        print_json(&json!({
            "files": outcome.files,
            "directories": outcome.dirs,
            "bytes": outcome.bytes,
            "lost": losses,
            "problems": outcome.problems,
        }));
        return;
    }
    for problem in &outcome.problems {
        complain!("pumice rescue: {}: {}", args.uri, visible(problem));
    }
    for loss in &outcome.losses {
        let holes: Vec<String> = loss
            .holes
            .iter()
            .map(|r| format!("{}..{}", r.start, r.end))
            .collect();
        let (path, why) = (visible(&loss.path), visible(&loss.why));
        if holes.is_empty() {
            say!("lost: {path}: {why}");
        } else {
            say!(
                "in part: {path}: bytes {} are missing: {why}",
                holes.join(", ")
            );
        }
    }
    say!(
        "{} files and {} directories copied to {}, {}; {} lost or in part",
        outcome.files,
        outcome.dirs,
        visible(&args.dir.display().to_string()),
        human(outcome.bytes),
        outcome.losses.len()
    );
}
