//! A database on a full host and on a device with a fault that passes.

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{key, value, watchdog};
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::bdev::{BlockDevice, OpKind, open};
use pumice::rocksdb::{DBCompressionType, IteratorMode, WriteOptions};
use pumice::{Db, DbOptions, Error, FileSystem, FormatOptions, MountOptions, mount_device};
use pumice_bdev_testkit::crashsim::CrashDevice;

fn options(write_buffer: usize) -> DbOptions {
    DbOptions::new().configure(|options| {
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(write_buffer);
    })
}

fn check(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        let got = db.get(key(n)).unwrap();
        assert_eq!(got.as_deref(), Some(&value(n)[..]), "key {n}");
    }
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
                faulty.inject(Injection {
                    op: Some(OpKind::Write),
                    failure: Failure::Fail,
                    count: 1,
                    range: Some((0, 2048)),
                    queue_depth: 0,
                });
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

/// R5, U8: the file system of the kernel that holds the image is full.
#[test]
fn a_full_host_is_an_error_and_passes() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=96m none \"$PUMICE_FULL_HOST\" || exit 77
        exec \"$0\" --exact --nocapture puts_on_a_full_host";
    let status = Command::new("unshare")
        .args(["-rm", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("PUMICE_FULL_HOST", dir.path())
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) if status.code() == Some(77) => {
            println!("skipped: a_full_host_is_an_error_and_passes: tmpfs cannot be mounted");
        }
        Ok(status) => panic!("{status}"),
        Err(e) => println!("skipped: a_full_host_is_an_error_and_passes: no unshare ({e})"),
    }
}

/// The child of the test above.
#[test]
fn puts_on_a_full_host() {
    let Some(dir) = std::env::var_os("PUMICE_FULL_HOST").map(PathBuf::from) else {
        return;
    };
    let _limit = watchdog();
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 32 << 20]).unwrap();
    let uri = format!("file://{}/kv.img?size=1G&create=1", dir.display());
    let db = options(4 << 20).open(&uri).unwrap();
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
