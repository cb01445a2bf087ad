//! Tests of `pumice bdev` and `pumice rpc` as commands.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

/// Returns the standard error of a command that has to fail.
fn fails(args: &[&str]) -> String {
    let output = pumice(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A running `pumice bdev serve`.
struct Server(Child);

impl Server {
    /// Starts it and waits until it answers.
    fn start(socket: &str, args: &[&str]) -> Server {
        let child = Command::new(env!("CARGO_BIN_EXE_pumice"))
            .args(["bdev", "serve", "-r", socket])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server(child);
        let out = BufReader::new(server.0.stdout.as_mut().unwrap());
        if !out
            .lines()
            .any(|line| line.unwrap().starts_with("serving on "))
        {
            let mut errors = String::new();
            let _ = server.0.stderr.take().unwrap().read_to_string(&mut errors);
            panic!("it ended: {errors}");
        }
        server
    }

    /// Ends it with a signal. Its exit code has to be 0.
    fn end(mut self) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").arg(&id).status().unwrap().success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn devices_are_listed_copied_compared_and_zeroed() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|n| format!("file://{}", dir.path().join(n).display()));
    for name in ["a", "b"] {
        let file = std::fs::File::create(dir.path().join(name)).unwrap();
        file.set_len(4 << 20).unwrap();
    }
    let listed = ok(&["bdev", "list", &a, &b, "malloc://1M"]);
    assert!(listed.contains("Malloc0"), "{listed}");
    let info: Value = serde_json::from_str(&ok(&["bdev", "info", &a])).unwrap();
    assert_eq!(info["num_blocks"], 8192);

    let mut bytes = vec![7; 4 << 20];
    std::fs::write(dir.path().join("a"), &bytes).unwrap();
    assert!(!pumice(&["bdev", "verify", &a, &b]).status.success());
    ok(&["bdev", "copy", &a, &b]);
    ok(&["bdev", "verify", &a, &b]);
    assert!(fails(&["bdev", "zero", &b]).contains("--force"));
    ok(&["bdev", "zero", "--force", &b]);
    bytes.fill(0);
    assert!(std::fs::read(dir.path().join("b")).unwrap() == bytes);

    // Recognised content is not overwritten by mistake.
    ok(&["mkfs", &b]);
    assert!(fails(&["bdev", "copy", &a, &b]).contains("--force"));
    assert!(fails(&["bdev", "zero", &b]).contains("--force"));
    ok(&["bdev", "zero", "--force", &b]);
}

#[test]
fn a_served_device_is_made_seen_and_removed_from_outside() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("rpc.sock");
    let socket = socket.to_str().unwrap();
    let file = dir.path().join("bdevs.json");
    let server = Server::start(socket, &["malloc://1M"]);
    let rpc = |words: &[&str]| ok(&[&["rpc", "-s", socket], words].concat());
    rpc(&[
        "bdev_null_create",
        "name=N",
        "num_blocks=8",
        "block_size=512",
    ]);
    let bdevs: Value = serde_json::from_str(&rpc(&["bdev_get_bdevs"])).unwrap();
    let names: Vec<&Value> = bdevs
        .as_array()
        .unwrap()
        .iter()
        .map(|b| &b["name"])
        .collect();
    assert_eq!(names, ["Malloc0", "N"]);
    let wrong = fails(&["rpc", "-s", socket, "bdev_get_bdevs", "name=Malloc"]);
    assert!(wrong.contains("did you mean `Malloc0`?"), "{wrong}");

    // The saved configuration starts another process with the same devices.
    std::fs::write(&file, rpc(&["save_config"])).unwrap();
    rpc(&["bdev_null_delete", "name=N"]);
    assert!(!rpc(&["bdev_get_bdevs"]).contains("\"N\""));
    server.end();
    assert!(!std::path::Path::new(socket).exists());

    let json = file.to_str().unwrap();
    let server = Server::start(socket, &["--json", json]);
    let again: Value = serde_json::from_str(&rpc(&["bdev_get_bdevs"])).unwrap();
    assert_eq!(again[0]["uuid"], bdevs[0]["uuid"]);
    assert_eq!(again[1]["name"], "N");

    // The socket belongs to a running process, so a second one does not touch it.
    let second = fails(&["bdev", "serve", "-r", socket, "malloc://1M"]);
    assert!(second.contains(socket), "{second}");
    rpc(&["bdev_get_bdevs"]);
    server.end();
}
