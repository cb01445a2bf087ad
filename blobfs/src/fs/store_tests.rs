//! Tests of files that are written while the blobstore below moves, shares or frees their clusters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, OpKind};

use super::inode::Life;
use super::{File, FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};
use crate::blobstore::check::check;
use crate::blobstore::{BlobId, Blobstore, CreateOptions};

const MIB: u64 = 1 << 20;

fn mount_on(dev: Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

fn mount() -> (FileSystem, Arc<dyn BlockDevice>) {
    let dev = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    (mount_on(Arc::clone(&dev)), dev)
}

fn file(fs: &FileSystem, path: &str, byte: u8, len: u64) -> File {
    let f = fs.open(path, OpenOptions::CREATE).unwrap();
    f.append(&vec![byte; usize::try_from(len).unwrap()])
        .unwrap();
    f.sync().unwrap();
    f
}

fn store(fs: &FileSystem) -> &Blobstore {
    &fs.core().vol.store
}

/// Returns the first `len` bytes of a blob.
fn bytes_of(fs: &FileSystem, id: BlobId, len: u64) -> Vec<u8> {
    let blob = store(fs).open(id).unwrap();
    let len = usize::try_from(len).unwrap();
    blob.read_at(0, DmaBuf::new(len).unwrap()).unwrap().to_vec()
}

/// Reads from the device, without the cache.
fn read(f: &File, off: u64, len: usize) -> Vec<u8> {
    f.invalidate(0, u64::MAX);
    let mut out = vec![0; len];
    assert_eq!(f.read_at(off, &mut out).unwrap(), len);
    out
}

/// Unmounts, checks the store, and mounts again.
fn again(fs: FileSystem, dev: &Arc<dyn BlockDevice>) -> FileSystem {
    fs.unmount().unwrap();
    drop(fs);
    let report = check(dev).unwrap();
    assert_eq!(report.worst(), None, "{:?}", report.findings);
    FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap()
}

#[test]
fn a_snapshot_of_a_file_that_is_written_stays_as_it_is() {
    let (fs, dev) = mount();
    let f = file(&fs, "/f", 1, 2 * MIB);
    let snapshot = store(&fs).snapshot(f.blob_id(), &[]).unwrap();
    // In place, over the end, and with a gap behind it: each kind of write.
    f.write_at(0, &[2; 4096]).unwrap();
    f.write_at(2 * MIB - 100, &[3; 5000]).unwrap();
    f.write_at(9 * MIB, &[4; 100]).unwrap();
    f.sync().unwrap();
    let whole = vec![1; usize::try_from(2 * MIB).unwrap()];
    assert!(bytes_of(&fs, snapshot, 2 * MIB) == whole);
    let expect = |f: &File| {
        assert_eq!(f.len(), 9 * MIB + 100);
        assert_eq!(read(f, 0, 4096), [2; 4096]);
        assert_eq!(read(f, 4096, 4096), [1; 4096]);
        assert_eq!(read(f, 2 * MIB - 200, 100), [1; 100]);
        assert_eq!(read(f, 2 * MIB - 100, 5000), [3; 5000]);
        assert_eq!(read(f, 2 * MIB + 4900, 3000), [0; 3000]);
        assert_eq!(read(f, 9 * MIB - 10, 110)[10..], [4; 100]);
    };
    expect(&f);
    let path = f.path();
    drop(f);
    let fs = again(fs, &dev);
    assert!(bytes_of(&fs, snapshot, 2 * MIB) == whole);
    let f = fs.open(&path, OpenOptions::default()).unwrap();
    expect(&f);
    // A truncation keeps the clusters that the file shares with its snapshot.
    f.truncate(5000).unwrap();
    f.truncate(MIB).unwrap();
    assert_eq!(read(&f, 4096, 2000)[904..], [0; 1096]);
    assert!(bytes_of(&fs, snapshot, 2 * MIB) == whole);
}

#[test]
fn snapshots_beside_writers_stay_as_they_are() {
    let (fs, dev) = mount();
    let f = file(&fs, "/f", 0, 4 * MIB);
    let (stop, round) = (AtomicBool::new(false), AtomicU64::new(1));
    let mut taken = Vec::new();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (f, stop, round) = (&f, &stop, &round);
            scope.spawn(move || {
                let mut at = thread;
                while !stop.load(Ordering::Relaxed) {
                    at = (at * 7 + 3) % 1000;
                    let n = round.fetch_add(1, Ordering::Relaxed);
                    f.write_at(at * 4096, &n.to_le_bytes().repeat(512)).unwrap();
                    if n.is_multiple_of(16) {
                        f.append(&[9; 3000]).unwrap();
                        f.sync().unwrap();
                    }
                }
            });
        }
        for n in 0..6 {
            let from = round.load(Ordering::Relaxed);
            while round.load(Ordering::Relaxed) < from + 20 {
                std::thread::yield_now();
            }
            let id = store(&fs).snapshot(f.blob_id(), &[]).unwrap();
            taken.push((id, bytes_of(&fs, id, 4 * MIB)));
            if n == 3 {
                store(&fs).inflate(f.blob_id()).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    f.sync().unwrap();
    for (id, bytes) in &taken {
        assert!(bytes_of(&fs, *id, 4 * MIB) == *bytes, "snapshot {id}");
    }
    drop(f);
    let fs = again(fs, &dev);
    for (id, bytes) in &taken {
        assert!(bytes_of(&fs, *id, 4 * MIB) == *bytes, "snapshot {id}");
    }
}

/// A snapshot has all of a write that was on its way when it was taken, or nothing of it.
#[test]
fn a_snapshot_waits_for_writes_in_flight() {
    let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let fs = mount_on(Arc::clone(&dev) as Arc<dyn BlockDevice>);
    let f = file(&fs, "/f", 1, 2 * MIB);
    let cluster = fs.blobstore().extents(f.blob_id()).unwrap().lba(0).unwrap();
    dev.inject(
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Write))
            .range(Some((cluster, 1))),
    );
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| f.write_at(0, &[2; 4096]));
        while !dev.injections().is_empty() {
            std::thread::yield_now();
        }
        let snapshot = scope.spawn(|| store(&fs).snapshot(f.blob_id(), &[]));
        std::thread::sleep(Duration::from_millis(50));
        let early = snapshot.is_finished();
        // Before any assertion, which would wait for the writer.
        dev.resume();
        assert!(!early);
        let id = snapshot.join().unwrap().unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(bytes_of(&fs, id, 4096), [2; 4096]);
    });
}

/// A new file is opened with its creation: a later change of the whole store, which the device does
/// not end, keeps nobody from it.
#[test]
fn a_created_file_is_open_before_a_later_change_begins() {
    let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let fs = mount_on(Arc::clone(&dev) as Arc<dyn BlockDevice>);
    drop(file(&fs, "/f", 1, 5000));
    let hang = |range| {
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Write))
            .range(Some(range))
    };
    dev.inject(hang((1, 1000)));
    std::thread::scope(|scope| {
        let creator = scope.spawn(|| fs.open("/f", OpenOptions::FRESH));
        while !dev.injections().is_empty() {
            std::thread::yield_now();
        }
        dev.inject(hang((0, 1)));
        let later = scope.spawn(|| store(&fs).set_super_blob(Some(BlobId::from_page(7))));
        // It waits for the creation.
        std::thread::sleep(Duration::from_millis(50));
        dev.resume();
        let begun = Instant::now();
        while !creator.is_finished() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let in_time = creator.is_finished();
        while !dev.injections().is_empty() {
            std::thread::yield_now();
        }
        dev.resume();
        later.join().unwrap().unwrap();
        assert!(in_time, "it waited for the later change");
        let created = creator.join().unwrap();
        assert_eq!(created.unwrap().len(), 0);
    });
    assert_eq!(fs.open("/f", OpenOptions::READ).unwrap().len(), 0);
}

/// A snapshot, and metadata that moves, come after what the journal owes a file is in its clusters (rules 11 and 22).
#[test]
fn what_the_journal_owes_is_in_place_before_clusters_move() {
    let expected = [[1; 100], [2; 100]].concat();
    type Change = fn(&FileSystem, &File);
    let changes: [(&str, Change); 2] = [
        ("a snapshot", |fs, f| {
            let snapshot = store(fs).snapshot(f.blob_id(), &[]).unwrap();
            let expected = [[1; 100], [2; 100]].concat();
            assert!(bytes_of(fs, snapshot, 4096)[..200] == expected);
        }),
        ("more metadata", |fs, _| {
            let pages = store(fs).super_block().md_len.get();
            assert!(store(fs).grow_md_pages(pages + 1000).unwrap() > pages);
        }),
    ];
    for (what, change) in changes {
        let dev = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
        let format = FormatOptions {
            journal: Journal::Bytes(4 * MIB),
            ..FormatOptions::default()
        };
        FileSystem::format(Arc::clone(&dev), &format).unwrap();
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        let f = file(&fs, "/f", 1, 100);
        f.append(&[2; 100]).unwrap();
        f.sync().unwrap();
        let lba = fs.blobstore().extents(f.blob_id()).unwrap().lba(0).unwrap();
        let on_device = || {
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            let buf = DmaBuf::new(4096).unwrap();
            ch.block_on(ch.read(lba, buf)).unwrap()[..200].to_vec()
        };
        assert!(on_device()[100..] == [0; 100], "{what}: it was not carried");
        change(&fs, &f);
        assert!(on_device() == expected, "{what}");
        drop(f);
        let fs = again(fs, &dev);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        assert!(read(&f, 0, 200) == expected, "{what}");
    }
}

/// Writes that no thread waits for do not block the thread that moves clusters.
#[test]
fn a_snapshot_drives_what_is_in_flight() {
    let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    let slow = Latencies::default()
        .avg_write_us(20_000)
        .p99_write_us(20_000);
    let fs = mount_on(Arc::new(Delay::new("slow", base, slow)));
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![1; usize::try_from(3 * MIB).unwrap()])
        .unwrap();
    let start = Instant::now();
    store(&fs).snapshot(f.blob_id(), &[]).unwrap();
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_file_whose_clusters_were_taken_writes_into_no_other() {
    let (fs, _dev) = mount();
    let f = file(&fs, "/f", 1, 3 * MIB);
    store(&fs).open(f.blob_id()).unwrap().resize(0).unwrap();
    let g = file(&fs, "/g", 9, 3 * MIB);
    let refused = f.write_at(0, &[2; 8192]).and_then(|()| f.sync());
    assert!(matches!(refused, Err(FsError::Store { .. })), "{refused:?}");
    f.invalidate(0, u64::MAX);
    assert!(f.read_at(0, &mut [0; 100]).is_err());
    assert_eq!(read(&g, 0, 8192), [9; 8192]);
}

#[test]
fn a_file_that_was_made_read_only_is_not_written() {
    let (fs, _dev) = mount();
    let f = file(&fs, "/f", 1, 2 * MIB);
    store(&fs).set_read_only(f.blob_id()).unwrap();
    for refused in [f.write_at(0, &[2; 10]), f.append(&[2; 10 << 20])] {
        assert!(
            matches!(refused, Err(FsError::ReadOnly { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(read(&f, 0, 4096), [1; 4096]);
}

/// A file is deleted although a readahead is in flight that nobody waits for.
#[test]
fn reads_ahead_do_not_keep_a_file() {
    let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    let slow = Latencies::default().avg_read_us(20_000).p99_read_us(20_000);
    let fs = mount_on(Arc::new(Delay::new("slow", base, slow)));
    for unlinked_first in [false, true] {
        let f = file(&fs, "/f", 1, 2 * MIB);
        let free = fs.free_bytes();
        f.invalidate(0, u64::MAX);
        f.prefetch(0, 2 * MIB).unwrap();
        if unlinked_first {
            fs.unlink("/f").unwrap();
            drop(f);
        } else {
            drop(f);
            fs.unlink("/f").unwrap();
        }
        assert_eq!(fs.free_bytes(), free + 2 * MIB);
    }
}

/// A thread that looks for clusters that files hold ahead looks at the blobs of all files, without their locks.
#[test]
fn a_file_is_deleted_while_another_thread_looks_at_it() {
    let (fs, dev) = mount();
    let free = fs.statfs().free;
    let inode = |f: &File| {
        let inodes = fs.core().names.inodes();
        let ino = inodes.into_iter().find(|ino| ino.id == f.blob_id());
        ino.unwrap()
    };
    let while_looked_at = |ino: &Arc<super::inode::Inode>, delete: &(dyn Fn() + Sync)| {
        let look = ino.blob.load();
        std::thread::scope(|scope| {
            let deletes = scope.spawn(delete);
            std::thread::sleep(Duration::from_millis(50));
            drop(look);
            deletes.join().unwrap();
        });
    };
    let f = file(&fs, "/closed", 1, MIB);
    let ino = inode(&f);
    drop(f);
    while_looked_at(&ino, &|| fs.unlink("/closed").unwrap());
    let f = file(&fs, "/open", 1, MIB);
    let ino = inode(&f);
    fs.unlink("/open").unwrap();
    let f = parking_lot::Mutex::new(Some(f));
    while_looked_at(&ino, &|| drop(f.lock().take()));
    let (old, new) = (file(&fs, "/old", 1, MIB), file(&fs, "/new", 2, MIB));
    let ino = inode(&old);
    drop((old, new));
    while_looked_at(&ino, &|| fs.rename("/new", "/old").unwrap());
    fs.unlink("/old").unwrap();
    assert_eq!(fs.statfs().free, free);
    drop(ino);
    again(fs, &dev).unmount().unwrap();
}

/// A thread that makes room in the log in shared memory holds a file beside the loss of its last name.
#[test]
fn a_file_becomes_an_orphan_before_or_after_it_is_held() {
    let (fs, dev) = mount();
    let f = file(&fs, "/f", 1, MIB);
    let ino = Arc::clone(f.ino());
    let names = Arc::clone(&fs.core().names);
    let orphans = names.orphans.lock();
    std::thread::scope(|scope| {
        let unlink = scope.spawn(|| fs.unlink("/f").unwrap());
        while names.get("/f").is_some() {
            std::thread::yield_now();
        }
        // As `Names::hold` does, which has found it with its name.
        let map = names.map.read();
        assert_eq!(ino.life.load(), Life::Named);
        drop(orphans);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(ino.life.load(), Life::Named, "it may be deleted at once");
        drop(map);
        unlink.join().unwrap();
    });
    assert!(!names.hold(&ino));
    drop((f, ino, names));
    again(fs, &dev).unmount().unwrap();
}

/// The table of a file's frames has an end, and a thin file may be longer.
#[test]
fn a_file_that_is_longer_than_its_table_is_read_and_not_lengthened() {
    const TIB: u64 = 1 << 40;
    let (fs, dev) = mount();
    let clusters = 200 * TIB / fs.core().vol.cluster;
    let options = CreateOptions::default()
        .num_clusters(clusters)
        .thin(true)
        .extent_table(false)
        .xattrs(vec![
            ("name".to_owned(), b"/thin\0".to_vec()),
            ("length".to_owned(), (200 * TIB).to_le_bytes().to_vec()),
        ]);
    store(&fs).create(&options).unwrap();
    let fs = again(fs, &dev);
    let f = fs.open("/thin", OpenOptions::CREATE).unwrap();
    assert_eq!(f.len(), 200 * TIB);
    let mut out = [1; 100];
    assert_eq!(f.read_at(199 * TIB + 5, &mut out).unwrap(), 100);
    assert_eq!(out, [0; 100]);
    f.prefetch(199 * TIB, 100).unwrap();
    f.write_at(199 * TIB + 5, &[2; 100]).unwrap();
    assert_eq!(f.read_at(199 * TIB + 5, &mut out).unwrap(), 100);
    assert_eq!(out, [2; 100]);
    for refused in [f.append(b"x"), f.truncate(150 * TIB), f.truncate(u64::MAX)] {
        assert!(
            matches!(refused, Err(FsError::InvalidInput { .. })),
            "{refused:?}"
        );
    }
    f.sync().unwrap();
    drop(f);
    fs.unlink("/thin").unwrap();
    again(fs, &dev).unmount().unwrap();
}
