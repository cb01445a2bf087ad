//! Tests of files and names, before and after a remount.

mod common;
#[path = "fs_basic/writes.rs"]
mod writes;

use std::sync::Arc;

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, DmaBuf, OpKind};
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};
use pumice_blobfs::fs::{
    Access, File, FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions,
    ReadRequest,
};

fn formatted_with(len: u64, block_size: u32, journal: Journal) -> Arc<dyn BlockDevice> {
    let dev = memory(len, block_size);
    let mut format = FormatOptions::default();
    format.journal = journal;
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    dev
}

fn formatted(len: u64, block_size: u32) -> Arc<dyn BlockDevice> {
    formatted_with(len, block_size, Journal::default())
}

fn mount(dev: &Arc<dyn BlockDevice>) -> FileSystem {
    let fs = FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap();
    assert_eq!(fs.problems(), [] as [String; 0]);
    fs
}

fn remount(fs: FileSystem, dev: &Arc<dyn BlockDevice>) -> FileSystem {
    fs.unmount().unwrap();
    drop(fs);
    mount(dev)
}

fn all(file: &File) -> Vec<u8> {
    let mut out = vec![0; usize::try_from(file.len()).unwrap()];
    assert_eq!(file.read_at(0, &mut out).unwrap(), out.len());
    out
}

fn text(fs: &FileSystem, path: &str) -> String {
    String::from_utf8(all(&fs.open(path, OpenOptions::READ).unwrap())).unwrap()
}

fn put(fs: &FileSystem, path: &str, text: &str) {
    let f = fs.open(path, OpenOptions::FRESH).unwrap();
    f.append(text.as_bytes()).unwrap();
    f.sync().unwrap();
}

/// Makes bytes that depend on their position.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

#[test]
fn what_is_appended_is_read_back_at_once_and_after_a_remount() {
    for block_size in [512, 4096] {
        let dev = formatted(64 << 20, block_size);
        let fs = mount(&dev);
        let data = pattern(1, 5_300_007);
        let f = fs.open("/a", OpenOptions::CREATE).unwrap();
        let mut at = 0;
        for n in [0, 1, 137, 138, 4096, 100_000, 1 << 20, 3_000_000, 1_048_576] {
            let n = n.min(data.len() - at);
            f.append(&data[at..at + n]).unwrap();
            at += n;
            assert_eq!(f.len(), at as u64);
        }
        f.append(&data[at..]).unwrap();
        assert!(all(&f) == data);
        f.sync().unwrap();
        assert!(all(&f) == data);
        drop(f);
        let fs = remount(fs, &dev);
        let f = fs.open("/a", OpenOptions::READ).unwrap();
        assert!(all(&f) == data);
        // Odd ranges are read from a cold cache.
        for (off, len) in [
            (0, 1),
            (4095, 2),
            (1_048_570, 20),
            (5_300_000, 100),
            (2_000_001, 1_500_003),
        ] {
            f.invalidate(0, u64::MAX);
            let mut out = vec![0; len];
            let n = f.read_at(off as u64, &mut out).unwrap();
            assert_eq!(n, len.min(data.len() - off));
            assert!(out[..n] == data[off..off + n], "{off} {len}");
        }
        assert_eq!(f.read_at(5_300_007, &mut [0; 8]).unwrap(), 0);
        assert_eq!(f.read_at(u64::MAX, &mut [0; 8]).unwrap(), 0);
    }
}

#[test]
fn appends_continue_after_a_remount_and_without_syncs() {
    let dev = formatted(64 << 20, 4096);
    let mut fs = mount(&dev);
    let data = pattern(2, 3_500_000);
    let mut at = 0;
    for n in [10, 5000, 1_048_000, 700, 2_000_000] {
        let f = fs.open("/log", OpenOptions::CREATE).unwrap();
        assert_eq!(f.len(), at as u64);
        f.append(&data[at..at + n]).unwrap();
        at += n;
        drop(f);
        let f = fs.open("/log", OpenOptions::READ).unwrap();
        f.append(&data[at..at + 3]).unwrap();
        at += 3;
        drop(f);
        fs = remount(fs, &dev);
    }
    assert!(all(&fs.open("/log", OpenOptions::READ).unwrap()) == data[..at]);
}

#[test]
fn random_writes_gaps_and_truncation() {
    let dev = formatted(96 << 20, 512);
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    let mut model: Vec<u8> = Vec::new();
    let write = |model: &mut Vec<u8>, off: usize, data: &[u8]| {
        f.write_at(off as u64, data).unwrap();
        if model.len() < off + data.len() {
            model.resize(off + data.len(), 0);
        }
        model[off..off + data.len()].copy_from_slice(data);
    };
    write(&mut model, 0, &pattern(3, 2_500_000));
    write(&mut model, 100, b"inside a region that is full");
    write(&mut model, 2_400_000, b"inside the tail");
    write(&mut model, 2_499_990, b"across the end of the file");
    write(&mut model, 1_048_570, b"across two regions");
    assert!(all(&f) == model);
    write(&mut model, 2_600_000, b"after a small gap");
    write(&mut model, 12_000_001, b"after a large gap");
    assert!(all(&f) == model);
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    write(&mut model, 5_000_000, b"in a gap, not in memory");
    write(&mut model, 4095, &[9; 4098]);
    assert!(all(&f) == model);
    for len in [
        12_000_000usize,
        5_000_010,
        5_000_010,
        1_048_576,
        1_048_575,
        6_000_000,
        77,
        0,
        10,
    ] {
        f.truncate(len as u64).unwrap();
        model.resize(len, 0);
        assert!(all(&f) == model, "{len}");
        let end = model.len();
        write(&mut model, end, b"and on");
        assert!(all(&f) == model, "{len}");
    }
    f.allocate(0, 9 << 20).unwrap();
    assert_eq!(f.len(), model.len() as u64);
    assert!(f.allocated() >= 9 << 20);
    drop(f);
    let fs = remount(fs, &dev);
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    assert!(all(&f) == model);
    assert_eq!(
        f.allocated(),
        fs.statfs().cluster,
        "what was held ahead was given back"
    );
}

#[test]
fn old_bytes_never_show_through() {
    let dev = formatted(32 << 20, 512);
    let fs = mount(&dev);
    put(&fs, "/secret", &"s".repeat(20 << 20));
    fs.unlink("/secret").unwrap();
    let f = fs.open("/new", OpenOptions::CREATE).unwrap();
    f.allocate(0, 20 << 20).unwrap();
    f.append(b"x").unwrap();
    f.write_at(9_000_000, b"y").unwrap();
    f.truncate(9_100_000).unwrap();
    let expected = |len: usize| {
        let mut v = vec![0u8; len];
        v[0] = b'x';
        v[9_000_000] = b'y';
        v
    };
    assert!(all(&f) == expected(9_100_000));
    drop(f);
    let fs = remount(fs, &dev);
    let f = fs.open("/new", OpenOptions::READ).unwrap();
    f.truncate(15_000_000).unwrap();
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    assert!(all(&f) == expected(15_000_000));
}

#[test]
fn names_directories_and_links() {
    let dev = formatted(64 << 20, 4096);
    let fs = mount(&dev);
    let empty = fs.statfs();
    fs.mkdir("/db").unwrap();
    assert!(matches!(fs.mkdir("/db"), Err(FsError::Exists { .. })));
    assert!(matches!(
        fs.mkdir("/no/where"),
        Err(FsError::NotFound { .. })
    ));
    assert!(matches!(
        fs.open("/no/f", OpenOptions::CREATE),
        Err(FsError::NotFound { .. })
    ));
    assert!(matches!(
        fs.open("/db", OpenOptions::CREATE),
        Err(FsError::IsDir { .. })
    ));
    assert!(matches!(
        fs.open("/none", OpenOptions::READ),
        Err(FsError::NotFound { .. })
    ));
    put(&fs, "/db/a", "A");
    put(&fs, "/db/b", "B");
    let exclusive = OpenOptions::READ.create(true).exclusive(true);
    assert!(matches!(
        fs.open("/db/a", exclusive),
        Err(FsError::Exists { .. })
    ));
    assert!(matches!(
        fs.open("/db/a/x", OpenOptions::CREATE),
        Err(FsError::NotDir { .. })
    ));
    fs.link("/db/a", "/db/a2").unwrap();
    assert!(matches!(
        fs.link("/db/a", "/db/b"),
        Err(FsError::Exists { .. })
    ));
    assert_eq!(fs.num_links("/db/a").unwrap(), 2);
    assert!(fs.same_file("/db/a", "/db/a2").unwrap());
    assert!(!fs.same_file("/db/a", "/db/b").unwrap());
    // A rename between two names of one file does nothing.
    fs.rename("/db/a", "/db/a2").unwrap();
    assert!(fs.exists("/db/a").unwrap());
    // The replaced name was one of two names of its file.
    fs.rename("/db/b", "/db/a").unwrap();
    assert_eq!(text(&fs, "/db/a"), "B");
    assert_eq!(text(&fs, "/db/a2"), "A");
    assert_eq!(fs.num_links("/db/a2").unwrap(), 1);
    assert!(matches!(fs.rmdir("/db"), Err(FsError::NotEmpty { .. })));
    assert!(matches!(fs.unlink("/db"), Err(FsError::IsDir { .. })));
    assert!(matches!(fs.rmdir("/db/a"), Err(FsError::NotDir { .. })));
    fs.mkdir("/db/sub").unwrap();
    put(&fs, "/db/sub/x", "X");
    fs.link("/db/sub/x", "/db/sub/y").unwrap();
    assert!(matches!(
        fs.rename("/db", "/db/sub/in"),
        Err(FsError::InvalidInput { .. })
    ));
    assert!(matches!(
        fs.rename("/db/a", "/db/sub"),
        Err(FsError::IsDir { .. })
    ));
    assert!(matches!(
        fs.rename("/db/sub", "/db/a"),
        Err(FsError::NotDir { .. })
    ));
    fs.mkdir("/empty").unwrap();
    fs.rename("/db", "/empty").unwrap();
    let fs = remount(fs, &dev);
    let names =
        |dir: &str| -> Vec<String> { fs.list(dir).unwrap().into_iter().map(|e| e.name).collect() };
    assert_eq!(names("/"), ["empty"]);
    assert_eq!(names("/empty"), ["a", "a2", "sub"]);
    assert_eq!(names("/empty/sub"), ["x", "y"]);
    assert_eq!(text(&fs, "/empty/sub/y"), "X");
    assert!(fs.same_file("/empty/sub/x", "/empty/sub/y").unwrap());
    fs.unlink("/empty/sub/x").unwrap();
    let fs = remount(fs, &dev);
    assert_eq!(text(&fs, "/empty/sub/y"), "X");
    for path in ["/empty/sub/y", "/empty/a", "/empty/a2"] {
        fs.unlink(path).unwrap();
    }
    fs.rmdir("/empty/sub").unwrap();
    fs.rmdir("/empty").unwrap();
    let fs = remount(fs, &dev);
    assert_eq!(fs.list("/").unwrap(), []);
    assert_eq!(fs.statfs().free, empty.free);
    assert_eq!((empty.free, empty.used), (empty.total, 0));
    assert_eq!(empty.journal, 1 << 20, "a 64th of the device");
    assert_eq!(fs.blobstore().blobs(), []);
}

#[test]
fn long_names() {
    let dev = formatted(32 << 20, 4096);
    let fs = mount(&dev);
    let longest = format!("/{}", "n".repeat(254));
    put(&fs, &longest, "fits");
    let too_long = format!("/{}", "n".repeat(255));
    assert!(matches!(
        fs.open(&too_long, OpenOptions::CREATE),
        Err(FsError::NameTooLong { .. })
    ));
    fs.mkdir("/d").unwrap();
    put(&fs, &format!("/d/{}", "n".repeat(252)), "x");
    assert!(matches!(
        fs.rename("/d", "/dd"),
        Err(FsError::NameTooLong { .. })
    ));
    let fs = remount(fs, &dev);
    assert_eq!(text(&fs, &longest), "fits");
    assert_eq!(fs.list("/d").unwrap().len(), 1);
    assert!(!fs.exists("/dd").unwrap());
}

#[test]
fn an_open_file_outlives_its_name() {
    let dev = formatted(32 << 20, 4096);
    let fs = mount(&dev);
    put(&fs, "/f", "first");
    let old = fs.open("/f", OpenOptions::READ).unwrap();
    put(&fs, "/f", "second");
    assert_eq!(all(&old), b"first");
    assert_eq!(text(&fs, "/f"), "second");
    let second = fs.open("/f", OpenOptions::READ).unwrap();
    fs.unlink("/f").unwrap();
    assert!(!fs.exists("/f").unwrap());
    second.append(&pattern(7, 3_000_000)).unwrap();
    second.sync().unwrap();
    second.invalidate(0, u64::MAX);
    assert!(all(&second)[6..] == pattern(7, 3_000_000));
    put(&fs, "/g", "g");
    put(&fs, "/h", "h");
    let g = fs.open("/g", OpenOptions::READ).unwrap();
    fs.rename("/h", "/g").unwrap();
    assert_eq!(all(&g), b"g");
    assert_eq!(text(&fs, "/g"), "h");
    assert_eq!(fs.blobstore().blobs().len(), 4);
    drop((old, second, g));
    assert_eq!(fs.blobstore().blobs().len(), 1);
    // The file is still open when the file system is dropped.
    let g = fs.open("/g", OpenOptions::READ).unwrap();
    fs.unlink("/g").unwrap();
    fs.unmount().unwrap();
    assert!(matches!(g.append(b"x"), Err(FsError::Unmounted { .. })));
    assert!(matches!(
        g.read_at(0, &mut [0; 1]),
        Err(FsError::Unmounted { .. })
    ));
    drop(g);
    let fs = mount(&dev);
    assert_eq!(fs.blobstore().blobs(), []);
}

#[test]
fn a_full_device_is_an_error_that_changes_nothing() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    put(&fs, "/keep", "kept");
    let f = fs.open("/big", OpenOptions::CREATE).unwrap();
    let chunk = pattern(9, 300_000);
    let mut len = 0;
    let error = loop {
        match f.append(&chunk) {
            Ok(()) => len += chunk.len() as u64,
            Err(e) => break e,
        }
    };
    assert!(matches!(error, FsError::NoSpace { .. }), "{error}");
    assert!(error.is_retryable());
    assert_eq!(f.len(), len);
    assert!(len > 12 << 20, "space held ahead was used: {len}");
    assert!(matches!(
        f.write_at(len + (1 << 20), b"x"),
        Err(FsError::NoSpace { .. })
    ));
    assert!(matches!(f.truncate(1 << 30), Err(FsError::NoSpace { .. })));
    assert!(matches!(
        f.allocate(0, 1 << 30),
        Err(FsError::NoSpace { .. })
    ));
    assert_eq!(f.len(), len);
    f.sync().unwrap();
    for (i, piece) in all(&f).chunks(chunk.len()).enumerate() {
        assert!(piece == chunk, "{i}");
    }
    fs.unlink("/big").unwrap();
    drop(f);
    let f = fs.open("/again", OpenOptions::CREATE).unwrap();
    f.append(&vec![1; 10 << 20]).unwrap();
    drop(f);
    let fs = remount(fs, &dev);
    assert_eq!(text(&fs, "/keep"), "kept");
    assert_eq!(fs.stat("/again").unwrap().len, 10 << 20);
}

#[test]
fn space_ahead_of_a_closed_file_goes_to_one_that_needs_it() {
    let dev = formatted(32 << 20, 4096);
    let fs = mount(&dev);
    let f = fs.open("/ahead", OpenOptions::CREATE).unwrap();
    f.allocate(0, 20 << 20).unwrap();
    f.append(b"little").unwrap();
    f.sync().unwrap();
    drop(f);
    let f = fs.open("/needs", OpenOptions::CREATE).unwrap();
    f.append(&vec![7; 25 << 20]).unwrap();
    assert_eq!(text(&fs, "/ahead"), "little");
}

#[test]
fn locks_exclude() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    let lock = fs.lock("/LOCK").unwrap();
    let error = fs.lock("/LOCK").unwrap_err();
    assert!(matches!(error, FsError::Locked { .. }));
    assert_eq!(error.errno(), 11);
    let other = fs.lock("/OTHER").unwrap();
    drop(lock);
    let lock = fs.lock("/LOCK").unwrap();
    drop((lock, other));
}

#[test]
fn reads_pinned_many_asynchronous_direct() {
    let dev = formatted(64 << 20, 512);
    let fs = mount(&dev);
    let data = pattern(11, 4_000_000);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&data).unwrap();
    assert!(f.read_pinned(10, 5000).unwrap()[..] == data[10..5010]);
    assert!(f.read_pinned(3_999_990, 11).is_none());
    assert!(
        f.read_pinned((1 << 20) - 4, 8).is_none(),
        "not in one buffer"
    );
    f.sync().unwrap();
    drop(f);
    let fs = remount(fs, &dev);
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    assert!(f.read_pinned(100, 4000).is_none());
    let offsets = [
        5usize, 1_000_000, 1_048_574, 3_999_000, 2_000_000, 2_000_100, 5_000_000,
    ];
    let mut bufs = vec![vec![0u8; 4000]; offsets.len()];
    let mut requests: Vec<ReadRequest<'_>> = bufs
        .iter_mut()
        .zip(offsets)
        .map(|(b, off)| ReadRequest::new(off as u64, b))
        .collect();
    f.read_many(&mut requests);
    let lens: Vec<usize> = requests.into_iter().map(|r| r.result.unwrap()).collect();
    assert_eq!(lens, [4000, 4000, 4000, 1000, 4000, 4000, 0]);
    for ((off, buf), n) in offsets.into_iter().zip(&bufs).zip(lens) {
        assert!(n == 0 || buf[..n] == data[off..off + n], "{off}");
    }
    assert!(f.read_pinned(5, 4000).unwrap()[..] == data[5..4005]);
    let handles: Vec<_> = offsets
        .iter()
        .map(|off| f.read_async(*off as u64 + 40_000, 70_000).unwrap())
        .collect();
    for (h, off) in handles.into_iter().zip(offsets) {
        while !h.poll() {}
        let mut out = vec![0; 70_000];
        let n = h.read_into(&mut out).unwrap();
        assert_eq!(n, 70_000.min(data.len().saturating_sub(off + 40_000)));
        assert!(n == 0 || out[..n] == data[off + 40_000..off + 40_000 + n]);
    }
    f.read_async(0, 1000).unwrap().cancel();
    let direct = fs.open("/f", OpenOptions::READ).unwrap();
    direct.set_direct(true);
    f.invalidate(0, u64::MAX);
    let before = fs.io_stats();
    for _ in 0..3 {
        let mut out = vec![0; 8192];
        assert_eq!(direct.read_at(1_500_000, &mut out).unwrap(), 8192);
        assert!(out == data[1_500_000..1_508_192]);
    }
    assert_eq!(
        fs.io_stats().since(&before).reads,
        3,
        "nothing stays in memory"
    );
    // Sequential reading reads ahead.
    f.advise(Access::Sequential);
    let before = fs.io_stats();
    let mut out = vec![0; 4096];
    for at in (0..data.len()).step_by(4096) {
        let n = f.read_at(at as u64, &mut out).unwrap();
        assert!(out[..n] == data[at..at + n]);
    }
    let reads = fs.io_stats().since(&before).reads;
    assert!(
        reads < 60,
        "{reads} device reads for {} sequential ones",
        data.len() / 4096
    );
    assert!(fs.cache_stats().hits > 900);
}

#[test]
fn a_log_that_nobody_reads_takes_no_cache() {
    let dev = formatted(64 << 20, 4096);
    let fs = mount(&dev);
    let data = pattern(5, 9_000_000);
    let write = |path: &str, access: Access| {
        let f = fs.open(path, OpenOptions::CREATE).unwrap();
        f.advise(access);
        for piece in data.chunks(1000) {
            f.append(piece).unwrap();
        }
        f.sync().unwrap();
        fs.cache_stats().used_bytes
    };
    assert_eq!(write("/log", Access::NoReuse), 0);
    assert_eq!(write("/table", Access::Normal), 8 << 20);
    assert!(all(&fs.open("/log", OpenOptions::READ).unwrap()) == data);
}

#[test]
fn no_offset_or_length_is_too_large_to_be_refused() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(b"bytes").unwrap();
    let no_space = |result: Result<(), FsError>| {
        assert!(matches!(result, Err(FsError::NoSpace { .. })), "{result:?}");
    };
    for len in [u64::MAX, 1 << 63, 1 << 48, 1 << 40] {
        no_space(f.truncate(len));
        no_space(f.allocate(0, len));
        no_space(f.write_at(len - 9, b"x"));
    }
    let result = f.write_at(u64::MAX - 9, &[1; 100]);
    assert!(result.is_err());
    for off in [u64::MAX, u64::MAX - 9, 5] {
        let read = f.read_async(off, 100).unwrap();
        assert_eq!(read.read_into(&mut [0; 100]).unwrap(), 0);
        assert_eq!(f.read_at(off, &mut [0; 100]).unwrap(), 0);
    }
    assert_eq!(all(&f), b"bytes");
    drop(f);
    drop(remount(fs, &dev));
}
