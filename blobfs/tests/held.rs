//! Tests in which the device holds one operation back: what has to wait for it waits, and nothing
//! else does.

#[path = "held/cached.rs"]
mod cached;
mod common;
#[path = "common/task.rs"]
mod task;

use std::future::Future as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{AsyncChannel, BdevError, BlockDevice, DmaBuf, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions,
};
use task::{Task, spawn, wait_for};

const CLUSTER: u64 = 16384;

fn store_on(base: Arc<dyn BlockDevice>) -> (Arc<ErrorDevice>, Blobstore) {
    let dev = Arc::new(ErrorDevice::new(None, base));
    let opts = InitOptions::default().cluster_size(16384);
    let store = Blobstore::init(dev.clone(), &opts).unwrap();
    (dev, store)
}

fn store() -> (Arc<ErrorDevice>, Blobstore) {
    store_on(memory(8 << 20, 4096))
}

fn blob(store: &Blobstore, num_clusters: u64, thin: bool) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(thin);
    store.open(store.create(&opts).unwrap()).unwrap()
}

/// Makes the next operation of a kind hang; with `blob` only one that touches its first cluster.
fn hang(dev: &ErrorDevice, op: OpKind, blob: Option<&Blob>) {
    let first = blob.map(|blob| blob.extents().lba(0).unwrap());
    dev.inject(
        Injection::new(Failure::Hang)
            .op(Some(op))
            .range(first.map(|lba| (lba, CLUSTER / 4096))),
    );
}

/// Starts a write to the first cluster of the blob, which the device holds back.
fn held_write(dev: &ErrorDevice, blob: &Blob, byte: u8) -> Task<()> {
    hang(dev, OpKind::Write, Some(blob));
    let blob = blob.clone();
    let writer = spawn(move || write(&blob, 0, &[byte; 4096]));
    wait_for("the write is held back", || dev.injections().is_empty());
    writer
}

/// Checks that `op` on a blob waits for a write to it that is held back, and that the metadata can
/// be used meanwhile.
fn waits_for_a_write(
    thin: bool,
    op: impl FnOnce(Blobstore, Blob) -> Result<(), Error> + Send + 'static,
) -> Blob {
    let (dev, store) = store();
    let blob = blob(&store, 4, thin);
    write(&blob, 0, &[1; 16384]);
    let writer = held_write(&dev, &blob, 2);
    let (its_store, its_blob) = (store.clone(), blob.clone());
    let task = spawn(move || op(its_store, its_blob));
    assert!(task.still_waits(), "it does not wait for a write in flight");
    // Others continue all the while.
    let other = store.clone();
    let others = spawn(move || {
        for _ in 0..20 {
            let id = other.create(&CreateOptions::default()).unwrap();
            other.delete(id).unwrap();
        }
    });
    others.join("metadata of others beside an operation that waits for I/O");
    assert!(task.still_waits());
    dev.resume();
    writer.join("the write");
    task.join("the operation").unwrap();
    blob
}

#[test]
fn a_snapshot_waits_for_writes_in_flight() {
    let blob = waits_for_a_write(false, |store, blob| {
        store.snapshot(blob.id(), &[]).map(drop)
    });
    // The write came before the snapshot, so the snapshot contains it.
    let store = blob.store();
    let snapshot = store
        .blobs()
        .into_iter()
        .find(|id| store.clones(*id) == [blob.id()])
        .unwrap();
    assert_eq!(read(&store.open(snapshot).unwrap(), 0, 4096), [2; 4096]);
}

#[test]
fn a_shrink_waits_for_writes_in_flight() {
    waits_for_a_write(false, |_, blob| blob.resize(0));
    waits_for_a_write(false, |store, blob| {
        let mut transaction = store.transaction();
        transaction.create(CreateOptions::default());
        transaction.resize(&blob, 0);
        transaction.commit().map(drop)
    });
}

/// The deletion of a damaged blob in the same transaction does not change that.
#[test]
fn a_shrink_beside_a_damaged_blob_waits() {
    let (dev, store) = store();
    let shrinks = blob(&store, 4, false).id();
    let damaged = blob(&store, 1, false).id();
    let root = u64::from(store.super_block().md_start.get()) + (damaged.0 & u64::from(u32::MAX));
    store.unload().unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let mut page = ch
        .block_on(ch.read(root, DmaBuf::new(4096).unwrap()))
        .unwrap();
    page[100] ^= 1;
    ch.block_on(ch.write(root, page.freeze(), false)).unwrap();
    drop(ch);
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    assert_eq!(store.damaged().len(), 1);
    let blob = store.open(shrinks).unwrap();
    let writer = held_write(&dev, &blob, 2);
    let task = spawn(move || {
        let mut both = store.transaction();
        both.delete(damaged);
        both.resize(shrinks, 0);
        both.commit().map(drop)
    });
    assert!(task.still_waits(), "it does not wait for a write in flight");
    dev.resume();
    writer.join("the write");
    task.join("the transaction").unwrap();
    assert_eq!(blob.num_clusters(), 0);
}

/// Copies are written to a volatile cache. `op` fails when a flush fails that another has sent
/// before the one which makes the copies durable.
fn fails_with_a_flush_beside_its_copies(
    op: impl FnOnce(&Blobstore, BlobId) -> Result<(), Error> + Send + 'static,
) {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(true)
        .fua(false);
    let base = CrashDevice::with_options(&options, CrashImage::zeroed(8 << 20));
    let (dev, store) = store_on(Arc::new(base));
    let blob = blob(&store, 4, false);
    write(&blob, 0, &[1; 16384]);
    store.snapshot(blob.id(), &[]).unwrap();
    hang(&dev, OpKind::Write, None);
    let (its_store, id) = (store.clone(), blob.id());
    let task = spawn(move || op(&its_store, id));
    wait_for("a copy is held back", || dev.injections().is_empty());
    dev.inject(Injection::new(Failure::Fail).op(Some(OpKind::Flush)));
    store.flush().unwrap_err();
    dev.resume();
    let result = task.join("the operation");
    assert!(matches!(result, Err(Error::Io(_))), "{result:?}");
}

#[test]
fn a_flush_that_fails_beside_copies_fails_them() {
    fails_with_a_flush_beside_its_copies(Blobstore::inflate);
    fails_with_a_flush_beside_its_copies(|store, _| store.grow_md_pages(1000).map(drop));
}

#[test]
fn an_unmap_of_a_thin_blob_waits_for_writes_in_flight() {
    let blob = waits_for_a_write(true, |_, blob| blob.unmap_at(0, CLUSTER));
    assert_eq!(read(&blob, 0, 4096), [0; 4096]);
    waits_for_a_write(true, |_, blob| blob.write_zeroes_at(0, CLUSTER));
}

#[test]
fn other_changes_of_what_lies_below_wait_for_writes_in_flight() {
    waits_for_a_write(false, |_, blob| blob.set_read_only());
    waits_for_a_write(true, |store, blob| store.inflate(blob.id()));
    waits_for_a_write(true, |store, blob| {
        let opts = CreateOptions::default().num_clusters(4).thin(true);
        let parent = store.create(&opts)?;
        store.set_read_only(parent)?;
        store.set_parent(blob.id(), parent)
    });
}

#[test]
fn the_deletion_of_a_snapshot_waits_for_writes_to_its_clone() {
    let (dev, store) = store();
    let blob = blob(&store, 4, false);
    write(&blob, 0, &[1; 16384]);
    let snapshot = store.snapshot(blob.id(), &[]).unwrap();
    write(&blob, 0, &[3; 4096]);
    let writer = held_write(&dev, &blob, 2);
    let other = store.clone();
    let task = spawn(move || other.delete(snapshot));
    assert!(task.still_waits());
    store.create(&CreateOptions::default()).unwrap();
    dev.resume();
    writer.join("the write");
    task.join("the deletion").unwrap();
    assert_eq!(read(&blob, 0, 4096), [2; 4096]);
    assert_eq!(read(&blob, 4096, 4096), [1; 4096]);
}

/// B4: the device has not ended a flush when another thread unloads.
#[test]
fn a_flush_beside_an_unload_ends() {
    let (dev, store) = store_on(Arc::new(CrashDevice::new(4096, 2048, true, 1)));
    store.unload().unwrap();
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    hang(&dev, OpKind::Flush, None);
    let other = store.clone();
    let flush = spawn(move || other.flush());
    wait_for("the flush is held back", || dev.injections().is_empty());
    let other = store.clone();
    let unload = spawn(move || other.unload());
    assert!(unload.still_waits(), "an unload waits for I/O in flight");
    // It waits without holding the metadata.
    assert!(matches!(store.blobs()[..], []));
    dev.resume();
    unload.join("the unload").unwrap();
    flush.join("the flush").unwrap();
    assert!(store.flush().is_err());
}

/// Starts a read of block 0 in another thread, on the store's channel, which the device holds back.
fn held_read(dev: &ErrorDevice, store: &Blobstore) -> Task<bool> {
    hang(dev, OpKind::Read, None);
    let (ready, channel) = std::sync::mpsc::channel();
    let weak = {
        let store = store.clone();
        spawn(move || {
            let ch = store.channel().unwrap();
            drop(store);
            ready.send(()).unwrap();
            ch.block_on(ch.read(0, DmaBuf::new(4096).unwrap())).is_ok()
        })
    };
    channel.recv().unwrap();
    wait_for("the read is held back", || dev.injections().is_empty());
    weak
}

/// B4: what is in flight ends before the store is marked clean.
#[test]
fn a_store_is_not_clean_before_its_io_has_ended() {
    let base = memory(8 << 20, 4096);
    let (dev, store) = store_on(Arc::clone(&base));
    blob(&store, 1, false);
    let read = held_read(&dev, &store);
    let other = store.clone();
    let unload = spawn(move || other.unload());
    assert!(unload.still_waits(), "an unload waits for I/O in flight");
    let clean = |bytes: &[u8]| u32::from_le_bytes(bytes[16..20].try_into().unwrap());
    assert_eq!(clean(&content(&base)), 0, "it is marked clean already");
    dev.resume();
    unload.join("the unload").unwrap();
    assert!(read.join("the read"));
    assert_eq!(clean(&content(&base)), 1);
}

/// B4: a store that is dropped leaves the completions to the threads of the operations.
#[test]
fn a_read_beside_a_drop_ends() {
    let (dev, store) = store();
    let read = held_read(&dev, &store);
    let dropping = spawn(move || drop(store));
    assert!(dropping.still_waits(), "a drop waits for I/O in flight");
    dev.resume();
    dropping.join("the drop");
    assert!(read.join("the read"));
}

/// B4b: the future of a write is dropped, and the device is slow.
#[test]
fn a_dropped_write_keeps_its_clusters_until_the_device_has_answered() {
    let (dev, store) = store();
    let a = blob(&store, 1, false);
    let id = a.id();
    let ch = store.channel().unwrap();
    hang(&dev, OpKind::Write, Some(&a));
    {
        let mut data = DmaBuf::new(4096).unwrap();
        data.fill(0x41);
        let mut write = Box::pin(a.write(&ch, 0, data.freeze(), false));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(write.as_mut().poll(&mut cx).is_pending());
    }
    drop(a);
    assert!(matches!(store.delete(id), Err(Error::Busy(_))));
    assert!(matches!(store.unload(), Err(Error::Busy(_))));
    let other = blob(&store, 1, false);
    dev.resume();
    ch.drain();
    assert_eq!(read(&other, 0, 4096), [0; 4096]);
    store.delete(id).unwrap();
    drop(other);
    store.unload().unwrap();
}

/// A snapshot after the device has answered does not wait for ever.
#[test]
fn a_dropped_write_that_has_landed_is_not_waited_for() {
    let (dev, store) = store();
    let a = blob(&store, 1, false);
    let ch = store.channel().unwrap();
    hang(&dev, OpKind::Write, Some(&a));
    {
        let data = DmaBuf::zeroed(4096).unwrap().freeze();
        let mut write = Box::pin(a.write(&ch, 0, data, false));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(write.as_mut().poll(&mut cx).is_pending());
    }
    dev.resume();
    ch.drain();
    let start = Instant::now();
    store.snapshot(a.id(), &[]).unwrap();
    assert!(start.elapsed() < Duration::from_secs(15));
}

/// Two writers write to one cluster that is not allocated yet: it is allocated once, and both
/// halves are there.
#[test]
fn two_writers_take_a_cluster_once() {
    let (_dev, store) = store();
    let blob = blob(&store, 200, true);
    let free = store.free_clusters();
    let start = Arc::new(std::sync::Barrier::new(2));
    let writers: Vec<_> = [0u8, 1]
        .into_iter()
        .map(|half| {
            let (blob, start) = (blob.clone(), Arc::clone(&start));
            spawn(move || {
                for index in 0..200 {
                    start.wait();
                    let at = index * CLUSTER + u64::from(half) * CLUSTER / 2;
                    write(&blob, at, &[half + 1; 8192]);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.join("a writer");
    }
    assert_eq!(store.free_clusters(), free - 200);
    for index in 0..200 {
        let bytes = read(&blob, index * CLUSTER, 16384);
        assert!(
            bytes[..8192].iter().all(|byte| *byte == 1),
            "cluster {index}"
        );
        assert!(
            bytes[8192..].iter().all(|byte| *byte == 2),
            "cluster {index}"
        );
    }
}

/// First writes to a thin blob continue beside a thread that changes metadata in a loop.
#[test]
fn first_writes_have_their_turn() {
    let (_dev, store) = store();
    let (a, b) = (blob(&store, 1, false), blob(&store, 60, true));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let looping = spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            a.set_xattr("x", b"y").unwrap();
            a.sync_md().unwrap();
        }
    });
    for index in 0..60 {
        write(&b, index * CLUSTER, &[1; 4096]);
    }
    stop.store(true, Ordering::Relaxed);
    looping.join("the loop");
}

/// B9: one device carries one loaded store.
#[test]
fn a_device_is_loaded_once() {
    let dev = memory(8 << 20, 4096);
    let opts = InitOptions::default().cluster_size(16384);
    let a = Blobstore::init(Arc::clone(&dev), &opts).unwrap();
    let through: Arc<dyn BlockDevice> = Arc::new(ErrorDevice::new(None, Arc::clone(&dev)));
    let read_only = LoadOptions::default().read_only(true);
    let busy = |result: Result<Blobstore, Error>| {
        let error = result.unwrap_err();
        let in_use = matches!(error, Error::Device(BdevError::InUse { .. }));
        assert!(in_use, "{error}");
    };
    for dev in [&dev, &through] {
        busy(Blobstore::load(Arc::clone(dev), &LoadOptions::default()));
        busy(Blobstore::load(Arc::clone(dev), &read_only));
        busy(Blobstore::init(Arc::clone(dev), &opts));
    }
    // An unload releases it although a handle is left, and so does a drop.
    a.unload().unwrap();
    let b = Blobstore::load(Arc::clone(&through), &read_only).unwrap();
    let c = Blobstore::load(Arc::clone(&dev), &read_only).unwrap();
    busy(Blobstore::load(Arc::clone(&dev), &LoadOptions::default()));
    drop(b);
    busy(Blobstore::load(Arc::clone(&dev), &LoadOptions::default()));
    drop(c);
    let d = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    drop(d);
    Blobstore::load(dev, &LoadOptions::default()).unwrap();
}

/// B19: a store that was loaded read-only writes nothing.
#[test]
fn a_read_only_store_takes_no_writes() {
    let dev = memory(8 << 20, 4096);
    let opts = InitOptions::default().cluster_size(16384);
    let store = Blobstore::init(Arc::clone(&dev), &opts).unwrap();
    let ids: Vec<BlobId> = [false, true]
        .into_iter()
        .map(|thin| {
            let blob = blob(&store, 3, thin);
            write(&blob, 0, &[4; 4096]);
            blob.id()
        })
        .collect();
    // The state is that after a crash: the store was not unloaded.
    let bytes = content(&dev);
    let copy = memory_with(&bytes, 4096);
    let opts = LoadOptions::default().read_only(true);
    let store = Blobstore::load(Arc::clone(&copy), &opts).unwrap();
    for id in &ids {
        let blob = store.open(*id).unwrap();
        assert!(blob.is_read_only());
        let data = || DmaBuf::zeroed(4096).unwrap().freeze();
        let refused = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::ReadOnlyStore)), "{result:?}");
        };
        refused(blob.write_at(0, data(), true));
        refused(blob.write_at(CLUSTER, data(), false));
        refused(blob.write_zeroes_at(4096, 4096));
        refused(blob.write_zeroes_at(0, CLUSTER));
        refused(blob.unmap_at(0, CLUSTER));
        refused(blob.unmap_at(4096, 4096));
        refused(blob.set_xattr("a", b"b"));
        refused(blob.resize(1));
        refused(store.delete(*id));
        refused(store.snapshot(*id, &[]).map(drop));
        refused(store.set_super_blob(None));
        assert_eq!(read(&blob, 0, 4096), [4; 4096]);
    }
    store.unload().unwrap();
    drop(store);
    assert!(content(&copy) == bytes, "it wrote");
}

/// B6: a transaction cannot change a blob that it deletes.
#[test]
fn a_deleted_blob_is_not_changed_by_the_same_transaction() {
    let (_dev, store) = store();
    let id = blob(&store, 2, false).id();
    let before = (store.free_clusters(), store.md_pages());
    for step in 0..3 {
        let mut all = store.transaction();
        all.delete(id);
        match step {
            0 => all.resize(id, 10),
            1 => all.set_xattr(id, "d", &[2; 3000]),
            _ => all.delete(id),
        }
        assert!(matches!(all.commit(), Err(Error::InvalidInput(_))));
        assert_eq!((store.free_clusters(), store.md_pages()), before);
    }
    assert_eq!(store.blobs(), [id]);
}

/// A transaction without a change leaves the mark of an orderly unload.
#[test]
fn an_empty_transaction_writes_nothing() {
    let (dev, store) = store();
    store.unload().unwrap();
    let as_dyn: Arc<dyn BlockDevice> = dev.clone();
    let before = content(&as_dyn);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(store.transaction().commit().unwrap().ids(), []);
    assert!(content(&as_dyn) == before);
    store.create(&CreateOptions::default()).unwrap();
    assert!(content(&as_dyn) != before);
}

/// B13: a write for which there is not enough space changes nothing.
#[test]
fn a_write_without_space_changes_nothing() {
    let (_dev, store) = store();
    let thin = blob(&store, 4, true);
    let rest = store.free_clusters() - 1;
    let _full = blob(&store, rest, false);
    assert_eq!(store.free_clusters(), 1);
    let mut data = DmaBuf::new(2 * 16384).unwrap();
    data.fill(7);
    assert!(matches!(
        thin.write_at(0, data.freeze(), true),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(thin.num_allocated(), 0);
    assert_eq!(read(&thin, 0, 2 * 16384), vec![0; 2 * 16384]);
    write(&thin, 0, &[7; 16384]);
}

/// B21: a blob may be used while the data of an ending thread are dropped.
#[test]
fn a_blob_is_written_from_a_thread_local_that_goes() {
    struct AtEnd(Option<Blob>);
    impl Drop for AtEnd {
        fn drop(&mut self) {
            if let Some(blob) = self.0.take() {
                write(&blob, 0, &[9; 4096]);
            }
        }
    }
    thread_local! {
        static AT_END: std::cell::RefCell<AtEnd> = const { std::cell::RefCell::new(AtEnd(None)) };
    }
    let (_dev, store) = store();
    let blob = blob(&store, 1, false);
    let its = blob.clone();
    let thread = spawn(move || {
        // The channel of the thread and this may be dropped in either order.
        AT_END.with_borrow_mut(|at_end| at_end.0 = Some(its.clone()));
        write(&its, 0, &[8; 4096]);
    });
    thread.join("the thread");
    assert_eq!(read(&blob, 0, 4096), [9; 4096]);
}

/// B21: a blob that one transaction creates cannot be used in another.
#[test]
fn a_blob_of_another_transaction_is_refused() {
    let (_dev, store) = store();
    let mut one = store.transaction();
    let blob = one.create(CreateOptions::default());
    let mut other = store.transaction();
    other.create(CreateOptions::default());
    other.set_xattr(blob, "a", b"b");
    assert!(matches!(other.commit(), Err(Error::InvalidInput(_))));
    let ids = one.commit().unwrap();
    assert_eq!(store.blobs(), [ids.id(blob)]);
}
