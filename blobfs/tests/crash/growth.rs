//! Power cuts while a store grows, and a growth that fails.

use super::*;

#[test]
fn grow() {
    for write_cache in [false, true] {
        let (base, _) = setup(true);
        let mut bytes = base.to_vec();
        bytes.resize(bytes.len() + (1 << 20), 0);
        let dev = device(CrashImage::from_bytes(&bytes), write_cache, 7);
        let store = load(&dev);
        let old = describe(&store);
        assert_eq!(store.grow().unwrap(), 128);
        let new = describe(&store);
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            for all in [false, true] {
                state_after(&points.image(&mut |_| all), &[&old, &new], "grow");
            }
        }
    }
}

/// Describes everything except the counts, which a growth of the metadata changes.
fn blobs_of(store: &Blobstore) -> Vec<String> {
    let mut lines = describe(store);
    lines.pop();
    lines
}

/// Cuts the power everywhere in a growth of the metadata region: the same blobs have the same ids
/// before and after, whatever part of the writes that are not durable is lost, and after a second
/// cut during the repair.
fn cut_growth(name: &str, base: &CrashImage, op: impl Fn(&Blobstore), moves: bool) {
    for (block_size, tear_bytes, write_cache) in
        [(4096, 4096, false), (4096, 4096, true), (512, 512, true)]
    {
        let options = CrashOptions::default()
            .block_size(block_size)
            .write_cache(write_cache)
            .seed(7)
            .tear_bytes(tear_bytes);
        let on = |image: CrashImage| CrashDevice::with_options(&options, image);
        let dev = on(base.clone());
        let store = load(&dev);
        let (old, md_start, md_len) = {
            let sb = store.super_block();
            (blobs_of(&store), sb.md_start.get(), sb.md_len.get())
        };
        op(&store);
        assert_eq!(blobs_of(&store), old, "{name}: in memory");
        let sb = store.super_block();
        assert!(sb.md_len.get() > md_len || !moves, "{name}");
        assert_eq!(sb.md_start.get() != md_start, moves, "{name}");
        let mut rng = SmallRng::seed_from_u64(3);
        let (mut states, mut grown) = (0, 0);
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            let rounds = if points.unsettled().is_empty() { 1 } else { 6 };
            for round in 0..rounds {
                let image = points.image(&mut |_| match round {
                    0 => false,
                    1 => true,
                    _ => rng.random_bool(0.5),
                });
                let what = format!("{name}, {options:?}, {} round {round}", points.position());
                let first = on(image.clone());
                let store = load(&first);
                assert_eq!(blobs_of(&store), old, "{what}");
                grown += u32::from(store.super_block().md_len.get() != md_len);
                // A second growth is cut once more.
                op(&store);
                drop(store);
                let mut second = first.crash_points();
                while second.advance().is_some() {
                    if rng.random_bool(0.2) {
                        let image = second.image(&mut |_| rng.random_bool(0.5));
                        assert_eq!(blobs_of(&load(&on(image))), old, "{what}, second cut");
                        states += 1;
                    }
                }
                state_of(&image, &old, tear_bytes, &what);
                states += 1;
            }
        }
        println!("{name}: {states} states, {grown} of them grown");
        assert!(states > 10 && grown > 0, "{name}");
    }
}

/// Checks as [`state_after`] does, for a store whose counts may be the old or the new ones.
fn state_of(image: &CrashImage, old: &[String], tear_bytes: u32, what: &str) {
    if tear_bytes == 4096 {
        strict::parse_of(&image.to_vec(), what);
    }
    let dev = device(image.clone(), false, 0);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let report = check(&as_dyn).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(report.worst(), None, "{what}: {:?}", report.findings);
    let store = load(&dev);
    // All free clusters and pages can be allocated, and none of them belongs to anybody.
    let clusters = store.free_clusters();
    let more = CreateOptions::default()
        .num_clusters(clusters)
        .extent_table(false);
    let id = store.create(&more).unwrap();
    assert!(
        whole(&store.open(id).unwrap())
            .iter()
            .all(|byte| *byte == 0),
        "{what}"
    );
    let pages = store.md_pages();
    let small: Vec<BlobId> = (pages.used..pages.total)
        .map(|_| store.create(&CreateOptions::default()).unwrap())
        .collect();
    store.unload().unwrap();
    strict::parse_of(&dev.image().to_vec(), what);
    let store = load(&dev);
    for id in small.into_iter().chain([id]) {
        store.delete(id).unwrap();
    }
    assert_eq!(blobs_of(&store), old, "{what}");
}

#[test]
fn grow_of_the_metadata_by_a_move() {
    for table in [true, false] {
        let (base, _) = setup(table);
        cut_growth(
            "move",
            &base,
            |store| {
                store.grow_md_pages(200).unwrap();
                assert!(store.md_pages().total >= 200);
            },
            true,
        );
    }
}

/// When a write fails anywhere in a growth, the store goes on as it was, and a load finds the same
/// blobs.
#[test]
fn a_growth_of_the_metadata_that_fails_changes_nothing() {
    use pumice_bdev::OpKind;
    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    let (base, _) = setup(true);
    let mut failed = 0;
    // This is the super block, then places of the new region.
    for lba in [0, 300, 320, 340, 360, 400] {
        let crash = device(base.clone(), true, 7);
        let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
        let as_dyn: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
        let store = Blobstore::load(as_dyn, &LoadOptions::default()).unwrap();
        let old = blobs_of(&store);
        let pages = store.md_pages();
        dev.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Write))
                .count(1000)
                .range(Some((lba, 4))),
        );
        let grown = store.grow_md_pages(200);
        dev.clear();
        if grown.is_err() {
            failed += 1;
            assert_eq!(store.md_pages(), pages, "{lba}");
        }
        assert_eq!(blobs_of(&store), old, "{lba}");
        let id = store.create(&CreateOptions::default()).unwrap();
        store.delete(id).unwrap();
        store.grow_md_pages(200).unwrap();
        store.unload().unwrap();
        assert_eq!(blobs_of(&load(&crash)), old, "{lba}");
        strict::parse_of(&crash.image().to_vec(), "a failed growth");
    }
    assert!(failed > 0);
}

#[test]
fn grow_of_the_metadata_in_place() {
    // Free clusters follow an empty store's region.
    let dev = device(CrashImage::zeroed(4 << 20), false, 0);
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(20));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    store.create(&CreateOptions::default()).unwrap();
    store.unload().unwrap();
    cut_growth(
        "in place",
        &dev.image(),
        |store| {
            store.grow_md_pages(100).unwrap();
            assert!(store.md_pages().total >= 100);
        },
        false,
    );
}

/// When a device grows so much that the cluster mask has no room, masks and region move too.
#[test]
fn grow_that_moves_the_masks() {
    let dev = device(CrashImage::zeroed(4 << 20), false, 0);
    let opts = InitOptions::default().cluster_size(4096).md_pages(Some(80));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let id = store
        .create(&CreateOptions::default().num_clusters(700))
        .unwrap();
    write(&store.open(id).unwrap(), 4096 * 600, &[3; 4096]);
    store.unload().unwrap();
    let mut bytes = dev.image().to_vec();
    bytes.resize(200 << 20, 0);
    let base = CrashImage::from_bytes(&bytes);
    let dev = device(base.clone(), true, 1);
    let store = load(&dev);
    let old = blobs_of(&store);
    assert_eq!(store.grow().unwrap(), (200 << 8) - 1024);
    assert_eq!(blobs_of(&store), old);
    assert_eq!(store.grow().unwrap(), 0);
    let (mut small, mut large) = (0, 0);
    let mut points = dev.crash_points();
    while points.advance().is_some() {
        for all in [false, true] {
            let image = points.image(&mut |_| all);
            let after = device(image, false, 0);
            let store = load(&after);
            assert_eq!(blobs_of(&store), old);
            let total = store.super_block().size.get();
            small += u32::from(total == 4 << 20);
            large += u32::from(total == 200 << 20);
        }
    }
    assert!(small > 0 && large > 0);
    store.unload().unwrap();
    strict::parse_of(&dev.image().to_vec(), "masks moved");
}
