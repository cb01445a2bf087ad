//! Tests each cell of the table "What survives what" in `kv/README.md` with whole processes. Power
//! cuts are in `crash.rs`, on a simulated disk.
#![allow(unsafe_code, reason = "fork and resource limits are what is tested")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::{key, value, watchdog};
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::bdev::{self, BlockDevice, OpKind};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{
    DB, DBCompressionType, IteratorMode, Options, TransactionDBOptions, WriteOptions,
};
use pumice::{
    Db, DbOptions, FileSystem, FormatOptions, FsError, MountOptions, mount, mount_device,
};
use pumice_bdev_testkit::images::ImageDir;

const URI: &str = "PUMICE_TEST_URI";
const MODE: &str = "PUMICE_TEST_MODE";
const PUTS: u64 = 20_000;

static HELD: OnceLock<Db> = OnceLock::new();
static HELD_BY_ENV: OnceLock<DB> = OnceLock::new();

fn options() -> DbOptions {
    DbOptions::new().configure(|options| options.set_compression_type(DBCompressionType::None))
}

fn fill(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        db.put(key(n), value(n)).unwrap();
    }
}

fn check(db: &Db, keys: std::ops::Range<u64>, what: &str) {
    for n in keys {
        let got = db.get(key(n)).unwrap();
        assert_eq!(got.as_deref(), Some(&value(n)[..]), "{what}: key {n}");
    }
}

/// This is not a test: the tests below run it as a process of its own. Otherwise it does nothing.
#[test]
fn child() {
    let (Ok(uri), Ok(mode)) = (std::env::var(URI), std::env::var(MODE)) else {
        return;
    };
    let open = || options().open(&uri).unwrap();
    match &mode[..] {
        "exit" => {
            let db = open();
            fill(&db, 0..PUTS);
            std::process::exit(0);
        }
        "static" => fill(HELD.get_or_init(open), 0..PUTS),
        "forget" => {
            let db = open();
            fill(&db, 0..PUTS);
            std::mem::forget(db);
        }
        "drop" => fill(&open(), 0..PUTS),
        "panic" => {
            let db = open();
            fill(&db, 0..PUTS);
            panic!("as the test wants it");
        }
        "env" => {
            let db = HELD_BY_ENV.get_or_init(|| {
                let fs = mount(&uri, &MountOptions::new()).unwrap();
                let mut options = Options::default();
                options.create_if_missing(true);
                options.set_env(&pumice::env(&fs));
                DB::open(&options, "/").unwrap()
            });
            for n in 0..PUTS {
                db.put(key(n), value(n)).unwrap();
            }
        }
        "exit among writers" => exit_among_writers(&uri),
        "killed after puts" | "killed after flush" | "killed and volatile" => {
            let volatile = mode.ends_with("volatile");
            let how = options().mount(MountOptions::new().volatile(volatile));
            let db = how.open(&uri).unwrap();
            fill(&db, 0..PUTS);
            if mode.ends_with("flush") {
                db.flush().unwrap();
            }
            say("ready");
            std::thread::sleep(Duration::from_secs(3600));
        }
        "killed after commits" => killed_after_commits(&uri),
        "fork" => a_fork_of_an_open_database(&uri),
        "workers" => two_forked_workers(&uri),
        "failed close" => a_failed_close(&uri),
        "unlogged after a failed close" => a_put_without_a_log_after_a_failed_close(&uri),
        "failed exit" => an_end_that_cannot_keep(&uri),
        other => panic!("{MODE}={other}"),
    }
}

/// Commits transactions of two keys each, prepares one, and leaves one open.
fn killed_after_commits(uri: &str) {
    let db = options()
        .open_transactions(uri, &TransactionDBOptions::new())
        .unwrap();
    for n in 0..PUTS / 10 {
        let transaction = db.transaction();
        transaction.put(key(n), value(n)).unwrap();
        transaction.put(key(n + PUTS), value(n)).unwrap();
        transaction.commit().unwrap();
    }
    let (prepared, open) = (db.transaction(), db.transaction());
    prepared.set_name(b"prepared").unwrap();
    prepared.put("prepared", "1").unwrap();
    prepared.prepare().unwrap();
    open.put("open", "1").unwrap();
    say("ready");
    std::thread::sleep(Duration::from_secs(3600));
}

fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{what}").unwrap();
    out.flush().unwrap();
}

/// Threads put, with flushes and compactions in progress, and report each acknowledged put.
fn exit_among_writers(uri: &str) {
    let db = HELD.get_or_init(|| {
        let small = options().configure(|options| options.set_write_buffer_size(64 << 10));
        small.open(uri).unwrap()
    });
    for thread in 0..3_u64 {
        std::thread::spawn(move || {
            for n in (thread..).step_by(3) {
                if db.put(key(n), value(n)).is_err() {
                    break;
                }
                let _ = writeln!(std::io::stdout(), "ack {n}");
            }
        });
    }
    std::thread::sleep(Duration::from_millis(300));
    std::process::exit(0);
}

/// Children of a process with an open database: one exits, one drops what it inherited, one tries
/// to use it. The parent continues.
fn a_fork_of_an_open_database(uri: &str) {
    let db = options().open(uri).unwrap();
    fill(&db, 0..PUTS / 2);
    let db = std::cell::Cell::new(Some(db));
    let children: [&dyn Fn() -> i32; 3] = [
        &|| 0,
        &|| {
            drop(db.take());
            0
        },
        &|| {
            let db = db.take().unwrap();
            let refused = db
                .file_system()
                .open("/new", OpenOptions::CREATE)
                .is_err_and(|e| matches!(e, FsError::Forked { .. }));
            i32::from(!refused)
        },
    ];
    for child in children {
        assert_eq!(in_fork(child), 0);
    }
    let db = db.take().unwrap();
    fill(&db, PUTS / 2..PUTS);
    check(&db, 0..PUTS, "in the parent");
    db.close().unwrap();
}

/// This runs in a process of its own, since the limit on the length of files applies to a process.
fn a_failed_close(uri: &str) {
    let db = options().open(uri).unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    db.put_opt("first", "1", &sync).unwrap();
    // Beyond this byte the kernel refuses to write with EFBIG, which has the effect of a full disk.
    let limits = Limits::of_files(24 << 20);
    let mut put = 0;
    while put < 400_000 && db.put(key(put), value(put)).is_ok() {
        put += 1;
    }
    let error = db.close().expect_err("closed, with nowhere to write to");
    println!("{put} puts, then: {error}");
    check(&db, 0..put.min(1_000), "still readable");
    drop(limits);
    let started = Instant::now();
    while let Err(error) = db.close() {
        assert!(started.elapsed() < common::LIMIT / 3, "never: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    db.close().unwrap();
    assert!(db.put("late", "1").is_err());
    let again = options().open(uri).unwrap();
    check(&again, 0..put, "after the second close");
    assert_eq!(again.get("first").unwrap().as_deref(), Some(&b"1"[..]));
    again.close().unwrap();
}

/// RocksDB writes no table any longer after a close whose unmount failed.
fn a_put_without_a_log_after_a_failed_close(uri: &str) {
    let db = options().open(uri).unwrap();
    db.put("logged", "1").unwrap();
    db.flush_wal(true).unwrap();
    let other = db.file_system().open("/other", OpenOptions::CREATE);
    let other = other.unwrap();
    let limits = Limits::of_files(24 << 20);
    other.append(&vec![1; 2 << 20]).unwrap();
    while other.len() < 64 << 20 && other.append(&vec![1; 1 << 20]).is_ok() {}
    let error = db.close().expect_err("closed, with nowhere to write to");
    assert!(matches!(error, pumice::Error::FileSystem(_)), "{error}");
    let mut unlogged = WriteOptions::default();
    unlogged.disable_wal(true);
    db.put_opt("unlogged", "2", &unlogged).unwrap();
    drop(limits);
    drop(other);
    for _ in 0..2 {
        let error = db.close().expect_err("it is in memory alone");
        let lost = matches!(error, pumice::Error::Unlogged { .. });
        assert!(lost, "{}", pumice::chain(&error));
        assert_eq!(db.get("unlogged").unwrap().as_deref(), Some(&b"2"[..]));
    }
    drop(db);
    let again = options().open(uri).unwrap();
    assert_eq!(again.get("logged").unwrap().as_deref(), Some(&b"1"[..]));
    again.close().unwrap();
}

/// The device is gone when the process ends.
fn an_end_that_cannot_keep(uri: &str) {
    let faulty = Arc::new(ErrorDevice::new(None, bdev::open(uri).unwrap()));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    FileSystem::format(Arc::clone(&device), &FormatOptions::default()).unwrap();
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = options().open_in(&fs).unwrap();
    fill(&db, 0..PUTS);
    faulty.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX),
    );
    std::process::exit(0);
}

/// The parent has used Pumice and has nothing open. It forks two workers with a database each.
fn two_forked_workers(uri: &str) {
    let parent = mount("malloc://256M", &MountOptions::new()).unwrap();
    let file = parent.open("/config", OpenOptions::CREATE).unwrap();
    file.append(&vec![7; 32 << 20]).unwrap();
    drop(file);
    parent.unmount().unwrap();
    drop(parent);
    let worker = |worker: u64| {
        let uri = uri.replace("kv.img", &format!("kv{worker}.img"));
        let mine = worker * 1_000_000..worker * 1_000_000 + 100_000;
        let db = options().open(&uri).unwrap();
        fill(&db, mine.clone());
        db.flush().unwrap();
        check(&db, mine, "in a worker");
        db.close().unwrap();
        0
    };
    let pids = [0, 1].map(|n| fork(&|| worker(n)));
    for pid in pids {
        assert_eq!(wait(pid), 0, "a worker");
    }
}

fn in_fork(child: &dyn Fn() -> i32) -> i32 {
    wait(fork(child))
}

/// Runs `child` in a forked process, which then calls `exit`.
fn fork(child: &dyn Fn() -> i32) -> i32 {
    // SAFETY: the test checks what the child may use after a fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
        std::process::exit(code);
    }
    pid
}

/// Returns the exit code of a forked child, or 1000 and the signal that ended it.
fn wait(pid: i32) -> i32 {
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
        if started.elapsed() > common::LIMIT / 2 {
            // SAFETY: it is our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("a forked child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn uri(dir: &Path) -> String {
    format!("file://{}/kv.img?size=256M&create=1", dir.display())
}

fn start(dir: &Path, mode: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(URI, uri(dir))
        .env(MODE, mode)
        .current_dir(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs [`child`] to its end. Returns its output.
fn run(dir: &Path, mode: &str, succeeds: bool) -> String {
    let output = start(dir, mode).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.success(), succeeds, "{mode}: {text}{errors}");
    text
}

/// Runs [`child`] until it reports that it is ready, and kills it.
fn kill(dir: &Path, mode: &str) {
    let mut child = start(dir, mode);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line == "ready");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready, "{mode}: it ended by itself");
}

fn reopened(dir: &Path) -> Db {
    options().open(&uri(dir)).unwrap()
}

fn an_end_keeps_all(mode: &str, succeeds: bool) {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    run(dir.path(), mode, succeeds);
    let db = reopened(dir.path());
    check(&db, 0..PUTS, mode);
    db.close().unwrap();
}

/// An end that cannot keep puts says so and ends.
#[test]
fn an_end_that_loses_something_says_so() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    let output = start(dir.path(), "failed exit").wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("unmounting at exit failed"), "{errors}");
    assert!(output.status.success(), "{errors}");
}

#[test]
fn puts_survive_exit() {
    an_end_keeps_all("exit", true);
}

#[test]
fn puts_survive_a_return_from_main_with_the_database_in_a_static() {
    an_end_keeps_all("static", true);
}

#[test]
fn puts_survive_a_forgotten_database() {
    an_end_keeps_all("forget", true);
}

#[test]
fn puts_survive_a_drop() {
    an_end_keeps_all("drop", true);
}

#[test]
fn puts_survive_a_panic() {
    an_end_keeps_all("panic", false);
}

#[test]
fn puts_survive_the_end_of_a_user_of_the_environment() {
    an_end_keeps_all("env", true);
}

#[test]
fn children_leave_the_parents_database_alone() {
    an_end_keeps_all("fork", true);
}

#[test]
fn acknowledged_puts_survive_an_exit_among_writers() {
    let _limit = watchdog();
    for _ in 0..3 {
        let dir = ImageDir::new().unwrap();
        let said = run(dir.path(), "exit among writers", true);
        let db = reopened(dir.path());
        let acks = said.lines().filter_map(|line| line.strip_prefix("ack "));
        let mut acknowledged = 0;
        // The exit may cut the last line short.
        for n in acks.filter_map(|n| n.parse::<u64>().ok()) {
            if let Some(got) = db.get(key(n)).unwrap() {
                assert_eq!(got, value(n), "key {n}");
                acknowledged += 1;
            } else {
                let cut_short = said.ends_with(&format!("ack {n}"));
                assert!(cut_short, "key {n} was acknowledged");
            }
        }
        assert!(acknowledged > 0);
        assert!(db.file_system().problems().is_empty());
        db.close().unwrap();
    }
}

/// Not one put was synced, and RocksDB's own log of what it did was not either.
#[test]
fn puts_survive_a_kill() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    kill(dir.path(), "killed after puts");
    let db = reopened(dir.path());
    check(&db, 0..PUTS, "after the kill");
    let fs = db.file_system();
    let before = fs
        .list("/")
        .unwrap()
        .into_iter()
        .filter(|entry| entry.name.starts_with("LOG"));
    assert!(
        before.map(|entry| entry.len).min() > Some(1000),
        "an empty LOG"
    );
}

#[test]
fn committed_and_prepared_transactions_survive_a_kill() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    kill(dir.path(), "killed after commits");
    let how = TransactionDBOptions::new();
    let db = options().open_transactions(&uri(dir.path()), &how).unwrap();
    for n in 0..PUTS / 10 {
        for key in [key(n), key(n + PUTS)] {
            assert_eq!(db.get(key).unwrap(), Some(value(n)), "transaction {n}");
        }
    }
    let found = db.prepared_transactions();
    assert_eq!(found.len(), 1);
    assert_eq!(db.get("prepared").unwrap(), None);
    for transaction in found {
        assert_eq!(transaction.get_name().as_deref(), Some(&b"prepared"[..]));
        transaction.commit().unwrap();
    }
    assert_eq!(db.get("prepared").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(db.get("open").unwrap(), None);
    db.close().unwrap();
}

/// Without the log in shared memory a kill may lose puts that were not synced, from the last one backwards, and never one in
/// the middle.
#[test]
fn a_kill_of_a_volatile_mount_leaves_a_prefix_of_the_puts() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    kill(dir.path(), "killed and volatile");
    let db = reopened(dir.path());
    let kept = db.iterator(IteratorMode::Start).count() as u64;
    check(&db, 0..kept, "after the kill");
    assert!(kept < PUTS);
}

#[test]
fn flushed_tables_survive_a_kill() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    kill(dir.path(), "killed after flush");
    check(&reopened(dir.path()), 0..PUTS, "flushed, then killed");
}

#[test]
fn two_forked_workers_have_a_database_each() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    run(dir.path(), "workers", true);
    for worker in 0..2_u64 {
        let uri = format!("file://{}/kv{worker}.img", dir.path().display());
        let db = options().open(&uri).unwrap();
        let mine = worker * 1_000_000..worker * 1_000_000 + 100_000;
        check(&db, mine, "after the workers");
        assert_eq!(db.iterator(IteratorMode::Start).count(), 100_000);
    }
}

#[test]
fn a_put_without_a_log_after_a_failed_close_is_not_lost_in_silence() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    run(dir.path(), "unlogged after a failed close", true);
}

/// U7: the host is full when the database is closed. When there is space again, closing is
/// repeated.
#[test]
fn a_failed_close_is_repeated_and_loses_nothing() {
    let _limit = watchdog();
    let dir = ImageDir::new().unwrap();
    run(dir.path(), "failed close", true);
}

/// The longest file that this process may write, until it is dropped.
struct Limits(libc::rlimit);

impl Limits {
    fn of_files(bytes: u64) -> Limits {
        let mut old = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: `old` is ours; a refused write is an error instead of a signal.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut old), 0);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
        set(&libc::rlimit {
            rlim_cur: bytes,
            ..old
        });
        Limits(old)
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        set(&self.0);
    }
}

fn set(limit: &libc::rlimit) {
    // SAFETY: it is a limit of this process.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, limit) }, 0);
}
