//! What was acknowledged is there, and what failed has changed nothing. There is one test for each
//! way in which a failing device, or the lack of space, has broken that.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use pumice_bdev::OpKind;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_blobfs::fs::{
    Access, FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions,
};

const MIB: usize = 1 << 20;

const FOREVER: u64 = u64::MAX;

fn options(write_behind_bytes: usize) -> MountOptions {
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = write_behind_bytes;
    opts
}

fn setup(journal: Journal, write_behind_bytes: usize) -> (Arc<ErrorDevice>, FileSystem) {
    let base = memory(64 << 20, 4096);
    setup_with(base, &format_1m(journal), &options(write_behind_bytes))
}

/// Makes a mount with small clusters and few metadata pages.
fn setup_small(journal: Journal, md_pages: u32) -> (Arc<ErrorDevice>, FileSystem) {
    let mut format = FormatOptions::default();
    format.cluster_size = 64 << 10;
    format.md_pages = Some(md_pages);
    format.journal = journal;
    setup_with(memory(32 << 20, 4096), &format, &MountOptions::default())
}

/// As `data_blocks`, with the clusters and metadata pages of `setup_small`.
fn small_data_blocks(journal: Journal) -> Option<(u64, u64)> {
    let ring = if journal == Journal::None { 0 } else { 128 };
    Some((32 + ring, 1 << 20))
}

#[test]
fn an_append_of_several_mib_that_fails_changes_nothing() {
    let _limit = watchdog("a long append that fails", 120);
    for journal in KINDS {
        // Writes are waited for, or so many are kept in memory that it takes long to fail.
        for write_behind in [1, 4 * MIB] {
            let (dev, fs) = setup(journal, write_behind);
            let f = fs.open("/f", OpenOptions::CREATE).unwrap();
            f.allocate(0, 24 << 20).unwrap();
            f.append(&[1; 10_000]).unwrap();
            dev.inject(fail(OpKind::Write, FOREVER, None));
            f.append(&vec![2; 12 * MIB]).unwrap_err();
            assert_eq!(f.len(), 10_000);
            assert!(all(&f) == [1; 10_000]);
            dev.clear();
            f.append(&vec![3; 200_000]).unwrap();
            f.sync().unwrap();
            drop(f);
            let fs = again(&dev, fs);
            let want = [vec![1; 10_000], vec![3; 200_000]].concat();
            assert!(content_of(&fs, "/f") == want, "{write_behind}");
        }
    }
}

#[test]
fn a_failed_append_leaves_nothing_behind_that_cannot_be_written() {
    let _limit = watchdog("a failed append, closed", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 1);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&[1; 100]).unwrap();
        f.sync().unwrap();
        dev.inject(fail(OpKind::Write, 100, data_blocks(journal)));
        f.append(&vec![2; 8 * MIB]).unwrap_err();
        drop(f);
        dev.clear();
        fs.sync().unwrap();
        let fs = again(&dev, fs);
        assert_eq!(content_of(&fs, "/f"), [1; 100]);
    }
}

#[test]
fn a_gap_after_a_failed_append_is_zeroes() {
    let _limit = watchdog("a gap after a failed append", 120);
    for journal in KINDS {
        for gap in [100, 3 * MIB, 9 * MIB] {
            let (dev, fs) = setup(journal, 1);
            let f = fs.open("/f", OpenOptions::CREATE).unwrap();
            f.append(&[1; 100]).unwrap();
            f.sync().unwrap();
            dev.inject(fail(OpKind::Write, FOREVER, data_blocks(journal)));
            f.append(&vec![2; 8 * MIB]).unwrap_err();
            dev.clear();
            f.write_at(100 + gap as u64, &[3; 10]).unwrap();
            let want = [vec![1; 100], vec![0; gap], vec![3; 10]].concat();
            assert!(all(&f) == want, "{gap}");
            f.sync().unwrap();
            f.invalidate(0, u64::MAX);
            assert!(all(&f) == want, "{gap}");
            drop(f);
            let fs = again(&dev, fs);
            assert!(content_of(&fs, "/f") == want, "{gap}");
        }
    }
}

#[test]
fn a_failed_write_stays_in_memory_through_a_failed_append_and_a_close() {
    let _limit = watchdog("a failed write, a failed append, a close", 120);
    for journal in KINDS {
        // The second case is a write past the end, whose gap fails.
        for past_the_end in [false, true] {
            let mut opts = MountOptions::default();
            opts.cache_bytes = 64 << 10;
            let (dev, fs) = setup_with(memory(64 << 20, 4096), &format_1m(journal), &opts);
            let f = fs.open("/f", OpenOptions::CREATE).unwrap();
            f.allocate(0, 16 << 20).unwrap();
            f.append(&[1; 76]).unwrap();
            let g = fs.open("/g", OpenOptions::CREATE).unwrap();
            g.append(&vec![9; 2 * MIB]).unwrap();
            g.sync().unwrap();
            dev.inject(fail(OpKind::Write, FOREVER, data_blocks(journal)));
            f.sync().unwrap_err();
            let failed = if past_the_end {
                f.write_at(2_000_000, &[2; 10])
            } else {
                f.append(&vec![2; 1_500_000])
            };
            failed.unwrap_err();
            drop(f);
            dev.clear();
            // This passes through the cache.
            assert!(all(&g) == vec![9; 2 * MIB]);
            let f = fs.open("/f", OpenOptions::READ).unwrap();
            assert_eq!(all(&f), [1; 76]);
            f.append(&[3; 10]).unwrap();
            f.sync().unwrap();
            drop((f, g));
            let fs = again(&dev, fs);
            let want = [vec![1; 76], vec![3; 10]].concat();
            assert_eq!(content_of(&fs, "/f"), want);
        }
    }
}

#[test]
fn a_buffer_that_replaces_another_keeps_what_is_on_its_way_in_memory() {
    let _limit = watchdog("a replaced buffer with a write on its way", 120);
    for journal in KINDS {
        let mut opts = MountOptions::default();
        opts.cache_bytes = 0;
        let (dev, fs) = setup_with(memory(64 << 20, 4096), &format_1m(journal), &opts);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        // No more than the file needs: a close that frees clusters waits for its writes.
        f.allocate(0, MIB as u64).unwrap();
        f.append(&[1; 40_960]).unwrap();
        dev.inject(hang(OpKind::Write, 1, data_blocks(journal)));
        f.range_sync(0, 40_960).unwrap();
        // The small buffer becomes a large one.
        f.append(&[2; 40_960]).unwrap();
        drop(f);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        let want = [vec![1; 40_960], vec![2; 40_960]].concat();
        assert!(all(&f) == want, "the first write has not arrived yet");
        dev.resume();
        f.sync().unwrap();
        assert!(all(&f) == want);
    }
}

#[test]
fn a_read_that_is_overtaken_by_a_truncation_ends() {
    let _limit = watchdog("a read and a truncation", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 1);
        let len = MIB + 100_000;
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![7; len]).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        dev.inject(hang(OpKind::Read, 1, None));
        f.prefetch(0, 4096).unwrap();
        let reader = {
            let f = f.clone();
            thread::spawn(move || f.read_at(0, &mut vec![0; len]).unwrap())
        };
        thread::sleep(Duration::from_millis(100));
        // The truncation waits for the readahead, whose clusters it frees.
        let cutter = {
            let f = f.clone();
            thread::spawn(move || f.truncate((MIB + 5050) as u64))
        };
        while f.len() == len as u64 {
            thread::yield_now();
        }
        dev.resume();
        cutter.join().unwrap().unwrap();
        assert_eq!(reader.join().unwrap(), MIB + 5050);
    }
}

#[test]
fn a_page_that_was_cut_short_by_an_old_end_of_the_file_hangs_nobody() {
    let _limit = watchdog("a short page", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 1);
        let len = 2 * MIB + 5000;
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; len]).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        // A readahead and a read of the last page are in flight while the file grows. It has its
        // clusters already: freeing some would wait for the reads.
        f.allocate(0, 5 * MIB as u64).unwrap();
        dev.inject(hang(OpKind::Read, 2, None));
        f.prefetch(0, 4096).unwrap();
        let last = f.read_async(2 << 20, 5000).unwrap();
        let reader = {
            let f = f.clone();
            thread::spawn(move || f.read_at(0, &mut vec![0; len]).unwrap())
        };
        thread::sleep(Duration::from_millis(100));
        f.append(&vec![2; 2 * MIB]).unwrap();
        f.sync().unwrap();
        f.invalidate(0, u64::MAX);
        dev.resume();
        assert_eq!(reader.join().unwrap(), len);
        assert_eq!(last.read_into(&mut [0; 5000]).unwrap(), 5000);
        let mut out = [0; 10];
        assert_eq!(f.read_at(len as u64, &mut out).unwrap(), 10);
        assert_eq!(out, [2; 10]);
    }
}

#[test]
fn a_replacement_that_fails_throws_nothing_away() {
    let _limit = watchdog("a replacement that fails", 120);
    for journal in KINDS {
        for unlink in [false, true] {
            let (dev, fs) = setup_small(journal, 24);
            let f = fs.open("/f", OpenOptions::CREATE).unwrap();
            f.append(&[1; 100]).unwrap();
            f.sync().unwrap();
            dev.inject(fail(OpKind::Write, FOREVER, small_data_blocks(journal)));
            // Too much for the journal to carry.
            f.append(&[2; 80_000]).unwrap();
            f.sync().unwrap_err();
            f.append(&[3; 100]).unwrap();
            drop(f);
            // Neither of them can be committed.
            dev.inject(fail(OpKind::Write, FOREVER, None));
            if unlink {
                fs.unlink("/f").unwrap_err();
            } else {
                fs.open("/f", OpenOptions::FRESH).unwrap_err();
            }
            dev.clear();
            let want = [&[1; 100][..], &[2; 80_000], &[3; 100]].concat();
            assert_eq!(content_of(&fs, "/f"), want);
            let synced = fs.open("/f", OpenOptions::READ).unwrap().sync();
            if synced.is_ok() && fs.unmount().is_ok() {
                drop(fs);
                let fs = mount_with(&dev, &MountOptions::default());
                assert_eq!(content_of(&fs, "/f"), want);
            }
        }
    }
}

#[test]
fn a_replacement_that_is_refused_throws_nothing_away() {
    let _limit = watchdog("a replacement that is refused", 120);
    for journal in KINDS {
        let (dev, fs) = setup_small(journal, 24);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&[1; 100]).unwrap();
        let mut n = 0;
        while fs.open(&format!("/{n}"), OpenOptions::CREATE).is_ok() {
            n += 1;
        }
        dev.inject(fail(OpKind::Write, FOREVER, small_data_blocks(journal)));
        f.sync().unwrap_err();
        f.append(&[2; 100]).unwrap();
        drop(f);
        let refused = fs.open("/f", OpenOptions::FRESH);
        dev.clear();
        if refused.is_err() {
            fs.open("/f", OpenOptions::READ).unwrap().sync().unwrap();
            fs.unlink("/0").unwrap();
            let fs = again(&dev, fs);
            assert_eq!(content_of(&fs, "/f"), [[1; 100], [2; 100]].concat());
        }
    }
}

#[test]
fn a_refused_rename_of_a_directory_is_not_done_by_the_next_mount() {
    let _limit = watchdog("a refused rename", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 1);
        fs.mkdir("/d").unwrap();
        drop(fs.open("/d/f", OpenOptions::CREATE).unwrap());
        let mut n = 0;
        while fs
            .link("/d/f", &format!("/d/{}{n}", "y".repeat(90)))
            .is_ok()
        {
            n += 1;
        }
        let long = format!("/{}", "z".repeat(60));
        fs.rename("/d", &long).unwrap_err();
        let fs = again(&dev, fs);
        assert!(fs.exists("/d/f").unwrap());
        assert!(!fs.exists(&long).unwrap());
    }
}

#[test]
fn allocated_space_is_kept_for_its_file() {
    for journal in KINDS {
        let (_dev, fs) = setup(journal, 1);
        let a = fs.open("/a", OpenOptions::CREATE).unwrap();
        let b = fs.open("/b", OpenOptions::CREATE).unwrap();
        a.allocate(0, 8 << 20).unwrap();
        while b.append(&vec![2; MIB]).is_ok() {}
        assert_eq!(a.allocated(), 8 << 20);
        a.append(&vec![1; 8 * MIB]).unwrap();
        // What is left when the file has been closed may belong to anybody.
        let c = fs.open("/c", OpenOptions::CREATE).unwrap();
        fs.unlink("/a").unwrap();
        drop(a);
        c.allocate(0, 7 << 20).unwrap();
        drop(c);
        b.append(&vec![2; 2 * MIB]).unwrap();
    }
}

#[test]
fn an_extension_that_fails_leaves_the_length() {
    let _limit = watchdog("a failed extension", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 32 * MIB);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&[1; 100]).unwrap();
        f.allocate(0, 30 << 20).unwrap();
        type Extend = fn(&pumice_blobfs::fs::File) -> Result<(), FsError>;
        let ways: [Extend; 2] = [|f| f.truncate(20 << 20), |f| f.write_at(20 << 20, &[2])];
        for extend in ways {
            dev.inject(fail(OpKind::WriteZeroes, 1, None));
            extend(&f).unwrap_err();
            assert_eq!(f.len(), 100);
            f.append(&[3; 10]).unwrap();
            assert_eq!(all(&f), [vec![1; 100], vec![3; 10]].concat());
            f.truncate(100).unwrap();
            f.allocate(0, 30 << 20).unwrap();
        }
        f.truncate(20 << 20).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let want = [vec![1; 100], vec![0; (20 << 20) - 100]].concat();
        assert!(content_of(&fs, "/f") == want);
    }
}

#[test]
fn nobody_waits_for_a_writer_to_learn_of_a_file() {
    let _limit = watchdog("stat beside a slow writer", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 1);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 16 << 20).unwrap();
        dev.inject(hang(OpKind::Write, FOREVER, data_blocks(journal)));
        let writer = {
            let f = f.clone();
            thread::spawn(move || f.append(&vec![1; 4 * MIB]))
        };
        // This thread holds the append lock until the device continues, which it does only after all of
        // this.
        while f.allocated() == 0 || dev.injections()[0].count == FOREVER {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(50));
        assert!(fs.exists("/f").unwrap());
        assert_eq!(fs.stat("/f").unwrap().allocated, 16 << 20);
        f.set_direct(true);
        f.advise(Access::NoReuse);
        fs.statfs();
        fs.rename("/f", "/g").unwrap();
        fs.list("/").unwrap();
        dev.clear();
        while !writer.is_finished() {
            dev.resume();
            thread::yield_now();
        }
        writer.join().unwrap().unwrap();
    }
}

#[test]
fn a_block_that_cannot_be_written_stops_neither_truncation_nor_unmount() {
    let _limit = watchdog("a bad block", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 32 * MIB);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&[1; 5000]).unwrap();
        f.sync().unwrap();
        dev.inject(fail(OpKind::Write, FOREVER, data_blocks(journal)));
        f.append(&vec![2; 2 * MIB]).unwrap();
        f.sync().unwrap_err();
        let error = fs.unmount().unwrap_err();
        assert!(error.to_string().contains("/f"), "{error}");
        // What cannot be written is dropped.
        f.truncate(5000).unwrap();
        assert_eq!(all(&f), [1; 5000]);
        f.append(&vec![3; 2 * MIB]).unwrap();
        f.sync().unwrap_err();
        f.truncate(0).unwrap();
        f.sync().unwrap();
        drop(f);
        // The same holds for what was not cut off when the mount must end.
        let f = fs.open("/g", OpenOptions::CREATE).unwrap();
        f.append(&[1; 5000]).unwrap();
        fs.unmount().unwrap_err();
        let lost = fs.unmount_anyway().unwrap();
        assert_eq!(lost.len(), 1);
        assert!(lost[0].to_string().contains("/g"), "{}", lost[0]);
        drop((f, fs));
        dev.clear();
        let fs = mount_with(&dev, &MountOptions::default());
        assert_eq!(fs.problems(), [] as [String; 0]);
        assert_eq!(content_of(&fs, "/f").len(), 0);
        assert_eq!(content_of(&fs, "/g").len(), 0);
    }
}

#[test]
fn after_a_passing_fault_truncate_and_write_at_try_again() {
    let _limit = watchdog("a passing fault", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal, 32 * MIB);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; MIB + 100]).unwrap();
        dev.inject(fail(OpKind::Write, 2, data_blocks(journal)));
        f.sync().unwrap_err();
        dev.clear();
        f.write_at(10, &[2; 10]).unwrap();
        dev.inject(fail(OpKind::Write, 2, data_blocks(journal)));
        f.append(&[3; 10]).unwrap();
        f.sync().unwrap_err();
        dev.clear();
        f.truncate((MIB + 50) as u64).unwrap();
        f.sync().unwrap();
        let want = [vec![1; 10], vec![2; 10], vec![1; MIB + 30]].concat();
        assert!(all(&f) == want);
        drop(f);
        let fs = again(&dev, fs);
        assert!(content_of(&fs, "/f") == want);
    }
}

#[test]
fn overwritten_pages_leave_the_cache() {
    for journal in KINDS {
        let mut opts = MountOptions::default();
        opts.cache_bytes = 4 << 20;
        let (dev, fs) = setup_with(memory(128 << 20, 4096), &format_1m(journal), &opts);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        for _ in 0..40 {
            f.append(&vec![1; MIB]).unwrap();
        }
        f.sync().unwrap();
        drop(f);
        fs.unmount().unwrap();
        drop(fs);
        let fs = mount_with(&dev, &opts);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        f.advise(Access::Random);
        for i in 0..8u64 {
            f.write_at(i << 20, &vec![2; MIB]).unwrap();
            f.read_at(i << 20, &mut [0; 10]).unwrap();
        }
        let before = fs.cache_stats().hits;
        for place in 20..24u64 {
            for _ in 0..10 {
                f.read_at(place << 20, &mut [0; 10]).unwrap();
            }
        }
        assert!(
            fs.cache_stats().hits - before >= 36,
            "{:?}",
            fs.cache_stats()
        );
    }
}

#[test]
fn a_full_host_is_told_to_the_next_append() {
    let _limit = watchdog("a full host", 120);
    for journal in KINDS {
        let full = Arc::new(AtomicBool::new(false));
        let base = Less::with_host(memory(64 << 20, 4096), &full);
        let (dev, fs) = setup_with(base, &format_1m(journal), &MountOptions::default());
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 16 << 20).unwrap();
        f.append(&[1; 100]).unwrap();
        full.store(true, Ordering::Release);
        // A second buffer may be filled before it is known that there is no space for the first.
        let taken = (0..8)
            .take_while(|_| f.append(&vec![2; MIB]).is_ok())
            .count();
        assert!(taken <= 2, "{taken} MiB were taken");
        let error = f.append(&vec![2; MIB]).unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC, "{error}");
        full.store(false, Ordering::Release);
        f.append(&[3; 100]).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let want = [vec![1; 100], vec![2; taken * MIB], vec![3; 100]].concat();
        assert!(content_of(&fs, "/f") == want);
    }
}

/// Returns the block of the root page of a file or directory.
fn root_block(fs: &FileSystem, path: &str) -> (u64, u64) {
    let id = fs.stat(path).unwrap().blob_id.unwrap();
    let md_start = u64::from(fs.blobstore().super_block().md_start.get());
    (md_start + (id.0 & 0xffff_ffff), 1)
}

/// Whether the error says that the change may have been made all the same.
fn is_open(e: &FsError) -> bool {
    e.to_string().contains("open")
}

#[test]
fn a_rename_that_failed_is_not_done_by_the_next_mount_unless_it_said_so() {
    let _limit = watchdog("a failed rename", 120);
    for journal in KINDS {
        for how in ["rename", "fresh", "directory"] {
            let (dev, fs) = setup(journal, 1);
            fs.mkdir("/d").unwrap();
            for (path, text) in [("/a", "A"), ("/b", "B"), ("/d/f", "F")] {
                let f = fs.open(path, OpenOptions::CREATE).unwrap();
                f.append(text.as_bytes()).unwrap();
                f.sync().unwrap();
            }
            let bad = if how == "directory" { "/d/f" } else { "/b" };
            dev.inject(fail(OpKind::Write, 1, Some(root_block(&fs, bad))));
            let error = match how {
                "rename" => fs.rename("/a", "/b"),
                "fresh" => fs.open("/b", OpenOptions::FRESH).map(drop),
                _ => fs.rename("/d", "/e"),
            };
            dev.clear();
            // Erasing what has lost its name may fail without harm.
            let Err(error) = error else { continue };
            let names = |fs: &FileSystem| -> Vec<String> {
                let paths = ["/a", "/b", "/d/f", "/e/f"];
                let there = paths.iter().filter(|p| fs.exists(p).unwrap());
                there
                    .map(|p| format!("{p} {:?}", content_of(fs, p)))
                    .collect()
            };
            let before = ["/a [65]", "/b [66]", "/d/f [70]"];
            assert_eq!(names(&fs), before, "{how}: {error}");
            let _ = fs.unmount();
            drop(fs);
            let fs = mount_with(&dev, &MountOptions::default());
            if !is_open(&error) {
                assert_eq!(names(&fs), before, "{how}: {error}");
            }
        }
    }
}
