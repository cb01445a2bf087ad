//! Tests of the checks of a file's channels, of the room that it says it has, and of its lock.

use super::*;
use crate::DmaBuf;

fn options(path: PathBuf, prealloc: Prealloc) -> FileOptions {
    FileOptions::new(path)
        .size(Some(1 << 20))
        .create(true)
        .prealloc(prealloc)
}

fn dir() -> tempfile::TempDir {
    // This is not in /tmp, which is memory without direct I/O on many machines.
    tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
}

fn buffers(n: usize) -> Vec<DmaBuf> {
    (0..n).map(|_| DmaBuf::new(512).unwrap()).collect()
}

fn kind(result: Result<(), Box<IoError>>) -> IoErrorKind {
    result.unwrap_err().kind
}

/// The kernel takes 1024 parts (`IOV_MAX`).
#[test]
fn a_vector_has_as_many_parts_as_the_kernel_takes() {
    let dir = dir();
    let file = File::open(&options(dir.path().join("image"), Prealloc::Off)).unwrap();
    let read = |n| Op::ReadV {
        lba: 0,
        bufs: buffers(n),
    };
    let write = |n| Op::WriteV {
        lba: 0,
        data: buffers(n).into_iter().map(DmaBuf::freeze).collect(),
        fua: false,
    };
    file.shared.check(&read(1024)).unwrap();
    file.shared.check(&write(1024)).unwrap();
    assert_eq!(kind(file.shared.check(&read(1025))), IoErrorKind::TooLong);
    assert_eq!(kind(file.shared.check(&write(1025))), IoErrorKind::TooLong);
}

#[test]
fn every_part_of_a_vector_is_aligned() {
    let dir = dir();
    let file = File::open(&options(dir.path().join("image"), Prealloc::Off)).unwrap();
    let mut shared = Arc::into_inner(file.shared).unwrap();
    let zeros = |buf: &DmaBuf| buf.as_ptr().addr().trailing_zeros();
    let mut bufs = buffers(8);
    bufs.sort_by_key(zeros);
    let (less, more) = (bufs.remove(0), bufs.remove(6));
    assert!(zeros(&less) < zeros(&more), "buffers stand side by side");
    // As if the device needed an alignment that one of them has.
    shared.mem_align = 1 << zeros(&more);
    let read = |bufs| Op::ReadV { lba: 0, bufs };
    let op = read(vec![more, less]);
    assert_eq!(kind(shared.check(&op)), IoErrorKind::Misaligned);
    let Op::ReadV { mut bufs, .. } = op else {
        unreachable!();
    };
    let less = bufs.pop().unwrap();
    let op = read(bufs);
    shared.check(&op).unwrap();
    let Op::ReadV { mut bufs, .. } = op else {
        unreachable!();
    };
    let more = bufs.pop().unwrap().freeze();
    let write = |data| Op::WriteV {
        lba: 0,
        data,
        fua: false,
    };
    shared.check(&write(vec![more.clone()])).unwrap();
    let op = write(vec![more, less.freeze()]);
    assert_eq!(kind(shared.check(&op)), IoErrorKind::Misaligned);
}

/// Only a file that still has to be given blocks by its file system depends on that one's room.
#[test]
fn an_image_with_all_its_blocks_needs_no_room() {
    let dir = dir();
    let open = |name, prealloc| File::open(&options(dir.path().join(name), prealloc)).unwrap();
    let sparse = open("sparse", Prealloc::Off).host_space().unwrap();
    assert!(sparse.allocated_bytes < 1 << 20);
    assert!(open("full", Prealloc::Full).host_space().is_none());
}

#[test]
fn a_device_in_use_is_not_overwritten() {
    let dir = dir();
    let path = dir.path().join("image");
    let device = File::open(&options(path.clone(), Prealloc::Off)).unwrap();
    let other = StdFile::options().write(true).open(&path).unwrap();
    let e = lock_unused(&other).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::ResourceBusy, "{e}");
    drop(device);
    lock_unused(&other).unwrap();
    File::open(&options(path, Prealloc::Off)).unwrap_err();
}

#[test]
fn another_file_of_the_name_is_another_file() {
    let dir = dir();
    let path = dir.path().join("image");
    let opened = StdFile::create(&path).unwrap();
    let meta = opened.metadata().unwrap();
    assert!(lock::is_still(&meta, &path));
    let other = dir.path().join("other");
    StdFile::create(&other).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert!(!lock::is_still(&meta, &path));
    std::fs::remove_file(&path).unwrap();
    assert!(!lock::is_still(&meta, &path));
}
