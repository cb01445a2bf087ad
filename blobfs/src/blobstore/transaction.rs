//! Several changes of metadata in one commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::blob::{Blob, Shared};
use super::error::Error;
use super::format::BlobId;
use super::ops::{ClusterInit, CreateOptions};
use super::space::Spend;
use super::state::State;
use super::{Blobstore, Change};

/// A blob that a [`Transaction`] creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobRef {
    /// Which transaction creates it.
    transaction: u64,
    /// The how manieth of those that it creates.
    number: usize,
}

/// What a change applies to: an existing blob, or one that the same transaction creates.
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
}

/// A list of changes. [`Transaction::commit`] checks all of them before it writes anything; on disk the
/// roots of changed blobs are written in the order in which the blobs were first named, then deleted blobs
/// are erased. A crash leaves each blob old or new, and no blob new before one that was named earlier.
#[derive(Debug)]
#[must_use = "nothing happens before commit"]
pub struct Transaction {
    store: Blobstore,
    steps: Vec<Step>,
    created: usize,
    spend: Spend,
    number: u64,
}

/// The result of a commit.
#[derive(Debug)]
pub struct Committed {
    transaction: u64,
    created: Vec<BlobId>,
}

impl Committed {
    /// The id of a created blob.
    ///
    /// # Panics
    /// The blob is one of another transaction.
    #[must_use]
    pub fn id(&self, blob: BlobRef) -> BlobId {
        assert_eq!(
            blob.transaction, self.transaction,
            "a blob of another transaction"
        );
        self.created[blob.number]
    }

    /// The ids of all created blobs, in order.
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
        }
    }

    /// Lets it take from the store's reserve; see [`Spend`].
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

    /// Changes the size; new clusters of a thick blob read as zeroes, those of a thin one as what lies below
    /// (of a clone that shrinks and grows again, its snapshot's bytes).
    pub fn resize(&mut self, blob: impl Into<Target>, num_clusters: u64) {
        self.resize_with(blob, num_clusters, ClusterInit::Zeroes);
    }

    /// Changes the size, with a choice of what new clusters hold.
    pub fn resize_with(&mut self, blob: impl Into<Target>, num_clusters: u64, init: ClusterInit) {
        self.steps
            .push(Step::Resize(blob.into(), num_clusters, init));
    }

    /// Deletes a blob that is not open and has no clones.
    pub fn delete(&mut self, id: BlobId) {
        self.steps.push(Step::Delete(id));
    }

    /// Does it all; durable on return. Blocks, and waits for I/O in flight on blobs that shrink.
    ///
    /// # Errors
    /// Whatever is wrong with one of the changes, no space, I/O errors; nothing is changed then, unless the
    /// device failed at a commit point ([`Error::Stopped`] afterwards).
    pub fn commit(self) -> Result<Committed, Error> {
        let (_frozen, mut state) = self.store.lock_frozen(|state| Ok(self.shrinking(state)))?;
        state.grow_metadata_if_scarce(self.store.inner.dev.info(), self.spend);
        let mut change = state.begin()?;
        change.spend = self.spend;
        let mut created = Vec::with_capacity(self.created);
        let mut apply = |change: &mut Change| {
            for step in &self.steps {
                let id_of = |target: &Target, created: &[BlobId]| match target {
                    Target::Id(id) => Ok(*id),
                    Target::New(blob) => created
                        .get(blob.number)
                        .filter(|_| blob.transaction == self.number)
                        .copied()
                        .ok_or_else(|| Error::invalid("the blob is of another transaction")),
                };
                match step {
                    Step::Create(opts) => created.push(state.create(change, opts)?),
                    Step::Xattr(target, name, value) => {
                        let id = id_of(target, &created)?;
                        if matches!(target, Target::Id(_)) {
                            state.check_writable(id)?;
                        }
                        state.set_xattr(change, id, name, value.as_deref())?;
                    }
                    Step::Resize(target, size, init) => {
                        let id = id_of(target, &created)?;
                        if matches!(target, Target::Id(_)) {
                            state.check_writable(id)?;
                        }
                        state.resize(change, id, *size, *init)?;
                    }
                    Step::Delete(id) => state.delete(change, *id)?,
                }
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = apply(&mut change) {
            state.rollback(change);
            return Err(error);
        }
        state.commit(change)?;
        Ok(Committed {
            transaction: self.number,
            created,
        })
    }

    /// The open blobs whose I/O may reach clusters that this change gives back.
    fn shrinking(&self, state: &State) -> Vec<Arc<Shared>> {
        let shrinks = self.steps.iter().filter_map(|step| match step {
            Step::Resize(Target::Id(id), size, _) => {
                let old = state.meta(*id).ok()?.map.num_clusters();
                (*size < old).then_some(*id)
            }
            _ => None,
        });
        shrinks.flat_map(|id| state.open_family(id)).collect()
    }
}
