//! What changes may take: a reserve of clusters and metadata pages that only opening and freeing
//! may use, and a metadata region that grows before it is full.

use super::Blobstore;
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE_U64};
use super::geometry::Layout;
use super::state::State;

/// Bytes of a file system for each of its first metadata pages.
const BYTES_PER_MD_PAGE: u64 = 512 << 10;
/// Most metadata pages that a new file system has: 64 MiB.
const MD_PAGES_MAX: u64 = 16384;

/// Number of metadata pages that is enough for most changes.
const FEW_PAGES: u32 = 4;
/// Most clusters in the reserve, in bytes.
const RESERVE_MAX: u64 = 16 << 20;

/// Divisor of the store: its metadata region grows by itself at most to this part of it. It never
/// shrinks.
const MD_SHARE: u64 = 8;

/// The part of the store's reserve that a change may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spend {
    /// Nothing.
    #[default]
    Ordinary,
    /// All reserved clusters, and all but the last four reserved metadata pages. This is for the
    /// few small files without which an application cannot open its data.
    Opening,
    /// Everything. This is for deleting, truncating, renaming and recording a length, which free
    /// most of what they take.
    Releasing,
}

/// The reserve that ordinary changes cannot use; see [`Spend`]. After a load a store has no reserve,
/// and its metadata region does not grow by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpacePolicy {
    /// Whether one metadata page in eight (8 to 64 of them) and one cluster in 32 (at least 8, at
    /// most 16 MiB) are reserved.
    pub reserve: bool,
    /// Whether the metadata region grows when three quarters of it are used.
    pub grow_metadata: bool,
}

impl Blobstore {
    /// Sets what is reserved, from the next change on.
    pub fn set_space_policy(&self, policy: SpacePolicy) {
        let mut state = self.inner.state.lock();
        state.policy = policy;
        state.growth_blocked = None;
    }

    /// Returns the number of clusters that an ordinary change can take.
    #[must_use]
    pub fn available_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        state.clusters_for(Spend::Ordinary)
    }

    /// Returns the number of clusters that are reserved from ordinary changes.
    #[must_use]
    pub fn reserved_clusters(&self) -> u64 {
        self.inner.state.lock().reserve_clusters().into()
    }

    /// Returns the number of clusters of the journal.
    #[must_use]
    pub fn journal_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        let root = state.journal.and_then(BlobId::page);
        let slot = root.and_then(|root| state.blobs.get(&root));
        slot.map_or(0, |slot| slot.meta.map.num_clusters())
    }

    /// Whether an ordinary change can take a metadata page, if necessary by growth of the region.
    #[must_use]
    pub fn can_take_md_page(&self) -> bool {
        let state = self.inner.state.lock();
        let grows = state.policy.grow_metadata && state.growth_blocked.is_none();
        grows || state.pages_for(Spend::Ordinary) > 0
    }

    /// Returns the number of metadata pages that a new store of this size would have.
    #[must_use]
    pub fn fitting_md_pages(&self) -> u64 {
        let state = self.inner.state.lock();
        let geo = &state.geo;
        let size = u64::from(geo.total_clusters) * geo.cluster_size;
        (size / BYTES_PER_MD_PAGE).clamp(1, MD_PAGES_MAX)
    }

    /// Returns the number of metadata pages that an ordinary change can take before the region has
    /// to grow.
    #[must_use]
    pub fn available_md_pages(&self) -> u64 {
        let state = self.inner.state.lock();
        state.pages_for(Spend::Ordinary)
    }
}

impl State {
    /// Returns the number of metadata pages that ordinary changes leave.
    fn reserve_pages(&self) -> u32 {
        let pages = self.pages.len();
        if self.policy.reserve {
            (pages / 8).clamp(8, 64).min(pages / 2)
        } else {
            0
        }
    }

    /// Returns the number of clusters that ordinary changes leave.
    fn reserve_clusters(&self) -> u32 {
        if !self.policy.reserve {
            return 0;
        }
        let clusters = self.geo.data_clusters();
        let most = u32::try_from(RESERVE_MAX / self.geo.cluster_size).unwrap_or(u32::MAX);
        (clusters / 32).max(8).min(most.max(8)).min(clusters / 4)
    }

    /// Returns the number of clusters that a change may take.
    pub fn clusters_for(&self, spend: Spend) -> u64 {
        let kept = match spend {
            Spend::Ordinary => self.reserve_clusters(),
            Spend::Opening | Spend::Releasing => 0,
        };
        self.clusters.free().saturating_sub(kept).into()
    }

    /// Returns the number of metadata pages that a change may take.
    pub fn pages_for(&self, spend: Spend) -> u64 {
        let kept = match spend {
            Spend::Ordinary => self.reserve_pages(),
            Spend::Opening => self.reserve_pages().min(FEW_PAGES),
            Spend::Releasing => 0,
        };
        self.pages.free().saturating_sub(kept).into()
    }

    /// Fails if a change may not take that many clusters.
    pub fn check_free_clusters(&self, needed: u64, spend: Spend) -> Result<(), Error> {
        if needed <= self.clusters_for(spend) {
            Ok(())
        } else {
            Err(self.no_space(needed, spend))
        }
    }

    /// Fails if a change may not take that many metadata pages.
    pub fn check_free_pages(&self, needed: u64, spend: Spend) -> Result<(), Error> {
        if needed <= self.pages_for(spend) {
            Ok(())
        } else {
            Err(self.no_pages(needed, spend))
        }
    }

    /// Returns the error of a store that is full.
    pub fn no_space(&self, needed: u64, spend: Spend) -> Error {
        Error::NoSpace {
            needed,
            free: self.clusters_for(spend),
            total: self.geo.data_clusters().into(),
        }
    }

    /// Returns the error of a store whose metadata pages are used up.
    pub fn no_pages(&self, needed: u64, spend: Spend) -> Error {
        Error::NoMdPages {
            needed,
            free: self.pages_for(spend),
            total: self.pages.len().into(),
        }
    }

    /// Returns the number of metadata pages that the region should grow to before a change that may
    /// take some. This is when three quarters are used, unless an attempt found no room and there
    /// is no more of it since.
    fn wanted_growth(&mut self, spend: Spend) -> Option<u32> {
        let (used, len) = (u64::from(self.pages.used()), u64::from(self.pages.len()));
        // A change takes few pages. One that may not use the reserve runs out before the store
        // does.
        let few = self.pages_for(spend) < FEW_PAGES.into();
        let scarce = match spend {
            Spend::Releasing => used == len,
            Spend::Ordinary | Spend::Opening => used * 4 >= len * 3 || few,
        };
        let free = self.clusters.free();
        let blocked = self.growth_blocked.is_some_and(|blocked| free <= blocked);
        if !self.policy.grow_metadata || !scarce || blocked {
            return None;
        }
        let size = u64::from(self.geo.total_clusters) * self.geo.cluster_size;
        let most = u32::try_from(size / PAGE_SIZE_U64 / MD_SHARE).unwrap_or(u32::MAX);
        let wanted = self.pages.len().saturating_mul(2).min(most);
        if wanted <= self.pages.len() {
            // Only a larger store has more.
            self.growth_blocked = Some(u32::MAX);
            return None;
        }
        Some(wanted)
    }
}

impl Blobstore {
    /// Lets the region grow if metadata pages are scarce, before a change that may take some. If it
    /// cannot grow, the change still has what is left, so this is not an error of the change.
    pub(crate) fn grow_metadata_if_scarce(&self, spend: Spend) {
        if self.inner.state.lock().wanted_growth(spend).is_none() {
            return;
        }
        let Ok(edit) = self.edit_around_blobs() else {
            return;
        };
        let (wanted, keep) = {
            let mut state = edit.state();
            // Another thread may have done it.
            let Some(wanted) = state.wanted_growth(spend) else {
                return;
            };
            let keep = match spend {
                Spend::Ordinary => state.reserve_clusters(),
                Spend::Opening | Spend::Releasing => 0,
            };
            (wanted, keep)
        };
        let grown = edit.grow_metadata(wanted, keep);
        let mut state = edit.state();
        match grown {
            Ok(()) => state.growth_blocked = None,
            Err(error) => {
                let device = &self.inner.dev.info().name;
                tracing::warn!(device, %error, "the metadata region could not grow");
                state.growth_blocked = Some(state.clusters.free());
            }
        }
    }
}

/// Returns the default number of metadata pages of a file system of `size` bytes: two for each MiB,
/// at most 16384, and what fills the last cluster.
pub(crate) fn default_md_pages(size: u64, cluster_size: u32) -> u32 {
    let wanted = (size / BYTES_PER_MD_PAGE).clamp(16, MD_PAGES_MAX);
    let wanted = u32::try_from(wanted).expect("bounded above");
    let per_cluster = (u64::from(cluster_size) / PAGE_SIZE_U64).max(1);
    let clusters = u32::try_from(size / u64::from(cluster_size.max(1))).unwrap_or(u32::MAX);
    let masks = 1 + Layout::masks_len(wanted, clusters);
    let end = (masks + u64::from(wanted)).next_multiple_of(per_cluster);
    u32::try_from(end - masks).unwrap_or(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobstore::{CreateOptions, InitOptions, LoadOptions};

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
        store.inner.state.lock().wanted_growth(spend)
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
            let mut state = store.inner.state.lock();
            state.policy.grow_metadata = true;
            let all = [Spend::Ordinary, Spend::Opening, Spend::Releasing];
            let wanted = all.map(|spend| state.wanted_growth(spend).is_some());
            state.policy.grow_metadata = false;
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
        let blocked = || store.inner.state.lock().growth_blocked;
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
        assert_eq!(store.inner.state.lock().growth_blocked, Some(u32::MAX));
    }
}
