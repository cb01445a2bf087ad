//! A device that fails: nothing acknowledged is lost, errors come where they belong.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_blobfs::fs::{Access, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions};

fn setup() -> (Arc<ErrorDevice>, FileSystem) {
    let base = memory(64 << 20, 4096);
    FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let as_device: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
    let fs = FileSystem::mount(as_device, &MountOptions::default()).unwrap();
    (dev, fs)
}

fn injection(op: OpKind, failure: Failure, count: u64) -> Injection {
    Injection {
        op: Some(op),
        failure,
        count,
        range: None,
        queue_depth: 0,
    }
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
    // What could not be written is still there to be read, and to be written.
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
    // A read-ahead that fails is nobody's error.
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
    dev.inject(injection(OpKind::Write, Failure::Fail, 1));
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
}
