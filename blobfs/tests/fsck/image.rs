//! Images with damage that is made by hand.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_blobfs::blobstore::check::{Report, Severity, check, repair};
use pumice_blobfs::blobstore::format::{
    BlobReader, BlobRecord, MapRecord, Page, SuperBlock, Xattr, decode_extent_page, encode_blob,
    encode_extent_page, seal_chain,
};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, InitOptions, LoadOptions};

use crate::common::*;

pub const CLUSTER: u32 = 8192;
pub const MD_PAGES: u32 = 64;

/// The bytes of a store that was unloaded in order.
#[derive(Clone)]
pub struct Image {
    pub bytes: Vec<u8>,
    pub block_size: u32,
}

/// The blobs of the image, each of which is full of a byte of its own.
pub struct Blobs {
    /// Three clusters.
    pub small: BlobId,
    /// 600 clusters, so two extent pages.
    pub large: BlobId,
    /// A clone of `snapshot`, with three clusters.
    pub clone: BlobId,
    pub snapshot: BlobId,
}

pub fn image_of(block_size: u32) -> (Image, Blobs) {
    let dev = memory(8 << 20, block_size);
    let options = InitOptions::default()
        .cluster_size(CLUSTER)
        .md_pages(Some(MD_PAGES));
    let store = Blobstore::init(Arc::clone(&dev), &options).unwrap();
    let [small, large, clone] = [(3, 1), (600, 2), (3, 3)].map(|(num_clusters, byte)| {
        let options = CreateOptions::default()
            .num_clusters(num_clusters)
            .xattrs(vec![("name".to_owned(), format!("/{byte}\0").into_bytes())]);
        let id = store.create(&options).unwrap();
        write(&store.open(id).unwrap(), 0, &[byte; CLUSTER as usize]);
        id
    });
    let snapshot = store.snapshot(clone, &[]).unwrap();
    store.unload().unwrap();
    drop(store);
    let image = Image {
        bytes: content(&dev),
        block_size,
    };
    let blobs = Blobs {
        small,
        large,
        clone,
        snapshot,
    };
    (image, blobs)
}

impl Image {
    pub fn sb(&self) -> SuperBlock {
        SuperBlock::decode(self.bytes[..4096].try_into().unwrap()).unwrap()
    }

    pub fn set_sb(&mut self, change: impl FnOnce(&mut SuperBlock)) {
        let mut sb = self.sb();
        change(&mut sb);
        self.bytes[..4096].copy_from_slice(&sb.encode()[..]);
    }

    pub fn page(&mut self, index: u32) -> &mut Page {
        let at = (self.sb().md_start.get() + index) as usize * 4096;
        (&mut self.bytes[at..at + 4096]).try_into().unwrap()
    }

    /// Changes a blob whose chain is its root.
    pub fn change(&mut self, id: BlobId, change: impl FnOnce(&mut BlobRecord)) {
        let root = self.page(id.page().unwrap());
        let mut reader = BlobReader::new(id);
        assert_eq!(reader.page(root).unwrap(), None);
        let mut record = reader.finish();
        change(&mut record);
        let mut pages = encode_blob(&record);
        seal_chain(&mut pages, &[]);
        root.copy_from_slice(&pages[0][..]);
    }

    /// The metadata pages with a blob's extents, in order.
    pub fn extent_pages(&mut self, id: BlobId) -> Vec<u32> {
        let mut pages = Vec::new();
        self.change(id, |record| {
            if let MapRecord::Table { entries, .. } = &record.map {
                pages.extend(entries.iter().map(|entry| entry.page));
            }
        });
        pages
    }

    pub fn clusters(&mut self, id: BlobId) -> Vec<u32> {
        let pages = self.extent_pages(id);
        let extents = pages.into_iter();
        extents
            .flat_map(|page| decode_extent_page(self.page(page)).unwrap().clusters)
            .collect()
    }

    /// Gives a blob of one extent page these clusters.
    pub fn set_clusters(&mut self, id: BlobId, clusters: &[u32]) {
        let [page] = self.extent_pages(id)[..] else {
            panic!("more than one extent page");
        };
        let page = self.page(page);
        page.copy_from_slice(&encode_extent_page(id, 0, clusters)[..]);
    }

    pub fn set_mark(&mut self, id: BlobId, name: &str, named: BlobId) {
        self.change(id, |record| {
            record
                .internal
                .retain(|xattr| *xattr.name != *name.as_bytes());
            record.internal.push(Xattr {
                name: name.as_bytes().into(),
                value: named.0.to_le_bytes().into(),
            });
            // It has internal xattrs. Only a thin blob has a snapshot below it.
            record.flags.invalid |= 2 | u64::from(name == "SNAP");
        });
    }

    pub fn device(&self) -> Arc<dyn BlockDevice> {
        memory_with(&self.bytes, self.block_size)
    }

    /// Checks the image. That changes no byte.
    pub fn report(&self) -> Report {
        let dev = self.device();
        let report = check(&dev).unwrap();
        assert!(content(&dev) == self.bytes, "a check has written");
        report
    }

    /// Asserts that a check finds these, in any order, and nothing else: each text is a part of the finding's.
    pub fn finds(&self, expected: &[(Severity, &str)]) {
        let mut left = self.report().findings;
        for (severity, text) in expected {
            let at = left
                .iter()
                .position(|f| f.severity == *severity && f.text.contains(text));
            let at = at.unwrap_or_else(|| panic!("no {severity:?} \"{text}\" in {left:#?}"));
            left.remove(at);
        }
        assert_eq!(left, []);
    }

    /// Repairs the image, after which nothing is wrong, and returns the lines that the repair has told.
    pub fn repaired(&self) -> (Image, Vec<String>) {
        let dev = self.device();
        let lines = repair(&dev).unwrap();
        let image = Image {
            bytes: content(&dev),
            block_size: self.block_size,
        };
        assert_eq!(image.report().worst(), None);
        assert!(image.report().clean);
        (image, lines)
    }
}

/// Asserts that the blobs have what was written to them.
pub fn assert_whole(image: &Image, blobs: &Blobs) {
    let store = Blobstore::load(image.device(), &LoadOptions::default()).unwrap();
    let all = [
        (blobs.small, 1),
        (blobs.large, 2),
        (blobs.clone, 3),
        (blobs.snapshot, 3),
    ];
    for (id, byte) in all {
        let blob = store.open(id).unwrap();
        assert_eq!(read(&blob, 0, 8192), [byte; 8192], "{id}");
    }
}
