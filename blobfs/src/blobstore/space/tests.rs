use super::*;
use crate::blobstore::{Blobstore, CreateOptions, InitOptions, LoadOptions};

const POLICY: SpacePolicy = SpacePolicy {
    reserve: true,
    grow_metadata: true,
};

fn store(size: &str, cluster_size: u32, md_pages: u32) -> Blobstore {
    let dev = pumice_bdev::open(&format!("malloc://{size}?block_size=4096")).unwrap();
    let options = InitOptions::default()
        .cluster_size(cluster_size)
        .md_pages(Some(md_pages));
    let store = Blobstore::init(std::sync::Arc::clone(&dev), &options).unwrap();
    store.unload().unwrap();
    drop(store);
    Blobstore::load(dev, &LoadOptions::default()).unwrap()
}

fn create(store: &Blobstore, num_clusters: u64, spend: Spend) -> Result<BlobId, Error> {
    let mut tx = store.transaction();
    tx.spend(spend);
    let blob = tx.create(CreateOptions::default().num_clusters(num_clusters));
    let committed = tx.commit()?;
    Ok(committed.id(blob))
}

/// Creates blobs without clusters until that fails for want of metadata pages.
fn fill_pages(store: &Blobstore, spend: Spend) {
    let failed = (0..10_000).find_map(|_| create(store, 0, spend).err());
    assert!(
        matches!(failed, Some(Error::NoMdPages { .. })),
        "{failed:?}"
    );
}

fn free_pages(store: &Blobstore) -> u64 {
    let pages = store.md_pages();
    pages.total - pages.used
}

fn wanted(store: &Blobstore, spend: Spend) -> Option<u32> {
    store.inner.state.lock().space.wanted_growth(spend)
}

#[test]
fn a_part_of_the_clusters_is_reserved() {
    // One in 32, at least 8, at most 16 MiB, and never more than a quarter.
    for (size, cluster_size, reserved) in [
        ("1G", 1 << 20, 16),
        ("400M", 1 << 20, 12),
        ("100M", 1 << 20, 8),
        ("16M", 1 << 20, 3),
        ("64M", 64 << 10, 31),
        ("2G", 64 << 10, 256),
    ] {
        let store = store(size, cluster_size, 200);
        assert_eq!(
            (store.reserved_clusters(), store.available_clusters()),
            (0, store.free_clusters())
        );
        store.set_space_policy(POLICY);
        assert_eq!(store.reserved_clusters(), reserved, "{size}");
        assert_eq!(store.available_clusters(), store.free_clusters() - reserved);
        let most = store.available_clusters();
        assert!(matches!(
            create(&store, most + 1, Spend::Ordinary),
            Err(Error::NoSpace { needed, free, .. }) if (needed, free) == (most + 1, most)
        ));
        create(&store, most, Spend::Ordinary).unwrap();
        create(&store, reserved - 1, Spend::Opening).unwrap();
        create(&store, 1, Spend::Releasing).unwrap();
        assert_eq!(store.free_clusters(), 0);
    }
}

#[test]
fn a_part_of_the_pages_is_reserved() {
    for (pages, reserved) in [(10, 5), (40, 8), (160, 20), (1000, 64)] {
        let store = store("64M", 64 << 10, pages);
        let policy = SpacePolicy {
            grow_metadata: false,
            ..POLICY
        };
        store.set_space_policy(policy);
        assert_eq!(store.available_md_pages(), u64::from(pages - reserved));
        for (spend, left) in [
            (Spend::Ordinary, reserved),
            (Spend::Opening, 4),
            (Spend::Releasing, 0),
        ] {
            assert!(
                store.can_take_md_page()
                    == (left == reserved && free_pages(&store) > u64::from(left))
            );
            fill_pages(&store, spend);
            assert_eq!(free_pages(&store), u64::from(left), "{spend:?} of {pages}");
        }
    }
}

#[test]
fn metadata_pages_are_wanted_when_they_are_scarce() {
    let store = store("64M", 64 << 10, 172);
    store.set_space_policy(SpacePolicy {
        reserve: true,
        grow_metadata: false,
    });
    while store.md_pages().used < 128 {
        create(&store, 0, Spend::Ordinary).unwrap();
    }
    let is_wanted = |store: &Blobstore| {
        let space = &mut store.inner.state.lock().space;
        space.policy.grow_metadata = true;
        let all = [Spend::Ordinary, Spend::Opening, Spend::Releasing];
        let wanted = all.map(|spend| space.wanted_growth(spend).is_some());
        space.policy.grow_metadata = false;
        wanted
    };
    assert_eq!(is_wanted(&store), [false; 3]);
    // At three quarters.
    create(&store, 0, Spend::Ordinary).unwrap();
    assert_eq!(is_wanted(&store), [true, true, false]);
    while store.md_pages().used < 171 {
        create(&store, 0, Spend::Releasing).unwrap();
    }
    assert_eq!(is_wanted(&store), [true, true, false]);
    create(&store, 0, Spend::Releasing).unwrap();
    assert_eq!(is_wanted(&store), [true; 3]);
}

#[test]
fn a_growth_without_room_waits_for_more() {
    let store = store("64M", 64 << 10, 172);
    store.set_space_policy(POLICY);
    let filler = create(&store, store.available_clusters(), Spend::Ordinary).unwrap();
    let clusters = store.free_clusters();
    // The reserve of clusters is not for ordinary changes, so the region stays as it is.
    fill_pages(&store, Spend::Ordinary);
    assert_eq!(
        (store.md_pages().total, store.free_clusters()),
        (172, clusters)
    );
    assert!(!store.can_take_md_page());
    let blocked = || store.inner.state.lock().space.growth_blocked;
    assert_eq!(blocked(), Some(u32::try_from(clusters).unwrap()));
    assert_eq!(wanted(&store, Spend::Ordinary), None);
    // A new policy tries it at once.
    store.set_space_policy(POLICY);
    assert_eq!(
        (blocked(), wanted(&store, Spend::Ordinary)),
        (None, Some(344))
    );
    fill_pages(&store, Spend::Ordinary);
    assert_eq!(blocked(), Some(u32::try_from(clusters).unwrap()));
    store.delete(filler).unwrap();
    assert_eq!(wanted(&store, Spend::Ordinary), Some(344));
    create(&store, 0, Spend::Ordinary).unwrap();
    // What is left of the last cluster is pages, too.
    assert_eq!((store.md_pages().total, blocked()), (348, None));
}

#[test]
fn a_change_that_frees_may_take_the_reserve_for_more_pages() {
    let store = store("64M", 64 << 10, 172);
    store.set_space_policy(POLICY);
    create(&store, store.available_clusters(), Spend::Ordinary).unwrap();
    fill_pages(&store, Spend::Ordinary);
    let clusters = store.free_clusters();
    store.set_space_policy(POLICY);
    while store.md_pages().total == 172 {
        create(&store, 0, Spend::Releasing).unwrap();
    }
    assert!(store.free_clusters() < clusters);
}

#[test]
fn the_region_grows_to_an_eighth_of_the_store_at_most() {
    let store = store("8M", 4096, 16);
    store.set_space_policy(POLICY);
    let failed = (0..10_000).find_map(|_| create(&store, 0, Spend::Ordinary).err());
    assert!(
        matches!(failed, Some(Error::NoMdPages { .. })),
        "{failed:?}"
    );
    assert_eq!(store.md_pages().total, 256);
    assert_eq!(
        store.inner.state.lock().space.growth_blocked,
        Some(u32::MAX)
    );
}
