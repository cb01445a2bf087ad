//! Tests of `pumice::Db` on BlobFS.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{image, key, memory_with, value, watchdog};
use pumice::bdev::BlockDevice;
use pumice::bdev::OpKind;
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{
    BlockBasedOptions, DBCompressionType, IngestExternalFileOptions, IteratorMode, MergeOperands,
    Options, ReadOptions, SstFileWriter, WriteBatch, WriteOptions, properties,
};
use pumice::{Db, DbOptions, EnvOptions, Error, ErrorKind, MountOptions, mount, mount_device};

fn uncompressed() -> DbOptions {
    DbOptions::new().configure(|options| options.set_compression_type(DBCompressionType::None))
}

fn fill(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        db.put(key(n), value(n)).unwrap();
    }
}

fn check(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        assert_eq!(
            db.get(key(n)).unwrap().as_deref(),
            Some(&value(n)[..]),
            "key {n}"
        );
    }
}

fn flush_and_compact(db: &Db) {
    db.flush().unwrap();
    db.compact_range(None::<&[u8]>, None::<&[u8]>);
}

#[test]
fn everything_is_there_after_reopening() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=512M&create=1", dir.path().display());
    let db = uncompressed().open(&uri).unwrap();
    fill(&db, 0..50_000);
    db.flush().unwrap();
    fill(&db, 40_000..80_000);
    flush_and_compact(&db);
    fill(&db, 80_000..81_000);
    db.delete(key(5)).unwrap();
    db.close().unwrap();
    let db = uncompressed().open(&uri).unwrap();
    assert_eq!(db.get(key(5)).unwrap(), None);
    check(&db, 0..5);
    check(&db, 6..81_000);
    assert_eq!(db.iterator(IteratorMode::Start).count(), 80_999);
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "only the image: {files:?}");
    // The same when it is dropped instead of closed.
    drop(db);
    assert_eq!(
        Db::open(&uri)
            .unwrap()
            .iterator(IteratorMode::Start)
            .count(),
        80_999
    );
}

#[test]
fn batches_snapshots_iterators_merges_and_properties() {
    let _limit = watchdog();
    fn concat(_key: &[u8], old: Option<&[u8]>, more: &MergeOperands) -> Option<Vec<u8>> {
        let mut all = old.unwrap_or_default().to_vec();
        more.iter()
            .for_each(|operand| all.extend_from_slice(operand));
        Some(all)
    }
    let db = DbOptions::new()
        .configure(|options| options.set_merge_operator_associative("concat", concat))
        .open("malloc://256M")
        .unwrap();
    let mut batch = WriteBatch::default();
    batch.put("a", "1");
    batch.put("b", "2");
    batch.delete("a");
    db.write(batch).unwrap();
    assert_eq!(db.get("a").unwrap(), None);
    let snapshot = db.snapshot();
    db.put("b", "3").unwrap();
    assert_eq!(snapshot.get("b").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(db.get("b").unwrap().as_deref(), Some(&b"3"[..]));
    drop(snapshot);
    db.merge("log", "x").unwrap();
    db.flush().unwrap();
    db.merge("log", "y").unwrap();
    assert_eq!(db.get("log").unwrap().as_deref(), Some(&b"xy"[..]));
    let keys: Vec<_> = db
        .iterator(IteratorMode::End)
        .map(|item| item.unwrap().0)
        .collect();
    assert_eq!(keys, [b"log"[..].into(), b"b"[..].into()]);
    let level0 = properties::num_files_at_level(0);
    assert_eq!(
        db.property_int_value(properties::TOTAL_SST_FILES_SIZE)
            .unwrap()
            .map(|n| n > 0),
        Some(true)
    );
    assert_eq!(db.property_value(&level0).unwrap().as_deref(), Some("1"));
    db.close().unwrap();
}

#[test]
fn column_families_are_opened_as_they_are_found() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let mut events = Options::default();
    events.set_enable_blob_files(true);
    events.set_min_blob_size(32);
    let options = uncompressed().column_family("events", events.clone());
    let db = options.open_in(&fs).unwrap();
    db.create_cf("late", &Options::default()).unwrap();
    for name in ["events", "late", "default"] {
        let cf = db.cf_handle(name).unwrap();
        for n in 0..2_000 {
            db.put_cf(&cf, key(n), [name.as_bytes(), &value(n)].concat())
                .unwrap();
        }
        db.flush_cf(&cf).unwrap();
    }
    db.close().unwrap();
    assert!(
        fs.list("/")
            .unwrap()
            .iter()
            .any(|entry| entry.name.ends_with(".blob"))
    );
    let db = options.open_in(&fs).unwrap();
    for name in ["events", "late", "default"] {
        let cf = db.cf_handle(name).unwrap();
        for n in 0..2_000 {
            let want = [name.as_bytes(), &value(n)].concat();
            assert_eq!(db.get_cf(&cf, key(n)).unwrap().as_deref(), Some(&want[..]));
        }
    }
    db.drop_cf("late").unwrap();
    assert!(db.cf_handle("late").is_none());
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

/// Ingestion writes a global sequence number into the table through a random-rw file, or moves it.
#[test]
fn table_files_are_ingested() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    fill(&db, 0..1_000);
    let mut options = Options::default();
    options.set_env(db.env());
    for (moved, keys) in [(false, 500..1_500), (true, 2_000..3_000)] {
        let path = format!("/new-{moved}.sst");
        let mut writer = SstFileWriter::create(&options);
        writer.open(&path).unwrap();
        for n in keys.clone() {
            writer.put(key(n), value(n + 1)).unwrap();
        }
        writer.finish().unwrap();
        let mut how = IngestExternalFileOptions::default();
        how.set_move_files(moved);
        // The table overlaps the memtable, so it gets a sequence number above the existing ones.
        how.set_allow_global_seqno(true);
        db.ingest_external_file_opts(&how, vec![&path]).unwrap();
        assert_eq!(
            db.get(key(keys.start)).unwrap(),
            Some(value(keys.start + 1))
        );
    }
    db.close().unwrap();
    let db = uncompressed().path("/db").open_in(&fs).unwrap();
    check(&db, 0..500);
    for n in (500..1_500).chain(2_000..3_000) {
        assert_eq!(db.get(key(n)).unwrap(), Some(value(n + 1)), "key {n}");
    }
    db.close().unwrap();
    fs.unmount().unwrap();
}

#[test]
fn direct_and_buffered_synchronous_and_asynchronous_reads() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=512M&create=1", dir.path().display());
    for direct in [false, true] {
        let options = uncompressed().configure(|options| {
            options.set_use_direct_reads(direct);
            options.set_use_direct_io_for_flush_and_compaction(direct);
            let mut table = BlockBasedOptions::default();
            table.disable_cache();
            options.set_block_based_table_factory(&table);
        });
        let db = options.open(&uri).unwrap();
        fill(&db, 0..40_000);
        db.flush().unwrap();
        fill(&db, 20_000..60_000);
        flush_and_compact(&db);
        db.close().unwrap();
        // The page cache is empty now.
        let db = options.open(&uri).unwrap();
        check(&db, 0..1_000);
        let wanted: Vec<u64> = (0..60_000).step_by(97).collect();
        for (n, got) in wanted
            .iter()
            .zip(db.multi_get(wanted.iter().map(|n| key(*n))))
        {
            assert_eq!(got.unwrap().as_deref(), Some(&value(*n)[..]));
        }
        for asynchronous in [false, true] {
            let mut reads = ReadOptions::default();
            reads.set_async_io(asynchronous);
            reads.set_readahead_size(256 << 10);
            let mut n = 0;
            for item in db.iterator_opt(IteratorMode::Start, reads) {
                let (k, v) = item.unwrap();
                assert_eq!((&k[..], &v[..]), (&key(n)[..], &value(n)[..]));
                n += 1;
            }
            assert_eq!(n, 60_000, "direct {direct}, asynchronous {asynchronous}");
        }
        db.close().unwrap();
    }
}

#[test]
fn synced_writes_and_recycled_logs() {
    let _limit = watchdog();
    let fs = mount("malloc://512M", &MountOptions::new()).unwrap();
    let options = uncompressed().configure(|options| {
        options.set_recycle_log_file_num(4);
        options.set_write_buffer_size(1 << 20);
    });
    let db = options.open_in(&fs).unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    for n in 0..40_000 {
        if n % 100 == 0 {
            db.put_opt(key(n), value(n), &sync).unwrap();
        } else {
            db.put(key(n), value(n)).unwrap();
        }
    }
    db.close().unwrap();
    check(&options.open_in(&fs).unwrap(), 0..40_000);
}

#[test]
fn many_threads_write_and_read() {
    let _limit = watchdog();
    let db = Arc::new(uncompressed().open("malloc://512M").unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let db = Arc::clone(&db);
            scope.spawn(move || {
                let mine = thread * 10_000..(thread + 1) * 10_000;
                fill(&db, mine.clone());
                check(&db, mine);
            });
        }
    });
    flush_and_compact(&db);
    check(&db, 0..40_000);
}

#[test]
fn a_full_device_is_no_space_and_loses_nothing() {
    let _limit = watchdog();
    let options = uncompressed().configure(|options| options.set_write_buffer_size(1 << 20));
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    let db = options.open_in(&fs).unwrap();
    let mut written = 0;
    let error = loop {
        match db.put(key(written), value(written)) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 2_000_000, "never full");
    };
    assert!(error.to_string().contains("No space left"), "{error}");
    check(&db, 0..written);
    drop(db);
    // It was closed full and is opened full: it can at least be read.
    let db = options.clone().read_only(true).open_in(&fs).unwrap();
    check(&db, 0..written.min(10_000));
    drop(db);
    // For writing it opens if recovery needs no space. If it does, the error names the ways out.
    match options.open_in(&fs) {
        Ok(db) => check(&db, 0..written),
        Err(error) => {
            assert!(matches!(error, Error::Full { .. }), "{error}");
            assert!(error.to_string().contains("pumice grow"), "{error}");
        }
    }
}

#[test]
fn what_is_not_ours_is_refused() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("other.img");
    let mut bytes = vec![0; 64 << 20];
    bytes[5000..5008].copy_from_slice(b"precious");
    std::fs::write(&image, &bytes).unwrap();
    let uri = format!("file://{}", image.display());
    let error = Db::open(&uri).err().unwrap();
    assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
    assert!(error.to_string().contains("mkfs"), "{error}");
    assert!(std::fs::read(&image).unwrap() == bytes, "it was written to");
    std::fs::write(&image, vec![0; 64 << 20]).unwrap();
    let never = MountOptions::new().format_empty(None);
    assert!(mount(&uri, &never).is_err());
    let db = Db::open(&uri).unwrap();
    let error = Db::open(&uri).err().unwrap().to_string();
    assert!(error.contains("LOCK"), "{error}");
    let error = pumice::chain(&mount(&uri, &never).err().unwrap());
    assert!(error.contains("in use"), "{error}");
    db.close().unwrap();
    assert!(matches!(
        Db::open("no such thing"),
        Err(Error::Device { .. })
    ));
    let error = DbOptions::new()
        .path("/a\0b")
        .open("malloc://64M")
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[test]
fn the_registry_mounts_by_uri() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(128 << 20)
        .unwrap();
    let env = pumice::env_from_uri(&format!("blobfs://{}?root:/db", image.display())).unwrap();
    let mut options = Options::default();
    options.set_env(&env);
    options.create_if_missing(true);
    let db = pumice::rocksdb::DB::open(&options, "/").unwrap();
    db.put("a", "b").unwrap();
    assert_eq!(db.get("a").unwrap().as_deref(), Some(&b"b"[..]));
    let error = pumice::env_from_uri("blobfs:///no/such/file")
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("/no/such/file"), "{error}");
}

/// SPDK's db_bench made 100 000 puts of 63 186 different keys. (Its readseq reports one less: it
/// counts the steps from key to key.)
#[test]
fn a_database_that_spdk_left_opens_and_holds_all_its_keys() {
    let _limit = watchdog();
    let device = memory_with(&image("small-rdb-clean.img"), 4096);
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let options = DbOptions::new().configure(|options| options.create_if_missing(false));
    let db = options.open_in(&fs).unwrap();
    assert_eq!(db.latest_sequence_number(), 100_000);
    let keys = |db: &Db| db.iterator(IteratorMode::Start).map(Result::unwrap).count();
    assert_eq!(keys(&db), 63_186);
    db.put("from", "Pumice").unwrap();
    flush_and_compact(&db);
    db.close().unwrap();
    fs.unmount().unwrap();
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = options.open_in(&fs).unwrap();
    assert_eq!(keys(&db), 63_187);
    db.close().unwrap();
}

/// Returns the names of everything below a directory.
fn tree(fs: &pumice::FileSystem, dir: &str) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs.list(dir).unwrap() {
        let path = format!("{}/{}", dir.trim_end_matches('/'), entry.name);
        all.push(path.clone());
        if entry.is_dir {
            all.extend(tree(fs, &path));
        }
    }
    all
}

/// Returns the same without the content of `/db`, where RocksDB works by itself.
fn outside(fs: &pumice::FileSystem) -> Vec<String> {
    let mut all = tree(fs, "/");
    all.retain(|path| !path.starts_with("/db/"));
    all
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

/// Reading creates nothing: no image, no file system, no database.
#[test]
fn a_database_that_is_only_read_is_not_made() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let reader = DbOptions::new().read_only(true);
    let typo = format!("file://{}/typo.img?size=64M&create=1", dir.path().display());
    let error = reader.open(&typo).err().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
    let image = dir.path().join("blank.img");
    std::fs::write(&image, vec![0; 64 << 20]).unwrap();
    assert!(reader.open(&format!("file://{}", image.display())).is_err());
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    assert!(reader.clone().path("/a/typo").open_in(&fs).is_err());
    assert_eq!(tree(&fs, "/"), Vec::<String>::new());
}

/// U7: closing takes a shared handle, and remaining handles of the database are harmless.
#[test]
fn closed_by_a_shared_handle_and_opened_again_at_once() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    let db = Arc::new(uncompressed().open(&uri).unwrap());
    let env = db.env().clone();
    let mut options = Options::default();
    options.set_env(&env);
    fill(&db, 0..1_000);
    Arc::clone(&db).close().unwrap();
    db.close().unwrap();
    // R11: neither the database, nor its environment, nor options with it keep the device.
    let again = uncompressed().open(&uri).unwrap();
    check(&again, 0..1_000);
    assert!(db.put("late", "1").is_err());
    again.put("later", "2").unwrap();
    drop(db);
    assert_eq!(again.get("late").unwrap(), None);
    again.close().unwrap();
    drop(again);
    // The same when it is dropped instead of closed.
    let db = uncompressed().open(&uri).unwrap();
    let _env = db.env().clone();
    db.put("more", "3").unwrap();
    drop(db);
    let db = uncompressed().open(&uri).unwrap();
    assert_eq!(db.get("more").unwrap().as_deref(), Some(&b"3"[..]));
}

/// In a mounted file system the directory is free after the close, and the old handle cannot write
/// beside the new one.
#[test]
fn a_directory_is_free_after_the_close() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let open = || uncompressed().path("/db").open_in(&fs);
    let old = open().unwrap();
    fill(&old, 0..1_000);
    assert!(open().is_err(), "opened twice");
    old.close().unwrap();
    let new = open().unwrap();
    assert!(old.put(key(1), "old").is_err());
    fill(&new, 1_000..2_000);
    drop(old);
    assert!(open().is_err(), "the new one's lock went with the old one");
    check(&new, 0..2_000);
    new.close().unwrap();
    fs.unmount().unwrap();
}

/// U7: a failed close says so, and can be called again when the fault has passed.
#[test]
fn a_close_that_failed_is_called_again() {
    let _limit = watchdog();
    let base = pumice::bdev::open("malloc://256M?block_size=4096").unwrap();
    drop(mount_device(&base, &MountOptions::new()).unwrap());
    let faulty = Arc::new(ErrorDevice::new(None, base));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = uncompressed().open_in(&fs).unwrap();
    fill(&db, 0..20_000);
    faulty.inject(Injection {
        op: Some(OpKind::Write),
        failure: Failure::Fail,
        count: u64::MAX,
        // This is data: a metadata page that cannot be written stops the store, which is another
        // case.
        range: Some((1024, 60_000)),
        queue_depth: 0,
    });
    db.close().expect_err("nothing could be written");
    check(&db, 0..20_000);
    db.close().expect_err("nothing can be written yet");
    faulty.clear();
    let started = Instant::now();
    while let Err(error) = db.close() {
        assert!(started.elapsed() < common::LIMIT / 3, "never: {error}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(db);
    fs.unmount().unwrap();
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    check(&uncompressed().open_in(&fs).unwrap(), 0..20_000);
}

/// R14.
#[test]
fn the_default_column_family_has_a_name_the_first_time() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    for round in 0..2 {
        let db = uncompressed().open_in(&fs).unwrap();
        let cf = db.cf_handle("default").expect("no default family");
        db.put_cf(&cf, "round", [round]).unwrap();
        assert_eq!(db.get("round").unwrap().as_deref(), Some(&[round][..]));
        drop(cf);
        db.close().unwrap();
    }
    let db = uncompressed().read_only(true).open_in(&fs).unwrap();
    assert!(db.cf_handle("default").is_some());
}

/// R2, U6: each opening makes an info log, of which ten stay.
#[test]
fn info_logs_of_earlier_openings_do_not_pile_up() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    for _ in 0..30 {
        let db = uncompressed().open_in(&fs).unwrap();
        db.put("k", "v").unwrap();
        db.close().unwrap();
    }
    let logs = tree(&fs, "/")
        .iter()
        .filter(|name| name.contains("LOG"))
        .count();
    assert!(logs <= 12, "{logs} info logs");
}

/// KA6, U20: the parents of the path are missing, as when a user of the `rocksdb` crate passes it.
#[test]
fn missing_parents_of_a_databases_directory_are_made() {
    let _limit = watchdog();
    // The crate makes the path in the kernel's file system as well.
    let dir = tempfile::tempdir().unwrap();
    let path = format!("{}/n/e/s/t", dir.path().display());
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_env(&pumice::env(&fs));
    let db = pumice::rocksdb::DB::open(&options, &path).unwrap();
    db.put("a", "b").unwrap();
    drop(db);
    assert!(fs.stat(&format!("{path}/CURRENT")).is_ok());
    let env = EnvOptions::new().root("/ten/ant").build(&fs).unwrap();
    options.set_env(&env);
    drop(pumice::rocksdb::DB::open(&options, &path).unwrap());
    assert!(fs.stat(&format!("/ten/ant{path}/CURRENT")).is_ok());
    // A file in place of a parent is an error.
    fs.open("/file", OpenOptions::CREATE).unwrap();
    let env = EnvOptions::new().root("/file").build(&fs).unwrap();
    options.set_env(&env);
    assert!(pumice::rocksdb::DB::open(&options, "/").is_err());
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

/// KA18, L8: a root is untrusted data.
#[test]
fn a_root_that_cannot_be_is_an_error() {
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    for root in ["/a\0b", "a\nb", "\u{7f}"] {
        let error = EnvOptions::new().root(root).build(&fs).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let error = DbOptions::new().path(root).open_in(&fs).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

/// KA9: the error for a file of the kernel's file system says what to do.
#[test]
fn a_file_of_the_kernels_is_named_as_such() {
    let _limit = watchdog();
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    let db = uncompressed().open_in(&fs).unwrap();
    let error = db.ingest_external_file(vec!["/etc/passwd"]).unwrap_err();
    assert!(error.to_string().contains("pumice cp"), "{error}");
}

/// M306, R7: RocksDB continues by itself when there is space again.
#[test]
fn puts_go_on_when_space_was_freed() {
    let _limit = watchdog();
    let fs = mount("malloc://128M", &MountOptions::new()).unwrap();
    let ballast = fs.open("/ballast", OpenOptions::CREATE).unwrap();
    ballast.append(&vec![1; 40 << 20]).unwrap();
    ballast.sync().unwrap();
    drop(ballast);
    let options = uncompressed().configure(|options| options.set_write_buffer_size(2 << 20));
    let db = options.path("/db").open_in(&fs).unwrap();
    let mut written = 0;
    while db.put(key(written), value(written)).is_ok() {
        written += 1;
        assert!(written < 2_000_000, "never full");
    }
    fs.unlink("/ballast").unwrap();
    let started = Instant::now();
    while let Err(error) = db.put(key(written), value(written)) {
        assert!(
            started.elapsed() < common::LIMIT / 3,
            "still refused: {error}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    check(&db, 0..written + 1);
    db.flush().unwrap();
    db.close().unwrap();
}

/// R6: the log's metadata is damaged. Its loss must not go unnoticed.
#[test]
fn a_database_on_a_damaged_file_system_is_not_opened_unasked() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    let uri = format!("file://{}", image.display());
    let db = uncompressed()
        .open(&format!("{uri}?size=64M&create=1"))
        .unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    for n in 0..100 {
        db.put_opt(key(n), value(n), &sync).unwrap();
    }
    db.close().unwrap();
    drop(db);
    let mut bytes = std::fs::read(&image).unwrap();
    let page = bytes
        .chunks_exact_mut(4096)
        .take(2048)
        .find(|page| page.windows(5).any(|w| w == b".log\0"))
        .expect("no page of the log's");
    page[2000] ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    let error = Db::open(&uri)
        .expect_err("opened without its log")
        .to_string();
    assert!(
        error.contains("damage") && error.contains("accept_damage"),
        "{error}"
    );
    let error = mount(&uri, &MountOptions::new()).err().unwrap().to_string();
    assert!(error.contains("accept_damage"), "{error}");
    assert!(std::fs::read(&image).unwrap() == bytes, "it was written to");
    // Reading needs no permission, and continuing takes the option that the error names.
    let reading = MountOptions::new().read_only(true);
    let fs = mount(&uri, &reading).unwrap();
    assert!(!fs.problems().is_empty());
    fs.unmount().unwrap();
    let anyway = MountOptions::new().accept_damage(true);
    let db = uncompressed().mount(anyway).open(&uri).unwrap();
    db.put("goes", "on").unwrap();
    db.close().unwrap();
}

#[test]
fn several_databases_of_one_device_are_opened_by_its_uri() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", dir.path().join("kv.img").display());
    let at = |path: &str| uncompressed().path(path);
    let a = at("/a").open(&format!("{uri}?size=128M&create=1")).unwrap();
    // Under another name of the same file.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("kv.img"), &link).unwrap();
    let b = at("/b").open(&link.display().to_string()).unwrap();
    fill(&a, 0..100);
    fill(&b, 100..200);
    // Opening one of them twice is refused, and does not affect the others.
    assert!(at("/a").open(&uri).is_err());
    a.close().unwrap();
    a.close().unwrap();
    check(&b, 100..200);
    b.put("still", "open").unwrap();
    // The device belongs to this process until the last database is closed.
    let other = MountOptions::new();
    assert_eq!(mount(&uri, &other).err().unwrap().kind(), ErrorKind::InUse);
    b.close().unwrap();
    mount(&uri, &other).unwrap().unmount().unwrap();
    // A dropped database counts as closed, and a failed opening does not keep the device.
    drop(at("/a").open(&uri).unwrap());
    assert!(at("/a\0").open(&uri).is_err());
    let b = at("/b").open(&uri).unwrap();
    check(&b, 100..200);
    b.close().unwrap();
    mount(&uri, &other).unwrap();
}
