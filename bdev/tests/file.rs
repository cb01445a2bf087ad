//! Tests of the `file` module on image files: locks, alignment, sizes, faults, both kinds of I/O.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use pumice_bdev::file::{File, FileOptions, Prealloc, lock_unused};
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, DmaBuf, DmaSlice, IoErrorKind, Op, OpKind, open,
};
use pumice_confine::{small_tmpfs, with_small_tmpfs};

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new() -> Image {
        // This is not in /tmp, which is memory without direct I/O on many machines.
        let base = std::env::var_os("CARGO_TARGET_TMPDIR").map(PathBuf::from);
        let base = base.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
        Image {
            dir: tempfile::tempdir_in(base).unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn options(&self) -> FileOptions {
        FileOptions::new(self.path())
            .size(Some(8 << 20))
            .create(true)
    }

    fn uri(&self, rest: &str) -> String {
        format!("file://{}{rest}", self.path().display())
    }
}

fn channel(dev: &dyn BlockDevice) -> AsyncChannel {
    AsyncChannel::new(dev.open_channel().unwrap())
}

fn data(len: usize, seed: u8) -> DmaSlice {
    let mut buf = DmaBuf::new(len).unwrap();
    for (i, b) in buf.iter_mut().enumerate() {
        *b = seed.wrapping_add(u8::try_from((i / 512 + i) % 251).unwrap());
    }
    buf.freeze()
}

/// Returns every way of doing the I/O.
fn variants(image: &Image) -> Vec<FileOptions> {
    let base = image.options();
    vec![
        base.clone(),
        base.clone().buffered(true),
        base.clone().no_io_uring(true),
        base.no_io_uring(true).buffered(true).block_size(Some(4096)),
    ]
}

#[test]
fn every_operation_on_every_path() {
    let image = Image::new();
    for (round, options) in (1..).zip(variants(&image)) {
        let dev = File::open(&options).unwrap();
        let bs = dev.info().block_size as usize;
        let ch = channel(&dev);
        let one = data(bs, round);
        let many = data(64 * bs, round);
        ch.block_on(async {
            ch.write(5, one.clone(), true).await.unwrap();
            ch.write(100, many.clone(), false).await.unwrap();
            ch.flush().await.unwrap();
            let back = ch.read(5, DmaBuf::zeroed(bs).unwrap()).await.unwrap();
            assert_eq!(back[..], one[..]);
            let parts = vec![
                DmaBuf::zeroed(3 * bs).unwrap(),
                DmaBuf::zeroed(61 * bs).unwrap(),
            ];
            let (op, result) = ch
                .io(Op::ReadV {
                    lba: 100,
                    bufs: parts,
                })
                .await;
            result.unwrap();
            let Op::ReadV { bufs, .. } = op else {
                panic!("{op:?}")
            };
            assert_eq!(bufs[0][..], many[..3 * bs]);
            assert_eq!(bufs[1][..], many[3 * bs..]);

            let parts = vec![many.slice(bs..3 * bs), many.slice(0..bs)];
            ch.io(Op::WriteV {
                lba: 200,
                data: parts,
                fua: true,
            })
            .await
            .1
            .unwrap();
            let back = ch.read(200, DmaBuf::zeroed(3 * bs).unwrap()).await.unwrap();
            assert_eq!(back[..2 * bs], many[bs..3 * bs]);
            assert_eq!(back[2 * bs..], many[..bs]);

            ch.write_zeroes(101, 2, true).await.unwrap();
            ch.unmap(110, 8).await.unwrap();
            let back = ch.read(100, DmaBuf::new(64 * bs).unwrap()).await.unwrap();
            let mut expected = many.to_vec();
            expected[bs..3 * bs].fill(0);
            expected[10 * bs..18 * bs].fill(0);
            assert_eq!(back[..], expected[..]);
            ch.io(Op::Abort { tag: 77 }).await.1.unwrap();
            ch.io(Op::Reset).await.1.unwrap();
        });
        drop(ch);
        drop(dev);
        // The file contains what was written, at the right place.
        let mut raw = vec![0; bs];
        OpenOptions::new()
            .read(true)
            .open(image.path())
            .unwrap()
            .read_exact_at(&mut raw, 5 * bs as u64)
            .unwrap();
        assert_eq!(raw[..], one[..]);
    }
}

#[test]
fn many_large_writes_in_flight() {
    let image = Image::new();
    let mut options = image.options();
    options.size = Some(16 << 20);
    for no_io_uring in [false, true] {
        options.no_io_uring = no_io_uring;
        let dev = File::open(&options).unwrap();
        let ch = channel(&dev);
        let blocks = (1 << 20) / u64::from(dev.info().block_size);
        let writes = (0..16_u8)
            .map(|i| Op::Write {
                lba: u64::from(i) * blocks,
                data: data(1 << 20, i),
                fua: false,
            })
            .collect();
        for (_, result) in ch.block_on(ch.io_all(writes)) {
            result.unwrap();
        }
        ch.block_on(ch.flush()).unwrap();
        for i in [0_u8, 7, 15] {
            let back = ch
                .block_on(ch.read(u64::from(i) * blocks, DmaBuf::new(1 << 20).unwrap()))
                .unwrap();
            assert_eq!(back[..], data(1 << 20, i)[..]);
        }
    }
}

#[test]
fn a_second_opener_is_refused_with_the_pid() {
    let image = Image::new();
    let first = open(&image.uri("?size=1M&create=1")).unwrap();
    match open(&image.uri("")).unwrap_err() {
        BdevError::InUse { pid, .. } => assert_eq!(pid, Some(std::process::id())),
        e => panic!("{e}"),
    }
    drop(first);
    // It can be opened at once, even though a ring had the file open.
    let dev = open(&image.uri("")).unwrap();
    let ch = channel(&*dev);
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    drop(ch);
    drop(dev);
    open(&image.uri("")).unwrap();
}

#[test]
fn readers_share() {
    let image = Image::new();
    drop(open(&image.uri("?size=1M&create=1")).unwrap());
    let a = open(&image.uri("?read_only=1")).unwrap();
    let b = open(&image.uri("?read_only=1")).unwrap();
    assert!(!a.info().ops.has(OpKind::Write));
    let ch = channel(&*b);
    let e = ch.block_on(ch.write(0, data(512, 1), false)).unwrap_err();
    assert_eq!(e.kind, IoErrorKind::Unsupported);
    assert!(matches!(open(&image.uri("")), Err(BdevError::InUse { .. })));
}

#[test]
fn what_cannot_be_opened_says_why() {
    let image = Image::new();
    let e = open(&image.uri("")).unwrap_err().to_string();
    assert!(e.contains("no such file") && e.contains("create=1"), "{e}");
    let e = open(&format!("file://{}", image.dir.path().display()))
        .unwrap_err()
        .to_string();
    assert!(e.contains("directory"), "{e}");
    let e = open(&image.uri("?size=1000&create=1"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("1000"), "{e}");
    let e = open(&image.uri("?size=1M&block_size=1000&create=1"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("1000"), "{e}");
    fs::write(image.path(), b"").unwrap();
    let e = open(&image.uri("")).unwrap_err().to_string();
    assert!(e.contains("size="), "{e}");
}

#[test]
fn a_new_image_has_the_size_and_the_blocks_that_were_asked_for() {
    for (prealloc, blocks) in [
        (Prealloc::Off, 0),
        (Prealloc::Falloc, 2 << 20),
        (Prealloc::Full, 2 << 20),
    ] {
        let image = Image::new();
        let options = image
            .options()
            .size(Some(2 << 20))
            .block_size(Some(4096))
            .prealloc(prealloc);
        let dev = File::open(&options).unwrap();
        assert_eq!(dev.info().num_blocks, 512);
        assert_eq!(dev.info().block_size, 4096);
        let meta = fs::metadata(image.path()).unwrap();
        assert_eq!(meta.len(), 2 << 20);
        assert!(meta.blocks() * 512 >= blocks, "{prealloc:?}");
        if prealloc == Prealloc::Full {
            // Its blocks were written, to the last one.
            assert_eq!(dev.next_data(0).unwrap(), Some(0..512));
        }
    }
}

#[test]
fn a_file_that_shrank_is_an_error_with_the_place() {
    let image = Image::new();
    for options in variants(&image) {
        let dev = File::open(&options).unwrap();
        let ch = channel(&dev);
        OpenOptions::new()
            .write(true)
            .open(image.path())
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let bs = u64::from(dev.info().block_size);
        let lba = (2 << 20) / bs;
        let e = ch
            .block_on(ch.read(lba, DmaBuf::new(8192).unwrap()))
            .unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Short { done_bytes: 0 });
        let text = e.to_string();
        assert!(text.contains("byte offset 2097152"), "{text}");
        assert!(text.contains("1048576 bytes long now"), "{text}");
        // Half of the data was transferred.
        let lba = ((1 << 20) - 4096) / bs;
        let e = ch
            .block_on(ch.read(lba, DmaBuf::new(8192).unwrap()))
            .unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Short { done_bytes: 4096 });
        drop(ch);
        drop(dev);
        OpenOptions::new()
            .write(true)
            .open(image.path())
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
    }
}

#[test]
fn misuse_is_refused() {
    let image = Image::new();
    let dev = File::open(&image.options()).unwrap();
    let ch = channel(&dev);
    let last = dev.info().num_blocks - 1;
    let kind = |op| ch.block_on(ch.io(op)).1.unwrap_err().kind;
    let read = |lba, len| Op::Read {
        lba,
        buf: DmaBuf::new(len).unwrap(),
    };
    assert_eq!(kind(read(last, 1024)), IoErrorKind::OutOfRange);
    assert_eq!(kind(read(u64::MAX, 512)), IoErrorKind::OutOfRange);
    assert_eq!(kind(read(0, 513)), IoErrorKind::Misaligned);
    if dev.is_direct() {
        let odd = data(2048, 0).slice(1..513);
        let e = ch.block_on(ch.write(0, odd, false)).unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Misaligned, "{e}");
    }
    assert!(
        ch.block_on(ch.read(last, DmaBuf::new(512).unwrap()))
            .is_ok()
    );
}

/// Memory that was freed too early would have another owner by the time the kernel writes it.
#[test]
fn buffers_in_flight_at_drop_wait_for_the_kernel() {
    const N: u64 = 200;
    const LEN: usize = 32 << 10;
    let image = Image::new();
    for round in 0..5 {
        let dev = File::open(&image.options()).unwrap();
        let mut ch = dev.open_channel().unwrap();
        for tag in 0..N {
            ch.submit(
                tag,
                Op::Write {
                    lba: tag * 64,
                    data: data(LEN, round),
                    fua: false,
                },
            )
            .unwrap();
        }
        ch.poll(&mut Vec::new());
        drop(ch);
        // The same memory is taken again and has other bytes in it.
        let others: Vec<DmaBuf> = (0..N)
            .map(|_| {
                let mut buf = DmaBuf::new(LEN).unwrap();
                buf.fill(0xee);
                buf
            })
            .collect();
        let ch = channel(&dev);
        for tag in 0..N {
            let back = ch.read(tag * 64, DmaBuf::new(LEN).unwrap());
            assert!(
                ch.block_on(back).unwrap()[..] == data(LEN, round)[..],
                "{tag}"
            );
        }
        drop(others);
    }
}

#[test]
fn no_space_is_an_error_with_the_place() {
    let image = Image::new();
    with_small_tmpfs(
        "no_space_is_an_error_with_the_place",
        "1m",
        image.dir.path(),
        "writer_on_a_full_disk",
    );
}

#[test]
fn writer_on_a_full_disk() {
    let Some(dir) = small_tmpfs() else {
        return;
    };
    for no_io_uring in [false, true] {
        // This file system cannot zero a range, so zeroes allocate their space now. A later write
        // must not find the disk full.
        let path = dir.join("zeroes");
        let _ = fs::remove_file(dir.join("image"));
        let dev = File::open(
            &FileOptions::new(path.clone())
                .size(Some(512 << 10))
                .create(true)
                .no_io_uring(no_io_uring),
        )
        .unwrap();
        let ch = channel(&dev);
        ch.block_on(ch.write_zeroes(0, 512, true)).unwrap();
        assert_eq!(path.metadata().unwrap().blocks() * 512, 256 << 10);
        drop((ch, dev));
        fs::remove_file(path).unwrap();

        let dev = File::open(
            &FileOptions::new(dir.join("image"))
                .size(Some(8 << 20))
                .create(true)
                .no_io_uring(no_io_uring),
        )
        .unwrap();
        let ch = channel(&dev);
        let results = ch.block_on(async {
            let mut results = Vec::new();
            for i in 0..8 {
                results.push(ch.write(i * 512, data(256 << 10, 3), false).await);
            }
            results
        });
        let e = results.into_iter().find_map(Result::err).unwrap();
        assert_eq!(e.kind, IoErrorKind::NoSpace, "{e}");
        assert!(
            e.to_string().contains("write of 262144 bytes at LBA"),
            "{e}"
        );
    }
}

#[test]
fn threads_each_with_a_channel() {
    let image = Image::new();
    let dev: Arc<dyn BlockDevice> = Arc::new(File::open(&image.options()).unwrap());
    std::thread::scope(|scope| {
        for t in 0..4_u8 {
            let dev = Arc::clone(&dev);
            scope.spawn(move || {
                let ch = channel(&*dev);
                for i in 0..50 {
                    let lba = u64::from(t) * 1024 + i * 8;
                    ch.block_on(async {
                        ch.write(lba, data(4096, t), i % 8 == 0).await.unwrap();
                        let back = ch.read(lba, DmaBuf::new(4096).unwrap()).await.unwrap();
                        assert_eq!(back[..], data(4096, t)[..]);
                    });
                }
            });
        }
    });
}

/// The process that makes an image removes it if that fails, while another one waits for its lock.
#[test]
fn an_image_that_goes_while_its_lock_is_awaited_is_not_used() {
    let image = Image::new();
    let holders = || {
        let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        links.filter(|path| *path == image.path()).count()
    };
    loop {
        fs::write(image.path(), vec![0; 1 << 20]).unwrap();
        let holder = fs::File::open(image.path()).unwrap();
        lock_unused(&holder).unwrap();
        let opened = std::thread::scope(|scope| {
            let opening = scope.spawn(|| open(&image.uri("")));
            while holders() < 2 && !opening.is_finished() {
                std::thread::yield_now();
            }
            fs::remove_file(image.path()).unwrap();
            drop(holder);
            opening.join().unwrap()
        });
        match opened {
            // The thread had waited for as long as it does before the file was removed.
            Err(BdevError::InUse { .. }) => {}
            Err(BdevError::NoSuchFile { .. }) => return,
            other => panic!("{other:?}"),
        }
    }
}
