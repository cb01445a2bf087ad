//! Power cuts at every event of a workload on a node's store: whatever of the unflushed writes became durable, the store
//! opens, has every vote and entry that was acknowledged, and a state that fits what it says it has applied.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::watchdog;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine, Snapshot};
use openraft::{CommittedLeaderId, EntryPayload, RaftLogReader, RaftSnapshotBuilder, Vote};
use pumice::fs::DirEntry;
use pumice::{FileSystem, FormatOptions, MountOptions, mount_device};
use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, Event, checked};
use pumice_cluster::{Entry, Files, KeyChange, LogId, Store, StoreOptions, TypeConfig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Runtime;

const LEN_BYTES: u64 = 128 << 20;
/// Entries that are in the log before the first snapshot.
const FIRST: u64 = 3_000;
/// The last entry in the snapshot of the leader.
const INSTALLED: u64 = 4_000;
/// Bytes that are sent of a file at a time.
const PIECE_BYTES: usize = 32 << 10;
/// Snapshots that are made while entries are applied.
const SNAPSHOTS: usize = 3;

/// Marks in the events of the device. Each has the number of what is durable in its low bits.
const KIND: u64 = 32;
const OPENED: u64 = 0;
const VOTE: u64 = 1;
const LOG: u64 = 2;
const SNAPSHOT: u64 = 3;
const APPLIED: u64 = 4;
/// From here on the log may end at this entry, although later ones were acknowledged.
const TRUNCATED: u64 = 5;

/// The numbers that were acknowledged, by the kind of their marks.
type Acknowledged = BTreeMap<u64, u64>;

fn options() -> StoreOptions {
    StoreOptions {
        write_buffer_bytes: 64 << 10,
        wal_bytes: 1 << 20,
    }
}

fn mounted(device: &Arc<CrashDevice>) -> Result<FileSystem, pumice::Error> {
    let device: Arc<dyn BlockDevice> = Arc::clone(device) as Arc<dyn BlockDevice>;
    let options = MountOptions::new().format_empty(Some(FormatOptions::default()));
    mount_device(&device, &options.cache_bytes(16 << 20))
}

fn device(image: CrashImage, seed: u64) -> Arc<CrashDevice> {
    Arc::new(CrashDevice::from_image(512, image, true, seed))
}

fn id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

fn key(index: u64) -> String {
    format!("key{index:06}")
}

/// The entry of each index sets the key of that index, so that the state after it has just the keys up to there.
fn entry(term: u64, index: u64) -> Entry {
    Entry {
        log_id: id(term, index),
        payload: EntryPayload::Normal(KeyChange::Put {
            key: key(index),
            value: format!("{index:0100}"),
        }),
    }
}

/// A store that is used, on a device that counts what is acknowledged.
struct Bench {
    fs: FileSystem,
    store: Store,
    device: Arc<CrashDevice>,
}

impl Bench {
    fn mark(&self, kind: u64, number: u64) {
        self.device.mark(kind << KIND | number);
    }

    async fn vote(&mut self, term: u64) {
        self.store.log.save_vote(&Vote::new(term, 1)).await.unwrap();
        self.mark(VOTE, term);
    }

    async fn append(&mut self, term: u64, indices: std::ops::RangeInclusive<u64>) {
        let last = *indices.end();
        let entries: Vec<Entry> = indices.map(|index| entry(term, index)).collect();
        self.store.log.blocking_append(entries).await.unwrap();
        self.mark(LOG, last);
    }

    async fn apply(&mut self, term: u64, indices: std::ops::RangeInclusive<u64>) {
        let entries: Vec<Entry> = indices.map(|index| entry(term, index)).collect();
        self.store.state.apply(entries).await.unwrap();
    }

    /// Makes a snapshot, applies entries from `next` on meanwhile, and returns which is next after it.
    async fn snapshot_beside_applies(&mut self, next: u64) -> (u64, Snapshot<TypeConfig>) {
        let mut builder = self.store.state.get_snapshot_builder().await;
        let build = tokio::spawn(async move { builder.build_snapshot().await.unwrap() });
        let mut next = next;
        while !build.is_finished() && next < FIRST {
            self.apply(1, next..=next).await;
            next += 1;
        }
        let snapshot = build.await.unwrap();
        self.mark(SNAPSHOT, snapshot.meta.last_log_id.unwrap().index);
        (next, snapshot)
    }

    /// Applies more than a memtable has room for, so that RocksDB writes a table between two writes of the state machine. Returns
    /// which entry is next.
    async fn fill_a_memtable(&mut self) -> u64 {
        self.apply(1, 1..=1_000).await;
        // RocksDB looks for a full memtable when it writes the next time.
        self.apply(1, 1_001..=1_001).await;
        let table = |entry: &DirEntry| entry.name.ends_with(".sst") && entry.len > 0;
        while !self.fs.list("/state-0").unwrap().iter().any(table) {
            tokio::task::yield_now().await;
        }
        self.vote(2).await;
        1_002
    }

    /// Makes snapshots beside applies, and purges the log.
    async fn snapshots(&mut self, next: u64) {
        let mut next = next;
        for _ in 0..SNAPSHOTS {
            let (after, snapshot) = self.snapshot_beside_applies(next).await;
            next = after;
            let last = snapshot.meta.last_log_id.unwrap();
            self.store.log.purge(id(1, last.index - 10)).await.unwrap();
        }
    }

    /// Receives the snapshot of a leader and installs it as openraft does: the log is purged when the state machine was asked.
    async fn install(&mut self, leader: &Snapshot<TypeConfig>) {
        let received = self.store.state.begin_receiving_snapshot().await.unwrap();
        transfer(&leader.snapshot, &received).await;
        let state = Arc::clone(self.store.state.state());
        state.check(&received, &leader.meta).await.unwrap();
        let announced = state.announce_install();
        let upto = leader.meta.last_log_id.unwrap();
        let Store { log, state } = &mut self.store;
        let (purged, installed) = tokio::join!(
            biased;
            log.purge(upto),
            state.install_snapshot(&leader.meta, received)
        );
        purged.unwrap();
        installed.unwrap();
        drop(announced);
        self.mark(SNAPSHOT, upto.index);
        self.mark(LOG, upto.index);
    }
}

/// Copies the files of a snapshot as they go over a connection.
async fn transfer(from: &Files, to: &Files) {
    let list = from.list().await.unwrap();
    for file in &list {
        let mut at = 0;
        loop {
            let piece = from.read(&file.name, at, PIECE_BYTES).await.unwrap();
            let len = piece.len() as u64;
            to.append(&file.name, at, piece).await.unwrap();
            at += len;
            if at >= file.len_bytes {
                break;
            }
        }
    }
    to.complete(list).await.unwrap();
}

/// Makes a snapshot of entries up to [`INSTALLED`] in memory.
async fn leader() -> (FileSystem, Store, Snapshot<TypeConfig>) {
    let fs = pumice::mount("malloc://128M", &MountOptions::new()).unwrap();
    let mut store = Store::open(&fs, &options()).unwrap();
    let entries: Vec<Entry> = (1..=INSTALLED).map(|index| entry(1, index)).collect();
    store.state.apply(entries).await.unwrap();
    let mut builder = store.state.get_snapshot_builder().await;
    let snapshot = builder.build_snapshot().await.unwrap();
    (fs, store, snapshot)
}

async fn workload(device: &Arc<CrashDevice>) {
    let (_fs, _store, leader) = leader().await;
    let fs = mounted(device).unwrap();
    let store = Store::open(&fs, &options()).unwrap();
    let device = Arc::clone(device);
    let mut bench = Bench { fs, store, device };
    bench.mark(OPENED, 0);
    bench.vote(1).await;
    for first in (1..=FIRST).step_by(1_000) {
        bench.append(1, first..=first + 999).await;
    }
    let next = bench.fill_a_memtable().await;
    bench.snapshots(next).await;
    bench.append(1, FIRST + 1..=FIRST + 4).await;
    // Another leader has other entries.
    bench.mark(TRUNCATED, FIRST);
    bench.store.log.truncate(id(1, FIRST + 1)).await.unwrap();
    bench.append(2, FIRST + 1..=FIRST + 1).await;
    bench.install(&leader).await;
    for index in INSTALLED + 1..=INSTALLED + 5 {
        bench.append(2, index..=index).await;
        bench.apply(2, index..=index).await;
    }
    bench.vote(3).await;
    let Bench { fs, store, device } = bench;
    drop(store);
    fs.unmount().unwrap();
    device.mark(APPLIED << KIND | (INSTALLED + 5));
}

/// Adds what a mark says. All marks up to a cut are added in their order, each time.
fn acknowledge(acknowledged: &mut Acknowledged, mark: u64) {
    let number = mark & ((1 << KIND) - 1);
    match mark >> KIND {
        TRUNCATED => {
            acknowledged.insert(LOG, number);
        }
        kind => {
            let most = acknowledged.entry(kind).or_default();
            *most = number.max(*most);
        }
    }
}

/// Opens the store after a cut and looks for what was acknowledged.
async fn check(image: &CrashImage, acknowledged: &Acknowledged, what: &str) {
    let least = |kind| acknowledged.get(&kind).copied().unwrap_or(0);
    let fs = mounted(&device(image.clone(), 7)).unwrap_or_else(|e| panic!("{what}: mounting: {e}"));
    let opened = Store::open(&fs, &options());
    let mut store = opened.unwrap_or_else(|e| panic!("{what}: opening: {e}"));

    let vote = store.log.read_vote().await.unwrap();
    let term = vote.map_or(0, |vote| vote.leader_id.term);
    assert!(
        term >= least(VOTE),
        "{what}: the vote {vote:?} is older than term {}",
        least(VOTE)
    );

    let log = store.log.get_log_state().await.unwrap();
    let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
    let (purged, last) = (index(log.last_purged_log_id), index(log.last_log_id));
    assert!(
        last >= least(LOG),
        "{what}: the log ends at {last}, and {} was acknowledged",
        least(LOG)
    );
    let entries = store.log.try_get_log_entries(purged + 1..).await.unwrap();
    let ids: Vec<LogId> = entries.iter().map(|entry| entry.log_id).collect();
    let wanted: Vec<u64> = (purged + 1..=last).collect();
    let found: Vec<u64> = ids.iter().map(|id| id.index).collect();
    assert_eq!(found, wanted, "{what}: the log has a hole");
    assert!(
        ids.is_sorted(),
        "{what}: entries of an older leader follow those of a newer one"
    );

    let (applied, _) = store.state.applied_state().await.unwrap();
    let applied = index(applied);
    let durable = least(SNAPSHOT).max(least(APPLIED)).max(purged);
    assert!(
        applied >= durable,
        "{what}: the state ends at {applied}, and that after {durable} was durable"
    );
    check_keys(&store, applied, what).await;

    let snapshot = store.state.get_current_snapshot().await.unwrap();
    let covered = index(
        snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.meta.last_log_id),
    );
    assert!(
        covered >= least(SNAPSHOT),
        "{what}: the snapshot ends at {covered}"
    );
    if let Some(Snapshot { meta, snapshot }) = snapshot {
        let fits = store.state.state().check(&snapshot, &meta).await;
        fits.unwrap_or_else(|e| panic!("{what}: the snapshot: {e}"));
    }
    let directories = fs
        .list("/")
        .unwrap()
        .into_iter()
        .filter(|entry| entry.is_dir);
    let names: Vec<String> = directories.map(|entry| entry.name).collect();
    assert!(names.len() <= 3, "{what}: directories are left: {names:?}");
    drop(store);
    fs.unmount()
        .unwrap_or_else(|e| panic!("{what}: unmounting: {e}"));
    checked("cluster", image);
}

/// The state after entry `applied` has the keys up to that one, and no other.
async fn check_keys(store: &Store, applied: u64, what: &str) {
    let state = store.state.state();
    // Those where the state ends, and some of the others.
    let indices =
        (1..=INSTALLED + 5).filter(|index| index.abs_diff(applied) <= 20 || index % 16 == 0);
    for index in indices {
        let value = state.get(key(index)).await.unwrap();
        let wanted = (index <= applied).then(|| format!("{index:0100}"));
        assert_eq!(
            value,
            wanted,
            "{what}: {} after entry {applied}",
            key(index)
        );
    }
}

#[test]
fn power_cuts_lose_nothing_that_was_acknowledged() {
    let _limit = watchdog();
    let seed = std::env::var("PUMICE_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or(20_261_201);
    println!("PUMICE_SEED={seed}");
    let runtime = Runtime::new().unwrap();
    let device = device(CrashImage::zeroed(LEN_BYTES), seed);
    runtime.block_on(workload(&device));
    let mut rng = StdRng::seed_from_u64(seed);
    let mut points = device.crash_points();
    let (mut cuts, mut opened, mut acknowledged) = (0, false, Acknowledged::new());
    while let Some(event) = points.advance() {
        let marked = matches!(event, Event::Mark(_));
        for mark in points.marks() {
            opened = true;
            acknowledge(&mut acknowledged, mark);
        }
        // Before the store existed, formatting and creation may start again.
        if !opened {
            continue;
        }
        // After a mark more has to be there than before. Of the other events every second one is enough.
        if !marked && points.position().is_multiple_of(2) {
            continue;
        }
        let likely = [0.0, 0.5, 1.0][cuts % 3];
        let image = points.image(&mut |_piece| rng.random_bool(likely));
        let what = format!(
            "seed {seed}, cut after event {} of {}, pieces kept with {likely}",
            points.position(),
            points.len_events()
        );
        runtime.block_on(check(&image, &acknowledged, &what));
        cuts += 1;
    }
    assert!(cuts > 100, "only {cuts} cuts");
    println!("{cuts} cuts");
}
