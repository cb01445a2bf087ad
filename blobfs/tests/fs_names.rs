//! Changes of names: on a device that fails for a while, beside the last close of a file, and after another mount.

mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use flaky::{Flaky, Plan};
use held::arrived;
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, LoadOptions};
use pumice_blobfs::fs::{FileSystem, FsError, Journal, MountOptions, OpenOptions};
use task::spawn;

const MIB: usize = 1 << 20;

fn mount(dev: Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

/// The rename of a directory fails at each of its writes, and so does everything that would undo it.
/// A change that is accepted afterwards finds the directory under its old name, and stays there.
#[test]
fn what_follows_a_failed_rename_of_a_directory_stays_in_it() {
    let _limit = watchdog("after a failed rename", 240);
    for journal in KINDS {
        let mut accepted = 0;
        for from in 0..8 {
            let base = memory(64 << 20, 4096);
            FileSystem::format(Arc::clone(&base), &format_1m(journal)).unwrap();
            let dev = Flaky::new(base);
            let fs = mount(dev.clone());
            fs.mkdir("/d").unwrap();
            drop(fs.open("/d/f", OpenOptions::CREATE).unwrap());
            dev.arm(Some(Plan {
                from,
                count: u64::MAX,
                kind: IoErrorKind::Media,
                done: false,
            }));
            let renamed = fs.rename("/d", "/e");
            dev.arm(None);
            if renamed.is_err() && fs.open("/d/new", OpenOptions::CREATE).is_ok() {
                accepted += 1;
                fs.mkdir("/e").unwrap();
            }
            let before = files_of(&fs);
            let unmounted = fs.unmount();
            drop(fs);
            if unmounted.is_ok() {
                let after = files_of(&mount(dev.clone()));
                assert_eq!(after, before, "{journal:?}, {from}: {renamed:?}");
            }
        }
        assert!(accepted > 0, "{journal:?}: nothing was tried");
    }
}

/// The last handle is closed while the removal of the last name is on its way: the file goes all the same.
#[test]
fn a_file_that_is_closed_while_it_loses_its_name_is_deleted() {
    let _limit = watchdog("a close beside a removal", 120);
    for journal in KINDS {
        let base = memory(64 << 20, 4096);
        let (dev, fs) = setup_with(base, &format_1m(journal), &MountOptions::default());
        let before = fs.statfs().unused;
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; MIB]).unwrap();
        f.sync().unwrap();
        dev.inject(hang(OpKind::Write, 1, None));
        let other = fs.clone();
        let removal = spawn(move || other.unlink("/f"));
        arrived(&dev, "a write of the removal");
        drop(f);
        dev.resume();
        removal.join("the removal").unwrap();
        assert_eq!(fs.statfs().unused, before, "{journal:?}");
        fs.unmount().unwrap();
    }
}

/// A replacement is younger than a file of an earlier mount, also if that one was replaced often: a power cut anywhere in it
/// leaves one file of the name.
#[test]
fn a_replacement_is_younger_than_files_of_earlier_mounts() {
    let first = Arc::new(CrashDevice::new(4096, 16 << 10, false, 5));
    FileSystem::format(first.clone(), &format_1m(Journal::None)).unwrap();
    let fs = mount(first.clone());
    for _ in 0..3 {
        fs.open("/f", OpenOptions::FRESH).unwrap();
    }
    // It takes the number of the blob that `/f` says it has replaced.
    fs.open("/g", OpenOptions::CREATE).unwrap();
    fs.unmount().unwrap();
    let second = Arc::new(CrashDevice::from_image(4096, first.image(), false, 6));
    let fs = mount(second.clone());
    fs.open("/f", OpenOptions::FRESH).unwrap();
    let mut points = second.crash_points();
    while points.advance().is_some() {
        let image = points.image(&mut |_| true);
        let cut = mount(Arc::new(CrashDevice::from_image(4096, image, false, 7)));
        assert_eq!(cut.problems(), [] as [String; 0]);
        assert_eq!(files_of(&cut).len(), 2);
    }
}

/// Makes files in directories that no blob stands for, as other programs do. One has three names.
fn imply(dev: &Arc<dyn BlockDevice>) {
    let store = Blobstore::load(Arc::clone(dev), &LoadOptions::default()).unwrap();
    for (name, links) in [
        ("/d/a\0", "/d/link\0/outside\0"),
        ("/d/s/b\0", ""),
        ("/d/c\0", ""),
    ] {
        let mut xattrs = vec![
            ("name".to_owned(), name.as_bytes().to_vec()),
            ("length".to_owned(), vec![0; 8]),
        ];
        if !links.is_empty() {
            xattrs.push(("pumice.links".to_owned(), links.as_bytes().to_vec()));
        }
        let options = CreateOptions::default().xattrs(xattrs);
        store.create(&options).unwrap();
    }
    store.unload().unwrap();
}

/// Returns the names that a mount shows, and the next one too.
fn names_twice(dev: &Arc<dyn BlockDevice>) -> Vec<String> {
    let names = || {
        let fs = mount(Arc::clone(dev));
        assert_eq!(fs.problems(), [] as [String; 0]);
        let names: Vec<String> = files_of(&fs).into_keys().collect();
        if names.iter().any(|name| name == "/d/a") {
            assert!(fs.same_file("/d/a", "/outside").unwrap());
        } else {
            assert!(fs.same_file("/n/a", "/n/link").unwrap());
        }
        fs.unmount().unwrap();
        names
    };
    let first = names();
    assert_eq!(names(), first, "the next mount shows others");
    first
}

const OLD: [&str; 7] = [
    "/d", "/d/a", "/d/c", "/d/link", "/d/s", "/d/s/b", "/outside",
];
const NEW: [&str; 7] = [
    "/n", "/n/a", "/n/c", "/n/link", "/n/s", "/n/s/b", "/outside",
];

/// No blob has the name of the directory, so that the rename makes one first, which has the intent.
#[test]
fn a_power_cut_in_renaming_an_implied_directory_leaves_old_names_or_new_ones() {
    for journal in KINDS {
        let first = Arc::new(CrashDevice::new(4096, 16 << 10, false, 5));
        FileSystem::format(first.clone(), &format_1m(journal)).unwrap();
        imply(&(first.clone() as Arc<dyn BlockDevice>));
        let second = Arc::new(CrashDevice::from_image(4096, first.image(), false, 6));
        let fs = mount(second.clone());
        let begin = second.len_events();
        fs.rename("/d", "/n").unwrap();
        let end = second.len_events();
        let (mut points, mut at) = (second.crash_points(), 0);
        let mut found = Vec::new();
        while at < end {
            points.advance().unwrap();
            at += 1;
            if at < begin {
                continue;
            }
            let image = points.image(&mut |_| true);
            let cut: Arc<dyn BlockDevice> =
                Arc::new(CrashDevice::from_image(4096, image, false, 7));
            let names = names_twice(&cut);
            assert!(names == OLD || names == NEW, "{journal:?}, {at}: {names:?}");
            found.push(names == NEW);
        }
        assert_eq!(found.last(), Some(&true));
        // Once there is an intent, each mount makes it so.
        assert!(found.is_sorted(), "{journal:?}: {found:?}");
    }
}

#[test]
fn a_failed_rename_of_an_implied_directory_renames_nothing() {
    let _limit = watchdog("a failed rename of an implied directory", 240);
    for journal in KINDS {
        let mut failed = 0;
        // Some writes fail, more than are tried again, or all.
        for (from, count) in (0..8).flat_map(|from| [(from, 8), (from, u64::MAX)]) {
            let base = memory(64 << 20, 4096);
            FileSystem::format(Arc::clone(&base), &format_1m(journal)).unwrap();
            imply(&base);
            let dev = Flaky::new(Arc::clone(&base));
            let fs = mount(dev.clone());
            dev.arm(Some(Plan {
                from,
                count,
                kind: IoErrorKind::Media,
                done: false,
            }));
            let renamed = fs.rename("/d", "/n");
            dev.arm(None);
            drop((fs.unmount_anyway(), fs));
            let names = names_twice(&base);
            match renamed {
                Ok(()) => assert_eq!(names, NEW),
                Err(FsError::Undecided { .. }) => assert!(names == OLD || names == NEW),
                Err(_) => assert_eq!(names, OLD, "{journal:?}, {from}, {count}"),
            }
            failed += u32::from(renamed.is_err());
        }
        assert!(failed > 0);
    }
}

/// The second of two that create a file finds that of the first, and has it open like any other.
#[test]
fn who_comes_second_to_create_a_file_keeps_it_open() {
    let _limit = watchdog("two that create a file", 120);
    let base = memory(64 << 20, 4096);
    let (dev, fs) = setup_with(base, &format_1m(Journal::None), &MountOptions::default());
    dev.inject(hang(OpKind::Write, 1, None));
    let create = |how| {
        let fs = fs.clone();
        spawn(move || fs.open("/f", how))
    };
    let first = create(OpenOptions::CREATE);
    arrived(&dev, "a write of the creation");
    let second = create(OpenOptions::CREATE);
    let exclusive = create(OpenOptions::CREATE.exclusive(true));
    assert!(second.still_waits() && exclusive.still_waits());
    dev.resume();
    let first = first.join("the first").unwrap();
    let second = second.join("the second").unwrap();
    let refused = exclusive.join("who wants no other").unwrap_err();
    assert!(matches!(refused, FsError::Exists { .. }), "{refused}");
    second.append(b"bytes").unwrap();
    fs.unlink("/f").unwrap();
    drop(first);
    second.append(b" and more").unwrap();
    assert_eq!(all(&second), b"bytes and more");
}

/// A thread that waits for the removal of a directory finds that it is gone, and makes nothing in it.
#[test]
fn nothing_is_made_in_a_directory_that_is_being_removed() {
    type Make = fn(&FileSystem) -> pumice_blobfs::fs::Result<()>;
    let _limit = watchdog("a removal and what is made beside it", 120);
    let makes: [(&str, Make); 4] = [
        ("a file", |fs| {
            fs.open("/d/new", OpenOptions::CREATE).map(drop)
        }),
        ("a directory", |fs| fs.mkdir("/d/new")),
        ("a name", |fs| fs.link("/f", "/d/new")),
        ("another name", |fs| fs.rename("/f", "/d/new")),
    ];
    for (what, make) in makes {
        let base = memory(64 << 20, 4096);
        let (dev, fs) = setup_with(base, &format_1m(Journal::None), &MountOptions::default());
        drop(fs.open("/f", OpenOptions::CREATE).unwrap());
        fs.mkdir("/d").unwrap();
        dev.inject(hang(OpKind::Write, 1, None));
        let other = fs.clone();
        let removal = spawn(move || other.rmdir("/d"));
        arrived(&dev, "a write of the removal");
        let other = fs.clone();
        let making = spawn(move || make(&other));
        assert!(making.still_waits(), "{what}");
        dev.resume();
        removal.join("the removal").unwrap();
        let error = making.join(what).unwrap_err();
        assert!(matches!(error, FsError::NotFound { .. }), "{what}: {error}");
        let fs = again(&dev, fs);
        assert!(!fs.exists("/d").unwrap(), "{what}");
        assert!(fs.exists("/f").unwrap(), "{what}");
    }
}

/// A directory whose removal could not be written is still there.
#[test]
fn a_directory_whose_removal_fails_stays() {
    for journal in KINDS {
        let base = memory(64 << 20, 4096);
        let (dev, fs) = setup_with(base, &format_1m(journal), &MountOptions::default());
        fs.mkdir("/d").unwrap();
        dev.inject(fail(OpKind::Write, u64::MAX, None));
        fs.rmdir("/d").unwrap_err();
        assert!(fs.exists("/d").unwrap(), "{journal:?}");
        dev.clear();
        drop(fs.open("/d/f", OpenOptions::CREATE).unwrap());
        let fs = again(&dev, fs);
        assert!(fs.exists("/d/f").unwrap(), "{journal:?}");
    }
}

fn with_a_closed_file() -> FileSystem {
    let base = memory(64 << 20, 4096);
    let (_, fs) = setup_with(base, &format_1m(Journal::Auto), &MountOptions::default());
    let made = fs.open("/f", OpenOptions::CREATE).unwrap();
    made.append(b"bytes").unwrap();
    fs
}

/// A file that was opened when it was there counts as open like one that was made: without a name it keeps its bytes.
#[test]
fn who_opens_what_is_there_keeps_it_open() {
    let fs = with_a_closed_file();
    for how in [OpenOptions::READ, OpenOptions::CREATE] {
        fs.link("/f", "/g").unwrap();
        let opened = fs.open("/g", how).unwrap();
        fs.unlink("/f").unwrap();
        fs.unlink("/g").unwrap();
        assert_eq!(all(&opened), b"bytes");
        let made = fs.open("/f", OpenOptions::CREATE).unwrap();
        made.append(b"bytes").unwrap();
    }
}

/// A file that nobody has open loses one of its names, and is found under the other.
#[test]
fn a_closed_file_that_keeps_a_name_can_be_opened() {
    let fs = with_a_closed_file();
    fs.link("/f", "/g").unwrap();
    fs.unlink("/f").unwrap();
    let other = fs.clone();
    let opened = spawn(move || other.open("/g", OpenOptions::READ));
    let opened = opened.join("the open").unwrap();
    assert_eq!(all(&opened), b"bytes");
}
