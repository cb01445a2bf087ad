//! Tests of damage and read errors, most of all after an unclean stop: blobs that could not be read
//! are reported and kept, and their space is not given to others.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::check::{Severity, apply, check, plan, repair};
use pumice_blobfs::blobstore::format::{decode_extent_page, encode_extent_page};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};

const CLUSTER: u64 = 8192;

/// Makes a store of three blobs that was not unloaded. Returns its bytes and the blobs.
fn unclean() -> (Vec<u8>, Vec<BlobId>, u64) {
    let dev = memory(8 << 20, 4096);
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(64));
    let store = Blobstore::init(Arc::clone(&dev), &opts).unwrap();
    store.unload().unwrap();
    drop(store);
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    let md_start = store.super_block().md_start.get();
    let ids = (0..3u8)
        .map(|i| {
            let opts = CreateOptions::default()
                .num_clusters(if i == 1 { 600 } else { 3 })
                .xattrs(vec![(
                    "name".to_owned(),
                    format!("/file{i}\0").into_bytes(),
                )]);
            let id = store.create(&opts).unwrap();
            write(&store.open(id).unwrap(), 0, &[i + 1; 8192]);
            id
        })
        .collect();
    drop(store);
    (content(&dev), ids, u64::from(md_start) * 4096)
}

fn load(dev: &Arc<dyn BlockDevice>) -> Blobstore {
    Blobstore::load(Arc::clone(dev), &LoadOptions::default()).unwrap()
}

fn one_cluster() -> CreateOptions {
    CreateOptions::default().num_clusters(1)
}

/// Asserts that the store has one damaged blob, `id`, and that nothing is allocated or given away.
fn assert_held(store: &Blobstore, id: BlobId, what: &str) {
    let damaged: Vec<BlobId> = store.damaged().into_iter().map(|(id, _)| id).collect();
    assert_eq!(damaged, [id], "{what}");
    assert!(
        matches!(store.create(&one_cluster()), Err(Error::Held(held)) if held == id),
        "{what}"
    );
    // This one would take a page and no cluster.
    let empty = store.create(&CreateOptions::default());
    assert!(
        matches!(empty, Err(Error::Held(held)) if held == id),
        "{what}"
    );
    assert_eq!(store.free_clusters(), 0, "{what}");
    assert!(
        matches!(store.open(id), Err(Error::Damaged { .. })),
        "{what}"
    );
}

fn root_offset(md: u64, id: BlobId) -> usize {
    usize::try_from(md + u64::from(id.page().unwrap()) * 4096).unwrap()
}

#[test]
fn a_damaged_root_is_reported_and_kept_after_an_unclean_stop() {
    let (bytes, ids, md) = unclean();
    let root = root_offset(md, ids[1]);
    // The bytes are the page's id, its sequence number, descriptors, the unused rest, next and crc.
    for at in [0, 1, 2, 4, 7, 8, 16, 17, 40, 300, 3000, 4088, 4092, 4095] {
        let what = format!("byte {at} changed");
        let mut changed = bytes.clone();
        changed[root + at] ^= 0x41;
        let dev = memory_with(&changed, 4096);
        let report = check(&dev).unwrap();
        assert_eq!(report.worst(), Some(Severity::Error), "{what}");
        let store = load(&dev);
        assert_held(&store, ids[1], &what);
        let blob = store.open(ids[2]).unwrap();
        assert_eq!(read(&blob, 0, 4096), [3; 4096], "{what}");
        // Operations that need no space work, and an unload does not mark the store clean.
        write(&blob, 4096, &[9; 4096]);
        drop(blob);
        store.delete(ids[0]).unwrap();
        store.unload().unwrap();
        drop(store);
        let store = load(&dev);
        assert_held(&store, ids[1], &what);
        drop(store);
        // With the original byte the blob is there completely.
        let mut healed = content(&dev);
        healed[root + at] ^= 0x41;
        let store = load(&memory_with(&healed, 4096));
        assert_eq!(store.damaged(), []);
        assert_eq!(read(&store.open(ids[1]).unwrap(), 0, 8192), [2; 8192]);
    }
}

#[test]
fn a_page_that_cannot_be_read_is_tried_again_and_then_kept() {
    let (bytes, ids, md) = unclean();
    // The root, and the first and the last extent page of the long blob.
    let root = u64::from(ids[1].page().unwrap());
    let pages = (0..64).filter(|page| {
        let at = usize::try_from(md + page * 4096).unwrap();
        let id = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        *page == root || (id == ids[1].0 && bytes[at + 16] == 6)
    });
    let pages: Vec<u64> = pages.collect();
    assert_eq!(pages.len(), 3, "{pages:?}");
    for page in pages {
        for count in [1, 3, 4, 1_000_000] {
            let base = memory_with(&bytes, 4096);
            let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
            dev.inject(
                Injection::new(Failure::Fail)
                    .op(Some(OpKind::Read))
                    .count(count)
                    .range(Some((md / 4096 + page, 1))),
            );
            let faulty: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
            let store = load(&faulty);
            if count < 5 {
                assert_eq!(store.damaged(), [], "page {page}, {count} errors");
                continue;
            }
            assert_held(&store, ids[1], &format!("page {page} unreadable"));
            drop(store);
            dev.clear();
            // The medium works again: everything is there, and nobody else has any of it.
            let store = load(&faulty);
            assert_eq!(store.damaged(), []);
            let blob = store.open(ids[1]).unwrap();
            assert_eq!(read(&blob, 0, 8192), [2; 8192]);
            assert_eq!(blob.num_allocated(), 600);
            assert_eq!(check(&base).unwrap().worst(), None);
        }
    }
}

#[test]
fn a_root_whose_beginning_is_gone_is_known_by_the_old_masks() {
    let (bytes, ids, md) = unclean();
    let dev = memory_with(&bytes, 4096);
    let store = load(&dev);
    store.unload().unwrap();
    drop(store);
    let store = load(&dev);
    store.set_super_blob(Some(ids[0])).unwrap();
    drop(store);
    let mut changed = content(&dev);
    changed[root_offset(md, ids[1])..][..512].fill(0);
    assert_held(
        &load(&memory_with(&changed, 4096)),
        ids[1],
        "first sector gone",
    );
}

/// Makes a store with a journal on a device with a volatile cache. One of its three blobs has been damaged since the last orderly
/// unload. Returns also the place of the first blob's root on the device.
fn held_with_a_journal() -> (CrashDevice, Vec<BlobId>, usize) {
    let dev = CrashDevice::new(4096, (8 << 20) / 4096, true, 1);
    let opts = InitOptions::default()
        .cluster_size(8192)
        .md_pages(Some(64))
        .journal(Some(128 << 10));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let ids: Vec<BlobId> = (0..3)
        .map(|_| store.create(&one_cluster().extent_table(false)).unwrap())
        .collect();
    store.unload().unwrap();
    drop(store);
    let as_device: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let store = load(&as_device);
    let md = u64::from(store.super_block().md_start.get()) * 4096;
    set(&store, ids[0], 1);
    drop(store);
    let root = root_offset(md, ids[1]) as u64 / 4096;
    let ch = AsyncChannel::new(as_device.open_channel().unwrap());
    let mut page = DmaBuf::zeroed(4096).unwrap();
    page[..8].copy_from_slice(&ids[1].0.to_le_bytes());
    ch.block_on(ch.write(root, page.freeze(), true)).unwrap();
    (dev, ids.clone(), root_offset(md, ids[0]))
}

fn set(store: &Blobstore, id: BlobId, byte: u8) {
    let blob = store.open(id).unwrap();
    let mut all = store.transaction();
    all.set_xattr(&blob, "v", &[byte; 100]);
    all.commit().unwrap();
}

/// An unload beside a damaged blob leaves the store marked as not unloaded in order. It puts everything in place nevertheless, and
/// makes it durable.
#[test]
fn an_unload_beside_a_damaged_blob_leaves_nothing_behind() {
    let (crash, ids, root) = held_with_a_journal();
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let as_device: Arc<dyn BlockDevice> = dev.clone();
    let store = load(&as_device);
    assert_held(&store, ids[1], "before");
    // This one would take a cluster and no page.
    let grown = store.open(ids[0]).unwrap().resize(2);
    assert!(matches!(grown, Err(Error::Held(held)) if held == ids[1]));
    set(&store, ids[0], 7);
    let page = Some((root as u64 / 4096, 1));
    let bad = Injection::new(Failure::Fail).op(Some(OpKind::Write));
    dev.inject(bad.count(u64::MAX).range(page));
    assert!(matches!(store.unload(), Err(Error::Owed(_))));
    dev.clear();
    store.unload().unwrap();
    drop(store);
    let bytes = content(&as_device);
    assert!(bytes[root..][..4096].windows(100).any(|w| w == [7; 100]));
    // The journal has nothing that would be flushed for its own sake.
    let store = load(&as_device);
    write(&store.open(ids[2]).unwrap(), 0, &[9; 4096]);
    store.unload().unwrap();
    drop(store);
    // The power is cut, and nothing is left in the cache.
    let cut = crash.image_after(crash.len_events(), &mut |_| false);
    let cut: Arc<dyn BlockDevice> = Arc::new(CrashDevice::from_image(4096, cut, true, 1));
    let store = load(&cut);
    assert_held(&store, ids[1], "after");
    assert_eq!(read(&store.open(ids[2]).unwrap(), 0, 4096), [9; 4096]);
}

#[test]
fn deleting_the_damaged_blob_lets_allocation_go_on() {
    let (bytes, ids, md) = unclean();
    let mut changed = bytes;
    changed[root_offset(md, ids[1]) + 3000] ^= 1;
    let dev = memory_with(&changed, 4096);
    let store = load(&dev);
    assert_held(&store, ids[1], "before");
    assert!(store.delete_damaged(ids[0]).is_err());
    store.delete(ids[1]).unwrap();
    assert_eq!(store.damaged(), []);
    assert_eq!(store.free_clusters(), store.total_clusters() - 6);
    assert_eq!(store.md_pages().used, 4);
    let id = store.create(&one_cluster()).unwrap();
    assert_eq!(read(&store.open(id).unwrap(), 0, 8192), vec![0; 8192]);
    store.unload().unwrap();
    drop(store);
    assert_eq!(check(&dev).unwrap().worst(), None);
    let bytes = content(&dev);
    strict::parse_of(&bytes, "after the deletion");
}

/// The clusters that a damaged blob may have are not taken for more metadata pages either.
/// A shrink that was cut has left an extent page and clusters behind the end of a blob. They are still that blob's when the
/// damaged one beside it is deleted.
#[test]
fn what_a_cut_shrink_has_left_is_not_freed_with_a_damaged_blob() {
    let (mut bytes, ids, md) = unclean();
    let start = usize::try_from(md).unwrap();
    let mut shrunk = 0;
    for page in bytes[start..].chunks_exact_mut(4096).take(64) {
        let is_of_blob = page[..8] == ids[1].0.to_le_bytes();
        let extents = decode_extent_page((&page[..]).try_into().unwrap());
        if let (true, Ok(extents)) = (is_of_blob, extents)
            && extents.start == 0
        {
            let short = encode_extent_page(ids[1], 0, &extents.clusters[..100]);
            page.copy_from_slice(&short[..]);
            shrunk += 1;
        }
    }
    assert_eq!(shrunk, 1);
    bytes[root_offset(md, ids[0]) + 3000] ^= 1;
    let dev = memory_with(&bytes, 4096);
    let store = load(&dev);
    assert_held(&store, ids[0], "before");
    store.delete(ids[0]).unwrap();
    let all = CreateOptions::default().num_clusters(store.free_clusters());
    store.create(&all).unwrap();
    while store.create(&CreateOptions::default()).is_ok() {}
    store.unload().unwrap();
    let report = check(&dev).unwrap();
    assert_eq!(report.worst(), None, "{:?}", report.findings);
}

#[test]
fn the_metadata_does_not_grow_beside_a_damaged_blob() {
    let (bytes, ids, md) = unclean();
    // All pages of the long blob, so that nothing shows which clusters it has.
    let start = usize::try_from(md).unwrap();
    let id = ids[1].0.to_le_bytes();
    let pages: Vec<usize> = (0..64)
        .map(|page| start + page * 4096)
        .filter(|at| bytes[*at..at + 8] == id)
        .collect();
    assert!(pages.len() > 1, "{pages:?}");
    let toggle = |bytes: &mut [u8]| pages.iter().for_each(|at| bytes[at + 3000] ^= 1);
    let mut changed = bytes;
    toggle(&mut changed);
    let dev = memory_with(&changed, 4096);
    let store = load(&dev);
    assert_held(&store, ids[1], "before");
    let grown = store.grow_md_pages(200);
    assert!(
        matches!(grown, Err(Error::Held(id)) if id == ids[1]),
        "{grown:?}"
    );
    drop(store);
    // With the original bytes the blob is there completely.
    let mut healed = content(&dev);
    toggle(&mut healed);
    let store = load(&memory_with(&healed, 4096));
    assert_eq!(store.damaged(), []);
    let blob = store.open(ids[1]).unwrap();
    assert_eq!(blob.num_allocated(), 600);
    assert_eq!(read(&blob, 0, 8192), [2; 8192]);
}

#[test]
fn a_repair_says_first_what_it_gives_up() {
    let (bytes, ids, md) = unclean();
    for at in [200, 3000] {
        let mut changed = bytes.clone();
        changed[root_offset(md, ids[1]) + at] ^= 1;
        let dev = memory_with(&changed, 4096);
        let planned = plan(&dev).unwrap();
        assert_eq!(content(&dev), changed, "a plan writes nothing");
        assert_eq!(planned.removed.len(), 1);
        assert_eq!(planned.removed[0].id, ids[1]);
        assert_eq!(planned.removed[0].name.as_deref(), Some("/file1"));
        let lines = planned.lines();
        assert!(lines[0].contains("/file1"), "{lines:?}");
        let done = apply(&dev, &planned).unwrap();
        assert!(done[0].contains("/file1"), "{done:?}");
        let report = check(&dev).unwrap();
        assert_eq!((report.worst(), report.clean), (None, true));
        let store = load(&dev);
        assert_eq!(store.free_clusters(), store.total_clusters() - 6);
        assert!(plan(&dev).unwrap().is_empty());
    }
}

#[test]
fn a_repair_does_not_go_beyond_its_plan() {
    let (bytes, ids, md) = unclean();
    let mut changed = bytes;
    changed[root_offset(md, ids[1]) + 3000] ^= 1;
    let planned = plan(&memory_with(&changed, 4096)).unwrap();
    changed[root_offset(md, ids[2]) + 3000] ^= 1;
    let dev = memory_with(&changed, 4096);
    assert!(matches!(
        apply(&dev, &planned),
        Err(Error::DamagedStore { .. })
    ));
    assert_eq!(content(&dev), changed);
    repair(&dev).unwrap();
    assert_eq!(load(&dev).blobs(), [ids[0]]);
}

/// Makes a file system that was not unmounted, with a damaged root of `/log`.
fn damaged_file_system(clean: bool) -> Vec<u8> {
    let dev = memory(32 << 20, 4096);
    // Without a journal: it would make the page whole.
    let mut format = FormatOptions::default();
    format.journal = Journal::None;
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
    for name in ["/log", "/other"] {
        let file = fs.open(name, OpenOptions::CREATE).unwrap();
        file.append(&[7; 10_000]).unwrap();
        file.sync().unwrap();
    }
    let root = fs.stat("/log").unwrap().blob_id.unwrap();
    let md = u64::from(fs.blobstore().super_block().md_start.get()) * 4096;
    let unclean = content(&dev);
    fs.unmount().unwrap();
    drop(fs);
    let mut bytes = if clean { content(&dev) } else { unclean };
    bytes[root_offset(md, root) + 2000] ^= 1;
    bytes
}

#[test]
fn a_damaged_file_system_is_mounted_for_reading_only() {
    for clean in [false, true] {
        let bytes = damaged_file_system(clean);
        let dev = memory_with(&bytes, 4096);
        let error = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap_err();
        assert!(matches!(error, FsError::Damaged { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("/log") && text.contains("accept_damage"),
            "{text}"
        );
        assert_eq!(content(&dev), bytes, "a refused mount writes nothing");

        let mut opts = MountOptions::default();
        opts.read_only = true;
        let fs = FileSystem::mount(Arc::clone(&dev), &opts).unwrap();
        let mut out = vec![0; 10_000];
        fs.open("/other", OpenOptions::READ)
            .unwrap()
            .read_at(0, &mut out)
            .unwrap();
        assert_eq!(out, [7; 10_000]);
        assert_eq!(fs.problems().len(), 1);
        fs.unmount().unwrap();
        drop(fs);
        assert_eq!(content(&dev), bytes);

        let mut opts = MountOptions::default();
        opts.accept_damage = true;
        let fs = FileSystem::mount(Arc::clone(&dev), &opts).unwrap();
        assert!(!fs.exists("/log").unwrap());
        assert_eq!(fs.blobstore().damaged().len(), 1);
        fs.unlink("/other").unwrap();
        let made = fs.open("/new", OpenOptions::CREATE);
        assert_eq!(
            made.is_ok(),
            clean,
            "space is given away only where masks tell what is free"
        );
        drop(made);
        fs.unmount().unwrap();
        drop(fs);

        repair(&dev).unwrap();
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        let file = fs.open("/after", OpenOptions::CREATE).unwrap();
        file.append(b"x").unwrap();
        file.sync().unwrap();
        assert_eq!(fs.problems(), &[] as &[String]);
    }
}

/// The masks of a store that was unloaded in order show what a damaged blob has.
#[test]
fn a_clean_store_goes_on_beside_a_damaged_blob() {
    let (bytes, ids, md) = unclean();
    let dev = memory_with(&bytes, 4096);
    load(&dev).unload().unwrap();
    let mut changed = content(&dev);
    changed[root_offset(md, ids[0]) + 3000] ^= 1;
    let dev = memory_with(&changed, 4096);
    let store = load(&dev);
    assert_eq!(store.damaged().len(), 1);
    let free = store.free_clusters();
    assert_eq!(free, store.total_clusters() - 606);
    let id = store.create(&one_cluster()).unwrap();
    assert_eq!(read(&store.open(id).unwrap(), 0, 4096), [0; 4096]);
    store.unload().unwrap();
    drop(store);
    let given_up = load(&memory_with(&content(&dev), 4096));
    let used = given_up.md_pages().used;
    given_up.delete_damaged(ids[0]).unwrap();
    assert_eq!(
        (given_up.md_pages().used, given_up.damaged()),
        (used - 1, vec![])
    );
    changed = content(&dev);
    changed[root_offset(md, ids[0]) + 3000] ^= 1;
    let store = load(&memory_with(&changed, 4096));
    assert_eq!(
        read(&store.open(ids[0]).unwrap(), 0, 2 * 4096),
        [1; 2 * 4096]
    );
    assert_eq!(store.open(ids[0]).unwrap().len_bytes(), 3 * CLUSTER);
}

/// The place of the first block that is full of this byte.
fn block_of(dev: &Arc<dyn BlockDevice>, byte: u8) -> Option<usize> {
    let bytes = content(dev);
    bytes
        .chunks(4096)
        .position(|block| block.iter().all(|b| *b == byte))
}

/// A damaged blob may hold clusters of another one, as a snapshot does while it is made or removed.
#[test]
fn what_is_freed_beside_a_damaged_blob_is_not_cleared() {
    let (bytes, ids, md) = unclean();
    for damaged in [false, true] {
        let mut bytes = bytes.clone();
        if damaged {
            bytes[root_offset(md, ids[1]) + 40] ^= 0x41;
        }
        let dev = memory_with(&bytes, 4096);
        let store = load(&dev);
        assert!(block_of(&dev, 1).is_some());
        store.delete(ids[0]).unwrap();
        assert_eq!(block_of(&dev, 1).is_some(), damaged);
    }
}

#[test]
fn the_pages_of_a_deleted_blob_are_cleared() {
    let (bytes, ids, md) = unclean();
    let dev = memory_with(&bytes, 4096);
    let store = load(&dev);
    let len = usize::try_from(store.md_pages().total).unwrap() * 4096;
    let start = usize::try_from(md).unwrap();
    let used = |dev: &Arc<dyn BlockDevice>| {
        let region = &content(dev)[start..start + len];
        region
            .chunks(4096)
            .filter(|page| page.iter().any(|b| *b != 0))
            .count()
    };
    assert_eq!(used(&dev) as u64, store.md_pages().used);
    // Its map of 600 clusters has pages of its own, and so have its xattrs.
    let blob = store.open(ids[1]).unwrap();
    blob.set_xattr("long", &[7; 4000]).unwrap();
    blob.sync_md().unwrap();
    drop(blob);
    assert_eq!(used(&dev) as u64, store.md_pages().used);
    assert!(store.md_pages().used > 4);
    for id in ids {
        store.delete(id).unwrap();
    }
    assert_eq!(used(&dev), 0);
}
