//! What changes may take: a reserve of clusters and metadata pages that only opening and freeing
//! may use, and a metadata region that grows before it is full.

use std::collections::HashSet;
use std::sync::Arc;

use pumice_bdev::Op;

use super::alloc::{Bitmap, iter_words};
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE_U64};
use super::geometry::{Geometry, Layout};
use super::late_writes::LateWrites;
use super::mdio::Abilities;
use super::meta::{BlobMeta, ClearMethod};
use super::retry::may_land;

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

/// Metadata pages and clusters that a change has taken.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub pages: Vec<u32>,
    pub clusters: Vec<u32>,
}

/// A damaged blob because of which nothing is allocated, and what may be its.
#[derive(Debug)]
pub(crate) struct Unowned {
    by: BlobId,
    /// Pages that are marked as used and belong to no whole blob.
    pages: Bitmap,
    /// Clusters of this kind.
    clusters: Bitmap,
}

/// The allocator of metadata pages and clusters: it knows which are taken, free, and held back.
#[derive(Debug)]
pub(crate) struct Allocator {
    pub geo: Geometry,
    pub pages: Bitmap,
    pub clusters: Bitmap,
    policy: SpacePolicy,
    /// Free clusters at the last growth of the metadata that found no room.
    growth_blocked: Option<u32>,
    held: Option<Unowned>,
    /// Clusters that more than one blob claims. They are never released.
    pub shared_clusters: HashSet<u32>,
    /// Extent pages that more than one blob claims. They are never released.
    pub shared_pages: HashSet<u32>,
    /// Pages and clusters that changes have taken or freed of which a write or a clear has timed out. It may still land, so all
    /// of them stay taken until the next load.
    pub late: Vec<Taken>,
    /// The blocks of all writes that have timed out.
    late_writes: Arc<LateWrites>,
    /// Abilities of the device.
    can: Abilities,
}

impl Allocator {
    /// Makes the space of a store from its bitmaps. Nothing is reserved.
    pub fn new(
        geo: Geometry,
        (pages, clusters): (Bitmap, Bitmap),
        late_writes: Arc<LateWrites>,
        can: Abilities,
    ) -> Allocator {
        Allocator {
            geo,
            pages,
            clusters,
            policy: SpacePolicy::default(),
            growth_blocked: None,
            held: None,
            shared_clusters: HashSet::new(),
            shared_pages: HashSet::new(),
            late: Vec::new(),
            late_writes,
            can,
        }
    }

    /// Sets what is reserved, from the next change on.
    pub fn set_policy(&mut self, policy: SpacePolicy) {
        self.policy = policy;
        self.growth_blocked = None;
    }

    /// Records that the metadata region has grown.
    pub fn note_growth(&mut self) {
        self.growth_blocked = None;
    }

    /// Records that the metadata region has found no room to grow.
    pub fn note_no_growth(&mut self) {
        self.growth_blocked = Some(self.clusters.free());
    }

    /// Whether an ordinary change can take a metadata page, if necessary by growth of the region.
    pub fn can_take_page(&self) -> bool {
        let grows = self.policy.grow_metadata && self.growth_blocked.is_none();
        grows || self.pages_for(Spend::Ordinary) > 0
    }

    /// Returns the number of metadata pages that a new store of this size would have.
    pub fn fitting_pages(&self) -> u64 {
        let size = u64::from(self.geo.total_clusters) * self.geo.cluster_size;
        (size / BYTES_PER_MD_PAGE).clamp(1, MD_PAGES_MAX)
    }

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
    pub fn reserve_clusters(&self) -> u32 {
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
    fn no_space(&self, needed: u64, spend: Spend) -> Error {
        Error::NoSpace {
            needed,
            free: self.clusters_for(spend),
            total: self.geo.data_clusters().into(),
        }
    }

    /// Returns the error of a store whose metadata pages are used up.
    fn no_pages(&self, needed: u64, spend: Spend) -> Error {
        Error::NoMdPages {
            needed,
            free: self.pages_for(spend),
            total: self.pages.len().into(),
        }
    }

    /// Returns the blob because of which nothing is allocated.
    pub fn held(&self) -> Option<BlobId> {
        self.held.as_ref().map(|held| held.by)
    }

    /// Lets nothing be allocated, since it is not known what the damaged blob `by` holds. Everything that is marked as used
    /// and that these blobs do not have may be its.
    pub fn hold<'a>(&mut self, by: BlobId, blobs: impl Iterator<Item = &'a BlobMeta>) {
        let mut pages = self.pages.clone();
        let mut clusters = self.clusters.clone();
        for cluster in self.geo.own_clusters() {
            clusters.clear(cluster);
        }
        for meta in blobs {
            pages.clear(meta.root());
            for page in meta.chain.iter().copied().chain(meta.pages_of_extents()) {
                pages.clear(page);
            }
            for cluster in meta.clusters() {
                clusters.clear(cluster);
            }
        }
        self.held = Some(Unowned {
            by,
            pages,
            clusters,
        });
    }

    /// Frees the root of a damaged blob that is durably deleted. `next` is the first of those that are left. After the last one,
    /// what only a damaged blob can have held is free.
    pub fn discard(&mut self, root: u32, next: Option<BlobId>) {
        let Some(held) = &mut self.held else {
            self.pages.clear(root);
            return;
        };
        if let Some(next) = next {
            held.by = next;
        } else if let Some(unowned) = self.held.take() {
            self.free(
                iter_words(unowned.pages.words()),
                iter_words(unowned.clusters.words()),
            );
        }
    }

    /// Takes `count` clusters: the ones behind `last` if they are free, else others in one run,
    /// else any free ones, lowest first.
    pub fn take_clusters(
        &mut self,
        count: u64,
        last: Option<u32>,
        spend: Spend,
    ) -> Result<Vec<u32>, Error> {
        if count > 0 {
            self.check_not_held()?;
        }
        self.check_free_clusters(count, spend)?;
        let count = u32::try_from(count).expect("not more than are free");
        let first = last
            .map(|last| last + 1)
            .filter(|next| self.clusters.is_free_run(*next, count))
            .or_else(|| self.clusters.find_run(count));
        let mut taken = Vec::with_capacity(count as usize);
        for offset in 0..count {
            let cluster = match first {
                Some(first) => Some(first + offset).filter(|at| self.clusters.set(*at)),
                None => self.clusters.take(0),
            };
            let cluster = cluster.expect("it was counted as free");
            taken.push(cluster);
        }
        Ok(taken)
    }

    /// Fails while it is not known which clusters a damaged blob holds, since nothing may be
    /// allocated then.
    pub fn check_not_held(&self) -> Result<(), Error> {
        match self.held() {
            Some(id) => Err(Error::Held(id)),
            None => Ok(()),
        }
    }

    /// Takes a metadata page. Page 0 is only taken for a root, because an extent page would not be
    /// recognised there.
    pub fn take_page(&mut self, root: bool, spend: Spend) -> Result<u32, Error> {
        self.check_not_held()?;
        self.check_free_pages(1, spend)?;
        self.pages
            .take(u32::from(!root))
            .ok_or_else(|| self.no_pages(1, spend))
    }

    /// Gives back what a change has taken.
    pub fn give_back(&mut self, taken: &Taken) {
        let pages = taken.pages.iter().copied();
        self.free(pages, taken.clusters.iter().copied());
    }

    /// Marks metadata pages and clusters as free that nothing names any longer. Those that a write may still reach which has
    /// timed out stay taken until the next load.
    pub fn free(
        &mut self,
        pages: impl IntoIterator<Item = u32>,
        clusters: impl IntoIterator<Item = u32>,
    ) {
        let mut late = Taken::default();
        let per_page = self.geo.page_lba(1);
        for page in pages {
            let lba = self.geo.md_lba(page);
            if self.late_writes.reach(&(lba..lba + per_page)) {
                late.pages.push(page);
            } else {
                self.pages.clear(page);
            }
        }
        for cluster in clusters {
            let lba = self.geo.cluster_lba(cluster);
            let end = lba + self.geo.cluster_blocks();
            if self.late_writes.reach(&(lba..end)) {
                late.clusters.push(cluster);
            } else {
                self.clusters.clear(cluster);
            }
        }
        if late.pages.is_empty() && late.clusters.is_empty() {
            return;
        }
        tracing::warn!(
            pages = late.pages.len(),
            clusters = late.clusters.len(),
            "what a write that has timed out may still reach stays in use until the next load"
        );
        self.late.push(late);
    }

    /// Gives back what a change has taken when it has failed with `error`. What an operation that has timed out may still
    /// reach stays taken until the next load.
    pub fn give_back_after(&mut self, error: &Error, taken: Taken) {
        if may_land(error) {
            self.late.push(taken);
        } else {
            self.give_back(&taken);
        }
    }

    /// Changes the bitmaps to those of a super block with other positions or sizes.
    pub fn relocate(&mut self, new: Geometry) {
        self.clusters.grow(new.total_clusters);
        self.pages.grow(new.md_len);
        for cluster in new.own_clusters() {
            self.clusters.set(cluster);
        }
        let old = self.geo.own_clusters();
        let left = old.filter(|cluster| new.is_data_cluster((*cluster).into()));
        let left: Vec<u32> = left.collect();
        self.free([], left);
        self.geo = new;
    }

    /// Returns operations that write zeroes to `count` clusters from `first` on.
    pub fn zeroes(&self, first: u32, count: usize) -> Result<Vec<Op>, Error> {
        let blocks = count as u64 * self.geo.cluster_blocks();
        self.can.zeroes(self.geo.cluster_lba(first), blocks)
    }

    /// Returns operations that clear `count` clusters from `first` on by a blob's method.
    pub fn clears(&self, first: u32, count: usize, method: ClearMethod) -> Result<Vec<Op>, Error> {
        let blocks = count as u64 * self.geo.cluster_blocks();
        match method {
            ClearMethod::None => Ok(Vec::new()),
            ClearMethod::Default | ClearMethod::Unmap => {
                Ok(self.can.unmaps(self.geo.cluster_lba(first), blocks))
            }
            ClearMethod::WriteZeroes => self.zeroes(first, count),
        }
    }

    /// Returns the number of metadata pages that the region should grow to before a change that may
    /// take some. This is when three quarters are used, unless an attempt found no room and there
    /// is no more of it since.
    pub fn wanted_growth(&mut self, spend: Spend) -> Option<u32> {
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
mod tests;
