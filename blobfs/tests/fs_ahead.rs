//! Reads in advance: what is in flight is neither read again nor waited for in vain.

mod common;

use std::sync::Arc;

use common::faults::{fail, setup_with};
use common::memory;
use pumice_bdev::OpKind;
use pumice_bdev::delay::{Delay, Latencies};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, MountOptions, OpenOptions, ReadRequest};

const MIB: u64 = 1 << 20;

/// Returns a file of `len` bytes that is not in memory, on a device whose reads take a while.
fn cold_file(len: u64, options: &MountOptions) -> (FileSystem, File) {
    let dev = memory(64 * MIB, 4096);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
    let file = fs.open("/f", OpenOptions::CREATE).unwrap();
    let bytes: Vec<u8> = (0..len).map(byte_at).collect();
    file.append(&bytes).unwrap();
    file.sync().unwrap();
    drop(file);
    fs.unmount().unwrap();
    drop(fs);
    let slow = Latencies::default().avg_read_us(500).p99_read_us(500);
    let dev = Delay::new("slow", dev, slow);
    let fs = FileSystem::mount(Arc::new(dev), options).unwrap();
    let file = fs.open("/f", OpenOptions::READ).unwrap();
    (fs, file)
}

fn byte_at(offset: u64) -> u8 {
    u8::try_from(offset.wrapping_mul(2_654_435_761) >> 13 & 255).unwrap()
}

fn check(offset: u64, bytes: &[u8]) {
    for (at, byte) in (offset..).zip(bytes) {
        assert_eq!(*byte, byte_at(at), "at {at}");
    }
}

/// RocksDB's iterator asks for a window in advance, which doubles up to 256 KiB, and reads each
/// block by `MultiRead` (`BlockPrefetcher` of RocksDB 11.8).
#[test]
fn an_iterator_reads_each_byte_once_and_in_large_steps() {
    let len = 8 * MIB;
    let (fs, file) = cold_file(len, &MountOptions::default());
    let before = fs.io_stats();
    let (mut window, mut limit) = (8 << 10, 0);
    let mut block = vec![0; 4101];
    let mut at = 0;
    while at + 4101 <= len {
        if at + 4101 > limit {
            file.prefetch(at, 4101 + window).unwrap();
            limit = at + 4101 + window;
            window = (window * 2).min(256 << 10);
        }
        let mut requests = [ReadRequest::new(at, &mut block)];
        file.read_many(&mut requests);
        let [request] = requests;
        assert_eq!(request.result.unwrap(), 4101);
        check(at, &block);
        at += 4101;
    }
    let io = fs.io_stats().since(&before);
    assert!(io.read_bytes <= len + 64 * 1024, "{io:?}");
    // A window that crosses one of the regions into which memory is divided takes two.
    assert!(io.reads <= len / (256 << 10) + len / MIB + 8, "{io:?}");
}

#[test]
fn reads_of_what_is_in_flight_reach_the_device_once() {
    let (fs, file) = cold_file(4 * MIB, &MountOptions::default());
    let before = fs.io_stats();
    file.prefetch(0, MIB).unwrap();
    let ahead = file.read_async(200_000, 50_000).unwrap();
    let offsets = [0, 5000, 70_000, 900_000, MIB - 100, 2 * MIB, 3 * MIB + 77];
    let mut bufs = [[0; 100]; 7];
    let mut requests: Vec<_> = offsets
        .iter()
        .zip(&mut bufs)
        .map(|(off, buf)| ReadRequest::new(*off, buf))
        .collect();
    file.read_many(&mut requests);
    for r in requests {
        assert_eq!(r.result.unwrap(), 100);
        check(r.off, r.buf);
    }
    file.prefetch(100_000, 500_000).unwrap();
    let mut out = vec![0; 50_000];
    assert_eq!(ahead.read_into(&mut out).unwrap(), 50_000);
    check(200_000, &out);
    let io = fs.io_stats().since(&before);
    assert_eq!(io.read_bytes, MIB + 2 * 4096, "{io:?}");

    // A read may reach beyond the end.
    let before = fs.io_stats();
    file.prefetch(3 * MIB + 500_000, MIB).unwrap();
    let ahead = file.read_async(4 * MIB - 1000, 50_000).unwrap();
    assert_eq!(ahead.read_into(&mut out).unwrap(), 1000);
    check(4 * MIB - 1000, &out[..1000]);
    let read = fs.io_stats().since(&before).read_bytes;
    assert_eq!(read, MIB - 500_000 / 4096 * 4096, "{read}");
}

/// A window that begins inside one in flight reads the rest of it, and not nothing.
#[test]
fn windows_that_overlap_are_joined() {
    let (fs, file) = cold_file(4 * MIB, &MountOptions::default());
    let before = fs.io_stats();
    file.prefetch(300_000, 100_000).unwrap();
    file.prefetch(100_000, 50_000).unwrap();
    file.prefetch(120_000, 500_000).unwrap();
    file.prefetch(90_000, 600_000).unwrap();
    let started = fs.io_stats().since(&before);
    let pages = |from: u64, to: u64| to.next_multiple_of(4096) - from / 4096 * 4096;
    assert_eq!(started.read_bytes, pages(90_000, 690_000), "{started:?}");
    let mut out = vec![0; 600_000];
    assert_eq!(file.read_at(90_000, &mut out).unwrap(), 600_000);
    check(90_000, &out);
    assert_eq!(fs.io_stats().since(&before).reads, started.reads);
}

/// Reads a page at a time from the start, and returns the bytes that the device was asked for.
fn read_pages(fs: &FileSystem, file: &File, pages: u64) -> u64 {
    let before = fs.io_stats();
    let mut page = vec![0; 4096];
    for at in (0..pages).map(|page| page * 4096) {
        assert_eq!(file.read_at(at, &mut page).unwrap(), 4096);
        check(at, &page);
    }
    fs.io_stats().since(&before).read_bytes
}

#[test]
fn the_first_window_is_64_kib_and_windows_grow_to_what_the_options_say() {
    let (fs, file) = cold_file(8 * MIB, &MountOptions::default());
    assert_eq!(read_pages(&fs, &file, 1), 4096, "one read tells nothing");
    assert_eq!(read_pages(&fs, &file, 2), 4096 + (64 << 10));
    // What those reads have not brought in yet, at least.
    assert!(read_pages(&fs, &file, 1024) >= 4 * MIB - (68 << 10));
    assert!(read_pages(&fs, &file, 1024) == 0, "all of it is in memory");

    let mut narrow = MountOptions::default();
    narrow.read_ahead_bytes = 16 << 10;
    let (fs, file) = cold_file(8 * MIB, &narrow);
    for pages in [2, 10, 100, 1000] {
        let before = fs.io_stats();
        read_pages(&fs, &file, pages);
        file.invalidate(0, u64::MAX);
        let asked = fs.io_stats().since(&before).read_bytes;
        assert!(asked <= pages * 4096 + (16 << 10), "{pages}: {asked}");
    }
}

/// Memory for what is in flight is not the cache's, so it has a bound of its own.
#[test]
fn what_is_read_in_advance_is_bounded() {
    let mut options = MountOptions::default();
    options.cache_bytes = 4 << 20;
    options.cache_most_bytes = None;
    let (fs, file) = cold_file(32 * MIB, &options);
    let before = fs.io_stats();
    file.prefetch(0, u64::MAX).unwrap();
    let io = fs.io_stats().since(&before);
    assert_eq!(io.read_bytes, 2 * MIB, "{io:?}");
    let mut out = vec![0; 3 << 20];
    assert_eq!(file.read_at(7, &mut out).unwrap(), 3 << 20);
    check(7, &out);
}

/// Bytes that a truncation has removed are not read, so the device's error does not count.
#[test]
fn an_error_of_what_was_cut_off_is_not_told() {
    let (dev, fs) = setup_with(
        memory(16 * MIB, 4096),
        &FormatOptions::default(),
        &MountOptions::default(),
    );
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[7; 8192]).unwrap();
    f.sync().unwrap();
    drop(f);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.invalidate(0, u64::MAX);
    let mut out = [0; 100];
    for cut in [false, true] {
        dev.inject(fail(OpKind::Read, 1, None));
        let read = f.read_async(4096, 100).unwrap();
        read.wait();
        if cut {
            f.truncate(4100).unwrap();
        }
        let read = read.read_into(&mut out);
        assert!(
            if cut {
                matches!(read, Ok(4))
            } else {
                read.is_err()
            },
            "{read:?}"
        );
    }
}
