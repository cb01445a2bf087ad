//! Checkpoints, backups, and copies outside.

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use common::{check, fill, key, tree, uncompressed, value, watchdog};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{DB, Options};
use pumice::{Error, ErrorKind, MountOptions, mount};

/// Returns the same without the content of `/db`, where RocksDB works by itself.
fn outside(fs: &pumice::FileSystem) -> Vec<String> {
    let mut all = tree(fs, "/");
    all.retain(|path| !path.starts_with("/db/"));
    all
}

#[test]
fn checkpoints_and_backups_of_one_database_among_several() {
    let _limit = watchdog();
    let fs = mount("malloc://512M", &MountOptions::new()).unwrap();
    let orders = uncompressed().path("/shop/orders").open_in(&fs).unwrap();
    let stock = uncompressed().path("/shop/stock").open_in(&fs).unwrap();
    assert_eq!(orders.directory(), "/shop/orders");
    fill(&orders, 0..10_000);
    stock.put("apples", "3").unwrap();
    orders.flush().unwrap();
    fill(&orders, 10_000..11_000);
    orders.checkpoint("/copy").unwrap();
    orders.backup("/backups/orders").unwrap();
    fill(&orders, 11_000..12_000);
    orders.backup("/backups/orders").unwrap();
    assert_eq!(orders.backups("/backups/orders").unwrap().len(), 2);
    orders
        .restore_backup("/backups/orders", "/restored")
        .unwrap();
    orders.close().unwrap();
    assert_eq!(stock.get("apples").unwrap().as_deref(), Some(&b"3"[..]));
    stock.close().unwrap();
    let copy = uncompressed().path("/copy").open_in(&fs).unwrap();
    check(&copy, 0..11_000);
    assert_eq!(copy.get(key(11_500)).unwrap(), None);
    copy.close().unwrap();
    uncompressed().path("/copy").destroy_in(&fs).unwrap();
    let restored = uncompressed().path("/restored").open_in(&fs).unwrap();
    check(&restored, 0..12_000);
    restored.close().unwrap();
    fs.unmount().unwrap();
}

/// KA4, KA4b: the content of a directory stays, above all the open database's own files.
#[test]
fn a_backup_is_restored_into_a_missing_or_empty_directory_only() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    let other = uncompressed().path("/other").open_in(&fs).unwrap();
    fill(&db, 0..1_000);
    db.backup("/bk").unwrap();
    fill(&db, 1_000..3_500);
    fs.mkdir("/things").unwrap();
    fs.open("/things/precious", OpenOptions::CREATE).unwrap();
    let before = outside(&fs);
    for to in [
        "/db",
        "/db/.",
        "//db",
        "/other",
        "/things",
        "/things/precious",
        "/bk",
        "/",
    ] {
        let error = db.restore_backup("/bk", to).expect_err(to);
        assert!(matches!(error, Error::Directory { .. }), "{to}: {error}");
    }
    assert_eq!(outside(&fs), before);
    check(&db, 0..3_500);
    db.flush().unwrap();
    db.close().unwrap();
    check(&uncompressed().path("/db").open_in(&fs).unwrap(), 0..3_500);
    // It is closed now, but still has content.
    assert!(other.restore_backup("/bk", "/db").is_err());
    fs.mkdir("/empty").unwrap();
    for to in ["/empty", "/a/b/new"] {
        other.restore_backup("/bk", to).unwrap();
        let restored = uncompressed().path(to).open_in(&fs).unwrap();
        check(&restored, 0..1_000);
        assert_eq!(restored.get(key(1_000)).unwrap(), None);
        restored.close().unwrap();
        assert!(other.restore_backup("/bk", to).is_err(), "a second time");
    }
}

/// KA17: asking creates nothing, and a failure leaves nothing.
#[test]
fn asking_for_backups_and_failing_make_nothing() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    fill(&db, 0..100);
    fs.mkdir("/there").unwrap();
    let before = outside(&fs);
    assert!(db.backups("/q/w").unwrap().is_empty());
    assert!(db.backups("/there").unwrap().is_empty());
    assert!(db.backups("/db").unwrap().is_empty());
    for from in ["/nobk", "/there", "/db", "/db/CURRENT"] {
        let error = db.restore_backup(from, "/new/place").expect_err(from);
        assert!(error.to_string().contains("no backup"), "{error}");
    }
    // A checkpoint in an existing place is refused.
    assert!(db.checkpoint("/there").is_err());
    assert_eq!(outside(&fs), before);
    // A table of the backup is damaged: the restored part is removed again.
    db.backup("/bk").unwrap();
    let table = tree(&fs, "/bk")
        .into_iter()
        .find(|path| path.ends_with(".sst"))
        .unwrap();
    let file = fs.open(&table, OpenOptions::READ).unwrap();
    file.write_at(50, b"not what was backed up").unwrap();
    file.sync().unwrap();
    let before = outside(&fs);
    assert!(db.restore_backup("/bk", "/x/restored").is_err());
    assert_eq!(outside(&fs), before);
}

/// The engine makes its directories one after the other, and the last one cannot be made.
#[test]
fn a_first_backup_that_fails_leaves_no_directories() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    fill(&db, 0..100);
    fs.mkdir("/bk").unwrap();
    fs.open("/bk/meta", OpenOptions::CREATE).unwrap();
    let before = outside(&fs);
    db.backup("/bk").expect_err("a file is in the way");
    assert_eq!(outside(&fs), before);
    fs.unlink("/bk/meta").unwrap();
    db.backup("/bk").unwrap();
    db.restore_backup("/bk", "/again").unwrap();
    check(&uncompressed().path("/again").open_in(&fs).unwrap(), 0..100);
}

/// KA7, R12: a file can have a limited number of names. RocksDB copies what cannot be linked.
#[test]
fn checkpoints_go_on_beyond_the_links_that_a_file_can_have() {
    let _limit = watchdog();
    let fs = mount("malloc://1G", &MountOptions::new()).unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    fill(&db, 0..1_000);
    db.flush().unwrap();
    let long = "a".repeat(150);
    for n in 0..30 {
        db.checkpoint(&format!("/{long}/{n}"))
            .unwrap_or_else(|e| panic!("checkpoint {n}: {e}"));
    }
    for n in [0, 29] {
        let path = format!("/{long}/{n}");
        check(&uncompressed().path(&path).open_in(&fs).unwrap(), 0..1_000);
    }
}

/// KA8, U11: a copy leaves the device while the database is in use.
#[test]
fn a_database_is_exported_while_it_is_in_use() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = uncompressed()
        .path("/orders")
        .column_family("more", Options::default())
        .open_in(&fs)
        .unwrap();
    fill(&db, 0..1000);
    db.flush().unwrap();
    let more = db.cf_handle("more").unwrap();
    db.put_cf(&more, "k", "v").unwrap();
    // What a killed process has left is in nobody's way.
    fs.mkdir("/.pumice-export").unwrap();
    drop(
        fs.open("/.pumice-export/CURRENT", OpenOptions::CREATE)
            .unwrap(),
    );
    let before = tree(&fs, "/");
    let to = dir.path().join("copy");
    db.export(&to).unwrap();
    fill(&db, 1000..1100);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&to), 0o700);
    assert_eq!(mode(&to.join("CURRENT")), 0o600);
    let copy = DB::open_cf(&Options::default(), &to, ["default", "more"]).unwrap();
    for n in 0..1000 {
        assert_eq!(copy.get(key(n)).unwrap().as_deref(), Some(&value(n)[..]));
    }
    assert_eq!(copy.get(key(1000)).unwrap(), None);
    let more = copy.cf_handle("more").unwrap();
    assert_eq!(copy.get_cf(&more, "k").unwrap().as_deref(), Some(&b"v"[..]));
    drop(copy);
    // The copy is there once, and a failed one is not there at all.
    for (to, kind) in [
        (to, ErrorKind::InvalidInput),
        (dir.path().join("no/such"), ErrorKind::NotFound),
    ] {
        let there = to.exists();
        assert_eq!(db.export(&to).unwrap_err().kind(), kind);
        assert_eq!(to.exists(), there);
    }
    let left = tree(&fs, "/");
    assert!(!left.iter().any(|path| path.contains("export")), "{left:?}");
    assert!(before.iter().any(|path| path.contains("export")));
}
