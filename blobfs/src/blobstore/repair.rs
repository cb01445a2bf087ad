//! Repairs at load: snapshots that a crash left half made or half removed.

use std::sync::Arc;

use super::change::MapChange;
use super::edit::Edit;
use super::error::Error;
use super::format::{BlobId, Flags};
use super::meta::{BlobMeta, Parent, SNAPRM, SNAPTMP};
use super::state::State;

impl State {
    /// Returns the snapshots that are marked as half made or half removed, each with the blob that
    /// it names.
    pub fn half_done(&self) -> Vec<(BlobId, BlobId)> {
        let marked = |meta: &BlobMeta| {
            let named = meta.internal_id(SNAPTMP);
            Some((meta.id, named.or_else(|| meta.internal_id(SNAPRM))?))
        };
        self.blobs
            .values()
            .filter_map(|slot| marked(&slot.meta))
            .collect()
    }
}

impl Edit<'_> {
    /// Completes or undoes what a crash has cut. A snapshot whose blob names it as its parent is
    /// kept, without its mark. Any other is removed and leaves its clusters to the blob. If that
    /// blob cannot be opened, both stay as they are.
    pub fn end_half_done(&self) -> Result<(), Error> {
        let marked = self.state().half_done();
        for (snapshot, named) in marked {
            let state = self.state();
            if snapshot == named
                || state.ancestry(snapshot).is_err()
                || state.ancestry(named).is_err()
            {
                tracing::warn!(%snapshot, blob = %named, "a half-made snapshot whose blob cannot be opened is left alone");
                continue;
            }
            let is_parent = state.meta(named)?.parent() == Parent::Snapshot(snapshot);
            let has_others = state.children.contains_key(&snapshot);
            drop(state);
            if is_parent {
                tracing::info!(%snapshot, blob = %named, "keeping a snapshot that a crash left half made or half removed");
                self.unshare(snapshot, named)?;
                self.change(|state, change| {
                    let staged = state.stage(change, snapshot)?;
                    staged.meta.remove_internal(SNAPTMP);
                    staged.meta.remove_internal(SNAPRM);
                    staged.meta.flags.data_ro |= Flags::READ_ONLY;
                    staged.other = true;
                    Ok(())
                })?;
            } else if has_others {
                tracing::warn!(%snapshot, "a half-removed snapshot with other clones is left alone");
            } else {
                tracing::info!(%snapshot, blob = %named, "removing a snapshot that a crash left half made or half removed");
                self.remove_half(snapshot)?;
            }
        }
        Ok(())
    }

    /// Repairs a clone whose extent pages already name its snapshot's clusters while its root does
    /// not say so: it goes on reading them through the snapshot.
    fn unshare(&self, snapshot: BlobId, clone: BlobId) -> Result<(), Error> {
        let (theirs, own) = {
            let state = self.state();
            let map = |id| Ok::<_, Error>(Arc::clone(&state.meta(id)?.map));
            (map(snapshot)?, map(clone)?)
        };
        let same: Vec<(u64, u32)> = own
            .allocated()
            .filter(|(index, cluster)| theirs.cluster(*index) == Some(*cluster))
            .collect();
        if same.is_empty() {
            return Ok(());
        }
        self.change(|state, change| {
            let staged = state.stage(change, clone)?;
            let map = own.resized(own.num_clusters(), own.num_allocated());
            for (index, _) in &same {
                map.set(*index, 0);
            }
            staged.meta.map = Arc::new(map);
            staged.map = MapChange::Replaced;
            staged.other = true;
            Ok(())
        })?;
        let mut state = self.state();
        for (_, cluster) in same {
            state.shared_clusters.remove(&cluster);
        }
        Ok(())
    }

    /// Removes a snapshot, and those of its clusters and extent pages that nothing else uses.
    fn remove_half(&self, snapshot: BlobId) -> Result<(), Error> {
        let meta = Arc::clone(self.state().meta(snapshot)?);
        self.change(|state, change| {
            change.delete(Arc::clone(&meta), &state.shared_pages, |_| true);
            Ok(())
        })?;
        let mut state = self.state();
        for cluster in meta.clusters() {
            state.shared_clusters.remove(&cluster);
        }
        for page in meta.pages_of_extents() {
            state.shared_pages.remove(&page);
        }
        Ok(())
    }
}
