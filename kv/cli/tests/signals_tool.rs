//! Tests of commands that a signal ends during a change.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

/// Longest wait for the end of a command, far longer than any takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn image(dir: &std::path::Path) -> String {
    let uri = dir.join("disk.img").to_str().unwrap().to_owned();
    ok(&["mkfs", &uri, "--size", "64M"]);
    uri
}

fn used(uri: &str) -> u64 {
    let df: Value = serde_json::from_str(&ok(&["df", uri, "--json"])).unwrap();
    df["used_bytes"].as_u64().unwrap()
}

/// Starts a copy from standard input that has read a large part of its input and waits for more.
fn in_the_middle(args: &[&str]) -> Child {
    // The test may run with a signal ignored, as below nohup.
    let mut child = Command::new("env")
        .args([
            "--default-signal=HUP,INT,TERM",
            env!("CARGO_BIN_EXE_pumice"),
        ])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // This is more than the buffers of the pipe and the reader hold, so the rest has been appended
    // when the write returns.
    let bytes = vec![0x5a; 24 << 20];
    child.stdin.as_mut().unwrap().write_all(&bytes).unwrap();
    child
}

fn end(child: &mut Child, signal: &str) -> Option<i32> {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
    assert!(sent.success());
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{signal} did not end the command");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_copy_that_is_told_to_end_leaves_nothing_and_unmounts_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let empty = used(&uri);
    for (signal, code) in [("-TERM", 143), ("-INT", 130), ("-HUP", 129)] {
        let mut child = in_the_middle(&["cp", &uri, "-", ":/big"]);
        assert_eq!(end(&mut child, signal), Some(code));
        assert_eq!(ok(&["ls", &uri]), "", "{signal}");
        assert_eq!(used(&uri), empty, "{signal}");
        assert_eq!(
            pumice(&["fsck", &uri]).status.code(),
            Some(0),
            "unmounted in order: {signal}"
        );
    }
}

#[test]
fn a_copy_that_is_killed_is_gone_at_the_next_mount() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let small = dir.path().join("small");
    std::fs::write(&small, "text").unwrap();
    ok(&["cp", &uri, small.to_str().unwrap(), ":/big"]);
    let before = used(&uri);
    let mut child = in_the_middle(&["cp", &uri, "-", ":/big"]);
    end(&mut child, "-KILL");
    let names = ok(&["ls", &uri]);
    assert_eq!(names.lines().count(), 1, "{names}");
    assert_eq!(
        ok(&["cat", &uri, "/big"]),
        "text",
        "what was there is there"
    );
    // The next mount for writing frees the space.
    ok(&["rm", &uri, "-f", "/none"]);
    assert_eq!(used(&uri), before);
    assert_eq!(pumice(&["fsck", &uri]).status.code(), Some(0));
}

#[test]
fn an_import_that_is_told_to_end_leaves_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let before = ok(&["blob", "list", &uri]);
    let mut child = in_the_middle(&["blob", "import", &uri, "new", "-"]);
    assert_eq!(end(&mut child, "-TERM"), Some(143));
    assert_eq!(ok(&["blob", "list", &uri]), before);
    assert_eq!(pumice(&["fsck", &uri]).status.code(), Some(0));
}
