//! Tests with a device that fails: nothing acknowledged is lost, and errors are reported where they
//! belong.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{Access, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions};

fn setup() -> (Arc<ErrorDevice>, FileSystem) {
    setup_on(memory(64 << 20, 4096))
}

/// Makes a mount on a device with a volatile write cache.
fn setup_cached() -> (Arc<ErrorDevice>, FileSystem) {
    setup_on(Arc::new(CrashDevice::new(4096, 16 << 10, true, 5)))
}

fn setup_on(base: Arc<dyn BlockDevice>) -> (Arc<ErrorDevice>, FileSystem) {
    FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let as_device: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
    let fs = FileSystem::mount(as_device, &MountOptions::default()).unwrap();
    (dev, fs)
}

fn injection(op: OpKind, failure: Failure, count: u64) -> Injection {
    Injection::new(failure).op(Some(op)).count(count)
}

#[test]
fn failed_write_behind_is_reported_and_sent_again() {
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 8 << 20).unwrap();
    let data: Vec<u8> = (0..5_000_000u32)
        .map(|i| u8::try_from(i % 253).unwrap())
        .collect();
    dev.inject(injection(OpKind::Write, Failure::Fail, 100));
    for piece in data.chunks(100_000) {
        f.append(piece).unwrap();
    }
    let error = f.sync().unwrap_err();
    assert!(matches!(error, FsError::Io { .. }), "{error}");
    assert!(error.to_string().contains("/f"), "{error}");
    dev.clear();
    // What could not be written can still be read, and written.
    let mut out = vec![0; data.len()];
    f.read_at(0, &mut out).unwrap();
    assert!(out == data);
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    f.read_at(0, &mut out).unwrap();
    assert!(out == data);
    drop(f);
    fs.unmount().unwrap();
}

/// Unmounts, and mounts what is on the device.
fn again(dev: &Arc<ErrorDevice>, fs: FileSystem) -> FileSystem {
    fs.unmount().unwrap();
    drop(fs);
    let dev: Arc<dyn BlockDevice> = Arc::clone(dev) as Arc<dyn BlockDevice>;
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

fn content_of(fs: &FileSystem, path: &str) -> Vec<u8> {
    let f = fs.open(path, OpenOptions::READ).unwrap();
    let mut out = vec![0; usize::try_from(f.len()).unwrap()];
    assert_eq!(f.read_at(0, &mut out).unwrap(), out.len());
    out
}

#[test]
fn an_old_version_of_a_block_never_replaces_a_newer_one() {
    for failures in 1..6 {
        let (dev, fs) = setup();
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 1 << 20).unwrap();
        dev.inject(injection(OpKind::Write, Failure::Fail, failures));
        for n in 1..=3 {
            f.append(&[n; 100]).unwrap();
            let _ = f.sync();
        }
        // All of it is acknowledged in the end.
        while f.sync().is_err() {}
        drop(f);
        let fs = again(&dev, fs);
        let want: Vec<u8> = (1..=3).flat_map(|n| [n; 100]).collect();
        assert!(
            content_of(&fs, "/f") == want,
            "{failures} failures: acknowledged bytes are lost"
        );
    }
}

#[test]
fn a_full_buffer_that_cannot_be_sent_is_not_forgotten() {
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 4 << 20).unwrap();
    f.append(&[1; 100]).unwrap();
    dev.inject(injection(OpKind::Write, Failure::Fail, u64::MAX));
    f.sync().unwrap_err();
    let rest = vec![2; (1 << 20) - 100];
    f.append(&rest).unwrap();
    // The next byte needs a new buffer, and the old one cannot be written: its first block has
    // failed.
    for _ in 0..3 {
        f.append(&[3]).unwrap_err();
        assert_eq!(f.len(), 1 << 20);
    }
    dev.clear();
    f.append(&[3]).unwrap();
    f.sync().unwrap();
    drop(f);
    let fs = again(&dev, fs);
    let want = [&[1; 100][..], &rest[..], &[3]].concat();
    assert!(content_of(&fs, "/f") == want);
}

#[test]
fn a_device_that_takes_nothing_does_not_fill_the_memory() {
    let base = memory(256 << 20, 4096);
    FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = 8 << 20;
    let as_device: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
    let fs = FileSystem::mount(as_device, &opts).unwrap();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 64 << 20).unwrap();
    dev.inject(injection(OpKind::Write, Failure::Fail, u64::MAX));
    let piece = |n: usize| vec![u8::try_from(n).unwrap(); 1 << 20];
    let taken = (0..64).take_while(|n| f.append(&piece(*n)).is_ok()).count();
    assert!((8..16).contains(&taken), "{taken} MiB");
    dev.clear();
    f.append(&piece(taken)).unwrap();
    f.sync().unwrap();
    drop(f);
    let fs = again(&dev, fs);
    let got = content_of(&fs, "/f");
    assert_eq!(got.len(), (taken + 1) << 20);
    assert!(got.chunks(1 << 20).zip(0..).all(|(c, n)| c == piece(n)));
}

#[test]
fn after_a_failed_flush_bytes_are_sent_again_or_reported_lost() {
    let (dev, fs) = setup_cached();
    let (small, large) = (
        fs.open("/small", OpenOptions::CREATE).unwrap(),
        fs.open("/large", OpenOptions::CREATE).unwrap(),
    );
    small.allocate(0, 8 << 20).unwrap();
    large.allocate(0, 8 << 20).unwrap();
    // The bytes are in the device's cache, since nothing is synced yet.
    small.append(&[1; 8192]).unwrap();
    small.range_sync(0, 8192).unwrap();
    large.append(&[2; 3 << 20]).unwrap();
    large.range_sync(0, 3 << 20).unwrap();
    small.append(&[1]).unwrap();
    dev.inject(injection(OpKind::Flush, Failure::Fail, 1));
    let lost = small.sync().unwrap_err();
    assert!(lost.is_data_loss(), "{lost}");
    // The device may have dropped what it had cached. A flush that succeeds later proves nothing.
    let before = fs.io_stats();
    small.sync().unwrap();
    let sent = fs.io_stats().since(&before);
    assert!(
        sent.written_bytes >= 8192 + 4096,
        "only {} bytes were written again",
        sent.written_bytes
    );
    small.sync().unwrap();
    for _ in 0..2 {
        let lost = large.sync().unwrap_err();
        assert!(lost.is_data_loss(), "{lost}");
    }
    // Other files are not affected.
    let other = fs.open("/other", OpenOptions::CREATE).unwrap();
    other.append(&[3; 2 << 20]).unwrap();
    other.range_sync(0, 1 << 20).unwrap();
    other.sync().unwrap();
}

#[test]
fn passing_errors_are_tried_again() {
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 8 << 20).unwrap();
    dev.inject(injection(OpKind::Write, Failure::NoMemory, 1));
    f.append(&vec![3; 3 << 20]).unwrap();
    f.sync().unwrap();
    assert_eq!(f.len(), 3 << 20);
}

#[test]
fn a_failed_read_fails_that_read() {
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![9; 3 << 20]).unwrap();
    f.sync().unwrap();
    f.advise(Access::Random);
    f.invalidate(0, u64::MAX);
    dev.inject(injection(OpKind::Read, Failure::Fail, 1));
    let mut out = [0; 100];
    let error = f.read_at(5000, &mut out).unwrap_err();
    assert!(
        matches!(
            error,
            FsError::Io {
                data_loss: false,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(f.read_at(5000, &mut out).unwrap(), 100);
    assert_eq!(out, [9; 100]);
    dev.inject(injection(OpKind::Read, Failure::Fail, 1));
    let h = f.read_async(1 << 20, 5000).unwrap();
    assert!(h.read_into(&mut [0; 5000]).is_err());
    // A readahead that fails is not an error of any caller.
    dev.inject(injection(OpKind::Read, Failure::Fail, 1));
    f.prefetch(2 << 20, 100_000).unwrap();
    assert_eq!(f.read_at(2 << 20, &mut out).unwrap(), 100);
}

#[test]
fn a_failed_commit_keeps_the_old_name() {
    let (dev, fs) = setup();
    for (path, text) in [("/a", "A"), ("/b", "B")] {
        let f = fs.open(path, OpenOptions::CREATE).unwrap();
        f.append(text.as_bytes()).unwrap();
        f.sync().unwrap();
    }
    // One failed write of a metadata page does not stop the file system; many do.
    dev.inject(injection(OpKind::Write, Failure::Fail, 100));
    assert!(fs.rename("/a", "/b").is_err());
    dev.clear();
    let read = |path: &str| {
        let mut b = [0];
        fs.open(path, OpenOptions::READ)
            .unwrap()
            .read_at(0, &mut b)
            .unwrap();
        b[0]
    };
    assert_eq!((read("/a"), read("/b")), (b'A', b'B'));
    // The device works again, and so does the file system.
    dev.inject(injection(OpKind::Write, Failure::Fail, 1));
    fs.rename("/a", "/b").unwrap();
    assert_eq!(read("/b"), b'A');
}

/// A change that is perhaps on the device says so. The next one was not even tried, and once the device works again
/// the first one is taken back.
#[test]
fn a_change_whose_outcome_is_open_says_so() {
    let (dev, fs) = setup();
    fs.mkdir("/before").unwrap();
    for op in [OpKind::Write, OpKind::Read] {
        dev.inject(injection(op, Failure::Fail, u64::MAX));
    }
    let error = fs.mkdir("/open").unwrap_err();
    assert!(matches!(error, FsError::Undecided { .. }), "{error}");
    assert!(error.to_string().contains("/open"), "{error}");
    let error = fs.mkdir("/later").unwrap_err();
    assert!(!matches!(error, FsError::Undecided { .. }), "{error}");
    dev.clear();
    fs.mkdir("/after").unwrap();
    let names: Vec<_> = fs.list("/").unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["after", "before"]);
    fs.unmount().unwrap();
}
