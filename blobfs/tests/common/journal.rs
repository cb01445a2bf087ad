//! Stores with a journal, for its tests.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::Arc;

use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::format::SuperBlock;
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};

use super::{listing, whole};

pub const CLUSTER: u64 = 8192;
pub const STORE: u64 = 4 << 20;
/// The smallest journal: a few dozen changes fill it.
pub const RING: u64 = 128 << 10;
pub const GUARDED: u32 = 0x8000_0003;

/// The abilities of a device. A power cut tears its writes at blocks.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub block_size: u32,
    pub write_cache: bool,
    pub fua: bool,
}

pub const DEVICES: [Device; 4] = [
    Device {
        block_size: 4096,
        write_cache: false,
        fua: true,
    },
    Device {
        block_size: 512,
        write_cache: true,
        fua: true,
    },
    Device {
        block_size: 512,
        write_cache: true,
        fua: false,
    },
    Device {
        block_size: 4096,
        write_cache: true,
        fua: false,
    },
];

impl Device {
    pub fn with(self, image: CrashImage, seed: u64) -> CrashDevice {
        let options = CrashOptions::default()
            .block_size(self.block_size)
            .write_cache(self.write_cache)
            .fua(self.fua)
            .seed(seed)
            .tear_bytes(self.block_size);
        CrashDevice::with_options(&options, image)
    }

    /// Makes an empty store with a journal.
    pub fn store(self) -> CrashImage {
        let dev = self.with(CrashImage::zeroed(STORE), 0);
        let opts = InitOptions::default()
            .cluster_size(u32::try_from(CLUSTER).unwrap())
            .md_pages(Some(160))
            .journal(Some(RING));
        let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
        assert!(store.journal().is_some());
        store.unload().unwrap();
        assert_eq!(version(&dev.image()), (3, 1));
        dev.image()
    }
}

pub fn version(image: &CrashImage) -> (u32, u32) {
    let mut page = [0; 4096];
    image.read(0, &mut page);
    let sb = SuperBlock::decode(&page).unwrap();
    (sb.version.get(), sb.clean.get())
}

pub fn load(dev: &CrashDevice) -> Blobstore {
    Blobstore::load(Arc::new(dev.clone()), &LoadOptions::default()).unwrap()
}

/// Describes everything that can be seen of a store.
pub fn describe(store: &Blobstore) -> Vec<String> {
    assert_eq!(store.damaged(), []);
    assert_eq!(store.journal_damage(), None);
    let mut lines = listing(store);
    let mut clusters = RING.div_ceil(CLUSTER);
    for id in store.blobs() {
        let blob = store.open(id).unwrap();
        lines.push(format!("{id} {:#x}", crc32c::crc32c(&whole(&blob))));
        clusters += blob.num_allocated();
    }
    lines.push(format!("{:?}", store.super_blob()));
    assert_eq!(
        store.free_clusters() + clusters,
        store.total_clusters(),
        "clusters without an owner"
    );
    lines
}

/// Makes a blob of three clusters.
pub fn make(store: &Blobstore) {
    let opts = CreateOptions::default()
        .num_clusters(3)
        .xattrs(vec![("name".to_owned(), vec![1; 40])]);
    store.create(&opts).unwrap();
}

pub fn nth(store: &Blobstore, n: usize) -> BlobId {
    let blobs = store.blobs();
    blobs[n % blobs.len()]
}

/// Changes an xattr of the first blob.
pub fn set(store: &Blobstore, byte: u8) -> Result<(), Error> {
    let blob = store.open(nth(store, 0))?;
    let mut all = store.transaction();
    all.set_xattr(&blob, "v", &[byte; 100]);
    all.commit().map(drop)
}
