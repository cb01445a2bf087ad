//! Tests of snapshots, clones, inflation, external snapshots and growing.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use common::faults::fail;
use common::*;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BdevError, BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions, OpenExternal, Parent,
};

const CLUSTER: u64 = 16384;

fn store(len: u64) -> Blobstore {
    let opts = InitOptions::default().cluster_size(16384);
    Blobstore::init(memory(len, 4096), &opts).unwrap()
}

fn create(store: &Blobstore, num_clusters: u64, thin: bool, extent_table: bool) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(thin)
        .extent_table(extent_table);
    store.open(store.create(&opts).unwrap()).unwrap()
}

/// Writes the first page of a cluster.
fn mark(blob: &Blob, cluster: u64, byte: u8) {
    write(blob, cluster * CLUSTER, &[byte; 4096]);
}

/// Returns the first bytes of all clusters.
fn marks(blob: &Blob) -> Vec<u8> {
    (0..blob.num_clusters())
        .map(|cluster| read(blob, cluster * CLUSTER, 4096)[1])
        .collect()
}

/// Asserts that the content is the same after an unload and without one, and that the check finds
/// nothing.
fn verify(store: &Blobstore) {
    let dev = memory_with(&content(store.device()), store.device().info().block_size);
    let again = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    assert_eq!(listing(&again), listing(store));
    assert_eq!(again.free_clusters(), store.free_clusters());
    assert_eq!(again.md_pages(), store.md_pages());
    again.unload().unwrap();
    let report = check(&dev).unwrap();
    assert_eq!(report.worst(), None, "{:?}", report.findings);
}

#[test]
fn snapshots_clones_and_copy_on_write() {
    for (thin, table) in [(false, true), (true, true), (false, false), (true, false)] {
        let store = store(16 << 20);
        let blob = create(&store, 5, thin, table);
        for cluster in 0..4 {
            mark(&blob, cluster, 10);
        }
        let one = store
            .snapshot(blob.id(), &[("role".to_owned(), b"one".to_vec())])
            .unwrap();
        assert_eq!(blob.num_allocated(), 0);
        assert_eq!(blob.parent(), Parent::Snapshot(one));
        mark(&blob, 1, 20);
        assert_eq!(marks(&blob), [10, 20, 10, 10, 0]);
        // The rest of a copied cluster is the parent's.
        write(&blob, 4096, &[99; 4096]);
        let two = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 2, 30);
        let of_one = store.open(store.clone_blob(one, &[]).unwrap()).unwrap();
        mark(&of_one, 0, 40);
        assert_eq!(marks(&store.open(one).unwrap()), [10, 10, 10, 10, 0]);
        assert_eq!(marks(&store.open(two).unwrap()), [10, 20, 10, 10, 0]);
        assert_eq!(marks(&blob), [10, 20, 30, 10, 0]);
        assert_eq!(marks(&of_one), [40, 10, 10, 10, 0]);
        assert_eq!(read(&of_one, 4096, 4096), [0; 4096]);
        assert_eq!(read(&blob, 4096, 4096), [99; 4096]);
        let frozen = store.open(one).unwrap();
        assert!(frozen.is_read_only());
        assert_eq!(frozen.is_thin(), thin);
        assert!(matches!(
            frozen.write_at(0, pumice_bdev::DmaBuf::new(4096).unwrap().freeze(), false),
            Err(Error::ReadOnly(_))
        ));
        assert!(matches!(frozen.resize(9), Err(Error::ReadOnly(_))));
        assert!(matches!(
            frozen.set_xattr("a", b"b"),
            Err(Error::ReadOnly(_))
        ));
        assert!(matches!(store.snapshot(one, &[]), Err(Error::ReadOnly(_))));
        assert!(matches!(
            store.clone_blob(blob.id(), &[]),
            Err(Error::InvalidInput(_))
        ));
        // A parent of two clones, or an open parent, cannot be deleted.
        assert!(matches!(store.delete(one), Err(Error::Busy(_))));
        drop(frozen);
        assert!(matches!(store.delete(one), Err(Error::Busy(_))));
        verify(&store);
    }
}

#[test]
fn deleting_a_snapshot_gives_its_clusters_to_the_clone() {
    for (thin, table) in [(false, true), (true, true), (false, false)] {
        let store = store(32 << 20);
        let free = store.free_clusters();
        let blob = create(&store, 600, thin, table);
        for cluster in [0, 1, 511, 512, 599] {
            mark(&blob, cluster, 1);
        }
        let one = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 1, 2);
        mark(&blob, 300, 2);
        let two = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 0, 3);
        mark(&blob, 599, 3);
        let before = marks(&blob);
        let below = marks(&store.open(two).unwrap());
        store.delete(one).unwrap();
        assert_eq!(marks(&blob), before);
        assert_eq!(marks(&store.open(two).unwrap()), below);
        assert_eq!(store.open(two).unwrap().parent(), Parent::None);
        verify(&store);
        store.delete(two).unwrap();
        assert_eq!(marks(&blob), before);
        assert_eq!(blob.parent(), Parent::None);
        assert_eq!(blob.num_allocated(), if thin { 6 } else { 600 });
        verify(&store);
        let id = blob.id();
        drop(blob);
        store.delete(id).unwrap();
        assert_eq!(store.free_clusters(), free);
        assert_eq!(store.md_pages().used, 0);
        verify(&store);
    }
}

#[test]
fn inflating_and_decoupling() {
    for table in [true, false] {
        let store = store(16 << 20);
        let blob = create(&store, 6, true, table);
        mark(&blob, 0, 1);
        mark(&blob, 1, 1);
        let one = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 1, 2);
        mark(&blob, 2, 2);
        let two = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 3, 3);
        let clone = store.open(store.clone_blob(two, &[]).unwrap()).unwrap();
        let content = marks(&blob);
        assert_eq!(content, [1, 2, 2, 3, 0, 0]);

        store.decouple(blob.id()).unwrap();
        assert_eq!(blob.parent(), Parent::Snapshot(one));
        assert_eq!(blob.num_allocated(), 3);
        assert_eq!(marks(&blob), content);
        verify(&store);
        store.decouple(blob.id()).unwrap();
        assert_eq!(blob.parent(), Parent::None);
        assert_eq!(blob.num_allocated(), 4);
        assert_eq!(marks(&blob), content);
        assert!(matches!(
            store.decouple(blob.id()),
            Err(Error::InvalidInput(_))
        ));

        let content = marks(&clone);
        store.inflate(clone.id()).unwrap();
        assert_eq!(marks(&clone), content);
        assert!(!clone.is_thin());
        assert_eq!((clone.num_allocated(), clone.parent()), (6, Parent::None));
        verify(&store);
        // Neither of the two clones is left.
        store.delete(two).unwrap();
        store.delete(one).unwrap();
        assert_eq!(marks(&clone), content);
        verify(&store);
    }
}

#[test]
fn inflating_without_space_changes_nothing() {
    let opts = InitOptions::default()
        .cluster_size(16384)
        .md_pages(Some(64));
    let store = Blobstore::init(memory(4 << 20, 4096), &opts).unwrap();
    let blob = create(&store, store.total_clusters() * 2, true, true);
    mark(&blob, 3, 3);
    let before = (listing(&store), store.free_clusters(), store.md_pages());
    assert!(matches!(
        store.inflate(blob.id()),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(
        (listing(&store), store.free_clusters(), store.md_pages()),
        before
    );
    let huge = create(&store, u64::from(u32::MAX), true, true);
    mark(&huge, u64::from(u32::MAX) - 1, 7);
    assert!(matches!(
        store.inflate(huge.id()),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(
        read(&huge, (u64::from(u32::MAX) - 1) * CLUSTER, 4096),
        [7; 4096]
    );
    verify(&store);
}

#[test]
fn sizes_that_differ_along_a_chain() {
    let store = store(16 << 20);
    let blob = create(&store, 6, false, true);
    for cluster in 0..6 {
        mark(&blob, cluster, 1);
    }
    let large = store.snapshot(blob.id(), &[]).unwrap();
    blob.resize(3).unwrap();
    let small = store.snapshot(blob.id(), &[]).unwrap();
    blob.resize(6).unwrap();
    // There is nothing past the end of the small snapshot, though the large one has data there.
    assert_eq!(marks(&blob), [1, 1, 1, 0, 0, 0]);
    verify(&store);
    let clone = store.open(store.clone_blob(small, &[]).unwrap()).unwrap();
    clone.resize(5).unwrap();
    store.decouple(clone.id()).unwrap();
    assert_eq!(marks(&clone), [1, 1, 1, 0, 0]);
    let id = clone.id();
    drop(clone);
    store.delete(id).unwrap();
    store.delete(small).unwrap();
    assert_eq!(marks(&blob), [1, 1, 1, 0, 0, 0]);
    verify(&store);
    store.delete(large).unwrap();
    assert_eq!(marks(&blob), [1, 1, 1, 0, 0, 0]);
    verify(&store);
}

#[test]
fn set_parent() {
    let store = store(16 << 20);
    let a = create(&store, 4, true, true);
    mark(&a, 0, 1);
    mark(&a, 1, 1);
    let snapshot = store.snapshot(a.id(), &[]).unwrap();
    let b = create(&store, 4, true, true);
    mark(&b, 1, 2);
    assert!(matches!(
        store.set_parent(b.id(), a.id()),
        Err(Error::InvalidInput(_))
    ));
    store.set_parent(b.id(), snapshot).unwrap();
    assert_eq!(marks(&b), [1, 2, 0, 0]);
    assert_eq!(b.parent(), Parent::Snapshot(snapshot));
    assert!(matches!(store.delete(snapshot), Err(Error::Busy(_))));
    let c = create(&store, 5, true, true);
    assert!(matches!(
        store.set_parent(c.id(), snapshot),
        Err(Error::InvalidInput(_))
    ));
    assert!(matches!(
        store.set_parent(snapshot, snapshot),
        Err(Error::InvalidInput(_))
    ));
    verify(&store);
}

#[test]
fn external_snapshots() {
    for block_size in [512, 4096] {
        let base = memory(5 * CLUSTER - 8192, block_size);
        let bytes: Vec<u8> = (0..5 * CLUSTER - 8192)
            .map(|at| (at / 512 + 1).to_le_bytes()[0])
            .collect();
        let base_with = memory_with(&bytes, block_size);
        drop(base);
        let (dev, base) = (memory(8 << 20, 4096), base_with);
        let seen = base.clone();
        let open: OpenExternal = Arc::new(move |_: BlobId, id: &[u8]| {
            assert_eq!(id, b"base-uuid");
            Ok(seen.clone())
        });
        let opts = InitOptions::default()
            .cluster_size(16384)
            .open_external(Some(open.clone()));
        let store = Blobstore::init(dev.clone(), &opts).unwrap();
        let create = CreateOptions::default()
            .num_clusters(6)
            .external_snapshot(Some(b"base-uuid".to_vec()));
        let blob = store.open(store.create(&create).unwrap()).unwrap();
        let mut model = bytes.clone();
        model.resize(usize::try_from(6 * CLUSTER).unwrap(), 0);
        assert!(whole(&blob) == model);
        write(&blob, CLUSTER + 4096, &[0xaa; 4096]);
        model[20480..24576].fill(0xaa);
        assert!(whole(&blob) == model);
        let snapshot = store.snapshot(blob.id(), &[]).unwrap();
        write(&blob, 4 * CLUSTER, &[0xbb; 4096]);
        assert!(whole(&store.open(snapshot).unwrap()) == model);
        model[4 * 16384..4 * 16384 + 4096].fill(0xbb);
        assert!(whole(&blob) == model);
        assert_eq!(
            store.open(snapshot).unwrap().parent(),
            Parent::External(b"base-uuid"[..].into())
        );
        drop(blob);
        let id = store.blobs()[0];
        store.unload().unwrap();
        assert_eq!(check(&dev).unwrap().findings, []);

        // Without a way to open the external snapshot the clone cannot be opened, but the rest of
        // the store can be used.
        let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
        assert!(matches!(store.open(id), Err(Error::CannotOpen { .. })));
        store.create(&CreateOptions::default()).unwrap();
        store.unload().unwrap();
        let opts = LoadOptions::default().open_external(Some(open));
        let store = Blobstore::load(dev, &opts).unwrap();
        assert!(whole(&store.open(id).unwrap()) == model);
        store.delete(snapshot).unwrap();
        assert!(whole(&store.open(id).unwrap()) == model);
        store.decouple(id).unwrap();
        assert_eq!(store.open(id).unwrap().parent(), Parent::None);
        assert!(whole(&store.open(id).unwrap()) == model);
        store.unload().unwrap();
    }
}

#[test]
fn a_snapshot_in_the_middle_of_a_chain_is_cut_off() {
    for inflate in [true, false] {
        let store = store(8 << 20);
        let blob = create(&store, 4, true, true);
        mark(&blob, 0, 1);
        mark(&blob, 1, 1);
        let oldest = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 1, 2);
        let middle = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 2, 3);
        match inflate {
            true => store.inflate(middle).unwrap(),
            false => store.decouple(middle).unwrap(),
        }
        let cut = store.open(middle).unwrap();
        assert_eq!(
            (cut.parent(), cut.is_thin(), cut.num_allocated()),
            (Parent::None, !inflate, if inflate { 4 } else { 2 })
        );
        assert!(cut.is_read_only());
        drop(cut);
        store.delete(oldest).unwrap();
        assert_eq!(marks(&store.open(middle).unwrap()), [1, 2, 0, 0]);
        assert_eq!(marks(&blob), [1, 2, 3, 0]);
        mark(&blob, 0, 4);
        assert_eq!(marks(&store.open(middle).unwrap()), [1, 2, 0, 0]);
        verify(&store);
    }
}

/// The function that opens an external snapshot is called without a lock: it may use the store.
#[test]
fn an_external_snapshot_is_opened_without_a_lock() {
    let base = memory_with(&vec![7; usize::try_from(4 * CLUSTER).unwrap()], 512);
    let known: Arc<OnceLock<Blobstore>> = Arc::default();
    let calls = Arc::new(AtomicUsize::new(0));
    let (store_of, count) = (Arc::clone(&known), Arc::clone(&calls));
    let open: OpenExternal = Arc::new(move |_: BlobId, _: &[u8]| {
        count.fetch_add(1, Ordering::SeqCst);
        let store = store_of.get().unwrap().clone();
        let (sent, received) = mpsc::channel();
        // In a thread of its own, so that a lock is a failure and not a hang.
        std::thread::spawn(move || sent.send(store.create(&CreateOptions::default())));
        let created = received.recv_timeout(Duration::from_secs(10));
        created.expect("the store can be used").unwrap();
        Ok(base.clone())
    });
    let opts = InitOptions::default()
        .cluster_size(16384)
        .open_external(Some(open));
    let store = Blobstore::init(memory(8 << 20, 4096), &opts).unwrap();
    known.set(store.clone()).unwrap();
    let create = CreateOptions::default().num_clusters(4).thin(true);
    let [first, second] = [(); 2].map(|()| store.create(&create).unwrap());
    let mut opened = 0;
    let mut opens = |step: &str| {
        let now = calls.load(Ordering::SeqCst);
        assert_eq!(now - opened, 1, "{step}");
        opened = now;
    };
    store.set_external_parent(first, b"base").unwrap();
    opens("a new parent");
    assert_eq!(marks(&store.open(first).unwrap()), [7; 4]);
    opens("an opening");
    let snapshot = store.snapshot(first, &[]).unwrap();
    let blob = store.open(second).unwrap();
    store.set_parent(second, snapshot).unwrap();
    opens("a parent that has one");
    assert_eq!(marks(&blob), [7; 4]);
    drop(blob);
    store.inflate(second).unwrap();
    opens("an inflation");
    store.delete(snapshot).unwrap();
    opens("the deletion of a parent");
    store.decouple(first).unwrap();
    opens("a decoupling");
    assert_eq!(marks(&store.open(first).unwrap()), [7; 4]);
    verify(&store);
}

/// A device that is opened already cannot be opened by others, so two threads share one opening.
#[test]
fn threads_open_an_external_snapshot_once() {
    let base = memory_with(&vec![7; usize::try_from(4 * CLUSTER).unwrap()], 512);
    let open_now = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&open_now);
    let open: OpenExternal = Arc::new(move |_: BlobId, _: &[u8]| {
        let before = count.fetch_add(1, Ordering::SeqCst);
        // The other thread has time to come here, too.
        std::thread::sleep(Duration::from_millis(20));
        count.fetch_sub(1, Ordering::SeqCst);
        if before > 0 {
            return Err(BdevError::Unsupported {
                device: "base".to_owned(),
                reason: "it is open already".to_owned(),
            });
        }
        Ok(base.clone())
    });
    let opts = InitOptions::default()
        .cluster_size(16384)
        .open_external(Some(open));
    let store = Blobstore::init(memory(8 << 20, 4096), &opts).unwrap();
    let create = CreateOptions::default().num_clusters(4).thin(true);
    let ids = [(); 2].map(|()| store.create(&create).unwrap());
    for id in ids {
        store.set_external_parent(id, b"base").unwrap();
    }
    std::thread::scope(|scope| {
        for id in ids {
            let store = &store;
            scope.spawn(move || assert_eq!(marks(&store.open(id).unwrap()), [7; 4]));
        }
    });
    store.unload().unwrap();
}

#[test]
fn shallow_copies() {
    let store = store(8 << 20);
    let blob = create(&store, 4, true, true);
    mark(&blob, 0, 1);
    let base = store.snapshot(blob.id(), &[]).unwrap();
    mark(&blob, 2, 2);
    let snapshot = store.snapshot(blob.id(), &[]).unwrap();
    let out = memory_with(&vec![0xcc; usize::try_from(5 * CLUSTER).unwrap()], 512);
    let mut steps = Vec::new();
    assert_eq!(
        store
            .shallow_copy(snapshot, &*out, |done| steps.push(done))
            .unwrap(),
        1
    );
    assert_eq!(steps, [1]);
    let bytes = content(&out);
    assert_eq!((bytes[0], bytes[32768], bytes[65536 - 1]), (0xcc, 2, 0xcc));
    assert!(matches!(
        store.shallow_copy(blob.id(), &*out, |_| ()),
        Err(Error::InvalidInput(_))
    ));
    let small: Arc<dyn BlockDevice> = memory(CLUSTER, 512);
    assert!(matches!(
        store.shallow_copy(base, &*small, |_| ()),
        Err(Error::InvalidInput(_))
    ));
}

/// A copy on a device with a volatile cache is durable on return, and fails when it cannot be.
#[test]
fn a_shallow_copy_is_durable() {
    let store = store(8 << 20);
    let blob = create(&store, 4, true, true);
    mark(&blob, 2, 2);
    let snapshot = store.snapshot(blob.id(), &[]).unwrap();
    let cached = || CrashDevice::new(512, 4 * CLUSTER / 512, true, 1);
    let failing = ErrorDevice::new(None, Arc::new(cached()));
    failing.inject(fail(OpKind::Flush, 1, None));
    store.shallow_copy(snapshot, &failing, |_| ()).unwrap_err();
    let out = cached();
    store.shallow_copy(snapshot, &out, |_| ()).unwrap();
    let mut bytes = [0; 4096];
    out.image_after(out.len_events(), &mut |_| false)
        .read(2 * CLUSTER, &mut bytes);
    assert_eq!(bytes, [2; 4096]);
}

#[test]
fn unmapping_a_clone_does_not_show_its_parent() {
    let store = store(8 << 20);
    let blob = create(&store, 4, true, true);
    for cluster in 0..4 {
        mark(&blob, cluster, 1);
    }
    store.snapshot(blob.id(), &[]).unwrap();
    mark(&blob, 1, 2);
    blob.write_zeroes_at(0, 3 * CLUSTER).unwrap();
    assert_eq!(marks(&blob), [0, 0, 0, 1]);
    blob.unmap_at(0, 4 * CLUSTER).unwrap();
    assert_eq!(marks(&blob), [0, 0, 0, 1], "what is not its own stays");
    verify(&store);
}

#[test]
fn growing_with_the_device() {
    let bytes = image("small-bs-4k.img");
    let mut larger = bytes.clone();
    larger.resize(bytes.len() + (100 << 20), 0);
    let dev = memory_with(&larger, 4096);
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    let before = (store.total_clusters(), listing(&store));
    assert_eq!(store.grow().unwrap(), 100);
    assert_eq!(store.grow().unwrap(), 0);
    assert_eq!(store.total_clusters(), before.0 + 100);
    assert_eq!(listing(&store), before.1);
    let all = store.free_clusters();
    store
        .create(&CreateOptions::default().num_clusters(all))
        .unwrap();
    verify(&store);
    drop(store);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(store.free_clusters(), 0);
    // There are more clusters than the cluster mask has bits: it moves, with all the metadata.
    let opts = InitOptions::default().cluster_size(4096).md_pages(Some(8));
    let small = memory(32 << 20, 4096);
    Blobstore::init(small.clone(), &opts)
        .unwrap()
        .unload()
        .unwrap();
    let mut bytes = content(&small);
    bytes.resize(256 << 20, 0);
    let store = Blobstore::load(memory_with(&bytes, 4096), &LoadOptions::default()).unwrap();
    assert_eq!(store.grow().unwrap(), 65536 - 8192);
    assert_eq!(store.grow().unwrap(), 0);
    verify(&store);
}
