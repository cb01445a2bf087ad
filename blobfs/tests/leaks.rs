//! What an operation frees is free again: no page and no cluster is lost.

mod common;

use common::*;
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, InitOptions, LoadOptions};

/// The xattrs of a blob that do not fit its root.
fn long_xattrs() -> Vec<(String, Vec<u8>)> {
    (0..3)
        .map(|i| (format!("long{i}"), vec![i; 3000]))
        .collect()
}

/// A snapshot has pages of its own for long xattrs. They go with it, whether its clone takes over its clusters or it has none.
#[test]
fn a_snapshot_with_long_xattrs_gives_its_pages_back() {
    let dev = memory(16 << 20, 4096);
    let store = Blobstore::init(dev.clone(), &InitOptions::default()).unwrap();
    let opts = CreateOptions::default().num_clusters(2);
    let blob = store.create(&opts).unwrap();
    let used = (store.md_pages(), store.free_clusters());
    let snapshot = store.snapshot(blob, &long_xattrs()).unwrap();
    let clone = store.clone_blob(snapshot, &long_xattrs()).unwrap();
    store.delete(clone).unwrap();
    store.delete(snapshot).unwrap();
    assert_eq!((store.md_pages(), store.free_clusters()), used);
    store.unload().unwrap();
    drop(store);
    assert_eq!(check(&dev).unwrap().worst(), None);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!((store.md_pages(), store.free_clusters()), used);
}
