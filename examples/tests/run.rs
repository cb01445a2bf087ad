//! Every example runs and prints what it promises.

use std::process::{Command, Output};

/// Runs an example, which cargo has built beside this test.
fn run(example: &str, args: &[&str]) -> Output {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.extend(["examples", example]);
    let output = Command::new(&path).args(args).output();
    output.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the output of an example that must succeed.
fn says(example: &str, args: &[&str]) -> String {
    let output = run(example, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{example} {args:?}: {text}{errors}"
    );
    text
}

/// Returns the error output of an example that must fail.
fn complains(example: &str, args: &[&str]) -> String {
    let output = run(example, args);
    assert!(!output.status.success(), "{example} {args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Makes a configuration as SPDK's scripts write it.
fn configuration() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bdevs.json");
    let text = r#"{"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}
    ]}]}"#;
    std::fs::write(&file, text).unwrap();
    (dir, file.to_str().unwrap().to_owned())
}

#[test]
fn hello_blob_takes_its_steps() {
    let (_dir, json) = configuration();
    for args in [
        &[][..],
        &["malloc://64M"],
        &["--json", &json, "-b", "Malloc0"],
        &[&json],
    ] {
        let text = says("hello_blob", args);
        let mut lines = text.lines();
        for step in [
            "entry",
            "init complete",
            "blob created",
            "blob open",
            "resized",
            "sync complete",
            "write complete",
            "read complete",
            "read SUCCESS and data matches!",
            "delete complete",
            "unload complete",
            "SUCCESS!",
        ] {
            assert!(lines.any(|line| line.starts_with(step)), "{step}: {text}");
        }
    }
}

#[test]
fn a_wrong_name_lists_the_right_ones() {
    let (_dir, json) = configuration();
    for example in ["hello_blob", "hello_bdev"] {
        let text = complains(example, &["--json", &json, "-b", "Malloc"]);
        assert!(text.contains("did you mean `Malloc0`?"), "{text}");
        assert!(complains(example, &["--help"]).contains("--json FILE"));
        assert!(complains(example, &["--json", "/nowhere"]).contains("/nowhere"));
    }
}

#[test]
fn hello_bdev_reads_what_it_wrote() {
    let (_dir, json) = configuration();
    assert!(says("hello_bdev", &["malloc://1M"]).contains("says: hello"));
    assert!(says("hello_bdev", &["--json", &json, "-b", "Malloc0"]).contains("says: hello"));
    assert!(complains("hello_bdev", &[]).contains("no bdevs configured: pass --json or a URI"));
}

#[test]
fn hello_nvme_reads_what_it_wrote() {
    assert!(says("hello_nvme", &[]).contains("block 0 says: Hello, NVMe!"));
}

#[test]
fn custom_bdev_conforms() {
    assert!(says("custom_bdev", &[]).contains("it conforms"));
}

#[cfg(feature = "db")]
#[test]
fn hello_kv_finds_its_keys_again() {
    let text = says("hello_kv", &[]);
    for line in ["apple is red", "pear is green", "plum is blue"] {
        assert!(text.contains(line), "{text}");
    }
}
