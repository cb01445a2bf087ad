//! Helpers to run `pumice db`, and an image to run it on.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pumice::fs::OpenOptions;
use pumice::rocksdb::{DBCompressionType, Options};
use pumice::{Db, DbOptions, FileSystem, MountOptions};

/// Runs `pumice db`.
pub fn run(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pumice-db"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses does not read.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Returns the standard output of a command that has to succeed.
pub fn ok(args: &[&str]) -> String {
    let output = run(args, b"");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the message of a command that has to fail.
pub fn refused(args: &[&str]) -> String {
    refused_with(args, b"")
}

/// Returns the message of a command that has to fail with this input.
pub fn refused_with(args: &[&str], input: &[u8]) -> String {
    let output = run(args, input);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    said
}

/// Makes a database with two column families and with bytes of every kind.
pub fn image(dir: &Path) -> String {
    let path = dir.join("kv.img").to_str().unwrap().to_owned();
    let db = DbOptions::new()
        .path("/orders")
        .configure(|options| options.set_compression_type(DBCompressionType::None))
        .column_family("events", Options::default())
        .open(&format!("file://{path}?size=256M&create=1"))
        .unwrap();
    for n in 0..300u32 {
        db.put(format!("key{n:03}"), format!("value {n}")).unwrap();
    }
    db.flush().unwrap();
    let events = db.cf_handle("events").unwrap();
    for b in 0..=255u8 {
        db.put_cf(&events, [b, b'\t', b'\\'], [b'\n', b, 0])
            .unwrap();
    }
    db.put_cf(&events, b"", b"").unwrap();
    drop(events);
    db.close().unwrap();
    path
}

/// Opens the database, calls `f` and closes it.
pub fn opened<R>(uri: &str, path: &str, f: impl FnOnce(&Db) -> R) -> R {
    let db = DbOptions::new().path(path).open(uri).unwrap();
    let result = f(&db);
    db.close().unwrap();
    result
}

/// Mounts the file system, calls `f` and unmounts.
pub fn mounted<R>(uri: &str, f: impl FnOnce(&FileSystem) -> R) -> R {
    let fs = pumice::mount(uri, &MountOptions::new()).unwrap();
    let result = f(&fs);
    fs.unmount().unwrap();
    result
}

/// Returns the content of a file.
pub fn content(fs: &FileSystem, path: &str) -> Vec<u8> {
    let file = fs.open(path, OpenOptions::READ).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    assert_eq!(file.read_at(0, &mut bytes).unwrap(), bytes.len());
    bytes
}

/// Returns every path of the file system with its content; a directory has none.
pub fn tree(uri: &str) -> BTreeMap<String, Option<Vec<u8>>> {
    let fs = pumice::mount(uri, &MountOptions::new().read_only(true)).unwrap();
    let mut found = BTreeMap::new();
    let mut dirs = vec![String::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs.list(if dir.is_empty() { "/" } else { &dir }).unwrap() {
            let path = format!("{dir}/{}", entry.name);
            if entry.is_dir {
                dirs.push(path.clone());
            }
            let bytes = (!entry.is_dir).then(|| content(&fs, &path));
            found.insert(path, bytes);
        }
    }
    fs.unmount().unwrap();
    found
}
