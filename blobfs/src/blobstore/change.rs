//! Changes of metadata: staged in memory, turned into a [`Batch`], then published.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use pumice_bdev::Op;

use super::blobs::Blobs;
use super::carried::{Carried, Patch};
use super::error::Error;
use super::extents::ExtentMap;
use super::format::{BlobId, Flags, SuperBlock, Xattr, encode_blob};
use super::geometry::Geometry;
use super::meta::{self, BlobMeta, ClearMethod, Parent, Trailing};
use super::ops::{ClusterInit, CreateOptions, check_xattr};
use super::space::{Allocator, Spend, Taken};
use super::view::{Source, View};

/// The effect of a staged change on the map of a blob.
#[derive(Debug)]
pub(crate) enum MapChange {
    /// Nothing, or the map came with its extent pages from another blob.
    None,
    /// The blob has a new map. Extent pages that differ are written to new pages.
    Replaced,
    /// Some entries change: (index, cluster), in order of index.
    Patch(Vec<(u64, u32)>),
}

/// The next version of a blob.
#[derive(Debug)]
pub(crate) struct Staged {
    pub meta: BlobMeta,
    pub map: MapChange,
    /// Whether something besides the map changes.
    pub other: bool,
    /// The version that is on disk.
    pub old: Option<Arc<BlobMeta>>,
}

/// A change that is not committed yet. It must be committed or rolled back.
#[derive(Debug, Default)]
#[must_use = "what it has taken has to be given back: commit or roll back"]
pub(crate) struct Change {
    pub staged: Vec<Staged>,
    pub deleted: Vec<Arc<BlobMeta>>,
    /// Roots of damaged blobs that are deleted.
    pub discarded: Vec<u32>,
    /// Operations that write the content of newly taken clusters.
    pub prepare: Vec<Op>,
    /// Clusters to release when the change is durable.
    pub freed_clusters: Vec<(u32, ClearMethod)>,
    /// Metadata pages to release when the change is durable.
    pub freed_pages: Vec<u32>,
    /// A new super block, and the geometry that it describes.
    pub super_block: Option<Box<(SuperBlock, Geometry)>>,
    /// Whether nothing changes in it but the number of the log in shared memory.
    pub names_log: bool,
    /// Bytes of blobs that the batch carries, and their places.
    pub carried: Vec<(Carried, Vec<Patch>)>,
    /// Blobs that are deleted and owed bytes that cannot be put in place.
    pub given_up: Vec<BlobId>,
    /// The part of the reserve that the change may use.
    pub spend: Spend,
    /// Pages and clusters that it has taken.
    pub taken: Taken,
}

impl Staged {
    /// A new blob.
    pub fn new(meta: BlobMeta) -> Staged {
        Staged {
            meta,
            map: MapChange::None,
            other: true,
            old: None,
        }
    }
}

impl Change {
    /// Returns what it frees, as something that is taken.
    pub fn keep_freed(&mut self) -> Taken {
        let clusters = std::mem::take(&mut self.freed_clusters);
        Taken {
            pages: std::mem::take(&mut self.freed_pages),
            clusters: clusters.into_iter().map(|(cluster, _)| cluster).collect(),
        }
    }

    /// Returns the staged version of a blob, which starts as a copy of the current one.
    pub fn stage(&mut self, blobs: &Blobs, id: BlobId) -> Result<&mut Staged, Error> {
        let found = self.staged.iter().position(|staged| staged.meta.id == id);
        let index = match found {
            Some(index) => index,
            None => {
                let old = Arc::clone(blobs.meta(id)?);
                if self.deleted.iter().any(|deleted| deleted.id == id) {
                    return Err(Error::invalid(format!(
                        "blob {id} is deleted by the same change"
                    )));
                }
                let staged = Staged {
                    meta: (*old).clone(),
                    map: MapChange::None,
                    other: false,
                    old: Some(old),
                };
                self.staged.push(staged);
                self.staged.len() - 1
            }
        };
        Ok(&mut self.staged[index])
    }

    /// Takes a free cluster.
    pub fn take_cluster(&mut self, space: &mut Allocator) -> Result<u32, Error> {
        Ok(self.take_clusters(space, 1, None)?[0])
    }

    /// Takes clusters as [`Allocator::take_clusters`] does.
    pub fn take_clusters(
        &mut self,
        space: &mut Allocator,
        count: u64,
        last: Option<u32>,
    ) -> Result<Vec<u32>, Error> {
        let taken = space.take_clusters(count, last, self.spend)?;
        self.taken.clusters.extend(&taken);
        Ok(taken)
    }

    /// Takes a metadata page as [`Allocator::take_page`] does.
    pub fn take_page(&mut self, space: &mut Allocator, root: bool) -> Result<u32, Error> {
        let page = space.take_page(root, self.spend)?;
        self.taken.pages.push(page);
        Ok(page)
    }

    /// Stages a new blob.
    pub fn create(
        &mut self,
        blobs: &Blobs,
        space: &mut Allocator,
        opts: &CreateOptions,
    ) -> Result<BlobId, Error> {
        let mut xattrs: Vec<Xattr> = Vec::with_capacity(opts.xattrs.len());
        for (name, value) in &opts.xattrs {
            check_xattr(name.as_bytes(), value)?;
            meta::set(&mut xattrs, name.as_bytes(), value);
        }
        let id = BlobId::from_page(self.take_page(space, true)?);
        let mut flags = Flags {
            invalid: 0,
            data_ro: 0,
            md_ro: opts.clear_method.to_flags(),
        };
        if opts.thin {
            flags.invalid |= Flags::THIN;
        }
        if opts.extent_table {
            flags.invalid |= Flags::EXTENT_TABLE;
        }
        let mut meta = BlobMeta {
            id,
            flags,
            xattrs,
            internal: Vec::new(),
            table: opts.extent_table,
            chain: Vec::new(),
            extent_pages: BTreeMap::new(),
            map: Arc::new(empty_map(&space.geo, 0, 0)),
            trailing: Trailing::default(),
        };
        if let Some(ext_id) = &opts.external_snapshot {
            check_xattr(meta::EXTSNAP, ext_id)?;
            meta.set_parent(&Parent::External(ext_id[..].into()));
        }
        self.staged.push(Staged::new(meta));
        self.resize(blobs, space, id, opts.num_clusters, opts.init)?;
        Ok(id)
    }

    /// Stages a new size.
    pub fn resize(
        &mut self,
        blobs: &Blobs,
        space: &mut Allocator,
        id: BlobId,
        size: u64,
        init: ClusterInit,
    ) -> Result<(), Error> {
        if size > u64::from(u32::MAX) {
            return Err(Error::invalid(format!(
                "a blob of {size} clusters; at most 2^32 - 1"
            )));
        }
        let staged = self.stage(blobs, id)?;
        let (meta, thin) = (&staged.meta, staged.meta.flags.thin());
        let (old_size, method) = (meta.map.num_clusters(), meta.clear_method());
        if size == old_size {
            return Ok(());
        }
        let old_map = Arc::clone(&meta.map);
        let new = if thin {
            0
        } else {
            size.saturating_sub(old_size)
        };
        let last = old_size
            .checked_sub(1)
            .and_then(|last| old_map.cluster(last));
        let taken = self.take_clusters(space, new, last)?;
        let map = old_map.resized(size, old_map.num_allocated() + new);
        for (index, cluster) in (old_size..).zip(&taken) {
            map.set(index, *cluster);
        }
        if init == ClusterInit::Zeroes {
            for run in taken.chunk_by(|a, b| a + 1 == *b) {
                self.prepare.extend(space.zeroes(run[0], run.len())?);
            }
        }
        let cut = old_map.allocated().filter(|(index, _)| *index >= size);
        self.freed_clusters
            .extend(cut.map(|(_, cluster)| (cluster, method)));
        let staged = self.stage(blobs, id)?;
        staged.meta.map = Arc::new(map);
        staged.map = MapChange::Replaced;
        staged.other = true;
        if size > old_size && !thin {
            prefer_table(&mut staged.meta);
        }
        Ok(())
    }

    /// Stages an xattr. `None` removes it.
    pub fn set_xattr(
        &mut self,
        blobs: &Blobs,
        id: BlobId,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<(), Error> {
        let staged = self.stage(blobs, id)?;
        match value {
            Some(value) => {
                check_xattr(name, value)?;
                meta::set(&mut staged.meta.xattrs, name, value);
            }
            None => {
                let before = staged.meta.xattrs.len();
                staged.meta.xattrs.retain(|xattr| *xattr.name != *name);
                if staged.meta.xattrs.len() == before {
                    return Err(Error::invalid(format!(
                        "blob {id} has no xattr `{}`",
                        name.escape_ascii()
                    )));
                }
            }
        }
        staged.other = true;
        Ok(())
    }

    /// Stages bytes that the batch carries. The blob has all of their clusters itself, and they stay
    /// in their places while the bytes are owed.
    pub fn carry(&mut self, blobs: &Blobs, geo: &Geometry, carried: Carried) -> Result<(), Error> {
        let id = carried.blob;
        let staged = self.stage(blobs, id)?;
        let meta = &staged.meta;
        let fixed = !meta.flags.thin() && !meta.flags.data_read_only();
        let patches = carried.patches(&meta.map, geo).filter(|_| fixed);
        let patches = patches
            .ok_or_else(|| Error::invalid(format!("blob {id}: these bytes cannot be carried")))?;
        staged.other = true;
        self.carried.push((carried, patches));
        Ok(())
    }

    /// Stages the deletion of a blob that nobody has open and that is not a parent.
    pub fn delete(&mut self, blobs: &Blobs, space: &Allocator, id: BlobId) -> Result<(), Error> {
        blobs.check_no_children(id)?;
        if let Some(root) = id.page().filter(|root| blobs.damaged.contains_key(root)) {
            if !self.discarded.contains(&root) {
                self.discarded.push(root);
            }
            return Ok(());
        }
        let meta = Arc::clone(blobs.meta(id)?);
        if blobs.shared(id).is_some() {
            return Err(Error::Busy(format!(
                "blob {id} is open; close it before deleting it"
            )));
        }
        if self.deleted.iter().any(|deleted| deleted.id == id)
            || self.staged.iter().any(|s| s.meta.id == id)
        {
            return Err(Error::invalid(format!(
                "blob {id} is already part of this change"
            )));
        }
        self.remove(meta, &space.shared_pages, |_| true);
        Ok(())
    }

    /// Stages the clone with the clusters that it read from the snapshot.
    pub fn merge(
        &mut self,
        blobs: &mut Blobs,
        space: &mut Allocator,
        snapshot: &BlobMeta,
        clone: BlobId,
    ) -> Result<(), Error> {
        let below = blobs.view(snapshot.id)?;
        let old = Arc::clone(blobs.meta(clone)?);
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
        self.cover_tail(space, &below, snapshot.map.num_clusters(), &map)?;
        let staged = self.stage(blobs, clone)?;
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
        space: &mut Allocator,
        below: &View,
        parent_size: u64,
        map: &ExtentMap,
    ) -> Result<(), Error> {
        let external = below
            .external
            .as_ref()
            .map_or(0, |ext| ext.len_bytes().div_ceil(space.geo.cluster_size));
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
                let cluster = self.take_cluster(space)?;
                self.prepare.extend(space.zeroes(cluster, 1)?);
                map.set(index, cluster);
            }
        }
        Ok(())
    }

    /// Stages the end of a blob, and frees its pages but for the shared ones, and the clusters for which `frees` says so.
    /// The commit leaves out clusters that have a second owner.
    pub fn remove(
        &mut self,
        meta: Arc<BlobMeta>,
        shared_pages: &HashSet<u32>,
        frees: impl Fn(u32) -> bool,
    ) {
        let method = meta.clear_method();
        let clusters = meta.clusters().filter(|cluster| frees(*cluster));
        self.freed_clusters
            .extend(clusters.map(|cluster| (cluster, method)));
        let pages = meta.pages_of_extents();
        self.freed_pages
            .extend(pages.filter(|page| !shared_pages.contains(page)));
        self.freed_pages.extend(&meta.chain);
        self.deleted.push(meta);
    }
}

/// Returns an empty map for a blob of this store.
pub(crate) fn empty_map(geo: &Geometry, num_clusters: u64, expected: u64) -> ExtentMap {
    ExtentMap::new(num_clusters, expected, geo.cluster_blocks())
}

/// Changes run-length extents that no longer fit the root to an extent table, since each change of
/// a long chain would write all of it.
fn prefer_table(meta: &mut BlobMeta) {
    if !meta.table && encode_blob(&meta.record(&[])).len() > 1 {
        meta.table = true;
        meta.flags.invalid |= Flags::EXTENT_TABLE;
    }
}
