//! At load: snapshots that a crash left half made or half removed.

use std::sync::Arc;

use super::change::MapChange;
use super::error::Error;
use super::format::{BlobId, Flags};
use super::meta::{Parent, SNAPRM, SNAPTMP};
use super::state::State;

impl State {
    /// Completes or undoes what a crash has cut. A snapshot whose blob names it as its parent is kept and
    /// its mark goes; else the snapshot goes, and leaves its clusters to the blob. If that blob cannot be
    /// opened, both stay as they are.
    pub fn mend(&mut self) -> Result<(), Error> {
        let marked: Vec<(BlobId, BlobId)> = self
            .blobs
            .values()
            .filter_map(|slot| {
                let named = slot
                    .meta
                    .internal_id(SNAPTMP)
                    .or_else(|| slot.meta.internal_id(SNAPRM))?;
                Some((slot.meta.id, named))
            })
            .collect();
        for (snapshot, named) in marked {
            if snapshot == named
                || self.ancestry(snapshot).is_err()
                || self.ancestry(named).is_err()
            {
                tracing::warn!(%snapshot, blob = %named, "a half-made snapshot whose blob cannot be opened is left alone");
                continue;
            }
            if self.meta(named)?.parent() == Parent::Snapshot(snapshot) {
                tracing::info!(%snapshot, blob = %named, "keeping a snapshot that a crash left half made or half removed");
                self.unshare(snapshot, named)?;
                let mut change = self.begin()?;
                let staged = self.stage(&mut change, snapshot)?;
                staged.meta.remove_internal(SNAPTMP);
                staged.meta.remove_internal(SNAPRM);
                staged.meta.flags.data_ro |= Flags::READ_ONLY;
                staged.other = true;
                self.commit(change)?;
            } else if self.children.contains_key(&snapshot) {
                tracing::warn!(%snapshot, "a half-removed snapshot with other clones is left alone");
            } else {
                tracing::info!(%snapshot, blob = %named, "removing a snapshot that a crash left half made or half removed");
                self.remove_half(snapshot)?;
            }
        }
        Ok(())
    }

    /// A clone whose extent pages already name its snapshot's clusters, while its root does not say so: it
    /// goes on reading them through the snapshot.
    fn unshare(&mut self, snapshot: BlobId, clone: BlobId) -> Result<(), Error> {
        let theirs = Arc::clone(&self.meta(snapshot)?.map);
        let own = Arc::clone(&self.meta(clone)?.map);
        let same: Vec<(u64, u32)> = own
            .allocated()
            .filter(|(index, cluster)| theirs.cluster(*index) == Some(*cluster))
            .collect();
        if same.is_empty() {
            return Ok(());
        }
        let mut change = self.begin()?;
        let staged = self.stage(&mut change, clone)?;
        let map = own.resized(own.num_clusters(), own.num_allocated());
        for (index, _) in &same {
            map.set(*index, 0);
        }
        staged.meta.map = Arc::new(map);
        staged.map = MapChange::Replaced;
        staged.other = true;
        self.commit(change)?;
        for (_, cluster) in same {
            self.shared_clusters.remove(&cluster);
        }
        Ok(())
    }

    /// Removes a snapshot, and of its clusters and extent pages those that nobody else has.
    fn remove_half(&mut self, snapshot: BlobId) -> Result<(), Error> {
        let meta = Arc::clone(self.meta(snapshot)?);
        let method = meta.clear_method();
        let clusters: Vec<u32> = meta.map.allocated().map(|(_, cluster)| cluster).collect();
        let pages: Vec<u32> = meta
            .extent_pages
            .values()
            .chain(&meta.trailing.pages)
            .copied()
            .collect();
        let mut change = self.begin()?;
        // Clusters with a second owner are left out by the commit.
        change
            .freed_clusters
            .extend(clusters.iter().map(|cluster| (*cluster, method)));
        change.freed_pages.extend(
            pages
                .iter()
                .filter(|page| !self.shared_pages.contains(page)),
        );
        change.freed_pages.extend(&meta.chain);
        change.deleted.push(meta);
        self.commit(change)?;
        for cluster in clusters {
            self.shared_clusters.remove(&cluster);
        }
        for page in pages {
            self.shared_pages.remove(&page);
        }
        Ok(())
    }
}
