//! `pumice rescue`: copies what can still be read of a file system to the kernel's, and lists what
//! cannot.

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

use crate::files::{Failure, human, open_to_read};
use target::Target;

/// Copy every file that can still be read to a directory of the kernel's, and list what cannot
///
/// Works on damaged file systems; nothing is written on the device. A part of a file that cannot be
/// read becomes a hole, whose range is listed. What damaged metadata still tell of a file is copied,
/// too, below `damaged` in the directory: check it before you use it. Files that exist in the directory
/// are never overwritten.
///
/// Exit codes: 0 everything was copied, 1 something is missing, 2 nothing could be done.
#[derive(Args)]
pub struct Rescue {
    /// The device
    uri: String,
    /// The directory; made if it is not there
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const INCOMPLETE: u8 = 1;
const NOTHING: u8 = 2;

/// Something that could not be copied as it should.
struct Loss {
    /// Its path in the file system, or its blob.
    path: String,
    why: String,
    /// Bytes that are holes in the copy; none: there is no copy.
    holes: Vec<Range<u64>>,
}

/// What was done.
#[derive(Default)]
struct Outcome {
    files: u64,
    dirs: u64,
    bytes: u64,
    losses: Vec<Loss>,
    /// What the mount found wrong.
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

    /// A copy was made, with holes where nothing could be read.
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

/// Runs it.
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
    let mut opts = MountOptions::default();
    opts.read_only = true;
    opts.cache_bytes = 64 << 20;
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

/// There is no file system to mount; its pages may still tell what is where.
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
