//! Making and deleting snapshots and clones.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Blobstore;
use super::change::{Change, MapChange, Staged, empty_map};
use super::edit::Edit;
use super::error::Error;
use super::format::{BlobId, Flags, Xattr, encode_blob};
use super::meta::{self, BlobMeta, Parent, SNAPRM, SNAPTMP, Trailing};
use super::ops::check_xattr;
use super::order::Scope;
use super::state::State;
use super::view::{Source, View};

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
            state.check_writable(id)?;
            state.ancestry(id)?;
            Ok((Scope::All, state.open_family(id)))
        })?;
        // What the blob's users have written is durable before it becomes the snapshot's.
        self.inner.md_channels.get()?.flush()?;
        self.check_flushes()?;
        edit.snapshot(id, xattrs)
    }

    /// Makes a thin clone of a read-only blob, with these xattrs. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if the blob is not read-only, if there are no metadata pages, and when the device
    /// fails.
    pub fn clone_blob(&self, id: BlobId, xattrs: &[(String, Vec<u8>)]) -> Result<BlobId, Error> {
        let xattrs = to_xattrs(xattrs)?;
        self.inner.state.lock().ancestry(id)?;
        let edit = self.edit(&Scope::All)?;
        let mut state = edit.state();
        state.ancestry(id)?;
        let parent = Arc::clone(state.meta(id)?);
        if !parent.flags.data_read_only() {
            return Err(Error::invalid(format!(
                "blob {id} is not read-only, so it cannot have clones; make a snapshot of it and clone that"
            )));
        }
        let mut change = Change::default();
        let root = state.take_page(&mut change, true)?;
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
            map: Arc::new(empty_map(&state, parent.map.num_clusters(), 0)),
            trailing: Trailing::default(),
        };
        if parent.table {
            meta.flags.invalid |= Flags::EXTENT_TABLE;
        }
        meta.set_parent(&Parent::Snapshot(id));
        let clone = meta.id;
        change.staged.push(Staged {
            meta,
            map: MapChange::None,
            other: true,
            old: None,
        });
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
        let merges_into = |state: &State| -> Option<BlobId> {
            let children = state.children.get(&id).filter(|_| !state.is_damaged(id))?;
            children.first().copied().filter(|_| children.len() == 1)
        };
        // The clone's handles will need it.
        let merges = merges_into(&self.inner.state.lock()).is_some();
        let _external = match merges {
            true => self.open_external_of(id)?,
            false => None,
        };
        let (_frozen, edit) = self.edit_frozen(|state| {
            let open = merges_into(state).map(|clone| state.open_family(clone));
            Ok((Scope::All, open.unwrap_or_default()))
        })?;
        let clone = merges_into(&edit.state());
        match clone {
            Some(clone) => edit.delete_snapshot(id, clone),
            None => edit.change(|state, change| state.delete(change, id)),
        }
    }

    /// Makes a blob read-only for good. Waits for I/O in flight. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if there is no such blob, and when the device fails.
    pub fn set_read_only(&self, id: BlobId) -> Result<(), Error> {
        let (_frozen, edit) = self.edit_frozen(|state| {
            state.ancestry(id)?;
            Ok((Scope::All, state.shared(id).into_iter().collect()))
        })?;
        edit.change(|state, change| {
            let staged = state.stage(change, id)?;
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

/// A snapshot whose creation has failed and that could not be undone.
#[derive(Debug)]
pub(crate) struct HalfSnapshot {
    snapshot: BlobId,
    /// The blob as it was, if it is the snapshot's clone already.
    origin: Option<Arc<BlobMeta>>,
}

impl Edit<'_> {
    /// Performs the three commits that make a snapshot. The next load undoes it after a crash
    /// between the first and the second, and completes it after a crash behind the second.
    fn snapshot(&self, id: BlobId, xattrs: Vec<Xattr>) -> Result<BlobId, Error> {
        let mut state = self.state();
        let origin = Arc::clone(state.meta(id)?);
        let mut change = Change::default();
        let snapshot = BlobId::from_page(state.take_page(&mut change, true)?);

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
        clone.map = Arc::new(empty_map(&state, origin.map.num_clusters(), 0));
        clone.extent_pages = BTreeMap::new();
        clone.set_parent(&Parent::Snapshot(snapshot));

        let needed = chain_len(&first) + chain_len(&clone) + chain_len(&last);
        if let Err(error) = state.check_free_pages(needed, change.spend) {
            state.rollback(&change);
            return Err(error);
        }
        change.staged.push(Staged {
            meta: first,
            map: MapChange::None,
            other: true,
            old: None,
        });
        self.commit(state, change)?;

        if let Err(error) = self.replace(id, clone) {
            return Err(self.undo_snapshot(snapshot, None, error));
        }
        let chain = self.state().meta(snapshot)?.chain.clone();
        if let Err(error) = self.replace(snapshot, BlobMeta { chain, ..last }) {
            return Err(self.undo_snapshot(snapshot, Some(&origin), error));
        }
        Ok(snapshot)
    }

    /// Takes back the first commits of a snapshot after the next one has failed. If that fails as
    /// well, the store stops until it can be done: the snapshot has its mark and the blob's
    /// clusters. The next load would also resolve it.
    fn undo_snapshot(
        &self,
        snapshot: BlobId,
        origin: Option<&Arc<BlobMeta>>,
        error: Error,
    ) -> Error {
        let half = HalfSnapshot {
            snapshot,
            origin: origin.cloned(),
        };
        match self.undo_half_snapshot(half) {
            Ok(()) => error,
            Err(half) => {
                let mut state = self.state();
                state.stop(&error, false);
                state.half_snapshot = Some(half);
                Error::Undecided(Box::new(error))
            }
        }
    }

    /// Tries to undo it. Returns it if that fails.
    pub(super) fn undo_half_snapshot(&self, mut half: HalfSnapshot) -> Result<(), HalfSnapshot> {
        if let Some(origin) = &half.origin {
            let old = self.state().meta(origin.id).map(|meta| meta.chain.clone());
            let undone = old.and_then(|chain| {
                let meta = BlobMeta {
                    chain,
                    // The second commit has freed it.
                    trailing: Trailing::default(),
                    ..(**origin).clone()
                };
                self.replace(origin.id, meta)
            });
            match undone {
                Ok(()) => half.origin = None,
                Err(_) => return Err(half),
            }
        }
        self.forget(half.snapshot).map_err(|_| half)
    }

    /// Commits a new version of a blob that keeps its extent pages, or has given them away.
    fn replace(&self, id: BlobId, meta: BlobMeta) -> Result<(), Error> {
        self.change(|state, change| {
            let staged = state.stage(change, id)?;
            staged.meta = meta;
            staged.other = true;
            Ok(())
        })
    }

    /// Deletes a blob, but neither its clusters nor its extent pages, which belong to another.
    fn forget(&self, id: BlobId) -> Result<(), Error> {
        self.change(|state, change| {
            let meta = Arc::clone(state.meta(id)?);
            change.freed_pages.extend(&meta.chain);
            change.deleted.push(meta);
            Ok(())
        })
    }

    /// Performs two commits: the mark on the snapshot, then the clone with the snapshot's clusters
    /// together with the end of the snapshot.
    fn delete_snapshot(&self, id: BlobId, clone: BlobId) -> Result<(), Error> {
        let mut state = self.state();
        if state.shared(id).is_some() {
            return Err(Error::Busy(format!(
                "blob {id} is open; close it before deleting it"
            )));
        }
        state.ancestry(clone)?;
        let snapshot = Arc::clone(state.meta(id)?);

        // Everything that may run out is tried before the mark is written.
        let mut change = Change::default();
        if let Err(error) = state.stage_merge(&mut change, &snapshot, clone) {
            state.rollback(&change);
            return Err(error);
        }
        drop(state);
        let marked = self.change(|state, mark| {
            let staged = state.stage(mark, id)?;
            staged.meta.set_internal(SNAPRM, &clone.0.to_le_bytes());
            staged.other = true;
            Ok(())
        });
        let mut state = self.state();
        if let Err(error) = marked {
            state.rollback(&change);
            return Err(error);
        }
        let marked = Arc::clone(state.meta(id)?);
        let kept: std::collections::HashSet<u32> = change
            .staged
            .iter()
            .flat_map(|staged| staged.meta.map.allocated())
            .map(|(_, cluster)| cluster)
            .collect();
        change.delete(marked, &state.shared_pages, |cluster| {
            !kept.contains(&cluster)
        });
        if let Err(error) = self.commit(state, change) {
            // If the mark stays, the next load removes it.
            if let Err(error) = self.replace_mark(id) {
                tracing::warn!(blob = %id, %error, "the mark of a removal that failed stays until the next load");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Removes the mark of a deletion in progress.
    fn replace_mark(&self, id: BlobId) -> Result<(), Error> {
        self.change(|state, change| {
            let staged = state.stage(change, id)?;
            staged.meta.remove_internal(SNAPRM);
            staged.other = true;
            Ok(())
        })
    }
}

impl State {
    /// Stages the clone with the clusters that it read from the snapshot.
    fn stage_merge(
        &mut self,
        change: &mut Change,
        snapshot: &BlobMeta,
        clone: BlobId,
    ) -> Result<(), Error> {
        let below = self.view(snapshot.id)?;
        let old = Arc::clone(self.meta(clone)?);
        let size = old.map.num_clusters();
        let map = old
            .map
            .resized(size, old.map.num_allocated() + snapshot.map.num_allocated());
        for (index, cluster) in snapshot
            .map
            .allocated()
            .take_while(|(index, _)| *index < size)
        {
            if map.cluster(index).is_none() {
                map.set(index, cluster);
            }
        }
        self.cover_tail(change, &below, snapshot.map.num_clusters(), &map)?;
        let staged = self.stage(change, clone)?;
        staged.meta.map = Arc::new(map);
        staged.meta.set_parent(&snapshot.parent());
        staged.map = MapChange::Replaced;
        staged.other = true;
        Ok(())
    }

    /// Gives a clone zeroes of its own past the end of its parent, where it reads zeroes. When the
    /// parent is deleted and the parent's parent is larger, that one's bytes would show instead.
    pub fn cover_tail(
        &mut self,
        change: &mut Change,
        below: &View,
        parent_size: u64,
        map: &super::extents::ExtentMap,
    ) -> Result<(), Error> {
        let external = below
            .external
            .as_ref()
            .map_or(0, |ext| ext.len_bytes().div_ceil(self.geo.cluster_size));
        let sizes = below.ancestors().map(|map| map.num_clusters());
        let end = sizes
            .chain([external])
            .max()
            .unwrap_or(0)
            .min(map.num_clusters());
        for index in parent_size..end {
            let shows =
                map.cluster(index).is_none() && below.parent_source(index) != Source::Zeroes;
            if shows {
                let cluster = self.take_cluster(change)?;
                change.prepare.extend(
                    self.can
                        .zeroes(self.geo.cluster_lba(cluster), self.geo.cluster_blocks())?,
                );
                map.set(index, cluster);
            }
        }
        Ok(())
    }
}
