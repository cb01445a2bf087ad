//! Tests of what may be overwritten, and that a refused open leaves no trace.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use pumice_bdev::contents::{
    Contents, Formatting, Ours, Overwrite, examine, examine_with, may_overwrite,
};
use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::registry::Registry;
use pumice_bdev::split::Split;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, DmaBuf, OpKind, OpenOptions, file_uri, open, open_with,
};
use pumice_confine::{small_tmpfs, with_small_tmpfs};

const MIB: u64 = 1 << 20;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn write(dev: &dyn BlockDevice, lba: u64, byte: u8) {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let mut buf = DmaBuf::zeroed(dev.info().block_size as usize).unwrap();
    buf.fill(byte);
    ch.block_on(ch.write(lba, buf.freeze(), false)).unwrap();
}

/// Makes a sparse file of `len` bytes with `bytes` at `at`.
fn file(dir: &Path, len: u64, at: u64, bytes: &[u8]) -> PathBuf {
    let path = dir.join("image");
    let file = fs::File::create(&path).unwrap();
    file.set_len(len).unwrap();
    file.write_all_at(bytes, at).unwrap();
    path
}

#[test]
fn one_byte_anywhere_is_data() {
    let dir = dir();
    for at in [
        0,
        4095,
        MIB + 1,
        40 * MIB + 77,
        100 * MIB,
        (1 << 30) - 1,
        // The byte is behind the last whole block.
        1 << 30,
        (1 << 30) + 99,
    ] {
        let path = file(dir.path(), (1 << 30) + 100, at, b"x");
        let dev = open(path.to_str().unwrap()).unwrap();
        let Contents::Foreign(found) = examine(&*dev) else {
            panic!("a byte at {at} was not seen");
        };
        // The tail has no block: the device's end stands for it.
        let shown = at.min(1 << 30);
        assert!(found.contains(&shown.to_string()), "{at}: {found}");
        let e = may_overwrite(&*dev, Overwrite::Blank).unwrap_err();
        assert!(matches!(e, BdevError::NotBlank { .. }), "{e}");
        assert!(e.to_string().contains("--force"), "{e}");
        may_overwrite(&*dev, Overwrite::Anything).unwrap();
    }
}

#[test]
fn zeroes_are_blank_however_they_were_made() {
    let dir = dir();
    // A hole, written zeroes, and a range that is allocated and was never written.
    let path = file(dir.path(), 64 * MIB, 3 * MIB, &vec![0; 5 << 20]);
    let dev = open(path.to_str().unwrap()).unwrap();
    let mut told = Vec::new();
    assert_eq!(examine_with(&*dev, &mut |p| told.push(p)), Contents::Blank);
    assert!(told.iter().all(|p| p.total_bytes == 64 * MIB));
    // Only the written range was read.
    let read = told.last().unwrap().done_bytes;
    assert!((8 * MIB..9 * MIB).contains(&read), "{read}");
    drop(dev);

    let uri = format!(
        "{}?size=8M&create=1&prealloc=falloc",
        file_uri(dir.path().join("reserved"))
    );
    assert_eq!(examine(&*open(&uri).unwrap()), Contents::Blank);

    let memory = open("malloc://1T?block_size=4096").unwrap();
    assert_eq!(examine(&*memory), Contents::Blank);
    write(&*memory, 12_345_678, 1);
    assert!(matches!(examine(&*memory), Contents::Foreign(_)));
    write(&*memory, 12_345_678, 0);
    assert_eq!(examine(&*memory), Contents::Blank);
    assert_eq!(examine(&*open("null://1T").unwrap()), Contents::Blank);
}

#[test]
fn a_stack_is_as_blank_as_what_is_below() {
    let base = open("malloc://64M?block_size=4096").unwrap();
    let parts = pumice_bdev::split::Split::new(&base, 4, None).unwrap();
    write(&*base, 4096 + 5, 1);
    for (i, part) in parts.into_iter().enumerate() {
        let part: Arc<dyn BlockDevice> =
            Arc::new(pumice_bdev::passthru::Passthru::new("p", Arc::new(part)));
        assert_eq!(examine(&*part) == Contents::Blank, i != 1, "part {i}");
    }
    let soft = open("soft://memory?size=4M&block_size=4096").unwrap();
    assert_eq!(examine(&*soft), Contents::Blank);
    write(&*soft, 1023, 1);
    assert!(matches!(examine(&*soft), Contents::Foreign(_)));
}

#[test]
fn what_cannot_be_read_counts_as_in_use() {
    // At the beginning, in the middle and in the last block.
    for lba in [0, 3000, 4095] {
        let base = open("malloc://16M?block_size=4096").unwrap();
        let dev = ErrorDevice::new(None, base);
        dev.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Read))
                .count(u64::MAX)
                .range(Some((lba, 1))),
        );
        assert!(
            matches!(examine(&dev), Contents::Unknown(_)),
            "block {lba}: {:?}",
            examine(&dev)
        );
        assert!(may_overwrite(&dev, Overwrite::Blank).is_err());
    }
}

#[test]
fn a_store_is_ours_and_others_have_names() {
    let dir = dir();
    let named = |at: u64, bytes: &[u8]| {
        let path = file(dir.path(), 4 * MIB, at, bytes);
        examine(&*open(path.to_str().unwrap()).unwrap())
    };
    let mut super_block = [0; 512];
    super_block[..8].copy_from_slice(b"SPDKBLOB");
    assert_eq!(named(0, &super_block), Contents::Ours(Ours::Blobstore));
    super_block[56..62].copy_from_slice(b"BLOBFS");
    assert_eq!(named(0, &super_block), Contents::Ours(Ours::BlobFs));
    super_block[56..66].copy_from_slice(b"LVOL\x1b\x07\0\0\0\0");
    let Contents::Ours(other) = named(0, &super_block) else {
        panic!()
    };
    assert!(!other.to_string().contains('\x1b'), "{other}");
    for (at, magic, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (257, b"ustar", "tar"),
        (0, b"SQLite format 3\0", "SQLite"),
        (0x2_0000, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS"),
        (4 * MIB - 512, b"EFI PART", "GPT"),
    ] {
        let found = named(at, magic).to_string();
        assert!(found.contains(name), "{found}");
    }
}

/// A block device is read as a whole, because nothing else says what it contains.
#[test]
fn a_loop_device_is_read_as_a_whole() {
    let dir = dir();
    let path = file(dir.path(), 32 * MIB, 17 * MIB + 3, b"x");
    let out = Command::new("losetup")
        .args(["-f", "--show"])
        .arg(&path)
        .output();
    let device = match out {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        other => return eprintln!("skipped: no loop devices here ({other:?})"),
    };
    let device = device.trim();
    let found = open(device).map(|dev| examine(&*dev));
    let _ = Command::new("losetup").args(["-d", device]).status();
    let Contents::Foreign(found) = found.unwrap() else {
        panic!("the byte was not seen");
    };
    assert!(found.contains(&(17 * MIB + 3).to_string()), "{found}");
}

#[test]
fn a_write_protected_device_says_so() {
    let dir = dir();
    let path = file(dir.path(), MIB, 0, b"");
    let out = Command::new("losetup")
        .args(["-r", "-f", "--show"])
        .arg(&path)
        .output();
    let device = match out {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        other => return eprintln!("skipped: no loop devices here ({other:?})"),
    };
    let device = device.trim();
    let writing = open(device).map(|_| ());
    let reading = open_with(device, OpenOptions::new().read_only(true)).map(|_| ());
    let _ = Command::new("losetup").args(["-d", device]).status();
    let e = writing.unwrap_err().to_string();
    assert!(e.contains("read_only=1"), "{e}");
    reading.unwrap();
}

/// Returns everything visible of a directory: names, lengths, blocks, times, contents.
fn seen(dir: &Path) -> Vec<(PathBuf, u64, u64, i64, i64, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let meta = path.metadata().unwrap();
            let bytes = fs::read(&path).unwrap();
            let (len, blocks) = (meta.len(), meta.blocks());
            (path, len, blocks, meta.mtime(), meta.mtime_nsec(), bytes)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_refused_or_reading_open_leaves_no_trace() {
    let dir = dir();
    let at = |name: &str| file_uri(dir.path().join(name));
    fs::write(dir.path().join("letter"), b"Dear Anna,").unwrap();
    fs::write(dir.path().join("empty"), b"").unwrap();
    fs::write(dir.path().join("image"), vec![7; 1 << 20]).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
    let link = dir.path().join("link");
    fs::remove_file(&link).unwrap();
    let before = seen(dir.path());
    for tail in [
        "?size=64M",
        "?size=64M&create=1",
        "?size=64M&create=1&prealloc=full",
        "?size=64M&create=1&prealloc=falloc&buffered=1",
        "?size=512K&create=1",
        "?size=1000001&create=1",
        "?block_size=8192&size=64M&create=1",
        "?block_size=1000",
        "?colour=red&size=64M&create=1",
    ] {
        for name in ["letter", "empty", "image"] {
            let uri = format!("{}{tail}", at(name));
            assert!(open(&uri).is_err(), "{uri}");
            assert_eq!(seen(dir.path()), before, "{uri}");
        }
    }
    // A file that would be created is not created if a later check refuses the open or writing is
    // not allowed.
    for tail in [
        "?create=1",
        "?size=1M",
        "?size=1000001&create=1",
        "?size=1M&create=1&block_size=1000",
        "?size=1M&create=1&block_size=131072",
        "?size=1M&create=1&prealloc=some",
        "?size=1M&create=1&read_only=1",
    ] {
        let uri = format!("{}{tail}", at("typo"));
        assert!(open(&uri).is_err(), "{uri}");
        assert_eq!(seen(dir.path()), before, "{uri}");
    }
    let reading = OpenOptions::new().read_only(true);
    for uri in [
        format!("{}?size=1M&create=1", at("typo")),
        format!("{}?size=64M&create=1", at("image")),
    ] {
        assert!(open_with(&uri, reading).is_err(), "{uri}");
        assert_eq!(seen(dir.path()), before, "{uri}");
    }
    drop(open_with(&at("image"), reading).unwrap());
    assert_eq!(seen(dir.path()), before);
}

#[test]
fn a_wrong_size_names_both_and_the_way() {
    let dir = dir();
    let path = file(dir.path(), 2 * MIB, 0, b"");
    let uri = |size: &str| format!("{}?size={size}&create=1", file_uri(&path));
    open(&uri("2M")).unwrap();
    for other in ["1M", "4M", "2097664"] {
        let e = open(&uri(other)).unwrap_err();
        assert!(
            matches!(e, BdevError::WrongSize { found_bytes, .. } if found_bytes == 2 * MIB),
            "{e}"
        );
        let text = e.to_string();
        assert!(
            text.contains("2097152") && text.contains("pumice grow") == (other != "1M"),
            "{text}"
        );
    }
}

#[test]
fn a_link_to_nothing_is_not_followed() {
    let dir = dir();
    let (link, target) = (dir.path().join("link"), dir.path().join("target"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let e = open(&format!("{}?size=1M&create=1", file_uri(&link))).unwrap_err();
    assert!(e.to_string().contains("symbolic link"), "{e}");
    assert!(!target.exists());
    // A symbolic link to a file stands for that file.
    fs::write(&target, vec![0; 1 << 20]).unwrap();
    open(&file_uri(&link)).unwrap();
}

#[test]
fn a_file_made_for_what_failed_goes_again() {
    let dir = dir();
    let path = dir.path().join("new");
    let uri = format!("{}?size=1M&create=1", file_uri(&path));
    let dev = open(&uri).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    drop(Formatting::begin(&dev, Overwrite::Blank).unwrap());
    assert!(path.exists(), "the device is still open");
    drop(dev);
    assert!(!path.exists(), "nothing was made there");
    // After `finish` it stays. A file that existed before stays in any case.
    for _ in 0..2 {
        let dev = open(&uri).unwrap();
        Formatting::begin(&dev, Overwrite::Blank).unwrap().finish();
        drop(dev);
        assert!(path.exists());
        let dev = open(&uri).unwrap();
        drop(Formatting::begin(&dev, Overwrite::Blank).unwrap());
        drop(dev);
        assert!(path.exists());
    }
    // A second attempt on the same device counts.
    fs::remove_file(&path).unwrap();
    let dev = open(&uri).unwrap();
    drop(Formatting::begin(&dev, Overwrite::Blank).unwrap());
    Formatting::begin(&dev, Overwrite::Blank).unwrap().finish();
    drop(dev);
    assert!(path.exists());
}

/// A device that holds data is not begun. An image that was made for it and cannot be examined goes again.
#[test]
fn a_refused_beginning_is_none() {
    let dir = dir();
    let path = file(dir.path(), MIB, 77, b"x");
    let dev = open(path.to_str().unwrap()).unwrap();
    let e = Formatting::begin(&dev, Overwrite::Blank).err().unwrap();
    assert!(matches!(e, BdevError::NotBlank { .. }), "{e}");
    drop(dev);
    assert!(path.exists());
    let path = dir.path().join("new");
    let base = open(&format!("{}?size=1M&create=1", file_uri(&path))).unwrap();
    let failing = ErrorDevice::new(None, base);
    failing.inject(Injection::new(Failure::Fail).op(Some(OpKind::Read)));
    let dev: Arc<dyn BlockDevice> = Arc::new(failing);
    Formatting::begin(&dev, Overwrite::Blank).err().unwrap();
    drop(dev);
    assert!(!path.exists(), "nothing was made there");
}

#[test]
fn another_file_of_the_name_is_not_removed() {
    let dir = dir();
    let path = dir.path().join("new");
    let dev = open(&format!("{}?size=1M&create=1", file_uri(&path))).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    drop(Formatting::begin(&dev, Overwrite::Blank).unwrap());
    drop(dev);
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody else's");
}

/// An image of which all blocks are allocated stays one when it grows.
#[test]
fn what_a_preallocated_image_grows_by_is_allocated() {
    let dir = dir();
    let uri = file_uri(dir.path().join("image"));
    for (prealloc, blocks) in [("off", 0), ("falloc", 8 * MIB), ("full", 8 * MIB)] {
        let uri = format!("{uri}?size=4M&create=1&prealloc={prealloc}");
        let dev = open_with(&uri, OpenOptions::new()).unwrap();
        drop(dev);
        let size = 8 * MIB;
        let dev = open_with(&uri, OpenOptions::new().grow_to(size)).unwrap();
        assert_eq!(dev.info().len_bytes(), size);
        let meta = dir.path().join("image").metadata().unwrap();
        assert_eq!(meta.len(), size);
        assert!(meta.blocks() * 512 >= blocks, "{prealloc}");
        drop(dev);
        std::fs::remove_file(dir.path().join("image")).unwrap();
    }
}

#[test]
fn growing_takes_only_what_is_ours_and_can_be_done_again() {
    let dir = dir();
    let path = file(dir.path(), 2 * MIB, 0, b"SPDKBLOB");
    // This is the URI with which the store was made.
    let uri = format!("{}?size=2M&create=1", file_uri(&path));
    for _ in 0..2 {
        let dev = open_with(&uri, OpenOptions::new().grow_to(4 * MIB)).unwrap();
        assert_eq!(dev.info().len_bytes(), 4 * MIB);
        drop(dev);
        assert_eq!(path.metadata().unwrap().len(), 4 * MIB);
    }
    for bad in [2 * MIB, 4 * MIB + 100] {
        let options = OpenOptions::new().grow_to(bad);
        assert!(open_with(&uri, options).is_err());
        assert_eq!(path.metadata().unwrap().len(), 4 * MIB);
    }
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    let e = open_with(&uri, OpenOptions::new().grow_to(4 * MIB)).unwrap_err();
    assert!(matches!(e, BdevError::NotBlank { .. }), "{e}");
    assert_eq!(path.metadata().unwrap().len(), MIB);
    let missing = file_uri(dir.path().join("none"));
    assert!(open_with(&missing, OpenOptions::new().grow_to(4 * MIB)).is_err());
    assert!(open_with("malloc://1M", OpenOptions::new().grow_to(4 * MIB)).is_err());
}

#[test]
fn a_failed_preallocation_leaves_nothing() {
    let dir = dir();
    with_small_tmpfs(
        "a_failed_preallocation_leaves_nothing",
        "8m",
        dir.path(),
        "preallocation_on_a_small_disk",
    );
}

#[test]
fn preallocation_on_a_small_disk() {
    let Some(dir) = small_tmpfs() else {
        return;
    };
    let path = dir.join("image");
    for how in ["falloc", "full"] {
        let uri = format!("{}?size=64M&create=1&prealloc={how}", file_uri(&path));
        for _ in 0..2 {
            let e = open(&uri).unwrap_err();
            assert!(e.to_string().contains("reserve"), "{e}");
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        }
    }
    // Missing blocks of an existing file are allocated, or the open says that they cannot be.
    let uri = |how: &str| format!("{}?prealloc={how}", file_uri(&path));
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    drop(open(&uri("falloc")).unwrap());
    assert_eq!(path.metadata().unwrap().blocks() * 512, 4 << 20);
    fs::remove_file(&path).unwrap();
    fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let e = open(&uri("falloc")).unwrap_err();
    assert!(e.to_string().contains("prealloc"), "{e}");
    assert_eq!(path.metadata().unwrap().len(), 64 << 20);
}

#[test]
fn a_reader_needs_no_right_to_write() {
    let dir = dir();
    let path = file(dir.path(), MIB, 0, b"x");
    let reading = OpenOptions::new().read_only(true);
    let readers: Vec<_> = (0..3)
        .map(|_| open_with(path.to_str().unwrap(), reading).unwrap())
        .collect();
    // Every descriptor of it is for reading only (the last octal digit of the flags is 0).
    let mut ours = 0;
    for fd in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if fs::read_link(fd.path()).is_ok_and(|to| to == path) {
            let name = fd.file_name().into_string().unwrap();
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap();
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
            assert!(flags.trim().ends_with('0'), "{flags}");
            ours += 1;
        }
    }
    assert_eq!(ours, 3);
    assert!(matches!(
        open(path.to_str().unwrap()),
        Err(BdevError::InUse { .. })
    ));
    drop(readers);
    open(path.to_str().unwrap()).unwrap();
    // Other devices are opened through a read-only view.
    let memory = open_with("malloc://1M", reading).unwrap();
    assert!(!memory.info().ops.has(OpKind::Write));
    assert!(may_overwrite(&*memory, Overwrite::Anything).is_err());
}

/// A stripe with a leg that keeps nothing does not keep its data, and its other legs do.
#[test]
fn a_leg_that_keeps_nothing_makes_no_other_leg_blank() {
    let null = || open("null://1M").unwrap();
    let full = open("malloc://1M").unwrap();
    write(&*full, 9, 1);
    for legs in [[null(), Arc::clone(&full)], [full, null()]] {
        let raid = Arc::new(Raid0::new("R", legs.to_vec(), 4, None).unwrap());
        let error = ErrorDevice::new(None, Arc::clone(&raid) as Arc<dyn BlockDevice>);
        for dev in [&*raid as &dyn BlockDevice, &error] {
            let refused = may_overwrite(dev, Overwrite::Blank);
            assert!(
                matches!(refused, Err(BdevError::NotBlank { .. })),
                "{refused:?}"
            );
            may_overwrite(dev, Overwrite::Anything).unwrap();
        }
    }
    let nothing = Arc::new(Raid0::new("R", vec![null(), null()], 4, None).unwrap());
    assert_eq!(examine(&*nothing), Contents::Blank);
    assert_eq!(examine(&ErrorDevice::new(None, nothing)), Contents::Blank);
}

/// The file that was made for something that fails is removed, whatever stands on it.
#[test]
fn the_file_of_every_device_goes_again() {
    type Dev = Arc<dyn BlockDevice>;
    let registered = |dev: Dev| {
        let registry = Registry::new();
        let bdev = registry.register(dev, Vec::new()).unwrap();
        (registry, bdev)
    };
    let builds: [(&str, &dyn Fn(Dev) -> Dev); 7] = [
        ("passthru", &|dev| Arc::new(Passthru::new("P", dev))),
        ("delay", &|dev| {
            Arc::new(Delay::new("D", dev, Latencies::default()))
        }),
        ("error", &|dev| Arc::new(ErrorDevice::new(None, dev))),
        ("split", &|dev| {
            Arc::new(Split::new(&dev, 2, None).unwrap().remove(1))
        }),
        ("raid", &|dev| {
            let legs = vec![open("malloc://1M").unwrap(), dev];
            Arc::new(Raid0::new("R", legs, 4, None).unwrap())
        }),
        ("registered", &|dev| Arc::new(registered(dev).1)),
        ("claimed", &|dev| {
            let (registry, bdev) = registered(dev);
            Arc::new(registry.claim(&bdev.info().name, "test").unwrap())
        }),
    ];
    let dir = dir();
    for (name, build) in builds {
        let image = dir.path().join(name);
        let uri = format!("{}?size=1M&create=1", file_uri(&image));
        let dev = build(open(&uri).unwrap());
        drop(Formatting::begin(&dev, Overwrite::Blank).unwrap());
        assert!(image.exists(), "{name}: while it is open");
        drop(dev);
        assert!(!image.exists(), "{name}");
    }
}
