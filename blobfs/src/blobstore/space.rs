//! What changes may take: a reserve of clusters and metadata pages that only opening and giving back may
//! touch, and metadata pages that grow before they run out.

use super::Blobstore;
use super::error::Error;
use super::format::PAGE_SIZE_U64;
use super::geometry::Layout;
use super::order::Scope;
use super::state::State;

/// Bytes of a file system for which it gets a metadata page to begin with.
const BYTES_PER_MD_PAGE: u64 = 512 << 10;
/// Most metadata pages that a file system is made with: 64 MiB of them.
const MD_PAGES_MAX: u64 = 16384;

/// Metadata pages that most changes do with.
const FEW_PAGES: u32 = 4;
/// Most clusters that are kept back, in bytes.
const RESERVE_MAX: u64 = 16 << 20;

/// Part of a store that its metadata region grows to unasked, at most: one in so many. What it has taken it
/// keeps.
const MD_SHARE: u64 = 8;

/// How far into the reserve of a store a change may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spend {
    /// Not at all.
    #[default]
    Ordinary,
    /// It makes the few small files without which an application cannot open its data: all reserved
    /// clusters, and all but the last four of the reserved metadata pages.
    Opening,
    /// It deletes, truncates, renames or records a length: all that there is. What it takes it gives back
    /// for the most part.
    Releasing,
}

/// What a store keeps back from ordinary changes; see [`Spend`]. A store is loaded without a reserve and
/// does not grow its metadata by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpacePolicy {
    /// One metadata page in eight is kept back, 8 to 64 of them, and one cluster in 32, at least 8 of them,
    /// at most 16 MiB.
    pub reserve: bool,
    /// The metadata region grows when three quarters of it are used.
    pub grow_metadata: bool,
}

impl Blobstore {
    /// Sets what is kept back, from the next change on.
    pub fn set_space_policy(&self, policy: SpacePolicy) {
        let mut state = self.inner.state.lock();
        state.policy = policy;
        state.growth_blocked = None;
    }

    /// Clusters that an ordinary change can take.
    #[must_use]
    pub fn available_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        state.clusters_for(Spend::Ordinary)
    }

    /// Clusters kept back from ordinary changes.
    #[must_use]
    pub fn reserved_clusters(&self) -> u64 {
        self.inner.state.lock().reserve_clusters().into()
    }

    /// Whether an ordinary change can take a metadata page, by growth of the region if need be.
    #[must_use]
    pub fn can_take_md_page(&self) -> bool {
        let state = self.inner.state.lock();
        let grows = state.policy.grow_metadata && state.growth_blocked.is_none();
        grows || state.pages_for(Spend::Ordinary) > 0
    }

    /// Metadata pages that a new store of this size would have.
    #[must_use]
    pub fn fitting_md_pages(&self) -> u64 {
        let state = self.inner.state.lock();
        let geo = &state.geo;
        let size = u64::from(geo.total_clusters) * geo.cluster_size;
        (size / BYTES_PER_MD_PAGE).clamp(1, MD_PAGES_MAX)
    }

    /// Metadata pages that an ordinary change can take before the region has to grow.
    #[must_use]
    pub fn available_md_pages(&self) -> u64 {
        let state = self.inner.state.lock();
        state.pages_for(Spend::Ordinary)
    }
}

impl State {
    /// Metadata pages that ordinary changes leave.
    fn reserve_pages(&self) -> u32 {
        let pages = self.pages.len();
        if self.policy.reserve {
            (pages / 8).clamp(8, 64).min(pages / 2)
        } else {
            0
        }
    }

    /// Clusters that ordinary changes leave.
    fn reserve_clusters(&self) -> u32 {
        if !self.policy.reserve {
            return 0;
        }
        let clusters = self.geo.data_clusters();
        let most = u32::try_from(RESERVE_MAX / self.geo.cluster_size).unwrap_or(u32::MAX);
        (clusters / 32).max(8).min(most.max(8)).min(clusters / 4)
    }

    /// Clusters that a change may take.
    pub fn clusters_for(&self, spend: Spend) -> u64 {
        let kept = match spend {
            Spend::Ordinary => self.reserve_clusters(),
            Spend::Opening | Spend::Releasing => 0,
        };
        self.clusters.free().saturating_sub(kept).into()
    }

    /// Metadata pages that a change may take.
    pub fn pages_for(&self, spend: Spend) -> u64 {
        let kept = match spend {
            Spend::Ordinary => self.reserve_pages(),
            Spend::Opening => self.reserve_pages().min(FEW_PAGES),
            Spend::Releasing => 0,
        };
        self.pages.free().saturating_sub(kept).into()
    }

    /// Whether a change may take that many clusters.
    pub fn check_free_clusters(&self, needed: u64, spend: Spend) -> Result<(), Error> {
        if needed <= self.clusters_for(spend) {
            Ok(())
        } else {
            Err(self.no_space(needed, spend))
        }
    }

    /// Whether a change may take that many metadata pages.
    pub fn check_free_pages(&self, needed: u64, spend: Spend) -> Result<(), Error> {
        if needed <= self.pages_for(spend) {
            Ok(())
        } else {
            Err(self.no_pages(needed, spend))
        }
    }

    /// The error of a store that is full.
    pub fn no_space(&self, needed: u64, spend: Spend) -> Error {
        Error::NoSpace {
            needed,
            free: self.clusters_for(spend),
            total: self.geo.data_clusters().into(),
        }
    }

    /// The error of a store whose metadata pages are used up.
    pub fn no_pages(&self, needed: u64, spend: Spend) -> Error {
        Error::NoMdPages {
            needed,
            free: self.pages_for(spend),
            total: self.pages.len().into(),
        }
    }

    /// The metadata pages that the region should grow to before a change that may take some: when three quarters are
    /// used, and unless a try found no room and there is no more of it since.
    fn wanted_growth(&mut self, spend: Spend) -> Option<u32> {
        let (used, len) = (u64::from(self.pages.used()), u64::from(self.pages.len()));
        // A change takes few pages; whoever may not touch the reserve runs out before it does.
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
    /// Before a change that may take metadata pages: lets the region grow if they are scarce. Where that is not
    /// possible the change still has what is left, so this is not its error.
    pub(crate) fn grow_metadata_if_scarce(&self, spend: Spend) {
        if self.inner.state.lock().wanted_growth(spend).is_none() {
            return;
        }
        let Ok(edit) = self.edit(&Scope::All) else {
            return;
        };
        let (wanted, keep) = {
            let mut state = edit.state();
            // Somebody else may have been first.
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
                tracing::warn!(device, %error, "the metadata pages could not be made more");
                state.growth_blocked = Some(state.clusters.free());
            }
        }
    }
}

/// Metadata pages of a file system of `size` bytes if nobody says how many: two for each MiB, at most 16384,
/// and as many more as its last cluster has room for.
pub(crate) fn default_md_pages(size: u64, cluster_size: u32) -> u32 {
    let wanted = (size / BYTES_PER_MD_PAGE).clamp(16, MD_PAGES_MAX);
    let wanted = u32::try_from(wanted).expect("bounded above");
    let per_cluster = (u64::from(cluster_size) / PAGE_SIZE_U64).max(1);
    let clusters = u32::try_from(size / u64::from(cluster_size.max(1))).unwrap_or(u32::MAX);
    let masks = 1 + Layout::masks_len(wanted, clusters);
    let end = (masks + u64::from(wanted)).next_multiple_of(per_cluster);
    u32::try_from(end - masks).unwrap_or(wanted)
}
