//! Tests of changes by many threads at once. Those of different blobs are on the device together,
//! those of one blob come one after the other, and what a change frees belongs to nobody else
//! before the change is durable.

mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "commit/meeting.rs"]
mod meeting;
#[path = "common/task.rs"]
mod task;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use flaky::{Flaky, Plan};
use meeting::{Meeting, meet};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::check::{Severity, check};
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, ClearMethod, CreateOptions, Error, InitOptions, LoadOptions,
};
use pumice_blobfs::fs::{FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};
use rand::prelude::*;
use task::{spawn, wait_for};

const CLUSTER: u64 = 16384;

#[test]
fn changes_of_different_blobs_are_in_flight_together() {
    let dev = Meeting::new(memory(8 << 20, 4096));
    let store = Blobstore::init(dev.clone(), &InitOptions::default()).unwrap();
    let blobs: Vec<BlobId> = (0..8)
        .map(|_| store.create(&CreateOptions::default()).unwrap())
        .collect();
    let jobs = blobs.iter().map(|id| {
        let (store, id) = (store.clone(), *id);
        let job = move || {
            let mut change = store.transaction();
            change.set_xattr(id, "n", b"1");
            change.commit().unwrap();
        };
        Box::new(job) as Box<dyn FnOnce() + Send>
    });
    assert_eq!(meet(&dev, 8, jobs.collect()), 8);
    for id in blobs {
        assert_eq!(store.open(id).unwrap().xattr("n"), Some(b"1".to_vec()));
    }
}

/// Eight threads sync eight files, once each: first the eight writes of data are in flight
/// together, then the eight of lengths.
#[test]
fn syncs_of_different_files_are_in_flight_together() {
    let dev = Meeting::new(memory(64 << 20, 4096));
    let mut format = FormatOptions::default();
    format.journal = Journal::None;
    FileSystem::format(dev.clone(), &format).unwrap();
    let fs = FileSystem::mount(dev.clone(), &MountOptions::default()).unwrap();
    let files: Vec<_> = (0..8)
        .map(|n| fs.open(&format!("/{n}"), OpenOptions::CREATE).unwrap())
        .collect();
    for file in &files {
        file.append(&[1; 100]).unwrap();
        file.sync().unwrap();
        file.append(&[2; 100]).unwrap();
    }
    let before = fs.io_stats();
    let jobs = files.iter().map(|file| {
        let file = file.clone();
        Box::new(move || file.sync().unwrap()) as Box<dyn FnOnce() + Send>
    });
    assert_eq!(meet(&dev, 8, jobs.collect()), 8);
    let made = fs.io_stats().since(&before);
    assert_eq!((made.writes, made.flushes), (16, 0), "{made:?}");
    for file in &files {
        file.append(&[3; 100]).unwrap();
    }
    // These are the lengths: the data is on the device already.
    let mut lengths = Vec::new();
    for file in &files {
        file.range_sync(0, u64::MAX).unwrap();
        let file = file.clone();
        lengths.push(Box::new(move || file.sync().unwrap()) as Box<dyn FnOnce() + Send>);
    }
    assert_eq!(meet(&dev, 8, lengths), 8);
    drop(files);
    fs.unmount().unwrap();
}

fn held_store() -> (Arc<ErrorDevice>, Blobstore) {
    let dev = Arc::new(ErrorDevice::new(None, memory(8 << 20, 4096)));
    let opts = InitOptions::default().cluster_size(16384);
    let store = Blobstore::init(dev.clone(), &opts).unwrap();
    // The mark of a store that is not clean is written with the first change.
    store.create(&CreateOptions::default()).unwrap();
    (dev, store)
}

/// Makes the next write of a blob's root hang.
fn hang_root(dev: &ErrorDevice, store: &Blobstore, id: BlobId) {
    let root = id.0 & u64::from(u32::MAX);
    dev.inject(
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Write))
            .range(Some((
                u64::from(store.super_block().md_start.get()) + root,
                1,
            ))),
    );
}

fn set(store: &Blobstore, id: BlobId, value: &[u8]) -> Result<(), Error> {
    let mut change = store.transaction();
    change.set_xattr(id, "n", value);
    change.commit().map(drop)
}

#[test]
fn changes_of_one_blob_come_one_after_the_other_and_others_do_not_wait() {
    let (dev, store) = held_store();
    let one = store.create(&CreateOptions::default()).unwrap();
    let other = store.create(&CreateOptions::default()).unwrap();
    hang_root(&dev, &store, one);
    let its_store = store.clone();
    let first = spawn(move || set(&its_store, one, b"1"));
    wait_for("the root is held back", || dev.injections().is_empty());
    let its_store = store.clone();
    let second = spawn(move || {
        let mut change = its_store.transaction();
        // If the first change were visible, this would fail with "no such xattr".
        change.remove_xattr(one, "n");
        change.set_xattr(one, "m", b"2");
        change.commit().map(drop)
    });
    assert!(second.still_waits());
    // A change that is not durable is not visible.
    let seen = store.clone();
    let seen = spawn(move || seen.open(other).unwrap().xattr("n"));
    assert_eq!(seen.join("opening another blob"), None);
    let its_store = store.clone();
    let beside = spawn(move || set(&its_store, other, b"3"));
    beside.join("a change of another blob").unwrap();
    assert!(second.still_waits() && first.still_waits());
    dev.resume();
    first.join("the first change").unwrap();
    second.join("the second change").unwrap();
    let blob = store.open(one).unwrap();
    assert_eq!(
        (blob.xattr("n"), blob.xattr("m")),
        (None, Some(b"2".to_vec()))
    );
}

/// Several changes of an xattr may wait for one sync: the last one counts. Those that come while the sync is on its way
/// wait for the next one.
#[test]
fn the_last_of_several_changes_of_an_xattr_counts() {
    let (dev, store) = held_store();
    let id = store.create(&CreateOptions::default()).unwrap();
    let blob = store.open(id).unwrap();
    blob.set_xattr("a", b"1").unwrap();
    blob.set_xattr("a", b"2").unwrap();
    blob.set_xattr("b", b"1").unwrap();
    blob.remove_xattr("b").unwrap();
    assert!(blob.remove_xattr("b").is_err(), "there is none any longer");
    let all = |blob: &Blob| {
        let xattrs = blob.xattrs();
        for (name, value) in &xattrs {
            let name = String::from_utf8(name.clone()).unwrap();
            assert_eq!(blob.xattr(&name).as_ref(), Some(value));
        }
        assert_eq!(blob.xattr("b"), None);
        xattrs
    };
    let xattr = |name: &str, value: &[u8]| (name.as_bytes().to_vec(), value.to_vec());
    assert_eq!(all(&blob), [xattr("a", b"2")]);
    hang_root(&dev, &store, id);
    let its_blob = blob.clone();
    let sync = spawn(move || its_blob.sync_md());
    wait_for("the root is held back", || dev.injections().is_empty());
    blob.set_xattr("a", b"3").unwrap();
    blob.set_xattr("c", b"1").unwrap();
    dev.resume();
    sync.join("the sync").unwrap();
    let expected = [xattr("a", b"3"), xattr("c", b"1")];
    assert_eq!(all(&blob), expected);
    blob.sync_md().unwrap();
    assert_eq!(all(&blob), expected);
    drop(blob);
    store.unload().unwrap();
    drop(store);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(all(&store.open(id).unwrap()), expected);
}

/// A sync that fails leaves the changes for the next one.
#[test]
fn changes_of_xattrs_wait_for_a_sync_that_succeeds() {
    let (dev, store) = held_store();
    let id = store.create(&CreateOptions::default()).unwrap();
    let blob = store.open(id).unwrap();
    blob.set_xattr("a", b"1").unwrap();
    let root = u64::from(store.super_block().md_start.get()) + (id.0 & u64::from(u32::MAX));
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX)
            .range(Some((root, 1))),
    );
    blob.sync_md().unwrap_err();
    dev.clear();
    assert_eq!(blob.xattr("a"), Some(b"1".to_vec()));
    blob.sync_md().unwrap();
    assert_eq!(blob.xattr("a"), Some(b"1".to_vec()));
    drop(blob);
    store.unload().unwrap();
    drop(store);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    let blob = store.open(id).unwrap();
    assert_eq!(blob.xattr("a"), Some(b"1".to_vec()));
}

/// An xattr whose removal waits for a sync may have been removed by a transaction.
#[test]
fn a_removal_that_waits_may_find_nothing_to_remove() {
    let (_dev, store) = held_store();
    let id = store.create(&CreateOptions::default()).unwrap();
    let blob = store.open(id).unwrap();
    blob.set_xattr("a", b"1").unwrap();
    blob.sync_md().unwrap();
    blob.remove_xattr("a").unwrap();
    blob.set_xattr("b", b"2").unwrap();
    let mut other = store.transaction();
    other.remove_xattr(id, "a");
    other.commit().unwrap();
    blob.sync_md().unwrap();
    assert_eq!(blob.xattr_names(), ["b"]);
}

/// While the deletion is not durable, its clusters and pages are not given to others, and nobody
/// opens the blob.
#[test]
fn what_a_change_frees_is_nobodys_before_it_is_durable() {
    let (dev, store) = held_store();
    let opts = CreateOptions::default()
        .num_clusters(3)
        .clear_method(ClearMethod::None);
    let gone = store.create(&opts).unwrap();
    let clusters = |blob: &Blob| -> Vec<u64> {
        let map = blob.extents();
        (0..blob.num_clusters())
            .map(|index| map.lba(index).unwrap())
            .collect()
    };
    let its_clusters = clusters(&store.open(gone).unwrap());
    let free = store.free_clusters();
    hang_root(&dev, &store, gone);
    let its_store = store.clone();
    let deletion = spawn(move || its_store.delete(gone));
    wait_for("the root is held back", || dev.injections().is_empty());
    let its_store = store.clone();
    let opening = spawn(move || its_store.open(gone).map(drop));
    assert!(opening.still_waits());
    assert_eq!(store.free_clusters(), free);
    dev.resume();
    deletion.join("the deletion").unwrap();
    assert!(matches!(opening.join("opening"), Err(Error::NoSuchBlob(_))));
    assert_eq!(store.free_clusters(), free + 3);
    let new = store.create(&opts).unwrap();
    assert_eq!(
        (new, clusters(&store.open(new).unwrap())),
        (gone, its_clusters.clone())
    );

    // The same holds in a transaction beside which others create blobs.
    hang_root(&dev, &store, new);
    let its_store = store.clone();
    let deletion = spawn(move || {
        let mut change = its_store.transaction();
        change.delete(new);
        change.commit().map(drop)
    });
    wait_for("the root is held back", || dev.injections().is_empty());
    let beside = store.clone();
    let beside = spawn(move || beside.create(&opts).map(|id| beside.open(id).unwrap()));
    let beside = beside.join("a new blob").unwrap();
    assert_ne!(beside.id(), new);
    assert!(
        !clusters(&beside)
            .iter()
            .any(|lba| its_clusters.contains(lba))
    );
    dev.resume();
    deletion.join("the deletion").unwrap();
}

/// The metadata region moves when no change is being written to its pages.
#[test]
fn a_growth_waits_for_changes_on_their_way() {
    let (dev, store) = held_store();
    let one = store.create(&CreateOptions::default()).unwrap();
    let before = store.md_pages().total;
    hang_root(&dev, &store, one);
    let its_store = store.clone();
    let change = spawn(move || set(&its_store, one, b"1"));
    wait_for("the root is held back", || dev.injections().is_empty());
    let its_store = store.clone();
    let growth = spawn(move || its_store.grow_md_pages(2 * u32::try_from(before).unwrap()));
    assert!(growth.still_waits());
    dev.resume();
    change.join("the change").unwrap();
    assert!(u64::from(growth.join("the growth").unwrap()) > before);
    store.unload().unwrap();
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(store.open(one).unwrap().xattr("n"), Some(b"1".to_vec()));
}

/// The unload waits too: its masks and its mark come after every change.
#[test]
fn an_unload_waits_for_changes_on_their_way() {
    let (dev, store) = held_store();
    let one = store.create(&CreateOptions::default()).unwrap();
    hang_root(&dev, &store, one);
    let its_store = store.clone();
    let change = spawn(move || {
        let mut change = its_store.transaction();
        change.delete(one);
        change.commit().map(drop)
    });
    wait_for("the root is held back", || dev.injections().is_empty());
    let its_store = store.clone();
    let unload = spawn(move || its_store.unload());
    assert!(unload.still_waits());
    dev.resume();
    change.join("the change").unwrap();
    unload.join("the unload").unwrap();
    let as_dyn: Arc<dyn BlockDevice> = dev;
    assert_eq!(check(&as_dyn).unwrap().worst(), None);
}

const THREADS: u64 = 4;

/// The state of a thread's blob: the value of its xattr and its size.
type Shape = (u64, u64);

/// A step of a thread: the state that its blob was to get, and the result.
struct Step {
    wanted: Shape,
    result: Result<(), Error>,
}

fn mark(thread: u64, step: usize) -> u64 {
    thread << 32 | step as u64
}

/// Changes its own blob repeatedly: its value, its size, or all of it by a new blob that replaces
/// it.
fn work(store: &Blobstore, dev: &CrashDevice, thread: u64, seed: u64, steps: usize) -> Vec<Step> {
    let mut rng = SmallRng::seed_from_u64(seed * 64 + thread);
    let mut blob: Option<BlobId> = None;
    let (mut shape, mut done): (Shape, Vec<Step>) = ((0, 0), Vec::new());
    for step in 0..steps {
        let wanted = (step as u64 + 1, rng.random_range(0..6));
        let mut change = store.transaction();
        let mut new = None;
        match blob {
            Some(id) if rng.random_bool(0.7) => {
                change.set_xattr(id, "n", &wanted.0.to_le_bytes());
                change.resize(id, wanted.1);
            }
            old => {
                let xattrs = vec![
                    ("owner".to_owned(), vec![u8::try_from(thread).unwrap()]),
                    ("n".to_owned(), wanted.0.to_le_bytes().to_vec()),
                ];
                new = Some(
                    change.create(
                        CreateOptions::default()
                            .num_clusters(wanted.1)
                            .xattrs(xattrs)
                            .clear_method(ClearMethod::None),
                    ),
                );
                if let Some(old) = old {
                    change.delete(old);
                }
            }
        }
        let result = change.commit();
        if let Ok(committed) = &result {
            blob = new.map(|new| committed.id(new)).or(blob);
            shape = wanted;
        }
        dev.mark(mark(thread, step));
        // The content of a cluster is zeroes or its owner's.
        if let (Ok(_), Some(id)) = (&result, blob) {
            let opened = store.open(id).unwrap();
            for index in 0..shape.1 {
                let _ = opened.write_at(
                    index * CLUSTER,
                    filled(u8::try_from(thread).unwrap() + 1),
                    true,
                );
            }
        }
        let undecided = matches!(result, Err(Error::Undecided(_) | Error::Stopped(_)));
        let result = result.map(drop);
        done.push(Step { wanted, result });
        if undecided {
            break;
        }
    }
    done
}

fn filled(byte: u8) -> pumice_bdev::DmaSlice {
    let mut buf = pumice_bdev::DmaBuf::new(4096).unwrap();
    buf.fill(byte);
    buf.freeze()
}

/// Returns the states that a thread's blob may have after a cut: the last acknowledged one, or the
/// one in progress.
fn allowed(steps: &[Step], acknowledged: usize) -> Vec<Option<Shape>> {
    let made = |step: &&Step| step.result.is_ok();
    let last = steps[..acknowledged].iter().rfind(made);
    let mut allowed = vec![last.map(|step| step.wanted)];
    let open = steps[..acknowledged]
        .last()
        .filter(|step| matches!(step.result, Err(Error::Undecided(_))));
    allowed.extend(open.map(|step| Some(step.wanted)));
    allowed.extend(steps.get(acknowledged).map(|step| Some(step.wanted)));
    allowed
}

/// Compares a device after a cut with what the threads know.
fn hold_against(image: &CrashImage, histories: &[Vec<Step>], acknowledged: &[usize], what: &str) {
    strict::parse_of(&image.to_vec(), what);
    let options = CrashOptions::default().block_size(4096).tear_bytes(4096);
    let dev: Arc<dyn BlockDevice> = Arc::new(CrashDevice::with_options(&options, image.clone()));
    let report = check(&dev).unwrap_or_else(|error| panic!("{what}: {error}"));
    let worse = |severity| severity != Severity::Note;
    assert!(
        !report
            .findings
            .iter()
            .any(|finding| worse(finding.severity)),
        "{what}: {:?}",
        report.findings
    );
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(store.damaged(), [], "{what}");
    let mut found: BTreeMap<u8, Vec<Shape>> = BTreeMap::new();
    for id in store.blobs() {
        let blob = store.open(id).unwrap();
        let owner = blob.xattr("owner").unwrap()[0];
        let n = u64::from_le_bytes(blob.xattr("n").unwrap().try_into().unwrap());
        found
            .entry(owner)
            .or_default()
            .push((n, blob.num_clusters()));
        let others = whole(&blob)
            .into_iter()
            .find(|byte| ![0, owner + 1].contains(byte));
        assert_eq!(others, None, "{what}: another's bytes in blob {id}");
    }
    for (thread, (steps, acknowledged)) in histories.iter().zip(acknowledged).enumerate() {
        let owned = found
            .remove(&u8::try_from(thread).unwrap())
            .unwrap_or_default();
        let allowed = allowed(steps, *acknowledged);
        // A new blob replaces an old one: between the two commit points both are there.
        let fits = |shape: &Shape| allowed.contains(&Some(*shape));
        let whole = match owned.len() {
            0 => allowed.contains(&None),
            1 | 2 => owned.iter().all(fits),
            _ => false,
        };
        assert!(
            whole,
            "{what}: thread {thread}: found {owned:?}, allowed {allowed:?}"
        );
    }
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs threads with faults and power cuts. What was acknowledged is there, what failed is not, and
/// no two blobs share anything.
#[test]
fn threads_faults_and_power_cuts() {
    let seeds = match from_env("PUMICE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..from_env("PUMICE_ROUNDS").unwrap_or(12),
    };
    let mut states = 0;
    for seed in seeds {
        let mut rng = SmallRng::seed_from_u64(seed);
        let options = CrashOptions::default()
            .block_size(4096)
            .write_cache(seed % 3 != 0)
            .fua(seed % 3 == 1)
            .seed(seed)
            .tear_bytes(4096);
        let base = CrashDevice::with_options(&options, CrashImage::zeroed(2 << 20));
        let opts = InitOptions::default()
            .cluster_size(16384)
            .md_pages(Some(64));
        Blobstore::init(Arc::new(base.clone()), &opts)
            .and_then(|store| store.unload())
            .unwrap();
        let dev = CrashDevice::with_options(&options, base.image());
        let flaky = Flaky::new(Arc::new(dev.clone()));
        let store = Blobstore::load(flaky.clone(), &LoadOptions::default()).unwrap();
        if rng.random_bool(0.6) {
            flaky.arm(Some(Plan {
                from: rng.random_range(0..120),
                count: rng.random_range(1..12),
                kind: [
                    IoErrorKind::Media,
                    IoErrorKind::NoSpace,
                    IoErrorKind::TimedOut,
                ][rng.random_range(0..3)],
                done: rng.random_bool(0.5),
            }));
        }
        let histories: Vec<Vec<Step>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (store, dev) = (&store, &dev);
                    scope.spawn(move || work(store, dev, thread, seed, 10))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        flaky.arm(None);
        let ended = store.unload();
        let stopped = matches!(ended, Err(Error::Stopped(_)));
        assert!(ended.is_ok() || stopped, "seed {seed}: {ended:?}");
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            let last = points.position() == points.len_events();
            if !last && rng.random_bool(0.8) {
                continue;
            }
            let mut acknowledged = vec![0; usize::try_from(THREADS).unwrap()];
            for mark in points.marks() {
                let thread = usize::try_from(mark >> 32).unwrap();
                acknowledged[thread] = usize::try_from(mark & 0xffff_ffff).unwrap() + 1;
            }
            let keep = [0.0, 1.0, 0.5][rng.random_range(0..3)];
            let image = points.image(&mut |_| rng.random_bool(keep));
            let what = format!(
                "seed {seed}, after event {} of {}",
                points.position(),
                points.len_events()
            );
            hold_against(&image, &histories, &acknowledged, &what);
            states += 1;
        }
    }
    println!("{states} states");
    assert!(states > 200);
}
