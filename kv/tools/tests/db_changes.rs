//! What `pumice db` leaves of a database that it changes, and of one that it refuses to change.

mod common;

use std::collections::BTreeSet;

use common::{content, image, mounted, ok, opened, refused, refused_with, run, tree};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{Cache, ColumnFamilyDescriptor, DBCompressionType, MergeOperands, Options};
use pumice::{Db, DbOptions, EnvOptions, FileSystem};

/// Appends.
#[allow(clippy::unnecessary_wraps, reason = "RocksDB asks for it")]
fn append(_key: &[u8], before: Option<&[u8]>, more: &MergeOperands) -> Option<Vec<u8>> {
    let mut all = before.unwrap_or_default().to_vec();
    more.iter().for_each(|next| all.extend_from_slice(next));
    Some(all)
}

/// The options of a program that has four levels, and an operator of its own.
fn four_levels() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_num_levels(4);
    options.set_write_buffer_size(5 << 20);
    options.set_compression_type(DBCompressionType::None);
    options.set_merge_operator_associative("append", append);
    options
}

fn open_four_levels(uri: &str) -> Db {
    let mut more = four_levels();
    more.set_write_buffer_size(7 << 20);
    DbOptions::new()
        .path("/db")
        .rocksdb(four_levels())
        .column_family("more", more)
        .open(uri)
        .unwrap()
}

/// Returns the levels that have files.
fn levels(db: &Db) -> BTreeSet<i32> {
    let files = db.live_files().unwrap();
    files.iter().map(|file| file.level).collect()
}

/// Returns the content of the newest OPTIONS file.
fn newest_options(fs: &FileSystem, dir: &str) -> String {
    let names = fs.list(dir).unwrap().into_iter().map(|entry| entry.name);
    let newest = names.filter(|name| name.starts_with("OPTIONS-")).max();
    String::from_utf8(content(fs, &format!("{dir}/{}", newest.unwrap()))).unwrap()
}

#[test]
fn a_change_keeps_the_levels_and_options_of_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    let db = open_four_levels(&format!("file://{uri}?size=256M&create=1"));
    let fill = |first: &str| {
        for n in 0..100 {
            db.put(format!("{first}{n}"), "value").unwrap();
        }
        db.flush().unwrap();
    };
    fill("a");
    db.compact_range(None::<&[u8]>, None::<&[u8]>);
    fill("n");
    db.merge("list", "a").unwrap();
    db.flush().unwrap();
    assert_eq!(levels(&db), BTreeSet::from([0, 3]));
    db.close().unwrap();
    let before = mounted(uri, |fs| newest_options(fs, "/db"));
    assert!(before.contains("write_buffer_size=5242880"), "{before}");
    assert!(before.contains("disable_auto_compactions=false"));
    let at = ["--path", "/db"];
    ok(&["put", uri, "new", "one", at[0], at[1], "--cf", "more"]);
    ok(&["delete", uri, "a1", at[0], at[1]]);
    ok(&["checkpoint", uri, "/copy", at[0], at[1]]);
    ok(&["backup", uri, "/backups", at[0], at[1]]);
    ok(&["restore", uri, "/backups", "--path", "/again"]);
    for path in ["/db", "/copy", "/again"] {
        let after = mounted(uri, |fs| newest_options(fs, path));
        assert!(after == before, "{path}: {after}");
    }
    let db = open_four_levels(uri);
    assert!(levels(&db).is_superset(&BTreeSet::from([0, 3])));
    assert_eq!(db.get("list").unwrap().as_deref(), Some(&b"a"[..]));
    assert_eq!(db.get("a1").unwrap(), None);
    assert_eq!(db.get("a2").unwrap().as_deref(), Some(&b"value"[..]));
    let more = db.cf_handle("more").unwrap();
    assert_eq!(
        db.get_cf(&more, "new").unwrap().as_deref(),
        Some(&b"one"[..])
    );
    drop(more);
    db.close().unwrap();
}

#[test]
fn a_family_that_load_makes_is_in_the_options_beside_those_of_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    open_four_levels(&format!("file://{uri}?size=256M&create=1"))
        .close()
        .unwrap();
    let dumped = b"pumice-db-dump 1\nfamily third\na\tb\nend 1\n";
    let load = ["load", uri, "--path", "/db", "--create"];
    let loaded = run(&load, dumped);
    assert!(loaded.status.success(), "{loaded:?}");
    mounted(uri, |fs| {
        let text = newest_options(fs, "/db");
        assert_eq!(text.matches("num_levels=4").count(), 2, "{text}");
        assert_eq!(text.matches("num_levels=7").count(), 1, "{text}");
        assert!(!text.contains("disable_auto_compactions=true"), "{text}");
        let env = EnvOptions::new().root("/db").build(fs).unwrap();
        let cache = Cache::new_lru_cache(1 << 20);
        let (_, families) = Options::load_latest("/", env, false, cache).unwrap();
        let names: Vec<&str> = families.iter().map(ColumnFamilyDescriptor::name).collect();
        assert_eq!(names, ["default", "more", "third"]);
    });
}

#[test]
fn a_value_without_a_time_is_not_put_into_a_database_with_a_ttl() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    // What RocksDB's DBWithTTL writes there.
    mounted(uri, |fs| {
        let text = newest_options(fs, "/orders");
        let with = text.replacen(
            "compaction_filter_factory=nullptr",
            "compaction_filter_factory={id=TtlCompactionFilterFactory;user_filter_factory=;ttl=60;}",
            1,
        );
        assert_ne!(text, with);
        let path = "/orders/OPTIONS-900000";
        let file = fs.open(path, OpenOptions::FRESH).unwrap();
        file.append(with.as_bytes()).unwrap();
        file.sync().unwrap();
    });
    let before = tree(uri);
    let said = refused(&["put", uri, "a", "b", "--path", "/orders"]);
    assert!(said.contains("TTL"), "{said}");
    assert!(tree(uri) == before);
    ok(&["put", uri, "a", "b", "--path", "/orders", "--cf", "events"]);
    ok(&["delete", uri, "key000", "--path", "/orders"]);
}

/// Checks that commands with `--path` fail with a message, and leave the file system as it was.
fn changes_nothing(uri: &str, path: &str, commands: &[(&[&str], &[u8], &str)]) {
    let before = tree(uri);
    for (args, input, said) in commands {
        let text = refused_with(&[args, &["--path", path][..]].concat(), input);
        assert!(text.contains(said), "{args:?}: {text}");
        let after = tree(uri);
        let changed: Vec<&String> = after
            .iter()
            .filter(|(path, bytes)| before.get(*path) != Some(bytes))
            .map(|(path, _)| path)
            .collect();
        assert!(after == before, "{args:?}: {changed:?}");
    }
}

const DUMP: &[u8] = b"pumice-db-dump 1\nfamily default\na\tb\nend 1\n";
const OTHER: &[u8] = b"pumice-db-dump 1\nfamily none\na\tb\nend 1\n";

#[test]
fn a_change_where_there_is_no_database_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let out = dir.path().join("out");
    let to = out.to_str().unwrap();
    let wrong = &["put", uri, "k", "v", "--cf", "none", "--create"];
    let commands: &[(&[&str], &[u8], &str)] = &[
        (&["put", uri, "k", "v"], b"", "--create"),
        (&["delete", uri, "k"], b"", "--create"),
        (&["load", uri], DUMP, "--create"),
        (&["backup", uri, "/new"], b"", "--create"),
        (&["checkpoint", uri, "/new"], b"", "--create"),
        (&["export", uri, to], b"", "--create"),
        (wrong, b"", "default"),
        (&["load", uri, "--create"], b"garbage\n", "not a dump"),
        (
            &["load", uri, "--create"],
            b"pumice-db-dump 1\na\tb\n",
            "line 2",
        ),
        (&["restore", uri, "/orders"], b"", "no backup"),
    ];
    changes_nothing(uri, "/typo", commands);
    assert!(!out.exists());
}

#[test]
fn a_change_with_something_else_wrong_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let full = dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("file"), "").unwrap();
    let full = full.to_str().unwrap();
    ok(&["backup", uri, "/backups", "--path", "/orders"]);
    let families = "default, events";
    let commands: &[(&[&str], &[u8], &str)] = &[
        (&["put", uri, "k", "v", "--cf", "none"], b"", families),
        (&["delete", uri, "k", "--cf", "none"], b"", families),
        (&["load", uri], b"garbage\n", "not a dump"),
        (&["load", uri], OTHER, "--create"),
        (&["checkpoint", uri, "/orders"], b"", "/orders"),
        (&["checkpoint", uri, "/backups"], b"", "/backups"),
        (&["checkpoint", uri, "/orders/CURRENT"], b"", "CURRENT"),
        (&["backup", uri, "/orders/CURRENT"], b"", "CURRENT"),
        (&["checkpoint", uri, "/orders/CURRENT/to"], b"", "a file"),
        (&["backup", uri, "/orders/CURRENT/a/b"], b"", "a file"),
        (&["checkpoint", uri, "/.pumice-export"], b"", "exports"),
        (&["checkpoint", uri, "/.pumice-restore"], b"", "exports"),
        (&["backup", uri, "//.pumice-export/"], b"", "exports"),
        (&["backup", uri, "/.pumice-restore/a"], b"", "exports"),
        (&["export", uri, "/proc/1"], b"", "/proc"),
        (&["export", uri, "/proc/new"], b"", "/proc"),
        (&["export", uri, full], b"", "not empty"),
        (&["restore", uri, "/backups"], b"", "it holds a database"),
    ];
    changes_nothing(uri, "/orders", commands);
    for (to, said) in [
        ("/orders/CURRENT", "a file"),
        ("/orders/CURRENT/to", "a file"),
        ("/.pumice-export", "exports"),
        ("/.pumice-restore", "exports"),
        ("/.pumice-restore/to", "exports"),
    ] {
        changes_nothing(uri, to, &[(&["restore", uri, "/backups"], b"", said)]);
    }
}

/// RocksDB takes a merge without its operator for the end of the log, and removes what follows.
#[test]
fn a_log_that_needs_the_program_of_the_database_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    let out = dir.path().join("out");
    let db = open_four_levels(&format!("file://{uri}?size=256M&create=1"));
    db.put("before", "there").unwrap();
    db.merge("list", "a").unwrap();
    db.merge("list", "b").unwrap();
    db.put("after", "there").unwrap();
    db.close().unwrap();
    let needs = "nothing is changed";
    let load = b"pumice-db-dump 1\nfamily default\na\tb\nend 1\n";
    let commands: &[(&[&str], &[u8], &str)] = &[
        (&["put", uri, "k", "v"], b"", needs),
        (&["delete", uri, "before"], b"", needs),
        (&["load", uri], load, needs),
        (&["checkpoint", uri, "/copy"], b"", needs),
        (&["backup", uri, "/backups"], b"", needs),
        (&["export", uri, out.to_str().unwrap()], b"", needs),
        (&["verify", uri], b"", "merge"),
        (&["dump", uri], b"", "merge"),
    ];
    changes_nothing(uri, "/db", commands);
    let shown = run(&["get", uri, "before", "--path", "/db"], b"");
    assert_eq!(shown.stdout, b"there\n");
    let said = String::from_utf8(shown.stderr).unwrap();
    assert!(said.contains("can be read in part only"), "{said}");
    let db = open_four_levels(uri);
    assert_eq!(db.get("list").unwrap().as_deref(), Some(&b"ab"[..]));
    assert_eq!(db.get("after").unwrap().as_deref(), Some(&b"there"[..]));
    // From a table no command needs the operator, unless it reads the key.
    db.flush().unwrap();
    db.close().unwrap();
    ok(&["put", uri, "k", "v", "--path", "/db"]);
    let db = open_four_levels(uri);
    assert_eq!(db.get("list").unwrap().as_deref(), Some(&b"ab"[..]));
    db.close().unwrap();
}

/// A log in a directory of its own counts, and is not left out where it cannot be found.
#[test]
fn a_log_in_another_directory_counts() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    let apart = |path: &str| {
        DbOptions::new()
            .path(path)
            .configure(|options| options.set_wal_dir("/logs"))
    };
    let db = apart("/db")
        .open(&format!("file://{uri}?size=256M&create=1"))
        .unwrap();
    db.put("logged", "there").unwrap();
    db.close().unwrap();
    let at = ["--path", "/db"];
    assert_eq!(ok(&["get", uri, "logged", at[0], at[1]]), "there\n");
    ok(&["put", uri, "new", "too", at[0], at[1]]);
    assert_eq!(ok(&["get", uri, "logged", at[0], at[1]]), "there\n");
    mounted(uri, |fs| fs.rename("/db/logs", "/elsewhere").unwrap());
    let commands: &[(&[&str], &[u8], &str)] = &[
        (&["put", uri, "k", "v"], b"", "/db/logs"),
        (&["backup", uri, "/backups"], b"", "/db/logs"),
        (&["get", uri, "logged"], b"", "/db/logs"),
        (&["dump", uri], b"", "/db/logs"),
    ];
    changes_nothing(uri, "/db", commands);
    mounted(uri, |fs| fs.rename("/elsewhere", "/db/logs").unwrap());
    assert_eq!(ok(&["get", uri, "new", at[0], at[1]]), "too\n");
}

#[test]
fn an_older_backup_is_restored_only_when_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let at = ["--path", "/orders"];
    for value in ["first", "second"] {
        ok(&["put", uri, "which", value, at[0], at[1]]);
        ok(&["backup", uri, "/backups", at[0], at[1]]);
    }
    let restore = |path: &str, more: &[&str]| {
        run(
            &[&["restore", uri, "/backups", "--path", path], more].concat(),
            b"",
        )
    };
    let said = restore("/latest", &[]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(
        String::from_utf8(said.stdout).unwrap(),
        "backup 2 is restored\n"
    );
    let damage = |number: u32| {
        mounted(uri, |fs| {
            let meta = format!("/backups/meta/{number}");
            let file = fs.open(&meta, OpenOptions::READ).unwrap();
            file.write_at(0, b"\n").unwrap();
            file.sync().unwrap();
        });
    };
    damage(2);
    let before = tree(uri);
    let refused = restore("/again", &[]);
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("backup 2 is damaged"), "{text}");
    assert!(text.contains("--backup 1"), "{text}");
    for (number, said) in [("2", "damaged"), ("3", "no backup 3")] {
        let text = restore("/again", &["--backup", number]);
        assert_eq!(text.status.code(), Some(1));
        let text = String::from_utf8(text.stderr).unwrap();
        assert!(text.contains(said), "{text}");
    }
    assert!(tree(uri) == before);
    let older = restore("/again", &["--backup", "1"]);
    assert!(older.status.success(), "{older:?}");
    assert_eq!(
        String::from_utf8(older.stdout).unwrap(),
        "backup 1 is restored\n"
    );
    for (path, value) in [("/latest", "second"), ("/again", "first")] {
        let found = opened(uri, path, |db| db.get("which").unwrap());
        assert_eq!(found.as_deref(), Some(value.as_bytes()), "{path}");
    }
    damage(1);
    let text = String::from_utf8(restore("/none", &[]).stderr).unwrap();
    assert!(text.contains("backups 1, 2 are damaged"), "{text}");
}

#[test]
fn a_restore_that_was_killed_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    ok(&["backup", uri, "/backups", "--path", "/orders"]);
    mounted(uri, |fs| {
        fs.mkdir("/.pumice-restore").unwrap();
        let left = "/.pumice-restore/CURRENT";
        drop(fs.open(left, OpenOptions::CREATE).unwrap());
        fs.mkdir("/empty").unwrap();
    });
    for path in ["/new/place", "/empty"] {
        ok(&["restore", uri, "/backups", "--path", path]);
        let found = opened(uri, path, |db| db.get("key007").unwrap());
        assert_eq!(found.as_deref(), Some(&b"value 7"[..]), "{path}");
    }
    let left = tree(uri);
    assert!(
        left.keys().all(|path| !path.starts_with("/.pumice")),
        "{:?}",
        left.keys()
    );
}

#[test]
fn a_damaged_record_of_the_log_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &format!("{}", dir.path().join("kv.img").display())[..];
    let db = DbOptions::new()
        .open(&format!("file://{uri}?size=64M&create=1"))
        .unwrap();
    for n in 0..300u32 {
        db.put(format!("key{n:03}"), format!("value {n}.")).unwrap();
    }
    db.close().unwrap();
    let sound = ok(&["verify", uri]);
    assert!(sound.contains("300 records"), "{sound}");
    let mut bytes = std::fs::read(uri).unwrap();
    let places: Vec<usize> = (0..bytes.len() - 10)
        .filter(|at| bytes[*at..].starts_with(b"value 150."))
        .collect();
    assert_eq!(places.len(), 1, "the log alone has it");
    bytes[places[0]] ^= 1;
    std::fs::write(uri, bytes).unwrap();
    for command in ["verify", "dump"] {
        let said = refused(&[command, uri]);
        assert!(
            said.to_lowercase().contains("corruption"),
            "{command}: {said}"
        );
    }
    // What comes before it can be read.
    assert_eq!(ok(&["get", uri, "key007"]), "value 7.\n");
}

#[test]
fn nothing_follows_the_last_line_of_a_dump() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &image(dir.path())[..];
    let load = ["load", uri, "--path", "/copy", "--create"];
    let dumped = "pumice-db-dump 1\nfamily default\na\tb\nend 1\n";
    for after in [dumped, "c\td\n", "end 1\n", "\n", "family default"] {
        let said = refused_with(&load, format!("{dumped}{after}").as_bytes());
        assert!(said.contains("line 5"), "{after:?}: {said}");
        assert!(
            said.contains("1 record of it is in the database"),
            "{after:?}: {said}"
        );
    }
    for (wrong, records) in [
        ("pumice-db-dump 1\nfamily default\na\tb\n\\q\tb\n", 1),
        ("pumice-db-dump 1\nfamily default\na\tb\nc\td\nend 3\n", 2),
        ("pumice-db-dump 1\nfamily default\na\tb\nc\td\nnothing\n", 2),
    ] {
        let said = refused_with(&load, wrong.as_bytes());
        let records = format!("{records} record");
        assert!(said.contains(&records), "{wrong:?}: {said}");
    }
}
