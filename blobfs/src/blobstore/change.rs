//! Changes of metadata: staged in memory, turned into a [`Batch`], then published.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use pumice_bdev::Op;

use super::alloc::Bitmap;
use super::carried::{Carried, Patch};
use super::commit::{Batch, CommitPoint, Old};
use super::error::Error;
use super::extents::ExtentMap;
use super::format::{
    BlobId, BlobRecord, EXTENTS_PER_PAGE, PAGE_SIZE, Page, SuperBlock, encode_blob,
    encode_extent_page, seal_chain,
};
use super::geometry::Geometry;
use super::meta::{BlobMeta, ClearMethod, Parent, Trailing, patched_page};
use super::retry::may_land;
use super::space::Spend;
use super::state::{CleanMark, Slot, State};

/// The effect of a staged change on the map of a blob.
#[derive(Debug)]
pub(crate) enum MapChange {
    /// Nothing, or the map came with its extent pages from another blob.
    None,
    /// The blob has a new map. Extent pages that differ are written to new pages.
    Replaced,
    /// Some entries change: (index, cluster), in order of index.
    Patch(Vec<(u64, u32)>),
}

/// The next version of a blob.
#[derive(Debug)]
pub(crate) struct Staged {
    pub meta: BlobMeta,
    pub map: MapChange,
    /// Whether something besides the map changes.
    pub other: bool,
    /// The version that is on disk.
    pub old: Option<Arc<BlobMeta>>,
}

/// A change that is not committed yet. It must be committed or rolled back.
#[derive(Debug, Default)]
#[must_use = "what it has taken has to be given back: commit or roll back"]
pub(crate) struct Change {
    pub staged: Vec<Staged>,
    pub deleted: Vec<Arc<BlobMeta>>,
    /// Roots of damaged blobs that are deleted.
    pub discarded: Vec<u32>,
    /// Operations that write the content of newly taken clusters.
    pub prepare: Vec<Op>,
    /// Clusters to release when the change is durable.
    pub freed_clusters: Vec<(u32, ClearMethod)>,
    /// Metadata pages to release when the change is durable.
    pub freed_pages: Vec<u32>,
    /// A new super block, and the geometry that it describes.
    pub super_block: Option<Box<(SuperBlock, Geometry)>>,
    /// Whether nothing changes in it but the number of the log in shared memory.
    pub names_log: bool,
    /// Bytes of blobs that the batch carries, and their places.
    pub carried: Vec<(Carried, Vec<Patch>)>,
    /// Blobs that are deleted and owed bytes that cannot be put in place.
    pub given_up: Vec<BlobId>,
    /// The part of the reserve that the change may use.
    pub spend: Spend,
    taken_clusters: Vec<u32>,
    taken_pages: Vec<u32>,
}

impl Change {
    /// Moves what it frees to a change that has taken it.
    pub fn keep_freed(&mut self) -> Change {
        let clusters = std::mem::take(&mut self.freed_clusters);
        Change {
            taken_clusters: clusters.into_iter().map(|(cluster, _)| cluster).collect(),
            taken_pages: std::mem::take(&mut self.freed_pages),
            ..Change::default()
        }
    }

    /// Makes a change that has taken these clusters.
    pub fn with_taken(taken_clusters: Vec<u32>) -> Change {
        Change {
            taken_clusters,
            ..Change::default()
        }
    }

    /// Deletes a blob, and frees its pages but for the shared ones, and the clusters for which `frees` says so.
    /// The commit leaves out clusters that have a second owner.
    pub fn delete(
        &mut self,
        meta: Arc<BlobMeta>,
        shared_pages: &HashSet<u32>,
        frees: impl Fn(u32) -> bool,
    ) {
        let method = meta.clear_method();
        let clusters = meta.clusters().filter(|cluster| frees(*cluster));
        self.freed_clusters
            .extend(clusters.map(|cluster| (cluster, method)));
        let pages = meta.pages_of_extents();
        self.freed_pages
            .extend(pages.filter(|page| !shared_pages.contains(page)));
        self.freed_pages.extend(&meta.chain);
        self.deleted.push(meta);
    }

    /// Marks as free what it has taken.
    pub fn give_back(&self, pages: &mut Bitmap, clusters: &mut Bitmap) {
        for cluster in &self.taken_clusters {
            clusters.clear(*cluster);
        }
        for page in &self.taken_pages {
            pages.clear(*page);
        }
    }
}

impl State {
    /// Returns the staged version of a blob, which starts as a copy of the current one.
    pub fn stage<'c>(&self, change: &'c mut Change, id: BlobId) -> Result<&'c mut Staged, Error> {
        let found = change.staged.iter().position(|staged| staged.meta.id == id);
        let index = match found {
            Some(index) => index,
            None => {
                let old = Arc::clone(self.meta(id)?);
                if change.deleted.iter().any(|deleted| deleted.id == id) {
                    return Err(Error::invalid(format!(
                        "blob {id} is deleted by the same change"
                    )));
                }
                let staged = Staged {
                    meta: (*old).clone(),
                    map: MapChange::None,
                    other: false,
                    old: Some(old),
                };
                change.staged.push(staged);
                change.staged.len() - 1
            }
        };
        Ok(&mut change.staged[index])
    }

    /// Takes a free cluster.
    pub fn take_cluster(&mut self, change: &mut Change) -> Result<u32, Error> {
        Ok(self.take_clusters(change, 1, None)?[0])
    }

    /// Takes `count` clusters: the ones behind `last` if they are free, else others in one run,
    /// else any free ones, lowest first.
    pub fn take_clusters(
        &mut self,
        change: &mut Change,
        count: u64,
        last: Option<u32>,
    ) -> Result<Vec<u32>, Error> {
        if count > 0 {
            self.check_not_held()?;
        }
        self.check_free_clusters(count, change.spend)?;
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
            change.taken_clusters.push(cluster);
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
    pub fn take_page(&mut self, change: &mut Change, root: bool) -> Result<u32, Error> {
        self.check_not_held()?;
        self.check_free_pages(1, change.spend)?;
        let page = self
            .pages
            .take(u32::from(!root))
            .ok_or_else(|| self.no_pages(1, change.spend))?;
        change.taken_pages.push(page);
        Ok(page)
    }

    /// Gives back what a change has taken.
    pub fn rollback(&mut self, change: &Change) {
        let pages = change.taken_pages.iter().copied();
        self.free(pages, change.taken_clusters.iter().copied());
    }

    /// Marks metadata pages and clusters as free that nothing names any longer. Those that a write may still reach which has
    /// timed out stay taken until the next load.
    pub fn free(
        &mut self,
        pages: impl IntoIterator<Item = u32>,
        clusters: impl IntoIterator<Item = u32>,
    ) {
        let mut late = Change::default();
        let per_page = self.geo.page_lba(1);
        for page in pages {
            let lba = self.geo.md_lba(page);
            if self.late_writes.reach(&(lba..lba + per_page)) {
                late.taken_pages.push(page);
            } else {
                self.pages.clear(page);
            }
        }
        for cluster in clusters {
            let lba = self.geo.cluster_lba(cluster);
            let end = lba + self.geo.cluster_blocks();
            if self.late_writes.reach(&(lba..end)) {
                late.taken_clusters.push(cluster);
            } else {
                self.clusters.clear(cluster);
            }
        }
        if late.taken_pages.is_empty() && late.taken_clusters.is_empty() {
            return;
        }
        tracing::warn!(
            pages = late.taken_pages.len(),
            clusters = late.taken_clusters.len(),
            "what a write that has timed out may still reach stays in use until the next load"
        );
        self.late.push(late);
    }

    /// Gives back what a change has taken when it has failed with `error`. What an operation that has timed out may still
    /// reach stays taken until the next load.
    pub fn rollback_after(&mut self, error: &Error, change: Change) {
        if may_land(error) {
            self.late.push(change);
        } else {
            self.rollback(&change);
        }
    }

    /// Lays out the pages of all staged blobs and returns what has to be written. After this the
    /// change names everything that it takes.
    pub fn batch(&mut self, change: &mut Change) -> Result<Batch, Error> {
        let mut batch = Batch::new(self.geo.clone());
        match &mut change.super_block {
            Some(new) => {
                if self.journal.is_some() {
                    // It must not take away the guard of a ring that has begun.
                    new.0.set_guard(true);
                    batch.unmark = self.unmark();
                }
                batch.super_block = Some(Box::new(new.0.clone()));
                batch.names_log = change.names_log;
            }
            None => batch.unmark = self.unmark(),
        }
        let mut staged = std::mem::take(&mut change.staged);
        let result = staged
            .iter_mut()
            .try_for_each(|staged| self.lay_out(change, staged, &mut batch));
        change.staged = staged;
        result?;
        batch.prepare.append(&mut change.prepare);
        batch.carried.append(&mut change.carried);
        batch.given_up.append(&mut change.given_up);
        let erase_root = |index: u32, old: Old| CommitPoint {
            index,
            page: Box::new([0; PAGE_SIZE]),
            old,
        };
        for meta in &change.deleted {
            let old = Old::Root(Arc::clone(meta));
            batch.points.push(erase_root(meta.root(), old));
        }
        for index in &change.discarded {
            batch.points.push(erase_root(*index, Old::Blank));
        }
        batch.erase.extend(&change.freed_pages);
        for meta in &change.deleted {
            change.freed_pages.push(meta.root());
        }
        change
            .freed_clusters
            .retain(|(cluster, _)| !self.shared_clusters.contains(cluster));
        change
            .freed_clusters
            .sort_unstable_by_key(|(cluster, _)| *cluster);
        // A damaged blob may hold some of them too, as a snapshot does while it is made or removed.
        if self.held().is_none() {
            self.clear_clusters(&change.freed_clusters, &mut batch)?;
        }
        Ok(batch)
    }

    /// Returns the super block without the mark of an orderly unload, and with the guard of a store
    /// with a journal, unless the device has it so.
    fn unmark(&self) -> Option<Box<Page>> {
        let wants_guard = self.journal.is_some() && !self.sb.is_guarded();
        if self.clean_mark == CleanMark::Removed && !wants_guard {
            return None;
        }
        let mut sb = self.sb.clone();
        sb.clean = 0.into();
        if self.journal.is_some() {
            sb.set_guard(true);
        }
        Some(Box::new(sb.encode()))
    }

    fn clear_clusters(&self, freed: &[(u32, ClearMethod)], batch: &mut Batch) -> Result<(), Error> {
        for run in freed.chunk_by(|a, b| a.0 + 1 == b.0 && a.1 == b.1) {
            let (first, method) = run[0];
            let lba = self.geo.cluster_lba(first);
            let blocks = run.len() as u64 * self.geo.cluster_blocks();
            let ops = match method {
                ClearMethod::None => continue,
                ClearMethod::Default | ClearMethod::Unmap => self.can.unmaps(lba, blocks),
                ClearMethod::WriteZeroes => self.can.zeroes(lba, blocks)?,
            };
            batch.clear.extend(ops);
        }
        Ok(())
    }

    fn lay_out(
        &mut self,
        change: &mut Change,
        staged: &mut Staged,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        if let MapChange::Patch(patches) = &staged.map
            && let Some(point) = self.in_place(staged, patches)
        {
            batch.points.push(point);
            return Ok(());
        }
        if staged.meta.table {
            self.lay_out_extent_pages(change, staged, batch)?;
        }
        let trailing = std::mem::take(&mut staged.meta.trailing);
        let Trailing { pages, clusters } = trailing;
        change.freed_pages.extend(
            pages
                .into_iter()
                .filter(|page| !self.shared_pages.contains(page)),
        );
        let method = staged.meta.clear_method();
        change
            .freed_clusters
            .extend(clusters.into_iter().map(|cluster| (cluster, method)));

        let patches = match &staged.map {
            MapChange::Patch(patches) => &patches[..],
            _ => &[],
        };
        let record: BlobRecord = staged.meta.record(patches);
        let mut pages = encode_blob(&record);
        let old_chain = std::mem::take(&mut staged.meta.chain);
        for _ in 1..pages.len() {
            staged.meta.chain.push(self.take_page(change, false)?);
        }
        change.freed_pages.extend(old_chain);
        seal_chain(&mut pages, &staged.meta.chain);
        let mut pages = pages.into_iter();
        let root = pages.next().expect("a blob has a root");
        let chain = staged.meta.chain.iter().copied();
        batch.fresh.extend(chain.zip(pages));
        batch.points.push(CommitPoint {
            index: staged.meta.root(),
            page: root,
            old: staged.old.clone().map_or(Old::Blank, Old::Root),
        });
        Ok(())
    }

    /// Returns the commit point of a change that touches entries of one extent page and nothing
    /// else: that page, rewritten in place.
    fn in_place(&self, staged: &Staged, patches: &[(u64, u32)]) -> Option<CommitPoint> {
        let per_page = EXTENTS_PER_PAGE as u64;
        let number = u32::try_from(patches.first()?.0 / per_page).ok()?;
        let one = patches
            .iter()
            .all(|(index, _)| index / per_page == u64::from(number));
        let old = staged.old.as_ref()?;
        if staged.other || !one || staged.meta.trailing != Trailing::default() {
            return None;
        }
        let index = *staged
            .meta
            .extent_pages
            .get(&number)
            .filter(|page| !self.shared_pages.contains(page))?;
        Some(CommitPoint {
            index,
            page: patched_page(&staged.meta, number, patches),
            old: Old::ExtentPage(Arc::clone(old), number),
        })
    }

    /// Writes the extent pages that have changed to free metadata pages.
    fn lay_out_extent_pages(
        &mut self,
        change: &mut Change,
        staged: &mut Staged,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let per_page = EXTENTS_PER_PAGE as u64;
        let number_of =
            |index: u64| u32::try_from(index / per_page).expect("at most 2^32 clusters");
        let mut fresh: BTreeMap<u32, Box<Page>> = BTreeMap::new();
        let mut dropped = Vec::new();
        match &staged.map {
            MapChange::None => return Ok(()),
            MapChange::Patch(patches) => {
                for group in patches.chunk_by(|a, b| number_of(a.0) == number_of(b.0)) {
                    let number = number_of(group[0].0);
                    fresh.insert(number, patched_page(&staged.meta, number, group));
                }
            }
            MapChange::Replaced => {
                let map = &staged.meta.map;
                let mut numbers: Vec<u32> =
                    map.allocated().map(|(index, _)| number_of(index)).collect();
                numbers.dedup();
                let old_map = staged.old.as_ref().map(|old| Arc::clone(&old.map));
                for number in &numbers {
                    let entries = map.page(*number);
                    let unchanged = staged.meta.extent_pages.contains_key(number)
                        && old_map
                            .as_ref()
                            .is_some_and(|old| old.page(*number) == entries);
                    if !unchanged {
                        let start = *number * u32::try_from(EXTENTS_PER_PAGE).expect("512");
                        fresh.insert(*number, encode_extent_page(staged.meta.id, start, &entries));
                    }
                }
                let gone = staged
                    .meta
                    .extent_pages
                    .keys()
                    .filter(|number| numbers.binary_search(number).is_err());
                dropped = gone.copied().collect();
            }
        }
        for number in dropped {
            let page = staged.meta.extent_pages.remove(&number);
            change
                .freed_pages
                .extend(page.filter(|page| !self.shared_pages.contains(page)));
        }
        for (number, page) in fresh {
            let index = self.take_page(change, false)?;
            let old = staged.meta.extent_pages.insert(number, index);
            change
                .freed_pages
                .extend(old.filter(|page| !self.shared_pages.contains(page)));
            batch.fresh.push((index, page));
        }
        Ok(())
    }

    /// Records that a change has failed. If it was the one that marks the store as not unloaded in
    /// order, the device may or may not have that mark.
    pub fn note_mark_in_doubt(&mut self) {
        if self.clean_mark == CleanMark::Set {
            self.clean_mark = CleanMark::InDoubt;
        }
    }

    /// Makes a durable change visible and frees what it no longer needs.
    pub(super) fn publish(&mut self, change: Change) {
        self.clean_mark = CleanMark::Removed;
        self.sb.clean = 0.into();
        if self.journal.is_some() {
            self.sb.set_guard(true);
        }
        if let Some(new) = change.super_block {
            let (sb, geo) = *new;
            self.sb = sb;
            self.sb.clean = 0.into();
            self.relocate(geo);
        }
        let mut rebuild = Vec::new();
        for staged in change.staged {
            let Staged {
                meta,
                map,
                other: _,
                old,
            } = staged;
            if let MapChange::Patch(patches) = &map {
                for (index, cluster) in patches {
                    meta.map.set(*index, *cluster);
                }
            }
            let (id, root, parent) = (meta.id, meta.root(), meta.parent());
            let old_parent = old.as_ref().map_or(Parent::None, |old| old.parent());
            let same_view = old.as_ref().is_some_and(|old| {
                Arc::ptr_eq(&old.map, &meta.map) && old_parent == parent && old.flags == meta.flags
            });
            if parent != old_parent {
                if let Parent::Snapshot(old_parent) = old_parent {
                    self.remove_child(old_parent, id);
                }
                if let Parent::Snapshot(parent) = parent {
                    self.children.entry(parent).or_default().insert(id);
                }
            }
            if !same_view {
                rebuild.push(id);
            }
            let meta = Arc::new(meta);
            let slot = self
                .blobs
                .entry(root)
                .or_insert_with(|| Slot::new(Arc::clone(&meta)));
            slot.meta = Arc::clone(&meta);
            if let Some(shared) = slot.handle.upgrade() {
                shared.meta.store(meta);
            }
        }
        for meta in change.deleted {
            self.blobs.remove(&meta.root());
            self.lines.remove(&meta.id);
            if let Parent::Snapshot(parent) = meta.parent() {
                self.remove_child(parent, meta.id);
            }
        }
        for root in change.discarded {
            self.damaged.remove(&root);
            self.remains.remove(&root);
            if !self.uncertain {
                self.pages.clear(root);
            } else if self.damaged.is_empty() {
                self.release_unowned();
            }
        }
        for id in rebuild {
            self.rebuild_views(id);
        }
        let clusters = change.freed_clusters.into_iter();
        self.free(change.freed_pages, clusters.map(|(cluster, _)| cluster));
    }

    fn remove_child(&mut self, parent: BlobId, child: BlobId) {
        if let Some(children) = self.children.get_mut(&parent) {
            children.remove(&child);
            if children.is_empty() {
                self.children.remove(&parent);
            }
        }
    }
}

/// Returns an empty map for a blob of this store.
pub(crate) fn empty_map(state: &State, num_clusters: u64, expected: u64) -> ExtentMap {
    ExtentMap::new(num_clusters, expected, state.geo.cluster_blocks())
}
