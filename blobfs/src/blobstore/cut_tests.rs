//! A shrink that another program had begun when it was cut short.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, DmaBuf};

use super::format::{EXTENTS_PER_PAGE, encode_extent_page};
use super::{Blobstore, CreateOptions, InitOptions, LoadOptions};

/// SPDK writes the last extent page of a shrunk blob before the table that names the others.
#[test]
fn what_a_cut_shrink_leaves_is_freed_by_the_next_change() {
    let dev = pumice_bdev::open("malloc://16M?block_size=4096").unwrap();
    let options = InitOptions::default().cluster_size(4096).md_pages(Some(64));
    let store = Blobstore::init(Arc::clone(&dev), &options).unwrap();
    let (whole, left) = (EXTENTS_PER_PAGE as u64 + 88, 300);
    let id = store
        .create(&CreateOptions::default().num_clusters(whole))
        .unwrap();
    let (free, pages) = (store.free_clusters(), store.md_pages().used);
    let (lba, entries) = {
        let state = store.inner.state.lock();
        let meta = state.blobs.meta(id).unwrap();
        let first = state.space.geo.md_lba(meta.extent_pages[&0]);
        (first, meta.map.page(0))
    };
    drop(store);
    let page = encode_extent_page(id, 0, &entries[..left]);
    let mut buf = DmaBuf::new(page.len()).unwrap();
    buf.copy_from_slice(&page[..]);
    let channel = AsyncChannel::new(dev.open_channel().unwrap());
    channel
        .block_on(channel.write(lba, buf.freeze(), false))
        .unwrap();
    drop(channel);

    let load = || Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    let store = load();
    let blob = store.open(id).unwrap();
    assert_eq!(blob.num_clusters(), left as u64);
    // What the table still names is not given to others.
    assert_eq!(
        store.free_clusters(),
        free + EXTENTS_PER_PAGE as u64 - left as u64
    );
    assert_eq!(store.md_pages().used, pages);
    blob.set_xattr("name", b"value").unwrap();
    blob.sync_md().unwrap();
    let freed = |store: &Blobstore| {
        assert_eq!(store.free_clusters(), free + whole - left as u64);
        assert_eq!(store.md_pages().used, pages - 1);
    };
    freed(&store);
    drop(blob);
    store.unload().unwrap();
    drop(store);
    freed(&load());
}
