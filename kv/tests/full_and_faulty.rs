//! A database on a full host and on a device with a fault that passes.

mod common;

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use common::{check, key, value, watchdog};
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::bdev::{BlockDevice, OpKind, open};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{DBCompressionType, IteratorMode, MergeOperands, Options, WriteOptions};
use pumice::{
    Db, DbFuture, DbOptions, Error, ErrorKind, FileSystem, FormatOptions, MountOptions,
    mount_device,
};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_confine::{small_tmpfs, with_small_tmpfs};
use tracing::field::Field;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

fn options(write_buffer: usize) -> DbOptions {
    DbOptions::new().configure(|options| {
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(write_buffer);
    })
}

/// KA5, L3, R7: RocksDB goes on after one failed write of metadata, and so does the file system.
#[test]
fn puts_go_on_after_a_passing_fault_of_metadata() {
    let _limit = watchdog();
    for at in [100, 103, 117] {
        let base = open("malloc://128M?block_size=512").unwrap();
        FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
        let faulty = Arc::new(ErrorDevice::new(None, base));
        let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
        let fs = mount_device(&device, &MountOptions::new()).unwrap();
        let db = options(64 << 10).open_in(&fs).unwrap();
        let mut sync = WriteOptions::default();
        sync.set_sync(true);
        for n in 0..3000 {
            if n == at {
                // The first MiB: metadata pages.
                faulty.inject(
                    Injection::new(Failure::Fail)
                        .op(Some(OpKind::Write))
                        .range(Some((0, 2048))),
                );
            }
            let options = if n % 3 == 0 {
                &sync
            } else {
                &WriteOptions::default()
            };
            let started = Instant::now();
            while let Err(error) = db.put_opt(key(n), value(n), options) {
                assert!(
                    started.elapsed() < common::LIMIT / 6,
                    "still refused at {n}: {error}"
                );
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        assert_eq!(faulty.injections(), [], "the fault was met");
        db.close().unwrap();
        fs.unmount().unwrap();
        let fs = mount_device(&device, &MountOptions::new()).unwrap();
        check(&options(64 << 10).open_in(&fs).unwrap(), 0..3000);
    }
}

/// A device in memory whose writes can be made to fail, and a file system on it.
fn faulty() -> (Arc<ErrorDevice>, FileSystem) {
    let base = open("malloc://64M?block_size=4096").unwrap();
    let faulty = Arc::new(ErrorDevice::new(None, base));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    (faulty, fs)
}

/// Every write fails from now on.
fn fail_writes(device: &ErrorDevice) {
    device.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX),
    );
}

fn unlogged() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options
}

/// K1: RocksDB's own close passes over the failure of its last flush.
#[test]
fn a_close_that_loses_what_has_no_log_says_so() {
    let _limit = watchdog();
    type Write = fn(&Db);
    let writes: [(&str, Write); 4] = [
        ("put", |db| db.put_opt("u", "1", &unlogged()).unwrap()),
        ("delete", |db| db.delete_opt(key(7), &unlogged()).unwrap()),
        ("second family", |db| {
            let second = db.cf_handle("second").unwrap();
            db.put_cf_opt(&second, "u", "1", &unlogged()).unwrap();
        }),
        ("a family made later", |db| {
            db.create_cf("later", &Options::default()).unwrap();
            let later = db.cf_handle("later").unwrap();
            db.put_cf_opt(&later, "u", "1", &unlogged()).unwrap();
        }),
    ];
    for (what, write) in writes {
        for atomic in [false, true] {
            let (device, fs) = faulty();
            let options = options(1 << 20)
                .configure(|options| options.set_atomic_flush(atomic))
                .column_family("second", Options::default());
            let db = options.open_in(&fs).unwrap();
            for n in 0..100 {
                db.put(key(n), value(n)).unwrap();
            }
            write(&db);
            db.flush_wal(true).unwrap();
            fail_writes(&device);
            let error = db.close().expect_err(what);
            assert!(matches!(error, Error::Unlogged { .. }), "{what}: {error}");
            assert_eq!(error.kind(), ErrorKind::Device, "{what}");
            // Still open: what cannot be written can be read, and copied elsewhere.
            assert!(db.get(key(8)).unwrap().is_some(), "{what}");
            assert!(matches!(db.close(), Err(Error::Unlogged { .. })), "{what}");
        }
    }
}

/// A close needs no table for what has a log.
#[test]
fn a_close_without_room_for_tables_keeps_what_has_a_log() {
    let _limit = watchdog();
    let (device, fs) = faulty();
    let db = options(1 << 20).open_in(&fs).unwrap();
    for n in 0..100 {
        db.put(key(n), value(n)).unwrap();
    }
    db.flush_wal(true).unwrap();
    fail_writes(&device);
    db.close().unwrap();
    device.clear();
    check(&options(1 << 20).open_in(&fs).unwrap(), 0..100);
}

/// Deletions that are in the log need no table either.
#[test]
fn a_close_without_room_for_tables_keeps_deletions_that_have_a_log() {
    let _limit = watchdog();
    let (device, fs) = faulty();
    let db = options(1 << 20).open_in(&fs).unwrap();
    for n in 0..100 {
        db.put(key(n), value(n)).unwrap();
    }
    db.flush().unwrap();
    for n in 0..100 {
        db.delete(key(n)).unwrap();
    }
    db.flush_wal(true).unwrap();
    fail_writes(&device);
    db.close().unwrap();
    device.clear();
    let db = options(1 << 20).open_in(&fs).unwrap();
    assert!(db.iterator(IteratorMode::Start).next().is_none());
}

/// A close puts what has no log into tables, tombstones included.
#[test]
fn a_close_writes_what_has_no_log() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    for round in 0..2 {
        let db = options(1 << 20).open_in(&fs).unwrap();
        check(&db, 0..round * 10);
        for n in round * 10..round * 10 + 10 {
            db.put_opt(key(n), value(n), &unlogged()).unwrap();
        }
        // Only tombstones: they have no key that could be looked for.
        db.flush().unwrap();
        db.delete_opt(key(100), &unlogged()).unwrap();
        db.put(key(100), value(100)).unwrap();
        db.delete_opt(key(100), &unlogged()).unwrap();
        db.close().unwrap();
    }
    let db = options(1 << 20).open_in(&fs).unwrap();
    check(&db, 0..20);
    assert_eq!(db.get(key(100)).unwrap(), None, "came back from the log");
}

/// Leaves no room.
fn fill(fs: &FileSystem) {
    let ballast = fs.open("/ballast", OpenOptions::CREATE).unwrap();
    for piece in [1 << 20, 4 << 10] {
        while ballast.append(&vec![1; piece]).is_ok() {}
    }
}

/// There is room again between two closes.
#[test]
fn a_close_is_repeated_and_keeps_what_has_no_log() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    let db = options(32 << 20).open_in(&fs).unwrap();
    for n in 0..50_000 {
        db.put_opt(key(n), value(n), &unlogged()).unwrap();
    }
    fill(&fs);
    let error = db.close().expect_err("no room for a table");
    assert!(matches!(error, Error::Unlogged { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    check(&db, 0..50_000);
    fs.unlink("/ballast").unwrap();
    let started = Instant::now();
    while let Err(error) = db.close() {
        let error = pumice::chain(&error);
        assert!(started.elapsed() < common::LIMIT / 12, "never: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(db);
    check(&options(1 << 20).open_in(&fs).unwrap(), 0..50_000);
}

/// Keeps the errors that are logged.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<String>>>);

impl Subscriber for Logged {
    fn enabled(&self, meta: &Metadata<'_>) -> bool {
        *meta.level() == Level::ERROR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut |_: &Field, value: &dyn std::fmt::Debug| {
            text.push_str(&format!("{value:?} "));
        });
        self.0.lock().unwrap().push(text);
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// A drop has nobody to return an error to.
#[test]
fn a_drop_that_loses_what_has_no_log_is_logged() {
    let _limit = watchdog();
    let (device, fs) = faulty();
    let db = options(1 << 20).open_in(&fs).unwrap();
    db.put_opt("u", "1", &unlogged()).unwrap();
    fail_writes(&device);
    let logged = Logged::default();
    tracing::subscriber::with_default(logged.clone(), || drop(db));
    let logged = logged.0.lock().unwrap();
    assert!(
        logged.iter().any(|text| text.contains("without a log")),
        "{logged:?}"
    );
}

/// The list of the families is in the MANIFEST, which CURRENT names.
#[test]
fn a_close_lists_the_families_only_if_it_has_to() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    let db = options(1 << 20).open_in(&fs).unwrap();
    for n in 0..10 {
        db.put(key(n), value(n)).unwrap();
    }
    fs.rename("/CURRENT", "/elsewhere").unwrap();
    db.close().expect("every put has a log");
    fs.rename("/elsewhere", "/CURRENT").unwrap();

    let db = options(1 << 20).open_in(&fs).unwrap();
    check(&db, 0..10);
    db.put_opt(key(10), value(10), &unlogged()).unwrap();
    fs.rename("/CURRENT", "/elsewhere").unwrap();
    let error = db.close().expect_err("which families there are is unknown");
    assert!(matches!(error, Error::RocksDb(_)), "{error}");
    check(&db, 0..11);
    fs.rename("/elsewhere", "/CURRENT").unwrap();
    db.close().unwrap();
    drop(db);
    check(&options(1 << 20).open_in(&fs).unwrap(), 0..11);
}

/// A drop soon after a close that failed writes what was put when there was room again.
#[test]
fn a_drop_after_a_failed_close_tries_again() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    let options = options(32 << 20);
    let db = options.open_in(&fs).unwrap();
    for n in 0..50_000 {
        db.put_opt(key(n), value(n), &unlogged()).unwrap();
    }
    fill(&fs);
    db.close().expect_err("no room for a table");
    fs.unlink("/ballast").unwrap();
    let started = Instant::now();
    while let Err(error) = db.put_opt("u", "1", &unlogged()) {
        assert!(started.elapsed() < common::LIMIT / 12, "never: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let logged = Logged::default();
    tracing::subscriber::with_default(logged.clone(), || drop(db));
    let logged = logged.0.lock().unwrap();
    assert!(logged.is_empty(), "{logged:?}");
    let db = options.open_in(&fs).unwrap();
    check(&db, 0..50_000);
    assert_eq!(db.get("u").unwrap().as_deref(), Some(&b"1"[..]));
}

/// Waits until something holds.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < common::LIMIT / 3, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A gate in a merge operator: a flush waits there until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// A flush calls the merge operator for a key that has a value and an operand.
    fn install(&self, options: &mut Options) {
        let gate = self.clone();
        let newest = move |_: &[u8], _: Option<&[u8]>, operands: &MergeOperands| {
            let mut open = gate.0.0.lock().unwrap();
            while !*open {
                open = gate.0.1.wait(open).unwrap();
            }
            operands.iter().last().map(<[u8]>::to_vec)
        };
        options.set_merge_operator_associative("gate", newest);
    }
}

/// `kv/README.md`, "When the device is full".
#[test]
fn a_put_that_is_held_up_on_a_full_device_ends_with_the_close() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    let gate = Gate::default();
    let options = options(256 << 10).configure(|options| {
        options.set_max_write_buffer_number(2);
        gate.install(options);
    });
    let db = Arc::new(options.open_in(&fs).unwrap());
    db.put("gate", "closed").unwrap();
    db.merge("gate", "open").unwrap();
    let writer = Arc::clone(&db);
    let putting = std::thread::spawn(move || {
        let mut n = 0;
        loop {
            match writer.put(key(n), value(n)) {
                Ok(()) => n += 1,
                Err(error) => return (n, Error::from(error)),
            }
        }
    });
    let is = |name: &str, least| db.property_int_value(name).unwrap() >= Some(least);
    wait_until("all memtables are full", || {
        is("rocksdb.is-write-stopped", 1)
    });
    fill(&fs);
    gate.open();
    wait_until("the flush fails", || is("rocksdb.background-errors", 1));
    let mut hurried = WriteOptions::default();
    hurried.set_no_slowdown(true);
    let error = db.put_opt("hurried", "1", &hurried).unwrap_err();
    assert!(error.to_string().contains("stall"), "{error}");
    assert_eq!(db.get("gate").unwrap().as_deref(), Some(&b"open"[..]));
    fs.unlink("/ballast").unwrap();
    // RocksDB looks for room every five seconds.
    std::thread::sleep(Duration::from_secs(7));
    assert!(!putting.is_finished());
    db.close().unwrap();
    wait_until("the put ends", || putting.is_finished());
    let (written, error) = putting.join().unwrap();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    drop(db);
    check(&options.open_in(&fs).unwrap(), 0..written);
}

/// The same with puts whose tasks wait for futures: one in RocksDB, one behind it in the queue.
#[test]
fn a_held_up_future_ends_with_the_close_or_the_drop() {
    let _limit = watchdog();
    for drops in [false, true] {
        let (_, fs) = faulty();
        let gate = Gate::default();
        let options = options(256 << 10).async_threads(1).configure(|options| {
            options.set_max_write_buffer_number(2);
            gate.install(options);
        });
        let db = options.open_in(&fs).unwrap();
        db.put("gate", "closed").unwrap();
        db.merge("gate", "open").unwrap();
        let written = Arc::<AtomicU64>::default();
        let counter = Arc::clone(&written);
        let mut putting = db.run_async(move |db| {
            loop {
                let n = counter.load(Ordering::Relaxed);
                db.put(key(n), value(n))?;
                counter.store(n + 1, Ordering::Relaxed);
            }
        });
        let mut queued = db.put_async("queued", "1");
        let mut context = Context::from_waker(Waker::noop());
        let mut poll = |future: &mut DbFuture<'_, ()>| Pin::new(future).poll(&mut context);
        assert!(poll(&mut putting).is_pending() && poll(&mut queued).is_pending());
        let is = |name: &str| db.property_int_value(name).unwrap() >= Some(1);
        wait_until("all memtables are full", || is("rocksdb.is-write-stopped"));
        fill(&fs);
        gate.open();
        wait_until("the flush fails", || is("rocksdb.background-errors"));
        fs.unlink("/ballast").unwrap();
        if drops {
            drop((putting, queued));
        } else {
            db.close().unwrap();
            for mut future in [putting, queued] {
                let Poll::Ready(Err(error)) = poll(&mut future) else {
                    panic!("a put was not answered, or done");
                };
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            }
        }
        drop(db);
        let db = options.open_in(&fs).unwrap();
        check(&db, 0..written.load(Ordering::Relaxed));
        assert_eq!(db.get("queued").unwrap(), None);
    }
}

/// `kv/README.md`, "When the device is full".
#[test]
fn puts_fail_after_a_flush_without_room_until_a_memtable_has_room() {
    let _limit = watchdog();
    let (_, fs) = faulty();
    let db = options(8 << 20).open_in(&fs).unwrap();
    let small = fs.open("/small", OpenOptions::CREATE).unwrap();
    small.append(&vec![1; 2 << 20]).unwrap();
    for n in 0..1000 {
        db.put(key(n), value(n)).unwrap();
    }
    fill(&fs);
    let error = Error::from(db.flush().unwrap_err());
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    drop(small);
    fs.unlink("/small").unwrap();
    let free = fs.free_bytes();
    assert!(0 < free && free < 8 << 20, "{free}");
    let log = fs.open("/LOG", OpenOptions::READ).unwrap();
    let waits_for_more = format!("free space [{free} bytes] is less than");
    wait_until("RocksDB has seen that there is some room", || {
        let mut text = vec![0; usize::try_from(log.len()).unwrap()];
        log.read_at(0, &mut text).unwrap();
        String::from_utf8_lossy(&text).contains(&waits_for_more)
    });
    let error = Error::from(db.put(key(1000), value(1000)).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    check(&db, 0..1000);
    fs.unlink("/ballast").unwrap();
    wait_until("puts go on", || db.put(key(1000), value(1000)).is_ok());
    check(&db, 0..1001);
}

/// R5, U8: the file system of the kernel that holds the image is full.
#[test]
fn a_full_host_is_an_error_and_passes() {
    let dir = tempfile::tempdir().unwrap();
    with_small_tmpfs(
        "a_full_host_is_an_error_and_passes",
        "96m",
        dir.path(),
        "puts_on_a_full_host",
    );
}

/// The child of the test above.
#[test]
fn puts_on_a_full_host() {
    let Some(dir) = small_tmpfs() else {
        return;
    };
    let _limit = watchdog();
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 32 << 20]).unwrap();
    let uri = format!("file://{}/kv.img?size=1G&create=1", dir.display());
    // As long as there is room for one more memtable and one more table, puts fail on a full host and do not wait for room.
    let roomy = options(4 << 20).configure(|options| {
        options.set_max_write_buffer_number(1000);
        options.set_disable_auto_compactions(true);
    });
    let db = roomy.open(&uri).unwrap();
    let full = |db: &Db, from: u64| {
        let mut n = from;
        let error = loop {
            match db.put(key(n), value(n)) {
                Ok(()) => n += 1,
                Err(error) => break error,
            }
            assert!(n < 2_000_000, "never full");
        };
        assert!(error.to_string().contains("No space left"), "{error}");
        n
    };
    let written = full(&db, 0);
    check(&db, 0..written);
    // There is room again: puts go on without a new opening.
    std::fs::remove_file(&ballast).unwrap();
    let started = Instant::now();
    while let Err(error) = db.put(key(written), value(written)) {
        assert!(
            started.elapsed() < common::LIMIT / 3,
            "still refused: {error}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let written = full(&db, written + 1);
    // Closed and opened while it is full: nothing that was put is lost, whatever can be written.
    let closed = db.close();
    drop(db);
    let reopened = options(4 << 20).read_only(true).open(&uri).unwrap();
    if closed.is_ok() {
        check(&reopened, 0..written);
    } else {
        let kept = reopened.iterator(IteratorMode::Start).count() as u64;
        assert!(kept <= written && kept > 0, "{kept} of {written}");
        check(&reopened, 0..kept);
    }
    drop(reopened);
    match options(4 << 20).open(&uri) {
        Ok(db) => db.close().unwrap(),
        Err(error) => assert!(matches!(error, Error::Full { .. }), "{error}"),
    }
}

/// A close makes the log durable, which does not wait for the unmount.
#[test]
fn a_close_makes_the_log_durable() {
    let _limit = watchdog();
    let device = CrashDevice::new(4096, 16 << 10, true, 3);
    let dynamic: Arc<dyn BlockDevice> = Arc::new(device.clone());
    let fs = mount_device(&dynamic, &MountOptions::new()).unwrap();
    let db = options(1 << 20).open_in(&fs).unwrap();
    for n in 0..1000 {
        db.put(key(n), value(n)).unwrap();
    }
    db.close().unwrap();
    let mut points = device.crash_points();
    while points.advance().is_some() {}
    let image = points.image(&mut |_| false);
    let after: Arc<dyn BlockDevice> = Arc::new(CrashDevice::from_image(4096, image, true, 4));
    let fs = mount_device(&after, &MountOptions::new()).unwrap();
    check(&options(1 << 20).open_in(&fs).unwrap(), 0..1000);
}
