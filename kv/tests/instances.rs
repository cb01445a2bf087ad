//! Tests of secondary instances, of times to live, and of options as text.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{check, fill, key, tree, uncompressed, value, watchdog};
use pumice::rocksdb::{ColumnFamilyTtl, Options};
use pumice::{DbOptions, ErrorKind, MountOptions, mount};

const URI: &str = "PUMICE_TEST_URI";

#[test]
fn a_secondary_follows_its_writer() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    let options = uncompressed()
        .path("/a/db")
        .column_family("events", Options::default());
    let writer = options.open(&uri).unwrap();
    fill(&writer, 0..1_000);
    let reader = options.open_as_secondary(&uri, "/a/reader").unwrap();
    check(&reader, 0..1_000);
    fill(&writer, 1_000..2_000);
    let events = writer.cf_handle("events").unwrap();
    writer.put_cf(&events, "e", "1").unwrap();
    assert_eq!(reader.get(key(1_500)).unwrap(), None);
    reader.try_catch_up_with_primary().unwrap();
    check(&reader, 0..2_000);
    let events = reader.cf_handle("events").unwrap();
    assert!(reader.get_cf(&events, "e").unwrap().is_some());
    drop(events);
    // Tables and logs that the writer removes stay readable for it.
    fill(&writer, 2_000..3_000);
    writer.flush().unwrap();
    writer.compact_range(None::<&[u8]>, None::<&[u8]>);
    check(&reader, 0..2_000);
    reader.try_catch_up_with_primary().unwrap();
    check(&reader, 0..3_000);
    assert!(reader.put("k", "v").is_err());
    // A second one, and each is closed by itself.
    let other = options
        .open_as_secondary_in(writer.file_system(), "/other")
        .unwrap();
    check(&other, 0..3_000);
    other.close().unwrap();
    reader.close().unwrap();
    reader.close().unwrap();
    assert!(reader.get(key(1)).is_err() || reader.get(key(1)).unwrap().is_some());
    fill(&writer, 3_000..3_100);
    let names = tree(writer.file_system(), "/a/reader");
    assert!(names.iter().all(|name| name.contains("LOG")), "{names:?}");
    writer.close().unwrap();
    // It was the last: the device is free.
    mount(&uri, &MountOptions::new())
        .unwrap()
        .unmount()
        .unwrap();
}

#[test]
fn a_secondary_changes_nothing_and_makes_no_database() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let options = uncompressed().path("/db");
    assert!(options.open_as_secondary_in(&fs, "/reader").is_err());
    assert!(!fs.exists("/db/CURRENT").unwrap());
    let writer = options.open_in(&fs).unwrap();
    let error = options.open_as_secondary_in(&fs, "/db/").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let error = options.clone().read_only(true);
    let error = error.open_as_secondary_in(&fs, "/reader").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    // A reader that stays as it was opened.
    fill(&writer, 0..10);
    let reader = options.clone().read_only(true).open_in(&fs).unwrap();
    fill(&writer, 10..20);
    check(&reader, 0..10);
    assert_eq!(reader.get(key(15)).unwrap(), None);
    reader.close().unwrap();
    writer.close().unwrap();
}

/// This is not a test: the one below runs it as a process of its own. Otherwise it does nothing.
#[test]
fn child() {
    let Ok(uri) = std::env::var(URI) else {
        return;
    };
    for opened in [
        uncompressed().open_as_secondary(&uri, "/reader"),
        uncompressed().read_only(true).open(&uri),
    ] {
        let error = opened.err().unwrap();
        println!("{:?}: {}", error.kind(), pumice::chain(&error));
    }
}

#[test]
fn a_secondary_of_another_process_is_refused() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    let writer = uncompressed().open(&uri).unwrap();
    writer.put("k", "v").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(URI, &uri)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("InUse: ").count(), 2, "{text}");
    writer.close().unwrap();
}

#[test]
fn entries_expire_by_family() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let options = uncompressed()
        .ttl(Duration::from_secs(1))
        .column_family("kept", Options::default())
        .column_family_ttl("kept", ColumnFamilyTtl::Disabled);
    let db = options.open_in(&fs).unwrap();
    let kept = db.cf_handle("kept").unwrap();
    db.put("k", "1").unwrap();
    db.put_cf(&kept, "k", "1").unwrap();
    let started = Instant::now();
    while db.get("k").unwrap().is_some() {
        assert!(started.elapsed() < common::LIMIT / 3, "never expires");
        std::thread::sleep(Duration::from_millis(200));
        for family in [&db.cf_handle("default").unwrap(), &kept] {
            db.flush_cf(family).unwrap();
            let mut how = pumice::rocksdb::CompactOptions::default();
            how.set_bottommost_level_compaction(pumice::rocksdb::BottommostLevelCompaction::Force);
            db.compact_range_cf_opt(family, None::<&[u8]>, None::<&[u8]>, &how);
        }
    }
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(db.get_cf(&kept, "k").unwrap().as_deref(), Some(&b"1"[..]));
    drop(kept);
    db.put("later", value(1)).unwrap();
    db.close().unwrap();
    drop(db);
    let db = options.open_in(&fs).unwrap();
    assert_eq!(db.get("later").unwrap(), Some(value(1)));
    db.close().unwrap();
}

#[test]
fn a_time_to_live_that_cannot_be_is_refused() {
    let _limit = watchdog();
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    let second = Duration::from_secs(1);
    let never = ColumnFamilyTtl::Disabled;
    let long = Duration::from_secs(1 << 32);
    let cases = [
        (
            DbOptions::new().ttl(Duration::from_millis(999)),
            ErrorKind::InvalidInput,
        ),
        (DbOptions::new().ttl(long), ErrorKind::InvalidInput),
        (
            DbOptions::new().column_family_ttl("a", never),
            ErrorKind::InvalidInput,
        ),
        (
            DbOptions::new()
                .ttl(second)
                .column_family_ttl("a", ColumnFamilyTtl::Duration(long)),
            ErrorKind::InvalidInput,
        ),
        (
            DbOptions::new().ttl(second).read_only(true),
            ErrorKind::Unsupported,
        ),
    ];
    for (options, kind) in cases {
        let error = options.open_in(&fs).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
    }
    let error = DbOptions::new().ttl(second).open_optimistic_in(&fs);
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Unsupported);
    assert_eq!(tree(&fs, "/"), Vec::<String>::new(), "it was written to");
}

#[test]
fn options_are_read_from_text() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    // The comparator is that of the options that the text changes.
    let db = DbOptions::new()
        .configure(|options| {
            options.set_comparator("backwards", Box::new(|a: &[u8], b: &[u8]| b.cmp(a)));
        })
        .options_string("max_open_files=100;compression=kNoCompression")
        .unwrap()
        .options_string("num_levels=5")
        .unwrap()
        .column_family_string("events", "num_levels=4")
        .unwrap()
        .column_family_string("events", "write_buffer_size=1048576")
        .unwrap()
        .open_in(&fs)
        .unwrap();
    db.put("a", "1").unwrap();
    db.put("b", "2").unwrap();
    let keys: Vec<_> = db
        .iterator(pumice::rocksdb::IteratorMode::Start)
        .map(|item| item.unwrap().0)
        .collect();
    assert_eq!(keys, [b"b"[..].into(), b"a"[..].into()]);
    let recorded = pumice::RecordedOptions::of(&fs, "/").unwrap().unwrap();
    assert!(recorded.text().contains("max_open_files=100\n"));
    let (default, events) = (recorded.family("default"), recorded.family("events"));
    let (default, events) = (default.unwrap(), events.unwrap());
    assert!(default.contains("compression=kNoCompression") && default.contains("num_levels=5"));
    assert!(events.contains("num_levels=4") && events.contains("write_buffer_size=1048576"));
    db.close().unwrap();
    for (text, named) in [
        ("max_open_flies=100", "max_open_flies"),
        ("num_levels=7;compresion=kNoCompression", "compresion"),
        ("max_open_files=many", "max_open_files"),
        ("compression=kZipCompression", "compression"),
        // Of a group RocksDB names the group.
        (
            "block_based_table_factory={block_sise=1}",
            "block_based_table_factory",
        ),
        ("max_open_files", "'=' expected"),
        ("a\0b", "NUL"),
    ] {
        let error = DbOptions::new().options_string(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let error = error.to_string();
        let (rocksdbs, own) = error.split_once(" (in ").unwrap();
        assert!(rocksdbs.contains(named), "{error}");
        assert_eq!(own, format!("{text:?})"));
    }
}
