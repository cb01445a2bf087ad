//! Tests of the C++ shim over BlobFS on a device in memory: RocksDB's calls arrive, and its answers
//! are right.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::watchdog;
use pumice::bdev::BlockDevice;
use pumice::bdev::OpKind;
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::fs::OpenOptions;
use pumice::rocksdb::backup::{BackupEngine, BackupEngineOptions, RestoreOptions};
use pumice::rocksdb::checkpoint::Checkpoint;
use pumice::rocksdb::{
    BlockBasedOptions, DB, DBCompressionType, Env, ErrorKind, IteratorMode, Options, ReadOptions,
    WriteOptions,
};
use pumice::{EnvOptions, FileSystem, MountOptions, mount, mount_device};
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};

fn options(env: &Env) -> Options {
    let mut options = Options::default();
    options.set_env(env);
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::None);
    options
}

fn memory() -> (FileSystem, Env) {
    let fs = mount("malloc://512M", &MountOptions::new()).unwrap();
    let env = pumice::env(&fs);
    (fs, env)
}

/// Returns options with which all table reads go to the file system.
fn without_block_cache(env: &Env) -> Options {
    let mut opts = options(env);
    let mut table = BlockBasedOptions::default();
    table.disable_cache();
    opts.set_block_based_table_factory(&table);
    opts
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

fn names(fs: &FileSystem, dir: &str) -> Vec<String> {
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
    let (_fs, env) = memory();
    let db = DB::open(&options(&env), "/").unwrap();
    fill(&db, 0..60_000);
    db.flush().unwrap();
    drop(db);
    let mut opts = without_block_cache(&env);
    opts.enable_statistics();
    let db = DB::open(&opts, "/").unwrap();
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
    let statistics = opts.get_statistics().unwrap();
    let asynchronous = statistics
        .lines()
        .find(|line| line.starts_with("rocksdb.async.read.bytes"))
        .expect("RocksDB counts them");
    assert!(!asynchronous.contains("COUNT : 0 "), "{asynchronous}");
    // The iterator is dropped half way: reads in flight are aborted.
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
    let base = pumice::bdev::open("malloc://512M?block_size=4096").unwrap();
    let faulty = Arc::new(ErrorDevice::new(None, base));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = DB::open(&options(&pumice::env(&fs)), "/").unwrap();
    fill(&db, 0..60_000);
    db.flush().unwrap();
    drop(db);
    fs.unmount().unwrap();
    // The page cache is empty.
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let mut opts = without_block_cache(&pumice::env(&fs));
    opts.set_use_direct_reads(true);
    let db = DB::open(&opts, "/").unwrap();
    faulty.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Read))
            .count(u64::MAX),
    );
    let mut reads = ReadOptions::default();
    reads.set_async_io(true);
    reads.set_readahead_size(64 * 1024);
    let error = db
        .iterator_opt(IteratorMode::Start, reads)
        .find_map(std::result::Result::err)
        .expect("the scan must not end as if the database did");
    assert!(error.to_string().contains("injected"), "{error}");
}

#[test]
fn multi_get_reads_together_and_point_reads_borrow() {
    let _limit = watchdog();
    for lend in [true, false] {
        let (fs, _) = memory();
        let env = EnvOptions::new().lend_cached(lend).build(&fs).unwrap();
        let db = DB::open(&without_block_cache(&env), "/").unwrap();
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
    let log = fs.open("/LOG", OpenOptions::READ).unwrap();
    let mut text = vec![0; usize::try_from(log.len()).unwrap()];
    log.read_at(0, &mut text).unwrap();
    assert!(
        String::from_utf8_lossy(&text).contains("reusing log"),
        "no log was recycled"
    );
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
        let env = EnvOptions::new().root(root).build(&fs).unwrap();
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
    // What RocksDB says on the kernel's file system has this word too.
    assert!(error.to_string().contains("lock "), "{error}");
    drop(db);
    DB::open(&options(&env), "/").unwrap();
}

#[test]
fn a_full_file_system_is_no_space_and_loses_nothing() {
    let _limit = watchdog();
    let fs = mount("malloc://24M", &MountOptions::new()).unwrap();
    let mut opts = options(&pumice::env(&fs));
    opts.set_write_buffer_size(1 << 20);
    // When a flush or a compaction finds no space first, RocksDB stops writes that its own recovery
    // then waits for, unless there is always room for one more memtable and one more table.
    opts.set_max_write_buffer_number(1000);
    opts.set_disable_auto_compactions(true);
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
fn many_databases_in_one_file_system() {
    let _limit = watchdog();
    let (fs, _) = memory();
    let mut open = BTreeMap::new();
    for name in ["/a", "/b/c", "/"] {
        let env = EnvOptions::new().root(name).build(&fs).unwrap();
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

/// A directory that only the names of its files make, as all do on SPDK's images, is not the root, although neither has
/// a blob.
#[test]
fn a_log_directory_without_a_blob_goes_with_its_database() {
    let _limit = watchdog();
    let device = pumice::bdev::open("malloc://512M?block_size=4096").unwrap();
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    fs.mkdir("/wal").unwrap();
    let seed = fs.open("/wal/seed", OpenOptions::CREATE).unwrap();
    seed.sync().unwrap();
    drop(seed);
    let marker = fs.stat("/wal").unwrap().blob_id.unwrap();
    fs.unmount().unwrap();
    drop(fs);
    let store = Blobstore::load(Arc::clone(&device), &LoadOptions::default()).unwrap();
    store.delete(marker).unwrap();
    store.unload().unwrap();
    drop(store);
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    assert_eq!(fs.stat("/wal").unwrap().blob_id, None);
    let mut opts = options(&pumice::env(&fs));
    opts.set_wal_dir("/wal");
    let db = DB::open(&opts, "/").unwrap();
    fill(&db, 0..100);
    drop(db);
    let is_log = |name: &String| name.ends_with(".log");
    assert!(names(&fs, "/wal").iter().any(is_log));
    DB::destroy(&opts, "/").unwrap();
    assert!(!names(&fs, "/wal").iter().any(is_log));
    // What was destroyed is not there when a database is made again.
    let db = DB::open(&opts, "/").unwrap();
    assert_eq!(db.get(key(7)).unwrap(), None);
}

/// RocksDB asks for a block with a wrong checksum once more, and means the device's bytes, not the cache's.
#[test]
fn a_block_that_was_read_wrongly_once_is_read_again() {
    let _limit = watchdog();
    let base = pumice::bdev::open("malloc://512M?block_size=4096").unwrap();
    let faulty = Arc::new(ErrorDevice::new(None, base));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = DB::open(&options(&pumice::env(&fs)), "/").unwrap();
    fill(&db, 0..60_000);
    db.flush().unwrap();
    drop(db);
    fs.unmount().unwrap();
    // The page cache is empty.
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = DB::open(&without_block_cache(&pumice::env(&fs)), "/").unwrap();
    faulty.inject(
        Injection::new(Failure::Corrupt {
            offset: 100,
            value: 0xff,
        })
        .op(Some(OpKind::Read)),
    );
    check(&db, 0..1);
    assert_eq!(faulty.injections(), [], "the fault was met");
    check(&db, 1..100);
}
