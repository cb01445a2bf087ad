//! Runs the driver's suite on a controller: `nvme-suite URI [--filter TEXT] [--seed N]`.
//! It writes to every namespace and ends with `N passed, N failed, N skipped`. The exit code is 0
//! only if nothing failed.

use std::process::ExitCode;

use pumice_nvme_soft::conformance::{self, Verdict};
use pumice_nvme_soft::open_with;

fn main() -> ExitCode {
    let mut uri = None;
    let mut filter = String::new();
    let mut seed = 1;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match (arg.as_str(), &uri) {
            ("--filter", _) => filter = args.next().unwrap_or_default(),
            ("--seed", _) => match args.next().and_then(|s| s.parse().ok()) {
                Some(n) => seed = n,
                None => return usage("--seed needs a number"),
            },
            ("--help" | "-h", _) => return usage(""),
            (_, None) if !arg.starts_with('-') => uri = Some(arg),
            _ => return usage(&format!("unexpected argument '{arg}'")),
        }
    }
    let Some(uri) = uri else {
        return usage("which controller?");
    };
    println!("suite on {uri}, seed {seed}");
    let open = |options| open_with(&uri, options).map(|o| o.controller);
    let summary = conformance::run(&open, &filter, seed, &mut |name, verdict, took| {
        let (word, detail) = match verdict {
            Verdict::Passed => ("ok", String::new()),
            Verdict::Failed(what) => ("FAILED", format!(": {what}")),
            Verdict::Skipped(why) => ("skipped", format!(": {why}")),
        };
        println!("{word:7} {name} ({} ms){detail}", took.as_millis());
    });
    println!(
        "{} passed, {} failed, {} skipped",
        summary.passed, summary.failed, summary.skipped
    );
    if summary.failed == 0 && summary.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn usage(error: &str) -> ExitCode {
    if !error.is_empty() {
        eprintln!("nvme-suite: {error}");
    }
    eprintln!(
        "usage: nvme-suite URI [--filter TEXT] [--seed N]\n\
         URI: soft://memory?size=64M, nvme://0000:00:03.0, vfio-user:///run/cntrl\n\
         Every namespace of the controller is written to."
    );
    if error.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(2)
    }
}
