//! Tests of a process that may not make a certain system call: each operation ends with a result or
//! an error, and no operation that needed the call is reported as done.
//!
//! Each case runs in a process of its own, under a seccomp filter that gives one call an errno.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use pumice_bdev::file::{File, FileOptions};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, DmaSlice, IoErrorKind, Op, open};
use pumice_confine::deny_from_now_on;
use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};

/// Runs `child`, a test of this file, in a process of its own, for at most a minute.
fn in_child(child: &str, case: &str) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", "--test-threads=1", child])
        .env("PUMICE_CONFINED", dir.path())
        .env("PUMICE_CASE", case)
        .process_group(0);
    let mut process = command.spawn().unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        if process.try_wait().unwrap().is_some() {
            let status = process.wait().unwrap();
            assert!(status.success(), "{child} {case}: {status}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = process.kill();
    let _ = process.wait();
    panic!("{child} {case}: still running after a minute");
}

/// Returns the image and the case of a child, or `None` in the parent.
fn case() -> Option<(FileOptions, String)> {
    let dir = PathBuf::from(std::env::var_os("PUMICE_CONFINED")?);
    let options = FileOptions::new(dir.join("image"))
        .size(Some(8 << 20))
        .create(true);
    Some((options, std::env::var("PUMICE_CASE").unwrap()))
}

/// Writes, reads and flushes on `ch`, one operation at a time and many at once.
fn use_it(ch: &AsyncChannel, byte: u8) {
    let filled = |len: usize| {
        let mut buf = DmaBuf::new(len).unwrap();
        buf.fill(byte);
        buf.freeze()
    };
    ch.block_on(async {
        ch.write(0, filled(4096), true).await.unwrap();
        let writes = (0..100)
            .map(|i| Op::Write {
                lba: i * 64,
                data: filled(16 << 10),
                fua: i % 8 == 0,
            })
            .collect();
        for (_, result) in ch.io_all(writes).await {
            result.unwrap();
        }
        ch.flush().await.unwrap();
        ch.write_zeroes(8, 8, true).await.unwrap();
        ch.unmap(64, 8).await.unwrap();
        assert!(ch.io(Op::Reset).await.1.is_ok());
        let buf = ch.read(99 * 64, DmaBuf::new(16 << 10).unwrap()).await;
        assert!(buf.unwrap().iter().all(|b| *b == byte));
        let buf = ch.read(8, DmaBuf::new(4096).unwrap()).await.unwrap();
        assert!(buf.iter().all(|b| *b == 0));
    });
    assert_eq!(ch.in_flight(), 0);
}

#[test]
fn without_io_uring_threads_do_it() {
    for nr in pumice_confine::IO_URING {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EBADF] {
            for when in ["before", "after"] {
                in_child("child_without_a_call", &format!("{nr} {errno} {when}"));
            }
        }
    }
}

#[test]
fn child_without_a_call() {
    let Some((options, case)) = case() else {
        return;
    };
    let words: Vec<&str> = case.split(' ').collect();
    let (nr, errno) = (words[0].parse().unwrap(), words[1].parse().unwrap());
    if words[2] == "before" {
        deny_from_now_on(&[nr], errno);
    }
    let dev = File::open(&options).unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    if words[2] == "after" {
        use_it(&ch, 1);
        deny_from_now_on(&[nr], errno);
    }
    use_it(&ch, 2);
    use_it(&ch, 3);
    use_it(&AsyncChannel::new(dev.open_channel().unwrap()), 4);
}

#[test]
fn what_the_kernel_has_taken_still_ends() {
    in_child("child_confined_with_writes_in_flight", "");
}

#[test]
fn child_confined_with_writes_in_flight() {
    let Some((options, _)) = case() else {
        return;
    };
    let dev = File::open(&options).unwrap();
    for drop_it in [false, true] {
        let mut ch = dev.open_channel().unwrap();
        let write = |tag: u64| Op::Write {
            lba: tag * 64,
            data: DmaBuf::zeroed(32 << 10).unwrap().freeze(),
            fua: true,
        };
        let mut out = Vec::new();
        for tag in 0..50 {
            ch.submit(tag, write(tag)).unwrap();
        }
        ch.poll(&mut out);
        if !drop_it {
            deny_from_now_on(&[libc::SYS_io_uring_enter], libc::EPERM);
        }
        for tag in 50..100 {
            ch.submit(tag, write(tag)).unwrap();
        }
        if drop_it {
            ch.poll(&mut out);
            drop(ch);
            continue;
        }
        while out.len() < 100 {
            ch.wait(Duration::from_millis(10)).unwrap();
            ch.poll(&mut out);
        }
        let mut tags: Vec<u64> = out.iter().map(|c| c.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..100).collect::<Vec<_>>());
        assert!(out.iter().all(|c| c.result.is_ok()));
        assert_eq!(ch.in_flight(), 0);
    }
}

/// A write with FUA that the kernel has not taken when io_uring stops working is synced by the
/// threads that carry it out: it fails where `fdatasync` is refused. If it were not synced, it would
/// succeed.
#[test]
fn writes_that_a_ring_hands_on_are_synced() {
    in_child("child_whose_ring_breaks_before_its_writes", "");
}

#[test]
fn child_whose_ring_breaks_before_its_writes() {
    let Some((options, _)) = case() else {
        return;
    };
    let dev = File::open(&options).unwrap();
    if !dev.is_direct() {
        return eprintln!("skipped: no direct I/O here, where a sync follows in any case");
    }
    let mut ch = dev.open_channel().unwrap();
    // The ring gets them with the next poll, and has none of them before.
    for tag in 0..20 {
        let write = Op::Write {
            lba: tag * 8,
            data: DmaBuf::zeroed(4096).unwrap().freeze(),
            fua: tag % 2 == 0,
        };
        ch.submit(tag, write).unwrap();
    }
    deny_from_now_on(&[libc::SYS_io_uring_enter], libc::EPERM);
    deny_from_now_on(&[libc::SYS_fdatasync], libc::EIO);
    let mut out = Vec::new();
    while out.len() < 20 {
        ch.wait(Duration::from_millis(10)).unwrap();
        ch.poll(&mut out);
    }
    for ended in out {
        let kind = ended.result.err().map(|e| e.kind);
        let expected = ended.op.fua().then_some(IoErrorKind::Media);
        assert_eq!(kind, expected, "{:?}", ended.op);
    }
}

/// A flush and a write with FUA must fail where `fdatasync` is refused: if it were not called,
/// they would succeed.
#[test]
fn threads_sync_what_must_be_durable() {
    in_child("child_without_fdatasync", "");
}

#[test]
fn child_without_fdatasync() {
    let Some((options, _)) = case() else {
        return;
    };
    for buffered in [false, true] {
        let options = options.clone().no_io_uring(true).buffered(buffered);
        // The device is opened again each time, because it remembers a failed flush.
        let try_it = |op: Op| {
            let dev = File::open(&options).unwrap();
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            ch.block_on(ch.io(op)).1
        };
        let write = |fua| Op::Write {
            lba: 0,
            data: DmaBuf::zeroed(4096).unwrap().freeze(),
            fua,
        };
        let zeroes = |fua| Op::WriteZeroes {
            lba: 0,
            len_blocks: 8,
            fua,
        };
        if !buffered {
            for op in [Op::Flush, write(true), zeroes(true)] {
                try_it(op).unwrap();
            }
            deny_from_now_on(&[libc::SYS_fdatasync], libc::EIO);
        }
        for op in [Op::Flush, write(true), zeroes(true)] {
            let e = try_it(op).unwrap_err();
            assert_eq!(e.kind, IoErrorKind::Media, "{e}");
        }
        for op in [write(false), zeroes(false)] {
            try_it(op).unwrap();
        }
    }
}

/// A sync follows an ordinary write where a filter does not know the call that writes durably. A
/// call that fails says that its flush may have failed.
#[test]
fn a_durable_write_of_who_waits_for_it_is_durable_or_fails() {
    for errno in [libc::EPERM, libc::ENOSYS, libc::EIO] {
        in_child("child_without_pwritev2", &errno.to_string());
    }
}

#[test]
fn child_without_pwritev2() {
    let Some((options, case)) = case() else {
        return;
    };
    let errno = case.parse().unwrap();
    let dev = File::open(&options).unwrap();
    if !dev.is_direct() {
        return eprintln!("skipped: no direct I/O here, where a sync follows in any case");
    }
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let write = |fua| ch.block_on(ch.write(0, DmaBuf::zeroed(4096).unwrap().freeze(), fua));
    deny_from_now_on(&[libc::SYS_pwritev2], errno);
    if errno != libc::EIO {
        use_it(&ch, 1);
        deny_from_now_on(&[libc::SYS_fdatasync], libc::EIO);
    }
    assert_eq!(write(true).unwrap_err().kind, IoErrorKind::Media);
    let flushed = ch.block_on(ch.flush()).unwrap_err();
    assert!(
        flushed.to_string().contains("an earlier flush failed"),
        "{flushed}"
    );
    write(false).unwrap();
}

/// A new image is durable together with its name, or it does not exist.
#[test]
fn a_new_image_is_synced() {
    in_child("child_without_fsync", "");
}

#[test]
fn child_without_fsync() {
    let Some((options, _)) = case() else {
        return;
    };
    deny_from_now_on(&[libc::SYS_fsync], libc::EIO);
    let e = File::open(&options).unwrap_err().to_string();
    // The file comes before its name.
    assert!(e.contains("sync") && !e.contains("directory"), "{e}");
    assert!(!options.path.exists());
    let uri = format!("file://{}?size=8M&create=1", options.path.display());
    assert!(open(&uri).is_err());
    assert!(!options.path.exists());
}

/// An image whose name cannot be made durable does not exist.
#[test]
fn a_new_image_has_a_durable_name() {
    in_child("child_without_a_descriptor_for_the_directory", "");
    in_child("child_without_a_descriptor_for_the_directory", "no name");
}

#[test]
fn child_without_a_descriptor_for_the_directory() {
    let Some((options, case)) = case() else {
        return;
    };
    // What comes first is told: the name, then the sync that makes it durable.
    let first = match case.as_str() {
        "no name" => {
            deny_from_now_on(&[libc::SYS_linkat], libc::EIO);
            "name the new file"
        }
        _ => "sync the directory",
    };
    // The image gets the lowest descriptor that is free, and there is none for its directory.
    let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is writable.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    assert_eq!(read, 0);
    limit.rlim_cur = libc::rlim_t::try_from(next).unwrap() + 1;
    // SAFETY: `limit` is readable.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert_eq!(set, 0);
    let e = File::open(&options).unwrap_err().to_string();
    assert!(e.contains(first), "{e}");
    assert!(!options.path.exists());
}

/// A device in memory does not report bytes as written for which there was no memory.
#[test]
fn what_finds_no_memory_is_not_written() {
    in_child("child_without_memory", "");
}

#[test]
fn child_without_memory() {
    if case().is_none() {
        return;
    }
    let dev = open("malloc://1G?block_size=4096").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let mut buf = DmaBuf::new(1 << 20).unwrap();
    buf.fill(7);
    let data = buf.freeze();
    ch.block_on(ch.write(0, data.clone(), false)).unwrap();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let most = pages * 4096 + (32 << 20);
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: `limit` is readable.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    assert_eq!(set, 0);
    let ops: [fn(u64, DmaSlice) -> Op; 3] = [
        |lba, data| Op::Write {
            lba,
            data,
            fua: false,
        },
        |lba, data| Op::WriteV {
            lba,
            data: vec![data],
            fua: false,
        },
        |dst_lba, _| Op::Copy {
            src_lba: 0,
            dst_lba,
            len_blocks: 256,
        },
    ];
    for (n, op) in (0..).zip(ops) {
        let kinds = (1..80).map(|mib| {
            let op = op((n * 80 + mib) * 256, data.clone());
            ch.block_on(ch.io(op)).1.err().map(|e| e.kind)
        });
        let kinds: Vec<_> = kinds.collect();
        assert!(kinds.contains(&Some(IoErrorKind::NoSpace)), "{kinds:?}");
    }
    let back = ch.block_on(ch.read(0, DmaBuf::new(4096).unwrap())).unwrap();
    assert!(back.iter().all(|byte| *byte == 7));
}

/// The kernel reports a failed writeback once. Afterwards no flush may claim that those bytes are
/// durable.
#[test]
fn after_a_failed_sync_no_flush_succeeds() {
    in_child("child_with_a_failed_sync", "ring");
    in_child("child_with_a_failed_sync", "threads");
}

#[test]
fn child_with_a_failed_sync() {
    let Some((options, case)) = case() else {
        return;
    };
    let options = options.buffered(true).no_io_uring(case == "threads");
    let Some(host) = FullHost::new(&options.path) else {
        return;
    };
    let mut options = options.size(Some(32 << 20));
    options.path = host.dir.join("mount/image");
    let dev = File::open(&options).unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let other = AsyncChannel::new(dev.open_channel().unwrap());
    let mut failed = false;
    for i in 0..20 {
        let mut buf = DmaBuf::new(1 << 20).unwrap();
        buf.fill(7);
        failed |= ch
            .block_on(ch.write(i * 2048, buf.freeze(), false))
            .is_err();
    }
    failed |= ch.block_on(ch.flush()).is_err();
    assert!(failed, "the host was not full");
    for ch in [&ch, &other, &ch] {
        ch.block_on(ch.flush()).unwrap_err();
        let buf = DmaBuf::zeroed(4096).unwrap().freeze();
        ch.block_on(ch.write(0, buf, true)).unwrap_err();
    }
    // Reading still works.
    ch.block_on(ch.read(0, DmaBuf::new(4096).unwrap())).unwrap();
}

/// ext4 on a loop device whose backing file is on a full tmpfs, so that writes fail after they were
/// accepted.
struct FullHost {
    dir: PathBuf,
}

impl FullHost {
    fn new(image: &std::path::Path) -> Option<FullHost> {
        let dir = image.parent()?.join("host");
        std::fs::create_dir(&dir).ok()?;
        let script = "set -e; cd \"$0\"; mkdir small mount
            mount -t tmpfs -o size=8m none small; truncate -s 64M small/b
            loop=$(losetup -f --show small/b) || { umount small; exit 77; }
            echo $loop > loop
            mkfs.ext4 -q -O ^has_journal $loop; mount $loop mount";
        let done = Command::new("sh").args(["-c", script]).arg(&dir).status();
        let host = FullHost { dir };
        match done {
            Ok(status) if status.success() => Some(host),
            other => {
                eprintln!("skipped: no loop device or mount here ({other:?})");
                None
            }
        }
    }
}

impl Drop for FullHost {
    fn drop(&mut self) {
        let script = "cd \"$0\"; umount -l mount; losetup -d $(cat loop); umount -l small";
        let _ = Command::new("sh")
            .args(["-c", script])
            .arg(&self.dir)
            .status();
    }
}

/// A forked child that drops the devices it inherited takes neither the lock nor the file from its
/// parent.
#[test]
fn a_forked_child_leaves_the_lock_alone() {
    in_child("child_that_forks", "");
}

#[test]
fn child_that_forks() {
    let Some((options, _)) = case() else {
        return;
    };
    let dev = File::open(&options).unwrap();
    dev.keep_file(false);
    // SAFETY: the child only drops the device, which neither takes a lock that another thread may
    // hold nor returns, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(dev);
        // SAFETY: the call ends the process at once.
        unsafe { libc::_exit(0) };
    }
    assert!(pid > 0);
    let mut status = 0;
    // SAFETY: `status` is writable.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
    assert!(options.path.exists());
    let e = File::open(&options).unwrap_err();
    assert!(matches!(e, pumice_bdev::BdevError::InUse { .. }), "{e}");
    dev.keep_file(true);
}

/// Without the thread that watches the controller no time-out is noticed, so it is not opened.
#[test]
fn a_controller_is_not_opened_without_its_thread() {
    in_child("child_without_threads", "");
}

#[test]
fn child_without_threads() {
    if case().is_none() {
        return;
    }
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(4 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk])).unwrap();
    deny_from_now_on(&[libc::SYS_clone, libc::SYS_clone3], libc::EAGAIN);
    let opened = Controller::new(soft.transport(), ControllerOptions::default());
    let error = opened.unwrap_err().to_string();
    assert!(error.contains("the thread that watches"), "{error}");
    assert_eq!(soft.stats().commands, 0, "the controller was changed");
}
