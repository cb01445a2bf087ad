//! Several changes of metadata in one commit.

use std::sync::atomic::{AtomicU64, Ordering};

use super::blob::Blob;
use super::blobs::Blobs;
use super::carried::Carried;
use super::edit::Plan;
use super::error::Error;
use super::format::BlobId;
use super::ops::{ClusterInit, CreateOptions};
use super::order::Scope;
use super::space::Spend;
use super::state::State;
use super::{Blobstore, Change};

/// A blob that a [`Transaction`] creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobRef {
    /// The number of the transaction that creates it.
    transaction: u64,
    /// Position of the blob among those that the transaction creates.
    number: usize,
}

/// The blob that a change applies to: an existing one, or one that the same transaction creates.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// A blob of the store.
    Id(BlobId),
    /// A blob that this transaction creates.
    New(BlobRef),
}

impl From<&Blob> for Target {
    fn from(blob: &Blob) -> Target {
        Target::Id(blob.id())
    }
}

impl From<BlobId> for Target {
    fn from(id: BlobId) -> Target {
        Target::Id(id)
    }
}

impl From<BlobRef> for Target {
    fn from(blob: BlobRef) -> Target {
        Target::New(blob)
    }
}

#[derive(Debug)]
enum Step {
    Create(CreateOptions),
    Xattr(Target, Vec<u8>, Option<Vec<u8>>),
    Resize(Target, u64, ClusterInit),
    Delete(BlobId),
    Carry(Carried),
}

/// A list of changes. [`Transaction::commit`] checks all of them before it writes anything. The
/// roots of changed blobs are then written in the order in which the blobs were first named, and
/// the roots of deleted blobs are erased last. A crash leaves each blob old or new, and no blob new
/// before one that was named earlier.
#[derive(Debug)]
#[must_use = "nothing happens before commit"]
pub struct Transaction {
    store: Blobstore,
    steps: Vec<Step>,
    created: usize,
    spend: Spend,
    number: u64,
    given_up: Vec<BlobId>,
}

/// The result of a commit.
#[derive(Debug)]
pub struct Committed {
    transaction: u64,
    created: Vec<BlobId>,
}

impl Committed {
    /// Returns the id of a created blob.
    ///
    /// # Panics
    /// Panics if another transaction creates the blob.
    #[must_use]
    pub fn id(&self, blob: BlobRef) -> BlobId {
        assert_eq!(
            blob.transaction, self.transaction,
            "a blob of another transaction"
        );
        self.created[blob.number]
    }

    /// Returns the ids of all created blobs, in order.
    #[must_use]
    pub fn ids(&self) -> &[BlobId] {
        &self.created
    }
}

impl Transaction {
    pub(crate) fn new(store: Blobstore) -> Transaction {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Transaction {
            store,
            steps: Vec::new(),
            created: 0,
            spend: Spend::Ordinary,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            given_up: Vec::new(),
        }
    }

    /// Sets how much of the store's reserve it may use; see [`Spend`].
    pub fn spend(&mut self, spend: Spend) {
        self.spend = spend;
    }

    /// Creates a blob.
    pub fn create(&mut self, opts: CreateOptions) -> BlobRef {
        self.steps.push(Step::Create(opts));
        self.created += 1;
        BlobRef {
            transaction: self.number,
            number: self.created - 1,
        }
    }

    /// Sets an xattr.
    pub fn set_xattr(&mut self, blob: impl Into<Target>, name: &str, value: &[u8]) {
        self.set_xattr_bytes(blob, name.as_bytes(), value);
    }

    pub(crate) fn set_xattr_bytes(&mut self, blob: impl Into<Target>, name: &[u8], value: &[u8]) {
        self.steps.push(Step::Xattr(
            blob.into(),
            name.to_vec(),
            Some(value.to_vec()),
        ));
    }

    /// Removes an xattr.
    pub fn remove_xattr(&mut self, blob: impl Into<Target>, name: &str) {
        self.remove_xattr_bytes(blob, name.as_bytes());
    }

    pub(crate) fn remove_xattr_bytes(&mut self, blob: impl Into<Target>, name: &[u8]) {
        self.steps
            .push(Step::Xattr(blob.into(), name.to_vec(), None));
    }

    /// Changes the size. New clusters of a thick blob read as zeroes; those of a thin one read as
    /// its parent's (for a clone that shrinks and grows again, its snapshot's bytes).
    pub fn resize(&mut self, blob: impl Into<Target>, num_clusters: u64) {
        self.resize_with(blob, num_clusters, ClusterInit::Zeroes);
    }

    /// Changes the size, with a choice of the content of new clusters.
    pub fn resize_with(&mut self, blob: impl Into<Target>, num_clusters: u64, init: ClusterInit) {
        self.steps
            .push(Step::Resize(blob.into(), num_clusters, init));
    }

    /// Deletes a blob that is not open and has no clones.
    pub fn delete(&mut self, id: BlobId) {
        self.steps.push(Step::Delete(id));
    }

    /// Has the journal carry `bytes`, at `offset` in a blob whose content ends with them. The caller
    /// has [announced](Blob::begin_carry) it, and sets the length of the content. The commit fails with
    /// [`Error::InvalidInput`], and has changed nothing, if the bytes have to be written instead.
    pub(crate) fn carry(&mut self, blob: BlobId, offset: u64, bytes: &[u8]) {
        self.steps.push(Step::Carry(Carried {
            blob,
            offset,
            bytes: bytes.into(),
            ends: true,
        }));
    }

    /// Gives up what the journal owes the blob if it cannot be put in place.
    pub(crate) fn give_up_owed(&mut self, blob: BlobId) {
        self.given_up.push(blob);
    }

    /// Makes all changes. They are durable on return. Blocks, and waits for I/O in flight on blobs
    /// that shrink.
    ///
    /// # Errors
    /// Fails if one of the changes is not valid, if there is no space, if I/O or another change of
    /// the same blobs does not come to an end ([`Error::Busy`]), and when the device fails.
    /// Nothing is changed then, unless the device failed at a commit point ([`Error::Stopped`]
    /// afterwards).
    pub fn commit(self) -> Result<Committed, Error> {
        self.commit_then(|_| ()).map(|(committed, ())| committed)
    }

    /// Makes all changes as [`Transaction::commit`] does, and opens a blob that they create and
    /// that has no parent. Opening it waits for nothing.
    pub(crate) fn commit_and_open(self, blob: BlobRef) -> Result<Blob, Error> {
        let store = self.store.clone();
        let (_, opened) = self.commit_then(|committed| store.open_created(committed.id(blob)))?;
        opened
    }

    /// Makes all changes, and calls `then` before anybody else changes their blobs.
    fn commit_then<T>(self, then: impl FnOnce(&Committed) -> T) -> Result<(Committed, T), Error> {
        if !self.steps.is_empty() {
            self.store.grow_metadata_if_scarce(self.spend);
        }
        let (_frozen, edit) = self.store.edit_frozen(|state| Ok(self.plan(state)))?;
        let freeing = self.freeing(&edit.state());
        let given_up = self.put_owed(&freeing)?;
        let mut created = Vec::with_capacity(self.created);
        if !self.steps.is_empty() {
            edit.change(|state, change| {
                change.spend = self.spend;
                change.given_up = given_up;
                for step in &self.steps {
                    self.stage(state, change, step, &mut created)?;
                }
                Ok(())
            })?;
        }
        let committed = Committed {
            transaction: self.number,
            created,
        };
        let then = then(&committed);
        Ok((committed, then))
    }

    fn stage(
        &self,
        state: &mut State,
        change: &mut Change,
        step: &Step,
        created: &mut Vec<BlobId>,
    ) -> Result<(), Error> {
        let State { blobs, space, .. } = state;
        match step {
            Step::Create(opts) => created.push(change.create(blobs, space, opts)?),
            Step::Xattr(target, name, value) => {
                let id = self.writable(blobs, target, created)?;
                change.set_xattr(blobs, id, name, value.as_deref())?;
            }
            Step::Resize(target, size, init) => {
                let id = self.writable(blobs, target, created)?;
                change.resize(blobs, space, id, *size, *init)?;
            }
            Step::Delete(id) => change.delete(blobs, space, *id)?,
            Step::Carry(carried) => change.carry(blobs, &space.geo, carried.clone())?,
        }
        Ok(())
    }

    /// Has what is owed to blobs that lose clusters put in place. If a block cannot be written, what the blobs are owed that
    /// do not need it is given up: now, as the caller says, or when they are deleted, which returns them.
    fn put_owed(&self, freeing: &[BlobId]) -> Result<Vec<BlobId>, Error> {
        let commit = &self.store.inner.commit;
        if freeing.is_empty() {
            return Ok(Vec::new());
        }
        let Err(error) = commit.put_owed(Some(freeing)) else {
            return Ok(Vec::new());
        };
        if commit.is_halted() || !matches!(error, Error::Owed(_)) {
            return Err(error);
        }
        if !self.given_up.is_empty() {
            tracing::warn!(%error, blobs = ?self.given_up, "bytes of blobs that are cut short are given up");
            commit.give_up_owed(&self.given_up)?;
        }
        let deletes = |id: &BlobId| {
            self.steps
                .iter()
                .any(|step| matches!(step, Step::Delete(d) if d == id))
        };
        let (deleted, others): (Vec<BlobId>, Vec<BlobId>) =
            freeing.iter().partition(|id| deletes(id));
        // What another blob is owed is not given up.
        if commit.owes(&others) {
            return Err(error);
        }
        if !deleted.is_empty() {
            tracing::warn!(%error, blobs = ?deleted, "bytes of blobs that are being deleted are given up");
        }
        Ok(deleted)
    }

    /// Returns the blobs that lose clusters, or what they are owed.
    fn freeing(&self, state: &State) -> Vec<BlobId> {
        let shrinks = |id: BlobId, size: u64| {
            let meta = state.blobs.meta(id);
            meta.is_ok_and(|meta| size < meta.map.num_clusters())
        };
        let freeing = self.steps.iter().filter_map(|step| match step {
            Step::Delete(id) => Some(*id),
            Step::Resize(Target::Id(id), size, _) if shrinks(*id, *size) => Some(*id),
            _ => None,
        });
        freeing.chain(self.given_up.iter().copied()).collect()
    }

    /// Returns the blob that a step applies to, if its metadata may be changed.
    fn writable(
        &self,
        blobs: &Blobs,
        target: &Target,
        created: &[BlobId],
    ) -> Result<BlobId, Error> {
        match target {
            Target::Id(id) => blobs.check_writable(*id).map(|()| *id),
            Target::New(blob) => created
                .get(blob.number)
                .filter(|_| blob.transaction == self.number)
                .copied()
                .ok_or_else(|| Error::invalid("the blob is of another transaction")),
        }
    }

    /// Returns the blobs that this changes, and the open ones whose I/O may reach clusters that it
    /// frees.
    fn plan(&self, state: &State) -> Plan {
        let mut blobs = Vec::with_capacity(self.steps.len());
        // It is not known what a damaged blob shares with others.
        let mut all = false;
        let mut shrinking = Vec::new();
        blobs.extend(&self.given_up);
        for step in &self.steps {
            match step {
                Step::Create(_)
                | Step::Xattr(Target::New(_), ..)
                | Step::Resize(Target::New(_), ..) => {}
                Step::Xattr(Target::Id(id), ..) | Step::Carry(Carried { blob: id, .. }) => {
                    blobs.push(*id);
                }
                Step::Delete(id) if state.blobs.is_damaged(*id) => all = true,
                Step::Delete(id) => blobs.push(*id),
                Step::Resize(Target::Id(id), size, _) => {
                    blobs.push(*id);
                    let shrinks = state
                        .blobs
                        .meta(*id)
                        .is_ok_and(|meta| *size < meta.map.num_clusters());
                    if shrinks {
                        // Nobody can open a blob meanwhile that would read what is freed.
                        blobs.extend(state.blobs.family(*id));
                        shrinking.extend(state.blobs.open_family(*id));
                    }
                }
            }
        }
        let scope = if all { Scope::All } else { Scope::Blobs(blobs) };
        (scope, shrinking)
    }
}
