//! The state machine: what was applied, in a database whose checkpoints are the snapshots.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{
    EntryPayload, ErrorSubject, ErrorVerb, OptionalSend, RaftSnapshotBuilder, StorageError,
};
use parking_lot::{Mutex, RwLock};
use pumice::fs::OpenOptions;
use pumice::rocksdb::WriteBatch;
use pumice::{Db, FileSystem};

use super::directories::{Current, CurrentSnapshot, Directories, Directory};
use super::{
    Announced, Family, Files, Installs, Opening, StoreError, StoreOptions, blocking, encode,
    family, read,
};
use crate::{Applied, Entry, KeyChange, LogId, Membership, NodeId, SnapshotMeta, TypeConfig};

/// The column family of the keys and values.
const DATA: &str = "data";
/// The column family of the keys below.
const META: &str = "meta";
const APPLIED: &str = "applied";
const MEMBERSHIP: &str = "membership";

/// Bytes of a file that are copied at a time.
const PIECE_BYTES: usize = 1 << 20;

/// The open database of the state.
struct StateDb {
    // It is closed before its directory is removed.
    db: Db,
    directory: Arc<Directory>,
}

impl StateDb {
    fn new(
        directory: Arc<Directory>,
        options: &StoreOptions,
        opening: Opening,
    ) -> Result<StateDb, StoreError> {
        let options = options.database(directory.path(), &[DATA, META], opening);
        let db = options.open_in(directory.fs())?;
        Ok(StateDb { db, directory })
    }

    fn family(&self, name: &str) -> Result<Family<'_>, StoreError> {
        family(&self.db, self.directory.path(), name)
    }

    fn meta<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        read(&self.db, &self.family(META)?, key)
    }

    fn applied(&self) -> Result<(Option<LogId>, Membership), StoreError> {
        let applied = self.meta(APPLIED)?;
        Ok((applied, self.meta(MEMBERSHIP)?.unwrap_or_default()))
    }

    /// Applies entries in one step, with the last one's id.
    fn apply(&self, entries: &[Entry]) -> Result<(), StoreError> {
        let (data, meta) = (self.family(DATA)?, self.family(META)?);
        let mut batch = WriteBatch::default();
        for entry in entries {
            match &entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(KeyChange::Put { key, value }) => {
                    batch.put_cf(&data, key, value);
                }
                EntryPayload::Normal(KeyChange::Delete { key }) => batch.delete_cf(&data, key),
                EntryPayload::Membership(members) => {
                    let members = Membership::new(Some(entry.log_id), members.clone());
                    batch.put_cf(&meta, MEMBERSHIP, encode(MEMBERSHIP, &members)?);
                }
            }
        }
        let Some(last) = entries.last() else {
            return Ok(());
        };
        batch.put_cf(&meta, APPLIED, encode(APPLIED, &last.log_id)?);
        // It is not synced: after a power cut the entries are applied again from the log, which is.
        Ok(self.db.write(batch)?)
    }

    /// Checks that it is the state that a snapshot promises.
    fn check(&self, meta: &SnapshotMeta) -> Result<(), StoreError> {
        let (applied, members) = self.applied()?;
        if applied == meta.last_log_id && members == meta.last_membership {
            return Ok(());
        }
        let reason = format!(
            "it has the state after {applied:?} with {members:?}, and the snapshot is that of {meta:?}"
        );
        Err(StoreError::inconsistent(self.directory.path(), reason))
    }
}

/// The directories, and the snapshot that counts.
struct Places {
    directories: Directories,
    snapshot: Option<(SnapshotMeta, Arc<Directory>)>,
}

/// The state of a node, shared by the state machine and those that read it.
pub struct AppliedState {
    options: StoreOptions,
    opened: RwLock<Arc<StateDb>>,
    /// Locked while a snapshot is made or installed.
    places: Mutex<Places>,
    pub(super) installs: Arc<Installs>,
    installed: AtomicU64,
}

impl AppliedState {
    pub(super) fn open(
        fs: &FileSystem,
        options: &StoreOptions,
    ) -> Result<Arc<AppliedState>, StoreError> {
        let (mut directories, current) = Directories::open(fs)?;
        let (opened, snapshot) = match current {
            Some(current) => {
                let directory = directories.existing(&current.state);
                let opened = StateDb::new(directory, options, Opening::Existing)?;
                let snapshot = current.snapshot;
                let snapshot = snapshot.map(|s| (s.meta, directories.existing(&s.path)));
                (opened, snapshot)
            }
            None => {
                let opened = StateDb::new(directories.new_state(), options, Opening::Create)?;
                opened.directory.keep();
                let state = opened.directory.path().to_owned();
                directories.switch(&Current {
                    state,
                    snapshot: None,
                })?;
                (opened, None)
            }
        };
        let covered = snapshot.as_ref().and_then(|(meta, _)| last_index(meta));
        Ok(Arc::new(AppliedState {
            options: options.clone(),
            opened: RwLock::new(Arc::new(opened)),
            places: Mutex::new(Places {
                directories,
                snapshot,
            }),
            installs: Arc::new(Installs::new(covered)),
            installed: AtomicU64::new(0),
        }))
    }

    /// Announces that Raft will be given a snapshot from a leader.
    #[must_use]
    pub fn announce_install(&self) -> Announced {
        Announced::new(&self.installs)
    }

    /// Reads a key.
    ///
    /// # Errors
    /// [`StoreError`], also if the value is not text.
    pub async fn get(self: &Arc<AppliedState>, key: String) -> Result<Option<String>, StoreError> {
        let opened = self.opened();
        blocking(move || {
            let value = opened.db.get_cf(&opened.family(DATA)?, &key)?;
            let text = |bytes| {
                let place = format!("the value of {key:?}");
                String::from_utf8(bytes)
                    .map_err(|error| StoreError::inconsistent(&place, error.to_string()))
            };
            value.map(text).transpose()
        })
        .await
    }

    /// Checks that received files are the state that a snapshot promises, and that RocksDB can open them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn check(
        self: &Arc<AppliedState>,
        files: &Files,
        meta: &SnapshotMeta,
    ) -> Result<(), StoreError> {
        let (state, meta) = (Arc::clone(self), meta.clone());
        let directory = Arc::clone(files.directory());
        blocking(move || StateDb::new(directory, &state.options, Opening::ReadOnly)?.check(&meta))
            .await
    }

    /// Returns how many snapshots of a leader were installed since the store was opened.
    #[must_use]
    pub fn installed(&self) -> u64 {
        self.installed.load(Ordering::Relaxed)
    }

    fn opened(&self) -> Arc<StateDb> {
        Arc::clone(&self.opened.read())
    }

    /// Makes a checkpoint of the state and makes it the current snapshot.
    fn build(&self) -> Result<Snapshot<TypeConfig>, StoreError> {
        let mut places = self.places.lock();
        let opened = self.opened();
        let directory = places.directories.new_snapshot();
        opened.db.checkpoint(directory.path())?;
        // What was applied meanwhile may be in its log. The state has to have it, too, before Raft purges the entries.
        opened.db.flush_wal(true)?;
        let copy = StateDb::new(Arc::clone(&directory), &self.options, Opening::ReadOnly)?;
        let (last_log_id, last_membership) = copy.applied()?;
        drop(copy);
        let meta = SnapshotMeta {
            last_log_id,
            last_membership,
            snapshot_id: format!(
                "{}{}",
                last_log_id.map_or(0, |id| id.index),
                directory.path().replace('/', "-")
            ),
        };
        directory.keep();
        places.directories.switch(&Current {
            state: opened.directory.path().to_owned(),
            snapshot: Some(CurrentSnapshot {
                path: directory.path().to_owned(),
                meta: meta.clone(),
            }),
        })?;
        self.installs.cover(last_index(&meta));
        if let Some((_, old)) = places
            .snapshot
            .replace((meta.clone(), Arc::clone(&directory)))
        {
            old.retire();
        }
        Ok(snapshot(meta, directory))
    }

    /// Replaces the state by received files. The old one counts until the new one is complete.
    fn install(&self, meta: &SnapshotMeta, files: &Files) -> Result<(), StoreError> {
        let mut places = self.places.lock();
        let directory = if places.directories.is_new(files.directory()) {
            Arc::clone(files.directory())
        } else {
            copied(files.directory(), places.directories.new_state())?
        };
        let opened = StateDb::new(Arc::clone(&directory), &self.options, Opening::Existing)?;
        opened.check(meta)?;
        let copy = places.directories.new_snapshot();
        opened.db.checkpoint(copy.path())?;
        // They stay if the outcome of the switch is open.
        directory.keep();
        copy.keep();
        places.directories.switch(&Current {
            state: directory.path().to_owned(),
            snapshot: Some(CurrentSnapshot {
                path: copy.path().to_owned(),
                meta: meta.clone(),
            }),
        })?;
        self.installs.cover(last_index(meta));
        let old = std::mem::replace(&mut *self.opened.write(), Arc::new(opened));
        old.directory.retire();
        if let Some((_, old)) = places.snapshot.replace((meta.clone(), copy)) {
            old.retire();
        }
        Ok(())
    }
}

fn last_index(meta: &SnapshotMeta) -> Option<u64> {
    meta.last_log_id.map(|id| id.index)
}

fn snapshot(meta: SnapshotMeta, directory: Arc<Directory>) -> Snapshot<TypeConfig> {
    Snapshot {
        meta,
        snapshot: Box::new(Files::new(directory)),
    }
}

/// Copies the files of a snapshot of another store.
fn copied(from: &Directory, to: Arc<Directory>) -> Result<Arc<Directory>, StoreError> {
    to.fs().mkdir(to.path())?;
    for entry in from.fs().list(from.path())? {
        let path = |directory: &Directory| format!("{}/{}", directory.path(), entry.name);
        let source = from.fs().open(&path(from), OpenOptions::READ)?;
        let target = to.fs().open(&path(&to), OpenOptions::CREATE)?;
        let mut bytes = vec![0; PIECE_BYTES];
        let mut at = 0;
        loop {
            let read = source.read_at(at, &mut bytes)?;
            if read == 0 {
                break;
            }
            target.append(&bytes[..read])?;
            at += read as u64;
        }
        target.sync()?;
    }
    Ok(to)
}

/// The state machine that openraft drives.
#[derive(Clone)]
pub struct StateMachine {
    state: Arc<AppliedState>,
}

impl StateMachine {
    pub(super) fn new(state: Arc<AppliedState>) -> StateMachine {
        StateMachine { state }
    }

    /// Returns the state, for reading.
    #[must_use]
    pub fn state(&self) -> &Arc<AppliedState> {
        &self.state
    }

    async fn run<T, F>(
        &self,
        subject: ErrorSubject<NodeId>,
        verb: ErrorVerb,
        work: F,
    ) -> Result<T, StorageError<NodeId>>
    where
        T: Send + 'static,
        F: FnOnce(&AppliedState) -> Result<T, StoreError> + Send + 'static,
    {
        let state = Arc::clone(&self.state);
        let done = blocking(move || work(&state)).await;
        done.map_err(|error| error.raft(subject, verb))
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), StorageError<NodeId>> {
        let work = |state: &AppliedState| state.opened().applied();
        self.run(ErrorSubject::StateMachine, ErrorVerb::Read, work)
            .await
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Applied>, StorageError<NodeId>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let work = move |state: &AppliedState| {
            state.opened().apply(&entries)?;
            let applied = |entry: &Entry| Applied {
                index: entry.log_id.index,
            };
            Ok(entries.iter().map(applied).collect())
        };
        self.run(ErrorSubject::StateMachine, ErrorVerb::Write, work)
            .await
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            machine: self.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Files>, StorageError<NodeId>> {
        let work = |state: &AppliedState| {
            let directory = state.places.lock().directories.new_state();
            directory.fs().mkdir(directory.path())?;
            Ok(Box::new(Files::new(directory)))
        };
        self.run(ErrorSubject::Snapshot(None), ErrorVerb::Write, work)
            .await
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Files>,
    ) -> Result<(), StorageError<NodeId>> {
        let (subject, meta) = (ErrorSubject::Snapshot(Some(meta.signature())), meta.clone());
        let work = move |state: &AppliedState| {
            let installed = state.install(&meta, &snapshot);
            if installed.is_ok() {
                state.installed.fetch_add(1, Ordering::Relaxed);
            } else {
                state.installs.fail();
            }
            installed
        };
        self.run(subject, ErrorVerb::Write, work).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<TypeConfig>>, StorageError<NodeId>> {
        let work = |state: &AppliedState| {
            let current = state.places.lock().snapshot.clone();
            Ok(current.map(|(meta, directory)| snapshot(meta, directory)))
        };
        self.run(ErrorSubject::Snapshot(None), ErrorVerb::Read, work)
            .await
    }
}

/// Makes snapshots of the state.
pub struct SnapshotBuilder {
    machine: StateMachine,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<NodeId>> {
        self.machine
            .run(
                ErrorSubject::Snapshot(None),
                ErrorVerb::Write,
                AppliedState::build,
            )
            .await
    }
}
