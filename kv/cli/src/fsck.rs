//! `pumice fsck`: checks a blobstore, and repairs it on request.

use std::process::ExitCode;

use clap::Args;
use pumice_bdev_control::terminal::print_json;
use pumice_bdev_control::{complain, say};
use pumice_blobfs::blobstore::check::{RepairPlan, Report, Severity, apply, check, plan};
use serde_json::json;

use crate::access::open_to_read;

/// Exit code: errors were corrected.
const CORRECTED: u8 = 1;
/// Exit code: errors are left.
const UNCORRECTED: u8 = 4;
/// Exit code: the check could not be done.
pub const OPERATIONAL: u8 = 8;
/// Exit code: the command line is wrong.
pub const USAGE: u8 = 16;

/// Check a blobstore without writing: masks, owners of clusters, chains, checksums, snapshots
///
/// The exit codes are fsck's: 0 no errors, 1 errors corrected, 4 errors left, 8 the check could not
/// be done, 16 wrong usage.
#[derive(Args)]
pub struct Fsck {
    /// Device: file:///path, …
    uri: String,
    /// Print the plan, then carry it out: remove damaged blobs with their content, complete or undo
    /// what a crash interrupted, and write the masks again. First copy what can still be read with:
    /// pumice rescue
    #[arg(long)]
    repair: bool,
    /// Only print the plan of --repair
    #[arg(long, conflicts_with = "repair")]
    dry_run: bool,
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
    let dev = if args.repair {
        pumice_bdev::open(&args.uri)?
    } else {
        open_to_read(&args.uri).map_err(|e| e.to_string())?
    };
    let before = check(&dev)?;
    let mut done = Vec::new();
    let mut report = before.clone();
    if args.repair || args.dry_run {
        let plan = plan(&dev)?;
        print_plan(args, &plan);
        if args.repair && !plan.is_empty() {
            done = apply(&dev, &plan)?;
            report = check(&dev)?;
        }
    }
    let code = match (before.worst(), report.worst()) {
        (_, Some(_)) => UNCORRECTED,
        (None, None) if done.is_empty() => 0,
        _ => CORRECTED,
    };
    print(args, &before, &done, &report);
    Ok(code)
}

/// Prints what a repair will do, before anything is changed.
fn print_plan(args: &Fsck, plan: &RepairPlan) {
    if args.json {
        // The final report has the same lines as `plan`. A reader of the terminal sees them now.
        for line in plan.lines() {
            complain!("pumice fsck: plan: {line}");
        }
        return;
    }
    for line in plan.lines() {
        say!("plan: {line}");
    }
}

fn print(args: &Fsck, before: &Report, done: &[String], report: &Report) {
    if args.json {
        let findings: Vec<_> = before
            .findings
            .iter()
            .map(|finding| {
                let severity = match finding.severity {
                    Severity::Note => "note",
                    Severity::Repairable => "repairable",
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
            say!(
                "errors are left that cannot be repaired without losing something; --dry-run shows what --repair would remove, pumice rescue copies what can be read"
            );
        }
        (Some(_), ..) => say!("errors are left; --repair corrects them, --dry-run shows how"),
        (None, _, false) => say!("corrected"),
        (None, ..) => say!("no errors"),
    }
}
