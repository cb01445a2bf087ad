//! RocksDB's `ldb` and `sst_dump` on an image.

use std::path::Path;
use std::process::{Command, Output};

use pumice::{Db, DbOptions};

fn text(out: &Output) -> String {
    let (stdout, stderr) = (&out.stdout, &out.stderr);
    String::from_utf8_lossy(stdout).into_owned() + &String::from_utf8_lossy(stderr)
}

fn ldb(image: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pumice-ldb"))
        .arg(image)
        .args(args)
        .output()
        .unwrap()
}

fn sst_dump(image: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pumice-sst_dump"))
        .arg(image)
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn ldb_reads_and_writes_a_database_on_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    let uri = format!("file://{}", image.display());
    let db = DbOptions::new()
        .path("/orders")
        .open(&format!("{uri}?size=128M&create=1"))
        .unwrap();
    for n in 0..50 {
        db.put(format!("key{n:02}"), format!("value{n}")).unwrap();
    }
    db.flush().unwrap();
    db.close().unwrap();
    drop(db);

    let scanned = ldb(
        &image,
        &["--db=/orders", "scan", "--from=key10", "--to=key12"],
    );
    assert!(scanned.status.success(), "{}", text(&scanned));
    let said = text(&scanned);
    assert!(
        said.contains("key10 ==> value10") && said.contains("key11 ==> value11"),
        "{said}"
    );
    assert!(!said.contains("key12"), "{said}");
    let got = ldb(&image, &["--db=/orders", "get", "key07"]);
    assert_eq!(String::from_utf8_lossy(&got.stdout).trim(), "value7");
    let put = ldb(&image, &["--db=/orders", "put", "new", "one"]);
    assert!(put.status.success(), "{}", text(&put));
    for command in [
        &["--db=/orders", "checkconsistency"][..],
        &["--db=/orders", "list_column_families"],
        &["--db=/orders", "manifest_dump"],
        &["--db=/orders", "compact"],
    ] {
        let out = ldb(&image, command);
        assert!(out.status.success(), "{command:?}: {}", text(&out));
    }
    let missing = ldb(&image, &["--db=/nothing", "get", "a"]);
    assert_ne!(missing.status.code(), Some(0), "{}", text(&missing));
    // Everything is in order after each of them.
    let db = DbOptions::new().path("/orders").open(&uri).unwrap();
    assert_eq!(db.get("new").unwrap().as_deref(), Some(&b"one"[..]));
    assert_eq!(db.get("key49").unwrap().as_deref(), Some(&b"value49"[..]));
    db.close().unwrap();
}

#[test]
fn commands_that_read_change_nothing_and_take_turns_with_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    let uri = format!("file://{}", image.display());
    let db = Db::open(&format!("{uri}?size=64M&create=1")).unwrap();
    db.put("fruit", "apple").unwrap();
    db.flush().unwrap();
    let table = db
        .file_system()
        .list("/")
        .unwrap()
        .into_iter()
        .find(|entry| entry.name.ends_with(".sst"))
        .unwrap();
    db.close().unwrap();
    drop(db);
    let before = std::fs::read(&image).unwrap();
    let fs = pumice::mount(&uri, &pumice::MountOptions::new().read_only(true)).unwrap();
    // Beside another reader.
    let got = ldb(&image, &["--db=/", "get", "fruit"]);
    assert_eq!(
        String::from_utf8_lossy(&got.stdout).trim(),
        "apple",
        "{}",
        text(&got)
    );
    let file = format!("--file=/{}", table.name);
    let dumped = sst_dump(&image, &[&file, "--command=scan"]);
    assert!(dumped.status.success(), "{}", text(&dumped));
    assert!(text(&dumped).contains("apple"), "{}", text(&dumped));
    let checked = sst_dump(&image, &[&file, "--command=verify"]);
    assert!(checked.status.success(), "{}", text(&checked));
    // One that writes is refused while somebody reads.
    let put = ldb(&image, &["--db=/", "put", "a", "b"]);
    assert_eq!(put.status.code(), Some(1), "{}", text(&put));
    assert!(text(&put).contains("in use"), "{}", text(&put));
    fs.unmount().unwrap();
    assert!(std::fs::read(&image).unwrap() == before, "a reader wrote");
}

#[test]
fn the_device_comes_first() {
    for program in [
        env!("CARGO_BIN_EXE_pumice-ldb"),
        env!("CARGO_BIN_EXE_pumice-sst_dump"),
    ] {
        let out = Command::new(program).arg("--db=/").output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{}", text(&out));
        assert!(text(&out).contains("DEVICE"), "{}", text(&out));
        let out = Command::new(program)
            .args(["/nowhere/kv.img", "--db=/", "get", "a"])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{}", text(&out));
        assert!(text(&out).contains("no such file"), "{}", text(&out));
    }
}

#[test]
fn names_of_a_configuration_are_devices_for_each_tool() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    let uri = format!(
        "file://{}?size=128M&create=1&block_size=4096",
        image.display()
    );
    let db = Db::open(&uri).unwrap();
    db.put("fruit", "apple").unwrap();
    db.flush().unwrap();
    db.close().unwrap();
    drop(db);
    let file = |name: &str, faults: &str| {
        let aio = format!(
            r#"{{ "method": "bdev_aio_create", "params": {{ "name": "Aio0", "filename": "{}", "block_size": 4096 }} }}"#,
            image.display()
        );
        let path = dir.path().join(name);
        let text = format!(
            r#"{{ "subsystems": [{{ "subsystem": "bdev", "config": [{aio}{faults}] }}] }}"#
        );
        std::fs::write(&path, text).unwrap();
        path
    };
    let config = file("spdk.json", "");
    let run = |program: &str, config: &Path, args: &[&str]| {
        let mut command = Command::new(program);
        command
            .arg("--json")
            .arg(config)
            .args(args)
            .output()
            .unwrap()
    };
    let (db, ldb) = (
        env!("CARGO_BIN_EXE_pumice-db"),
        env!("CARGO_BIN_EXE_pumice-ldb"),
    );
    let got = run(db, &config, &["get", "Aio0", "fruit"]);
    assert_eq!(text(&got).trim(), "apple");
    let got = run(ldb, &config, &["Aio0", "--db=/", "get", "fruit"]);
    assert_eq!(text(&got).trim(), "apple");
    let dumped = run(
        env!("CARGO_BIN_EXE_pumice-sst_dump"),
        &config,
        &["Aio0", "--file=/", "--command=check"],
    );
    assert!(text(&dumped).contains(".sst"), "{}", text(&dumped));
    let wrong = run(db, &config, &["get", "Aio1", "fruit"]);
    assert!(
        text(&wrong).contains("did you mean `Aio0`?"),
        "{}",
        text(&wrong)
    );

    // A change whose close fails may have been made, and says so.
    let faults = r#",
        { "method": "bdev_error_create", "params": { "base_name": "Aio0" } },
        { "method": "bdev_error_inject_error", "params":
          { "name": "EE_Aio0", "io_type": "flush", "error_type": "failure", "num": 1000000 } }"#;
    let faulty = file("faulty.json", faults);
    let put = run(db, &faulty, &["put", "EE_Aio0", "fruit", "pear"]);
    assert!(!put.status.success());
    assert!(
        text(&put).contains("may be there; look before you repeat it"),
        "{}",
        text(&put)
    );
}
