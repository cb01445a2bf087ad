//! Tests of the end of a process and of its forks: an orderly end keeps the data, a child does not
//! touch the device, and an unmount releases it.
#![allow(unsafe_code, reason = "fork is what is tested")]

mod common;

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::faults::{hang, setup_with};
use common::memory;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_blobfs::fs::{
    Attributes, File, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions, ReadRequest,
};

const DIR: &str = "PUMICE_EXIT_DIR";
const HOW: &str = "PUMICE_EXIT_HOW";
const LIMIT: Duration = Duration::from_secs(120);

static HELD: OnceLock<(FileSystem, File)> = OnceLock::new();

fn image(dir: &Path, name: &str) -> String {
    format!("file://{}/{name}.img?size=64M&create=1", dir.display())
}

/// Mounts without the log in shared memory, which would also keep what the end of a process does not write.
fn mounted(uri: &str) -> FileSystem {
    let dev = pumice_bdev::open(uri).unwrap();
    if pumice_bdev::contents::recognise(&*dev).unwrap().is_none() {
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    }
    let mut opts = MountOptions::default();
    opts.volatile = true;
    FileSystem::mount(dev, &opts).unwrap()
}

/// Makes bytes whose order shows when a block is in the wrong place.
fn bytes(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// Makes a mount with a file of which nothing is durable.
fn appended(uri: &str) -> (FileSystem, File) {
    let fs = mounted(uri);
    let file = fs.open("/kept", OpenOptions::CREATE).unwrap();
    file.append(&bytes(3_000_001)).unwrap();
    (fs, file)
}

fn assert_kept(uri: &str) {
    let fs = mounted(uri);
    let file = fs.open("/kept", OpenOptions::READ).unwrap();
    let mut read = vec![0; 3_000_002];
    assert_eq!(file.read_at(0, &mut read).unwrap(), 3_000_001);
    assert!(read[..3_000_001] == bytes(3_000_001));
    assert!(fs.problems().is_empty(), "{:?}", fs.problems());
}

/// Is not a test: the tests below run it as a process of its own.
#[test]
fn child() {
    let (Some(dir), Ok(how)) = (std::env::var_os(DIR), std::env::var(HOW)) else {
        return;
    };
    let dir = Path::new(&dir);
    let uri = image(dir, "a");
    match &how[..] {
        "exit" => {
            let _held = appended(&uri);
            std::process::exit(0);
        }
        "static" => {
            assert!(HELD.set(appended(&uri)).is_ok());
        }
        "forget" => {
            std::mem::forget(appended(&uri));
        }
        "two" => {
            std::mem::forget(appended(&uri));
            let _other = appended(&image(dir, "b"));
            std::process::exit(0);
        }
        "threads" => exit_among_writers(&uri),
        "forked" => forked_child_ends(&uri),
        other => panic!("{HOW}={other}"),
    }
}

/// Ends while other threads append. What they were told is written down before the end.
fn exit_among_writers(uri: &str) {
    use std::io::Write as _;
    let fs = mounted(uri);
    for thread in 0..3 {
        let file = fs.open(&format!("/{thread}"), OpenOptions::CREATE).unwrap();
        std::thread::spawn(move || {
            for n in 0_u64.. {
                if file.append(&n.to_le_bytes()).is_err() {
                    break;
                }
                if n % 64 == 0 {
                    let _ = writeln!(std::io::stdout(), "ack {thread} {n}");
                }
            }
        });
    }
    std::thread::sleep(Duration::from_millis(100));
    std::process::exit(0);
}

/// In a child of a mounted parent, tries everything, drops the copies and exits. Then the parent
/// goes on.
fn forked_child_ends(uri: &str) {
    let (fs, file) = appended(uri);
    let begun = file.read_async(0, 100).unwrap();
    // A thread of the parent has the lock of a file, which nobody releases in the child.
    let (dev, locked) = closed_file();
    dev.inject(hang(OpKind::Write, 1, None));
    let writer = {
        let locked = locked.clone();
        std::thread::spawn(move || locked.write_at(0, b"x").unwrap())
    };
    while !dev.injections().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let code = in_fork(|| {
        let forked = |e: FsError| matches!(e, FsError::Forked { .. });
        let mut buf = [0; 16];
        let answers = [
            file.append(b"x").is_err_and(forked),
            file.read_at(0, &mut buf).is_err_and(forked),
            file.sync().is_err_and(forked),
            begun.poll() && begun.read_into(&mut buf).is_err_and(forked),
            reads_many(&file).is_err_and(forked),
            file.truncate(0).is_err_and(forked),
            fs.unlink("/kept").is_err_and(forked),
            fs.mkdir("/d").is_err_and(forked),
            file.set_attributes(&Attributes::default())
                .is_err_and(forked),
            fs.set_attributes("/kept", &Attributes::default())
                .is_err_and(forked),
            fs.set_attributes("/none", &Attributes::default())
                .is_err_and(forked),
            fs.stat("/kept").is_err_and(forked),
            fs.open("/new", OpenOptions::CREATE).is_err_and(forked),
            fs.unmount().is_err_and(forked),
            fs.statfs().total == 0 && fs.free_bytes() == 0 && fs.dirty_bytes() == 0,
            fs.is_inherited(),
            // What the process had is only looked at.
            file.allocated() > 0,
            // Nothing is that takes a lock, whose holder may not exist here.
            file.stat().len == 3_000_001 && file.stat().links == 0,
            !file.path().contains("/kept"),
        ];
        locked.finish_writing();
        drop(file.clone());
        drop(fs.clone());
        // A mount of its own works beside them.
        let own = FileSystem::mount(formatted(), &MountOptions::default()).unwrap();
        let kept = own.open("/own", OpenOptions::CREATE).unwrap();
        kept.append(b"mine").unwrap();
        own.unmount().unwrap();
        i32::from(!answers.iter().all(|ok| *ok))
    });
    assert_eq!(code, 0, "the child");
    dev.resume();
    writer.join().unwrap();
    file.sync().unwrap();
    drop(file);
    fs.unmount().unwrap();
}

fn reads_many(file: &File) -> pumice_blobfs::fs::Result<usize> {
    let mut buf = [0; 16];
    let mut requests = [ReadRequest::new(0, &mut buf)];
    file.read_many(&mut requests);
    let [request] = requests;
    request.result
}

/// A file whose writes go through to the device.
fn closed_file() -> (Arc<ErrorDevice>, File) {
    let (dev, fs) = setup_with(
        memory(16 << 20, 4096),
        &FormatOptions::default(),
        &MountOptions::default(),
    );
    let file = fs.open("/closed", OpenOptions::CREATE).unwrap();
    file.append(b"bytes").unwrap();
    drop(file);
    (dev, fs.open("/closed", OpenOptions::CREATE).unwrap())
}

fn formatted() -> Arc<dyn BlockDevice> {
    let dev = memory(16 << 20, 4096);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    dev
}

/// Runs `child` in a forked process, which then calls `exit`. Returns its code.
fn in_fork(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child uses only what a forked child of this process may use, which is the test.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
        std::process::exit(code);
    }
    let started = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: `status` is ours.
        let done = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        assert!(done >= 0);
        if done == pid {
            return if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                1000 + libc::WTERMSIG(status)
            };
        }
        if started.elapsed() > LIMIT {
            // SAFETY: our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("the forked child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs [`child`]. Returns its exit status and what it printed.
fn run(dir: &Path, how: &str) -> (ExitStatus, String) {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(DIR, dir)
        .env(HOW, how)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = process.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut out, &mut text).unwrap();
        text
    });
    let started = Instant::now();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return (status, reader.join().unwrap());
        }
        if started.elapsed() > LIMIT {
            process.kill().unwrap();
            panic!("{how}: the process does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ends_and_keeps(how: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (status, out) = run(dir.path(), how);
    assert!(status.success(), "{how}: {status}: {out}");
    assert_kept(&image(dir.path(), "a"));
    if how == "two" {
        assert_kept(&image(dir.path(), "b"));
    }
}

#[test]
fn exit_keeps_what_was_appended() {
    ends_and_keeps("exit");
}

#[test]
fn a_return_from_main_with_the_mount_in_a_static_keeps_it() {
    ends_and_keeps("static");
}

#[test]
fn a_forgotten_mount_is_unmounted_at_the_end() {
    ends_and_keeps("forget");
}

#[test]
fn all_mounts_are_unmounted_at_the_end() {
    ends_and_keeps("two");
}

#[test]
fn a_forked_child_leaves_the_parents_mount_alone() {
    ends_and_keeps("forked");
}

#[test]
fn an_end_among_writers_keeps_what_they_were_told() {
    let dir = tempfile::tempdir().unwrap();
    let (status, out) = run(dir.path(), "threads");
    assert!(status.success(), "{status}");
    let fs = mounted(&image(dir.path(), "a"));
    let mut acknowledged = [0_u64; 3];
    for line in out.lines().filter_map(|line| line.strip_prefix("ack ")) {
        let (thread, n) = line.split_once(' ').unwrap();
        acknowledged[thread.parse::<usize>().unwrap()] = n.parse::<u64>().unwrap() + 1;
    }
    for (thread, n) in acknowledged.iter().enumerate() {
        let file = fs.open(&format!("/{thread}"), OpenOptions::READ).unwrap();
        assert!(file.len() >= n * 8, "{} of {n} records", file.len() / 8);
        let mut read = vec![0; usize::try_from(file.len()).unwrap()];
        assert_eq!(file.read_at(0, &mut read).unwrap(), read.len());
        for (want, got) in (0_u64..).zip(read.chunks_exact(8)) {
            assert_eq!(got, want.to_le_bytes());
        }
    }
}

/// The device is released by the unmount, whichever handles are left.
#[test]
fn an_unmount_gives_up_the_device_whatever_handles_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "a");
    let (fs, file) = appended(&uri);
    let lock = fs.lock("/lock").unwrap();
    let other_thread = file.clone();
    std::thread::spawn(move || other_thread.read_at(0, &mut [0; 100]).unwrap())
        .join()
        .unwrap();
    fs.unmount().unwrap();
    let again = mounted(&uri);
    assert!(matches!(
        file.read_at(0, &mut [0; 10]),
        Err(FsError::Unmounted { .. })
    ));
    assert!(matches!(
        file.append(b"late"),
        Err(FsError::Unmounted { .. })
    ));
    assert!(matches!(file.sync(), Err(FsError::Unmounted { .. })));
    assert!(matches!(fs.stat("/kept"), Err(FsError::Unmounted { .. })));
    assert!(matches!(fs.unmount(), Err(FsError::Unmounted { .. })));
    drop((file, lock, fs));
    again.unmount().unwrap();
    assert_kept(&uri);
}

/// A second mount in the same process names this process.
#[test]
fn in_use_by_this_process_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "a");
    let _fs = mounted(&uri);
    let error = pumice_bdev::open(&uri).err().unwrap().to_string();
    assert!(error.contains("this process"), "{error}");
}

/// An unmount whose last write fails is called again, and loses nothing.
#[test]
fn a_failed_unmount_is_repeated() {
    for failures in 1..12 {
        let base = memory(64 << 20, 4096);
        FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        let as_device: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
        let fs = FileSystem::mount(as_device, &MountOptions::default()).unwrap();
        let file = fs.open("/kept", OpenOptions::CREATE).unwrap();
        file.append(&bytes(3_000_001)).unwrap();
        file.sync().unwrap();
        // The masks and the super block are in the first blocks.
        dev.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Write))
                .count(failures)
                .range(Some((0, 4))),
        );
        let mut failed = 0;
        while let Err(error) = fs.unmount() {
            failed += 1;
            assert!(failed < 40, "never: {error}");
        }
        let fs = FileSystem::mount(base, &MountOptions::default()).unwrap();
        assert_eq!(fs.stat("/kept").unwrap().len, 3_000_001);
        drop(file);
    }
}
