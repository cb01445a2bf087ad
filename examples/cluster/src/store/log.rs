//! The Raft log and the vote, in a database of their own.

use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    ErrorSubject, ErrorVerb, LogState, OptionalSend, RaftLogReader, StorageError, Vote,
};
use pumice::rocksdb::{Direction, IteratorMode, ReadOptions, WriteBatch, WriteOptions};
use pumice::{Db, FileSystem};

use super::{
    Family, Installs, Opening, StoreError, StoreOptions, blocking, decode, encode, family, read,
};
use crate::{Entry, LogId, NodeId, TypeConfig};

const PATH: &str = "/log";
/// The column family of the entries, by index.
const ENTRIES: &str = "entries";
/// The column family of the keys below.
const META: &str = "meta";
const NODE: &str = "node";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";

/// Bytes of the entries that are read for one message to another node, at least one entry.
const MESSAGE_BYTES: usize = 1 << 20;

/// The database of the log.
struct Log {
    db: Db,
}

impl Log {
    fn family(&self, name: &str) -> Result<Family<'_>, StoreError> {
        family(&self.db, PATH, name)
    }

    fn get<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        read(&self.db, &self.family(META)?, key)
    }

    /// Sets a key. It is durable on return, with all that was written before.
    fn put_durably<T: serde::Serialize>(&self, key: &str, value: &T) -> Result<(), StoreError> {
        let family = self.family(META)?;
        Ok(self
            .db
            .put_cf_opt(&family, key, encode(key, value)?, &durable())?)
    }

    /// Returns the entries of a range in order: as many as have `limit` bytes, and at least one if there is one.
    fn entries(&self, from: u64, to: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let mut options = ReadOptions::default();
        // Purged entries before and after the range are not looked at.
        options.set_iterate_upper_bound(to.to_be_bytes());
        let from = from.to_be_bytes();
        let mode = IteratorMode::From(&from, Direction::Forward);
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for item in self
            .db
            .iterator_cf_opt(&self.family(ENTRIES)?, options, mode)
        {
            let (_, value) = item?;
            bytes += value.len();
            if bytes > limit && !entries.is_empty() {
                break;
            }
            entries.push(decode(PATH, &value)?);
        }
        Ok(entries)
    }

    fn state(&self) -> Result<LogState<TypeConfig>, StoreError> {
        let last_purged_log_id: Option<LogId> = self.get(PURGED)?;
        let mut newest = self
            .db
            .iterator_cf(&self.family(ENTRIES)?, IteratorMode::End);
        let last = match newest.next().transpose()? {
            Some((_, value)) => Some(decode::<Entry>(PATH, &value)?.log_id),
            None => last_purged_log_id,
        };
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last,
        })
    }

    fn truncate(&self, from: u64) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(
            &self.family(ENTRIES)?,
            from.to_be_bytes(),
            u64::MAX.to_be_bytes(),
        );
        Ok(self.db.write_opt(batch, &durable())?)
    }

    fn purge(&self, upto: &LogId) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.family(META)?, PURGED, encode(PURGED, upto)?);
        let end = upto.index.saturating_add(1);
        batch.delete_range_cf(
            &self.family(ENTRIES)?,
            0_u64.to_be_bytes(),
            end.to_be_bytes(),
        );
        Ok(self.db.write_opt(batch, &durable())?)
    }
}

fn durable() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// A thread that makes appended entries durable: one sync for all that were appended meanwhile.
struct Flusher {
    queue: Option<mpsc::Sender<LogFlushed<TypeConfig>>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    fn start(log: &Arc<Log>) -> Flusher {
        let (queue, appended) = mpsc::channel::<LogFlushed<TypeConfig>>();
        let log = Arc::clone(log);
        let thread = std::thread::spawn(move || {
            while let Ok(first) = appended.recv() {
                let waiting: Vec<_> = std::iter::once(first).chain(appended.try_iter()).collect();
                let flushed = log.db.flush_wal(true).map_err(|error| error.to_string());
                for callback in waiting {
                    let result = flushed.clone().map_err(std::io::Error::other);
                    callback.log_io_completed(result);
                }
            }
        });
        Flusher {
            queue: Some(queue),
            thread: Some(thread),
        }
    }

    /// Has the callback called when what was written so far is durable.
    fn tell(&self, callback: LogFlushed<TypeConfig>) {
        let refused = match &self.queue {
            Some(queue) => queue.send(callback).err().map(|unsent| unsent.0),
            None => Some(callback),
        };
        if let Some(callback) = refused {
            let reason = "the thread that syncs the log has ended";
            callback.log_io_completed(Err(std::io::Error::other(reason)));
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed.
            let _ = thread.join();
        }
    }
}

/// The Raft log and the vote of a node.
pub struct LogStore {
    // It ends before the database is closed.
    flusher: Flusher,
    log: Arc<Log>,
    installs: Arc<Installs>,
}

impl LogStore {
    pub(super) fn open(
        fs: &FileSystem,
        options: &StoreOptions,
        installs: Arc<Installs>,
    ) -> Result<LogStore, StoreError> {
        let options = options.database(PATH, &[ENTRIES, META], Opening::Create);
        let log = Arc::new(Log {
            db: options.open_in(fs)?,
        });
        Ok(LogStore {
            flusher: Flusher::start(&log),
            log,
            installs,
        })
    }

    /// Makes it the store of this node, if it is not one yet.
    ///
    /// # Errors
    /// [`StoreError::Inconsistent`] if it is another node's: two nodes with one log would count as two votes.
    pub fn claim(&self, node: NodeId) -> Result<(), StoreError> {
        match self.log.get::<NodeId>(NODE)? {
            None => self.log.put_durably(NODE, &node),
            Some(owner) if owner == node => Ok(()),
            Some(owner) => {
                let reason = format!(
                    "it is the log of node {owner}: start it with that id, or node {node} with another device"
                );
                Err(StoreError::inconsistent(PATH, reason))
            }
        }
    }

    async fn run<T, F>(
        &self,
        subject: ErrorSubject<NodeId>,
        verb: ErrorVerb,
        work: F,
    ) -> Result<T, StorageError<NodeId>>
    where
        T: Send + 'static,
        F: FnOnce(&Log) -> Result<T, StoreError> + Send + 'static,
    {
        run(&self.log, subject, verb, work).await
    }
}

async fn run<T, F>(
    log: &Arc<Log>,
    subject: ErrorSubject<NodeId>,
    verb: ErrorVerb,
    work: F,
) -> Result<T, StorageError<NodeId>>
where
    T: Send + 'static,
    F: FnOnce(&Log) -> Result<T, StoreError> + Send + 'static,
{
    let log = Arc::clone(log);
    let done = blocking(move || work(&log)).await;
    done.map_err(|error| error.raft(subject, verb))
}

/// Reads the log for replication.
#[derive(Clone)]
pub struct LogReader {
    log: Arc<Log>,
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError<NodeId>> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        let work = move |log: &Log| log.entries(from, to, usize::MAX);
        run(&self.log, ErrorSubject::Logs, ErrorVerb::Read, work).await
    }

    /// Returns as many entries as a message has room for.
    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, StorageError<NodeId>> {
        let work = move |log: &Log| log.entries(start, end, MESSAGE_BYTES);
        run(&self.log, ErrorSubject::Logs, ErrorVerb::Read, work).await
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError<NodeId>> {
        self.get_log_reader().await.try_get_log_entries(range).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<NodeId>> {
        self.run(ErrorSubject::Logs, ErrorVerb::Read, Log::state)
            .await
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader {
            log: Arc::clone(&self.log),
        }
    }

    /// Saves the vote. It is durable on return.
    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> Result<(), StorageError<NodeId>> {
        let vote = *vote;
        let work = move |log: &Log| log.put_durably(VOTE, &vote);
        self.run(ErrorSubject::Vote, ErrorVerb::Write, work).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<NodeId>>, StorageError<NodeId>> {
        let work = |log: &Log| log.get(VOTE);
        self.run(ErrorSubject::Vote, ErrorVerb::Read, work).await
    }

    /// Saves what is committed. It need not be durable: after a power cut the leader tells it again.
    async fn save_committed(
        &mut self,
        committed: Option<LogId>,
    ) -> Result<(), StorageError<NodeId>> {
        let work = move |log: &Log| {
            let family = log.family(META)?;
            Ok(log
                .db
                .put_cf(&family, COMMITTED, encode(COMMITTED, &committed)?)?)
        };
        self.run(ErrorSubject::Store, ErrorVerb::Write, work).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError<NodeId>> {
        let work = |log: &Log| Ok(log.get::<Option<LogId>>(COMMITTED)?.flatten());
        self.run(ErrorSubject::Store, ErrorVerb::Read, work).await
    }

    /// Writes entries, which can be read on return. The callback comes when they are durable.
    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError<NodeId>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let work = move |log: &Log| {
            let family = log.family(ENTRIES)?;
            let mut batch = WriteBatch::default();
            for entry in &entries {
                batch.put_cf(
                    &family,
                    entry.log_id.index.to_be_bytes(),
                    encode(PATH, entry)?,
                );
            }
            Ok(log.db.write(batch)?)
        };
        self.run(ErrorSubject::Logs, ErrorVerb::Write, work).await?;
        self.flusher.tell(callback);
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError<NodeId>> {
        let work = move |log: &Log| log.truncate(log_id.index);
        self.run(ErrorSubject::Logs, ErrorVerb::Delete, work).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError<NodeId>> {
        // The entries are in a snapshot, which may be on its way into the state only.
        let allowed = self.installs.may_purge(log_id.index).await;
        allowed.map_err(|error| error.raft(ErrorSubject::Logs, ErrorVerb::Delete))?;
        let work = move |log: &Log| log.purge(&log_id);
        self.run(ErrorSubject::Logs, ErrorVerb::Delete, work).await
    }
}
