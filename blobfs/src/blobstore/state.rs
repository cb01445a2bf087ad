//! The store's metadata in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Weak};

use super::alloc::{Bitmap, iter_words};
use super::blob::Shared;
use super::change::Change;
use super::commit::Restore;
use super::error::Error;
use super::external::{External, OpenExternal};
use super::format::{BlobId, PageError, SuperBlock};
use super::geometry::Geometry;
use super::late_writes::LateWrites;
use super::mdio::Abilities;
use super::meta::{BlobMeta, Parent};
use super::remains::Remains;
use super::snapshot::HalfSnapshot;
use super::space::SpacePolicy;
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

/// Pages and clusters that are marked as used but belong to no whole blob.
#[derive(Debug)]
pub(crate) struct Unowned {
    pub pages: Bitmap,
    pub clusters: Bitmap,
}

/// The reason why no changes are accepted.
#[derive(Debug)]
pub(crate) struct Stop {
    pub reason: String,
    /// Whether only the next load can find out what the device holds.
    pub for_good: bool,
}

/// A change of which a part may be on the device, and what takes it back.
#[derive(Debug)]
pub(crate) struct Doubt {
    pub change: Change,
    pub restore: Restore,
}

/// The mark of an orderly unload (clean = 1) in the super block on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CleanMark {
    /// It is there.
    Set,
    /// A write that sets or removes it has not succeeded, so that it may be there.
    InDoubt,
    /// It is not there.
    Removed,
}

/// The part of its life that the store is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StorePhase {
    Loaded,
    /// No blob is opened.
    Unloading,
    Unloaded,
}

/// All metadata in memory. It is locked only briefly and does no I/O. A thread that
/// changes the metadata on the device holds an [`Edit`](super::edit::Edit).
#[derive(Debug)]
pub(crate) struct State {
    pub sb: SuperBlock,
    pub geo: Geometry,
    /// Abilities of the device.
    pub can: Abilities,
    pub clean_mark: CleanMark,
    /// The blob that holds the journal. Applications do not see it.
    pub journal: Option<BlobId>,
    pub phase: StorePhase,
    /// Whether no change is accepted.
    pub read_only: bool,
    /// The reason why no more changes are accepted, if there is one.
    pub stopped: Option<Stop>,
    /// Changes that must be taken back before others are accepted.
    pub doubts: Vec<Doubt>,
    /// Changes of which a write or a clear has timed out. It may still land, so what they have taken
    /// or freed stays taken until the next load.
    pub late: Vec<Change>,
    /// The blocks of all writes that have timed out.
    pub late_writes: Arc<LateWrites>,
    /// A snapshot that must be undone before changes are accepted.
    pub half_snapshot: Option<HalfSnapshot>,
    pub pages: Bitmap,
    pub clusters: Bitmap,
    pub policy: SpacePolicy,
    /// Free clusters at the last growth of the metadata that found no room.
    pub growth_blocked: Option<u32>,
    /// The blobs by root page.
    pub blobs: BTreeMap<u32, Slot>,
    pub damaged: BTreeMap<u32, PageError>,
    /// The readable parts of damaged blobs.
    pub remains: BTreeMap<u32, Remains>,
    /// Whether the store was not unloaded in order and had damaged blobs, so that it is not known
    /// what those hold.
    pub uncertain: bool,
    /// Pages and clusters that are marked as used and belong to no whole blob. Present while
    /// `uncertain`.
    pub unowned: Option<Unowned>,
    /// Snapshots that are ancestors of open blobs, with their own ancestors.
    pub lines: HashMap<BlobId, Arc<Line>>,
    /// For each snapshot, the blobs whose parent it is.
    pub children: HashMap<BlobId, BTreeSet<BlobId>>,
    /// Clusters that more than one blob claims. They are never released.
    pub shared_clusters: HashSet<u32>,
    /// Extent pages that more than one blob claims. They are never released.
    pub shared_pages: HashSet<u32>,
    pub open_external: Option<OpenExternal>,
    pub externals: HashMap<Arc<[u8]>, Weak<External>>,
}

/// The snapshots below a blob, and the name of the external one at the end.
type Below = (Option<Arc<Line>>, Option<Arc<[u8]>>);

impl State {
    /// Fails if the store is unloaded, or is about to be.
    pub fn check_loaded(&self) -> Result<(), Error> {
        match self.phase {
            StorePhase::Loaded => Ok(()),
            StorePhase::Unloading => Err(Error::Busy("the store is being unloaded".to_owned())),
            StorePhase::Unloaded => Err(Error::Unloaded),
        }
    }

    /// Returns the blob because of which nothing is allocated.
    pub fn held(&self) -> Option<BlobId> {
        let (root, _) = self.damaged.first_key_value()?;
        self.uncertain.then(|| BlobId::from_page(*root))
    }

    /// Records what is marked as used and belongs to no whole blob.
    pub fn note_unowned(&mut self) {
        let mut pages = self.pages.clone();
        let mut clusters = self.clusters.clone();
        for cluster in self.geo.own_clusters() {
            clusters.clear(cluster);
        }
        for slot in self.blobs.values() {
            let meta = &slot.meta;
            pages.clear(meta.root());
            for page in meta.chain.iter().copied().chain(meta.pages_of_extents()) {
                pages.clear(page);
            }
            for cluster in meta.clusters() {
                clusters.clear(cluster);
            }
        }
        self.unowned = Some(Unowned { pages, clusters });
    }

    /// Frees what only a damaged blob can have held, after the last damaged blob has been deleted.
    pub fn release_unowned(&mut self) {
        self.uncertain = false;
        let Some(unowned) = self.unowned.take() else {
            return;
        };
        self.free(
            iter_words(unowned.pages.words()),
            iter_words(unowned.clusters.words()),
        );
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
        if let Some(slot) = self.blobs.get(&root) {
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
        self.blobs.get(&id.page()?)?.handle.upgrade()
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
            if line.len() > self.blobs.len() {
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
            .map(|external_id| self.opened_external(id, &external_id))
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
                meta.flags.unknown_invalid() == 0 && missing.len() < self.blobs.len()
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

    /// Returns an external snapshot, if it is open.
    pub fn external(&self, external_id: &Arc<[u8]>) -> Option<Arc<External>> {
        self.externals.get(external_id)?.upgrade()
    }

    /// Whether `external` is the open one of this name.
    pub fn is_external(&self, external_id: &Arc<[u8]>, external: Option<&Arc<External>>) -> bool {
        let open = self.external(external_id);
        open.zip(external)
            .is_some_and(|(open, external)| Arc::ptr_eq(&open, external))
    }

    pub fn add_external(&mut self, external_id: &Arc<[u8]>, external: &Arc<External>) {
        self.externals
            .retain(|_, external| external.strong_count() > 0);
        self.externals
            .insert(Arc::clone(external_id), Arc::downgrade(external));
    }

    /// Returns the external snapshot below `blob`, which must be open.
    pub fn opened_external(
        &self,
        blob: BlobId,
        external_id: &Arc<[u8]>,
    ) -> Result<Arc<External>, Error> {
        self.external(external_id).ok_or_else(|| Error::CannotOpen {
            blob,
            reason: format!(
                "its external snapshot \"{}\" is not open",
                external_id.escape_ascii()
            ),
        })
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
    pub fn index_children(&mut self) {
        self.children.clear();
        for slot in self.blobs.values() {
            if let Parent::Snapshot(parent) = slot.meta.parent() {
                self.children
                    .entry(parent)
                    .or_default()
                    .insert(slot.meta.id);
            }
        }
    }
}
