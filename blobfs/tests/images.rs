//! Tests of images that SPDK wrote: they load, list as SPDK lists them, and have the recorded
//! contents.

mod common;

use common::*;
use pumice_blobfs::blobstore::{Blobstore, BsType, CreateOptions, Error, LoadOptions};

const ALL: [&str; 4] = [
    "small-bs-4k.img",
    "small-bs-4k-dirty.img",
    "small-blobfs-4096.img",
    "small-rdb-clean.img",
];

fn check(store: &Blobstore, facts: &str) {
    assert_eq!(store.damaged(), []);
    let expected: Vec<&str> = facts
        .lines()
        .filter(|line| line.starts_with("blob 0x") || line.starts_with("  xattr '"))
        .collect();
    assert_eq!(listing(store), expected);
    let head = facts.lines().find(|line| line.starts_with("bs: ")).unwrap();
    let number = |key: &str| {
        head.split_once(key)
            .unwrap()
            .1
            .split(' ')
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert_eq!(store.cluster_size(), number(" cluster="));
    assert_eq!(u64::from(store.io_unit_size()), number(" io_unit="));
    assert_eq!(store.total_clusters(), number("total_data_clusters="));
    assert_eq!(store.free_clusters(), number("free_clusters="));
    let super_blob = store
        .super_blob()
        .map_or("none".to_owned(), |id| id.to_string());
    assert!(
        head.ends_with(&format!("bstype='{}' super={super_blob}", store.bstype())),
        "{head}"
    );
}

fn check_contents(store: &Blobstore, facts: &str) {
    let sums = blob_sums(facts);
    for (id, sum) in &sums {
        assert_eq!(&sha256(&whole(&store.open(*id).unwrap())), sum, "{id}");
    }
    // The database image has checksums of files instead.
    let files = facts.lines().filter(|line| line.starts_with('/'));
    let files: Vec<Vec<&str>> = files
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert!(!sums.is_empty() || !files.is_empty());
    for file in files {
        let id = store.blobs().into_iter().find(|id| {
            let name = store.open(*id).unwrap().xattr("name").unwrap();
            name == format!("{}\0", file[0]).as_bytes()
        });
        let bytes = whole(&store.open(id.unwrap()).unwrap());
        assert_eq!(
            sha256(&bytes[..file[1].parse().unwrap()]),
            file[2],
            "{}",
            file[0]
        );
    }
}

/// Asserts that only the super block and the masks, the pages before the metadata region, differ.
fn assert_same_but_masks(before: &[u8], after: &[u8]) {
    let md_start = u32::from_le_bytes(before[48..52].try_into().unwrap()) as usize * 4096;
    assert_eq!(before.len(), after.len());
    for (page, (a, b)) in before[md_start..]
        .chunks(4096)
        .zip(after[md_start..].chunks(4096))
        .enumerate()
    {
        assert!(a == b, "page {} differs", page + md_start / 4096);
    }
}

#[test]
fn every_image_loads_and_reads() {
    for name in ALL {
        let facts = facts(name);
        let bytes = image(name);
        for block_size in [4096, 512] {
            let dev = memory_with(&bytes, block_size);
            let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
            check(&store, &facts);
            if block_size == 4096 {
                check_contents(&store, &facts);
            }
        }
    }
}

#[test]
fn load_and_unload_write_nothing_to_a_clean_image() {
    for name in ALL.into_iter().filter(|name| !name.contains("dirty")) {
        let bytes = image(name);
        let dev = memory_with(&bytes, 4096);
        let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
        listing(&store);
        store.unload().unwrap();
        assert!(content(&dev) == bytes, "{name} changed");
    }
}

#[test]
fn unloading_the_dirty_image_makes_it_clean() {
    let name = "small-bs-4k-dirty.img";
    let bytes = image(name);
    let dev = memory_with(&bytes, 4096);
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    store.unload().unwrap();
    let after = content(&dev);
    assert_same_but_masks(&bytes, &after);
    assert_eq!(after[16], 1, "clean");
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    check(&store, &facts(name));
    store.unload().unwrap();
    assert!(content(&dev) == after);
}

#[test]
fn a_scan_of_a_clean_image_finds_what_its_masks_say() {
    for name in ALL {
        let mut bytes = image(name);
        bytes[16] = 0;
        let crc = crc32c::crc32c(&bytes[..4092]);
        bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
        let dev = memory_with(&bytes, 4096);
        let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
        check(&store, &facts(name));
        store.unload().unwrap();
        let after = content(&dev);
        if !name.contains("dirty") {
            assert!(after == image(name), "{name}: other masks than SPDK's");
        }
    }
}

#[test]
fn a_change_marks_the_store_dirty_and_an_unload_clean() {
    let bytes = image("small-blobfs-4096.img");
    let dev = memory_with(&bytes, 4096);
    let opts = LoadOptions::default().bstype(Some(BsType::BLOBFS));
    let store = Blobstore::load(dev.clone(), &opts).unwrap();
    let before = store.blobs();
    let id = store
        .create(&CreateOptions::default().num_clusters(3))
        .unwrap();
    assert_eq!(content(&dev)[16], 0);
    // Without an unload the scan finds the new blob.
    drop(store);
    let store = Blobstore::load(dev.clone(), &opts).unwrap();
    assert_eq!(store.blobs().len(), before.len() + 1);
    assert_eq!(store.open(id).unwrap().num_clusters(), 3);
    store.delete(id).unwrap();
    store.unload().unwrap();
    let after = content(&dev);
    // Pages that were allocated and freed leave no trace but zeroes.
    assert_eq!(after[..4096], bytes[..4096]);
    let store = Blobstore::load(dev, &opts).unwrap();
    check(&store, &facts("small-blobfs-4096.img"));
}

#[test]
fn refusals() {
    let bytes = image("small-blobfs-4096.img");
    let load = |bytes: &[u8], bstype| {
        let opts = LoadOptions::default().bstype(bstype);
        Blobstore::load(memory_with(bytes, 4096), &opts)
    };
    assert!(matches!(
        load(&bytes, Some(BsType::LVOLSTORE)),
        Err(Error::WrongType { .. })
    ));
    assert!(load(&bytes, Some(BsType::BLOBFS)).is_ok());
    // The device is smaller than the store.
    assert!(matches!(
        load(&bytes[..bytes.len() - (1 << 20)], None),
        Err(Error::Geometry { .. })
    ));
    assert!(matches!(
        load(&[0; 1 << 20], None),
        Err(Error::SuperBlock { .. })
    ));
    // A larger device is accepted.
    let mut larger = bytes.clone();
    larger.resize(bytes.len() + (5 << 20), 0);
    let store = load(&larger, None).unwrap();
    check(&store, &facts("small-blobfs-4096.img"));
    // 512-byte units need 512-byte blocks.
    let mut small_units = bytes;
    small_units[88..92].copy_from_slice(&512u32.to_le_bytes());
    let crc = crc32c::crc32c(&small_units[..4092]);
    small_units[4092..4096].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(
        load(&small_units, None),
        Err(Error::Geometry { .. })
    ));
    let dev = memory_with(&small_units, 512);
    assert_eq!(
        Blobstore::load(dev, &LoadOptions::default())
            .unwrap()
            .io_unit_size(),
        512
    );
}
