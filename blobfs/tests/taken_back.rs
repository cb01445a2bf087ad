//! What has failed leaves nothing behind: no space that is lost, no mark that is missing, no change that is acknowledged and
//! gone. With a journal and without one.

mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::sync::Arc;

use common::journal::{CLUSTER, DEVICES, Device, RING, STORE, make, set, version};
use common::{listing, memory};
use flaky::{Flaky, Plan};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage};
use pumice_blobfs::blobstore::{
    Blobstore, ClusterInit, CreateOptions, Error, InitOptions, LoadOptions,
};

/// A store with one blob, on a device that fails on demand.
fn stored(device: Device, journal: bool) -> CrashDevice {
    let dev = device.with(CrashImage::zeroed(STORE), 0);
    let opts = InitOptions::default()
        .cluster_size(u32::try_from(CLUSTER).unwrap())
        .md_pages(Some(160))
        .journal(journal.then_some(RING));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    make(&store);
    store.unload().unwrap();
    device.with(dev.image(), 7)
}

fn load(dev: &Arc<dyn BlockDevice>) -> Blobstore {
    Blobstore::load(Arc::clone(dev), &LoadOptions::default()).unwrap()
}

const KINDS: [bool; 2] = [false, true];

/// Has every write and read of these blocks fail.
fn break_all(dev: &ErrorDevice, range: Option<(u64, u64)>) {
    for op in [OpKind::Write, OpKind::Read] {
        let all = Injection::new(Failure::Fail).op(Some(op));
        dev.inject(all.count(u64::MAX).range(range));
    }
}

/// A store with a change in doubt, which has taken clusters and a metadata page: the first since the load, or a later one.
/// Returns what was free before.
fn in_doubt(journal: bool, first: bool) -> (CrashDevice, Arc<ErrorDevice>, Blobstore, (u64, u64)) {
    let crash = stored(DEVICES[0], journal);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let store = load(&(dev.clone() as Arc<dyn BlockDevice>));
    if !first {
        set(&store, 1).unwrap();
    }
    let free = (store.free_clusters(), store.md_pages().used);
    // The mark of an orderly unload can be removed before a first change.
    let sb = store.super_block();
    let pages = (sb.md_start.get().into(), sb.md_len.get().into());
    break_all(&dev, first.then_some(pages));
    // Its root alone is written, so that what fails first is its commit.
    let opts = CreateOptions::default().num_clusters(5);
    let opts = opts.extent_table(false).init(ClusterInit::CallerWrites);
    let error = store.create(&opts).unwrap_err();
    assert!(matches!(error, Error::Undecided(_)), "{error}");
    assert!(matches!(set(&store, 2), Err(Error::Stopped(_))));
    dev.clear();
    (crash, dev, store, free)
}

/// A change whose outcome was open gives back what it has taken, once it is taken back.
#[test]
fn a_change_that_is_taken_back_late_gives_back_its_space() {
    for journal in KINDS {
        let (_, dev, store, free) = in_doubt(journal, false);
        set(&store, 3).unwrap();
        let now = (store.free_clusters(), store.md_pages().used);
        assert_eq!(now, free, "journal: {journal}");
        let state = listing(&store);
        store.unload().unwrap();
        drop(store);
        let store = load(&(dev as Arc<dyn BlockDevice>));
        let now = (store.free_clusters(), store.md_pages().used);
        assert_eq!((listing(&store), now), (state, free), "journal: {journal}");
    }
}

/// The unload takes back what is in doubt, as any change does, and is an orderly one.
#[test]
fn an_unload_takes_back_what_is_in_doubt() {
    for (journal, first) in [(false, false), (true, false), (false, true)] {
        let (crash, dev, store, free) = in_doubt(journal, first);
        let state = listing(&store);
        store.unload().unwrap();
        drop(store);
        let what = format!("journal: {journal}, first: {first}");
        assert_eq!(version(&crash.image()), (3, 1), "{what}");
        let store = load(&(dev as Arc<dyn BlockDevice>));
        let now = (store.free_clusters(), store.md_pages().used);
        assert_eq!((listing(&store), now), (state, free), "{what}");
    }
}

/// A growth of the metadata does so too.
#[test]
fn a_growth_takes_back_what_is_in_doubt() {
    for journal in KINDS {
        let (_, _, store, _) = in_doubt(journal, false);
        let before = store.super_block().md_len.get();
        assert!(
            store.grow_md_pages(before + 100).unwrap() > before,
            "journal: {journal}"
        );
        store.unload().unwrap();
        let error = store.grow_md_pages(before + 200).unwrap_err();
        assert!(matches!(error, Error::Unloaded), "{error}");
    }
    let dev: Arc<dyn BlockDevice> = Arc::new(stored(DEVICES[0], false));
    let opts = LoadOptions::default().read_only(true);
    let store = Blobstore::load(dev, &opts).unwrap();
    let error = store.grow_md_pages(1000).unwrap_err();
    assert!(matches!(error, Error::ReadOnlyStore), "{error}");
}

/// The first change of a mount removes the mark of an orderly unload, and then it fails. The unload behind it is an orderly one
/// nevertheless.
#[test]
fn an_unload_behind_a_first_change_that_failed_is_orderly() {
    for (device, journal) in DEVICES
        .into_iter()
        .flat_map(|d| KINDS.map(|kind| (d, kind)))
    {
        let mut failed = 0;
        for from in 0..12 {
            let what = format!("{device:?}, journal {journal}, from {from}");
            let crash = stored(device, journal);
            let flaky = Flaky::new(Arc::new(crash.clone()));
            let store = load(&(flaky.clone() as Arc<dyn BlockDevice>));
            let state = listing(&store);
            flaky.arm(Some(Plan {
                from,
                count: 3,
                kind: IoErrorKind::Media,
                done: false,
            }));
            let result = set(&store, 5);
            flaky.arm(None);
            failed += usize::from(result.is_err());
            let expected = match &result {
                Ok(()) => listing(&store),
                Err(_) => state,
            };
            // What was acknowledged is there after a power cut, and what failed is not.
            let cut = crash.image_after(crash.len_events(), &mut |_| false);
            let cut: Arc<dyn BlockDevice> = Arc::new(device.with(cut, 1));
            if !matches!(result, Err(Error::Undecided(_))) {
                assert_eq!(listing(&load(&cut)), expected, "{what}: {result:?}");
            }
            store.unload().unwrap_or_else(|e| panic!("{what}: {e}"));
            drop(store);
            assert_eq!(version(&crash.image()), (3, 1), "{what}");
            let store = load(&(flaky as Arc<dyn BlockDevice>));
            assert_eq!(listing(&store), expected, "{what}");
        }
        assert!(failed > 0, "{device:?}, journal {journal}");
    }
}

/// One metadata page that cannot be written fails the changes of its blob, and they are known not to be made: the store goes on.
#[test]
fn a_bad_metadata_page_stops_its_blob_alone() {
    let crash = stored(DEVICES[0], false);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash)));
    let store = load(&(dev.clone() as Arc<dyn BlockDevice>));
    make(&store);
    let ids = store.blobs();
    let root = store.super_block().md_start.get() + ids[0].page().unwrap();
    let bad = Injection::new(Failure::Fail).op(Some(OpKind::Write));
    dev.inject(bad.count(u64::MAX).range(Some((root.into(), 1))));
    let state = listing(&store);
    for _ in 0..2 {
        let error = set(&store, 5).unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
        assert_eq!(listing(&store), state);
        store.open(ids[1]).unwrap().resize(4).unwrap();
        store.open(ids[1]).unwrap().resize(3).unwrap();
    }
    store.unload().unwrap();
}

#[test]
fn a_device_without_room_for_a_super_block_is_refused() {
    let dev = memory(2048, 512);
    for read_only in [false, true] {
        let opts = LoadOptions::default().read_only(read_only);
        let error = Blobstore::load(Arc::clone(&dev), &opts).unwrap_err();
        assert!(matches!(error, Error::Geometry { .. }), "{error}");
    }
}
