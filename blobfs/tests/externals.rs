//! Tests of clones whose parents are not like them: smaller, outside of the store, or in clusters
//! that take several operations to copy.

mod common;

use std::sync::Arc;

use common::faults::Less;
use common::{content, memory, memory_with, read, whole, write};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, CreateOptions, InitOptions, LoadOptions, OpenExternal,
};

const MIB: usize = 1 << 20;
const CLUSTER: u64 = 16384;

/// As many MiB, each with bytes of its own.
fn megabytes(count: u8) -> Vec<u8> {
    (1..=count).flat_map(|byte| vec![byte; MIB]).collect()
}

/// A function that opens `base` whatever the snapshot is called.
fn opens(base: &Arc<dyn BlockDevice>) -> Option<OpenExternal> {
    let base = Arc::clone(base);
    Some(Arc::new(move |_: BlobId, _: &[u8]| Ok(Arc::clone(&base))))
}

/// A store with clusters of this size, whose clones are of `base`.
fn store(dev: Arc<dyn BlockDevice>, cluster_size: u32, base: &Arc<dyn BlockDevice>) -> Blobstore {
    let opts = InitOptions::default()
        .cluster_size(cluster_size)
        .open_external(opens(base));
    Blobstore::init(dev, &opts).unwrap()
}

/// Makes a clone of the external snapshot.
fn clone_of_base(store: &Blobstore, num_clusters: u64) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .external_snapshot(Some(b"base".to_vec()));
    store.open(store.create(&opts).unwrap()).unwrap()
}

/// The first bytes of all clusters.
fn marks(blob: &Blob) -> Vec<u8> {
    let first = |cluster| read(blob, cluster * CLUSTER, 4096)[1];
    (0..blob.num_clusters()).map(first).collect()
}

/// The clusters that a blob has got by growing are zeroes, also when the snapshot is deleted that hid
/// what its parent's parent has there.
#[test]
fn the_end_of_a_clone_stays_zeroes() {
    let base = memory_with(&vec![7; usize::try_from(6 * CLUSTER).unwrap()], 512);
    let store = store(memory(8 << 20, 4096), 16384, &base);
    let blob = clone_of_base(&store, 6);
    blob.resize(2).unwrap();
    let snapshot = store.snapshot(blob.id(), &[]).unwrap();
    blob.resize(8).unwrap();
    let id = blob.id();
    assert_eq!(marks(&blob), [7, 7, 0, 0, 0, 0, 0, 0]);
    store.delete(snapshot).unwrap();
    assert_eq!(marks(&blob), [7, 7, 0, 0, 0, 0, 0, 0]);
    drop(blob);
    // It is so on the device, too.
    let dev = memory_with(&content(store.device()), 4096);
    let opts = LoadOptions::default().open_external(opens(&base));
    let again = Blobstore::load(Arc::clone(&dev), &opts).unwrap();
    let blob = again.open(id).unwrap();
    assert_eq!(marks(&blob), [7, 7, 0, 0, 0, 0, 0, 0]);
    drop(blob);
    again.unload().unwrap();
    assert_eq!(check(&dev).unwrap().findings, []);
}

/// The first write to a clone copies the rest of the cluster, in several operations if the device cannot copy.
#[test]
fn a_large_cluster_is_copied_in_order() {
    let dev = Less::over(memory(64 << 20, 4096), &[OpKind::Copy]);
    let store = store(dev, 4 << 20, &memory(4 << 20, 512));
    let opts = CreateOptions::default().num_clusters(2);
    let blob = store.open(store.create(&opts).unwrap()).unwrap();
    let mut model = megabytes(8);
    for (bytes, at) in model.chunks(MIB).zip(0u64..) {
        write(&blob, at << 20, bytes);
    }
    let snapshot = store.snapshot(blob.id(), &[]).unwrap();
    let before = model.clone();
    write(&blob, 6 << 20, &[99; 4096]);
    model[6 * MIB..6 * MIB + 4096].fill(99);
    assert_eq!(blob.num_allocated(), 1);
    assert!(whole(&blob) == model);
    assert!(whole(&store.open(snapshot).unwrap()) == before);
}

/// So it is with a parent outside of the store, and without a write.
#[test]
fn a_large_cluster_of_an_external_snapshot_is_read_in_order() {
    let mut model = megabytes(8);
    let base = memory_with(&model, 512);
    let store = store(memory(64 << 20, 4096), 4 << 20, &base);
    let blob = clone_of_base(&store, 2);
    assert!(whole(&blob) == model);
    write(&blob, 6 << 20, &[99; 4096]);
    model[6 * MIB..6 * MIB + 4096].fill(99);
    assert_eq!(blob.num_allocated(), 1);
    assert!(whole(&blob) == model);
    store.inflate(blob.id()).unwrap();
    assert!(whole(&blob) == model);
}
