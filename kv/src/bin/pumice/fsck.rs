//! `pumice fsck`: checks a blobstore, and mends it when asked to.

use std::process::ExitCode;

use clap::Args;
use pumice_bdev::terminal::print_json;
use pumice_bdev::{complain, say};
use pumice_blobfs::blobstore::check::{Report, Severity, check, repair};
use serde_json::json;

/// Errors were corrected.
const CORRECTED: u8 = 1;
/// Errors are left.
const UNCORRECTED: u8 = 4;
/// The check could not be done.
pub const OPERATIONAL: u8 = 8;
/// The command line makes no sense.
pub const USAGE: u8 = 16;

/// Check a blobstore without writing: masks, owners of clusters, chains, checksums, snapshots
///
/// Exit codes are fsck's: 0 no errors, 1 errors corrected, 4 errors left, 8 the check could not be done,
/// 16 usage.
#[derive(Args)]
pub struct Fsck {
    /// Device: file:///path, …
    uri: String,
    /// Mend what can be mended without losing anything, and say what was done
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Fsck) -> ExitCode {
    match examine(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain!("pumice fsck: {error}");
            ExitCode::from(OPERATIONAL)
        }
    }
}

fn examine(args: &Fsck) -> Result<u8, Box<dyn std::error::Error>> {
    let dev = pumice_bdev::open(&args.uri)?;
    let before = check(&dev)?;
    let mut done = Vec::new();
    let mut report = before.clone();
    if args.repair && (before.worst().is_some() || !before.clean) {
        done = repair(&dev)?;
        report = check(&dev)?;
    }
    let code = match (before.worst(), report.worst()) {
        (_, Some(_)) => UNCORRECTED,
        (None, None) if done.is_empty() => 0,
        _ => CORRECTED,
    };
    print(args, &before, &done, &report);
    Ok(code)
}

fn print(args: &Fsck, before: &Report, done: &[String], report: &Report) {
    if args.json {
        let findings: Vec<_> = before
            .findings
            .iter()
            .map(|finding| {
                let severity = match finding.severity {
                    Severity::Note => "note",
                    Severity::Mendable => "mendable",
                    Severity::Error => "error",
                };
                json!({ "severity": severity, "text": finding.text, "left": report.findings.contains(finding) })
            })
            .collect();
        let value = json!({
            "findings": findings,
            "done": done,
            "clean": report.clean,
            "blobs": report.blobs,
            "snapshots": report.snapshots,
            "used_clusters": report.used_clusters,
            "total_clusters": report.total_clusters,
            "used_md_pages": report.used_pages,
            "md_pages": report.total_pages,
        });
        print_json(&value);
        return;
    }
    for finding in &before.findings {
        say!("{finding}");
    }
    for line in done {
        say!("{line}");
    }
    say!(
        "{}: {} blobs, {} of them snapshots, {} of {} clusters and {} of {} metadata pages used",
        args.uri,
        report.blobs,
        report.snapshots,
        report.used_clusters,
        report.total_clusters,
        report.used_pages,
        report.total_pages
    );
    match (report.worst(), before.worst(), done.is_empty()) {
        (Some(Severity::Error), ..) => {
            say!("errors are left that cannot be mended without losing something");
        }
        (Some(_), ..) => say!("errors are left; --repair mends them"),
        (None, _, false) => say!("mended"),
        (None, ..) => say!("no errors"),
    }
}
