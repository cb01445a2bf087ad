//! States that other writers leave: SPDK's interrupted snapshots and resizes, old versions, damage.

mod common;
#[path = "foreign/cut.rs"]
mod cut;

use common::*;
use pumice_blobfs::blobstore::check::{Severity, check};
use pumice_blobfs::blobstore::format::{
    BlobReader, BlobRecord, Flags, INVALID_PAGE, MapRecord, Page, PageHeader, PageProblem, Run,
    SuperBlock, TableEntry, Xattr, decode_extent_page, encode_blob, encode_extent_page, seal,
    seal_chain,
};
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, BsType, CreateOptions, Error, InitOptions, LoadOptions, Parent,
};

const CLUSTER: u64 = 16384;

/// A store on disk that a test changes page by page.
struct Image {
    bytes: Vec<u8>,
    md_start: usize,
}

impl Image {
    /// Makes a new store with the content that `make` adds, not unloaded.
    fn new(make: impl FnOnce(&Blobstore)) -> Image {
        let dev = memory(32 << 20, 4096);
        let opts = InitOptions::default()
            .cluster_size(16384)
            .md_pages(Some(100));
        let store = Blobstore::init(dev.clone(), &opts).unwrap();
        make(&store);
        drop(store);
        let bytes = content(&dev);
        let md_start = u32::from_le_bytes(bytes[48..52].try_into().unwrap()) as usize;
        Image { bytes, md_start }
    }

    fn page(&self, index: u32) -> Page {
        self.bytes[(self.md_start + index as usize) * 4096..][..4096]
            .try_into()
            .unwrap()
    }

    fn put(&mut self, index: u32, mut page: Page) {
        seal(&mut page);
        self.bytes[(self.md_start + index as usize) * 4096..][..4096].copy_from_slice(&page);
    }

    fn super_block(&mut self, change: impl FnOnce(&mut SuperBlock)) {
        let mut sb = SuperBlock::decode(self.bytes[..4096].try_into().unwrap()).unwrap();
        change(&mut sb);
        self.bytes[..4096].copy_from_slice(&sb.encode());
    }

    /// Returns the record of a blob of one page.
    fn record(&self, id: BlobId) -> BlobRecord {
        let mut reader = BlobReader::new(id);
        assert_eq!(reader.page(&self.page(id.page().unwrap())).unwrap(), None);
        reader.finish()
    }

    fn put_record(&mut self, record: &BlobRecord) {
        let mut pages = encode_blob(record);
        seal_chain(&mut pages, &[]);
        self.put(record.id.page().unwrap(), *pages[0]);
    }

    fn change(&mut self, id: BlobId, change: impl FnOnce(&mut BlobRecord)) {
        let mut record = self.record(id);
        change(&mut record);
        self.put_record(&record);
    }

    fn load(&self) -> Blobstore {
        self.try_load().unwrap()
    }

    fn try_load(&self) -> Result<Blobstore, Error> {
        Blobstore::load(memory_with(&self.bytes, 4096), &LoadOptions::default())
    }

    /// Asserts that the check accepts the store, and the store after loading and unloading.
    fn check_legal(&self) {
        let dev = memory_with(&self.bytes, 4096);
        let report = check(&dev).unwrap();
        assert_eq!(report.worst(), None, "{:?}", report.findings);
        Blobstore::load(dev.clone(), &LoadOptions::default())
            .unwrap()
            .unload()
            .unwrap();
        let report = check(&dev).unwrap();
        assert_eq!(report.worst(), None, "{:?}", report.findings);
    }
}

fn create(store: &Blobstore, num_clusters: u64, thin: bool) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(thin);
    store.open(store.create(&opts).unwrap()).unwrap()
}

fn mark(blob: &Blob, cluster: u64, byte: u8) {
    write(blob, cluster * CLUSTER, &[byte; 4096]);
}

fn marks(blob: &Blob) -> Vec<u8> {
    (0..blob.num_clusters())
        .map(|cluster| read(blob, cluster * CLUSTER, 4096)[1])
        .collect()
}

fn internal(name: &str, id: BlobId) -> Xattr {
    Xattr {
        name: name.as_bytes().into(),
        value: id.0.to_le_bytes()[..].into(),
    }
}

fn root(page: u32) -> BlobId {
    BlobId::from_page(page)
}

/// Makes blob 0 with four clusters and its snapshot 2. The blob has written cluster 1 since.
fn with_snapshot() -> (Image, BlobId, BlobId) {
    let mut ids = (root(0), root(0));
    let image = Image::new(|store| {
        let blob = create(store, 4, true);
        for cluster in 0..3 {
            mark(&blob, cluster, 1);
        }
        let snapshot = store.snapshot(blob.id(), &[]).unwrap();
        mark(&blob, 1, 2);
        ids = (blob.id(), snapshot);
    });
    (image, ids.0, ids.1)
}

#[test]
fn a_resize_that_spdk_has_not_finished() {
    // A larger size: the extent page is full, but the table still has the old size.
    let make = |store: &Blobstore| drop(create(store, 500, false));
    let mut image = Image::new(make);
    let MapRecord::Table { entries, .. } = image.record(root(0)).map else {
        panic!("a table")
    };
    let mut clusters = decode_extent_page(&image.page(entries[0].page))
        .unwrap()
        .clusters;
    let last = *clusters.iter().max().unwrap();
    clusters.extend(last + 1..=last + 12);
    image.put(entries[0].page, *encode_extent_page(root(0), 0, &clusters));
    image.check_legal();
    let store = image.load();
    assert_eq!(store.open(root(0)).unwrap().num_clusters(), 512);
    assert_eq!(store.free_clusters(), store.total_clusters() - 512);

    // A smaller size: the last remaining page is short already, but the table still names the one
    // behind it.
    let mut image = Image::new(|store| drop(create(store, 600, false)));
    let MapRecord::Table { entries, .. } = image.record(root(0)).map else {
        panic!("a table")
    };
    let clusters = decode_extent_page(&image.page(entries[0].page))
        .unwrap()
        .clusters;
    image.put(
        entries[0].page,
        *encode_extent_page(root(0), 0, &clusters[..500]),
    );
    image.check_legal();
    let store = image.load();
    let blob = store.open(root(0)).unwrap();
    assert_eq!(blob.num_clusters(), 500);
    blob.resize(10).unwrap();
    blob.resize(700).unwrap();
    assert_eq!(whole(&blob).len() as u64, 700 * CLUSTER);
    assert_eq!(store.free_clusters(), store.total_clusters() - 700);
}

#[test]
fn tables_in_several_descriptors_and_foreign_ids() {
    // 600 extent pages do not fit one metadata page.
    let mut image = Image::new(|_| ());
    let mut entries: Vec<TableEntry> = vec![TableEntry { page: 0, count: 1 }; 600];
    entries[599] = TableEntry { page: 50, count: 1 };
    image.put(50, *encode_extent_page(root(99), 599 * 512, &[0, 0, 40]));
    let flags = Flags {
        invalid: Flags::THIN | Flags::EXTENT_TABLE,
        data_ro: 0,
        md_ro: 0,
    };
    let (xattrs, internal) = (Vec::new(), Vec::new());
    let map = MapRecord::Table {
        num_clusters: 599 * 512 + 3,
        entries,
    };
    let mut pages = encode_blob(&BlobRecord {
        id: root(7),
        flags,
        xattrs,
        internal,
        map,
    });
    assert_eq!(pages.len(), 2);
    seal_chain(&mut pages, &[20]);
    image.put(7, *pages[0]);
    image.put(20, *pages[1]);
    image.check_legal();
    let store = image.load();
    let blob = store.open(root(7)).unwrap();
    assert_eq!(blob.num_clusters(), 599 * 512 + 3);
    assert_eq!(
        blob.extents().allocated().collect::<Vec<_>>(),
        [(599 * 512 + 2, 40)]
    );
}

#[test]
fn old_versions_load_and_stay_old() {
    for version in [1u32, 2] {
        let mut image = Image::new(|store| {
            mark(&create(store, 3, false), 1, 5);
        });
        image.super_block(|sb| {
            sb.version = version.into();
            sb.used_blobid_mask_start = 0.into();
            sb.used_blobid_mask_len = 0.into();
            sb.size = 0.into();
            sb.io_unit_size = 0.into();
            sb.md_page_size = 0.into();
            sb.bstype = BsType::NONE.0;
            sb.reserved[7] = 0x77;
            sb.clean = 1.into();
        });
        image.check_legal();
        let store = image.load();
        assert_eq!(store.io_unit_size(), 4096);
        let blob = store.open(root(0)).unwrap();
        assert_eq!(marks(&blob), [0, 5, 0]);
        mark(&blob, 2, 6);
        blob.resize(4).unwrap();
        drop(blob);
        let dev = store.device().clone();
        store.unload().unwrap();
        drop(store);
        let bytes = content(&dev);
        let sb = SuperBlock::decode(bytes[..4096].try_into().unwrap()).unwrap();
        assert_eq!(
            (sb.version.get(), sb.reserved[7], sb.clean.get()),
            (version, 0x77, 1)
        );
        assert_eq!(
            (
                sb.size.get(),
                sb.io_unit_size.get(),
                sb.used_blobid_mask_len.get()
            ),
            (0, 0, 0)
        );
        let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
        assert_eq!(marks(&store.open(root(0)).unwrap()), [0, 5, 6, 0]);
    }
}

#[test]
fn damaged_blobs_are_set_aside_and_the_rest_loads() {
    type Damage = fn(&mut Image);
    type Expected = fn(&PageProblem) -> bool;
    let cases: [(&str, Damage, Expected); 8] = [
        (
            "an extent page with a wrong crc",
            |image| image.bytes[(image.md_start + 1) * 4096 + 40] ^= 1,
            |p| matches!(p, PageProblem::Crc { .. }),
        ),
        (
            "an extent page outside of the region",
            |image| {
                image.change(root(0), |r| {
                    r.map = MapRecord::Table {
                        num_clusters: 3,
                        entries: vec![TableEntry {
                            page: 5000,
                            count: 1,
                        }],
                    };
                });
            },
            |p| matches!(p, PageProblem::PageIndex { .. }),
        ),
        (
            "a cluster behind the end",
            |image| image.put(1, *encode_extent_page(root(0), 0, &[1_000_000, 40, 41])),
            |p| matches!(p, PageProblem::Cluster { .. }),
        ),
        (
            "a cluster of the metadata",
            |image| image.put(1, *encode_extent_page(root(0), 0, &[1, 40, 41])),
            |p| matches!(p, PageProblem::Cluster { .. }),
        ),
        (
            "a hole in a thick blob",
            |image| image.put(1, *encode_extent_page(root(0), 0, &[39, 0, 41])),
            |p| matches!(p, PageProblem::HoleInThick),
        ),
        (
            "an extent page for other clusters",
            |image| image.put(1, *encode_extent_page(root(0), 512, &[39, 40, 41])),
            |p| matches!(p, PageProblem::ExtentPageStart { .. }),
        ),
        (
            "a chain that ends in itself",
            |image| {
                let mut page = image.page(0);
                let header = PageHeader::read(&page);
                PageHeader { next: 0, ..header }.write(&mut page);
                image.put(0, page);
            },
            |p| matches!(p, PageProblem::Loop),
        ),
        (
            "runs without end",
            |image| {
                image.change(root(0), |r| {
                    r.flags.invalid = 0;
                    r.map = MapRecord::Rle(vec![Run {
                        cluster: 60,
                        len: u32::MAX - 1,
                    }]);
                });
            },
            |p| matches!(p, PageProblem::Cluster { .. } | PageProblem::Claimed(_)),
        ),
    ];
    for (what, damage, expected) in cases {
        let mut image = Image::new(|store| {
            create(store, 3, false);
            mark(&create(store, 3, false), 1, 5);
        });
        damage(&mut image);
        let dev = memory_with(&image.bytes, 4096);
        let report = check(&dev).unwrap();
        assert_eq!(report.worst(), Some(Severity::Error), "{what}");
        let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
        let damaged = store.damaged();
        assert_eq!(damaged.len(), 1, "{what}: {damaged:?}");
        assert_eq!(damaged[0].0, root(0));
        assert!(expected(&damaged[0].1.problem), "{what}: {}", damaged[0].1);
        assert!(matches!(store.open(root(0)), Err(Error::Damaged { .. })));
        assert_eq!(store.blobs(), [root(2)]);
        assert_eq!(marks(&store.open(root(2)).unwrap()), [0, 5, 0], "{what}");
        // Its pages are not given to others, and an unload keeps it.
        let new = store.create(&CreateOptions::default().num_clusters(2));
        match new {
            Ok(id) => assert!(id != root(0) && id != root(2), "{what}"),
            Err(error) => assert!(matches!(error, Error::Held(_)), "{what}: {error}"),
        }
        store.unload().unwrap();
        let dev = store.device().clone();
        drop(store);
        let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
        assert_eq!(store.damaged().len(), 1, "{what}");
        // It can be deleted by its id.
        store.delete(root(0)).unwrap();
        assert_eq!(store.damaged(), [], "{what}");
    }
}

#[test]
fn unknown_flags() {
    let mut image = Image::new(|store| {
        for _ in 0..3 {
            create(store, 1, false);
        }
    });
    image.change(root(0), |record| record.flags.invalid |= 1 << 20);
    image.change(root(2), |record| record.flags.data_ro |= 1 << 20);
    image.change(root(4), |record| record.flags.md_ro |= 1 << 20);
    let store = image.load();
    assert!(matches!(store.open(root(0)), Err(Error::CannotOpen { .. })));
    assert!(matches!(
        store.snapshot(root(0), &[]),
        Err(Error::CannotOpen { .. })
    ));
    let blob = store.open(root(2)).unwrap();
    assert!(blob.is_read_only());
    assert!(matches!(blob.resize(5), Err(Error::ReadOnly(_))));
    let blob = store.open(root(4)).unwrap();
    mark(&blob, 0, 3);
    assert!(matches!(blob.resize(5), Err(Error::ReadOnly(_))));
    assert!(matches!(blob.set_xattr("a", b""), Err(Error::ReadOnly(_))));
    // The clusters of a blob that cannot be opened are not given to others.
    assert_eq!(store.free_clusters(), store.total_clusters() - 3);
}

#[test]
fn parents_that_are_not_there_and_loops() {
    let (mut image, blob, snapshot) = with_snapshot();
    image.change(blob, |record| {
        record.internal = vec![internal("SNAP", root(70))];
    });
    let store = image.load();
    assert!(matches!(store.open(blob), Err(Error::CannotOpen { .. })));
    assert!(store.open(snapshot).is_ok());
    image.change(blob, |record| {
        record.internal = vec![internal("SNAP", snapshot)];
    });
    image.change(snapshot, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal = vec![internal("SNAP", blob)];
    });
    let store = image.load();
    assert!(matches!(store.open(blob), Err(Error::CannotOpen { .. })));
    let report = check(store.device()).unwrap();
    assert_eq!(report.worst(), Some(Severity::Error));
}

#[test]
fn clusters_with_two_owners_are_found_and_never_given_away() {
    let mut image = Image::new(|store| {
        create(store, 2, false);
        create(store, 2, false);
    });
    let first = decode_extent_page(&image.page(1)).unwrap().clusters;
    image.put(3, *encode_extent_page(root(2), 0, &[first[0], first[1]]));
    let store = image.load();
    let report = check(store.device()).unwrap();
    assert_eq!(report.worst(), Some(Severity::Error));
    let free = store.free_clusters();
    store.delete(root(0)).unwrap();
    assert_eq!(store.free_clusters(), free, "the other blob still has them");
}

#[test]
fn extent_pages_with_two_owners_are_never_given_away() {
    let mut image = Image::new(|store| {
        create(store, 2, false);
        create(store, 2, false);
    });
    image.change(root(2), |record| {
        if let MapRecord::Table { entries, .. } = &mut record.map {
            entries[0].page = 1;
        }
    });
    let store = image.load();
    store.delete(root(0)).unwrap();
    while store.create(&CreateOptions::default()).is_ok() {}
    store.unload().unwrap();
    let dev = std::sync::Arc::clone(store.device());
    drop(store);
    let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
    assert_eq!(store.damaged(), []);
    assert_eq!(store.open(root(2)).unwrap().num_clusters(), 2);
}

#[test]
fn a_blob_goes_with_what_a_cut_shrink_has_left() {
    let mut image = Image::new(|store| drop(create(store, 600, false)));
    let first = decode_extent_page(&image.page(1)).unwrap();
    assert_eq!(first.clusters.len(), 512);
    image.put(1, *encode_extent_page(root(0), 0, &first.clusters[..100]));
    let store = image.load();
    let used = store.md_pages().used;
    assert_eq!(store.total_clusters() - store.free_clusters(), 188);
    store.delete(root(0)).unwrap();
    assert_eq!(store.free_clusters(), store.total_clusters());
    assert_eq!(used - store.md_pages().used, 3);
}

type Change = fn(&mut SuperBlock);

/// Changes of a super block that contradict the device or each other, and the beginning of the reason.
const CONTRADICTIONS: [(&str, Change); 19] = [
    ("clusters of 0 bytes", |sb| sb.cluster_size = 0.into()),
    ("clusters of 5000 bytes", |sb| {
        sb.cluster_size = 5000.into();
    }),
    // They have to be a multiple of its io units, too.
    ("clusters of 16384 bytes", |sb| {
        sb.io_unit_size = 32768.into();
    }),
    ("the store has 67108864 bytes, the device 33554432", |sb| {
        sb.size = (64u64 << 20).into();
    }),
    ("the store has 33554433 bytes", |sb| {
        sb.size = ((32u64 << 20) + 1).into();
    }),
    ("metadata region 4+0 pages", |sb| sb.md_len = 0.into()),
    ("metadata up to byte 4096409600", |sb| {
        sb.md_start = 1_000_000.into();
    }),
    // A mask behind the region, where its last cluster ends.
    ("metadata up to byte 430080", |sb| {
        sb.used_blobid_mask_start = 104.into();
    }),
    ("page mask of 1 pages for 40000000 bits", |sb| {
        sb.md_len = 40_000_000.into();
    }),
    ("page mask of 0 pages for 100 bits", |sb| {
        sb.used_page_mask_len = 0.into();
    }),
    ("cluster mask of 0 pages for 2048 bits", |sb| {
        sb.used_cluster_mask_len = 0.into();
    }),
    ("page mask of 1 pages for 32729 bits", |sb| {
        sb.md_len = 32_729.into();
    }),
    ("page mask and metadata region overlap", |sb| {
        sb.used_page_mask_start = sb.md_start;
    }),
    ("page mask and cluster mask overlap", |sb| {
        sb.used_cluster_mask_start = sb.used_page_mask_start;
    }),
    ("metadata region and blobid mask overlap", |sb| {
        sb.used_blobid_mask_start = (sb.md_start.get() + sb.md_len.get() - 1).into();
    }),
    ("io units of 1000 bytes", |sb| {
        sb.io_unit_size = 1000.into();
    }),
    ("io units of 256 bytes", |sb| {
        sb.io_unit_size = 256.into();
    }),
    (
        "io units of 2048 bytes are smaller than the device's blocks of 4096",
        |sb| {
            sb.io_unit_size = 2048.into();
        },
    ),
    ("metadata pages of 8192 bytes", |sb| {
        sb.md_page_size = 8192.into();
    }),
];

#[test]
fn super_blocks_that_contradict_the_device() {
    for (what, change) in CONTRADICTIONS {
        let mut image = Image::new(|_| ());
        image.super_block(change);
        match image.try_load() {
            Err(Error::Geometry { reason, .. }) => {
                assert!(reason.contains(what), "{reason}, and not {what}");
            }
            other => panic!("{what}: {:?}", other.map(|_| ())),
        }
    }
    let mut image = Image::new(|_| ());
    let header = PageHeader {
        id: root(0),
        sequence: 0,
        next: INVALID_PAGE,
    };
    assert_eq!(header.next, u32::MAX);
    image.bytes[8] = 4;
    assert!(matches!(image.try_load(), Err(Error::SuperBlock { .. })));
}
