//! A new store on a device that had another one, and power cuts while it is made.

mod common;

use std::sync::Arc;

use common::journal::{CLUSTER, DEVICES, Device, RING, STORE, make, version};
use common::{content, listing};
use pumice_bdev::{BlockDevice, file_uri, open};
use pumice_bdev_testkit::crashsim::CrashImage;
use pumice_blobfs::blobstore::{Blobstore, ClearMethod, InitOptions, LoadOptions};

fn options(journal: bool) -> InitOptions {
    InitOptions::default()
        .cluster_size(u32::try_from(CLUSTER).unwrap())
        .md_pages(Some(160))
        .journal(journal.then_some(RING))
        .force(true)
}

fn load(dev: Arc<dyn BlockDevice>) -> Result<Blobstore, pumice_blobfs::blobstore::Error> {
    Blobstore::load(dev, &LoadOptions::default())
}

/// A device whose every block has something, with a store of ten blobs.
fn old(device: Device) -> (CrashImage, Vec<String>) {
    let mut image = CrashImage::zeroed(STORE);
    image.write(0, &vec![0xa5; usize::try_from(STORE).unwrap()]);
    let dev = device.with(image, 1);
    let opts = options(false).clear_method(ClearMethod::None);
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    for _ in 0..10 {
        make(&store);
    }
    store.unload().unwrap();
    (dev.image(), listing(&load(Arc::new(dev)).unwrap()))
}

/// After a power cut anywhere the device has the old store as it was, none, or the new one, which has nothing of the old one.
#[test]
fn a_power_cut_anywhere_leaves_the_old_store_whole_or_none_of_it() {
    // Without a journal, as while one is made, a metadata page must not be torn.
    let devices = DEVICES.into_iter().filter(|d| d.block_size == 4096);
    for (device, journal) in devices.flat_map(|d| [(d, false), (d, true)]) {
        let (image, before) = old(device);
        let dev = device.with(image, 2);
        let store = Blobstore::init(Arc::new(dev.clone()), &options(journal)).unwrap();
        assert_eq!(store.blobs(), []);
        assert_eq!(store.journal().is_some(), journal);
        drop(store);
        let (mut none, mut new) = (0, 0);
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            for which in 0..4 {
                let mut number = 0;
                let image = points.image(&mut |_| {
                    number += 1;
                    match which {
                        0 => false,
                        1 => true,
                        n => number % 2 == n - 2,
                    }
                });
                let what = format!("{device:?}, event {}, {which}", points.position());
                let Ok(store) = load(Arc::new(device.with(image, 3))) else {
                    none += 1;
                    continue;
                };
                let mut found = listing(&store);
                if found == before {
                    continue;
                }
                // The file of a journal that was being made.
                found.retain(|line| !line.contains("name' len=14") && !line.contains("'length'"));
                assert_eq!(store.damaged(), [], "{what}");
                assert!(found.len() <= 1, "{what}: {found:?}");
                new += 1;
            }
        }
        assert!(none > 0 && new > 0, "{device:?}: {none}, {new}");
    }
}

/// The data of the old store is cleared if the caller asks for it.
#[test]
fn a_device_is_cleared_as_the_caller_says() {
    let device = DEVICES[0];
    for (method, is_cleared) in [(ClearMethod::WriteZeroes, true), (ClearMethod::None, false)] {
        let dev = device.with(old(device).0, 2);
        let opts = options(false).clear_method(method);
        let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
        store.unload().unwrap();
        let sb = store.super_block();
        let from = u64::from(sb.md_start.get() + sb.md_len.get()) * 4096;
        let from = usize::try_from(from.next_multiple_of(CLUSTER)).unwrap();
        drop(store);
        let bytes = content(&(Arc::new(dev) as Arc<dyn BlockDevice>));
        assert_eq!(
            bytes[from..].iter().all(|byte| *byte == 0),
            is_cleared,
            "{method:?}"
        );
    }
}

/// An image file that was created for a store stays, and has the mark of an orderly unload at once if there is a journal.
#[test]
fn an_image_that_was_created_for_a_store_stays() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for journal in [false, true] {
        let path = dir.path().join(format!("image {journal}"));
        let uri = format!("{}?size=16M&create=1", file_uri(&path));
        let opts = options(journal).force(false);
        let store = Blobstore::init(open(&uri).unwrap(), &opts).unwrap();
        drop(store);
        assert!(path.exists(), "journal: {journal}");
        let store = load(open(&file_uri(&path)).unwrap()).unwrap();
        assert_eq!(store.blobs(), []);
    }
    let dev = DEVICES[0].with(CrashImage::zeroed(STORE), 0);
    drop(Blobstore::init(Arc::new(dev.clone()), &options(true)).unwrap());
    assert_eq!(version(&dev.image()), (3, 1));
}
