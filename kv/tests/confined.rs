//! Tests of a program that embeds a database, in the environment of a container: it works, or the
//! error says what to do.
//!
//! The program is this test itself, started once more.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use pumice::rocksdb::WriteOptions;
use pumice_confine::Confinement;

mod common;

use common::{key, value};

const PATIENCE: Duration = Duration::from_secs(120);

/// Runs `child`, a test of this file, confined. Returns `None` and prints a line if this machine
/// cannot do that.
fn run(confinement: &Confinement, dir: &Path, child: &str, case: &str) -> Option<Output> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", "--test-threads=1", child])
        .env("PUMICE_CONFINED", dir)
        .env("PUMICE_CASE", case);
    match confinement.run(&mut command, PATIENCE) {
        Ok(output) => Some(output),
        Err(reason) => {
            println!("skipped: {child}: {reason}");
            None
        }
    }
}

fn succeeds(name: &str, output: &Output) {
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{name}: {}\n{said}{errors}",
        output.status
    );
}

/// Returns the directory of a child and its case; `None` in the parent.
fn case() -> Option<(PathBuf, String)> {
    let dir = PathBuf::from(std::env::var_os("PUMICE_CONFINED")?);
    Some((dir, std::env::var("PUMICE_CASE").unwrap()))
}

fn uri(dir: &Path) -> String {
    format!("file://{}/kv.img?size=256M&create=1", dir.display())
}

#[test]
fn a_database_works_in_any_surroundings() {
    let dir = tempfile::tempdir().unwrap();
    for (name, confinement) in pumice_confine::surroundings(dir.path()) {
        if let Some(output) = run(&confinement, dir.path(), "child_uses_a_database", name) {
            succeeds(name, &output);
        }
        let _ = std::fs::remove_file(dir.path().join("kv.img"));
    }
}

/// Writes a hundred MiB of values: more than 128 MiB of memory can hold beside the default caches
/// of RocksDB and the file system.
#[test]
fn child_uses_a_database() {
    let Some((dir, _)) = case() else {
        return;
    };
    let db = pumice::Db::open(&uri(&dir)).unwrap();
    let mut durable = WriteOptions::default();
    durable.set_sync(true);
    let big = vec![7_u8; 64 << 10];
    for n in 0..1600 {
        db.put(key(n), value(n)).unwrap();
        db.put([&key(n)[..], b"big"].concat(), &big).unwrap();
    }
    db.put_opt(b"last", b"one", &durable).unwrap();
    db.close().unwrap();
    drop(db);
    let db = pumice::Db::open(&uri(&dir)).unwrap();
    for n in 0..1600 {
        assert_eq!(db.get(key(n)).unwrap(), Some(value(n)));
        let found = db.get([&key(n)[..], b"big"].concat()).unwrap();
        assert!(found.is_some_and(|found| found == big), "{n}");
    }
    assert_eq!(db.get(b"last").unwrap().as_deref(), Some(&b"one"[..]));
    db.close().unwrap();
}

/// A service confines itself after it has opened its database.
#[test]
fn a_database_goes_on_when_io_uring_goes() {
    for call in pumice_confine::IO_URING {
        let dir = tempfile::tempdir().unwrap();
        let (all, case) = (Confinement::new(), call.to_string());
        if let Some(output) = run(&all, dir.path(), "child_confines_itself", &case) {
            succeeds(&case, &output);
        }
    }
}

#[test]
fn child_confines_itself() {
    let Some((dir, case)) = case() else {
        return;
    };
    let db = pumice::Db::open(&uri(&dir)).unwrap();
    let mut durable = WriteOptions::default();
    durable.set_sync(true);
    for n in 0..1000 {
        db.put(key(n), value(n)).unwrap();
    }
    db.put_opt(b"before", b"1", &durable).unwrap();
    pumice_confine::deny_from_now_on(&[case.parse().unwrap()], libc::EPERM);
    for n in 1000..30_000 {
        db.put(key(n), value(n)).unwrap();
    }
    db.put_opt(b"after", b"2", &durable).unwrap();
    db.flush().unwrap();
    // This thread has no channel yet.
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(db.get(key(29_999)).unwrap(), Some(value(29_999))));
    });
    db.close().unwrap();
    drop(db);
    let db = pumice::Db::open(&uri(&dir)).unwrap();
    for n in 0..30_000 {
        assert_eq!(db.get(key(n)).unwrap(), Some(value(n)), "{n}");
    }
    db.close().unwrap();
}

/// Another user's image can be read; an error says how.
#[test]
fn an_image_that_cannot_be_written_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let db = pumice::Db::open(&uri(dir.path())).unwrap();
    db.put(b"fruit", b"apple").unwrap();
    db.close().unwrap();
    drop(db);
    let image = dir.path().join("kv.img");
    let everybody = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(dir.path(), everybody(0o755)).unwrap();
    std::fs::set_permissions(&image, everybody(0o644)).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    for (name, confinement) in [
        ("another user", Confinement::new().other_user()),
        (
            "a read-only image",
            Confinement::new().read_only_root(elsewhere.path()),
        ),
        (
            "another user and a read-only image",
            Confinement::new()
                .other_user()
                .read_only_root(elsewhere.path()),
        ),
    ] {
        if let Some(output) = run(&confinement, dir.path(), "child_reads_only", name) {
            succeeds(name, &output);
        }
    }
}

#[test]
fn child_reads_only() {
    let Some((dir, _)) = case() else {
        return;
    };
    let error = pumice::chain(&pumice::Db::open(&uri(&dir)).unwrap_err());
    assert!(error.contains("read_only=1"), "{error}");
    let uri = format!("file://{}/kv.img", dir.display());
    let reader = pumice::DbOptions::new().read_only(true);
    let db = reader.open(&uri).unwrap();
    assert_eq!(db.get(b"fruit").unwrap().as_deref(), Some(&b"apple"[..]));
    db.close().unwrap();
}

/// An image cannot be made where nothing can be written. The error says what to do.
#[test]
fn without_a_place_for_the_image_the_error_says_so() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let confinement = Confinement::new().read_only_root(elsewhere.path());
    if let Some(output) = run(&confinement, dir.path(), "child_has_no_place", "") {
        succeeds("no place", &output);
    }
}

#[test]
fn child_has_no_place() {
    let Some((dir, _)) = case() else {
        return;
    };
    let error = pumice::chain(&pumice::Db::open(&uri(&dir)).unwrap_err());
    let advice = format!("choose a directory other than {}", dir.display());
    assert!(
        error.contains("Read-only file system")
            && error.contains("kv.img")
            && error.contains(&advice),
        "{error}"
    );
}

/// An export whose files cannot be made durable fails, and leaves nothing.
#[test]
fn an_export_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let all = Confinement::new();
    if let Some(output) = run(&all, dir.path(), "child_exports_without_fsync", "") {
        succeeds("an export", &output);
    }
}

#[test]
fn child_exports_without_fsync() {
    let Some((dir, _)) = case() else {
        return;
    };
    let db = pumice::Db::open("malloc://256M").unwrap();
    db.put(key(1), value(1)).unwrap();
    pumice_confine::deny_from_now_on(&[libc::SYS_fsync], libc::EIO);
    let to = dir.join("copy");
    let error = db.export(&to).unwrap_err();
    let pumice::Error::Outside { path, .. } = &error else {
        panic!("{error}");
    };
    // A file comes before the names of all.
    assert_eq!(Path::new(path).parent(), Some(&*to), "{error}");
    assert!(!to.exists());
    db.close().unwrap();
}

/// The page cache takes the memory that nobody else needs, and gives it back.
#[test]
fn the_page_cache_follows_the_free_memory_of_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let little = Confinement::new().memory(256 << 20);
    if let Some(output) = run(&little, dir.path(), "child_needs_its_memory", "") {
        succeeds("256 MiB of memory", &output);
    }
}

#[test]
fn child_needs_its_memory() {
    const MIB: u64 = 1 << 20;
    let Some((dir, _)) = case() else {
        return;
    };
    // A cache of fixed size has an eighth of the group's memory.
    let fixed = pumice::fs::MountOptions::default();
    assert_eq!(fixed.cache_bytes, 32 << 20);
    let uri = format!("file://{}/files.img?size=512M&create=1", dir.display());
    let fs = pumice::mount(&uri, &pumice::MountOptions::new()).unwrap();
    let file = fs.open("/file", pumice::fs::OpenOptions::FRESH).unwrap();
    let mib = vec![7_u8; 1 << 20];
    for n in 0..240 {
        file.write_at(n * MIB, &mib).unwrap();
    }
    file.sync().unwrap();
    let bound = || fs.cache_stats().capacity_bytes;
    let read = |n: u64| {
        let mut page = vec![0; 64 << 10];
        file.read_at(n * 64 * 1024 % (240 * MIB), &mut page)
            .unwrap();
        assert_eq!(page, mib[..64 << 10]);
    };
    // Reads until the bound is as it should be.
    let reads_until = |what: &str, good: &dyn Fn(u64) -> bool| {
        let start = std::time::Instant::now();
        for n in 0.. {
            if good(bound()) {
                return;
            }
            assert!(
                start.elapsed() < PATIENCE / 2,
                "{what}: {} MiB",
                bound() / MIB
            );
            read(n);
        }
    };
    reads_until("it grows", &|bound| bound >= 100 * MIB);
    // The program needs memory itself. There is no other in the group: beside the cache there is the
    // log in shared memory, and 32 MiB stay free. Several looks at the memory happen meanwhile.
    let mut mine = Vec::new();
    for n in 1..=6 {
        mine.push(vec![1_u8; 16 << 20]);
        let most = (256 - 16 - 24 - n * 16) * MIB;
        let start = std::time::Instant::now();
        reads_until("it shrinks", &|bound| {
            bound <= most && start.elapsed() > Duration::from_millis(600)
        });
    }
    mine.clear();
    reads_until("it grows again", &|bound| bound >= 100 * MIB);
    drop(file);
    fs.unmount().unwrap();
}
