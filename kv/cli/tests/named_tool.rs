//! `pumice --json FILE COMMAND NAME`: the devices of an SPDK configuration, by name.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

/// An image of a directory, and a configuration of SPDK's form with devices on it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::File::create(place.at("image"))
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a configuration: the image as `Aio0` and what `above` adds. Returns its path.
    fn config(&self, name: &str, above: &[Value]) -> String {
        let image = json!({ "name": "Aio0", "filename": self.at("image"), "block_size": 4096 });
        let mut calls = vec![json!({ "method": "bdev_aio_create", "params": image })];
        calls.extend_from_slice(above);
        let text = json!({ "subsystems": [{ "subsystem": "bdev", "config": calls }] });
        let path = self.at(name);
        fs::write(&path, text.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

fn fails(args: &[&str]) -> String {
    let output = pumice(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_name_of_a_configuration_is_a_device_for_every_command() {
    let place = Place::new();
    let above = json!({ "name": "Data", "base_bdev_name": "Aio0" });
    let passthru = json!({ "method": "bdev_passthru_create", "params": above });
    let config = place.config("spdk.json", &[passthru]);
    let with = |args: &[&str]| ok(&[&["--json", &config], args].concat());
    fs::write(place.at("source"), "some bytes").unwrap();

    assert!(with(&["mkfs", "Data", "--journal", "none"]).contains("Data"));
    with(&["mkdir", "Data", "/dir"]);
    with(&["cp", "Data", text(&place.at("source")), ":/dir/file"]);
    with(&["mv", "Data", "/dir/file", "/dir/moved"]);
    assert_eq!(with(&["cat", "Data", "/dir/moved"]), "some bytes");
    assert!(with(&["ls", "Data", "-R"]).contains("moved"));
    let stat: Value =
        serde_json::from_str(&with(&["stat", "Data", "/dir/moved", "--json"])).unwrap();
    let blob = stat[0]["blob"].as_str().unwrap();
    assert!(with(&["blob", "list", "Data"]).contains(blob));
    assert!(with(&["blob", "show", "Data", blob]).contains(blob));
    assert!(with(&["blob", "dump", "Data"]).contains(blob));
    with(&["journal", "Data"]);
    with(&["rescue", "Data", text(&place.at("saved"))]);
    assert_eq!(
        fs::read(place.at("saved/dir/moved")).unwrap(),
        b"some bytes"
    );
    with(&["rm", "Data", "/dir/moved"]);
    with(&["rmdir", "Data", "/dir"]);
    assert!(with(&["fsck", "Data"]).contains("no errors"));
    assert!(with(&["fsck", "--repair", "Data"]).contains("no errors"));
    assert!(with(&["bdev", "list"]).contains("Data"));

    // The file grows below its device.
    let longer = fs::File::options()
        .write(true)
        .open(place.at("image"))
        .unwrap();
    longer.set_len(80 << 20).unwrap();
    assert!(fails(&["--json", &config, "grow", "Data", "96M"]).contains("leave the size out"));
    with(&["grow", "Data"]);
    let df: Value = serde_json::from_str(&with(&["df", "Data", "--json"])).unwrap();
    assert!(df["total_bytes"].as_u64().unwrap() > 70 << 20, "{df}");
}

#[test]
fn a_wrong_name_names_the_right_ones() {
    let place = Place::new();
    let config = place.config("spdk.json", &[]);
    let e = fails(&["--json", &config, "ls", "Aio1"]);
    assert!(
        e.contains("no bdev `Aio1`") && e.contains("did you mean `Aio0`?"),
        "{e}"
    );
    let e = fails(&["--json", &config, "ls", "Nvme0n1"]);
    assert!(e.contains("there are `Aio0`"), "{e}");
    let e = fails(&["ls", "Aio0"]);
    assert!(e.contains("malloc://1G"), "{e}");
    let missing = text(&place.at("missing.json")).to_owned();
    let e = fails(&["--json", &missing, "ls", "Aio0"]);
    assert!(
        e.contains("missing.json") && e.contains("No such file"),
        "{e}"
    );
    fs::write(place.at("bad.json"), "{\n \"subsystems\": 1 }").unwrap();
    let bad = text(&place.at("bad.json")).to_owned();
    let e = fails(&["--json", &bad, "mkdir", "Aio0", "/dir"]);
    assert!(e.contains("bad.json:2"), "{e}");
}

#[test]
fn readers_by_name_share_and_change_nothing() {
    let place = Place::new();
    let config = place.config("spdk.json", &[]);
    ok(&["--json", &config, "mkfs", "Aio0"]);
    let image = place.at("image");
    let before = fs::read(&image).unwrap();
    let to_read = pumice_bdev::OpenOptions::new().read_only(true);
    let held = pumice_bdev::open_with(text(&image), to_read).unwrap();
    for command in ["ls", "df", "stat", "fsck"] {
        ok(&["--json", &config, command, "Aio0"]);
    }
    ok(&["--json", &config, "blob", "list", "Aio0"]);
    let e = fails(&["--json", &config, "mkdir", "Aio0", "/dir"]);
    assert!(e.contains("in use by"), "{e}");
    drop(held);
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn a_command_on_a_device_that_fails_says_so_and_leaves_what_was_there() {
    let place = Place::new();
    let config = place.config("spdk.json", &[]);
    let source = place.at("source");
    fs::write(&source, vec![7; 300_000]).unwrap();
    ok(&["--json", &config, "mkfs", "Aio0"]);
    ok(&["--json", &config, "cp", "Aio0", text(&source), ":/old"]);
    for (kind, commands) in [
        (
            "write",
            &[
                &["cp", "Aio0", "SOURCE", ":/new"][..],
                &["mkdir", "Aio0", "/dir"],
                &["rm", "Aio0", "/old"],
            ][..],
        ),
        (
            "read",
            &[
                &["cat", "Aio0", "/old"],
                &["mv", "Aio0", "/old", "/new"],
                &["fsck", "--repair", "Aio0"],
            ],
        ),
    ] {
        let above = json!({ "base_name": "Aio0" });
        let inject = json!({ "name": "EE_Aio0", "io_type": kind, "error_type": "failure", "num": 1_000_000 });
        let faulty = place.config(
            "faulty.json",
            &[
                json!({ "method": "bdev_error_create", "params": above }),
                json!({ "method": "bdev_error_inject_error", "params": inject }),
            ],
        );
        for command in commands {
            let args: Vec<&str> = command
                .iter()
                .map(|arg| match *arg {
                    "Aio0" => "EE_Aio0",
                    "SOURCE" => text(&source),
                    other => other,
                })
                .collect();
            let output = pumice(&[&["--json", faulty.as_str()], &args[..]].concat());
            let errors = String::from_utf8(output.stderr).unwrap();
            // The message names the file that is wanted, and not only the one that is being made.
            assert!(
                command[0] != "cp" || errors.contains("/new: /"),
                "{command:?}: {errors}"
            );
            assert!(
                !output.status.success() && errors.contains("EE_Aio0"),
                "{command:?}: {errors}"
            );
            assert!(!errors.contains("panicked"), "{command:?}: {errors}");
            assert!(
                ok(&["--json", &config, "fsck", "Aio0"]).contains("no errors"),
                "{command:?}"
            );
            assert_eq!(
                ok(&["--json", &config, "ls", "Aio0"]).lines().count(),
                1,
                "{command:?}"
            );
            assert_eq!(
                pumice(&["--json", &config, "cat", "Aio0", "/old"]).stdout,
                fs::read(&source).unwrap()
            );
        }
    }
}
