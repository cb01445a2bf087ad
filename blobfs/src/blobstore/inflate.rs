//! Blobs made independent of their parents, or dependent on others; copies of what a blob holds itself.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};

use super::Blobstore;
use super::blob::Blob;
use super::change::{Change, MapChange};
use super::error::Error;
use super::format::{BlobId, EXTENTS_PER_PAGE, Flags};
use super::meta::{BlobMeta, Parent};
use super::ops::check_xattr;
use super::state::{State, freeze};

/// Clusters that one commit of an inflation copies; between two, other metadata operations have their turn.
const BATCH: usize = 32;

/// Which clusters a blob gets of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All.
    All,
    /// Those that its parent has.
    Parents,
}

impl Blobstore {
    /// Gives a thin blob all its clusters, with the contents that it reads there; then it is thick and has
    /// no parent. Durable on return. Blocks; other operations go on meanwhile.
    ///
    /// # Errors
    /// Too few free clusters (found before anything is changed), a blob whose metadata is read-only, I/O
    /// errors. What was copied before an I/O error stays with the blob, whose content is the same.
    pub fn inflate(&self, id: BlobId) -> Result<(), Error> {
        self.detach(id, Which::All)
    }

    /// Gives a clone the clusters of its parent; its parent is then its parent's parent. It stays thin.
    /// Durable on return. Blocks; other operations go on meanwhile.
    ///
    /// # Errors
    /// The blob has no parent; otherwise as [`Blobstore::inflate`].
    pub fn decouple(&self, id: BlobId) -> Result<(), Error> {
        self.detach(id, Which::Parents)
    }

    fn detach(&self, id: BlobId, which: Which) -> Result<(), Error> {
        let blob = self.open(id)?;
        {
            let state = self.inner.state.lock();
            state.check_writable(id)?;
            if which == Which::Parents && state.meta(id)?.parent() == Parent::None {
                return Err(Error::invalid(format!(
                    "blob {id} has no parent to be decoupled from"
                )));
            }
            if !state.meta(id)?.flags.thin() {
                return Ok(());
            }
            let map = blob.extents();
            // An inflation of a huge thin blob is refused without looking at every cluster.
            let at_least = match which {
                Which::All => map.num_clusters() - map.num_allocated(),
                Which::Parents => 0,
            };
            if at_least > u64::from(state.clusters.free()) {
                return Err(state.no_space(at_least));
            }
            let needed = missing(&blob, which, usize::MAX).len() as u64;
            if needed > u64::from(state.clusters.free()) {
                return Err(state.no_space(needed));
            }
            state.check_pages_for(&blob, which)?;
        }
        loop {
            let mut state = self.inner.state.lock();
            let next = missing(&blob, which, BATCH);
            if next.is_empty() {
                return state.cut_off(&blob, which);
            }
            let mut change = state.begin()?;
            match state.stage_own(&mut change, &blob, &next) {
                Ok(()) => state.commit(change)?,
                Err(error) => {
                    state.rollback(change);
                    return Err(error);
                }
            }
        }
    }

    /// Makes `parent`, a read-only blob of the same size, what a blob reads where it has no clusters of its
    /// own. It becomes thin. Waits for I/O in flight; durable on return. Blocks.
    ///
    /// # Errors
    /// Sizes differ, the parent is not read-only or descends from the blob, I/O errors.
    pub fn set_parent(&self, id: BlobId, parent: BlobId) -> Result<(), Error> {
        let mut state = self.inner.state.lock();
        let (line, _) = state.ancestry(parent)?;
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
            state.meta(id)?.map.num_clusters(),
            line[0].map.num_clusters(),
        );
        if size != parent_size {
            return Err(Error::invalid(format!(
                "blob {id} has {size} clusters, {parent} has {parent_size}; they must have the same"
            )));
        }
        state.relink(id, &Parent::Snapshot(parent))
    }

    /// Makes an external snapshot what a blob reads where it has no clusters of its own. It becomes thin.
    /// Waits for I/O in flight; durable on return. Blocks.
    ///
    /// # Errors
    /// The snapshot cannot be opened by the way given at load, or is no whole number of clusters; I/O errors.
    pub fn set_external_parent(&self, id: BlobId, external_id: &[u8]) -> Result<(), Error> {
        check_xattr(super::meta::EXTSNAP, external_id)?;
        let mut state = self.inner.state.lock();
        state.meta(id)?;
        let external = state.external(id, &external_id.into())?;
        if !external.len_bytes().is_multiple_of(self.cluster_size()) {
            return Err(Error::invalid(format!(
                "the external snapshot has {} bytes, not a whole number of clusters of {}",
                external.len_bytes(),
                self.cluster_size()
            )));
        }
        state.relink(id, &Parent::External(external_id.into()))
    }

    /// Copies the clusters that a read-only blob has itself, and no others, to the same offsets of a device.
    /// `progress` is told how many clusters are done. Blocks.
    ///
    /// # Errors
    /// The blob is not read-only, the device is too small or has larger blocks, I/O errors.
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
        let limit = if info.max_io_blocks == 0 {
            u64::MAX
        } else {
            u64::from(info.max_io_blocks) * u64::from(info.block_size)
        };
        let step = limit.min(1 << 20).min(self.cluster_size());
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
        if info.write_cache {
            out.block_on(out.flush())?;
        }
        Ok(done)
    }
}

/// Clusters that a blob has to get, at most `limit`.
fn missing(blob: &Blob, which: Which, limit: usize) -> Vec<u64> {
    let view = blob.shared.view.load();
    let own = &view.maps[0];
    match which {
        Which::All => (0..own.num_clusters())
            .filter(|index| own.cluster(*index).is_none())
            .take(limit)
            .collect(),
        Which::Parents => match view.maps.get(1) {
            Some(parent) => {
                let theirs = parent
                    .allocated()
                    .map(|(index, _)| index)
                    .take_while(|index| *index < own.num_clusters());
                theirs
                    .filter(|index| own.cluster(*index).is_none())
                    .take(limit)
                    .collect()
            }
            // The parent is an external snapshot.
            None => {
                let ends = view
                    .external
                    .as_ref()
                    .map_or(0, |ext| ext.len_bytes().div_ceil(blob.store.cluster_size()));
                let all = 0..own.num_clusters().min(ends);
                all.filter(|index| own.cluster(*index).is_none())
                    .take(limit)
                    .collect()
            }
        },
    }
}

impl State {
    /// Are there metadata pages for the extent pages that a blob will need?
    fn check_pages_for(&self, blob: &Blob, which: Which) -> Result<(), Error> {
        let meta = self.meta(blob.id())?;
        if !meta.table {
            return Ok(());
        }
        let number = |index: &u64| {
            u32::try_from(index / EXTENTS_PER_PAGE as u64).expect("at most 2^32 clusters")
        };
        let mut pages: Vec<u32> = missing(blob, which, usize::MAX)
            .iter()
            .map(number)
            .collect();
        pages.dedup();
        let new = pages
            .iter()
            .filter(|number| !meta.extent_pages.contains_key(number))
            .count() as u64;
        // The table's chain is written anew beside the old one, with one extent page at most.
        let chain = (meta.chain.len() as u64).max((meta.extent_pages.len() as u64 + new) / 500) + 2;
        let (needed, free) = (new + chain, u64::from(self.pages.free()));
        if new != 0 && needed > free {
            return Err(Error::NoMdPages {
                needed,
                free,
                total: self.pages.len().into(),
            });
        }
        Ok(())
    }

    /// Stages clusters of a blob's own with the contents that it reads there now.
    fn stage_own(
        &mut self,
        change: &mut Change,
        blob: &Blob,
        indices: &[u64],
    ) -> Result<(), Error> {
        let view = blob.shared.view.load_full();
        let mut patches = Vec::with_capacity(indices.len());
        for index in indices {
            let cluster = self.take_cluster(change)?;
            let lba = self.geo.cluster_lba(cluster);
            let ops = self.copy_of(view.parent_source(*index), &view, *index, lba)?;
            // At once, so that no more than one cluster is in memory.
            self.io.run(ops)?;
            patches.push((*index, cluster));
        }
        // The copies have to be durable before the map that names them.
        self.io.flush()?;
        self.stage(change, blob.id())?.map = MapChange::Patch(patches);
        Ok(())
    }

    /// The end of an inflation: the blob has what it needs, the link to the parent goes.
    fn cut_off(&mut self, blob: &Blob, which: Which) -> Result<(), Error> {
        let id = blob.id();
        let mut change = self.begin()?;
        let parent = self.meta(id)?.parent();
        let next = match (&parent, which) {
            (Parent::Snapshot(parent), Which::Parents) => self.meta(*parent)?.parent(),
            _ => Parent::None,
        };
        if let (Parent::Snapshot(parent), Which::Parents) = (&parent, which) {
            let below = self.view(*parent)?;
            let size = self.meta(*parent)?.map.num_clusters();
            let map = self
                .meta(id)?
                .map
                .resized(self.meta(id)?.map.num_clusters(), 0);
            if let Err(error) = self.cover_tail(&mut change, &below, size, &map) {
                self.rollback(change);
                return Err(error);
            }
            let staged = self.stage(&mut change, id)?;
            staged.meta.map = Arc::new(map);
            staged.map = MapChange::Replaced;
        }
        let staged = self.stage(&mut change, id)?;
        staged.meta.set_parent(&next);
        if which == Which::All {
            staged.meta.flags.invalid &= !Flags::THIN;
        }
        staged.other = true;
        self.commit_frozen(change, id)
    }

    /// Changes a blob's parent.
    fn relink(&mut self, id: BlobId, parent: &Parent) -> Result<(), Error> {
        self.check_writable(id)?;
        let mut change = self.begin()?;
        let staged = self.stage(&mut change, id)?;
        let meta: &mut BlobMeta = &mut staged.meta;
        meta.set_parent(parent);
        staged.other = true;
        self.commit_frozen(change, id)
    }

    /// Commits a change of what lies below a blob, with no I/O through it in flight.
    fn commit_frozen(&mut self, change: Change, id: BlobId) -> Result<(), Error> {
        let open = self.open_family(id);
        match freeze(&open) {
            Ok(_frozen) => self.commit(change),
            Err(error) => {
                self.rollback(change);
                Err(error)
            }
        }
    }
}
