//! `pumice db` on a database of an image.

mod common;

use std::process::Command;

use common::{image, ok, opened, refused, run};
use pumice::DbOptions;
use pumice::rocksdb::Options;

#[test]
fn keys_are_read_and_changed() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let at = ["--path", "/orders"];
    let get = |key: &str| ok(&["get", uri, key, at[0], at[1]]);
    assert_eq!(get("key007"), "value 7\n");
    ok(&["put", uri, "new", "one", at[0], at[1]]);
    assert_eq!(get("new"), "one\n");
    ok(&["delete", uri, "new", at[0], at[1]]);
    assert!(refused(&["get", uri, "new", at[0], at[1]]).contains("no such key"));
    ok(&[
        "put", uri, "--hex", "00ff", "0a", "--cf", "events", at[0], at[1],
    ]);
    let events = ["--cf", "events", at[0], at[1]];
    let hex = [&["get", uri, "--hex", "00ff"][..], &events].concat();
    assert_eq!(ok(&hex), "0a\n");
    let json = [&["get", uri, "--hex", "00FF", "--json"][..], &events].concat();
    let value: serde_json::Value = serde_json::from_str(&ok(&json)).unwrap();
    assert_eq!(value["value_hex"], "0a");
    let wrong = refused(&["get", uri, "a", "--cf", "event", at[0], at[1]]);
    assert!(wrong.contains("default, events"), "{wrong}");
    assert!(refused(&["get", uri, "--hex", "0", at[0], at[1]]).contains("odd"));
    // Nothing is made by mistake.
    refused(&["get", uri, "a", "--path", "/none"]);
    refused(&["put", uri, "a", "b", "--path", "/none"]);
    ok(&["put", uri, "a", "b", "--path", "/made", "--create"]);
    assert_eq!(ok(&["get", uri, "a", "--path", "/made"]), "b\n");
}

#[test]
fn a_scan_has_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let scan = |more: &[&str]| ok(&[&["scan", uri, "--path", "/orders"], more].concat());
    assert_eq!(
        scan(&["--from", "key010", "--to", "key012"]),
        "key010\tvalue 10\nkey011\tvalue 11\n"
    );
    assert_eq!(scan(&["--limit", "1"]), "key000\tvalue 0\n");
    assert_eq!(scan(&[]).lines().count(), 300);
    assert_eq!(scan(&["--from", "z"]), "");
    let events = scan(&["--cf", "events", "--limit", "2"]);
    assert_eq!(events, "\t\n\\x00\\x09\\\\\t\\x0a\\x00\\x00\n");
    let json = scan(&["--json", "--from", "key299"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["value"], "value 299");
}

#[test]
fn a_dump_brings_any_bytes_back() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    for (form, to) in [(&[][..], "/text"), (&["--hex"][..], "/digits")] {
        let dumped = ok(&[&["dump", uri, "--path", "/orders"], form].concat());
        assert!(dumped.ends_with("end 557\n"));
        let without = run(&["load", uri, "--path", to], dumped.as_bytes());
        assert!(!without.status.success(), "--create is missing");
        let loaded = run(&["load", uri, "--path", to, "--create"], dumped.as_bytes());
        assert!(loaded.status.success(), "{loaded:?}");
        let again = ok(&[&["dump", uri, "--path", to], form].concat());
        assert!(again == dumped);
        // A dump that was cut short is not taken for a whole one.
        let cut = &dumped[..dumped.len() / 2];
        let cut = &cut[..cut.rfind('\n').unwrap() + 1];
        let short = run(&["load", uri, "--path", "/cut", "--create"], cut.as_bytes());
        let said = String::from_utf8_lossy(&short.stderr);
        assert!(said.contains("cut short"), "{said}");
    }
    let one = ok(&["dump", uri, "--path", "/orders", "--cf", "default"]);
    assert!(one.ends_with("end 300\n"));
    for (input, said) in [
        ("", "not a dump"),
        ("pumice-db-dump 1\na\tb\n", "line 2"),
        ("pumice-db-dump 1\nfamily default\n\\q\tb\n", "line 3"),
        ("pumice-db-dump 1\nfamily default\nnothing\n", "tab"),
        (
            "pumice-db-dump 1\nfamily default\na\tb\nend 2\n",
            "2 records were dumped",
        ),
        (
            "pumice-db-dump 1\nfamily none\n",
            "there are: default, events",
        ),
    ] {
        let refused = run(&["load", uri, "--path", "/orders"], input.as_bytes());
        assert_eq!(refused.status.code(), Some(1));
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(text.contains(said), "{input:?}: {text}");
    }
}

#[test]
fn readers_change_nothing_and_copies_can_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let uri = &image[..];
    let before = std::fs::read(uri).unwrap();
    let at = ["--path", "/orders"];
    for args in [
        &["get", uri, "key000"][..],
        &["scan", uri],
        &["dump", uri],
        &["stats", uri],
        &["stats", uri, "--json"],
        &["verify", uri],
        &["verify", uri, "--json"],
    ] {
        ok(&[args, &at].concat());
    }
    assert!(std::fs::read(uri).unwrap() == before);
    let verified = ok(&["verify", uri, at[0], at[1]]);
    assert!(verified.contains("default: 300") && verified.contains("events: 257"));
    let stats = ok(&["stats", uri, "--json", at[0], at[1]]);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["column_families"][0]["name"], "default");
    assert_eq!(stats["last_sequence"], 557);

    ok(&["checkpoint", uri, "/copy", at[0], at[1]]);
    ok(&["backup", uri, "/backups", at[0], at[1]]);
    ok(&["delete", uri, "key000", at[0], at[1]]);
    assert!(refused(&["restore", uri, "/backups", at[0], at[1]]).contains("it holds a database"));
    assert!(refused(&["restore", uri, "/orders", "--path", "/back"]).contains("no backup"));
    ok(&["restore", uri, "/backups", "--path", "/back"]);
    for path in ["/copy", "/back"] {
        let value = opened(uri, path, |db| db.get("key000").unwrap());
        assert_eq!(value.as_deref(), Some(&b"value 0"[..]), "{path}");
    }
    let out = dir.path().join("out");
    ok(&["export", uri, out.to_str().unwrap(), at[0], at[1]]);
    let names = pumice::rocksdb::DB::list_cf(&Options::default(), &out).unwrap();
    assert_eq!(names, ["default", "events"]);
    refused(&["export", uri, out.to_str().unwrap(), at[0], at[1]]);
}

#[test]
fn a_damaged_table_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path());
    let mut bytes = std::fs::read(&uri).unwrap();
    // In the table, and in a log that is deleted.
    let places: Vec<usize> = (0..bytes.len() - 9)
        .filter(|at| bytes[*at..].starts_with(b"value 150"))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at + 2] ^= 1;
    }
    std::fs::write(&uri, bytes).unwrap();
    let said = refused(&["verify", &uri, "--path", "/orders"]);
    assert!(said.to_lowercase().contains("corruption"), "{said}");
}

#[test]
fn a_reader_that_goes_away_is_an_error_of_a_dump_alone() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let code = |args: &[&str], closed_errors: bool| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_pumice-db"));
        command.args(args).args(["--path", "/orders"]);
        if closed_errors {
            command.stderr(writer.try_clone().unwrap());
        }
        command.stdout(writer).status().unwrap().code()
    };
    assert_eq!(code(&["scan", uri], false), Some(0));
    assert_eq!(code(&["scan", uri, "--json"], false), Some(0));
    assert_eq!(code(&["dump", uri], false), Some(1));
    // The message has nowhere to go.
    assert_eq!(code(&["dump", uri], true), Some(1));
    assert_eq!(code(&["get", uri, "none"], true), Some(1));
}

#[test]
fn a_name_reaches_the_terminal_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    let db = DbOptions::new()
        .column_family("red\u{1b}[31m", Options::default())
        .open(&format!("file://{uri}?size=64M&create=1"))
        .unwrap();
    db.close().unwrap();
    for args in [
        &["get", uri, "key", "--cf", "none"][..],
        &["put", uri, "key", "value", "--cf", "none"],
    ] {
        let said = refused(args);
        assert!(said.contains(r"red\u{1b}[31m"), "{said}");
        assert!(!said.contains('\u{1b}'), "{said}");
    }
}

#[test]
fn a_restore_needs_a_place() {
    let without = run(&["restore", "disk.img", "/backups"], b"");
    assert_eq!(without.status.code(), Some(2));
    let said = String::from_utf8_lossy(&without.stderr);
    assert!(said.contains("--path"), "{said}");
    assert!(ok(&["restore", "--help"]).contains("`/restored`"));
}
