//! What a check of a blobstore finds: for each kind of damage an image that has it and nothing else, made by hand.
//! A check writes nothing. A repair corrects what can be corrected without a loss.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::BlockDevice;
use pumice_blobfs::blobstore::check::{Report, Severity, check, plan, repair};
use pumice_blobfs::blobstore::format::{
    BlobReader, BlobRecord, MapRecord, Page, SuperBlock, Xattr, decode_extent_page, encode_blob,
    encode_extent_page, seal, seal_chain,
};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, InitOptions, LoadOptions};

use Severity::{Error, Note, Repairable};

const CLUSTER: u32 = 8192;
const MD_PAGES: u32 = 64;

/// The bytes of a store that was unloaded in order.
#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
    block_size: u32,
}

/// The blobs of the image, each of which is full of a byte of its own.
struct Blobs {
    /// Three clusters.
    small: BlobId,
    /// 600 clusters, so two extent pages.
    large: BlobId,
    /// A clone of `snapshot`, with three clusters.
    clone: BlobId,
    snapshot: BlobId,
}

fn image_of(block_size: u32) -> (Image, Blobs) {
    let dev = memory(8 << 20, block_size);
    let options = InitOptions {
        cluster_size: CLUSTER,
        md_pages: Some(MD_PAGES),
        ..InitOptions::default()
    };
    let store = Blobstore::init(Arc::clone(&dev), &options).unwrap();
    let [small, large, clone] = [(3, 1), (600, 2), (3, 3)].map(|(num_clusters, byte)| {
        let options = CreateOptions {
            num_clusters,
            xattrs: vec![("name".to_owned(), format!("/{byte}\0").into_bytes())],
            ..CreateOptions::default()
        };
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
    fn sb(&self) -> SuperBlock {
        SuperBlock::decode(self.bytes[..4096].try_into().unwrap()).unwrap()
    }

    fn set_sb(&mut self, change: impl FnOnce(&mut SuperBlock)) {
        let mut sb = self.sb();
        change(&mut sb);
        self.bytes[..4096].copy_from_slice(&sb.encode()[..]);
    }

    fn page(&mut self, index: u32) -> &mut Page {
        let at = (self.sb().md_start.get() + index) as usize * 4096;
        (&mut self.bytes[at..at + 4096]).try_into().unwrap()
    }

    /// Changes a blob whose chain is its root.
    fn change(&mut self, id: BlobId, change: impl FnOnce(&mut BlobRecord)) {
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
    fn extent_pages(&mut self, id: BlobId) -> Vec<u32> {
        let mut pages = Vec::new();
        self.change(id, |record| {
            if let MapRecord::Table { entries, .. } = &record.map {
                pages.extend(entries.iter().map(|entry| entry.page));
            }
        });
        pages
    }

    fn clusters(&mut self, id: BlobId) -> Vec<u32> {
        let pages = self.extent_pages(id);
        let extents = pages.into_iter();
        extents
            .flat_map(|page| decode_extent_page(self.page(page)).unwrap().clusters)
            .collect()
    }

    /// Gives a blob of one extent page these clusters.
    fn set_clusters(&mut self, id: BlobId, clusters: &[u32]) {
        let [page] = self.extent_pages(id)[..] else {
            panic!("more than one extent page");
        };
        let page = self.page(page);
        page.copy_from_slice(&encode_extent_page(id, 0, clusters)[..]);
    }

    fn set_mark(&mut self, id: BlobId, name: &str, named: BlobId) {
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

    fn device(&self) -> Arc<dyn BlockDevice> {
        memory_with(&self.bytes, self.block_size)
    }

    /// Checks the image. That changes no byte.
    fn report(&self) -> Report {
        let dev = self.device();
        let report = check(&dev).unwrap();
        assert!(content(&dev) == self.bytes, "a check has written");
        report
    }

    /// Asserts that a check finds these, in any order, and nothing else: each text is a part of the finding's.
    fn finds(&self, expected: &[(Severity, &str)]) {
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
    fn repaired(&self) -> (Image, Vec<String>) {
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
fn assert_whole(image: &Image, blobs: &Blobs) {
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

#[test]
fn nothing_is_wrong_with_a_store_that_was_unloaded() {
    let (image, blobs) = image_of(4096);
    image.finds(&[]);
    let report = image.report();
    assert!(report.clean);
    assert_eq!(
        (report.blobs, report.snapshots, report.worst()),
        (4, 1, None)
    );
    assert_eq!(report.total_clusters, 1024);
    let own = report.used_clusters - 606;
    assert_eq!(
        own,
        u64::from((image.sb().md_start.get() + MD_PAGES).div_ceil(2))
    );
    // Four roots, and the extent pages of all but the clone, which has none of its own.
    assert_eq!((report.used_pages, report.total_pages), (8, 64));
    assert!(plan(&image.device()).unwrap().is_empty());
    assert_whole(&image, &blobs);
}

/// A mask: the pages where it begins, and the name of what it has a bit for.
fn masks(sb: &SuperBlock) -> [(u32, &'static str); 3] {
    [
        (sb.used_page_mask_start.get(), "metadata pages"),
        (sb.used_cluster_mask_start.get(), "clusters"),
        (sb.used_blobid_mask_start.get(), "blob ids"),
    ]
}

#[test]
fn masks_that_differ_from_the_metadata_are_corrected() {
    let (image, blobs) = image_of(4096);
    let last_cluster = *image.clone().clusters(blobs.small).last().unwrap();
    let free = [60, 1000, 60];
    let used = [
        blobs.large.page().unwrap(),
        last_cluster,
        blobs.large.page().unwrap(),
    ];
    for (n, (start, name)) in masks(&image.sb()).into_iter().enumerate() {
        for (bit, text) in [
            (used[n], "in use, but free in its mask"),
            (free[n], "used in its mask, but by nobody"),
        ] {
            // A page that the mask lists as a root, and that is none, counts as a damaged one.
            if (name, bit) == ("blob ids", 60) {
                continue;
            }
            let mut damaged = image.clone();
            damaged.bytes[start as usize * 4096 + 5 + bit as usize / 8] ^= 1 << (bit % 8);
            let finding = format!("1 {name} {text}: {bit}");
            damaged.finds(&[(Repairable, &finding)]);
            assert_eq!(plan(&damaged.device()).unwrap().corrected, [&finding[..]]);
            let (repaired, lines) = damaged.repaired();
            assert_eq!(lines, [format!("corrected: {finding}")]);
            assert!(repaired.bytes == image.bytes, "{finding}");
            // Beside a damaged blob it is not known whose they are.
            damaged.page(blobs.clone.page().unwrap())[100] ^= 1;
            let found = damaged.report().findings;
            let about = found
                .iter()
                .find(|f| f.text.contains(name) && f.text.contains(text));
            assert_eq!(about.unwrap().severity, Error, "{found:?}");
        }
    }
}

#[test]
fn a_mask_that_is_none_is_corrected() {
    let (image, blobs) = image_of(4096);
    for (start, name) in masks(&image.sb()) {
        let mut damaged = image.clone();
        damaged.bytes[start as usize * 4096] = 9;
        damaged.finds(&[(
            Repairable,
            "the store is marked clean, but a mask is not valid",
        )]);
        let (repaired, _) = damaged.repaired();
        assert!(repaired.bytes == image.bytes, "{name}");
        assert_whole(&repaired, &blobs);
    }
}

#[test]
fn a_store_that_was_not_unloaded_is_told_and_unloaded_by_a_repair() {
    let (image, blobs) = image_of(4096);
    let mut unclean = image.clone();
    unclean.set_sb(|sb| sb.clean = 0.into());
    unclean.finds(&[(Note, "the store was not unloaded in order")]);
    assert!(!unclean.report().clean);
    assert_eq!(plan(&unclean.device()).unwrap().corrected.len(), 1);
    let (repaired, _) = unclean.repaired();
    assert!(repaired.bytes == image.bytes);
    assert_whole(&repaired, &blobs);
}

#[test]
fn an_old_store_has_no_mask_of_blob_ids() {
    let (mut image, blobs) = image_of(4096);
    image.set_sb(|sb| sb.used_blobid_mask_len = 0.into());
    image.finds(&[(Note, "an old store without a blobid mask")]);
    assert_whole(&image, &blobs);
}

#[test]
fn a_cluster_of_two_blobs_is_an_error() {
    let (mut image, blobs) = image_of(4096);
    let (taken, mut own) = (image.clusters(blobs.large)[7], image.clusters(blobs.small));
    let lost = std::mem::replace(&mut own[1], taken);
    image.set_clusters(blobs.small, &own);
    let owners = format!(
        "cluster {taken} belongs to {} and {}",
        blobs.small, blobs.large
    );
    let leaked = format!("1 clusters used in its mask, but by nobody: {lost}");
    image.finds(&[(Error, &owners), (Repairable, &leaked)]);
    // A repair leaves them, and says so: it would have to choose an owner.
    let dev = image.device();
    repair(&dev).unwrap();
    let found = check(&dev).unwrap().findings;
    assert!(
        matches!(&found[..], [f] if f.severity == Error && f.text == owners),
        "{found:?}"
    );

    own[1] = own[0];
    image.set_clusters(blobs.small, &own);
    let twice = format!("cluster {} belongs twice to {}", own[0], blobs.small);
    image.finds(&[(Error, &twice), (Repairable, &leaked)]);
}

#[test]
fn an_extent_page_of_two_blobs_is_an_error() {
    let (mut image, blobs) = image_of(4096);
    let (own, other) = (
        image.extent_pages(blobs.small)[0],
        image.extent_pages(blobs.large)[0],
    );
    let first = decode_extent_page(image.page(other)).unwrap().clusters;
    image.change(blobs.small, |record| {
        let MapRecord::Table {
            num_clusters,
            entries,
        } = &mut record.map
        else {
            panic!("no table");
        };
        *num_clusters = 512;
        entries[0].page = other;
    });
    let both = format!("{} and {}", blobs.small, blobs.large);
    let clusters = first
        .iter()
        .map(|cluster| format!("cluster {cluster} belongs to {both}"));
    let mut texts: Vec<String> = clusters.collect();
    texts.push(format!("extent page {other} belongs to {both}"));
    let mut all: Vec<(Severity, &str)> = texts.iter().map(|text| (Error, &text[..])).collect();
    let leaked = format!("1 metadata pages used in its mask, but by nobody: {own}");
    all.extend([
        (Repairable, &leaked[..]),
        (Repairable, "3 clusters used in its mask, but by nobody"),
        (Note, "1 metadata pages hold old content that no blob names"),
    ]);
    image.finds(&all);

    // With one of the two damaged, the other is named alone.
    let mut damaged = image.clone();
    damaged.change(blobs.small, |record| {
        let MapRecord::Table { entries, .. } = &mut record.map else {
            panic!("no table");
        };
        entries.push(entries[0]);
    });
    let text = format!(
        "extent page {other} belongs to {} and to a damaged blob",
        blobs.large
    );
    let found = damaged.report().findings;
    assert!(
        found.iter().any(|f| f.severity == Error && f.text == text),
        "{found:#?}"
    );
}

#[test]
fn both_have_the_clusters_while_a_snapshot_is_made_or_removed() {
    for (mark, doing) in [("SNAPTMP", "made"), ("SNAPRM", "removed")] {
        let (mut image, blobs) = image_of(4096);
        // The clone takes the snapshot's extent page beside it.
        let page = image.extent_pages(blobs.snapshot)[0];
        let (first, _) = (image.clusters(blobs.snapshot), ());
        image.change(blobs.clone, |record| {
            let MapRecord::Table { entries, .. } = &mut record.map else {
                panic!("no table");
            };
            (entries[0].page, entries[0].count) = (page, 1);
        });
        let shared: Vec<String> = first
            .iter()
            .map(|cluster| {
                format!(
                    "cluster {cluster} belongs to {} and {}",
                    blobs.clone, blobs.snapshot
                )
            })
            .chain([format!(
                "extent page {page} belongs to {} and {}",
                blobs.clone, blobs.snapshot
            )])
            .collect();
        let shared: Vec<(Severity, &str)> = shared.iter().map(|text| (Error, &text[..])).collect();
        image.finds(&shared);
        image.set_mark(blobs.snapshot, mark, blobs.clone);
        let half = format!(
            "blob {}: a snapshot of {} that was being {doing}; the next load ends it",
            blobs.snapshot, blobs.clone
        );
        image.finds(&[(Note, &half)]);
        // The mark counts for the pair that it names only.
        image.set_mark(blobs.snapshot, mark, blobs.small);
        let mut wrong = shared.clone();
        let half = half.replace(&blobs.clone.to_string(), &blobs.small.to_string());
        wrong.push((Note, &half));
        image.finds(&wrong);
    }
}

#[test]
fn snapshots_that_are_not_there_or_form_a_loop_are_errors() {
    let (image, blobs) = image_of(4096);
    let nobody = BlobId::from_page(50);
    let mut alone = image.clone();
    alone.set_mark(blobs.clone, "SNAP", nobody);
    let text = format!(
        "blob {}: its snapshot {nobody} does not exist or is damaged",
        blobs.clone
    );
    alone.finds(&[(Error, &text)]);

    let mut of_damaged = image.clone();
    of_damaged.page(blobs.snapshot.page().unwrap())[1000] ^= 1;
    let found = of_damaged.report().findings;
    let text = format!(
        "blob {}: its snapshot {} does not exist or is damaged",
        blobs.clone, blobs.snapshot
    );
    assert!(
        found.iter().any(|f| f.severity == Error && f.text == text),
        "{found:?}"
    );

    let mut around = image.clone();
    around.set_mark(blobs.snapshot, "SNAP", blobs.clone);
    let texts =
        [blobs.clone, blobs.snapshot].map(|id| format!("blob {id}: its snapshots form a loop"));
    around.finds(&[(Error, &texts[0]), (Error, &texts[1])]);

    // A blob above the loop is told as well; a line that ends is not.
    around.set_mark(blobs.small, "SNAP", blobs.clone);
    let third = format!("blob {}: its snapshots form a loop", blobs.small);
    around.finds(&[(Error, &texts[0]), (Error, &texts[1]), (Error, &third)]);
    let mut line = image.clone();
    line.set_mark(blobs.small, "SNAP", blobs.clone);
    line.set_mark(blobs.large, "SNAP", blobs.small);
    line.finds(&[]);
    assert_eq!(line.report().snapshots, 3);
}

#[test]
fn what_is_legal_is_a_note() {
    let (image, blobs) = image_of(4096);
    let mut newer = image.clone();
    newer.change(blobs.small, |record| record.flags.invalid |= 0x100);
    let text = format!(
        "blob {}: unknown invalid_flags 0x100, it cannot be opened here",
        blobs.small
    );
    newer.finds(&[(Note, &text)]);

    let mut named = image.clone();
    named.set_sb(|sb| sb.super_blob = blobs.small.0.into());
    named.finds(&[]);
    let nobody = BlobId::from_page(50);
    named.set_sb(|sb| sb.super_blob = nobody.0.into());
    named.finds(&[(Note, &format!("the super blob {nobody} does not exist"))]);

    let mut longer = image.clone();
    longer
        .bytes
        .resize(image.bytes.len() + 5 * CLUSTER as usize, 0);
    longer.finds(&[(
        Note,
        "the device has 5 clusters more than the store; it can grow",
    )]);

    let mut old = image.clone();
    let copy = *old.page(blobs.large.page().unwrap());
    *old.page(61) = copy;
    old.page(61)[8..12].copy_from_slice(&1u32.to_le_bytes());
    seal(old.page(61));
    old.finds(&[(
        Note,
        "1 metadata pages hold old content that no blob names: 61",
    )]);

    let (small_blocks, _) = image_of(512);
    small_blocks.finds(&[(Note, "the device promises to write 512 bytes whole")]);
}

#[test]
fn what_a_cut_shrink_has_left_is_a_note() {
    let (mut image, blobs) = image_of(4096);
    let first = image.extent_pages(blobs.large)[0];
    let extents = decode_extent_page(image.page(first)).unwrap();
    let short = encode_extent_page(blobs.large, 0, &extents.clusters[..100]);
    image.page(first).copy_from_slice(&short[..]);
    let leaked = "412 clusters used in its mask, but by nobody";
    let left = format!(
        "blob {}: 1 extent pages behind its end, left by a shrink that was cut short",
        blobs.large
    );
    image.finds(&[(Repairable, leaked), (Note, &left)]);
    let (repaired, _) = image.repaired();
    assert_whole(&repaired, &blobs);
}

#[test]
fn a_damaged_blob_is_named_and_removed_by_a_repair_that_says_so() {
    let (image, blobs) = image_of(4096);
    let mut damaged = image.clone();
    damaged.page(blobs.small.page().unwrap())[3000] ^= 1;
    let text = format!("blob {} (\"/1\"): ", blobs.small);
    let found = damaged.report().findings;
    assert!(
        found
            .iter()
            .any(|f| f.severity == Error && f.text.starts_with(&text)),
        "{found:?}"
    );
    let plan = plan(&damaged.device()).unwrap();
    assert_eq!(plan.removed.len(), 1);
    assert_eq!(
        (plan.removed[0].id, plan.removed[0].name.as_deref()),
        (blobs.small, Some("/1"))
    );
    let (repaired, lines) = damaged.repaired();
    assert!(lines[0].starts_with("removed: "), "{lines:?}");
    let (before, after) = (image.report(), repaired.report());
    assert_eq!(after.blobs, 3);
    assert_eq!(before.used_clusters - after.used_clusters, 3);
    assert_eq!(before.used_pages - after.used_pages, 2);
}

#[test]
fn more_findings_than_are_listed_are_counted() {
    let dev = memory(24 << 20, 4096);
    let options = InitOptions {
        cluster_size: CLUSTER,
        md_pages: Some(MD_PAGES),
        ..InitOptions::default()
    };
    let store = Blobstore::init(Arc::clone(&dev), &options).unwrap();
    let [first, second] = [0, 1].map(|_| {
        let options = CreateOptions {
            num_clusters: 1100,
            ..CreateOptions::default()
        };
        store.create(&options).unwrap()
    });
    store.unload().unwrap();
    drop(store);
    let mut image = Image {
        bytes: content(&dev),
        block_size: 4096,
    };
    let (from, to) = (image.extent_pages(first), image.extent_pages(second));
    for (from, to) in from.into_iter().zip(to) {
        let page = *image.page(from);
        *image.page(to) = page;
    }
    let report = image.report();
    // A finding for each of the 1,100 clusters, and one for those that nobody has.
    assert_eq!(report.findings.len(), 1001);
    let last = report.findings.last().unwrap();
    assert_eq!(last.text, "101 more findings of the same kinds");
    assert_eq!((last.severity, report.worst()), (Error, Some(Error)));
}
