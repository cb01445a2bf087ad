//! Changes of a blob's parent, and copies of the clusters that a blob has itself.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};

use super::Blobstore;
use super::blob::Blob;
use super::blobs::Blobs;
use super::change::{Change, MapChange};
use super::edit::Edit;
use super::error::Error;
use super::external::External;
use super::format::{BlobId, Flags};
use super::mdio::{Abilities, Persist};
use super::meta::{ClearMethod, Parent};
use super::ops::check_xattr;
use super::order::Scope;
use super::space::{Allocator, Spend};
use super::state::State;
use super::thin::copy_of;
use super::view::View;

/// Number of clusters that are copied before they are made durable.
const BATCH: usize = 32;

/// The clusters that a blob is to have itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All clusters.
    All,
    /// The clusters that its parent has.
    Parents,
}

/// Filled clusters that a blob will get.
struct Copies {
    change: Change,
    /// Pairs of index in the blob and cluster of the store.
    list: Vec<(u64, u32)>,
    /// The blob as it was when the clusters were taken.
    below: Arc<View>,
}

impl Blobstore {
    /// Gives a thin blob all its clusters, with the content that it reads there. It is then thick
    /// and has no parent. The blob may be a snapshot, whose content stays the same. Durable on
    /// return. Blocks; other operations go on meanwhile.
    ///
    /// # Errors
    /// Fails if there are too few free clusters, if a newer version forbids changes of the blob's
    /// metadata, and when the device fails. The blob is then as it was.
    pub fn inflate(&self, id: BlobId) -> Result<(), Error> {
        detach(self, id, Which::All)
    }

    /// Gives a clone the clusters of its parent. Its parent is then its parent's parent. It stays
    /// thin. Durable on return. Blocks; other operations go on meanwhile.
    ///
    /// # Errors
    /// Fails if the blob has no parent, and as [`Blobstore::inflate`] does.
    pub fn decouple(&self, id: BlobId) -> Result<(), Error> {
        detach(self, id, Which::Parents)
    }

    /// Makes `parent`, a read-only blob of the same size, the parent of a blob, which becomes thin.
    /// Where the blob has no clusters of its own it then reads the parent's. Waits for I/O in
    /// flight. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if the sizes differ, if the parent is not read-only or descends from the blob, and
    /// when the device fails.
    pub fn set_parent(&self, id: BlobId, parent: BlobId) -> Result<(), Error> {
        // While it is open, so is an external snapshot below it, which the blob's handles need.
        let _parent = self.open(parent)?;
        let plan = |state: &State| Ok((Scope::All, state.blobs.open_family(id)));
        let (_frozen, edit) = self.edit_frozen(plan)?;
        let state = edit.state();
        let (line, _) = state.blobs.ancestry(parent)?;
        if line.iter().any(|meta| meta.id == id) {
            return Err(Error::invalid(format!(
                "blob {parent} descends from {id} and cannot be its parent"
            )));
        }
        if !line[0].flags.data_read_only() {
            return Err(Error::invalid(format!(
                "blob {parent} is not read-only; only snapshots can be parents"
            )));
        }
        let (size, parent_size) = (
            state.blobs.meta(id)?.map.num_clusters(),
            line[0].map.num_clusters(),
        );
        if size != parent_size {
            return Err(Error::invalid(format!(
                "blob {id} has {size} clusters, {parent} has {parent_size}; they must have the same"
            )));
        }
        drop(state);
        relink(&edit, id, &Parent::Snapshot(parent))
    }

    /// Makes an external snapshot the parent of a blob, which becomes thin. Where the blob has no
    /// clusters of its own it then reads the external snapshot's. Waits for I/O in flight. Durable
    /// on return. Blocks.
    ///
    /// # Errors
    /// Fails if the function given at load cannot open the snapshot, if the snapshot is not a whole
    /// number of clusters, and when the device fails.
    pub fn set_external_parent(&self, id: BlobId, external_id: &[u8]) -> Result<(), Error> {
        check_xattr(super::meta::EXTSNAP, external_id)?;
        self.inner.state.lock().blobs.meta(id)?;
        // It stays open until the blob's handles have it.
        let external = self.open_external(id, &external_id.into())?;
        if !external.len_bytes().is_multiple_of(self.cluster_size()) {
            return Err(Error::invalid(format!(
                "the external snapshot has {} bytes, not a whole number of clusters of {}",
                external.len_bytes(),
                self.cluster_size()
            )));
        }
        let plan = |state: &State| Ok((Scope::All, state.blobs.open_family(id)));
        let (_frozen, edit) = self.edit_frozen(plan)?;
        relink(&edit, id, &Parent::External(external_id.into()))
    }

    /// Copies the clusters that a read-only blob has itself, and no others, to the same offsets of
    /// a device. Calls `progress` with the number of clusters that are done. Blocks.
    ///
    /// # Errors
    /// Fails if the blob is not read-only, if the device is too small or has larger blocks, and
    /// when a device fails.
    pub fn shallow_copy(
        &self,
        id: BlobId,
        to: &dyn BlockDevice,
        mut progress: impl FnMut(u64),
    ) -> Result<u64, Error> {
        let blob = self.open(id)?;
        let info = to.info();
        if !blob.is_read_only() {
            return Err(Error::invalid(format!(
                "blob {id} is not read-only; only read-only blobs can be copied"
            )));
        }
        if info.len_bytes() < blob.len_bytes() {
            let text = format!(
                "{}: {} bytes, the blob has {}",
                info.name,
                info.len_bytes(),
                blob.len_bytes()
            );
            return Err(Error::InvalidInput(text));
        }
        if !self
            .cluster_size()
            .is_multiple_of(u64::from(info.block_size))
        {
            return Err(Error::invalid(format!(
                "{}: blocks of {} bytes",
                info.name, info.block_size
            )));
        }
        let out = AsyncChannel::new(to.open_channel()?);
        let limit = info.transfer_blocks(1 << 20) * u64::from(info.block_size);
        let step = limit.min(self.cluster_size());
        let mut done = 0;
        for (index, _) in blob.extents().allocated() {
            let start = index * self.cluster_size();
            let mut at = 0;
            while at < self.cluster_size() {
                let len = step.min(self.cluster_size() - at);
                let buf = DmaBuf::new(usize::try_from(len).expect("at most 1 MiB"))?;
                let buf = blob.read_at(start + at, buf)?;
                let lba = (start + at) / u64::from(info.block_size);
                out.block_on(out.write(lba, buf.freeze(), false))?;
                at += len;
            }
            done += 1;
            progress(done);
        }
        if Abilities::of(info).persist() != Persist::Completion {
            out.block_on(out.flush())?;
        }
        Ok(done)
    }
}

/// Takes the clusters, fills them in batches, then changes the blob in one commit. Starts again
/// if the blob's parents have changed meanwhile.
fn detach(store: &Blobstore, id: BlobId, which: Which) -> Result<(), Error> {
    let blob = store.open(id)?;
    while let Some(copies) = begin_detach(store, &blob, which)? {
        if end_detach(store, &blob, which, copies)? {
            break;
        }
    }
    Ok(())
}

/// Takes the clusters that the blob lacks and fills them. Returns `None` if there are none.
fn begin_detach(store: &Blobstore, blob: &Blob, which: Which) -> Result<Option<Copies>, Error> {
    let id = blob.id();
    let edit = store.edit(&Scope::Blobs(vec![id]))?;
    let mut state = edit.state();
    check_copyable(&state.blobs, id)?;
    let meta = Arc::clone(state.blobs.meta(id)?);
    if which == Which::Parents && meta.parent() == Parent::None {
        return Err(Error::invalid(format!(
            "blob {id} has no parent to be decoupled from"
        )));
    }
    if !meta.flags.thin() {
        return Ok(None);
    }
    // A huge thin blob is refused without looking at every cluster.
    let at_least = match which {
        Which::All => meta.map.num_clusters() - meta.map.num_allocated(),
        Which::Parents => 0,
    };
    state.space.check_free_clusters(at_least, Spend::Ordinary)?;
    let indices = missing(blob, which, u64::from(state.space.clusters.free()));
    let mut copies = Copies {
        change: Change::default(),
        list: Vec::with_capacity(indices.len()),
        below: blob.shared.view.load_full(),
    };
    let taken = copies
        .change
        .take_clusters(&mut state.space, indices.len() as u64, None)?;
    copies.list.extend(indices.into_iter().zip(taken));
    // Others may change the blob and its parents while it is copied. The end checks whether
    // they have.
    drop(state);
    drop(edit);
    for batch in copies.list.chunks(BATCH) {
        if let Err(error) = copy_up(store, &copies.below, batch) {
            let mut state = store.inner.state.lock();
            state.space.give_back_after(&error, copies.change.taken);
            return Err(error);
        }
    }
    Ok(Some(copies))
}

/// Fills clusters with what a blob reads there from its parents.
fn copy_up(store: &Blobstore, below: &View, copies: &[(u64, u32)]) -> Result<(), Error> {
    let io = &mut *store.inner.md_channels.get()?;
    let geo = store.inner.state.lock().space.geo.clone();
    let failed = io.failed_flushes();
    for (index, cluster) in copies {
        let ops = copy_of(io, &geo, below, *index, geo.cluster_lba(*cluster))?;
        io.run(ops)?;
    }
    // The copies are durable before the map that names them.
    io.flush_since(failed)
}

/// Changes the blob. Returns `false` and changes nothing if the blob's parents are no longer
/// those that were copied.
fn end_detach(store: &Blobstore, blob: &Blob, which: Which, copies: Copies) -> Result<bool, Error> {
    let Copies {
        mut change,
        mut list,
        below,
    } = copies;
    let frozen = store.edit_frozen(|state| Ok((Scope::All, state.blobs.open_family(blob.id()))));
    let (_frozen, edit) = match frozen {
        Ok(frozen) => frozen,
        Err(error) => {
            store.inner.state.lock().space.give_back(&change.taken);
            return Err(error);
        }
    };
    if !same_below(&below, &blob.shared.view.load()) {
        edit.state().space.give_back(&change.taken);
        return Ok(false);
    }
    let grown = take_grown(&mut edit.state().space, &mut change, blob, which, &list);
    let staged = grown
        .and_then(|grown| {
            copy_up(store, &blob.shared.view.load(), &grown)?;
            list.extend(grown);
            Ok(edit.state())
        })
        .and_then(|mut state| {
            let rooms = &mut *state;
            let rooms = (&mut rooms.blobs, &mut rooms.space);
            stage_detached(rooms, &mut change, blob, which, &list)?;
            Ok(state)
        });
    match staged {
        Ok(state) => edit.commit(state, change).map(|()| true),
        Err(error) => {
            edit.state().space.give_back_after(&error, change.taken);
            Err(error)
        }
    }
}

impl Blobstore {
    /// Returns the external snapshot below a blob, if there is one. The application opens it if it
    /// is not open yet. It stays open while the result exists. No lock may be held.
    pub(crate) fn open_external_of(&self, id: BlobId) -> Result<Option<Arc<External>>, Error> {
        let external_id = self.inner.state.lock().blobs.external_id(id)?;
        external_id
            .map(|external_id| self.open_external(id, &external_id))
            .transpose()
    }

    /// Returns the external snapshot that a blob names by these bytes, as
    /// [`Blobstore::open_external_of`] does.
    pub(crate) fn open_external(
        &self,
        blob: BlobId,
        external_id: &Arc<[u8]>,
    ) -> Result<Arc<External>, Error> {
        if let Some(external) = self.inner.state.lock().blobs.externals.get(external_id) {
            return Ok(external);
        }
        // Many devices can be opened once only: another thread that opens it is waited for.
        let _opening = self.inner.opening.lock();
        let open = {
            let externals = &self.inner.state.lock().blobs.externals;
            if let Some(external) = externals.get(external_id) {
                return Ok(external);
            }
            externals.opener.clone()
        };
        let open = open.ok_or_else(|| Error::CannotOpen {
            blob,
            reason:
                "it is a clone of an external snapshot, and no way to open one was given at load"
                    .to_owned(),
        })?;
        let dev = open
            .open(blob, external_id)
            .map_err(|error| Error::CannotOpen {
                blob,
                reason: format!(
                    "its external snapshot \"{}\": {error}",
                    external_id.escape_ascii()
                ),
            })?;
        let opened = Arc::new(External::new(dev));
        let externals = &mut self.inner.state.lock().blobs.externals;
        // The application may have opened it by opening another blob.
        Ok(externals.get(external_id).unwrap_or_else(|| {
            externals.add(external_id, &opened);
            opened
        }))
    }
}

/// Whether the blob has the same parents in both views.
fn same_below(a: &View, b: &View) -> bool {
    let externals = match (&a.external, &b.external) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    };
    let (mut a, mut b) = (a.ancestors(), b.ancestors());
    externals
        && loop {
            match (a.next(), b.next()) {
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {}
                (None, None) => break true,
                _ => break false,
            }
        }
}

/// Returns the clusters that a blob has to get. If they are more than `limit`, returns one more
/// than that.
fn missing(blob: &Blob, which: Which, limit: u64) -> Vec<u64> {
    let most = usize::try_from(limit)
        .unwrap_or(usize::MAX)
        .saturating_add(1);
    let view = blob.shared.view.load();
    let own = &view.own;
    let lacks = |index: &u64| own.cluster(*index).is_none();
    match (which, view.ancestors().next()) {
        (Which::All, _) => (0..own.num_clusters()).filter(lacks).take(most).collect(),
        (Which::Parents, Some(parent)) => {
            let theirs = parent.allocated().map(|(index, _)| index);
            theirs
                .take_while(|index| *index < own.num_clusters())
                .filter(lacks)
                .take(most)
                .collect()
        }
        // The parent is an external snapshot.
        (Which::Parents, None) => {
            let size = blob.store.cluster_size();
            let end = view
                .external
                .as_ref()
                .map_or(0, |ext| ext.len_bytes().div_ceil(size));
            (0..own.num_clusters().min(end))
                .filter(lacks)
                .take(most)
                .collect()
        }
    }
}

/// Checks whether a blob may get clusters of its own. A snapshot may: that a blob is read-only
/// is said of its content.
fn check_copyable(blobs: &Blobs, id: BlobId) -> Result<(), Error> {
    let flags = blobs.meta(id)?.flags;
    blobs.ancestry(id)?;
    let content = Flags {
        data_ro: flags.data_ro & !Flags::READ_ONLY,
        ..flags
    };
    if content.md_read_only() {
        return Err(Error::ReadOnly(id));
    }
    Ok(())
}

/// Takes clusters for what the blob has grown by since the list was made.
fn take_grown(
    space: &mut Allocator,
    change: &mut Change,
    blob: &Blob,
    which: Which,
    copies: &[(u64, u32)],
) -> Result<Vec<(u64, u32)>, Error> {
    let limit = u64::from(space.clusters.free()) + copies.len() as u64;
    let mut grown = Vec::new();
    for index in missing(blob, which, limit) {
        if copies
            .binary_search_by_key(&index, |(index, _)| *index)
            .is_err()
        {
            grown.push((index, change.take_cluster(space)?));
        }
    }
    Ok(grown)
}

/// Stages a blob with its copies and without its parent. Meanwhile it may have been written,
/// and then has clusters of its own there, and it may have been resized.
fn stage_detached(
    (blobs, space): (&mut Blobs, &mut Allocator),
    change: &mut Change,
    blob: &Blob,
    which: Which,
    copies: &[(u64, u32)],
) -> Result<(), Error> {
    let id = blob.id();
    let old = Arc::clone(blobs.meta(id)?);
    let size = old.map.num_clusters();
    let map = old
        .map
        .resized(size, old.map.num_allocated() + copies.len() as u64);
    for (index, cluster) in copies {
        if *index < size && map.cluster(*index).is_none() {
            map.set(*index, *cluster);
        } else {
            change.freed_clusters.push((*cluster, ClearMethod::None));
        }
    }
    let mut next = Parent::None;
    if let (Parent::Snapshot(parent), Which::Parents) = (old.parent(), which) {
        next = blobs.meta(parent)?.parent();
        let below = blobs.view(parent)?;
        let parent_size = blobs.meta(parent)?.map.num_clusters();
        change.cover_tail(space, &below, parent_size, &map)?;
    }
    let staged = change.stage(blobs, id)?;
    staged.meta.map = Arc::new(map);
    staged.map = MapChange::Replaced;
    staged.other = true;
    staged.meta.set_parent(&next);
    if which == Which::All {
        staged.meta.flags.invalid &= !Flags::THIN;
    }
    Ok(())
}

/// Changes a blob's parent. No I/O through the blob is in flight.
fn relink(edit: &Edit<'_>, id: BlobId, parent: &Parent) -> Result<(), Error> {
    edit.change(|state, change| {
        state.blobs.check_writable(id)?;
        let staged = change.stage(&state.blobs, id)?;
        staged.meta.set_parent(parent);
        staged.other = true;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobstore::{CreateOptions, InitOptions};

    const CLUSTER: u64 = 16384;

    fn put(blob: &Blob, index: u64, byte: u8) {
        let mut buf = DmaBuf::new(4096).unwrap();
        buf.fill(byte);
        blob.write_at(index * CLUSTER, buf.freeze(), false).unwrap();
    }

    fn get(blob: &Blob, index: u64) -> u8 {
        blob.read_at(index * CLUSTER, DmaBuf::new(4096).unwrap())
            .unwrap()[0]
    }

    /// Makes a blob of four clusters of ones, all of which are its snapshot's.
    fn clone_of_four_clusters() -> (Blobstore, Blob) {
        let dev = pumice_bdev::open("malloc://8M?block_size=4096").unwrap();
        let opts = InitOptions::default().cluster_size(16384);
        let store = Blobstore::init(dev, &opts).unwrap();
        let opts = CreateOptions::default().num_clusters(4);
        let blob = store.open(store.create(&opts).unwrap()).unwrap();
        (0..4).for_each(|index| put(&blob, index, 1));
        store.snapshot(blob.id(), &[]).unwrap();
        (store, blob)
    }

    /// A snapshot that is made while clusters are copied holds what was written since, so the
    /// copies are out of date.
    #[test]
    fn a_snapshot_in_the_middle_of_an_inflation() {
        for which in [Which::All, Which::Parents] {
            let (store, blob) = clone_of_four_clusters();
            let free = store.free_clusters();
            let copies = begin_detach(&store, &blob, which).unwrap().unwrap();
            put(&blob, 2, 2);
            let second = store.snapshot(blob.id(), &[]).unwrap();
            assert!(!end_detach(&store, &blob, which, copies).unwrap());
            assert_eq!(store.free_clusters(), free - 1);
            assert_eq!(
                (0..4).map(|i| get(&blob, i)).collect::<Vec<_>>(),
                [1, 1, 2, 1]
            );
            assert_eq!(blob.parent(), Parent::Snapshot(second));
            detach(&store, blob.id(), which).unwrap();
            assert_eq!(
                (0..4).map(|i| get(&blob, i)).collect::<Vec<_>>(),
                [1, 1, 2, 1]
            );
        }
    }

    /// A write or a resize in the middle does not make it start again.
    #[test]
    fn writes_in_the_middle_of_an_inflation() {
        let (store, blob) = clone_of_four_clusters();
        let copies = begin_detach(&store, &blob, Which::All).unwrap().unwrap();
        put(&blob, 2, 2);
        blob.resize(5).unwrap();
        assert!(end_detach(&store, &blob, Which::All, copies).unwrap());
        assert_eq!(
            (0..5).map(|i| get(&blob, i)).collect::<Vec<_>>(),
            [1, 1, 2, 1, 0]
        );
        assert_eq!(blob.num_allocated(), 5);
    }
}
