//! What is written to the device, and what is not.

use super::*;

#[test]
fn a_sync_writes_what_it_must_and_no_more() {
    let dev = formatted_with(64 << 20, 4096, Journal::None);
    let fs = mount(&dev);
    let f = fs.open("/wal", OpenOptions::CREATE).unwrap();
    f.allocate(0, 8 << 20).unwrap();
    f.append(&[1; 138]).unwrap();
    f.sync().unwrap();
    let before = fs.io_stats();
    for _ in 0..100 {
        f.append(&[1; 138]).unwrap();
        f.sync().unwrap();
    }
    let io = fs.io_stats().since(&before);
    // The writes are a data block (two where the record crosses one) and the root.
    assert_eq!((io.writes, io.flushes), (200, 0), "{io:?}");
    let before = fs.io_stats();
    for _ in 0..10 {
        f.sync().unwrap();
    }
    assert_eq!(fs.io_stats().since(&before).writes, 0);
    let before = fs.io_stats();
    f.append(&vec![3; 6 << 20]).unwrap();
    f.sync().unwrap();
    let io = fs.io_stats().since(&before);
    assert!(io.writes <= 9, "{io:?}");
}

#[test]
fn a_clean_mount_writes_nothing() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    put(&fs, "/f", "f");
    fs.unmount().unwrap();
    drop(fs);
    let before = content(&dev);
    let fs = mount(&dev);
    assert_eq!(text(&fs, "/f"), "f");
    assert_eq!(fs.io_stats().writes, 0);
    fs.unmount().unwrap();
    assert!(content(&dev) == before);
    let read_only = MountOptions::default();
    let mut read_only = read_only;
    read_only.read_only = true;
    drop(fs);
    let fs = FileSystem::mount(Arc::clone(&dev), &read_only).unwrap();
    assert_eq!(text(&fs, "/f"), "f");
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    assert!(matches!(f.append(b"x"), Err(FsError::ReadOnly { .. })));
    assert!(matches!(fs.unlink("/f"), Err(FsError::ReadOnly { .. })));
    assert!(matches!(
        fs.open("/g", OpenOptions::CREATE),
        Err(FsError::ReadOnly { .. })
    ));
    assert!(matches!(fs.mkdir("/d"), Err(FsError::ReadOnly { .. })));
    drop(f);
    fs.unmount().unwrap();
    assert!(content(&dev) == before);
}

#[test]
fn a_dropped_mount_is_unmounted() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(b"not synced").unwrap();
    drop(fs);
    drop(f);
    assert_eq!(text(&mount(&dev), "/f"), "not synced");
}

#[test]
fn format_refuses_what_it_knows() {
    let dev = formatted(16 << 20, 4096);
    let error = FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap_err();
    assert!(
        matches!(&error, FsError::Foreign { found, .. } if found.contains("BlobFS")),
        "{error}"
    );
    let mut force = FormatOptions::default();
    force.force = true;
    FileSystem::format(Arc::clone(&dev), &force).unwrap();
    let empty = memory(16 << 20, 512);
    let error = FileSystem::mount(empty, &MountOptions::default()).unwrap_err();
    assert!(error.to_string().contains("mkfs"), "{error}");
}

#[test]
fn a_file_of_a_read_only_blob_is_given_no_space() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    put(&fs, "/f", "text");
    fs.unmount().unwrap();
    drop(fs);
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    for id in store.blobs() {
        store.set_read_only(id).unwrap();
    }
    store.unload().unwrap();
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    let before = f.allocated();
    // The file has the first byte already.
    for result in [
        f.allocate(0, 1),
        f.allocate(0, 4 << 20),
        f.append(b"x"),
        f.truncate(0),
    ] {
        assert!(
            matches!(result, Err(FsError::ReadOnly { .. })),
            "{result:?}"
        );
    }
    assert_eq!(f.allocated(), before);
    assert_eq!(text(&fs, "/f"), "text");
}

/// It does not even remove the mark of an orderly unload, to find out whether the store has stopped.
#[test]
fn a_name_operation_that_fails_writes_no_super_block() {
    let dev = formatted_with(16 << 20, 4096, Journal::None);
    let fs = mount(&dev);
    put(&fs, "/f", "text");
    fs.unmount().unwrap();
    drop(fs);
    let before = content(&dev);
    let fails = Arc::new(ErrorDevice::new(None, Arc::clone(&dev)));
    let fs = FileSystem::mount(fails.clone(), &MountOptions::default()).unwrap();
    fails.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .range(Some((0, 1))),
    );
    fs.rename("/f", "/g").unwrap_err();
    assert_eq!(fails.injections(), []);
    assert!(content(&dev)[..4096] == before[..4096]);
    fs.rename("/f", "/g").unwrap();
    assert!(content(&dev)[..4096] != before[..4096]);
}

#[test]
fn an_open_that_truncates_leaves_nothing() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    put(&fs, "/f", "text");
    let truncate = OpenOptions::READ.truncate(true);
    assert_eq!(fs.open("/f", truncate).unwrap().len(), 0);
    assert_eq!(text(&fs, "/f"), "");
    assert_eq!(text(&remount(fs, &dev), "/f"), "");
}

/// Each kind of change sets the time. A sync makes it durable if it changes the length.
#[test]
fn every_change_of_bytes_sets_the_time() {
    let dev = formatted(16 << 20, 4096);
    let mut fs = mount(&dev);
    put(&fs, "/f", "text");
    let changes: [fn(&File); 5] = [
        |f| f.append(b"more").unwrap(),
        |f| f.append(&[1; 3 << 20]).unwrap(),
        |f| f.write_at(0, b"T").unwrap(),
        |f| f.write_at(f.len() + 10, b"end").unwrap(),
        |f| f.truncate(f.len() - 5).unwrap(),
    ];
    for (change, n) in changes.iter().zip(1..) {
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        let len = f.len();
        let before = std::time::SystemTime::now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        change(&f);
        assert!(f.stat().mtime > before, "change {n}");
        f.sync().unwrap();
        drop(f);
        fs = remount(fs, &dev);
        let stat = fs.stat("/f").unwrap();
        assert!(stat.len == len || stat.mtime > before, "change {n}");
    }
}

#[test]
fn an_unmounted_directory_is_not_synced() {
    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    fs.mkdir("/d").unwrap();
    fs.sync_dir("/d").unwrap();
    fs.unmount().unwrap();
    let refused = fs.sync_dir("/d").unwrap_err();
    assert!(matches!(refused, FsError::Unmounted { .. }), "{refused}");
}

#[test]
fn a_cursor_reads_writes_and_seeks() {
    use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};

    let dev = formatted(16 << 20, 4096);
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    let bytes = pattern(3, 300_000);
    let mut to = f.cursor();
    assert_eq!(io::copy(&mut &bytes[..], &mut to).unwrap(), 300_000);
    to.flush().unwrap();
    assert_eq!(all(&f), bytes);
    // Another cursor has a place of its own.
    let mut from = f.cursor();
    let mut read = Vec::new();
    from.read_to_end(&mut read).unwrap();
    assert_eq!(read, bytes);
    assert_eq!(from.seek(SeekFrom::End(-2)).unwrap(), 299_998);
    from.write_all(b"abcd").unwrap();
    assert_eq!(from.stream_position().unwrap(), 300_002);
    from.seek(SeekFrom::Current(-3)).unwrap();
    let mut three = [0; 3];
    from.read_exact(&mut three).unwrap();
    assert_eq!(&three, b"bcd");
    assert_eq!(to.stream_position().unwrap(), 300_000);
    // Beyond the end there is nothing to read, and a write leaves zeroes before it.
    from.seek(SeekFrom::Start(400_000)).unwrap();
    assert_eq!(from.read(&mut three).unwrap(), 0);
    from.write_all(b"e").unwrap();
    assert_eq!((f.len(), all(&f)[399_999]), (400_001, 0));
    for wrong in [SeekFrom::End(-400_002), SeekFrom::Current(i64::MIN)] {
        let error = from.seek(wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(from.stream_position().unwrap(), 400_001);
    // Errors have their kind, and the file system's error inside.
    fs.unmount().unwrap();
    let error = from.write(b"f").unwrap_err();
    let inner = error.get_ref().unwrap().downcast_ref::<FsError>();
    assert!(matches!(inner, Some(FsError::Unmounted { .. })), "{error}");
    let missing = FsError::NotFound {
        path: String::new(),
    };
    assert_eq!(io::Error::from(missing).kind(), ErrorKind::NotFound);
}

/// The rest of a file's last block, and of what the journal has, is the program's memory otherwise, on a disk that others may read.
#[test]
fn nothing_but_the_file_reaches_its_last_block() {
    for journal in [Journal::None, Journal::Auto] {
        let dev = formatted_with(16 << 20, 4096, journal);
        let fs = mount(&dev);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        for round in 0..8 {
            let dirty = || {
                // Buffers of this process that are free again, and not empty.
                let buf = || {
                    let mut buf = DmaBuf::new(4096).unwrap();
                    buf.fill(0xee);
                    buf
                };
                drop((0..64).map(|_| buf()).collect::<Vec<_>>());
            };
            dirty();
            f.append(&[1; 700]).unwrap();
            f.sync().unwrap();
            dirty();
            f.write_at(round * 700, &[2; 300]).unwrap();
            f.sync().unwrap();
            dirty();
            f.truncate(f.len() - 10).unwrap();
            f.append(&[1; 10]).unwrap();
            f.sync().unwrap();
            dirty();
            fs.mkdir(&format!("/d{round}")).unwrap();
            let leaked = content(&dev).windows(64).any(|bytes| bytes == [0xee; 64]);
            assert!(!leaked, "{journal:?}, round {round}");
        }
        assert_eq!(
            all(&f)[..1000],
            [[2; 300].as_slice(), &[1; 400], &[2; 300]].concat()
        );
        assert_eq!(f.len(), 5600);
    }
}
