//! Making and deleting snapshots and clones.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Blobstore;
use super::blobs::Blobs;
use super::change::{Change, Staged, empty_map};
use super::edit::Edit;
use super::error::Error;
use super::format::{BlobId, Flags, Xattr, encode_blob};
use super::lifecycle::HalfSnapshot;
use super::meta::{self, BlobMeta, Parent, SNAPRM, SNAPTMP, Trailing};
use super::ops::check_xattr;
use super::order::Scope;

impl Blobstore {
    /// Makes a read-only snapshot of a blob, with these xattrs. The blob becomes its clone. I/O in
    /// flight on the blob ends first, and I/O that comes meanwhile waits. Durable on return.
    /// Blocks.
    ///
    /// # Errors
    /// Fails for a read-only blob, if there are no metadata pages, if I/O does not end, and when
    /// the device fails.
    pub fn snapshot(&self, id: BlobId, xattrs: &[(String, Vec<u8>)]) -> Result<BlobId, Error> {
        let xattrs = to_xattrs(xattrs)?;
        let (_frozen, edit) = self.edit_frozen(|state| {
            state.blobs.check_writable(id)?;
            state.blobs.ancestry(id)?;
            Ok((Scope::All, state.blobs.open_family(id)))
        })?;
        // What the blob's users have written is durable before it becomes the snapshot's.
        self.inner.md_channels.get()?.flush()?;
        self.check_flushes()?;
        snapshot(&edit, id, xattrs)
    }

    /// Makes a thin clone of a read-only blob, with these xattrs. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if the blob is not read-only, if there are no metadata pages, and when the device
    /// fails.
    pub fn clone_blob(&self, id: BlobId, xattrs: &[(String, Vec<u8>)]) -> Result<BlobId, Error> {
        let xattrs = to_xattrs(xattrs)?;
        self.inner.state.lock().blobs.ancestry(id)?;
        let edit = self.edit(&Scope::All)?;
        let mut state = edit.state();
        state.blobs.ancestry(id)?;
        let parent = Arc::clone(state.blobs.meta(id)?);
        if !parent.flags.data_read_only() {
            return Err(Error::invalid(format!(
                "blob {id} is not read-only, so it cannot have clones; make a snapshot of it and clone that"
            )));
        }
        let mut change = Change::default();
        let root = change.take_page(&mut state.space, true)?;
        let mut meta = BlobMeta {
            id: BlobId::from_page(root),
            flags: Flags {
                invalid: Flags::THIN,
                data_ro: 0,
                md_ro: parent.flags.md_ro & Flags::CLEAR_METHOD,
            },
            xattrs,
            internal: Vec::new(),
            table: parent.table,
            chain: Vec::new(),
            extent_pages: BTreeMap::new(),
            map: Arc::new(empty_map(&state.space.geo, parent.map.num_clusters(), 0)),
            trailing: Trailing::default(),
        };
        if parent.table {
            meta.flags.invalid |= Flags::EXTENT_TABLE;
        }
        meta.set_parent(&Parent::Snapshot(id));
        let clone = meta.id;
        change.staged.push(Staged::new(meta));
        edit.commit(state, change)?;
        Ok(clone)
    }

    /// Deletes a blob that is not open. A snapshot may have one clone, which takes over its
    /// clusters. A damaged blob ([`Blobstore::damaged`]) without clones is deleted with everything
    /// that it holds. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if the blob is open or has several clones, and when the device fails.
    pub fn delete(&self, id: BlobId) -> Result<(), Error> {
        let merges_into = |blobs: &Blobs| -> Option<BlobId> {
            let children = blobs.children.get(&id).filter(|_| !blobs.is_damaged(id))?;
            children.first().copied().filter(|_| children.len() == 1)
        };
        // The clone's handles will need it.
        let merges = merges_into(&self.inner.state.lock().blobs).is_some();
        let _external = match merges {
            true => self.open_external_of(id)?,
            false => None,
        };
        let (_frozen, edit) = self.edit_frozen(|state| {
            let open = merges_into(&state.blobs).map(|clone| state.blobs.open_family(clone));
            Ok((Scope::All, open.unwrap_or_default()))
        })?;
        let clone = merges_into(&edit.state().blobs);
        match clone {
            Some(clone) => delete_snapshot(&edit, id, clone),
            None => edit.change(|state, change| change.delete(&state.blobs, &state.space, id)),
        }
    }

    /// Makes a blob read-only for good. Waits for I/O in flight. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if there is no such blob, and when the device fails.
    pub fn set_read_only(&self, id: BlobId) -> Result<(), Error> {
        let (_frozen, edit) = self.edit_frozen(|state| {
            state.blobs.ancestry(id)?;
            Ok((Scope::All, state.blobs.shared(id).into_iter().collect()))
        })?;
        edit.change(|state, change| {
            let staged = change.stage(&state.blobs, id)?;
            staged.meta.flags.data_ro |= Flags::READ_ONLY;
            staged.other = true;
            Ok(())
        })
    }
}

fn to_xattrs(xattrs: &[(String, Vec<u8>)]) -> Result<Vec<Xattr>, Error> {
    let mut all = Vec::with_capacity(xattrs.len());
    for (name, value) in xattrs {
        check_xattr(name.as_bytes(), value)?;
        meta::set(&mut all, name.as_bytes(), value);
    }
    Ok(all)
}

/// Returns the number of pages of a blob's chain besides the root.
fn chain_len(meta: &BlobMeta) -> u64 {
    encode_blob(&meta.record(&[])).len() as u64 - 1
}

/// Performs the three commits that make a snapshot. The next load undoes it after a crash
/// between the first and the second, and completes it after a crash behind the second.
fn snapshot(edit: &Edit<'_>, id: BlobId, xattrs: Vec<Xattr>) -> Result<BlobId, Error> {
    let mut state = edit.state();
    let origin = Arc::clone(state.blobs.meta(id)?);
    let mut change = Change::default();
    let snapshot = BlobId::from_page(change.take_page(&mut state.space, true)?);

    let mut first = (*origin).clone();
    first.id = snapshot;
    first.xattrs = xattrs;
    first.chain = Vec::new();
    first.trailing = Trailing::default();
    first.internal.clear();
    first.flags.invalid &= !Flags::INTERNAL_XATTRS;
    if origin.parent() != Parent::None {
        first.set_parent(&origin.parent());
    }
    let mut last = first.clone();
    last.flags.data_ro |= Flags::READ_ONLY;
    first.set_internal(SNAPTMP, &id.0.to_le_bytes());

    let mut clone = (*origin).clone();
    clone.map = Arc::new(empty_map(&state.space.geo, origin.map.num_clusters(), 0));
    clone.extent_pages = BTreeMap::new();
    clone.set_parent(&Parent::Snapshot(snapshot));

    let needed = chain_len(&first) + chain_len(&clone) + chain_len(&last);
    if let Err(error) = state.space.check_free_pages(needed, change.spend) {
        state.space.give_back(&change.taken);
        return Err(error);
    }
    change.staged.push(Staged::new(first));
    edit.commit(state, change)?;

    if let Err(error) = replace(edit, id, clone) {
        return Err(undo_snapshot(edit, snapshot, None, error));
    }
    let chain = edit.state().blobs.meta(snapshot)?.chain.clone();
    if let Err(error) = replace(edit, snapshot, BlobMeta { chain, ..last }) {
        return Err(undo_snapshot(edit, snapshot, Some(&origin), error));
    }
    Ok(snapshot)
}

/// Takes back the first commits of a snapshot after the next one has failed. If that fails as
/// well, the store stops until it can be done: the snapshot has its mark and the blob's
/// clusters. The next load would also resolve it.
fn undo_snapshot(
    edit: &Edit<'_>,
    snapshot: BlobId,
    origin: Option<&Arc<BlobMeta>>,
    error: Error,
) -> Error {
    let half = HalfSnapshot {
        snapshot,
        origin: origin.cloned(),
    };
    match undo_half_snapshot(edit, half) {
        Ok(()) => error,
        Err(half) => {
            let mut state = edit.state();
            state.lifecycle.stop(&error, false);
            state.lifecycle.half_snapshot = Some(half);
            Error::Undecided(Box::new(error))
        }
    }
}

/// Tries to undo it. Returns it if that fails.
pub(crate) fn undo_half_snapshot(
    edit: &Edit<'_>,
    mut half: HalfSnapshot,
) -> Result<(), HalfSnapshot> {
    if let Some(origin) = &half.origin {
        let old = edit
            .state()
            .blobs
            .meta(origin.id)
            .map(|meta| meta.chain.clone());
        let undone = old.and_then(|chain| {
            let meta = BlobMeta {
                chain,
                // The second commit has freed it.
                trailing: Trailing::default(),
                ..(**origin).clone()
            };
            replace(edit, origin.id, meta)
        });
        match undone {
            Ok(()) => half.origin = None,
            Err(_) => return Err(half),
        }
    }
    forget(edit, half.snapshot).map_err(|_| half)
}

/// Commits a new version of a blob that keeps its extent pages, or has given them away.
fn replace(edit: &Edit<'_>, id: BlobId, meta: BlobMeta) -> Result<(), Error> {
    edit.change(|state, change| {
        let staged = change.stage(&state.blobs, id)?;
        staged.meta = meta;
        staged.other = true;
        Ok(())
    })
}

/// Deletes a blob, but neither its clusters nor its extent pages, which belong to another.
fn forget(edit: &Edit<'_>, id: BlobId) -> Result<(), Error> {
    edit.change(|state, change| {
        let meta = Arc::clone(state.blobs.meta(id)?);
        change.freed_pages.extend(&meta.chain);
        change.deleted.push(meta);
        Ok(())
    })
}

/// Performs two commits: the mark on the snapshot, then the clone with the snapshot's clusters
/// together with the end of the snapshot.
fn delete_snapshot(edit: &Edit<'_>, id: BlobId, clone: BlobId) -> Result<(), Error> {
    let mut state = edit.state();
    if state.blobs.shared(id).is_some() {
        return Err(Error::Busy(format!(
            "blob {id} is open; close it before deleting it"
        )));
    }
    state.blobs.ancestry(clone)?;
    let snapshot = Arc::clone(state.blobs.meta(id)?);

    // Everything that may run out is tried before the mark is written.
    let mut change = Change::default();
    let rooms = &mut *state;
    let merged = change.merge(&mut rooms.blobs, &mut rooms.space, &snapshot, clone);
    if let Err(error) = merged {
        state.space.give_back(&change.taken);
        return Err(error);
    }
    drop(state);
    let marked = edit.change(|state, mark| {
        let staged = mark.stage(&state.blobs, id)?;
        staged.meta.set_internal(SNAPRM, &clone.0.to_le_bytes());
        staged.other = true;
        Ok(())
    });
    let mut state = edit.state();
    if let Err(error) = marked {
        state.space.give_back(&change.taken);
        return Err(error);
    }
    let marked = Arc::clone(state.blobs.meta(id)?);
    let kept: std::collections::HashSet<u32> = change
        .staged
        .iter()
        .flat_map(|staged| staged.meta.map.allocated())
        .map(|(_, cluster)| cluster)
        .collect();
    change.remove(marked, &state.space.shared_pages, |cluster| {
        !kept.contains(&cluster)
    });
    if let Err(error) = edit.commit(state, change) {
        // If the mark stays, the next load removes it.
        if let Err(error) = replace_mark(edit, id) {
            tracing::warn!(blob = %id, %error, "the mark of a removal that failed stays until the next load");
        }
        return Err(error);
    }
    Ok(())
}

/// Removes the mark of a deletion in progress.
fn replace_mark(edit: &Edit<'_>, id: BlobId) -> Result<(), Error> {
    edit.change(|state, change| {
        let staged = change.stage(&state.blobs, id)?;
        staged.meta.remove_internal(SNAPRM);
        staged.other = true;
        Ok(())
    })
}
