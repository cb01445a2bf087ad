//! The store's metadata in memory.

use super::blobs::Blobs;
use super::change::{Change, MapChange, Staged};
use super::format::SuperBlock;
use super::lifecycle::{CleanMark, Lifecycle};
use super::space::Allocator;

/// All metadata in memory. It is locked only briefly and does no I/O. A thread that
/// changes the metadata on the device holds an [`Edit`](super::edit::Edit).
#[derive(Debug)]
pub(crate) struct State {
    pub sb: SuperBlock,
    pub lifecycle: Lifecycle,
    pub space: Allocator,
    pub blobs: Blobs,
}

impl State {
    /// Makes a durable change visible and frees what it no longer needs.
    pub(super) fn publish(&mut self, change: Change) {
        self.lifecycle.clean_mark = CleanMark::Removed;
        self.sb.clean = 0.into();
        if self.blobs.journal.is_some() {
            self.sb.set_guard(true);
        }
        if let Some(new) = change.super_block {
            let (sb, geo) = *new;
            self.sb = sb;
            self.sb.clean = 0.into();
            self.space.relocate(geo);
        }
        let mut rebuild = Vec::new();
        for staged in change.staged {
            let Staged { meta, map, old, .. } = staged;
            if let MapChange::Patch(patches) = &map {
                for (index, cluster) in patches {
                    meta.map.set(*index, *cluster);
                }
            }
            let id = meta.id;
            if self.blobs.replace(old.as_deref(), meta) {
                rebuild.push(id);
            }
        }
        for meta in &change.deleted {
            self.blobs.remove(meta);
        }
        for root in change.discarded {
            let next = self.blobs.remove_damaged(root);
            self.space.discard(root, next);
        }
        for id in rebuild {
            self.blobs.rebuild_views(id);
        }
        let clusters = change.freed_clusters.into_iter();
        self.space
            .free(change.freed_pages, clusters.map(|(cluster, _)| cluster));
    }
}
