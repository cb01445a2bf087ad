//! Snapshots and removals of snapshots that SPDK has begun and not finished.

use super::*;

#[test]
fn snapshot_cut_before_it_was_filled() {
    // A new thin blob is marked as an incomplete snapshot and shares nothing yet.
    let mut image = Image::new(|store| {
        mark(&create(store, 4, false), 2, 7);
        create(store, 4, true);
    });
    let tmp = root(2);
    image.change(tmp, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPTMP", root(0)));
    });
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [root(0)]);
    assert_eq!(marks(&store.open(root(0)).unwrap()), [0, 0, 7, 0]);
    assert_eq!(store.free_clusters(), store.total_clusters() - 4);
}

#[test]
fn snapshot_cut_while_both_have_everything() {
    // The snapshot names the clusters and the extent pages of the blob.
    let mut image = Image::new(|store| {
        mark(&create(store, 4, false), 2, 7);
    });
    let mut copy = image.record(root(0));
    copy.id = root(40);
    copy.flags.invalid |= Flags::INTERNAL_XATTRS | Flags::THIN;
    copy.internal.push(internal("SNAPTMP", root(0)));
    image.put_record(&copy);
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [root(0)]);
    assert_eq!(marks(&store.open(root(0)).unwrap()), [0, 0, 7, 0]);
    assert_eq!(store.free_clusters(), store.total_clusters() - 4);
    // The clusters belong to the blob alone again: they are free after its deletion.
    store.delete(root(0)).unwrap();
    assert_eq!(store.free_clusters(), store.total_clusters());
    assert_eq!(store.md_pages().used, 0);
}

#[test]
fn snapshot_cut_after_the_blob_had_become_its_clone() {
    let (mut image, blob, snapshot) = with_snapshot();
    image.change(snapshot, |record| {
        record.flags.data_ro = 0;
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPTMP", blob));
    });
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [blob, snapshot]);
    let kept = store.open(snapshot).unwrap();
    assert!(kept.is_read_only());
    assert_eq!(marks(&kept), [1, 1, 1, 0]);
    assert_eq!(
        store.open(blob).unwrap().parent(),
        Parent::Snapshot(snapshot)
    );
    assert_eq!(marks(&store.open(blob).unwrap()), [1, 2, 1, 0]);
}

#[test]
fn removal_cut_after_the_mark() {
    let (mut image, blob, snapshot) = with_snapshot();
    image.change(snapshot, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPRM", blob));
    });
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [blob, snapshot]);
    assert!(store.open(snapshot).unwrap().is_read_only());
    assert_eq!(marks(&store.open(blob).unwrap()), [1, 2, 1, 0]);
    store.delete(snapshot).unwrap();
    assert_eq!(marks(&store.open(blob).unwrap()), [1, 2, 1, 0]);
}

#[test]
fn removal_cut_after_the_clones_extent_pages() {
    // SPDK rewrites the clone's extent pages in place before its root: both have the clusters, and
    // the clone's parent is still the snapshot. No write to the clone may reach the snapshot.
    let (mut image, blob, snapshot) = with_snapshot();
    image.change(snapshot, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPRM", blob));
    });
    let page_of = |image: &Image, id| match image.record(id).map {
        MapRecord::Table { entries, .. } => entries[0].page,
        MapRecord::Rle(_) => panic!("an extent table was made"),
    };
    let theirs = decode_extent_page(&image.page(page_of(&image, snapshot)))
        .unwrap()
        .clusters;
    let own = page_of(&image, blob);
    let mut clusters = decode_extent_page(&image.page(own)).unwrap().clusters;
    clusters[0] = theirs[0];
    clusters[2] = theirs[2];
    image.put(own, *encode_extent_page(blob, 0, &clusters));
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [blob, snapshot]);
    let clone = store.open(blob).unwrap();
    assert_eq!(marks(&clone), [1, 2, 1, 0]);
    mark(&clone, 0, 9);
    assert_eq!(marks(&store.open(snapshot).unwrap()), [1, 1, 1, 0]);
    assert_eq!(marks(&clone), [9, 2, 1, 0]);
}

#[test]
fn removal_cut_after_the_clones_root() {
    let (mut image, blob, snapshot) = with_snapshot();
    // The clone names the snapshot's clusters and has no parent.
    let (theirs, own) = (image.record(snapshot), image.record(blob));
    let (
        MapRecord::Table {
            entries: theirs, ..
        },
        MapRecord::Table { entries: own, .. },
    ) = (theirs.map, own.map)
    else {
        panic!("extent tables were made");
    };
    let from = decode_extent_page(&image.page(theirs[0].page))
        .unwrap()
        .clusters;
    let mut clusters = decode_extent_page(&image.page(own[0].page))
        .unwrap()
        .clusters;
    clusters[0] = from[0];
    clusters[2] = from[2];
    image.put(own[0].page, *encode_extent_page(blob, 0, &clusters));
    image.change(blob, |record| {
        record.internal.clear();
        record.flags.invalid &= !Flags::INTERNAL_XATTRS;
    });
    image.change(snapshot, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPRM", blob));
    });
    image.check_legal();
    let store = image.load();
    assert_eq!(store.blobs(), [blob]);
    assert_eq!(marks(&store.open(blob).unwrap()), [1, 2, 1, 0]);
    assert_eq!(store.free_clusters(), store.total_clusters() - 3);
    store.delete(blob).unwrap();
    assert_eq!(store.free_clusters(), store.total_clusters());
}

#[test]
fn a_mark_that_names_nobody_is_left_alone() {
    let (mut image, blob, snapshot) = with_snapshot();
    image.change(snapshot, |record| {
        record.flags.invalid |= Flags::INTERNAL_XATTRS;
        record.internal.push(internal("SNAPTMP", root(77)));
    });
    let before = image.record(snapshot);
    let store = image.load();
    assert_eq!(store.blobs(), [blob, snapshot]);
    assert_eq!(marks(&store.open(blob).unwrap()), [1, 2, 1, 0]);
    store.unload().unwrap();
    let after = Image {
        bytes: content(store.device()),
        md_start: image.md_start,
    };
    assert_eq!(after.record(snapshot), before);
}
