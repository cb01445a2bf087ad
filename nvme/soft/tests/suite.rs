//! Runs the driver's suite on soft controllers of several shapes.

use std::time::Duration;

use pumice_nvme_soft::conformance::{self, Summary, Verdict};
use pumice_nvme_soft::open_with;

#[path = "../../tests/common/mod.rs"]
mod common;

/// A run of the suite takes seconds, or minutes on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);

fn run(uri: &str, filter: &str) -> Summary {
    let _watchdog = common::watchdog_for(LIMIT);
    let open = |options| open_with(uri, options).map(|o| o.controller);
    let mut failures = Vec::new();
    let summary = conformance::run(&open, filter, 1, &mut |name, verdict, _: Duration| {
        if let Verdict::Failed(what) = verdict {
            failures.push(format!("{name}: {what}"));
        }
    });
    assert!(failures.is_empty(), "{uri}: {failures:#?}");
    assert!(summary.passed > 0, "{uri}: nothing ran");
    summary
}

#[test]
fn everything_that_the_controller_offers() {
    let summary = run(
        "soft://memory?size=16M&namespaces=2&cmb=64K&boundary=64&write_cache=1",
        "",
    );
    assert_eq!(summary.skipped, 0);
}

#[test]
fn blocks_of_4096() {
    run("soft://memory?size=32M&block_size=4096&mdts=2", "default/");
    run("soft://memory?size=32M&block_size=4096", "prp-only/");
}

#[test]
fn one_short_queue() {
    run(
        "soft://memory?size=8M&queues=1&entries=4&sgl=0&shadow=0",
        "default/",
    );
}

#[test]
fn transfers_without_limit() {
    run("soft://memory?size=32M&mdts=0", "_split");
}

#[test]
fn an_image_file_keeps_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("soft://{}/disk.img?size=8M&create=1", dir.path().display());
    run(&uri, "default/write_read");
    let open = pumice_nvme_soft::open(&uri).unwrap();
    let second = pumice_nvme_soft::open(&uri).unwrap_err().to_string();
    assert!(second.contains("in use"), "{second}");
    assert_eq!(open.namespace().unwrap().len_bytes(), 8 << 20);
}

#[test]
fn uris_that_are_wrong_say_what_is_right() {
    for (uri, want) in [
        ("soft://disk", "memory, null"),
        ("soft://memory?blocksize=512", "block_size"),
        ("soft://memory?block_size=1024", "512 or 4096"),
        ("soft://memory?size=12Q", "use K, M, G, T or P"),
        ("nfs://memory", "nvme and vfio-user"),
        ("memory", "soft://memory"),
    ] {
        let text = pumice_nvme_soft::open(uri).unwrap_err().to_string();
        assert!(text.contains(want), "{uri}: {text}");
    }
}
