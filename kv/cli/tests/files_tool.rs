//! Tests of `pumice mkfs`, `ls`, `cat`, `cp`, `rm`, `mv`, `df` and `stat` as commands.

use std::path::Path;
use std::process::Command;

use pumice_blobfs::fs::{Attributes, FileSystem, MountOptions, OpenOptions};
use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

fn fails(args: &[&str]) -> String {
    let output = pumice(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&ok(args)).unwrap()
}

fn image(dir: &Path) -> String {
    let uri = dir.join("disk.img").to_str().unwrap().to_owned();
    ok(&["mkfs", &uri, "--size", "64M"]);
    uri
}

#[test]
fn a_journal_is_added_once() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("kv.img").to_str().unwrap().to_owned();
    let made = ok(&["mkfs", "--size", "64M", "--journal", "none", &uri]);
    assert!(made.contains("no journal"), "{made}");
    assert!(fails(&["journal", &uri, "--size", "40M"]).contains("more than half"));
    assert_eq!(json(&["df", &uri, "--json"])["journal_bytes"], 0);
    let added = json(&["journal", &uri, "--json"]);
    assert_eq!(added["journal_bytes"], 1 << 20);
    assert_eq!(json(&["df", &uri, "--json"])["journal_bytes"], 1 << 20);
    assert!(ok(&["df", &uri]).contains("journal         1 MiB"));
    assert!(fails(&["journal", &uri]).contains("has a journal"));
    assert!(ok(&["fsck", &uri]).contains("no errors"));
}

#[test]
fn making_and_refusing_to() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("disk.img").to_str().unwrap().to_owned();
    assert!(
        fails(&["mkfs", &uri]).contains("size"),
        "says how to make the image"
    );
    let made = json(&[
        "mkfs",
        &uri,
        "--size",
        "64M",
        "--cluster-size",
        "64K",
        "--md-pages",
        "300",
        "--json",
    ]);
    assert_eq!(made["cluster_size"], 65536);
    assert_eq!(made["md_pages"], 300);
    let refused = fails(&["mkfs", &uri]);
    assert!(
        refused.contains("BlobFS") && refused.contains("--force"),
        "{refused}"
    );
    ok(&["mkfs", &uri, "--force"]);
    assert_eq!(json(&["df", &uri, "--json"])["cluster_size"], 65536);
    // The image has other content.
    let other = dir.path().join("other.img");
    let mut bytes = vec![0u8; 8 << 20];
    bytes[..4].copy_from_slice(b"XFSB");
    std::fs::write(&other, &bytes).unwrap();
    let refused = fails(&["mkfs", other.to_str().unwrap()]);
    assert!(refused.contains("XFS"), "{refused}");
    assert!(std::fs::read(&other).unwrap() == bytes);
    assert!(fails(&["ls", other.to_str().unwrap()]).contains("XFS"));
}

#[test]
fn an_image_can_be_moved_to_a_disk_with_sectors_of_4_kib() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let source = dir.path().join("source");
    std::fs::write(&source, "text").unwrap();
    ok(&["cp", &uri, source.to_str().unwrap(), ":/file"]);
    let large = format!("file://{uri}?block_size=4096");
    ok(&["cp", &large, ":/file", ":/copy"]);
    assert_eq!(ok(&["cat", &uri, "/copy"]), "text");
    // The error for a path that cannot be moved says what to do.
    let small = dir.path().join("small.img").to_str().unwrap().to_owned();
    ok(&[
        "mkfs",
        &format!("file://{small}?block_size=512"),
        "--size",
        "64M",
    ]);
    let refused = fails(&["df", &format!("file://{small}?block_size=4096")]);
    assert!(refused.contains("pumice cp -r"), "{refused}");
    ok(&["df", &small]);
}

#[test]
fn files_go_in_and_out() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let big: Vec<u8> = (0..3_333_333u32).flat_map(u32::to_le_bytes).collect();
    std::fs::create_dir_all(dir.path().join("in/sub/empty")).unwrap();
    std::fs::write(dir.path().join("in/big"), &big).unwrap();
    std::fs::write(dir.path().join("in/sub/small"), b"small").unwrap();
    assert!(fails(&["cp", &uri, &at("in"), ":/"]).contains("-r"));
    ok(&["cp", &uri, "-r", &at("in"), ":/db"]);
    let names: Vec<String> = json(&["ls", &uri, "-R", "--json"])
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["path"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        names,
        [
            "/db",
            "/db/big",
            "/db/sub",
            "/db/sub/empty",
            "/db/sub/small"
        ]
    );
    assert_eq!(
        ok(&["cat", &uri, "/db/sub/small", "/db/sub/small"]),
        "smallsmall"
    );
    let stat = json(&["stat", &uri, "/db/big", "--json"]);
    assert_eq!(stat[0]["length"], big.len());
    assert_eq!(stat[0]["type"], "file");
    ok(&["mv", &uri, "/db/sub", "/sub"]);
    ok(&["mv", &uri, "/db/big", "/sub"]);
    ok(&["cp", &uri, ":/sub/big", ":/db/copy"]);
    assert!(fails(&["cp", &uri, ":/db/copy", ":/db/copy"]).contains("same file"));
    let copied = json(&["cp", &uri, "-r", "--json", ":/", &at("out")]);
    assert_eq!(copied["files"], 3);
    for name in ["out/sub/big", "out/db/copy"] {
        assert!(
            std::fs::read(dir.path().join(name)).unwrap() == big,
            "{name}"
        );
    }
    assert!(dir.path().join("out/sub/empty").is_dir());
    ok(&["cp", &uri, ":/sub/small", &at("out")]);
    assert_eq!(
        std::fs::read(dir.path().join("out/small")).unwrap(),
        b"small"
    );
    assert!(fails(&["cp", &uri, &at("in/big"), &at("x")]).contains("colon"));
    assert!(fails(&["rm", &uri, "/sub"]).contains("-r"));
    assert!(fails(&["rm", &uri, "/none"]).contains("no such file"));
    ok(&["rm", &uri, "-f", "/none"]);
    ok(&["mkdir", &uri, "-p", "/a/b/c"]);
    assert!(fails(&["rmdir", &uri, "/a"]).contains("not empty"));
    ok(&["rmdir", &uri, "/a/b/c", "/a/b", "/a"]);
    ok(&["rm", &uri, "-r", "/sub", "/db"]);
    assert_eq!(ok(&["ls", &uri]), "");
    let df = json(&["df", &uri, "--json"]);
    assert_eq!(
        (&df["used_bytes"], &df["files"]),
        (&Value::from(0), &Value::from(0))
    );
    // The file does not fit: the error says so, and the old file is intact.
    std::fs::write(dir.path().join("huge"), vec![1; 80 << 20]).unwrap();
    ok(&["cp", &uri, &at("in/sub/small"), ":/small"]);
    assert!(fails(&["cp", &uri, &at("huge"), ":/huge"]).contains("no space"));
    assert!(fails(&["cp", &uri, &at("huge"), ":/small"]).contains("no space"));
    assert_eq!(ok(&["cat", &uri, "/small"]), "small");
    assert!(fails(&["cp", &uri, &at("in/big"), ":/no/dir"]).contains("no such file"));
    ok(&["mkdir", &uri, "/d"]);
    ok(&["cp", &uri, &at("in/big"), ":/d"]);
    assert!(fails(&["cp", &uri, &at("in/sub/small"), ":/small/x"]).contains("not a directory"));
    let names = ok(&["ls", &uri, "-R"]);
    assert_eq!(names.lines().count(), 3, "nothing half copied: {names}");
}

/// The image cannot be the target of a copy out of it, by any of its names.
#[test]
fn a_copy_does_not_overwrite_the_image_that_it_reads() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("source"), b"text").unwrap();
    ok(&["cp", &uri, &at("source"), ":/disk.img"]);
    std::fs::hard_link(&uri, at("linked")).unwrap();
    std::os::unix::fs::symlink(&uri, at("alias")).unwrap();
    let before = std::fs::read(&uri).unwrap();
    let here = dir.path().to_str().unwrap();
    for to in [&uri, &at("linked"), &at("alias"), here] {
        fails(&["cp", &uri, ":/disk.img", to]);
        assert!(std::fs::read(&uri).unwrap() == before, "{to}");
    }
    fails(&["cp", &uri, "-r", ":/", here]);
    assert!(std::fs::read(&uri).unwrap() == before);
    ok(&["cp", &uri, ":/disk.img", &at("out")]);
    assert_eq!(std::fs::read(at("out")).unwrap(), b"text");
}

#[test]
fn stat_shows_permission_bits_that_were_set() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    {
        let device = pumice_bdev::open(&uri).unwrap();
        let fs = FileSystem::mount(device, &MountOptions::default()).unwrap();
        for name in ["/set", "/not"] {
            drop(fs.open(name, OpenOptions::CREATE).unwrap());
        }
        let mode = Attributes::default().mode(Some(0o640));
        fs.set_attributes("/set", &mode).unwrap();
        fs.unmount().unwrap();
    }
    let mode = |name| json(&["stat", &uri, name, "--json"])[0]["mode"].clone();
    assert_eq!(mode("/set"), "0640");
    assert_eq!(mode("/not"), Value::Null);
    assert!(ok(&["stat", &uri, "/set"]).contains("mode       0640"));
}

#[test]
fn what_is_copied_out_of_a_private_image_stays_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let source = dir.path().join("source");
    std::fs::write(&source, "secret").unwrap();
    ok(&["cp", &uri, source.to_str().unwrap(), ":/file"]);
    let id = json(&["stat", &uri, "/file", "--json"])[0]["blob"].clone();
    for name in ["copied", "exported"] {
        let to = dir.path().join(name);
        match name {
            "copied" => ok(&["cp", &uri, ":/file", to.to_str().unwrap()]),
            _ => ok(&[
                "blob",
                "export",
                &uri,
                id.as_str().unwrap(),
                to.to_str().unwrap(),
            ]),
        };
        let mode = std::fs::metadata(&to).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name}");
    }
}

#[test]
fn standard_input_and_output() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let bytes: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let source = dir.path().join("source");
    std::fs::write(&source, &bytes).unwrap();
    let put = Command::new(env!("CARGO_BIN_EXE_pumice"))
        .args(["cp", &uri, "-", ":/piped"])
        .stdin(std::fs::File::open(&source).unwrap())
        .output()
        .unwrap();
    assert!(put.status.success(), "{put:?}");
    let got = pumice(&["cp", &uri, ":/piped", "-"]);
    assert!(got.status.success() && got.stdout == bytes);
    ok(&["mkdir", &uri, "/d"]);
    assert!(fails(&["cp", &uri, "-", ":/d"]).contains("no name"));
    assert!(fails(&["cp", &uri, "-r", ":/d", "-"]).contains("only files"));
    assert!(fails(&["cp", &uri, ":/piped", "-", "--json"]).contains("--json"));
    assert!(fails(&["cp", &uri, "-", "-"]).contains("colon"));
}

#[test]
fn a_device_in_use_is_refused_with_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let held = pumice_bdev::open(&uri).unwrap();
    let refused = fails(&["ls", &uri]);
    assert!(
        refused.contains(&std::process::id().to_string()),
        "{refused}"
    );
    assert!(fails(&["mkfs", &uri, "--force"]).contains("in use"));
    drop(held);
    ok(&["ls", &uri]);
}

/// Runs the command with a standard output whose reader has gone. Returns its exit code and its
/// error output.
fn into_closed_pipe(args: &[&str]) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_pumice"))
        .args(args)
        .stdout(writer)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let other = dir.path().join("other.img").to_str().unwrap().to_owned();
    let root = dir.path().join("root").to_str().unwrap().to_owned();
    ok(&["mkdir", &uri, "/a", "/b"]);
    let commands: [&[&str]; 18] = [
        &["ls", &uri],
        &["ls", &uri, "--json"],
        &["df", &uri],
        &["df", &uri, "--json"],
        &["stat", &uri, "/a"],
        &["stat", &uri, "--json"],
        &["fsck", &uri],
        &["fsck", &uri, "--json"],
        &["mkfs", &other, "--size", "16M"],
        &["mkfs", &other, "--force", "--json"],
        &["blob", "list", &uri],
        &["blob", "dump", &uri],
        &["blob", "--json", "dump", &uri],
        &["bdev", "list", "malloc://1M"],
        &["bdev", "info", "malloc://1M"],
        &["bdev", "verify", "malloc://1M"],
        &["config", "gen", "--root", &root],
        &["setup", "status", "--root", &root],
    ];
    for args in commands {
        let (code, said) = into_closed_pipe(args);
        assert_eq!(code, Some(0), "{args:?}: {said}");
    }
    // An exit code with a meaning is not changed.
    let (code, said) = into_closed_pipe(&["doctor", "0000:01:00.0", "--root", &root]);
    assert_eq!(code, Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    for (command, expected) in [("df", 1), ("ls", 1), ("fsck", 8)] {
        ok(&["mkdir", &uri, "-p", "/a"]);
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_pumice"))
            .args([command, &uri])
            .stdout(full)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{command}: {said}");
        assert!(said.contains("No space left"), "{command}: {said}");
    }
}

#[test]
fn a_terminal_obeys_no_name_and_no_message() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let hostile = "/x\u{9b}31mRED\u{202e}gpj.exe";
    let source = dir.path().join("source");
    std::fs::write(&source, b"text").unwrap();
    // The library may refuse such names by now, but older images may contain them.
    let put = pumice(&["cp", &uri, source.to_str().unwrap(), &format!(":{hostile}")]);
    let text = |output: &std::process::Output| {
        let both = [output.stdout.clone(), output.stderr.clone()].concat();
        String::from_utf8(both).unwrap()
    };
    let mut said = text(&put);
    for args in [
        vec!["ls", &uri],
        vec!["ls", &uri, "-R", "--json"],
        vec!["stat", &uri, hostile],
        vec!["blob", "list", &uri],
        vec!["rm", &uri, hostile, hostile],
        vec!["stat", &uri, "/no\u{1b}[2Jsuch"],
        vec!["ls", "/no\u{1b}]0;owned\u{7}/image"],
    ] {
        said += &text(&pumice(&args));
    }
    let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!said.contains(obeyed), "{said:?}");
    assert!(said.contains("\\u{9b}31mRED"), "{said}");
}

/// A server's message is printed on one line, whatever it contains.
#[test]
fn a_server_cannot_write_to_the_terminal() {
    use std::io::{Read as _, Write as _};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rpc");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = peer.read(&mut request).unwrap();
        peer.write_all(br#"{"jsonrpc":"2.0","id":1,"error":{"code":-1,"message":"\u001b]0;owned\u0007\u001b[2J\nhello"}}"#)
            .unwrap();
    });
    let said = fails(&[
        "rpc",
        "-t",
        "5",
        "-s",
        path.to_str().unwrap(),
        "rpc_get_methods",
    ]);
    server.join().unwrap();
    assert!(said.contains("hello"), "{said}");
    assert!(
        !said.contains('\u{1b}') && said.lines().count() == 1,
        "{said:?}"
    );
}
