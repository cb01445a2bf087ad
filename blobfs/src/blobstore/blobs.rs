//! The blobs of a store in memory, and what connects them: snapshots, clones and open handles.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Weak};

use super::error::Error;
use super::external::Externals;
use super::format::{BlobId, PageError};
use super::meta::{BlobMeta, Parent, SNAPRM, SNAPTMP};
use super::remains::Remains;
use super::shared::Shared;
use super::view::{Line, View};

/// A blob of the store.
#[derive(Debug)]
pub(crate) struct Slot {
    pub meta: Arc<BlobMeta>,
    /// Alive while the blob is open.
    pub handle: Weak<Shared>,
}

impl Slot {
    pub fn new(meta: Arc<BlobMeta>) -> Slot {
        Slot {
            meta,
            handle: Weak::new(),
        }
    }
}

/// All blobs of a store.
#[derive(Debug)]
pub(crate) struct Blobs {
    /// The whole ones by root page.
    pub by_root: BTreeMap<u32, Slot>,
    /// The blobs that were left out at the load, by root page, and what is damaged.
    pub damaged: BTreeMap<u32, PageError>,
    /// The readable parts of damaged blobs.
    pub remains: BTreeMap<u32, Remains>,
    /// The blob that holds the journal. Applications do not see it.
    pub journal: Option<BlobId>,
    /// For each snapshot, the blobs whose parent it is.
    pub children: HashMap<BlobId, BTreeSet<BlobId>>,
    /// Snapshots that are ancestors of open blobs, with their own ancestors.
    lines: HashMap<BlobId, Arc<Line>>,
    pub externals: Externals,
}

/// The snapshots below a blob, and the name of the external one at the end.
type Below = (Option<Arc<Line>>, Option<Arc<[u8]>>);

impl Blobs {
    /// Makes those of a store that has just been loaded.
    pub fn new(
        by_root: BTreeMap<u32, Slot>,
        journal: Option<BlobId>,
        externals: Externals,
    ) -> Blobs {
        let mut blobs = Blobs {
            by_root,
            damaged: BTreeMap::new(),
            remains: BTreeMap::new(),
            journal,
            children: HashMap::new(),
            lines: HashMap::new(),
            externals,
        };
        blobs.index_children();
        blobs
    }

    /// Whether the blob was left out at the load.
    pub fn is_damaged(&self, id: BlobId) -> bool {
        id.page()
            .is_some_and(|root| self.damaged.contains_key(&root))
    }

    /// Returns the metadata of a blob.
    pub fn meta(&self, id: BlobId) -> Result<&Arc<BlobMeta>, Error> {
        let root = id.page().ok_or(Error::NoSuchBlob(id))?;
        if self.journal == Some(id) {
            return Err(Error::CannotOpen {
                blob: id,
                reason: "it holds the journal of the store".to_owned(),
            });
        }
        if let Some(slot) = self.by_root.get(&root) {
            return Ok(&slot.meta);
        }
        match self.damaged.get(&root) {
            Some(error) => Err(Error::Damaged {
                blob: id,
                source: error.clone(),
            }),
            None => Err(Error::NoSuchBlob(id)),
        }
    }

    /// Returns the open blob, if it is open.
    pub fn shared(&self, id: BlobId) -> Option<Arc<Shared>> {
        self.by_root.get(&id.page()?)?.handle.upgrade()
    }

    /// Returns the blob and its ancestors, itself first, or the reason why it cannot be read.
    pub fn ancestry(&self, id: BlobId) -> Result<(Vec<Arc<BlobMeta>>, Parent), Error> {
        let mut line = vec![Arc::clone(self.meta(id)?)];
        loop {
            let last = line.last().expect("begins with one");
            if last.flags.unknown_invalid() != 0 {
                let reason = format!(
                    "{} has unknown invalid_flags {:#x}: it was written by a newer version",
                    last.id,
                    last.flags.unknown_invalid()
                );
                return Err(Error::CannotOpen { blob: id, reason });
            }
            let parent = match last.parent() {
                Parent::Snapshot(parent) => parent,
                end => return Ok((line, end)),
            };
            let next = self.meta(parent).map_err(|error| Error::CannotOpen {
                blob: id,
                reason: format!("its snapshot {parent} cannot be used: {error}"),
            })?;
            if line.len() > self.by_root.len() {
                return Err(Error::CannotOpen {
                    blob: id,
                    reason: "its snapshots form a loop".to_owned(),
                });
            }
            line.push(Arc::clone(next));
        }
    }

    /// Returns what the data path needs of a blob. An external snapshot below it must be open.
    pub fn view(&mut self, id: BlobId) -> Result<View, Error> {
        let (below, external_id) = self.below(id)?;
        let external = external_id
            .map(|external_id| self.externals.opened(id, &external_id))
            .transpose()?;
        let meta = self.meta(id)?;
        Ok(View {
            own: Arc::clone(&meta.map),
            below,
            external,
            read_only: meta.flags.data_read_only(),
        })
    }

    /// Returns the name of the external snapshot below a blob.
    pub fn external_id(&mut self, id: BlobId) -> Result<Option<Arc<[u8]>>, Error> {
        Ok(self.below(id)?.1)
    }

    /// Returns what is below a blob: snapshots, and the name of an external one below those.
    fn below(&mut self, id: BlobId) -> Result<Below, Error> {
        let meta = self.meta(id)?;
        let parent = meta.parent();
        if meta.flags.unknown_invalid() != 0 {
            self.ancestry(id)?;
        }
        match parent {
            Parent::None => Ok((None, None)),
            Parent::External(external_id) => Ok((None, Some(external_id))),
            Parent::Snapshot(parent) => {
                let line = self.line(id, parent)?;
                let external_id = line.external_id.clone();
                Ok((Some(line), external_id))
            }
        }
    }

    /// Returns the snapshot `parent` of `blob`, and its ancestors.
    fn line(&mut self, blob: BlobId, parent: BlobId) -> Result<Arc<Line>, Error> {
        let mut missing: Vec<Arc<BlobMeta>> = Vec::new();
        let mut at = parent;
        let (mut below, mut external_id) = loop {
            if let Some(line) = self.lines.get(&at) {
                break (Some(Arc::clone(line)), line.external_id.clone());
            }
            let usable = self.meta(at).ok().filter(|meta| {
                meta.flags.unknown_invalid() == 0 && missing.len() < self.by_root.len()
            });
            let Some(meta) = usable.cloned() else {
                // This returns the reason as an error.
                self.ancestry(blob)?;
                return Err(Error::NoSuchBlob(at));
            };
            let its_parent = meta.parent();
            missing.push(meta);
            match its_parent {
                Parent::Snapshot(next) => at = next,
                Parent::External(external_id) => break (None, Some(external_id)),
                Parent::None => break (None, None),
            }
        };
        for meta in missing.into_iter().rev() {
            let line = Arc::new(Line {
                map: Arc::clone(&meta.map),
                below: below.take(),
                external_id: external_id.take(),
            });
            external_id.clone_from(&line.external_id);
            self.lines.insert(meta.id, Arc::clone(&line));
            below = Some(line);
        }
        below.ok_or(Error::NoSuchBlob(parent))
    }

    /// Returns a blob and its descendants.
    pub fn family(&self, id: BlobId) -> Vec<BlobId> {
        let mut family = vec![id];
        let mut seen: HashSet<BlobId> = HashSet::from([id]);
        let mut at = 0;
        while at < family.len() {
            let children = self
                .children
                .get(&family[at])
                .into_iter()
                .flatten()
                .copied();
            family.extend(
                children
                    .filter(|child| seen.insert(*child))
                    .collect::<Vec<_>>(),
            );
            at += 1;
        }
        family
    }

    /// Updates the views of the open blobs among `id` and its descendants.
    pub fn rebuild_views(&mut self, id: BlobId) {
        let family = self.family(id);
        for member in &family {
            self.lines.remove(member);
        }
        for member in family {
            let Some(shared) = self.shared(member) else {
                continue;
            };
            match self.view(member) {
                Ok(view) => shared.view.store(Arc::new(view)),
                Err(error) => {
                    tracing::error!(blob = %member, %error, "an open blob can no longer be followed");
                }
            }
        }
    }

    /// Returns the open blobs whose I/O may reach `id`'s clusters.
    pub fn open_family(&self, id: BlobId) -> Vec<Arc<Shared>> {
        self.family(id)
            .into_iter()
            .filter_map(|member| self.shared(member))
            .collect()
    }

    /// Rebuilds the index of children from the parents.
    fn index_children(&mut self) {
        self.children.clear();
        for slot in self.by_root.values() {
            if let Parent::Snapshot(parent) = slot.meta.parent() {
                self.children
                    .entry(parent)
                    .or_default()
                    .insert(slot.meta.id);
            }
        }
    }

    /// Makes the part that the handles of a blob share. The blob is not open.
    pub fn make_handle(&mut self, id: BlobId) -> Result<Arc<Shared>, Error> {
        let view = self.view(id)?;
        let meta = Arc::clone(self.meta(id)?);
        let shared = Arc::new(Shared::new(meta, view));
        let root = id.page().expect("it has metadata");
        let slot = self.by_root.get_mut(&root).expect("it has metadata");
        slot.handle = Arc::downgrade(&shared);
        Ok(shared)
    }

    /// Returns the snapshots that are marked as half made or half removed, each with the blob that
    /// it names.
    pub fn half_done(&self) -> Vec<(BlobId, BlobId)> {
        let marked = |meta: &BlobMeta| {
            let named = meta.internal_id(SNAPTMP);
            Some((meta.id, named.or_else(|| meta.internal_id(SNAPRM))?))
        };
        self.by_root
            .values()
            .filter_map(|slot| marked(&slot.meta))
            .collect()
    }

    pub fn check_no_children(&self, id: BlobId) -> Result<(), Error> {
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

    fn remove_child(&mut self, parent: BlobId, child: BlobId) {
        if let Some(children) = self.children.get_mut(&parent) {
            children.remove(&child);
            if children.is_empty() {
                self.children.remove(&parent);
            }
        }
    }

    /// Makes a durable version of a blob the current one. Returns whether other data shows in it or in its descendants, whose
    /// views must be rebuilt then.
    pub fn replace(&mut self, old: Option<&BlobMeta>, meta: BlobMeta) -> bool {
        let (id, parent) = (meta.id, meta.parent());
        let old_parent = old.map_or(Parent::None, BlobMeta::parent);
        let same_view = old.is_some_and(|old| {
            Arc::ptr_eq(&old.map, &meta.map) && old_parent == parent && old.flags == meta.flags
        });
        if parent != old_parent {
            if let Parent::Snapshot(old_parent) = old_parent {
                self.remove_child(old_parent, id);
            }
            if let Parent::Snapshot(parent) = parent {
                self.children.entry(parent).or_default().insert(id);
            }
        }
        let meta = Arc::new(meta);
        let slot = self
            .by_root
            .entry(meta.root())
            .or_insert_with(|| Slot::new(Arc::clone(&meta)));
        slot.meta = Arc::clone(&meta);
        if let Some(shared) = slot.handle.upgrade() {
            shared.meta.store(meta);
        }
        !same_view
    }

    /// Removes a blob that is durably deleted.
    pub fn remove(&mut self, meta: &BlobMeta) {
        self.by_root.remove(&meta.root());
        self.lines.remove(&meta.id);
        if let Parent::Snapshot(parent) = meta.parent() {
            self.remove_child(parent, meta.id);
        }
    }

    /// Removes a damaged blob that is durably deleted. Returns the first of those that are left.
    pub fn remove_damaged(&mut self, root: u32) -> Option<BlobId> {
        self.damaged.remove(&root);
        self.remains.remove(&root);
        self.first_damaged()
    }

    /// Returns the first damaged blob.
    pub fn first_damaged(&self) -> Option<BlobId> {
        let (root, _) = self.damaged.first_key_value()?;
        Some(BlobId::from_page(*root))
    }
}
