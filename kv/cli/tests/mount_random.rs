//! The same random operations on a mount and on a directory of the kernel's file system have the same results and errors.
//! A failure prints its seed: `PUMICE_SEED=n` runs that one alone, and `PUMICE_ROUNDS=n` runs more of them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tool.rs"]
mod tool;

use mounted::{Mounted, can_mount, image};

/// Operations of a round.
const OPERATIONS: usize = 600;
/// Longest file.
const LEN_MAX: u64 = 3 << 20;
/// Most open files.
const OPEN_MAX: usize = 6;
/// Time in which both file systems carry out one operation, with what a slow machine needs.
const SAME_TIME: u64 = 60;

#[derive(Debug, Clone)]
enum Operation {
    Create(PathBuf, bool),
    Open(PathBuf, bool),
    Close(usize),
    Write(usize, u64, Vec<u8>),
    Append(PathBuf, Vec<u8>),
    Read(usize, u64, usize),
    Length(usize, u64),
    Truncate(PathBuf, u64),
    Allocate(usize, u64, u64, bool),
    Sync(usize, bool),
    Fstat(usize),
    Stat(PathBuf),
    Mode(PathBuf, u32),
    Time(PathBuf, u64),
    Rename(PathBuf, PathBuf, bool),
    Link(PathBuf, PathBuf),
    Unlink(PathBuf),
    Mkdir(PathBuf),
    Rmdir(PathBuf),
    List(PathBuf),
    Whole(PathBuf),
}

/// The answer that both file systems have to give.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Done,
    Bytes(Vec<u8>),
    Names(Vec<(String, bool)>),
    Stat {
        dir: bool,
        mode: u32,
        /// Length, links, and the time if it was set, of a file.
        file: Option<(u64, u64, Option<u64>)>,
    },
}

fn stat(meta: &Metadata) -> Answer {
    let seconds = u64::try_from(meta.mtime()).unwrap_or(0);
    Answer::Stat {
        dir: meta.is_dir(),
        mode: meta.mode(),
        file: meta.is_file().then_some((
            meta.len(),
            meta.nlink(),
            // Times that were set lie far back.
            (seconds < 1_600_000_000).then_some(seconds),
        )),
    }
}

/// One of the two directories, with its open files.
struct Side {
    root: PathBuf,
    open: Vec<File>,
}

impl Side {
    fn run(&mut self, operation: &Operation) -> io::Result<Answer> {
        let at = |path: &PathBuf| self.root.join(path);
        let none = |n: Errno| io::Error::from_raw_os_error(n as i32);
        match operation {
            Operation::Create(path, exclusive) => {
                let mut how = OpenOptions::new();
                how.read(true).write(true);
                if *exclusive {
                    how.create_new(true);
                } else {
                    how.create(true).truncate(true);
                }
                let file = how.open(at(path))?;
                self.open.push(file);
            }
            Operation::Open(path, write) => {
                let file = OpenOptions::new().read(true).write(*write).open(at(path))?;
                self.open.push(file);
            }
            Operation::Close(i) => drop(self.open.swap_remove(*i)),
            Operation::Write(i, off, bytes) => self.open[*i].write_all_at(bytes, *off)?,
            Operation::Append(path, bytes) => {
                let mut file = OpenOptions::new().append(true).open(at(path))?;
                file.write_all(bytes)?;
            }
            Operation::Read(i, off, len) => {
                let mut bytes = vec![0; *len];
                let n = self.open[*i].read_at(&mut bytes, *off)?;
                bytes.truncate(n);
                return Ok(Answer::Bytes(bytes));
            }
            Operation::Length(i, len) => self.open[*i].set_len(*len)?,
            Operation::Truncate(path, len) => {
                nix::unistd::truncate(&at(path), i64::try_from(*len).unwrap()).map_err(none)?;
            }
            Operation::Allocate(i, off, len, keep) => {
                let flags = if *keep {
                    FallocateFlags::FALLOC_FL_KEEP_SIZE
                } else {
                    FallocateFlags::empty()
                };
                let (off, len) = (i64::try_from(*off).unwrap(), i64::try_from(*len).unwrap());
                fallocate(&self.open[*i], flags, off, len).map_err(none)?;
            }
            Operation::Sync(i, false) => self.open[*i].sync_all()?,
            Operation::Sync(i, true) => self.open[*i].sync_data()?,
            Operation::Fstat(i) => return Ok(stat(&self.open[*i].metadata()?)),
            Operation::Stat(path) => return Ok(stat(&fs::symlink_metadata(at(path))?)),
            Operation::Mode(path, mode) => {
                fs::set_permissions(at(path), Permissions::from_mode(*mode))?;
            }
            Operation::Time(path, seconds) => {
                let file = File::open(at(path))?;
                let then = UNIX_EPOCH + Duration::from_secs(*seconds);
                file.set_times(FileTimes::new().set_modified(then))?;
                return Ok(stat(&file.metadata()?));
            }
            Operation::Rename(from, to, false) => fs::rename(at(from), at(to))?,
            Operation::Rename(from, to, true) => {
                let flags = RenameFlags::RENAME_NOREPLACE;
                renameat2(AT_FDCWD, &at(from), AT_FDCWD, &at(to), flags).map_err(none)?;
            }
            Operation::Link(from, to) => fs::hard_link(at(from), at(to))?,
            Operation::Unlink(path) => fs::remove_file(at(path))?,
            Operation::Mkdir(path) => fs::create_dir(at(path))?,
            Operation::Rmdir(path) => fs::remove_dir(at(path))?,
            Operation::List(path) => return Ok(Answer::Names(names(&at(path))?)),
            Operation::Whole(path) => return Ok(Answer::Bytes(fs::read(at(path))?)),
        }
        Ok(Answer::Done)
    }
}

/// Returns the names in a directory, and whether they are directories.
fn names(path: &Path) -> io::Result<Vec<(String, bool)>> {
    let entry = |e: io::Result<fs::DirEntry>| {
        let e = e?;
        let is_dir = e.file_type()?.is_dir();
        Ok((e.file_name().into_string().unwrap(), is_dir))
    };
    let mut names = fs::read_dir(path)?
        .map(entry)
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

struct Generator {
    rng: SmallRng,
}

impl Generator {
    /// Returns a path: of few names, so that most exist.
    fn path(&mut self) -> PathBuf {
        let depth = self.rng.random_range(1..=3);
        (0..depth)
            .map(|i| match i {
                0 => ["a", "b", "c", "d"][self.rng.random_range(0..4)],
                1 => ["a", "b", "x.y"][self.rng.random_range(0..3)],
                _ => ["a", "-z"][self.rng.random_range(0..2)],
            })
            .collect()
    }

    fn offset(&mut self) -> u64 {
        match self.rng.random_range(0..5) {
            0 => 0,
            1 => self.rng.random_range(0..10_000),
            2 => self.rng.random_range(0..LEN_MAX / 4096) * 4096,
            3 => 65_536 * self.rng.random_range(0..4) + self.rng.random_range(0..3),
            _ => self.rng.random_range(0..LEN_MAX),
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(0..20),
            1 => self.rng.random_range(0..5000),
            2 => 4096 * self.rng.random_range(1..20),
            _ => self.rng.random_range(0..400_000),
        };
        let (first, step) = (self.rng.random::<u8>(), self.rng.random::<u8>());
        let low = |n: usize| n.to_le_bytes()[0];
        (0..len)
            .map(|i: usize| first.wrapping_add(step.wrapping_mul(low(i >> 3))) ^ low(i))
            .collect()
    }

    fn operation(&mut self, open: usize) -> Operation {
        let pick = self.rng.random_range(0..100);
        if open > 0 && pick < 50 {
            let i = self.rng.random_range(0..open);
            let full = open >= OPEN_MAX;
            return match self.rng.random_range(0..20) {
                0..=6 => Operation::Write(i, self.offset(), self.bytes()),
                7..=11 => Operation::Read(i, self.offset(), self.rng.random_range(0..200_000)),
                12 | 13 => Operation::Length(i, self.offset()),
                14 => {
                    let (off, len) = (self.offset(), self.rng.random_range(1..500_000));
                    Operation::Allocate(i, off, len, self.rng.random())
                }
                15 => Operation::Sync(i, self.rng.random()),
                16 | 17 if !full => Operation::Fstat(i),
                _ => Operation::Close(i),
            };
        }
        let path = self.path();
        match self.rng.random_range(0..34) {
            0..=4 if open < OPEN_MAX => Operation::Create(path, self.rng.random()),
            5..=7 if open < OPEN_MAX => Operation::Open(path, self.rng.random()),
            8..=10 => Operation::Stat(path),
            11 => Operation::Mode(path, self.rng.random_range(0..0o1000) | 0o600),
            12 => Operation::Time(path, self.rng.random_range(1..1_500_000_000)),
            13..=16 => Operation::Rename(path, self.path(), self.rng.random_bool(0.2)),
            17 | 18 => Operation::Link(path, self.path()),
            19 | 20 => Operation::Unlink(path),
            21..=24 => Operation::Mkdir(path),
            25 => Operation::Rmdir(path),
            26 | 27 => Operation::List(path),
            28 => Operation::Append(path, self.bytes()),
            29 => Operation::Truncate(path, self.offset()),
            _ => Operation::Whole(path),
        }
    }
}

fn number<T: Debug>(result: &io::Result<T>) -> Option<i32> {
    result.as_ref().err().map(|e| e.raw_os_error().unwrap_or(0))
}

/// Returns everything below `root`, with file contents.
fn content(root: &Path) -> BTreeMap<PathBuf, (Answer, Vec<u8>, i64)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut bytes = Vec::new();
            if meta.is_dir() {
                dirs.push(path.clone());
            } else {
                bytes = fs::read(&path).unwrap();
            }
            let name = path.strip_prefix(root).unwrap().to_owned();
            found.insert(name, (stat(&meta), bytes, meta.mtime()));
        }
    }
    found
}

fn same(seed: u64, ours: &Path, theirs: &Path) {
    let (ours, theirs) = (content(ours), content(theirs));
    let names = |of: &BTreeMap<PathBuf, _>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs), "PUMICE_SEED={seed}");
    for (name, (stat, bytes, time)) in &ours {
        let (expected, expected_bytes, expected_time) = &theirs[name];
        assert_eq!(stat, expected, "PUMICE_SEED={seed}: {}", name.display());
        assert!(
            bytes == expected_bytes,
            "PUMICE_SEED={seed}: {}: other bytes",
            name.display()
        );
        let is_file = matches!(stat, Answer::Stat { dir: false, .. });
        assert!(
            !is_file || time.abs_diff(*expected_time) < SAME_TIME,
            "PUMICE_SEED={seed}: {}: changed at {time}, expected about {expected_time}",
            name.display()
        );
    }
}

fn round(seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "256M");
    let theirs = dir.path().join("kernel");
    fs::create_dir(&theirs).unwrap();
    let at = dir.path().join("mnt");
    let mut generator = Generator {
        rng: SmallRng::seed_from_u64(seed),
    };
    let mounted = Mounted::new(&uri, &at, &[]);
    let side = |root: &Path| Side {
        root: root.to_owned(),
        open: Vec::new(),
    };
    let (mut our, mut their) = (side(&at), side(&theirs));
    for i in 0..OPERATIONS {
        let operation = generator.operation(our.open.len());
        let (ours, theirs) = (our.run(&operation), their.run(&operation));
        let agree = match (&ours, &theirs) {
            (Ok(a), Ok(b)) => a == b,
            (a, b) => number(a) == number(b),
        };
        assert!(
            agree,
            "PUMICE_SEED={seed}: operation {i}: {}: {} and not {}",
            brief(&operation),
            brief(&ours),
            brief(&theirs)
        );
    }
    same(seed, &at, &theirs);
    drop((our, their));
    if seed.is_multiple_of(2) {
        mounted.unmount(&uri);
    } else {
        mounted.end("-TERM", &uri);
    }
    let mounted = Mounted::new(&uri, &at, &["--read-only"]);
    same(seed, &at, &theirs);
    mounted.unmount(&uri);
}

fn brief(of: &impl Debug) -> String {
    let text = format!("{of:?}");
    text.chars().take(300).collect()
}

#[test]
fn a_mount_answers_as_the_kernels_own_file_system() {
    if !can_mount("a_mount_answers_as_the_kernels_own_file_system") {
        return;
    }
    let from = |name: &str| std::env::var(name).ok()?.parse().ok();
    if let Some(seed) = from("PUMICE_SEED") {
        return round(seed);
    }
    let rounds = from("PUMICE_ROUNDS").unwrap_or(4);
    let since = UNIX_EPOCH.elapsed().unwrap_or_default();
    let first = since.as_secs() % 1_000_000 * 1000;
    for seed in first..first + rounds {
        println!("PUMICE_SEED={seed}");
        round(seed);
    }
}
