//! `pumice::Db` on BlobFS.

mod common;

use std::sync::Arc;

use common::{image, key, memory_with, value};
use pumice::rocksdb::{
    BlockBasedOptions, DBCompressionType, IngestExternalFileOptions, IteratorMode, MergeOperands,
    Options, ReadOptions, SstFileWriter, WriteBatch, WriteOptions, properties,
};
use pumice::{Db, DbOptions, Error, MountOptions, mount, mount_device};

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
    // Dropped instead of closed: the same.
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

/// Ingestion writes a global sequence number into the table by a random-rw file, or moves it.
#[test]
fn table_files_are_ingested() {
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
        // The table overlaps the memtable: it gets a sequence number above what is there.
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
    // Closed full, opened full: for reading at least.
    let db = options.clone().read_only(true).open_in(&fs).unwrap();
    check(&db, 0..written.min(10_000));
}

#[test]
fn what_is_not_ours_is_refused() {
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
    assert!(matches!(error, Error::Path { .. }), "{error}");
}

#[test]
fn the_registry_mounts_by_uri() {
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

/// SPDK's db_bench made 100 000 puts of 63 186 different keys. (Its readseq tells one less: it counts
/// the steps from key to key.)
#[test]
fn a_database_that_spdk_left_opens_and_holds_all_its_keys() {
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
