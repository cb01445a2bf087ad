//! Clusters of thin blobs: allocation at the first write, release by unmap.

use std::ops::Range;

use pumice_bdev::{DmaBuf, DmaSlice, Op};

use super::Blobstore;
use super::blob::Blob;
use super::change::{Change, MapChange};
use super::edit::never_ends;
use super::error::Error;
use super::extents::ExtentMap;
use super::geometry::Geometry;
use super::mdio::{Abilities, MdIo, Persist};
use super::order::Scope;
use super::space::Spend;
use super::view::{Source, View};

/// The content of a newly taken cluster before it belongs to the blob.
#[derive(Debug)]
pub(crate) enum Fill {
    /// The content that the blob reads there now: its parent's bytes, or zeroes.
    Backing,
    /// Zeroes.
    Zeroes,
    /// These bytes, a whole cluster.
    Data(DmaSlice),
}

impl Blobstore {
    /// Fails if fewer clusters are free.
    pub(crate) fn check_room(&self, needed: u64) -> Result<(), Error> {
        let space = &self.inner.state.lock().space;
        space.check_free_clusters(needed, Spend::Ordinary)
    }

    /// Gives a thin blob a cluster of its own at `index`, unless it has one. Durable on return. It
    /// waits for its turn without blocking the thread, whose other I/O goes on.
    pub(crate) async fn allocate(&self, blob: &Blob, index: u64, fill: Fill) -> Result<(), Error> {
        let id = blob.id();
        let edit = self.edit_async(&Scope::Blobs(vec![id])).await?;
        let view = blob.shared.view.load_full();
        if view.read_only {
            return Err(Error::ReadOnly(id));
        }
        if index >= view.num_clusters() {
            return Err(Error::OutOfRange {
                blob: id,
                offset: index * self.cluster_size(),
                len: self.cluster_size(),
                size: view.num_clusters() * self.cluster_size(),
            });
        }
        if view.own.cluster(index).is_some() {
            return Ok(());
        }
        let mut change = Change::default();
        let cluster = change.take_cluster(&mut edit.state().space)?;
        match content(self, fill, &view, index, cluster) {
            Ok(ops) => change.prepare = ops,
            Err(error) => {
                edit.state().space.give_back(&change.taken);
                return Err(error);
            }
        }
        let mut state = edit.state();
        match change.stage(&state.blobs, id) {
            Ok(staged) => staged.map = MapChange::Patch(vec![(index, cluster)]),
            Err(error) => {
                state.space.give_back(&change.taken);
                return Err(error);
            }
        }
        edit.commit(state, change)
    }

    /// Frees the clusters of a thin blob without a parent. With a parent, or if the clusters are
    /// shared, it does nothing, because the parent's bytes would show.
    pub(crate) async fn release(&self, blob: &Blob, range: Range<u64>) -> Result<(), Error> {
        let id = blob.id();
        let held = |map: &ExtentMap| -> Vec<(u64, u32)> {
            map.allocated()
                .skip_while(|(index, _)| *index < range.start)
                .take_while(|(index, _)| *index < range.end)
                .collect()
        };
        if held(&blob.extents()).is_empty() {
            return Ok(());
        }
        // No I/O to these clusters is in flight when they are freed. The gate is closed before the
        // turn comes, since I/O that has entered may need a turn.
        let _closed = blob
            .shared
            .gate
            .close_async(|| self.poll_shared())
            .await
            .ok_or_else(|| never_ends(id))?;
        let edit = self.edit_async(&Scope::Blobs(vec![id])).await?;
        let state = edit.state();
        let view = blob.shared.view.load_full();
        if view.read_only {
            return Err(Error::ReadOnly(id));
        }
        if view.has_backing() || state.blobs.children.contains_key(&id) {
            return Ok(());
        }
        let meta = std::sync::Arc::clone(state.blobs.meta(id)?);
        let own = held(&meta.map);
        if own.is_empty() {
            return Ok(());
        }
        let mut change = Change::default();
        let method = meta.clear_method();
        change
            .freed_clusters
            .extend(own.iter().map(|(_, cluster)| (*cluster, method)));
        let staged = change.stage(&state.blobs, id)?;
        staged.map = MapChange::Patch(own.iter().map(|(index, _)| (*index, 0)).collect());
        edit.commit(state, change)
    }

    /// Makes everything durable that was written and has completed, on all threads. Blocks.
    ///
    /// # Errors
    /// Fails when the device does. Once any flush of the device has failed, this returns
    /// [`Error::Lost`] until the store is loaded again, since it is unknown what was in the
    /// device's cache then.
    pub fn flush(&self) -> Result<(), Error> {
        if self.inner.can.persist() == Persist::Completion {
            return Ok(());
        }
        let ch = self.channel()?;
        ch.block_on(ch.flush())?;
        self.check_flushes()
    }

    /// Fails if a flush has failed: one that succeeds later says nothing about what the earlier one
    /// has lost.
    pub(crate) fn check_flushes(&self) -> Result<(), Error> {
        match self.inner.failed_flush.get() {
            Some(error) => Err(Error::Lost(error)),
            None => Ok(()),
        }
    }
}

/// Returns operations that write the blob's content to a new cluster.
fn content(
    store: &Blobstore,
    fill: Fill,
    view: &View,
    index: u64,
    cluster: u32,
) -> Result<Vec<Op>, Error> {
    let io = &mut *store.inner.md_channels.get()?;
    let geo = store.inner.state.lock().space.geo.clone();
    let lba = geo.cluster_lba(cluster);
    match fill {
        Fill::Zeroes => io.can().zeroes(lba, geo.cluster_blocks()),
        Fill::Data(data) => Ok(write_slices(io.can(), geo.block_size, lba, &data)),
        Fill::Backing => copy_of(io, &geo, view, index, lba),
    }
}

/// Returns operations that copy to `lba` what a blob reads at a cluster from its parents.
pub(crate) fn copy_of(
    io: &mut MdIo,
    geo: &Geometry,
    view: &View,
    index: u64,
    lba: u64,
) -> Result<Vec<Op>, Error> {
    let (can, blocks) = (io.can(), geo.cluster_blocks());
    match view.parent_source(index) {
        Source::Zeroes => can.zeroes(lba, blocks),
        Source::Cluster(cluster) if can.can_copy() => Ok(vec![Op::Copy {
            src_lba: geo.cluster_lba(cluster),
            dst_lba: lba,
            len_blocks: blocks,
        }]),
        Source::Cluster(cluster) => {
            let step = can.max_io_blocks().min(blocks);
            let from = geo.cluster_lba(cluster);
            let mut ops = Vec::new();
            let mut at = 0;
            while at < blocks {
                let now = step.min(blocks - at);
                let len = usize::try_from(now * geo.block_size).expect("at most 1 MiB");
                let data = io.read(from + at, len)?.freeze();
                ops.push(Op::Write {
                    lba: lba + at,
                    data,
                    fua: false,
                });
                at += now;
            }
            Ok(ops)
        }
        Source::External => {
            let external = view
                .external
                .as_ref()
                .expect("a source in the external snapshot");
            let len = usize::try_from(geo.cluster_size).expect("clusters fit memory");
            let mut buf = DmaBuf::new(len)?;
            external.read(index * geo.cluster_size, &mut buf)?;
            Ok(write_slices(can, geo.block_size, lba, &buf.freeze()))
        }
    }
}

/// Returns operations that write `data` at `lba`.
fn write_slices(can: Abilities, block_size: u64, lba: u64, data: &DmaSlice) -> Vec<Op> {
    let step = usize::try_from(can.max_io_blocks() * block_size).expect("at most 1 MiB");
    let starts = (0..data.len()).step_by(step);
    let op = |start: usize| {
        let slice = data.slice(start..data.len().min(start + step));
        Op::Write {
            lba: lba + start as u64 / block_size,
            data: slice,
            fua: false,
        }
    };
    starts.map(op).collect()
}
