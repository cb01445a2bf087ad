//! Random operations on a file system whose devices fail by a random plan, with ends of every kind between them, and a comparison
//! with what was promised.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::{
    File, FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions,
};
use rand::prelude::*;

use crate::common::random::from_env;
use crate::common::watchdog::watchdog;
use crate::named::Named;
use crate::promises::{After, Promise, Promises};

/// The devices of a file system, which fail as they are told, and can lose their power.
pub trait Ground: Sized {
    /// The device.
    fn top(&self) -> Arc<dyn BlockDevice>;
    /// Ends all faults.
    fn quiet(&self);
    /// Has operations fail at random.
    fn noise(&self, rng: &mut SmallRng);
    /// Returns the faults since the last call.
    fn faults(&self) -> Vec<String>;
    /// Whether it works at all, and not only after it has been opened again.
    fn works(&self) -> bool;
    /// Ends the devices, by a power cut or the end of their user. Returns what comes up again.
    fn next(&self, cut: bool, rng: &mut SmallRng) -> Self;
}

/// Random operations on a file system, and what they were promised.
pub struct Work<G: Ground> {
    ground: G,
    /// Whether the journal has its pages.
    journal: bool,
    rng: SmallRng,
    fs: ManuallyDrop<FileSystem>,
    now: Promises,
    handles: Vec<(String, ManuallyDrop<File>)>,
    noisy: bool,
    /// The name of the device.
    name: String,
    log: Vec<String>,
}

impl<G: Ground> Work<G> {
    fn note(&mut self, what: String) {
        let faults = self.ground.faults();
        self.log.push(match faults.is_empty() {
            true => what,
            false => format!("{what}   {faults:?}"),
        });
    }

    fn path(&mut self) -> String {
        format!("/{}", ["a", "b", "c", "d"][self.rng.random_range(0..4)])
    }

    fn drop_handle(&mut self, path: &str) {
        if let Some(i) = self.handles.iter().position(|(p, _)| p == path) {
            drop(ManuallyDrop::into_inner(self.handles.swap_remove(i).1));
        }
    }

    /// Records a change of names, or that it has failed.
    fn renamed(
        &mut self,
        names: std::collections::BTreeMap<String, usize>,
        result: Result<(), FsError>,
        what: &str,
    ) -> bool {
        self.note(format!("{what}: {result:?}"));
        match result {
            Ok(()) => {
                self.now.names = names;
                self.now.open.clear();
                true
            }
            Err(e) if is_open(&e) => {
                self.now.open.push(names);
                false
            }
            Err(_) => false,
        }
    }

    fn file(&mut self) -> Option<(usize, String, File)> {
        let path = self.path();
        if let Some(number) = self.now.names.get(&path) {
            let number = *number;
            if let Some((_, f)) = self.handles.iter().find(|(p, _)| *p == path) {
                return Some((number, path, File::clone(f)));
            }
            match self.fs.open(&path, OpenOptions::READ) {
                Ok(f) => {
                    if self.rng.random() {
                        self.handles
                            .push((path.clone(), ManuallyDrop::new(f.clone())));
                    }
                    return Some((number, path, f));
                }
                Err(e) => {
                    self.note(format!("open {path}: {e}"));
                    assert!(self.noisy || !self.ground.works(), "open {path}: {e}");
                    return None;
                }
            }
        }
        let made = self.fs.open(&path, OpenOptions::CREATE);
        let number = self.now.files.len();
        self.now.files.push(Promise::default());
        let mut names = self.now.names.clone();
        names.insert(path.clone(), number);
        let (f, result) = match made {
            Ok(f) => (Some(f), Ok(())),
            Err(e) => (None, Err(e)),
        };
        self.renamed(names, result, &format!("create {path}"));
        Some((number, path, f?))
    }

    fn bytes(&mut self) -> Vec<u8> {
        let max = [100, 5000, 70_000, 1_200_000][self.rng.random_range(0..4)];
        let len = self.rng.random_range(1..max);
        let first: u8 = self.rng.random();
        (0..241u8)
            .cycle()
            .map(|b| b.wrapping_add(first))
            .take(len)
            .collect()
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..22 => self.append(),
            22..38 => self.write_at(),
            38..48 => self.truncate(),
            48..68 => self.sync(),
            68..76 => self.names(),
            76..80 => {
                let path = self.path();
                self.drop_handle(&path);
                self.note(format!("close {path}"));
            }
            80..90 => {
                self.ground.quiet();
                self.noisy = self.rng.random_range(0..3) > 0;
                if self.noisy {
                    self.ground.noise(&mut self.rng);
                }
                let noisy = self.noisy;
                self.note(format!("noise {noisy}"));
            }
            90..94 => {
                let Some((_, path, f)) = self.file() else {
                    return;
                };
                let end = f.len() + 300_000;
                let result = f.allocate(0, end);
                self.note(format!("allocate {path}: {result:?}"));
            }
            _ => {
                self.ground.quiet();
                self.noisy = false;
                if let Some((_, _, f)) = self.file() {
                    f.invalidate(0, u64::MAX);
                }
                self.note("compare".to_owned());
                if !self.ground.works() {
                    return;
                }
                if let Some(why) = self.now.differ(&self.fs, After::Nothing) {
                    panic!("live: {why}");
                }
            }
        }
    }

    fn append(&mut self) {
        let Some((number, path, f)) = self.file() else {
            return;
        };
        let bytes = self.bytes();
        if self.now.files[number].data.len() + bytes.len() > 4 << 20 {
            return;
        }
        let result = f.append(&bytes);
        if result.is_ok() {
            self.now.files[number].data.extend(&bytes);
        }
        self.note(format!("append {} to {path}: {result:?}", bytes.len()));
    }

    fn write_at(&mut self) {
        let Some((number, path, f)) = self.file() else {
            return;
        };
        let bytes = self.bytes();
        let len = self.now.files[number].data.len();
        let beyond = [9000, 2_000_000][self.rng.random_range(0..2)];
        let off = if self.rng.random_range(0..4) == 0 {
            len + self.rng.random_range(0..beyond)
        } else {
            self.rng.random_range(0..=len)
        };
        if off + bytes.len() > 5 << 20 {
            return;
        }
        let result = f.write_at(off as u64, &bytes);
        match result {
            Ok(()) => self.now.files[number].written(off, &bytes),
            Err(_) => self.now.files[number].failed(off..off + bytes.len()),
        }
        self.note(format!(
            "write {} at {off} of {path}: {result:?}",
            bytes.len()
        ));
    }

    fn truncate(&mut self) {
        let Some((number, path, f)) = self.file() else {
            return;
        };
        let len = self.now.files[number].data.len();
        let to = match self.rng.random_range(0..6) {
            0 => 0,
            1 => len + self.rng.random_range(0..300_000),
            _ => self.rng.random_range(0..=len),
        };
        let result = f.truncate(to as u64);
        self.note(format!("truncate {path} to {to}: {result:?}"));
        let promise = &mut self.now.files[number];
        match result {
            Ok(()) => promise.cut(to),
            Err(e) if is_open(&e) => {
                promise.least = Some(promise.least.map_or(to, |l| l.min(to)));
            }
            Err(_) => {}
        }
    }

    fn sync(&mut self) {
        let Some((number, path, f)) = self.file() else {
            return;
        };
        let result = if self.rng.random_range(0..4) == 0 {
            f.sync_data()
        } else {
            f.sync()
        };
        if result.is_ok() {
            self.now.files[number].is_synced();
        }
        self.note(format!("sync {path}: {result:?}"));
    }

    fn names(&mut self) {
        let (from, to) = (self.path(), self.path());
        let Some(number) = self.now.names.get(&from).copied() else {
            return;
        };
        let mut names = self.now.names.clone();
        match self.rng.random_range(0..3) {
            0 => {
                names.remove(&from);
                let result = self.fs.unlink(&from);
                if self.renamed(names, result, &format!("unlink {from}")) {
                    self.drop_handle(&from);
                }
            }
            1 if from != to => {
                names.remove(&from);
                names.insert(to.clone(), number);
                let result = self.fs.rename(&from, &to);
                if self.renamed(names, result, &format!("rename {from} {to}")) {
                    self.drop_handle(&to);
                    for (path, _) in &mut self.handles {
                        if *path == from {
                            path.clone_from(&to);
                        }
                    }
                }
            }
            _ => {
                let number = self.now.files.len();
                self.now.files.push(Promise::default());
                names.insert(from.clone(), number);
                let result = self.fs.open(&from, OpenOptions::FRESH).map(drop);
                if self.renamed(names, result, &format!("fresh {from}")) {
                    self.drop_handle(&from);
                }
            }
        }
    }

    /// Ends the mount in some way. Returns how exact a comparison must be.
    fn end(&mut self) -> After {
        if self.rng.random() {
            self.ground.quiet();
        }
        match self.rng.random_range(0..4) {
            0 => {
                let handles = std::mem::take(&mut self.handles);
                let handles = handles
                    .into_iter()
                    .map(|(_, f)| ManuallyDrop::into_inner(f));
                handles.for_each(drop);
                let result = self.fs.unmount();
                self.note(format!("unmount: {result:?}"));
                if result.is_ok() {
                    return After::Nothing;
                }
                let lost = self.fs.unmount_anyway();
                self.note(format!("unmount_anyway: {lost:?}"));
                After::Cut
            }
            // A log that cannot be kept is given up, with a warning.
            1 if has_log(&self.name) => After::Kill,
            _ => After::Cut,
        }
    }

    /// Mounts what is left, with faults at first, and compares it with what was promised.
    fn again(&mut self, after: After, round: u64) {
        self.note(format!("{after:?}"));
        // The log of a process that was killed is found by the device's name. It survives no power cut.
        if after == After::Cut {
            self.name = format!("{}-{round}", self.name);
        }
        self.ground.quiet();
        // They are forgotten, as the mount is.
        self.handles.clear();
        self.reopen(after == After::Cut);
        let mut mounted = None;
        for attempt in 0..3 {
            let noisy = attempt < 2 && self.rng.random();
            self.ground.quiet();
            if noisy {
                self.ground.noise(&mut self.rng);
            }
            let device = Named::on(self.ground.top(), &self.name);
            let result = FileSystem::mount(device, &self.options());
            let told = result.as_ref().map(drop).map_err(ToString::to_string);
            self.note(format!("mount, noisy {noisy}: {told:?}"));
            match result {
                Ok(fs) if self.ground.works() => {
                    mounted = Some(fs);
                    break;
                }
                Ok(fs) => std::mem::forget(fs),
                Err(e) => assert!(noisy, "after {after:?}: cannot be mounted: {e}"),
            }
            // The devices are opened again, perhaps because the power was cut in the middle of the recovery.
            let cut = after == After::Cut && self.rng.random();
            self.reopen(cut);
        }
        self.ground.quiet();
        self.noisy = false;
        self.fs = ManuallyDrop::new(mounted.expect("the last attempt meets no faults"));
        assert_eq!(self.fs.problems(), [] as [String; 0], "after {after:?}");
        if let Some(why) = self.now.differ(&self.fs, after) {
            panic!("after {after:?}: {why}");
        }
        self.now.adopt(&self.fs);
    }

    fn reopen(&mut self, cut: bool) {
        let next = self.ground.next(cut, &mut self.rng);
        std::mem::forget(std::mem::replace(&mut self.ground, next));
    }

    fn options(&mut self) -> MountOptions {
        let mut opts = MountOptions::default();
        opts.write_behind_bytes = [1, 32 << 20][self.rng.random_range(0..2)];
        opts.cache_bytes = [0, 8 << 20][self.rng.random_range(0..2)];
        opts.discard = self.rng.random();
        opts.shared_channels = self.rng.random_range(1..4);
        opts
    }
}

/// Whether the error says that the outcome is open.
fn is_open(error: &FsError) -> bool {
    let text = error.to_string();
    text.contains("it is open whether") || text.contains("the outcome is open")
}

/// Whether there is a log in shared memory for a device of this name.
fn has_log(name: &str) -> bool {
    let prefix = format!("pumice-{name}-");
    let mut there = std::fs::read_dir("/dev/shm").unwrap();
    there.any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with(&prefix)))
}

/// Works, ends and mounts several times. At the end everything can be freed.
fn rounds<G: Ground>(work: &mut Work<G>) {
    for round in 0..3 {
        for _ in 0..40 {
            work.step();
        }
        let after = work.end();
        work.again(after, round);
    }
    for path in work.now.names.keys() {
        work.fs.unlink(path).unwrap();
    }
    let statfs = work.fs.statfs();
    let pages = if work.journal { 2 } else { 0 };
    let free = (statfs.free, statfs.md_pages_used);
    assert_eq!(free, (statfs.total, pages), "space leaked");
    work.fs.unmount().unwrap();
}

/// The logs that the killed mounts of a run leave in shared memory, removed at its end. A run that "loses power" never mounts them again.
struct Logs(String);

impl Drop for Logs {
    fn drop(&mut self) {
        let prefix = format!("pumice-{}-", self.0);
        let left = std::fs::read_dir("/dev/shm")
            .into_iter()
            .flatten()
            .flatten();
        for log in left.filter(|log| log.file_name().to_string_lossy().starts_with(&prefix)) {
            let _ = std::fs::remove_file(log.path());
        }
    }
}

/// Does all of it on a formatted device, and drops nothing that the end of the process would not.
pub fn run<G: Ground>(seed: u64, ground: G, journal: bool, rng: SmallRng, what: &str) {
    let _limit = watchdog(&format!("{what}, seed {seed}"), 300);
    let name = format!("plans-{seed}-{}", std::process::id());
    let _logs = Logs(name.clone());
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = 1;
    let fs = FileSystem::mount(Named::on(ground.top(), &name), &opts).unwrap();
    let mut work = Work {
        log: vec![what.to_owned()],
        ground,
        journal,
        rng,
        fs: ManuallyDrop::new(fs),
        now: Promises::default(),
        handles: Vec::new(),
        noisy: false,
        name,
    };
    let all = std::panic::AssertUnwindSafe(|| rounds(&mut work));
    if let Err(panic) = std::panic::catch_unwind(all) {
        work.note("the end".to_owned());
        eprintln!("{:#?}", work.log);
        eprintln!("PUMICE_SEED={seed} runs this alone");
        std::mem::forget(work);
        std::panic::resume_unwind(panic);
    }
    drop(ManuallyDrop::into_inner(work.fs));
}

/// Draws the shape of a file system.
pub fn format_options(journal: bool, rng: &mut SmallRng) -> FormatOptions {
    let mut format = FormatOptions::default();
    format.cluster_size = [4096, 16 << 10, 64 << 10][rng.random_range(0..3)];
    format.md_pages = Some([60, 160][rng.random_range(0..2)]);
    format.journal = match journal {
        true => Journal::Bytes(128 << 10),
        false => Journal::None,
    };
    format
}

/// The seeds of a test that runs so many of them.
pub fn seeds(rounds: u64) -> std::ops::Range<u64> {
    match from_env("PUMICE_SEED") {
        Some(seed) => seed..seed + from_env("PUMICE_ROUNDS").unwrap_or(1),
        None => 0..from_env("PUMICE_ROUNDS").unwrap_or(rounds),
    }
}
