//! Snapshots and clones: made, and deleted.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Blobstore;
use super::change::{Change, MapChange, Staged, empty_map};
use super::error::Error;
use super::format::{BlobId, Flags, Xattr, encode_blob};
use super::meta::{self, BlobMeta, Parent, SNAPRM, SNAPTMP, Trailing};
use super::ops::check_xattr;
use super::state::State;
use super::view::{Source, View};

impl Blobstore {
    /// Makes a read-only snapshot of a blob with the xattrs given; the blob becomes its clone. I/O in flight
    /// on the blob ends first, what comes meanwhile waits. Durable on return. Blocks.
    ///
    /// # Errors
    /// A read-only blob, no metadata pages, I/O that does not end, I/O errors.
    pub fn snapshot(&self, id: BlobId, xattrs: &[(String, Vec<u8>)]) -> Result<BlobId, Error> {
        let xattrs = to_xattrs(xattrs)?;
        let (_frozen, mut state) = self.lock_frozen(|state| {
            state.check_writable(id)?;
            state.ancestry(id)?;
            Ok(state.open_family(id))
        })?;
        state.check_takes_changes()?;
        // What the blob's users have written is durable before it becomes the snapshot's.
        state.io.flush()?;
        self.check_flushes()?;
        state.snapshot(id, xattrs)
    }

    /// Makes a thin clone of a read-only blob, with the xattrs given. Durable on return. Blocks.
    ///
    /// # Errors
    /// The blob is not read-only, no metadata pages, I/O errors.
    pub fn clone_blob(&self, id: BlobId, xattrs: &[(String, Vec<u8>)]) -> Result<BlobId, Error> {
        let xattrs = to_xattrs(xattrs)?;
        let mut state = self.inner.state.lock();
        state.ancestry(id)?;
        let parent = Arc::clone(state.meta(id)?);
        if !parent.flags.data_read_only() {
            return Err(Error::invalid(format!(
                "blob {id} is not read-only, so it cannot have clones; make a snapshot of it and clone that"
            )));
        }
        let mut change = state.begin()?;
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
        state.commit(change)?;
        Ok(clone)
    }

    /// Deletes a blob that is not open. A snapshot may have one clone, which takes over its clusters. A
    /// damaged blob ([`Blobstore::damaged`]) without clones is given up with all that it holds. Durable on
    /// return. Blocks.
    ///
    /// # Errors
    /// The blob is open or has several clones, I/O errors.
    pub fn delete(&self, id: BlobId) -> Result<(), Error> {
        let children = |state: &State| -> Vec<BlobId> {
            let children = state.children.get(&id);
            children.into_iter().flatten().copied().collect()
        };
        let (_frozen, mut state) = self.lock_frozen(|state| match children(state)[..] {
            [clone] => Ok(state.open_family(clone)),
            _ => Ok(Vec::new()),
        })?;
        let children = children(&state);
        let damaged = id
            .page()
            .is_some_and(|root| state.damaged.contains_key(&root));
        if let ([clone], false) = (&children[..], damaged) {
            let clone = *clone;
            return state.delete_snapshot(id, clone);
        }
        let mut change = state.begin()?;
        match state.delete(&mut change, id) {
            Ok(()) => state.commit(change),
            Err(error) => {
                state.rollback(change);
                Err(error)
            }
        }
    }

    /// Makes a blob read-only, for good. Waits for I/O in flight; durable on return. Blocks.
    ///
    /// # Errors
    /// No such blob, I/O errors.
    pub fn set_read_only(&self, id: BlobId) -> Result<(), Error> {
        let (_frozen, mut state) = self.lock_frozen(|state| {
            state.ancestry(id)?;
            Ok(state.shared(id).into_iter().collect())
        })?;
        let mut change = state.begin()?;
        let staged = state.stage(&mut change, id)?;
        staged.meta.flags.data_ro |= Flags::READ_ONLY;
        staged.other = true;
        state.commit(change)
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

/// Pages of a blob's chain besides the root.
fn chain_len(meta: &BlobMeta) -> u64 {
    encode_blob(&meta.record(&[])).len() as u64 - 1
}

/// A snapshot whose making has failed and that could not be undone.
#[derive(Debug)]
pub(crate) struct HalfSnapshot {
    snapshot: BlobId,
    /// The blob as it was, if it is the snapshot's clone already.
    origin: Option<Arc<BlobMeta>>,
}

impl State {
    /// The three commits that make a snapshot. A crash after the first is undone by the next load, a crash
    /// after the second is completed.
    fn snapshot(&mut self, id: BlobId, xattrs: Vec<Xattr>) -> Result<BlobId, Error> {
        let origin = Arc::clone(self.meta(id)?);
        let mut change = self.begin()?;
        let snapshot = BlobId::from_page(self.take_page(&mut change, true)?);

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
        clone.map = Arc::new(empty_map(self, origin.map.num_clusters(), 0));
        clone.extent_pages = BTreeMap::new();
        clone.set_parent(&Parent::Snapshot(snapshot));

        let needed = chain_len(&first) + chain_len(&clone) + chain_len(&last);
        if let Err(error) = self.check_free_pages(needed, change.spend) {
            self.rollback(change);
            return Err(error);
        }
        change.staged.push(Staged {
            meta: first,
            map: MapChange::None,
            other: true,
            old: None,
        });
        self.commit(change)?;

        if let Err(error) = self.replace(id, clone) {
            return Err(self.undo_snapshot(snapshot, None, error));
        }
        let chain = self.meta(snapshot)?.chain.clone();
        if let Err(error) = self.replace(snapshot, BlobMeta { chain, ..last }) {
            return Err(self.undo_snapshot(snapshot, Some(&origin), error));
        }
        Ok(snapshot)
    }

    /// Takes the first commits of a snapshot back after the next has failed. If that fails as well, the store
    /// stops until it could be done: the snapshot has its mark and the blob's clusters. (The next load would
    /// make an end of it, too.)
    fn undo_snapshot(
        &mut self,
        snapshot: BlobId,
        origin: Option<&Arc<BlobMeta>>,
        error: Error,
    ) -> Error {
        let half = HalfSnapshot {
            snapshot,
            origin: origin.cloned(),
        };
        match self.undo(half) {
            Ok(()) => error,
            Err(half) => {
                self.stopped.get_or_insert_with(|| error.to_string());
                self.half_snapshot = Some(half);
                Error::Undecided(Box::new(error))
            }
        }
    }

    /// Gives it back if it cannot be undone.
    pub(super) fn undo(&mut self, mut half: HalfSnapshot) -> Result<(), HalfSnapshot> {
        if let Some(origin) = &half.origin {
            let old = self.meta(origin.id).map(|meta| meta.chain.clone());
            let undone = old.and_then(|chain| {
                let meta = BlobMeta {
                    chain,
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

    /// Commits a new version of a blob that keeps, or has given away, its extent pages.
    fn replace(&mut self, id: BlobId, meta: BlobMeta) -> Result<(), Error> {
        let mut change = self.begin()?;
        let staged = self.stage(&mut change, id)?;
        staged.meta = meta;
        staged.other = true;
        self.commit(change)
    }

    /// Deletes a blob, but neither its clusters nor its extent pages: they are another's.
    pub fn forget(&mut self, id: BlobId) -> Result<(), Error> {
        let meta = Arc::clone(self.meta(id)?);
        let mut change = self.begin()?;
        change.freed_pages.extend(&meta.chain);
        change.deleted.push(meta);
        self.commit(change)
    }

    /// Two commits: the mark on the snapshot, then the clone with the snapshot's clusters, at once
    /// followed by the end of the snapshot.
    fn delete_snapshot(&mut self, id: BlobId, clone: BlobId) -> Result<(), Error> {
        if self.shared(id).is_some() {
            return Err(Error::Busy(format!(
                "blob {id} is open; close it before deleting it"
            )));
        }
        self.ancestry(clone)?;
        let snapshot = Arc::clone(self.meta(id)?);

        // Everything that may run out is tried before the mark is written.
        let mut change = self.begin()?;
        if let Err(error) = self.stage_merge(&mut change, &snapshot, clone) {
            self.rollback(change);
            return Err(error);
        }
        let mut mark = self.begin()?;
        let staged = self.stage(&mut mark, id)?;
        staged.meta.set_internal(SNAPRM, &clone.0.to_le_bytes());
        staged.other = true;
        if let Err(error) = self.commit(mark) {
            self.rollback(change);
            return Err(error);
        }
        let marked = Arc::clone(self.meta(id)?);
        let kept: std::collections::HashSet<u32> = change
            .staged
            .iter()
            .flat_map(|staged| staged.meta.map.allocated())
            .map(|(_, cluster)| cluster)
            .collect();
        let method = snapshot.clear_method();
        let trailing = marked.trailing.clusters.iter().copied();
        let unwanted = marked
            .map
            .allocated()
            .map(|(_, cluster)| cluster)
            .chain(trailing)
            .filter(|cluster| !kept.contains(cluster));
        change
            .freed_clusters
            .extend(unwanted.map(|cluster| (cluster, method)));
        let extent_pages = marked.extent_pages.values().chain(&marked.trailing.pages);
        change
            .freed_pages
            .extend(extent_pages.filter(|page| !self.shared_pages.contains(page)));
        change.freed_pages.extend(&marked.chain);
        change.deleted.push(marked);
        if let Err(error) = self.commit(change) {
            // If the mark stays, the next load takes it off.
            if let Err(error) = self.replace_mark(id) {
                tracing::warn!(blob = %id, %error, "the mark of a removal that failed stays until the next load");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Takes the mark of a removal off again.
    fn replace_mark(&mut self, id: BlobId) -> Result<(), Error> {
        let mut change = self.begin()?;
        let staged = self.stage(&mut change, id)?;
        staged.meta.remove_internal(SNAPRM);
        staged.other = true;
        self.commit(change)
    }

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

    /// Past the end of a parent a clone reads zeroes. When the parent goes and its own parent is larger,
    /// the zeroes have to become the clone's own.
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
                    self.io
                        .zeroes(self.geo.cluster_lba(cluster), self.geo.cluster_blocks())?,
                );
                map.set(index, cluster);
            }
        }
        Ok(())
    }
}
