//! Tests with whole processes: killed during synced writes, and watched in the kernel's file
//! system.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{key, value, watchdog};
use pumice::rocksdb::{DBCompressionType, WriteOptions};
use pumice::{Db, DbOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const URI: &str = "PUMICE_TEST_URI";
const MODE: &str = "PUMICE_TEST_MODE";

fn options() -> DbOptions {
    DbOptions::new().configure(|options| {
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(256 << 10);
    })
}

/// This is not a test: the tests below run it as a process of its own. Otherwise it does nothing.
#[test]
fn child() {
    let (Ok(uri), Ok(mode)) = (std::env::var(URI), std::env::var(MODE)) else {
        return;
    };
    match &mode[..] {
        "sync" => synced_puts(&uri),
        "all" => a_bit_of_everything(&uri),
        other => panic!("{MODE}={other}"),
    }
}

/// Makes synced puts without end, and reports each one when it is acknowledged.
fn synced_puts(uri: &str) {
    let db = options().open(uri).unwrap();
    let mut n = (0..).find(|n| db.get(key(*n)).unwrap().is_none()).unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    let mut out = std::io::stdout().lock();
    loop {
        db.put_opt(key(n), value(n), &sync).unwrap();
        writeln!(out, "ack {n}").unwrap();
        out.flush().unwrap();
        n += 1;
    }
}

fn a_bit_of_everything(uri: &str) {
    let db = options().path("/some/database").open(uri).unwrap();
    for n in 0..20_000 {
        db.put(key(n), value(n)).unwrap();
    }
    db.flush().unwrap();
    db.compact_range(None::<&[u8]>, None::<&[u8]>);
    db.checkpoint("/some/checkpoint").unwrap();
    db.backup("/some/backup").unwrap();
    db.restore_backup("/some/backup", "/some/restored").unwrap();
    db.close().unwrap();
    let db = options().path("/some/restored").open(uri).unwrap();
    assert_eq!(db.get(key(7)).unwrap().as_deref(), Some(&value(7)[..]));
    db.close().unwrap();
}

fn start(command: &mut Command, dir: &Path, mode: &str, out: Stdio) -> Child {
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.display());
    command
        .args(["--exact", "child", "--nocapture"])
        .env(URI, uri)
        .env(MODE, mode)
        .env("TMPDIR", dir)
        .current_dir(dir)
        .stdout(out)
        .spawn()
        .unwrap()
}

#[test]
fn killed_twenty_times_every_acknowledged_key_is_there() {
    let _limit = watchdog();
    let seed: u64 = std::env::var("PUMICE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(4_711);
    println!("PUMICE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img", dir.path().display());
    let mut acknowledged = None;
    for round in 0..20 {
        let mut process = Command::new(std::env::current_exe().unwrap());
        let mut child = start(&mut process, dir.path(), "sync", Stdio::piped());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wait = Duration::from_micros(rng.random_range(0..60_000));
        let mut since: Option<Instant> = None;
        let mut killed = false;
        // After the kill the pipe still holds acknowledgements from before.
        for line in lines.map_while(Result::ok) {
            let Some(n) = line.strip_prefix("ack ") else {
                continue;
            };
            acknowledged = Some(n.parse::<u64>().unwrap());
            if !killed && since.get_or_insert_with(Instant::now).elapsed() >= wait {
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "round {round}: the writer ended by itself");
        let db = options()
            .open(&uri)
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        for n in 0..=acknowledged.unwrap() {
            let got = db
                .get(key(n))
                .unwrap_or_else(|e| panic!("round {round}: key {n}: {e}"));
            assert_eq!(
                got.as_deref(),
                Some(&value(n)[..]),
                "round {round}: key {n} is lost"
            );
        }
        db.close().unwrap();
    }
    println!("{} synced puts, 20 kills", acknowledged.unwrap() + 1);
}

/// Returns the names in the root directory and the working directory, where files would be created
/// that take a path for the kernel's.
fn kernel_sees(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = [Path::new("/"), dir]
        .iter()
        .flat_map(|dir| std::fs::read_dir(dir).unwrap())
        .map(|entry| entry.unwrap().path().display().to_string())
        .collect();
    names.sort();
    names
}

#[test]
fn no_file_of_a_database_is_in_the_kernels_file_system() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    let before = kernel_sees(dir.path());
    let root_links = std::fs::metadata("/").unwrap().nlink();
    let mut process = Command::new(std::env::current_exe().unwrap());
    assert!(
        start(&mut process, dir.path(), "all", Stdio::null())
            .wait()
            .unwrap()
            .success()
    );
    assert_eq!(kernel_sees(dir.path()), before);
    assert_eq!(std::fs::metadata("/").unwrap().nlink(), root_links);
    drop(Db::open(&format!("file://{}", image.display())).unwrap());
}

#[test]
fn the_kernel_is_asked_for_no_file_but_the_image() {
    let _limit = watchdog();
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: the_kernel_is_asked_for_no_file_but_the_image: strace is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut strace = Command::new("strace");
    strace
        .args(["-f", "-qq", "-e", "trace=%file", "-o"])
        .arg(&trace);
    strace.arg(std::env::current_exe().unwrap());
    let status = start(&mut strace, dir.path(), "all", Stdio::null())
        .wait()
        .unwrap();
    if !status.success() && std::fs::read_to_string(&trace).is_ok_and(|text| text.is_empty()) {
        println!("skipped: the_kernel_is_asked_for_no_file_but_the_image: ptrace is not permitted");
        return;
    }
    assert!(status.success());
    let text = std::fs::read_to_string(&trace).unwrap();
    let made: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains("ENOENT"))
        .filter(|line| {
            let call = line
                .split_once(char::is_whitespace)
                .map_or("", |(_, call)| call.trim());
            let makes = [
                "mkdir", "rename", "link", "symlink", "unlink", "creat", "mknod", "rmdir",
            ]
            .iter()
            .any(|name| call.starts_with(name));
            makes
                || call.contains("O_CREAT")
                || call.contains("O_WRONLY")
                || call.contains("O_RDWR")
        })
        // Threads get their names through /proc. A new image is made without a name, which it gets
        // when it is complete.
        .filter(|line| {
            !["kv.img", "\"/dev/", "\"/proc/self/", "O_TMPFILE"]
                .iter()
                .any(|ok| line.contains(ok))
        })
        .collect();
    assert!(made.is_empty(), "{made:#?}");
    let database = [
        "CURRENT", "MANIFEST", ".sst", ".log\"", "/LOCK\"", "IDENTITY", "OPTIONS",
    ];
    let seen: Vec<&str> = text
        .lines()
        .filter(|line| database.iter().any(|name| line.contains(name)))
        .collect();
    assert!(seen.is_empty(), "{seen:#?}");
}
