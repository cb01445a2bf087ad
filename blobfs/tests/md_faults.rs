//! Tests in which writes and flushes of metadata fail: what fails has changed nothing, now and
//! after the next load, and the store works when the device does.

mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::sync::Arc;

use common::*;
use flaky::{Flaky, Plan};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, DmaBuf, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};

const CLUSTER: u64 = 8192;

fn device(image: CrashImage, write_cache: bool, fua: bool) -> CrashDevice {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(write_cache)
        .fua(fua)
        .seed(3)
        .tear_bytes(4096);
    CrashDevice::with_options(&options, image)
}

fn load(dev: Arc<dyn BlockDevice>) -> Blobstore {
    Blobstore::load(dev, &LoadOptions::default()).unwrap()
}

fn describe(store: &Blobstore) -> Vec<String> {
    assert_eq!(store.damaged(), []);
    let mut lines = listing(store);
    for id in store.blobs() {
        let content = whole(&store.open(id).unwrap());
        lines.push(format!("{id} {:#x}", crc32c::crc32c(&content)));
    }
    lines.push(format!(
        "{} {:?}",
        store.total_clusters(),
        store.super_blob()
    ));
    lines.push(format!(
        "{} free, {:?}",
        store.free_clusters(),
        store.md_pages()
    ));
    lines
}

fn setup() -> (CrashImage, Vec<BlobId>) {
    let dev = device(CrashImage::zeroed(4 << 20), false, true);
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(80));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let ids: Vec<BlobId> = [(3, false), (6, true), (2, false), (4, false)]
        .into_iter()
        .map(|(num_clusters, thin)| {
            let xattrs = (0..3).map(|i| (format!("big{i}"), vec![7; 3000])).collect();
            let opts = CreateOptions::default()
                .num_clusters(num_clusters)
                .thin(thin)
                .xattrs(xattrs);
            let id = store.create(&opts).unwrap();
            write(&store.open(id).unwrap(), 0, &[5; 4096]);
            id
        })
        .collect();
    store.snapshot(ids[1], &[]).unwrap();
    write(&store.open(ids[1]).unwrap(), CLUSTER, &[6; 4096]);
    store.unload().unwrap();
    (dev.image(), ids)
}

type Change = fn(&Blobstore, &[BlobId]) -> Result<(), Error>;

const CHANGES: [(&str, Change); 11] = [
    ("create", |store, _| {
        let opts = CreateOptions::default().num_clusters(2).xattrs(vec![
            ("a".to_owned(), vec![1; 3000]),
            ("b".to_owned(), vec![2; 3000]),
        ]);
        store.create(&opts).map(drop)
    }),
    ("resize", |store, ids| store.open(ids[0])?.resize(5)),
    ("shrink", |store, ids| store.open(ids[3])?.resize(1)),
    ("xattrs", |store, ids| {
        let mut all = store.transaction();
        for i in 0..3 {
            all.set_xattr(ids[0], &format!("big{i}"), &[8; 3000]);
        }
        all.commit().map(drop)
    }),
    ("three blobs", |store, ids| {
        let mut all = store.transaction();
        all.set_xattr(ids[0], "x", b"1");
        all.resize(ids[3], 6);
        all.create(CreateOptions::default());
        all.delete(ids[2]);
        all.commit().map(drop)
    }),
    ("delete", |store, ids| store.delete(ids[2])),
    ("snapshot", |store, ids| {
        store.snapshot(ids[0], &[]).map(drop)
    }),
    ("delete snapshot", |store, ids| {
        let snapshot = store
            .blobs()
            .into_iter()
            .find(|id| store.clones(*id) == [ids[1]]);
        store.delete(snapshot.unwrap())
    }),
    ("first write", |store, ids| {
        let mut data = DmaBuf::new(8192).unwrap();
        data.fill(0);
        store
            .open(ids[1])?
            .write_at(4 * CLUSTER, data.freeze(), true)
    }),
    ("inflate", |store, ids| store.inflate(ids[1])),
    ("super blob", |store, ids| {
        store.set_super_blob(Some(ids[3]))
    }),
];

/// Lets every write and flush of every change fail: once, a few times, or until the fault is over;
/// carried out or not.
#[test]
fn what_fails_has_changed_nothing_and_the_store_goes_on() {
    let (base, ids) = setup();
    let mut rounds = 0;
    for (name, change) in CHANGES {
        for (write_cache, fua) in [(false, true), (true, true), (true, false)] {
            // These are the number of operations, and the two states.
            let plain = device(base.clone(), write_cache, fua);
            let counting = Flaky::new(Arc::new(plain.clone()));
            let store = load(counting.clone());
            let old = describe(&store);
            counting.arm(Some(Plan {
                from: u64::MAX,
                count: 0,
                kind: IoErrorKind::Media,
                done: false,
            }));
            change(&store, &ids).unwrap();
            let ops = counting.seen();
            let new = describe(&store);
            drop(store);
            for from in 0..ops {
                for (count, done) in [
                    (1, false),
                    (1, true),
                    (4, false),
                    (4, true),
                    (10_000, false),
                    (10_000, true),
                ] {
                    for kind in [IoErrorKind::Media, IoErrorKind::NoSpace] {
                        let what = format!(
                            "{name}, cache {write_cache}, fua {fua}, {kind}, operations from {from}, {count}, done {done}"
                        );
                        let dev = device(base.clone(), write_cache, fua);
                        let flaky = Flaky::new(Arc::new(dev.clone()));
                        let store = load(flaky.clone());
                        flaky.arm(Some(Plan {
                            from,
                            count,
                            kind,
                            done,
                        }));
                        let result = change(&store, &ids);
                        flaky.arm(None);
                        let undecided = matches!(result, Err(Error::Undecided(_)));
                        // A write to a thin blob allocates the cluster first. After that the data
                        // may fail.
                        let allowed = match &result {
                            Ok(()) => vec![&new],
                            Err(_) if name == "first write" => vec![&old, &new],
                            Err(_) => vec![&old],
                        };
                        if !undecided {
                            let found = describe(&store);
                            assert!(allowed.contains(&&found), "{what}: {result:?}: {found:#?}");
                        }
                        // The state is durable, as a load after a power cut shows.
                        let mut points = dev.crash_points();
                        while points.advance().is_some() {}
                        let image = points.image(&mut |_| false);
                        let after = load(Arc::new(device(image, false, true)));
                        let found = describe(&after);
                        drop(after);
                        if undecided {
                            // Of several blobs some may be new, in the order of the list.
                            let one = name != "three blobs";
                            assert!(
                                !one || found == old || found == new,
                                "{what}: after a cut: {found:#?}"
                            );
                        } else {
                            let same =
                                |a: &[String], b: &[String]| a[..a.len() - 1] == b[..b.len() - 1];
                            assert!(
                                allowed.iter().any(|allowed| same(&found, allowed)),
                                "{what}: after a cut: {found:#?}\n{result:?}"
                            );
                        }
                        // The device works, and so does the store.
                        let made = store.create(&CreateOptions::default());
                        let made =
                            made.unwrap_or_else(|error| panic!("{what}: afterwards: {error}"));
                        store.delete(made).unwrap();
                        if undecided {
                            assert_eq!(describe(&store), old, "{what}: taken back");
                        }
                        store.unload().unwrap();
                        let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
                        let report = check(&as_dyn).unwrap();
                        assert_eq!(report.worst(), None, "{what}: {:?}", report.findings);
                        rounds += 1;
                    }
                }
            }
        }
    }
    println!("{rounds} rounds");
    assert!(rounds > 1000);
}

#[test]
fn passing_faults_of_metadata_pass() {
    let (base, ids) = setup();
    for (name, change) in CHANGES {
        for count in [1, 3, 8] {
            let dev = Arc::new(ErrorDevice::new(
                None,
                Arc::new(device(base.clone(), true, true)),
            ));
            let store = load(dev.clone());
            for op in [
                OpKind::Write,
                OpKind::Read,
                OpKind::Flush,
                OpKind::WriteZeroes,
            ] {
                dev.inject(Injection::new(Failure::NoMemory).op(Some(op)).count(count));
            }
            change(&store, &ids).unwrap_or_else(|error| panic!("{name}, {count}: {error}"));
            dev.clear();
            store.unload().unwrap();
        }
    }
}

/// Reads and writes of blobs, on the channels of threads.
#[test]
fn passing_faults_of_data_pass() {
    let (base, ids) = setup();
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(device(base, true, true))));
    let store = load(dev.clone());
    let blob = store.open(ids[0]).unwrap();
    for op in [OpKind::Write, OpKind::Read, OpKind::Flush] {
        dev.inject(Injection::new(Failure::NoMemory).op(Some(op)).count(5));
    }
    write(&blob, 0, &[9; 4096]);
    store.flush().unwrap();
    assert_eq!(read(&blob, 0, 4096), [9; 4096]);
}

/// When a device accepts no more writes, the store says so, is unloaded, and loads again.
#[test]
fn a_store_that_stopped_says_so_at_the_unload() {
    let (base, ids) = setup();
    let dev = device(base, false, true);
    let flaky = Flaky::new(Arc::new(dev.clone()));
    let store = load(flaky.clone());
    store.set_super_blob(Some(ids[0])).unwrap();
    flaky.arm(Some(Plan {
        from: 0,
        count: u64::MAX,
        kind: IoErrorKind::TimedOut,
        done: true,
    }));
    let error = store.delete(ids[2]).unwrap_err();
    assert!(matches!(error, Error::Undecided(_)), "{error}");
    assert!(error.to_string().contains("open"), "{error}");
    assert!(matches!(store.delete(ids[3]), Err(Error::Stopped(_))));
    assert!(matches!(store.unload(), Err(Error::Stopped(_))));
    assert!(matches!(store.unload(), Err(Error::Unloaded)));
    flaky.arm(None);
    // It is not unloaded in order, but whole, and it is released, so that it can be loaded again.
    let store = load(flaky);
    assert!(!store.blobs().contains(&ids[2]));
    store.unload().unwrap();
}

/// A write that has timed out may still reach the device, so its target belongs to nobody else
/// until the next load.
#[test]
fn what_a_late_write_may_reach_is_given_to_nobody() {
    let (base, ids) = setup();
    let dev = device(base, false, true);
    let flaky = Flaky::new(Arc::new(dev.clone()));
    let store = load(flaky.clone());
    store.set_super_blob(Some(ids[0])).unwrap();
    let free = (store.free_clusters(), store.md_pages());
    flaky.arm(Some(Plan {
        from: 0,
        count: u64::MAX,
        kind: IoErrorKind::TimedOut,
        done: true,
    }));
    store.open(ids[0]).unwrap().resize(5).unwrap_err();
    flaky.arm(None);
    assert_eq!(store.free_clusters(), free.0 - 2);
    assert_ne!(store.md_pages(), free.1);
    store.open(ids[3]).unwrap().resize(6).unwrap();
    store.unload().unwrap();
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev);
    assert_eq!(check(&as_dyn).unwrap().worst(), None);
    assert_eq!(load(as_dyn).free_clusters(), free.0 - 2);
}

/// The same holds for what a change frees, if an operation that clears it has timed out.
#[test]
fn what_a_late_clear_may_reach_is_given_to_nobody() {
    let (base, ids) = setup();
    // The first operation of the deletion is its commit point, and the others clear.
    let (mut late, mut operations) = (None, 2);
    while late < Some(operations - 1) {
        let dev = device(base.clone(), false, true);
        let flaky = Flaky::new(Arc::new(dev.clone()));
        let store = load(flaky.clone());
        store.set_super_blob(Some(ids[0])).unwrap();
        let free = (store.free_clusters(), store.md_pages());
        flaky.arm(Some(Plan {
            from: late.unwrap_or(0),
            count: late.map_or(0, |_| 1),
            kind: IoErrorKind::TimedOut,
            done: true,
        }));
        store.delete(ids[2]).unwrap();
        operations = flaky.seen();
        assert!(operations > 2);
        flaky.arm(None);
        let freed = store.free_clusters() - free.0;
        assert_eq!(freed, late.map_or(2, |_| 0), "{late:?}");
        assert_eq!(store.md_pages() == free.1, late.is_some(), "{late:?}");
        store.unload().unwrap();
        let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev);
        assert_eq!(check(&as_dyn).unwrap().worst(), None);
        assert_eq!(load(as_dyn).free_clusters(), free.0 + 2);
        late = Some(late.map_or(1, |late| late + 1));
    }
}

/// The same holds for the clusters that an inflation fills, and for those that the metadata is to grow into, where it is or
/// at another place.
#[test]
fn what_a_late_copy_may_reach_is_given_to_nobody() {
    let (base, ids) = setup();
    let blank = device(CrashImage::zeroed(4 << 20), false, true);
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(80));
    let store = Blobstore::init(Arc::new(blank.clone()), &opts).unwrap();
    store.unload().unwrap();
    let inflate: Change = |store, ids| store.inflate(ids[1]);
    let grow: Change = |store, _| store.grow_md_pages(200).map(drop);
    let cases = [
        ("inflation", base.clone(), inflate),
        ("move", base, grow),
        ("growth", blank.image(), grow),
    ];
    for (what, image, change) in cases {
        let store = load(Arc::new(device(image.clone(), false, true)));
        let free = store.free_clusters();
        change(&store, &ids).unwrap();
        let taken = free - store.free_clusters();
        let dev = device(image, false, true);
        let flaky = Flaky::new(Arc::new(dev.clone()));
        let store = load(flaky.clone());
        store.create(&CreateOptions::default()).unwrap();
        flaky.arm(Some(Plan {
            from: 0,
            count: 1,
            kind: IoErrorKind::TimedOut,
            done: true,
        }));
        change(&store, &ids).unwrap_err();
        flaky.arm(None);
        assert!(taken > 2 && store.free_clusters() <= free - taken, "{what}");
        change(&store, &ids).unwrap();
        store.unload().unwrap();
        let dev: Arc<dyn BlockDevice> = Arc::new(dev);
        assert_eq!(check(&dev).unwrap().worst(), None, "{what}");
    }
}

/// A flush that failed means that what was written before it may be lost. A later flush does not
/// change that.
#[test]
fn a_failed_flush_stays_failed() {
    let (base, ids) = setup();
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(device(base, true, false))));
    let store = load(dev.clone());
    let blob = store.open(ids[0]).unwrap();
    write(&blob, 0, &[9; 4096]);
    dev.inject(Injection::new(Failure::Fail).op(Some(OpKind::Flush)));
    store.flush().unwrap_err();
    assert!(matches!(store.flush(), Err(Error::Lost(_))));
    assert!(matches!(store.snapshot(ids[0], &[]), Err(Error::Lost(_))));
    let mut data = DmaBuf::new(4096).unwrap();
    data.fill(1);
    assert!(matches!(
        blob.write_at(0, data.freeze(), true),
        Err(Error::Lost(_))
    ));
    drop(blob);
    store.unload().unwrap();
    let store = load(dev);
    store.flush().unwrap();
    store.snapshot(ids[0], &[]).unwrap();
}

/// The same holds when the failed flush was one of the metadata.
#[test]
fn a_failed_flush_of_metadata_is_remembered_for_data() {
    let (base, ids) = setup();
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(device(base, true, false))));
    let store = load(dev.clone());
    write(&store.open(ids[0]).unwrap(), 0, &[9; 4096]);
    dev.inject(Injection::new(Failure::Fail).op(Some(OpKind::Flush)));
    let _ = store.delete(ids[2]);
    assert!(matches!(store.flush(), Err(Error::Lost(_))));
}

/// The metadata region is zeroed by writing. On a sparse image a command may only punch holes, and
/// then the host may have no space for a page when it is first written.
#[test]
fn the_metadata_region_has_its_place_from_the_start() {
    let dev = Arc::new(ErrorDevice::new(None, memory(8 << 20, 4096)));
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::WriteZeroes))
            .count(u64::MAX),
    );
    let opts = InitOptions::default().cluster_size(8192);
    let store = Blobstore::init(dev, &opts).unwrap();
    store.create(&CreateOptions::default()).unwrap();
}
