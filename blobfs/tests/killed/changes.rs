//! Changes of files, and what the files have after them.

use std::sync::Arc;

use pumice_blobfs::fs::{File, FileSystem, FormatOptions, MountOptions, OpenOptions};
use rand::prelude::*;

pub fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..=250u8)
        .map(|b| b.wrapping_add(seed))
        .cycle()
        .take(len)
        .collect()
}

pub fn all(file: &File) -> Vec<u8> {
    let mut out = vec![0; usize::try_from(file.len()).unwrap()];
    assert_eq!(file.read_at(0, &mut out).unwrap(), out.len());
    out
}

pub fn contents(fs: &FileSystem, path: &str) -> Vec<u8> {
    all(&fs.open(path, OpenOptions::READ).unwrap())
}

pub fn every_kind(fs: &FileSystem) {
    let open = |path: &str| fs.open(path, OpenOptions::CREATE).unwrap();
    // Written over in memory, and through to the device behind entries that are in the log.
    let over = open("/over");
    over.append(&bytes(3 << 20, 1)).unwrap();
    over.write_at(100, &bytes(5000, 90)).unwrap();
    over.write_at((3 << 20) - 10, &bytes(30, 80)).unwrap();
    // Synced, then written over inside, through to the device, which needs no entry.
    let synced = open("/synced");
    synced.append(&bytes(3 << 20, 2)).unwrap();
    synced.sync().unwrap();
    synced.write_at(200, &bytes(100, 70)).unwrap();
    synced.append(b"end").unwrap();
    synced.write_at(250, &bytes(100, 71)).unwrap();
    // Synced, then written over in memory only.
    let patched = open("/patched");
    patched.append(&bytes(1000, 9)).unwrap();
    patched.sync().unwrap();
    patched.write_at(500, b"new").unwrap();
    // Its last close would write it.
    std::mem::forget(patched);
    // Cut and appended to again, synced and not.
    let cut = open("/cut");
    cut.append(&bytes(100, 3)).unwrap();
    cut.sync().unwrap();
    cut.append(&bytes(100, 4)).unwrap();
    cut.truncate(50).unwrap();
    cut.append(&bytes(30, 5)).unwrap();
    let cut = open("/cut and synced");
    cut.append(&bytes(100, 3)).unwrap();
    cut.truncate(50).unwrap();
    cut.append(&bytes(30, 5)).unwrap();
    cut.sync().unwrap();
    cut.write_at(60, b"X").unwrap();
    cut.append(b"end").unwrap();
    // A synced file that was only cut.
    let shorter = open("/shorter");
    shorter.append(&bytes(9000, 3)).unwrap();
    shorter.sync().unwrap();
    shorter.truncate(8000).unwrap();
    // Gaps, short and long, and a length.
    let gap = open("/gap");
    gap.append(b"begin").unwrap();
    gap.write_at(9 << 20, b"end").unwrap();
    gap.truncate(10 << 20).unwrap();
    gap.write_at(11 << 20, b"").unwrap();
    // A name that another file gets, whose blob has the number of a deleted one.
    open("/deleted").append(&bytes(70_000, 6)).unwrap();
    fs.unlink("/deleted").unwrap();
    open("/new").append(b"new").unwrap();
    let orphan = open("/orphan");
    orphan.append(b"nothing").unwrap();
    fs.unlink("/orphan").unwrap();
    orphan.append(b"of it").unwrap();
    open("/from").append(&bytes(1000, 7)).unwrap();
    open("/to").append(&bytes(2000, 8)).unwrap();
    fs.rename("/from", "/to").unwrap();
    fs.link("/to", "/link").unwrap();
    std::mem::forget(orphan);
}

pub fn check_every_kind(fs: &FileSystem) {
    let mut over = bytes(3 << 20, 1);
    over[100..5100].copy_from_slice(&bytes(5000, 90));
    over.truncate((3 << 20) - 10);
    over.extend(bytes(30, 80));
    assert!(contents(fs, "/over") == over);
    let mut synced = bytes(3 << 20, 2);
    synced[200..300].copy_from_slice(&bytes(100, 70));
    synced[250..350].copy_from_slice(&bytes(100, 71));
    synced.extend(b"end");
    assert!(contents(fs, "/synced") == synced);
    let patched = [&bytes(500, 9)[..], b"new", &bytes(1000, 9)[503..]].concat();
    assert!(contents(fs, "/patched") == patched);
    let cut = [bytes(50, 3), bytes(30, 5)].concat();
    assert_eq!(contents(fs, "/cut"), cut);
    let mut cut = [&cut[..], b"end"].concat();
    cut[60] = b'X';
    assert_eq!(contents(fs, "/cut and synced"), cut);
    assert_eq!(contents(fs, "/shorter"), bytes(8000, 3));
    let mut gap = vec![0; 10 << 20];
    gap[..5].copy_from_slice(b"begin");
    gap[9 << 20..(9 << 20) + 3].copy_from_slice(b"end");
    assert!(contents(fs, "/gap") == gap);
    assert_eq!(contents(fs, "/new"), b"new");
    assert_eq!(contents(fs, "/to"), bytes(1000, 7));
    assert_eq!(contents(fs, "/link"), bytes(1000, 7));
    for gone in ["/deleted", "/orphan", "/from"] {
        assert!(!fs.exists(gone).unwrap(), "{gone}");
    }
}

pub const NAMES: [&str; 3] = ["/a", "/b", "/c"];

/// Makes `count` changes of a few files, at random, and calls `told` after each has returned.
pub fn random(fs: &FileSystem, seed: u64, count: u64, told: impl Fn(u64)) {
    let mut random = StdRng::seed_from_u64(seed);
    for n in 0..count {
        let path = NAMES[random.random_range(0..NAMES.len())];
        let file = fs.open(path, OpenOptions::CREATE).unwrap();
        let long = random.random_range(0..20) == 0;
        let len = random.random_range(1..if long { 2 << 20 } else { 6000 });
        let data = bytes(len, random.random());
        let at = random.random_range(0..=file.len() + 1);
        let other = NAMES[random.random_range(0..NAMES.len())];
        match random.random_range(0..20) {
            0..=9 => file.append(&data).unwrap(),
            10..=12 => file.write_at(at, &data).unwrap(),
            13 => file.write_at(at + 9000, &data).unwrap(),
            14..=15 => file.truncate(at).unwrap(),
            16..=17 => file.sync().unwrap(),
            18 => drop(fs.unlink(path)),
            _ => fs.rename(path, other).unwrap(),
        }
        told(n + 1);
    }
}

/// Returns what the files have after the first `count` changes, on a device in memory.
pub fn expected(seed: u64, count: u64) -> Vec<Option<Vec<u8>>> {
    let memory = pumice_bdev::open("malloc://96M").unwrap();
    FileSystem::format(Arc::clone(&memory), &FormatOptions::default()).unwrap();
    let fs = FileSystem::mount(memory, &MountOptions::default()).unwrap();
    random(&fs, seed, count, |_| ());
    all_of(&fs)
}

pub fn all_of(fs: &FileSystem) -> Vec<Option<Vec<u8>>> {
    let has = |path: &&str| fs.exists(path).unwrap();
    NAMES
        .iter()
        .map(|path| has(path).then(|| contents(fs, path)))
        .collect()
}

/// Whether a file that a kill has interrupted in a change has its bytes from before or after it.
pub fn is_between(found: &[u8], before: &[u8], after: &[u8]) -> bool {
    let lens = [before.len(), after.len()];
    (found.len() >= lens[0].min(lens[1]) && found.len() <= lens[0].max(lens[1]))
        && (0..found.len()).all(|at| {
            let byte = found.get(at);
            byte == before.get(at) || byte == after.get(at)
        })
}
