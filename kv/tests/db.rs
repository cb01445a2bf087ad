//! Tests of `pumice::Db` on BlobFS.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{check, fill, image, key, memory_with, tree, uncompressed, value, watchdog};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{
    BlockBasedOptions, IngestExternalFileOptions, IteratorMode, MergeOperands, Options,
    ReadOptions, SstFileWriter, WriteBatch, WriteOptions, properties,
};
use pumice::{Db, DbOptions, Error, MountOptions, mount, mount_device};

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
    let options = uncompressed().configure(|options| {
        options.set_write_buffer_size(1 << 20);
        // When a flush or a compaction finds no space first, RocksDB lets puts wait until there is some, unless there is always
        // room for one more memtable and one more table.
        options.set_max_write_buffer_number(1000);
        options.set_disable_auto_compactions(true);
    });
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
