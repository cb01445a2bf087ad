//! Commands that only read work on a file that may only be read, several at once, and change
//! nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

#[path = "common/tool.rs"]
mod tool;

use pumice_blobfs::fs::{FileSystem, MountOptions, OpenOptions};
use tool::{ok, pumice};

fn readers(uri: &str, id: &str, out: &str) -> Vec<Vec<String>> {
    [
        vec!["ls", uri, "-R"],
        vec!["cat", uri, "/file"],
        vec!["df", uri],
        vec!["stat", uri, "/file"],
        vec!["fsck", uri],
        vec!["fsck", "--dry-run", uri],
        vec!["cp", uri, ":/file", "-"],
        vec!["blob", "list", uri],
        vec!["blob", "show", uri, id],
        vec!["blob", "dump", uri],
        vec!["blob", "export", uri, id, "-"],
        vec!["bdev", "info", uri],
        vec!["bdev", "verify", uri],
        vec!["rescue", uri, out],
    ]
    .into_iter()
    .map(|args| args.into_iter().map(str::to_owned).collect())
    .collect()
}

fn image(dir: &std::path::Path) -> (String, String) {
    let uri = dir.join("disk.img").to_str().unwrap().to_owned();
    ok(&["mkfs", &uri, "--size", "64M"]);
    let source = dir.join("source");
    fs::write(&source, "text").unwrap();
    ok(&["cp", &uri, source.to_str().unwrap(), ":/file"]);
    let stat: serde_json::Value =
        serde_json::from_str(&ok(&["stat", &uri, "--json", "/file"])).unwrap();
    let id = stat[0]["blob"].as_str().unwrap().to_owned();
    (uri, id)
}

#[test]
fn readers_share_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, id) = image(dir.path());
    let before = fs::read(&uri).unwrap();
    let time = fs::metadata(&uri).unwrap().modified().unwrap();
    // Another process reads all the time.
    let read_only = pumice_bdev::OpenOptions::new().read_only(true);
    let held = pumice_bdev::open_with(&uri, read_only).unwrap();
    for (n, args) in readers(&uri, &id, "").into_iter().enumerate() {
        let out = dir.path().join(format!("out{n}")).display().to_string();
        let args: Vec<&str> = args
            .iter()
            .map(|a| {
                if a.is_empty() {
                    out.as_str()
                } else {
                    a.as_str()
                }
            })
            .collect();
        ok(&args);
    }
    assert!(fs::read(&uri).unwrap() == before);
    assert_eq!(fs::metadata(&uri).unwrap().modified().unwrap(), time);
    // A command that writes waits for them.
    let refused = tool::pumice(&["mkdir", &uri, "/d"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("in use"), "{said}");
    drop(held);
    ok(&["mkdir", &uri, "/d"]);
}

#[test]
fn a_file_that_may_only_be_read_is_enough() {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (uri, id) = image(dir.path());
    fs::set_permissions(&uri, fs::Permissions::from_mode(0o444)).unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    // This copy of the command can be run by the user `nobody`.
    let program = dir.path().join("pumice");
    fs::copy(env!("CARGO_BIN_EXE_pumice"), &program).unwrap();
    let can_change_user = Command::new(&program)
        .arg("--version")
        .uid(NOBODY)
        .output()
        .is_ok_and(|output| output.status.success());
    if !can_change_user {
        println!("skipped: a_file_that_may_only_be_read_is_enough: needs root");
        return;
    }
    let before = fs::read(&uri).unwrap();
    for args in readers(&uri, &id, out.to_str().unwrap()) {
        let output = Command::new(&program)
            .args(&args)
            .uid(NOBODY)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
    }
    assert!(fs::read(&uri).unwrap() == before);
}

#[test]
fn a_reader_makes_no_file_and_changes_no_length() {
    let dir = tempfile::tempdir().unwrap();
    let foreign = dir.path().join("foreign");
    fs::write(&foreign, vec![7; 100_000]).unwrap();
    for command in ["ls", "df", "stat", "fsck", "rescue"] {
        for name in ["foreign", "missing"] {
            let path = dir.path().join(name);
            let uri = format!("file://{}?size=64M&create=1", path.display());
            let out = dir.path().join("out");
            let mut args = vec![command, uri.as_str()];
            args.extend((command == "rescue").then(|| out.to_str().unwrap()));
            assert!(!tool::pumice(&args).status.success(), "{command} {name}");
        }
        assert_eq!(fs::metadata(&foreign).unwrap().len(), 100_000, "{command}");
        assert!(!dir.path().join("missing").exists(), "{command}");
        assert!(!dir.path().join("out").exists(), "{command}");
    }
}

/// Is not a test, but what the next one runs: it appends, and is killed.
#[test]
fn child() {
    use std::io::Read as _;
    let Ok(uri) = std::env::var("PUMICE_KILLED_URI") else {
        return;
    };
    let dev = pumice_bdev::open(&uri).unwrap();
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    let file = fs.open("/file", OpenOptions::READ).unwrap();
    file.append(b" and more").unwrap();
    println!("ready");
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn readers_show_what_a_killed_process_had_not_synced() {
    use std::io::{BufRead as _, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let (uri, id) = image(dir.path());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture"])
        .env("PUMICE_KILLED_URI", &uri)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines.map_while(Result::ok).any(|line| {
        let ready = line == "ready";
        if ready {
            child.kill().unwrap();
        }
        ready
    });
    assert!(said);
    child.wait().unwrap();
    let before = fs::read(&uri).unwrap();
    for args in readers(&uri, &id, dir.path().join("out").to_str().unwrap()) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = pumice(&args);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        if args[0] == "cat" {
            assert_eq!(out.stdout, b"text and more");
            assert!(out.stderr.is_empty());
        }
    }
    assert!(fs::read(&uri).unwrap() == before);
    ok(&["mv", &uri, "/file", "/renamed"]);
    assert_eq!(ok(&["cat", &uri, "/renamed"]), "text and more");
}
