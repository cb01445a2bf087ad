//! What a killed process has written and not synced is there at the next mount (`blobfs/src/fs/shm_log.rs`).

#[path = "killed/changes.rs"]
mod changes;
mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use changes::{
    all_of, bytes, check_every_kind, contents, every_kind, expected, is_between, random,
};
use flaky::{Flaky, Plan};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::images::ImageDir;
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};
use rand::prelude::*;

const DIR: &str = "PUMICE_KILLED_DIR";
const HOW: &str = "PUMICE_KILLED_HOW";
const SEED: &str = "PUMICE_KILLED_SEED";

struct Image {
    dir: ImageDir,
    /// Logs of an earlier image whose inode this one has.
    others: Vec<PathBuf>,
}

impl Image {
    fn new(journal: Option<u64>) -> Image {
        let dir = ImageDir::new().unwrap();
        let mut image = Image {
            dir,
            others: Vec::new(),
        };
        let dev = pumice_bdev::open(&format!("{}?size=96M&create=1", image.uri())).unwrap();
        let mut format = FormatOptions::default();
        format.journal = journal.map_or(Journal::None, Journal::Bytes);
        FileSystem::format(dev, &format).unwrap();
        image.others = image.logs();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn uri(&self) -> String {
        uri_in(self.dir.path())
    }

    /// Returns the log, or a path where nothing is.
    fn log(&self) -> PathBuf {
        let its = self.logs();
        its.into_iter()
            .find(|path| !self.others.contains(path))
            .unwrap_or_else(|| self.dir.path().join("no log"))
    }

    fn logs(&self) -> Vec<PathBuf> {
        let meta = std::fs::metadata(self.path()).unwrap();
        let name = format!("pumice-file-{:x}-{:x}-", meta.dev(), meta.ino());
        let all = std::fs::read_dir("/dev/shm").unwrap();
        all.filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let file = path.file_name().unwrap_or_default();
                file.to_string_lossy().starts_with(&name)
            })
            .collect()
    }

    fn device(&self) -> Arc<dyn BlockDevice> {
        pumice_bdev::open(&self.uri()).unwrap()
    }

    fn mount(&self) -> FileSystem {
        FileSystem::mount(self.device(), &MountOptions::default()).unwrap()
    }

    /// Runs `child` with `how`, kills it when it says that it is ready, and returns what it said before.
    fn killed(&self, how: &str, seed: u64) -> Vec<String> {
        self.killed_after(u64::MAX, how, seed)
    }

    /// As [`Image::killed`], but kills it when it has acknowledged `acks` changes. It may have made others since.
    fn killed_after(&self, acks: u64, how: &str, seed: u64) -> Vec<String> {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(DIR, self.dir.path())
            .env(HOW, how)
            .env(SEED, seed.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if line == "ready" || acknowledged(std::slice::from_ref(&line)) >= acks {
                child.kill().unwrap();
            }
            said.push(line);
        }
        let status = child.wait().unwrap();
        assert_eq!(status.code(), None, "{how}: it ended by itself: {said:?}");
        said
    }
}

fn uri_in(dir: &Path) -> String {
    format!("file://{}/image", dir.display())
}

fn ready() -> ! {
    println!("ready");
    loop {
        std::thread::park();
    }
}

/// Is not a test, but what the tests below run.
#[test]
fn child() {
    let (Some(dir), Ok(how)) = (std::env::var_os(DIR), std::env::var(HOW)) else {
        return;
    };
    let uri = uri_in(Path::new(&dir));
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let volatile = how == "volatile";
    let mut options = MountOptions::default();
    options.volatile = volatile;
    let fs = FileSystem::mount(pumice_bdev::open(&uri).unwrap(), &options).unwrap();
    let open = |path: &str| fs.open(path, OpenOptions::CREATE).unwrap();
    match &how[..] {
        "append" | "volatile" => {
            let a = open("/a");
            for n in 0..1000_u32 {
                a.append(&n.to_le_bytes()).unwrap();
            }
            open("/b").append(&bytes(3_000_001, 1)).unwrap();
        }
        "kinds" => every_kind(&fs),
        "long" => {
            // Longer than the log takes at once, and than the log.
            open("/long").append(&bytes(20 << 20, 3)).unwrap();
            for n in 0..30 {
                open(&format!("/{n}")).append(&bytes(1 << 20, n)).unwrap();
            }
        }
        "many" => {
            for n in 0..600_u32 {
                open(&format!("/{n}")).append(&n.to_le_bytes()).unwrap();
                if n % 3 == 0 {
                    fs.unlink(&format!("/{n}")).unwrap();
                }
            }
        }
        "random" => random(&fs, seed, seed * 37 % 400 + 1, |n| println!("ack {n}")),
        "endless" => random(&fs, seed, u64::MAX, |n| println!("ack {n}")),
        "threads" => {
            std::thread::scope(|scope| {
                for thread in 0..3_u64 {
                    let fs = &fs;
                    scope.spawn(move || {
                        let file = fs.open(&format!("/{thread}"), OpenOptions::CREATE).unwrap();
                        for (data, sync) in appends(seed + thread) {
                            file.append(&data).unwrap();
                            if sync {
                                file.sync().unwrap();
                            }
                        }
                        println!("length {thread} {}", file.len());
                    });
                }
            });
        }
        other => panic!("{HOW}={other}"),
    }
    ready()
}

/// Returns appends of a thread, and whether a sync follows.
fn appends(seed: u64) -> impl Iterator<Item = (Vec<u8>, bool)> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..4000_u64).map(move |n| {
        let data = n.to_le_bytes().repeat(random.random_range(1..600));
        (data, random.random_range(0..40) == 0)
    })
}

#[test]
fn unsynced_appends_are_there_after_a_kill() {
    for journal in [None, Some(1 << 20)] {
        let image = Image::new(journal);
        image.killed("append", 0);
        assert!(image.log().exists());
        let fs = image.mount();
        let numbers: Vec<u8> = (0..1000_u32).flat_map(u32::to_le_bytes).collect();
        assert!(contents(&fs, "/a") == numbers);
        assert!(contents(&fs, "/b") == bytes(3_000_001, 1));
        assert!(fs.problems().is_empty(), "{:?}", fs.problems());
        assert!(!image.log().exists(), "it has served");
        fs.unmount().unwrap();
    }
}

#[test]
fn a_volatile_mount_has_no_log() {
    let image = Image::new(None);
    image.killed("volatile", 0);
    assert!(!image.log().exists());
    assert!(contents(&image.mount(), "/a").is_empty());
}

#[test]
fn every_kind_of_change_is_there_after_a_kill() {
    for journal in [None, Some(1 << 20)] {
        let image = Image::new(journal);
        image.killed("kinds", 0);
        let fs = image.mount();
        check_every_kind(&fs);
        fs.unmount().unwrap();
        check_every_kind(&image.mount());
    }
}

#[test]
fn more_than_the_log_takes_is_there_after_a_kill() {
    let image = Image::new(None);
    image.killed("long", 0);
    let fs = image.mount();
    assert!(contents(&fs, "/long") == bytes(20 << 20, 3));
    for n in 0..30 {
        assert!(contents(&fs, &format!("/{n}")) == bytes(1 << 20, n), "{n}");
    }
}

#[test]
fn many_short_files_are_there_after_a_kill() {
    let image = Image::new(Some(1 << 20));
    image.killed("many", 0);
    let fs = image.mount();
    for n in 0..600_u32 {
        let path = format!("/{n}");
        match n % 3 {
            0 => assert!(!fs.exists(&path).unwrap()),
            _ => assert_eq!(contents(&fs, &path), n.to_le_bytes(), "{n}"),
        }
    }
}

#[test]
fn threads_that_append_and_sync_lose_nothing() {
    for seed in 0..3 {
        let image = Image::new(Some(1 << 20));
        let said = image.killed("threads", seed);
        let fs = image.mount();
        let mut files = 0;
        for line in said.iter().filter_map(|line| line.strip_prefix("length ")) {
            let (thread, len) = line.split_once(' ').unwrap();
            let all = appends(seed + thread.parse::<u64>().unwrap());
            let expected: Vec<u8> = all.flat_map(|(data, _)| data).collect();
            assert_eq!(expected.len(), len.parse::<usize>().unwrap());
            assert!(contents(&fs, &format!("/{thread}")) == expected, "{thread}");
            files += 1;
        }
        assert_eq!(files, 3);
    }
}

fn rounds() -> u64 {
    std::env::var("PUMICE_ROUNDS").map_or(8, |n| n.parse().unwrap())
}

fn acknowledged(said: &[String]) -> u64 {
    let acks = said.iter().filter_map(|line| line.strip_prefix("ack "));
    acks.filter_map(|n| n.parse().ok()).max().unwrap_or(0)
}

#[test]
fn random_changes_are_there_after_a_kill() {
    for seed in 0..rounds() {
        let image = Image::new((seed % 2 == 0).then_some(1 << 20));
        let count = acknowledged(&image.killed("random", seed));
        assert_eq!(count, seed * 37 % 400 + 1);
        let fs = image.mount();
        assert!(all_of(&fs) == expected(seed, count), "seed {seed}");
        assert!(fs.problems().is_empty(), "seed {seed}: {:?}", fs.problems());
    }
}

/// The kill comes in the middle of a change, which is there, or not, or in part; what came before is there.
#[test]
fn a_kill_in_the_middle_of_a_change_loses_nothing_before_it() {
    for seed in 1000..1000 + rounds() {
        let image = Image::new((seed % 2 == 0).then_some(1 << 20));
        let count = acknowledged(&image.killed_after(seed % 61 + 1, "endless", seed));
        let found = all_of(&image.mount());
        let (before, after) = (expected(seed, count), expected(seed, count + 1));
        for ((found, before), after) in found.iter().zip(&before).zip(&after) {
            // A change makes the file first, if there is none.
            let empty = Some(Vec::new());
            let begun = if before.is_none() { &empty } else { before };
            let fits = [before, begun, after].contains(&found)
                || matches!((found, begun, after), (Some(f), Some(b), Some(a)) if is_between(f, b, a));
            let lens = [found, before, after].map(|file| file.as_ref().map(Vec::len));
            assert!(fits, "seed {seed}, {count} changes: lengths {lens:?}");
        }
    }
}

/// Nothing is lost when the device fails while the log is put in place.
#[test]
fn a_mount_that_fails_leaves_the_log() {
    for skip in 0..200 {
        let mut failed = false;
        // Some writes fail, more than are tried again, or all.
        for count in [8, u64::MAX] {
            let image = Image::new(None);
            image.killed("kinds", 0);
            let dev = Flaky::new(image.device());
            dev.arm(Some(Plan {
                from: skip,
                count,
                kind: IoErrorKind::Media,
                done: false,
            }));
            let mount = FileSystem::mount(dev.clone(), &MountOptions::default());
            failed = mount.is_err();
            drop((mount, dev));
            check_every_kind(&image.mount());
        }
        if !failed {
            assert!(skip > 3);
            return;
        }
    }
    panic!("it never succeeds");
}

/// A reader changes nothing, and shows what the log has.
#[test]
fn a_read_only_mount_shows_the_log_and_leaves_it() {
    for (how, seed) in [("kinds", 0), ("random", 3), ("random", 4), ("random", 9)] {
        let image = Image::new(None);
        let count = acknowledged(&image.killed(how, seed));
        let before = std::fs::read(image.path()).unwrap();
        let mut options = MountOptions::default();
        options.read_only = true;
        let read_only = pumice_bdev::OpenOptions::new().read_only(true);
        let dev = pumice_bdev::open_with(&image.uri(), read_only).unwrap();
        let fs = FileSystem::mount(dev, &options).unwrap();
        assert!(!fs.hides_writes());
        for _ in 0..2 {
            match how {
                "kinds" => check_every_kind(&fs),
                _ => assert!(all_of(&fs) == expected(seed, count), "seed {seed}"),
            }
        }
        fs.unmount().unwrap();
        assert!(std::fs::read(image.path()).unwrap() == before);
        let fs = image.mount();
        match how {
            "kinds" => check_every_kind(&fs),
            _ => assert!(all_of(&fs) == expected(seed, count), "seed {seed}"),
        }
    }
}

/// The log cannot be read, as that of another user.
#[test]
fn a_read_only_mount_says_that_it_hides_writes() {
    use std::os::unix::fs::PermissionsExt as _;
    let image = Image::new(None);
    image.killed("append", 0);
    let open_to_all = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(image.log(), open_to_all).unwrap();
    let mut options = MountOptions::default();
    options.read_only = true;
    let fs = FileSystem::mount(image.device(), &options).unwrap();
    assert!(contents(&fs, "/a").is_empty() && fs.hides_writes());
    fs.unmount().unwrap();
    drop(fs);
    // A mount for writing would give up what is in it.
    let refused = FileSystem::mount(image.device(), &MountOptions::default()).unwrap_err();
    assert!(matches!(refused, FsError::Damaged { .. }), "{refused}");
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(image.log(), private).unwrap();
    assert_eq!(contents(&image.mount(), "/a").len(), 4000);
}

/// A log counts for the session on the device only: not for a copy, nor after a mount that did not know it.
#[test]
fn a_log_that_does_not_belong_to_the_store_is_not_used() {
    let image = Image::new(None);
    image.killed("append", 0);
    // The log is out of sight of a mount that changes the store, as in another container.
    let (log, aside) = (image.log(), image.dir.path().join("aside"));
    std::fs::copy(&log, &aside).unwrap();
    std::fs::remove_file(&log).unwrap();
    let fs = image.mount();
    assert!(contents(&fs, "/a").is_empty());
    fs.open("/mine", OpenOptions::CREATE).unwrap();
    // It ends without an orderly unmount.
    let copy = image.dir.path().join("copy");
    std::fs::copy(image.path(), &copy).unwrap();
    fs.unmount().unwrap();
    std::fs::copy(&copy, image.path()).unwrap();
    put_back(&aside, &log);
    let fs = image.mount();
    assert!(contents(&fs, "/a").is_empty());
    assert!(fs.exists("/mine").unwrap());
    // It may be the log of another device of that name.
    assert!(log.exists());
}

fn put_back(from: &Path, to: &Path) {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let all = std::fs::read(from).unwrap();
    options.open(to).unwrap().write_all(&all).unwrap();
}

/// The store is refused for writing, and the word that the error names goes on without the log.
#[test]
fn a_damaged_log_is_told() {
    let image = Image::new(None);
    image.killed("append", 0);
    let log = std::fs::OpenOptions::new()
        .write(true)
        .open(image.log())
        .unwrap();
    log.write_all_at(b"rot", 4096 + 20 * 48 + 16).unwrap();
    let before = std::fs::read(image.path()).unwrap();
    let refused = FileSystem::mount(image.device(), &MountOptions::default()).unwrap_err();
    assert!(matches!(refused, FsError::Damaged { .. }), "{refused}");
    assert!(
        refused.to_string().contains("/dev/shm/pumice-file-"),
        "{refused}"
    );
    assert!(std::fs::read(image.path()).unwrap() == before);
    let mut options = MountOptions::default();
    options.accept_damage = true;
    let fs = FileSystem::mount(image.device(), &options).unwrap();
    assert!(contents(&fs, "/a").is_empty());
    assert!(!fs.problems().is_empty());
    fs.unmount().unwrap();
    image.mount();
}

/// A file that was deleted while it was open is still there after a mount that was refused for the log.
#[test]
fn a_mount_that_is_refused_for_the_log_deletes_nothing() {
    use std::os::unix::fs::PermissionsExt as _;
    let image = Image::new(None);
    image.killed("kinds", 0);
    let open_to_all = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(image.log(), open_to_all).unwrap();
    let before = std::fs::read(image.path()).unwrap();
    let refused = FileSystem::mount(image.device(), &MountOptions::default()).unwrap_err();
    assert!(matches!(refused, FsError::Damaged { .. }), "{refused}");
    assert!(std::fs::read(image.path()).unwrap() == before);
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(image.log(), private).unwrap();
    check_every_kind(&image.mount());
}

/// The device has less than the killed process had synced.
#[test]
fn a_device_that_was_set_back_is_told() {
    let image = Image::new(None);
    let fs = image.mount();
    fs.open("/early", OpenOptions::CREATE)
        .unwrap()
        .append(b"early")
        .unwrap();
    // The session is on the device, and nothing is synced.
    let back = std::fs::read(image.path()).unwrap();
    let log = image.dir.path().join("log");
    let early = fs.open("/early", OpenOptions::READ).unwrap();
    early.sync().unwrap();
    early.append(b" and late").unwrap();
    let place = image.log();
    std::fs::copy(&place, &log).unwrap();
    drop(early);
    fs.unmount().unwrap();
    std::fs::write(image.path(), back).unwrap();
    put_back(&log, &place);
    let refused = FileSystem::mount(image.device(), &MountOptions::default()).unwrap_err();
    assert!(refused.to_string().contains("set back"), "{refused}");
}

/// A device that cannot keep up with the log ends the log, and nothing else.
#[test]
fn a_log_that_cannot_be_emptied_is_given_up() {
    let image = Image::new(None);
    let dev = Arc::new(ErrorDevice::new(None, image.device()));
    let fs = FileSystem::mount(dev.clone(), &MountOptions::default()).unwrap();
    let small = fs.open("/small", OpenOptions::CREATE).unwrap();
    small.append(b"pins the log").unwrap();
    let blobs = fs.blobstore();
    let lba = blobs.extents(small.blob_id()).unwrap().lba(0).unwrap();
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX)
            .range(Some((lba, 8))),
    );
    let big = fs.open("/big", OpenOptions::CREATE).unwrap();
    for n in 0..40 {
        big.append(&bytes(1 << 20, n)).unwrap();
    }
    assert!(!image.log().exists());
    assert_eq!(big.len(), 40 << 20);
    dev.clear();
    fs.unmount().unwrap();
    drop((fs, small, big, dev));
    assert_eq!(contents(&image.mount(), "/small"), b"pins the log");
}
