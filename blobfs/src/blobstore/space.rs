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
