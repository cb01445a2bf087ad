//! The orders of the log in shared memory, with devices that hold operations back or lose power. A process is not killed here: its
//! mount is forgotten, and another one is made of what the device has.

#[path = "killed/changes.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod changes;
mod common;
#[path = "killed/named.rs"]
mod named;
#[path = "common/task.rs"]
mod task;

use std::mem::ManuallyDrop;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};
use rand::prelude::*;

use changes::{bytes, check_every_kind, contents, every_kind};
use named::Named;
use task::{spawn, wait_for};

/// Returns a name of a device that no other test or process uses.
fn name(test: &str) -> String {
    format!("test-{test}-{}", std::process::id())
}

fn mount(dev: Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

/// Mounts for reading only.
fn look_at(dev: Arc<dyn BlockDevice>) -> FileSystem {
    let mut options = MountOptions::default();
    options.read_only = true;
    FileSystem::mount(dev, &options).unwrap()
}

/// Returns the logs of a device.
fn logs(name: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir("/dev/shm").unwrap();
    let paths = all.filter_map(|entry| Some(entry.ok()?.path()));
    let begin = format!("pumice-{name}-");
    paths
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with(&begin)
        })
        .collect()
}

/// Puts a log of an earlier moment in the place of one that a mount may still have in its memory.
fn put_back(log: &[u8], place: &Path) {
    use std::io::Write as _;
    let beside = place.with_extension("earlier");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(&beside).unwrap().write_all(log).unwrap();
    std::fs::rename(&beside, place).unwrap();
}

fn format(device: &Arc<dyn BlockDevice>, journal: Journal) {
    let mut options = FormatOptions::default();
    options.journal = journal;
    FileSystem::format(Arc::clone(device), &options).unwrap();
}

fn formatted() -> (Arc<dyn BlockDevice>, Arc<ErrorDevice>) {
    let base: Arc<dyn BlockDevice> = Arc::new(CrashDevice::new(4096, 16384, true, 5));
    format(&base, Journal::default());
    let device = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
    (base, device)
}

/// Lets what is held back go on, also if the test fails: the end of the process unmounts what is still mounted.
struct Held(Arc<ErrorDevice>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.resume();
    }
}

fn hold_a_write(device: &Arc<ErrorDevice>, range: Option<(u64, u64)>) -> Held {
    device.inject(
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Write))
            .range(range),
    );
    Held(Arc::clone(device))
}

#[test]
fn what_is_appended_during_a_sync_is_kept() {
    let (base, device) = formatted();
    let name = name("sync");
    let killed = ManuallyDrop::new(mount(Named::on(device.clone(), &name)));
    let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
    file.append(&bytes(1000, 1)).unwrap();
    let held = hold_a_write(&device, None);
    let syncing = file.clone();
    let sync = spawn(move || syncing.sync());
    wait_for("a write is held back", || device.injections().is_empty());
    file.append(&bytes(500, 2)).unwrap();
    drop(held);
    sync.join("the sync").unwrap();
    let found = contents(&mount(Named::on(base, &name)), "/file");
    assert!(found == [bytes(1000, 1), bytes(500, 2)].concat());
}

/// The entries of a file are not given up for its clusters before these have its bytes.
#[test]
fn bytes_are_kept_until_they_are_in_their_place() {
    let (base, device) = formatted();
    let name = name("place");
    let killed = ManuallyDrop::new(mount(Named::on(device.clone(), &name)));
    let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
    file.append(&bytes(1000, 1)).unwrap();
    let lba = killed
        .blobstore()
        .extents(file.blob_id())
        .unwrap()
        .lba(0)
        .unwrap();
    let held = hold_a_write(&device, Some((lba, 1)));
    let big = killed.open("/big", OpenOptions::CREATE).unwrap();
    let filling = spawn(move || {
        // The log has no room for all of it, so the file before it is written.
        for n in 0..16 {
            big.append(&bytes(1 << 20, n)).unwrap();
        }
        std::mem::forget(big);
    });
    wait_for("a write is held back", || device.injections().is_empty());
    assert!(filling.still_waits(), "somebody waits for the write");
    let next = mount(Named::on(base, &name));
    assert!(contents(&next, "/file") == bytes(1000, 1));
    next.unmount().unwrap();
    drop(held);
    filling.join("the appends");
}

/// Bytes that were placed and then cut off are no longer needed, nor are their clusters.
#[test]
fn a_file_that_is_cut_after_it_was_placed_keeps_the_rest() {
    for (cut, more) in [(5 << 20, 0), ((8 << 20) + 5, 100), (0, 7), (300, 70_000)] {
        let (base, _device) = formatted();
        let name = name("cut");
        let killed = ManuallyDrop::new(mount(Named::on(Arc::clone(&base), &name)));
        let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
        // It is too long for the log, so it is placed.
        file.append(&bytes(9 << 20, 1)).unwrap();
        file.append(b"behind it").unwrap();
        file.truncate(cut as u64).unwrap();
        file.append(&bytes(more, 2)).unwrap();
        let expected = [&bytes(9 << 20, 1)[..cut], &bytes(more, 2)].concat();
        let shown = look_at(Named::on(Arc::clone(&base), &name));
        assert!(!shown.hides_writes());
        assert!(contents(&shown, "/file") == expected, "cut to {cut}");
        shown.unmount().unwrap();
        let fs = mount(Named::on(base, &name));
        assert!(contents(&fs, "/file") == expected, "cut to {cut}");
    }
}

/// The device has less than was placed, for a cut was made whose end the log does not have. Without its beginning in the log the
/// device was set back.
#[test]
fn a_cut_in_the_middle_of_which_the_process_was_killed_is_made() {
    const CUT: usize = (5 << 20) + 300;
    for is_begun in [true, false] {
        let (base, device) = formatted();
        let name = name(if is_begun { "cutting" } else { "not-cutting" });
        let killed = ManuallyDrop::new(mount(Named::on(device.clone(), &name)));
        let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
        file.append(&bytes(9 << 20, 1)).unwrap();
        let place = logs(&name).remove(0);
        let before = std::fs::read(&place).unwrap();
        let held = hold_a_write(&device, None);
        let cutting = file.clone();
        let cut = spawn(move || cutting.truncate(CUT as u64));
        wait_for("a write is held back", || device.injections().is_empty());
        let meanwhile = std::fs::read(&place).unwrap();
        drop(held);
        cut.join("the cut").unwrap();
        put_back(if is_begun { &meanwhile } else { &before }, &place);
        if !is_begun {
            let refused = FileSystem::mount(Named::on(base, &name), &MountOptions::default());
            let refused = refused.unwrap_err();
            assert!(matches!(refused, FsError::Damaged { .. }), "{refused}");
            continue;
        }
        let expected = &bytes(9 << 20, 1)[..CUT];
        let shown = look_at(Named::on(Arc::clone(&base), &name));
        assert!(contents(&shown, "/file") == expected);
        shown.unmount().unwrap();
        let fs = mount(Named::on(base, &name));
        assert!(contents(&fs, "/file") == expected);
        fs.unmount().unwrap();
    }
}

/// The process is killed when the device has everything and the log does not say so: what it has is done again.
#[test]
fn a_sync_whose_end_was_not_logged_is_harmless() {
    let (base, _device) = formatted();
    let name = name("recorded");
    let killed = ManuallyDrop::new(mount(Named::on(Arc::clone(&base), &name)));
    every_kind(&killed);
    let place = logs(&name).remove(0);
    let log = std::fs::read(&place).unwrap();
    killed.sync().unwrap();
    put_back(&log, &place);
    let shown = look_at(Named::on(Arc::clone(&base), &name));
    assert!(!shown.hides_writes());
    check_every_kind(&shown);
    shown.unmount().unwrap();
    let fs = mount(Named::on(base, &name));
    check_every_kind(&fs);
    fs.unmount().unwrap();
}

/// Data that is too long for the log is placed, also when it is not appended.
#[test]
fn long_data_that_is_written_at_an_offset_is_kept() {
    // Inside, over the end, and behind a gap.
    for (len, at) in [(10 << 20, 10), (100, 50), (100, 200_000)] {
        let (base, _device) = formatted();
        let name = name("long");
        let killed = ManuallyDrop::new(mount(Named::on(Arc::clone(&base), &name)));
        let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
        file.append(&bytes(len, 1)).unwrap();
        file.sync().unwrap();
        file.write_at(at as u64, &bytes(9 << 20, 2)).unwrap();
        let mut expected = bytes(len, 1);
        expected.resize(len.max(at + (9 << 20)), 0);
        expected[at..at + (9 << 20)].copy_from_slice(&bytes(9 << 20, 2));
        let shown = look_at(Named::on(Arc::clone(&base), &name));
        assert!(contents(&shown, "/file") == expected, "shown, {len} {at}");
        shown.unmount().unwrap();
        let fs = mount(Named::on(base, &name));
        assert!(contents(&fs, "/file") == expected, "{len} {at}");
    }
}

/// A file of which the device cannot be read is not shown with what the log has, which the mount says.
#[test]
fn a_read_only_mount_that_cannot_read_a_file_says_that_it_hides_writes() {
    let (base, device) = formatted();
    let name = name("unreadable");
    let killed = ManuallyDrop::new(mount(Named::on(Arc::clone(&base), &name)));
    let file = ManuallyDrop::new(killed.open("/file", OpenOptions::CREATE).unwrap());
    file.append(&bytes(1000, 1)).unwrap();
    file.sync().unwrap();
    // In memory, and in the log.
    file.write_at(500, b"new").unwrap();
    let extents = killed.blobstore().extents(file.blob_id()).unwrap();
    device.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Read))
            .count(u64::MAX)
            .range(Some((extents.lba(0).unwrap(), 8))),
    );
    let shown = look_at(Named::on(device.clone(), &name));
    assert!(shown.hides_writes());
    shown.unmount().unwrap();
    drop(shown);
    device.clear();
    let shown = look_at(Named::on(device, &name));
    assert!(!shown.hides_writes());
    assert_eq!(contents(&shown, "/file")[500..503], *b"new");
}

/// A log that the device does not name counts for nothing, so it is not left behind.
#[test]
fn a_log_that_the_device_does_not_name_is_removed() {
    let (_base, device) = formatted();
    let name = name("unnamed");
    let fs = mount(Named::on(device.clone(), &name));
    let file = fs.open("/file", OpenOptions::CREATE).unwrap();
    device.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX)
            .range(Some((0, 1))),
    );
    file.append(b"accepted").unwrap();
    let left = logs(&name);
    for log in &left {
        std::fs::remove_file(log).unwrap();
    }
    device.clear();
    assert_eq!(left, [] as [PathBuf; 0]);
    assert_eq!(contents(&fs, "/file"), b"accepted");
}

/// Space that a cut has freed belongs to another file by now, so that what came before the cut cannot be done again.
#[test]
fn a_full_device_has_room_for_what_was_not_synced() {
    const MIB: usize = 1 << 20;
    // The first is placed, as what comes after it does not fit into the log; the second is not.
    for (first, left) in [(20, 0), (3, 4)] {
        let (base, _device) = formatted();
        let name = name("full");
        let killed = ManuallyDrop::new(mount(Named::on(Arc::clone(&base), &name)));
        let open = |path: &str| killed.open(path, OpenOptions::CREATE).unwrap();
        if left > 0 {
            let filler = open("/filler");
            filler
                .append(&bytes(
                    usize::try_from(killed.free_bytes()).unwrap() - left * MIB,
                    1,
                ))
                .unwrap();
            filler.sync().unwrap();
        }
        let (cut, big) = (open("/cut"), open("/big"));
        for n in 0..first {
            cut.append(&bytes(MIB, n)).unwrap();
        }
        cut.truncate(0).unwrap();
        cut.append(b"short").unwrap();
        let len = usize::try_from(killed.free_bytes()).unwrap() / MIB - usize::from(left == 0);
        let parts = || (0..=250).cycle().take(len).map(|n| bytes(MIB, n));
        for part in parts() {
            big.append(&part).unwrap();
        }
        std::mem::forget((killed, cut, big));
        let fs = mount(Named::on(base, &name));
        assert_eq!(contents(&fs, "/cut"), b"short");
        assert!(contents(&fs, "/big") == parts().collect::<Vec<_>>().concat());
    }
}

/// A kill leaves bytes in the device's cache. The mount that puts the log in place has a power cut, which loses the log too: a
/// length covers only bytes that are there.
#[test]
fn a_power_cut_while_the_log_is_put_in_place_leaves_no_length_without_its_bytes() {
    for journal in [Journal::None, Journal::Auto] {
        power_cuts_while_the_log_is_put_in_place(journal);
    }
}

fn power_cuts_while_the_log_is_put_in_place(journal: Journal) {
    let name = name("power");
    let device = Arc::new(CrashDevice::new(4096, 16384, true, 5));
    let dynamic: Arc<dyn BlockDevice> = device.clone();
    format(&dynamic, journal);
    let mount =
        |dev: Arc<dyn BlockDevice>| FileSystem::mount(dev, &MountOptions::default()).unwrap();
    let killed = ManuallyDrop::new(mount(Named::on(device.clone(), &name)));
    let open = |path: &str| killed.open(path, OpenOptions::CREATE).unwrap();
    // The first is too long for the log.
    let all = [("/long", 9 << 20), ("/short", 70_000)];
    for (path, len) in all {
        open(path).append(&bytes(len, 1)).unwrap();
    }
    let before = device.len_events();
    let fs = mount(Named::on(device.clone(), &name));
    for (path, len) in all {
        assert!(contents(&fs, path) == bytes(len, 1), "{path}");
    }
    let end = device.len_events();
    fs.unmount().unwrap();
    let mut random = StdRng::seed_from_u64(1);
    for cut in before..=end {
        let fs = mount(Arc::new(device.reopen_after(cut, &mut |_| random.random())));
        for (path, len) in all {
            let found = contents(&fs, path);
            assert!(
                found[..] == bytes(len, 1)[..found.len()],
                "cut {cut}: {path}"
            );
            assert!(cut < end || found.len() == len, "cut {cut}: {path}");
        }
    }
}
