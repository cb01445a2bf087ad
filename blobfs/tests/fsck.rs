//! What a check of a blobstore finds: for each kind of damage an image that has it and nothing else, made by hand.
//! A check writes nothing. A repair corrects what can be corrected without a loss.

mod common;
#[path = "fsck/image.rs"]
mod image;

use std::sync::Arc;

use common::*;
use image::*;
use pumice_blobfs::blobstore::check::{Finding, Severity, check, plan, repair};
use pumice_blobfs::blobstore::format::{
    MapRecord, SuperBlock, decode_extent_page, encode_extent_page, seal,
};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, InitOptions};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};

use Severity::{Error, Note, Repairable};

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
fn a_cluster_that_is_not_for_data_damages_the_blob() {
    let (image, blobs) = image_of(4096);
    // The super block's and the metadata's, the first one behind the store, and none at all.
    let md_end = (image.sb().md_start.get() + MD_PAGES).div_ceil(2);
    for cluster in [1, md_end - 1, 1024, u32::MAX, 0] {
        let mut damaged = image.clone();
        let mut own = damaged.clusters(blobs.small);
        own[2] = cluster;
        damaged.set_clusters(blobs.small, &own);
        let report = damaged.report();
        let text = format!("blob {} (\"/1\"): ", blobs.small);
        let is_it =
            |finding: &&Finding| finding.severity == Error && finding.text.starts_with(&text);
        assert!(
            report.findings.iter().any(|f| is_it(&f)),
            "{cluster}: {:#?}",
            report.findings
        );
        assert_eq!(report.blobs, 3, "{cluster}");
    }
    // The first one and the last one for data are.
    for cluster in [md_end, 1023] {
        let mut moved = image.clone();
        let mut own = moved.clusters(blobs.small);
        own[2] = cluster;
        moved.set_clusters(blobs.small, &own);
        assert_eq!(moved.report().blobs, 4, "{cluster}");
    }
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
fn a_torn_super_block_is_a_note() {
    let (image, blobs) = image_of(4096);
    let mut torn = image.clone();
    torn.set_sb(|sb| {
        sb.clean = 0.into();
        sb.super_blob = blobs.small.0.into();
    });
    // The copy is where the page mask begins, and the end of the page is the old one.
    let mask = torn.sb().used_page_mask_start.get() as usize * 4096;
    torn.bytes.copy_within(..4096, mask);
    torn.bytes[512..4096].copy_from_slice(&image.bytes[512..4096]);
    torn.finds(&[
        (Note, "the super block was torn while it was changed; its copy is used, and the next load puts it back"),
        (Note, "the store was not unloaded in order"),
    ]);
    let (repaired, _) = torn.repaired();
    assert_eq!(repaired.sb().super_blob(), Some(blobs.small));
    assert_whole(&repaired, &blobs);
}

#[test]
fn what_the_journal_has_is_told() {
    let dev = memory(32 << 20, 512);
    let mut format = FormatOptions::default();
    format.journal = Journal::Bytes(1 << 20);
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    let killed = |change: &dyn Fn(&FileSystem) -> Option<File>| {
        let dev = memory_with(&content(&dev), 512);
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        let open = change(&fs);
        let bytes = content(&dev);
        drop(open);
        fs.unmount().unwrap();
        Image {
            bytes,
            block_size: 512,
        }
    };
    let in_order = Image {
        bytes: content(&dev),
        block_size: 512,
    };
    // A journal makes torn pages whole, so there is nothing to say of them.
    in_order.finds(&[]);
    let unloaded = (Note, "the store was not unloaded in order");
    let pages = "metadata pages are in the journal and not in place; the next load puts them there";
    let changed = killed(&|fs| {
        fs.mkdir("/d").unwrap();
        None
    });
    changed.finds(&[unloaded, (Note, pages)]);
    let carried = killed(&|fs| {
        let file = fs.open("/f", OpenOptions::CREATE).unwrap();
        for _ in 0..2 {
            file.append(&[5; 100]).unwrap();
            file.sync().unwrap();
        }
        Some(file)
    });
    let blocks =
        "blocks of blobs are in the journal and not in place; the next load puts them there";
    carried.finds(&[unloaded, (Note, pages), (Note, blocks)]);
    let (repaired, _) = carried.repaired();
    let fs = FileSystem::mount(repaired.device(), &MountOptions::default()).unwrap();
    assert_eq!(fs.stat("/f").unwrap().len, 200);
    fs.unmount().unwrap();
    // Another program gave the journal's blob away.
    let mut given = in_order.clone();
    let start = given.sb().md_start.get();
    let ring = u64::from_le_bytes(given.bytes[104..112].try_into().unwrap());
    let root = BlobId(ring).page().expect("the id of the journal's blob");
    given.bytes[(start + root) as usize * 4096..][..4096].fill(0);
    let found = given.report().findings;
    let text = "the journal's blob is not as the super block has it: the next load goes on without the journal";
    assert!(
        found.iter().any(|f| f.severity == Note && f.text == text),
        "{found:#?}"
    );
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
    let options = InitOptions::default()
        .cluster_size(CLUSTER)
        .md_pages(Some(MD_PAGES));
    let store = Blobstore::init(Arc::clone(&dev), &options).unwrap();
    let [first, second] = [0, 1].map(|_| {
        let options = CreateOptions::default().num_clusters(1100);
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
