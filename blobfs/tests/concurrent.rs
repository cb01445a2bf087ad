//! Concurrent operations: writers with a queue of I/O each, while other threads make snapshots,
//! free clusters and write xattrs.

mod common;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, DmaBuf, OpKind, join_all};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{Blob, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};

const CLUSTER: u64 = 16384;

fn store(len: u64) -> (Arc<dyn BlockDevice>, Blobstore) {
    let dev = memory(len, 4096);
    let store = init(&dev);
    (dev, store)
}

fn init(dev: &Arc<dyn BlockDevice>) -> Blobstore {
    let opts = InitOptions::default().cluster_size(16384);
    Blobstore::init(Arc::clone(dev), &opts).unwrap()
}

fn thin(store: &Blobstore, num_clusters: u64) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(true);
    store.open(store.create(&opts).unwrap()).unwrap()
}

fn filled(len: usize, byte: u8) -> DmaBuf {
    let mut buf = DmaBuf::new(len).unwrap();
    buf.fill(byte);
    buf
}

/// Each thread has eight writes in flight, all of which allocate clusters, while snapshots are made
/// one after another. No snapshot is refused because I/O does not end, no write is lost, and each
/// snapshot has every write that had been acknowledged before it.
#[test]
fn snapshots_under_queues_of_writes() {
    const THREADS: u64 = 3;
    const DEPTH: u64 = 8;
    let (dev, store) = store(64 << 20);
    let blob = thin(&store, THREADS * DEPTH);
    let done = AtomicBool::new(false);
    let acknowledged: Vec<AtomicU8> = (0..THREADS).map(|_| AtomicU8::new(0)).collect();
    let mut floors = Vec::new();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (blob, store) = (&blob, &store);
                let acknowledged = &acknowledged[usize::try_from(thread).unwrap()];
                scope.spawn(move || {
                    let ch = store.channel().unwrap();
                    for round in 1..=60u8 {
                        let writes = (0..DEPTH).map(|lane| {
                            let offset = (thread * DEPTH + lane) * CLUSTER;
                            blob.write(&ch, offset, filled(4096, round).freeze(), false)
                        });
                        for result in ch.block_on(join_all(writes.collect::<Vec<_>>())) {
                            result.unwrap();
                        }
                        acknowledged.store(round, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let snapshots = scope.spawn(|| {
            let mut all = Vec::new();
            while !done.load(Ordering::SeqCst) && all.len() < 20 {
                let floor: Vec<u8> = acknowledged
                    .iter()
                    .map(|round| round.load(Ordering::SeqCst))
                    .collect();
                all.push((store.snapshot(blob.id(), &[]).unwrap(), floor));
            }
            all
        });
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
        floors = snapshots.join().unwrap();
    });
    let rounds = |blob: &Blob| -> Vec<u8> {
        (0..THREADS * DEPTH)
            .map(|index| {
                let bytes = read(blob, index * CLUSTER, 4096);
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                bytes[0]
            })
            .collect()
    };
    assert!(
        rounds(&blob).iter().all(|round| *round == 60),
        "{:?}",
        rounds(&blob)
    );
    for (snapshot, floor) in &floors {
        let snapshot = store.open(*snapshot).unwrap();
        for (index, round) in rounds(&snapshot).into_iter().enumerate() {
            let least = floor[index / usize::try_from(DEPTH).unwrap()];
            assert!(
                round >= least,
                "{}: cluster {index}: {round} < {least}",
                snapshot.id()
            );
        }
    }
    drop(blob);
    store.unload().unwrap();
    assert_eq!(check(&dev).unwrap().worst(), None);
    assert!(strict::parse(&content(&dev)).clean);
}

/// Clusters are freed while the same thread has writes to the same blob in flight.
#[test]
fn unmap_among_writes_of_one_thread() {
    type Pending<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;
    let (_dev, store) = store(16 << 20);
    let blob = thin(&store, 64);
    let ch = store.channel().unwrap();
    let put = |index: u64, byte: u8| -> Pending<'_> {
        Box::pin(blob.write(&ch, index * CLUSTER, filled(8192, byte).freeze(), false))
    };
    for round in 1..=20u8 {
        let fill: Vec<_> = (0..64).map(|index| put(index, 100)).collect();
        let mut at_once: Vec<Pending<'_>> = Vec::new();
        for index in 0..16u64 {
            at_once.push(put(index, round));
            at_once.push(Box::pin(blob.unmap(&ch, (index + 16) * CLUSTER, CLUSTER)));
            let at = (32 + index / 2 * 2) * CLUSTER;
            at_once.push(Box::pin(blob.write_zeroes(&ch, at, 2 * CLUSTER)));
            at_once.push(put(index + 48, round));
        }
        for together in [fill, at_once] {
            for result in ch.block_on(join_all(together)) {
                result.unwrap();
            }
        }
        for index in (0..16).chain(48..64) {
            assert_eq!(read(&blob, index * CLUSTER, 8192), [round; 8192]);
        }
        for index in 16..48 {
            assert_eq!(read(&blob, index * CLUSTER, 4096), [0; 4096]);
            assert_eq!(blob.extents().cluster(index), None, "cluster {index}");
        }
    }
}

/// Two threads write the same pending xattrs: each change is written once.
#[test]
fn xattrs_synced_by_several_threads() {
    let (_dev, store) = store(16 << 20);
    let blob = thin(&store, 1);
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let blob = &blob;
            scope.spawn(move || {
                let (name, once) = (format!("x{thread}"), format!("once{thread}"));
                for round in 0..100u8 {
                    blob.set_xattr(&name, &[round]).unwrap();
                    blob.set_xattr(&once, &[round]).unwrap();
                    blob.sync_md().unwrap();
                    blob.remove_xattr(&once).unwrap();
                    blob.sync_md().unwrap();
                }
            });
        }
    });
    for thread in 0..4 {
        assert_eq!(blob.xattr(&format!("x{thread}")), Some(vec![99]));
        assert_eq!(blob.xattr(&format!("once{thread}")), None);
    }
}

/// A list of the xattrs that is made beside a sync has what was set before.
#[test]
fn xattrs_are_listed_beside_a_sync() {
    let (_dev, store) = store(16 << 20);
    let blob = thin(&store, 1);
    blob.set_xattr("n", &[0; 4]).unwrap();
    let (set, done) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=2000u32 {
                blob.set_xattr("n", &n.to_le_bytes()).unwrap();
                set.store(n, Ordering::SeqCst);
                blob.sync_md().unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            let least = set.load(Ordering::SeqCst);
            let [(_, value)] = &blob.xattrs()[..] else {
                panic!("one xattr")
            };
            let value = u32::from_le_bytes(value[..].try_into().unwrap());
            assert!(value >= least, "{value} after {least}");
        }
    });
}

/// The last write of an unload fails although the device has carried it out, and the store is used
/// on. The clean mark is removed before anything else changes, so the next load does not use old
/// masks.
#[test]
fn an_unload_that_fails_at_its_last_write() {
    for at_device in [false, true] {
        let base = memory(16 << 20, 4096);
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        let as_dyn: Arc<dyn BlockDevice> = dev.clone();
        let store = init(&as_dyn);
        drop(thin(&store, 3));
        dev.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Write))
                .range(Some((0, 1))),
        );
        store.unload().unwrap_err();
        if at_device {
            // The device carried it out nevertheless.
            let mut bytes = content(&base);
            bytes[16] = 1;
            let crc = crc32c::crc32c(&bytes[..4092]);
            bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
            let ch = pumice_bdev::AsyncChannel::new(base.open_channel().unwrap());
            let mut page = DmaBuf::new(4096).unwrap();
            page.copy_from_slice(&bytes[..4096]);
            ch.block_on(ch.write(0, page.freeze(), false)).unwrap();
            assert!(strict::parse(&content(&base)).clean);
        }
        let blob = thin(&store, 1);
        write(&blob, 0, &[1; 4096]);
        let id = blob.id();
        drop((blob, store));
        assert!(!strict::parse(&content(&base)).clean);
        let store = Blobstore::load(base, &LoadOptions::default()).unwrap();
        assert_eq!(read(&store.open(id).unwrap(), 0, 4096), [1; 4096]);
    }
}
