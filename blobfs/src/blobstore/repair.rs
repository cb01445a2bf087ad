//! Repairs at load: snapshots that a crash left half made or half removed.

use std::sync::Arc;

use super::change::MapChange;
use super::edit::Edit;
use super::error::Error;
use super::format::{BlobId, Flags};
use super::meta::{Parent, SNAPRM, SNAPTMP};

/// Completes or undoes what a crash has cut. A snapshot whose blob names it as its parent is
/// kept, without its mark. Any other is removed and leaves its clusters to the blob. If that
/// blob cannot be opened, both stay as they are.
pub(crate) fn end_half_done(edit: &Edit<'_>) -> Result<(), Error> {
    let marked = edit.state().blobs.half_done();
    for (snapshot, named) in marked {
        let state = edit.state();
        if snapshot == named
            || state.blobs.ancestry(snapshot).is_err()
            || state.blobs.ancestry(named).is_err()
        {
            tracing::warn!(%snapshot, blob = %named, "a half-made snapshot whose blob cannot be opened is left alone");
            continue;
        }
        let is_parent = state.blobs.meta(named)?.parent() == Parent::Snapshot(snapshot);
        let has_others = state.blobs.children.contains_key(&snapshot);
        drop(state);
        if is_parent {
            tracing::info!(%snapshot, blob = %named, "keeping a snapshot that a crash left half made or half removed");
            unshare(edit, snapshot, named)?;
            edit.change(|state, change| {
                let staged = change.stage(&state.blobs, snapshot)?;
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
            remove_half(edit, snapshot)?;
        }
    }
    Ok(())
}

/// Repairs a clone whose extent pages already name its snapshot's clusters while its root does
/// not say so: it goes on reading them through the snapshot.
fn unshare(edit: &Edit<'_>, snapshot: BlobId, clone: BlobId) -> Result<(), Error> {
    let (theirs, own) = {
        let state = edit.state();
        let map = |id| Ok::<_, Error>(Arc::clone(&state.blobs.meta(id)?.map));
        (map(snapshot)?, map(clone)?)
    };
    let same: Vec<(u64, u32)> = own
        .allocated()
        .filter(|(index, cluster)| theirs.cluster(*index) == Some(*cluster))
        .collect();
    if same.is_empty() {
        return Ok(());
    }
    edit.change(|state, change| {
        let staged = change.stage(&state.blobs, clone)?;
        let map = own.resized(own.num_clusters(), own.num_allocated());
        for (index, _) in &same {
            map.set(*index, 0);
        }
        staged.meta.map = Arc::new(map);
        staged.map = MapChange::Replaced;
        staged.other = true;
        Ok(())
    })?;
    let mut state = edit.state();
    for (_, cluster) in same {
        state.space.shared_clusters.remove(&cluster);
    }
    Ok(())
}

/// Removes a snapshot, and those of its clusters and extent pages that nothing else uses.
fn remove_half(edit: &Edit<'_>, snapshot: BlobId) -> Result<(), Error> {
    let meta = Arc::clone(edit.state().blobs.meta(snapshot)?);
    edit.change(|state, change| {
        change.remove(Arc::clone(&meta), &state.space.shared_pages, |_| true);
        Ok(())
    })?;
    let mut state = edit.state();
    for cluster in meta.clusters() {
        state.space.shared_clusters.remove(&cluster);
    }
    for page in meta.pages_of_extents() {
        state.space.shared_pages.remove(&page);
    }
    Ok(())
}
