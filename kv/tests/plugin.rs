//! The C++ shim alone, over a file system in memory: RocksDB's calls arrive, its answers are right.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::watchdog;
use pumice::EnvOptions;
use pumice::plugin::{Fault, How, MemoryFs, PluginFile, PluginFs};
use pumice::rocksdb::backup::{BackupEngine, BackupEngineOptions, RestoreOptions};
use pumice::rocksdb::checkpoint::Checkpoint;
use pumice::rocksdb::{
    BlockBasedOptions, DB, DBCompressionType, Env, ErrorKind, IteratorMode, Options, ReadOptions,
    WriteOptions,
};

const CAPACITY: u64 = 512 << 20;

fn options(env: &Env) -> Options {
    let mut options = Options::default();
    options.set_env(env);
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::None);
    options
}

fn memory() -> (MemoryFs, Env) {
    let fs = MemoryFs::new(CAPACITY);
    let env = EnvOptions::new().build(fs.clone()).unwrap();
    (fs, env)
}

fn key(n: u32) -> Vec<u8> {
    format!("key{n:08}").into_bytes()
}

fn value(n: u32) -> Vec<u8> {
    format!("value of {n} ").repeat(8).into_bytes()
}

fn fill(db: &DB, keys: std::ops::Range<u32>) {
    for n in keys {
        db.put(key(n), value(n)).unwrap();
    }
}

fn check(db: &DB, keys: std::ops::Range<u32>) {
    for n in keys {
        assert_eq!(
            db.get(key(n)).unwrap().as_deref(),
            Some(&value(n)[..]),
            "key {n}"
        );
    }
}

fn names(fs: &MemoryFs, dir: &str) -> Vec<String> {
    fs.list(dir)
        .unwrap()
        .into_iter()
        .map(|entry| entry.name)
        .collect()
}

#[test]
fn put_flush_compact_reopen() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..20_000);
    check(&db, 0..20_000);
    db.flush().unwrap();
    fill(&db, 10_000..30_000);
    db.flush().unwrap();
    db.compact_range(None::<&[u8]>, None::<&[u8]>);
    check(&db, 0..30_000);
    fill(&db, 30_000..31_000);
    drop(db);
    assert!(names(&fs, "/").iter().any(|name| name == "CURRENT"));
    let db = DB::open(&options(&env), "/").unwrap();
    check(&db, 0..31_000);
    assert_eq!(db.iterator(IteratorMode::Start).count(), 31_000);
    drop(db);
    DB::destroy(&options(&env), "/").unwrap();
    assert_eq!(names(&fs, "/"), Vec::<String>::new());
}

#[test]
fn iterators_read_ahead_asynchronously() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let started = Arc::new(AtomicU64::new(0));
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..60_000);
    db.flush().unwrap();
    drop(db);
    let mut opts = options(&env);
    let mut table = BlockBasedOptions::default();
    table.disable_cache();
    opts.set_block_based_table_factory(&table);
    let db = DB::open(&opts, "/").unwrap();
    let count = Arc::clone(&started);
    fs.set_faults(Some(Box::new(move |call, _| {
        if call == "read_start" {
            count.fetch_add(1, Ordering::Relaxed);
        }
        None
    })));
    let mut reads = ReadOptions::default();
    reads.set_async_io(true);
    reads.set_readahead_size(256 * 1024);
    let mut seen = 0;
    for (n, item) in db.iterator_opt(IteratorMode::Start, reads).enumerate() {
        let n = u32::try_from(n).unwrap();
        let (k, v) = item.unwrap();
        assert_eq!((&k[..], &v[..]), (&key(n)[..], &value(n)[..]));
        seen += 1;
    }
    assert_eq!(seen, 60_000);
    assert!(
        started.load(Ordering::Relaxed) > 10,
        "no read was asynchronous"
    );
    // Given up half way: what is in flight is aborted.
    let mut reads = ReadOptions::default();
    reads.set_async_io(true);
    reads.set_readahead_size(256 * 1024);
    assert_eq!(
        db.iterator_opt(IteratorMode::Start, reads)
            .take(100)
            .count(),
        100
    );
}

#[test]
fn an_asynchronous_read_that_fails_is_an_error_of_the_iterator() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..60_000);
    db.flush().unwrap();
    drop(db);
    let mut opts = options(&env);
    let mut table = BlockBasedOptions::default();
    table.disable_cache();
    opts.set_block_based_table_factory(&table);
    let db = DB::open(&opts, "/").unwrap();
    let left = AtomicU64::new(20);
    fs.set_faults(Some(Box::new(move |call, path| {
        let reads = call == "read" && path.ends_with(".sst");
        let dead = reads
            && left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_err();
        dead.then(|| Fault::new(libc::EIO, "the device is gone: lba 4711"))
    })));
    let mut reads = ReadOptions::default();
    reads.set_async_io(true);
    reads.set_readahead_size(64 * 1024);
    let error = db
        .iterator_opt(IteratorMode::Start, reads)
        .find_map(std::result::Result::err)
        .expect("the scan must not end as if the database did");
    assert!(error.to_string().contains("lba 4711"), "{error}");
}

#[test]
fn multi_get_reads_together_and_point_reads_borrow() {
    let _limit = watchdog();
    for lend in [true, false] {
        let fs = MemoryFs::new(CAPACITY);
        let env = EnvOptions::new().lend_cached(lend).build(fs).unwrap();
        let mut opts = options(&env);
        let mut table = BlockBasedOptions::default();
        table.disable_cache();
        opts.set_block_based_table_factory(&table);
        let db = DB::open(&opts, "/").unwrap();
        fill(&db, 0..20_000);
        db.flush().unwrap();
        check(&db, 0..2_000);
        let wanted: Vec<u32> = (0..20_000).step_by(97).collect();
        let got = db.multi_get(wanted.iter().map(|n| key(*n)));
        for (n, got) in wanted.iter().zip(got) {
            assert_eq!(got.unwrap().as_deref(), Some(&value(*n)[..]));
        }
    }
}

#[test]
fn direct_reads_and_writes() {
    let _limit = watchdog();
    let (_fs, env) = memory();
    let mut opts = options(&env);
    opts.set_use_direct_reads(true);
    opts.set_use_direct_io_for_flush_and_compaction(true);
    let db = DB::open(&opts, "/").unwrap();
    fill(&db, 0..50_000);
    db.flush().unwrap();
    fill(&db, 0..50_000);
    db.flush().unwrap();
    db.compact_range(None::<&[u8]>, None::<&[u8]>);
    check(&db, 0..50_000);
    assert_eq!(db.iterator(IteratorMode::Start).count(), 50_000);
    drop(db);
    let db = DB::open(&opts, "/").unwrap();
    check(&db, 0..50_000);
}

#[test]
fn memory_mapped_modes_are_refused() {
    let _limit = watchdog();
    let (_fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..100);
    db.flush().unwrap();
    drop(db);
    let mut opts = options(&env);
    opts.set_allow_mmap_reads(true);
    let error = DB::open(&opts, "/")
        .and_then(|db| db.get(key(1)))
        .expect_err("read through a memory map")
        .to_string();
    assert!(error.contains("allow_mmap_reads"), "{error}");
}

#[test]
fn recycled_logs_are_read_back() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let mut opts = options(&env);
    opts.set_recycle_log_file_num(4);
    opts.set_write_buffer_size(1 << 20);
    let renames = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&renames);
    fs.set_faults(Some(Box::new(move |call, path| {
        if call == "rename" && path.ends_with(".log") {
            count.fetch_add(1, Ordering::Relaxed);
        }
        None
    })));
    let db = DB::open(&opts, "/").unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    for n in 0..60_000 {
        if n % 100 == 0 {
            db.put_opt(key(n), value(n), &sync).unwrap();
        } else {
            db.put(key(n), value(n)).unwrap();
        }
    }
    drop(db);
    assert!(renames.load(Ordering::Relaxed) > 0, "no log was recycled");
    let db = DB::open(&opts, "/").unwrap();
    check(&db, 0..60_000);
}

#[test]
fn checkpoint_and_backup() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..10_000);
    db.flush().unwrap();
    fill(&db, 10_000..11_000);
    Checkpoint::new(&db)
        .unwrap()
        .create_checkpoint("/checkpoint")
        .unwrap();
    let linked = fs
        .list("/checkpoint")
        .unwrap()
        .iter()
        .filter(|entry| entry.name.ends_with(".sst"))
        .all(|entry| fs.stat(&format!("/{}", entry.name)).unwrap().links == 2);
    assert!(linked, "a checkpoint's tables are links");
    let mut engine =
        BackupEngine::open(&BackupEngineOptions::new("/backup").unwrap(), &env).unwrap();
    engine.create_new_backup_flush(&db, true).unwrap();
    fill(&db, 11_000..12_000);
    engine.create_new_backup_flush(&db, true).unwrap();
    assert_eq!(engine.get_backup_info().len(), 2);
    for info in engine.get_backup_info() {
        engine.verify_backup(info.backup_id).unwrap();
    }
    engine
        .restore_from_latest_backup("/restored", "/restored", &RestoreOptions::default())
        .unwrap();
    drop(db);
    let at = |root: &str| {
        let env = EnvOptions::new().root(root).build(fs.clone()).unwrap();
        DB::open(&options(&env), "/").unwrap()
    };
    check(&at("/checkpoint"), 0..11_000);
    check(&at("/restored"), 0..12_000);
}

#[test]
fn column_families_and_blob_files() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let mut opts = options(&env);
    opts.create_missing_column_families(true);
    opts.set_enable_blob_files(true);
    opts.set_min_blob_size(64);
    let cfs = ["default", "a", "b"].map(|name| (name, opts.clone()));
    let db = DB::open_cf_with_opts(&opts, "/", cfs.clone()).unwrap();
    for name in ["a", "b"] {
        let cf = db.cf_handle(name).unwrap();
        for n in 0..5_000 {
            db.put_cf(&cf, key(n), [name.as_bytes(), &value(n)].concat())
                .unwrap();
        }
        db.flush_cf(&cf).unwrap();
    }
    assert!(names(&fs, "/").iter().any(|name| name.ends_with(".blob")));
    drop(db);
    let db = DB::open_cf_with_opts(&opts, "/", cfs).unwrap();
    for name in ["a", "b"] {
        let cf = db.cf_handle(name).unwrap();
        for n in 0..5_000 {
            let want = [name.as_bytes(), &value(n)].concat();
            assert_eq!(db.get_cf(&cf, key(n)).unwrap().as_deref(), Some(&want[..]));
        }
    }
}

#[test]
fn a_database_is_locked_while_it_is_open() {
    let _limit = watchdog();
    let (_fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    let error = DB::open(&options(&env), "/").expect_err("opened twice");
    assert_eq!(error.kind(), ErrorKind::IOError);
    assert!(error.to_string().contains("LOCK"), "{error}");
    drop(db);
    DB::open(&options(&env), "/").unwrap();
}

#[test]
fn a_full_file_system_is_no_space_and_loses_nothing() {
    let _limit = watchdog();
    let fs = MemoryFs::new(8 << 20);
    let env = EnvOptions::new().build(fs).unwrap();
    let mut opts = options(&env);
    opts.set_write_buffer_size(256 << 10);
    // When a flush finds no space, RocksDB stops writes that its own recovery then waits for,
    // unless there is always room for one more memtable.
    opts.set_max_write_buffer_number(1000);
    let db = DB::open(&opts, "/").unwrap();
    let mut written = 0;
    let error = loop {
        match db.put(key(written), value(written)) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 1_000_000, "never full");
    };
    assert!(error.to_string().contains("No space left"), "{error}");
    check(&db, 0..written);
}

#[test]
fn failures_keep_their_text_and_a_panic_is_one() {
    let _limit = watchdog();
    let (fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fs.set_faults(Some(Box::new(|call, path| {
        assert!(call != "append" || !path.ends_with(".log"), "boom");
        None
    })));
    let error = db.put(key(1), value(1)).unwrap_err().to_string();
    assert!(error.contains("panicked: boom"), "{error}");
    drop(db);
    fs.set_faults(Some(Box::new(|call, path| {
        (call == "open" && path.ends_with("CURRENT"))
            .then(|| Fault::new(libc::EIO, "namespace 1: lba 99: unrecovered read error"))
    })));
    let error = DB::open(&options(&env), "/").err().unwrap().to_string();
    assert!(error.contains("lba 99"), "{error}");
}

#[test]
fn old_readers_keep_what_a_new_file_replaced() {
    let _limit = watchdog();
    let fs = MemoryFs::new(CAPACITY);
    let write = How {
        create: true,
        fresh: true,
        ..How::default()
    };
    let old = fs.open("/f", write).unwrap();
    old.append(b"old").unwrap();
    let new = fs.open("/f", write).unwrap();
    new.append(b"new!").unwrap();
    let mut buf = [0; 8];
    assert_eq!(old.read_at(0, &mut buf).unwrap(), 3);
    assert_eq!(&buf[..3], b"old");
    assert_eq!(fs.stat("/f").unwrap().len, 4);
    drop((old, new));
    fs.remove("/f").unwrap();
    assert_eq!(
        fs.free_bytes().unwrap(),
        CAPACITY,
        "space of dropped files comes back"
    );
}

#[test]
fn many_databases_in_one_file_system() {
    let _limit = watchdog();
    let fs = MemoryFs::new(CAPACITY);
    let mut open = BTreeMap::new();
    for name in ["/a", "/b/c", "/"] {
        let env = EnvOptions::new().root(name).build(fs.clone()).unwrap();
        let db = DB::open(&options(&env), "/").unwrap();
        db.put("who", name).unwrap();
        db.flush().unwrap();
        open.insert(name, db);
    }
    for (name, db) in open {
        assert_eq!(db.get("who").unwrap().as_deref(), Some(name.as_bytes()));
    }
    assert!(names(&fs, "/b/c").iter().any(|name| name == "CURRENT"));
}
