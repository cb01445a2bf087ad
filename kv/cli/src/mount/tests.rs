//! Tests of a tree on a device that holds an operation back.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_blobfs::fs::{FileSystem, FormatOptions, MountOptions};

use super::device_in;
use super::table::ROOT;
use super::tree::{Changes, Tree};

/// Longest time of what does not have to wait.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn the_mount_of_a_directory_is_found_without_asking_it() {
    let table = b"22 1 0:21 / /proc rw - proc proc rw\n30 1 0:40 / /mnt/a\\040b rw - fuse.pumice x rw\n\
        31 30 0:41 / /mnt/a\\040b rw - tmpfs tmpfs rw\n32 1 8:1 /sub /mnt/a rw - ext4 /dev/sda1 rw\n";
    let found = |dir: &str| device_in(table, dir.as_ref());
    assert_eq!(found("/mnt/a b").as_deref(), Some(&b"0:41"[..]));
    assert_eq!(found("/mnt/a").as_deref(), Some(&b"8:1"[..]));
    assert_eq!(found("/mnt"), None);
    assert_eq!(device_in(b"22 1\n\n", "/".as_ref()), None);
}

#[test]
fn a_truncation_that_waits_for_a_sync_holds_up_nobody_else() {
    let memory = pumice_bdev::open("malloc://64M").unwrap();
    let dev = Arc::new(ErrorDevice::new(None, memory));
    FileSystem::format(dev.clone(), &FormatOptions::default()).unwrap();
    let fs = FileSystem::mount(dev.clone(), &MountOptions::default()).unwrap();
    let tree = Arc::new(Tree::new(fs.clone(), 0, 0));
    let (file, handle) = tree
        .create(ROOT, OsStr::new("file"), 0o644, libc::O_RDWR)
        .unwrap();
    tree.write(handle, 0, &[1; 10_000]).unwrap();
    dev.inject(Injection::new(Failure::Hang).op(Some(OpKind::Write)));
    let of = Arc::clone(&tree);
    let sync = std::thread::spawn(move || of.sync_file(handle, false));
    let started = Instant::now();
    while !dev.injections().is_empty() {
        assert!(started.elapsed() < PATIENCE, "the sync writes nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    let of = Arc::clone(&tree);
    let truncation = std::thread::spawn(move || {
        let change = Changes {
            size: Some(5),
            ..Changes::default()
        };
        of.change(file.ino.0, &change)
    });
    // Without this the truncation may come after everything else, which then proves nothing.
    std::thread::sleep(Duration::from_millis(200));
    assert!(!truncation.is_finished());
    let of = Arc::clone(&tree);
    let (done, others) = channel();
    std::thread::spawn(move || {
        let made = of.make_dir(ROOT, OsStr::new("dir"), 0o755);
        let found = of.lookup(ROOT, OsStr::new("dir"));
        let _ = done.send(made.is_ok() && found.is_ok_and(|found| found.is_some()));
    });
    let went_on = others.recv_timeout(PATIENCE);
    dev.resume();
    assert_eq!(went_on, Ok(true), "a change of names, and a lookup");
    sync.join().unwrap().unwrap();
    assert_eq!(truncation.join().unwrap().unwrap().size, 5);
    tree.close(handle);
    drop(tree);
    fs.unmount().unwrap();
}

/// The loop that syncs a mount from time to time tries again after a failure, also if nothing else was changed.
#[test]
fn a_sync_that_failed_is_tried_again() {
    let memory = pumice_bdev::open("malloc://64M").unwrap();
    let dev = Arc::new(ErrorDevice::new(None, memory));
    FileSystem::format(dev.clone(), &FormatOptions::default()).unwrap();
    let fs = FileSystem::mount(dev.clone(), &MountOptions::default()).unwrap();
    let tree = Tree::new(fs.clone(), 0, 0);
    let (_, handle) = tree
        .create(ROOT, OsStr::new("file"), 0o644, libc::O_RDWR)
        .unwrap();
    tree.write(handle, 0, &[1; 10_000]).unwrap();
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX),
    );
    for time in ["first", "second", "third"] {
        assert!(tree.sync_changed().is_err(), "the {time} sync");
    }
    dev.clear();
    tree.close(handle);
    drop(tree);
    let _ = fs.unmount_anyway();
}
