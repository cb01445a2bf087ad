//! The elementary changes: create, resize, xattrs, delete.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::carried::Carried;
use super::change::{Change, MapChange, Staged, empty_map};
use super::error::Error;
use super::format::{BlobId, Flags, MAX_XATTR_LEN, Xattr, encode_blob};
use super::meta::{self, BlobMeta, ClearMethod, Parent, Trailing};
use super::state::State;

/// The content of newly mapped clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClusterInit {
    /// Zeroes, which are durable before the clusters belong to the blob.
    #[default]
    Zeroes,
    /// The old content. The caller promises that nobody reads a byte that was not written before.
    CallerWrites,
}

/// Options of a new blob.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Size in clusters.
    pub num_clusters: u64,
    /// Whether clusters are allocated when they are first written.
    pub thin: bool,
    /// The first xattrs.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// The treatment of clusters that the blob frees.
    pub clear_method: ClearMethod,
    /// The content of the clusters of a thick blob.
    pub init: ClusterInit,
    /// Whether it has an extent table, as new blobs do, or run-length extents, as in old stores.
    pub extent_table: bool,
    /// Makes a clone of an external snapshot, which the application finds by these bytes. The blob is thin.
    pub external_snapshot: Option<Vec<u8>>,
}

pumice_bdev::setters!(CreateOptions: num_clusters: u64, thin: bool, xattrs: Vec<(String, Vec<u8>)>, clear_method: ClearMethod,
    init: ClusterInit, extent_table: bool, external_snapshot: Option<Vec<u8>>);

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            num_clusters: 0,
            thin: false,
            xattrs: Vec::new(),
            clear_method: ClearMethod::Default,
            init: ClusterInit::Zeroes,
            extent_table: true,
            external_snapshot: None,
        }
    }
}

/// Checks whether this can be stored as an xattr.
pub(crate) fn check_xattr(name: &[u8], value: &[u8]) -> Result<(), Error> {
    if name.is_empty() || name.contains(&0) {
        let text = format!(
            "xattr name \"{}\": must not be empty or hold a NUL",
            name.escape_ascii()
        );
        return Err(Error::InvalidInput(text));
    }
    if name.len() + value.len() > MAX_XATTR_LEN {
        let (name, len) = (name.escape_ascii(), name.len() + value.len());
        return Err(Error::InvalidInput(format!(
            "xattr `{name}`: name and value have {len} bytes, at most {MAX_XATTR_LEN}"
        )));
    }
    Ok(())
}

impl State {
    /// Stages a new blob.
    pub fn create(&mut self, change: &mut Change, opts: &CreateOptions) -> Result<BlobId, Error> {
        let mut xattrs: Vec<Xattr> = Vec::with_capacity(opts.xattrs.len());
        for (name, value) in &opts.xattrs {
            check_xattr(name.as_bytes(), value)?;
            meta::set(&mut xattrs, name.as_bytes(), value);
        }
        let id = BlobId::from_page(self.take_page(change, true)?);
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
            map: Arc::new(empty_map(self, 0, 0)),
            trailing: Trailing::default(),
        };
        if let Some(ext_id) = &opts.external_snapshot {
            check_xattr(meta::EXTSNAP, ext_id)?;
            meta.set_parent(&Parent::External(ext_id[..].into()));
        }
        change.staged.push(Staged {
            meta,
            map: MapChange::None,
            other: true,
            old: None,
        });
        self.resize(change, id, opts.num_clusters, opts.init)?;
        Ok(id)
    }

    /// Stages a new size.
    pub fn resize(
        &mut self,
        change: &mut Change,
        id: BlobId,
        size: u64,
        init: ClusterInit,
    ) -> Result<(), Error> {
        if size > u64::from(u32::MAX) {
            return Err(Error::invalid(format!(
                "a blob of {size} clusters; at most 2^32 - 1"
            )));
        }
        let staged = self.stage(change, id)?;
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
        let taken = self.take_clusters(change, new, last)?;
        let map = old_map.resized(size, old_map.num_allocated() + new);
        for (index, cluster) in (old_size..).zip(&taken) {
            map.set(index, *cluster);
        }
        if init == ClusterInit::Zeroes {
            for run in taken.chunk_by(|a, b| a + 1 == *b) {
                let blocks = run.len() as u64 * self.geo.cluster_blocks();
                change
                    .prepare
                    .extend(self.can.zeroes(self.geo.cluster_lba(run[0]), blocks)?);
            }
        }
        let cut = old_map.allocated().filter(|(index, _)| *index >= size);
        change
            .freed_clusters
            .extend(cut.map(|(_, cluster)| (cluster, method)));
        let staged = self.stage(change, id)?;
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
        &self,
        change: &mut Change,
        id: BlobId,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<(), Error> {
        let staged = self.stage(change, id)?;
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
    pub fn carry(&self, change: &mut Change, carried: Carried) -> Result<(), Error> {
        let id = carried.blob;
        let staged = self.stage(change, id)?;
        let meta = &staged.meta;
        let fixed = !meta.flags.thin() && !meta.flags.data_read_only();
        let patches = carried.patches(&meta.map, &self.geo).filter(|_| fixed);
        let patches = patches
            .ok_or_else(|| Error::invalid(format!("blob {id}: these bytes cannot be carried")))?;
        staged.other = true;
        change.carried.push((carried, patches));
        Ok(())
    }

    /// Stages the deletion of a blob that nobody has open and that is not a parent.
    pub fn delete(&self, change: &mut Change, id: BlobId) -> Result<(), Error> {
        self.check_no_children(id)?;
        if let Some(root) = id.page().filter(|root| self.damaged.contains_key(root)) {
            if !change.discarded.contains(&root) {
                change.discarded.push(root);
            }
            return Ok(());
        }
        let meta = Arc::clone(self.meta(id)?);
        if self.shared(id).is_some() {
            return Err(Error::Busy(format!(
                "blob {id} is open; close it before deleting it"
            )));
        }
        if change.deleted.iter().any(|deleted| deleted.id == id)
            || change.staged.iter().any(|s| s.meta.id == id)
        {
            return Err(Error::invalid(format!(
                "blob {id} is already part of this change"
            )));
        }
        change.delete(meta, &self.shared_pages, |_| true);
        Ok(())
    }

    fn check_no_children(&self, id: BlobId) -> Result<(), Error> {
        let Some(children) = self.children.get(&id) else {
            return Ok(());
        };
        let names: Vec<String> = children.iter().map(ToString::to_string).collect();
        Err(Error::Busy(format!(
            "blob {id} is the parent of {}; delete or inflate them first",
            names.join(", ")
        )))
    }

    /// Checks whether the blob's metadata may be changed.
    pub fn check_writable(&self, id: BlobId) -> Result<(), Error> {
        let meta = self.meta(id)?;
        if meta.flags.unknown_invalid() != 0 {
            self.ancestry(id)?;
        }
        if meta.flags.md_read_only() {
            Err(Error::ReadOnly(id))
        } else {
            Ok(())
        }
    }
}

/// Changes run-length extents that no longer fit the root to an extent table, since each change of
/// a long chain would write all of it.
fn prefer_table(meta: &mut BlobMeta) {
    if !meta.table && encode_blob(&meta.record(&[])).len() > 1 {
        meta.table = true;
        meta.flags.invalid |= Flags::EXTENT_TABLE;
    }
}
