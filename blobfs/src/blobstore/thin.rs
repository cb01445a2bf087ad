//! Clusters of thin blobs: taken at the first write, given back by unmap.

use std::ops::Range;

use pumice_bdev::{DmaBuf, DmaSlice, Op};

use super::Blobstore;
use super::blob::Blob;
use super::change::{Change, MapChange};
use super::error::Error;
use super::extents::ExtentMap;
use super::format::BlobId;
use super::lock::Guard;
use super::mdio::MdIo;
use super::space::Spend;
use super::state::{State, never_ends};
use super::view::{Source, View};

/// What a newly taken cluster holds before it belongs to the blob.
#[derive(Debug)]
pub(crate) enum Fill {
    /// What the blob reads there now: its parent's bytes, or zeroes.
    Backing,
    /// Zeroes.
    Zeroes,
    /// These bytes, a whole cluster.
    Data(DmaSlice),
}

impl Blobstore {
    /// The metadata, for a data path that has to change it. It waits in the lock's queue without blocking the
    /// thread, whose other I/O goes on.
    async fn state(&self) -> Guard<'_, State> {
        self.inner.state.lock_async().await
    }

    /// Are so many clusters free?
    pub(crate) async fn check_room(&self, needed: u64) -> Result<(), Error> {
        let state = self.state().await;
        state.check_free_clusters(needed, Spend::Ordinary)
    }

    /// Gives a thin blob a cluster of its own at `index`, unless it has one. Durable on return.
    pub(crate) async fn allocate(&self, blob: &Blob, index: u64, fill: Fill) -> Result<(), Error> {
        let mut state = self.state().await;
        let view = blob.shared.view.load_full();
        if view.read_only {
            return Err(Error::ReadOnly(blob.id()));
        }
        if index >= view.num_clusters() {
            let (offset, size) = (
                index * self.cluster_size(),
                view.num_clusters() * self.cluster_size(),
            );
            return Err(Error::OutOfRange {
                blob: blob.id(),
                offset,
                len: self.cluster_size(),
                size,
            });
        }
        if view.own.cluster(index).is_some() {
            return Ok(());
        }
        let mut change = state.begin()?;
        match state.allocate(&mut change, blob.id(), &view, index, fill) {
            Ok(()) => state.commit(change),
            Err(error) => {
                state.rollback(change);
                Err(error)
            }
        }
    }

    /// Takes back the clusters of a thin blob without a parent. With a parent, or if the clusters are
    /// shared, nothing happens: the parent's bytes would show.
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
        // No I/O is on its way to these clusters when they go. The gate is closed before the metadata is
        // locked: while it empties, others may use the metadata.
        let _closed = blob
            .shared
            .gate
            .close_async()
            .await
            .ok_or_else(|| never_ends(id))?;
        let mut state = self.state().await;
        let view = blob.shared.view.load_full();
        if view.read_only {
            return Err(Error::ReadOnly(id));
        }
        if view.has_backing() || state.children.contains_key(&id) {
            return Ok(());
        }
        let meta = std::sync::Arc::clone(state.meta(id)?);
        let own = held(&meta.map);
        if own.is_empty() {
            return Ok(());
        }
        let mut change = state.begin()?;
        let method = meta.clear_method();
        change
            .freed_clusters
            .extend(own.iter().map(|(_, cluster)| (*cluster, method)));
        let staged = state.stage(&mut change, id)?;
        staged.map = MapChange::Patch(own.iter().map(|(index, _)| (*index, 0)).collect());
        state.commit(change)
    }

    /// Makes durable whatever was written and has completed, on all threads. Blocks.
    ///
    /// # Errors
    /// Device errors. Once a flush of the device has failed, by whomever, [`Error::Lost`] until the store is
    /// loaded again: nobody can say any more what was in the device's cache then.
    pub fn flush(&self) -> Result<(), Error> {
        if !self.inner.dev.info().write_cache {
            return Ok(());
        }
        let ch = self.channel()?;
        ch.block_on(ch.flush())?;
        self.check_flushes()
    }

    /// A flush that succeeds says nothing about what an earlier one has lost.
    pub(crate) fn check_flushes(&self) -> Result<(), Error> {
        match self.inner.failed_flush.get() {
            Some(error) => Err(Error::Lost(error)),
            None => Ok(()),
        }
    }
}

impl State {
    /// Stages one more cluster of a thin blob.
    fn allocate(
        &mut self,
        change: &mut Change,
        id: BlobId,
        view: &View,
        index: u64,
        fill: Fill,
    ) -> Result<(), Error> {
        let cluster = self.take_cluster(change)?;
        let lba = self.geo.cluster_lba(cluster);
        let blocks = self.geo.cluster_blocks();
        let ops = match fill {
            Fill::Zeroes => self.io.zeroes(lba, blocks)?,
            Fill::Data(data) => write_slices(&self.io, self.geo.block_size, lba, &data),
            Fill::Backing => self.copy_of(view.parent_source(index), view, index, lba)?,
        };
        change.prepare.extend(ops);
        let staged = self.stage(change, id)?;
        match &mut staged.map {
            MapChange::Patch(patches) => patches.push((index, cluster)),
            other => *other = MapChange::Patch(vec![(index, cluster)]),
        }
        Ok(())
    }

    /// Operations that put at `lba` what a cluster of a blob shows through from below.
    pub fn copy_of(
        &mut self,
        source: Source,
        view: &View,
        index: u64,
        lba: u64,
    ) -> Result<Vec<Op>, Error> {
        let blocks = self.geo.cluster_blocks();
        match source {
            Source::Zeroes => self.io.zeroes(lba, blocks),
            Source::Cluster(cluster) if self.io.can_copy() => {
                let src_lba = self.geo.cluster_lba(cluster);
                Ok(vec![Op::Copy {
                    src_lba,
                    dst_lba: lba,
                    len_blocks: blocks,
                }])
            }
            Source::Cluster(cluster) => {
                let step = self.io.max_io_blocks().min(blocks);
                let from = self.geo.cluster_lba(cluster);
                let mut ops = Vec::new();
                let mut at = 0;
                while at < blocks {
                    let now = step.min(blocks - at);
                    let len = usize::try_from(now * self.geo.block_size).expect("at most 1 MiB");
                    let data = self.io.read(from + at, len)?.freeze();
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
                let mut buf = DmaBuf::new(
                    usize::try_from(self.geo.cluster_size).expect("clusters fit memory"),
                )?;
                external.read(index * self.geo.cluster_size, &mut buf)?;
                Ok(write_slices(
                    &self.io,
                    self.geo.block_size,
                    lba,
                    &buf.freeze(),
                ))
            }
        }
    }
}

/// Operations that write `data` at `lba`.
fn write_slices(io: &MdIo, block_size: u64, lba: u64, data: &DmaSlice) -> Vec<Op> {
    let step = usize::try_from(io.max_io_blocks() * block_size).expect("at most 1 MiB");
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
