//! Tests of a metadata region that grows: over old bytes that look like its pages, and with pages
//! that cannot be read.

mod common;

use std::sync::Arc;

use common::faults::fail;
use common::*;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, InitOptions, LoadOptions};
use rand::prelude::*;

const FOREVER: u64 = u64::MAX;
/// Bytes of a metadata page, and of a block.
const PAGE: u64 = 4096;

fn device(image: CrashImage, write_cache: bool) -> CrashDevice {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(write_cache)
        .seed(7)
        .tear_bytes(4096);
    CrashDevice::with_options(&options, image)
}

/// Makes a store with a metadata region of so many pages.
fn init(md_pages: u32) -> (CrashDevice, Blobstore) {
    let dev = device(CrashImage::zeroed(4 << 20), false);
    let opts = InitOptions::default()
        .cluster_size(8192)
        .md_pages(Some(md_pages));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    (dev, store)
}

fn load(dev: Arc<dyn BlockDevice>) -> Blobstore {
    Blobstore::load(dev, &LoadOptions::default()).unwrap()
}

/// Returns the first page of the metadata region.
fn md_start(store: &Blobstore) -> u64 {
    store.super_block().md_start.get().into()
}

/// Describes the blobs, none of which is damaged.
fn blobs_of(store: &Blobstore) -> Vec<String> {
    assert_eq!(store.damaged(), []);
    listing(store)
}

/// The clusters behind the region hold roots of blobs, as a file can whose bytes are an image. They
/// are zeroed before the region has them: a power cut does not bring these blobs into the store.
#[test]
fn a_region_grows_in_place_over_what_looks_like_roots() {
    let (other, many) = init(104);
    for _ in 0..100 {
        many.create(&CreateOptions::default()).unwrap();
    }
    let (dev, few) = init(20);
    few.create(&CreateOptions::default()).unwrap();
    let start = md_start(&few);
    assert_eq!(md_start(&many), start);
    many.unload().unwrap();
    few.unload().unwrap();
    let mut roots = vec![0; 80 * 4096];
    other.image().read((start + 20) * PAGE, &mut roots);
    assert!(roots.chunks(4096).all(|page| page.iter().any(|b| *b != 0)));
    let mut base = dev.image();
    base.write((start + 20) * PAGE, &roots);

    for write_cache in [false, true] {
        let dev = device(base.clone(), write_cache);
        let store = load(Arc::new(dev.clone()));
        let old = blobs_of(&store);
        assert!(store.grow_md_pages(100).unwrap() >= 100);
        assert_eq!(md_start(&store), start, "it has moved");
        assert_eq!(blobs_of(&store), old);
        let mut rng = SmallRng::seed_from_u64(3);
        let mut grown = 0;
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            for round in 0..6 {
                let image = points.image(&mut |_| match round {
                    0 => false,
                    1 => true,
                    _ => rng.random_bool(0.5),
                });
                let store = load(Arc::new(device(image, false)));
                let at = points.position();
                let what = format!("cache {write_cache}, event {at}, round {round}");
                assert_eq!(blobs_of(&store), old, "{what}");
                grown += u32::from(store.md_pages().total >= 100);
            }
        }
        assert!(grown > 0);
    }
}

/// A page in use that cannot be read ends a growth that moves the region, which stays where it is.
/// One that nothing uses, or that can be read alone, does not.
#[test]
fn a_page_that_cannot_be_read_is_left_out_of_a_move_only_if_nothing_uses_it() {
    for (used, failures) in [(true, FOREVER), (true, 1), (false, FOREVER)] {
        let what = format!("used: {used}, {failures} failures");
        let (base, store) = init(20);
        // This one takes the clusters behind the region.
        let opts = CreateOptions::default().num_clusters(3);
        store.create(&opts).unwrap();
        let root = store.create(&CreateOptions::default()).unwrap();
        store.unload().unwrap();
        drop(store);

        let dev = Arc::new(ErrorDevice::new(None, Arc::new(base.clone())));
        let store = load(dev.clone());
        let (old, pages, start) = (blobs_of(&store), store.md_pages(), md_start(&store));
        let page = if used { root.page().unwrap() } else { 15 };
        let range = Some((start + u64::from(page), 1));
        dev.inject(fail(OpKind::Read, failures, range));
        let grown = store.grow_md_pages(200);
        dev.clear();
        let stays = used && failures > 1;
        assert_eq!(grown.is_err(), stays, "{what}: {grown:?}");
        assert_eq!(store.md_pages() == pages, stays, "{what}");
        assert_eq!(md_start(&store) == start, stays, "{what}");
        let killed = || load(Arc::new(device(base.image(), false)));
        assert_eq!(blobs_of(&store), old, "{what}");
        assert_eq!(blobs_of(&killed()), old, "{what}");
        // A growth that has failed can be repeated.
        assert!(store.grow_md_pages(200).unwrap() >= 200, "{what}");
        assert_eq!(blobs_of(&killed()), old, "{what}");
    }
}

/// The region is copied when it has what only the journal had, which goes to its place in the old one.
#[test]
fn a_region_that_moves_has_what_was_in_the_journal() {
    let dev = device(CrashImage::zeroed(16 << 20), false);
    let opts = InitOptions::default()
        .cluster_size(8192)
        .md_pages(Some(80))
        .journal(Some(1 << 20));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let opts = CreateOptions::default().num_clusters(2);
    let id = store.create(&opts).unwrap();
    let mut change = store.transaction();
    change.set_xattr(id, "name", b"in the journal");
    change.commit().unwrap();
    let (start, blobs) = (md_start(&store), blobs_of(&store));
    store.grow_md_pages(400).unwrap();
    assert_ne!(md_start(&store), start, "it grew in place");
    let again = load(Arc::new(device(dev.image(), false)));
    assert_eq!(blobs_of(&again), blobs);
}
