//! Openraft's own tests of a store.

mod common;

use common::watchdog;
use openraft::storage::RaftStateMachine;
use openraft::testing::{StoreBuilder, Suite};
use openraft::{
    CommittedLeaderId, EntryPayload, ErrorSubject, ErrorVerb, RaftSnapshotBuilder, StorageError,
    StorageIOError,
};
use pumice::{FileSystem, MountOptions};
use pumice_cluster::{
    Entry, Files, KeyChange, LogId, LogStore, NodeId, StateMachine, Store, StoreOptions, TypeConfig,
};

/// Makes stores on devices of this kind.
enum Devices {
    Memory,
    Image,
}

/// The things that a store needs as long as it is used.
struct Guard {
    fs: FileSystem,
    _dir: tempfile::TempDir,
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine, Guard> for Devices {
    async fn build(&self) -> Result<(Guard, LogStore, StateMachine), StorageError<NodeId>> {
        let dir = tempfile::tempdir().unwrap();
        let device = match self {
            Devices::Memory => "malloc://128M".to_owned(),
            Devices::Image => format!(
                "file://{}/node.img?size=128M&create=1",
                dir.path().display()
            ),
        };
        let failed = |error: &dyn std::error::Error| {
            StorageIOError::new(
                ErrorSubject::Store,
                ErrorVerb::Read,
                openraft::AnyError::error(error),
            )
        };
        let fs = pumice::mount(&device, &MountOptions::new()).map_err(|e| failed(&e))?;
        let store = Store::open(&fs, &StoreOptions::default()).map_err(|e| failed(&e))?;
        let guard = Guard { fs, _dir: dir };
        Ok((guard, store.log, store.state))
    }
}

fn entry(index: u64) -> Entry {
    Entry {
        log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
        payload: EntryPayload::Normal(KeyChange::Put {
            key: format!("key{index}"),
            value: "x".repeat(100),
        }),
    }
}

/// Copies the files of a snapshot, but for one byte of the last if it is to be `short`.
async fn send(from: &Files, to: &Files, short: bool) {
    let list = from.list().await.unwrap();
    for (n, file) in list.iter().enumerate() {
        let mut bytes = from.read(&file.name, 0, 1 << 20).await.unwrap();
        if short && n + 1 == list.len() {
            bytes.pop();
        }
        to.append(&file.name, 0, bytes).await.unwrap();
    }
}

#[test]
fn a_snapshot_that_is_not_what_was_announced_is_refused() {
    let _limit = watchdog();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (_leader, _, mut leads) = Devices::Memory.build().await.unwrap();
        leads.apply((1..=20).map(entry)).await.unwrap();
        let mut builder = leads.get_snapshot_builder().await;
        let built = builder.build_snapshot().await.unwrap();
        let list = built.snapshot.list().await.unwrap();

        let (guard, _log, mut follows) = Devices::Memory.build().await.unwrap();
        let received = follows.begin_receiving_snapshot().await.unwrap();
        for name in [
            "",
            ".",
            "..",
            "../current",
            "a/b",
            "/log",
            "a\0b",
            &"n".repeat(65),
        ] {
            assert!(received.append(name, 0, vec![1]).await.is_err(), "{name:?}");
        }
        assert!(
            received.append("CURRENT", 1, vec![1]).await.is_err(),
            "there is no byte 0"
        );
        send(&built.snapshot, &received, true).await;
        let error = received.complete(list.clone()).await.unwrap_err();
        assert!(error.to_string().contains("was announced"), "{error}");
        // It leaves nothing.
        drop(received);

        let received = follows.begin_receiving_snapshot().await.unwrap();
        send(&built.snapshot, &received, false).await;
        received.complete(list).await.unwrap();
        let mut other = built.meta.clone();
        other.last_log_id = Some(entry(21).log_id);
        let error = follows.state().check(&received, &other).await.unwrap_err();
        assert!(
            error.to_string().contains("it has the state after"),
            "{error}"
        );
        follows.state().check(&received, &built.meta).await.unwrap();
        follows
            .install_snapshot(&built.meta, received)
            .await
            .unwrap();
        let read = follows.state().get("key20".to_owned()).await.unwrap();
        assert_eq!(read, Some("x".repeat(100)));
        let entries = guard.fs.list("/").unwrap().into_iter();
        let directories = entries.filter(|entry| entry.is_dir).map(|entry| entry.name);
        let names: Vec<String> = directories.collect();
        assert_eq!(
            names.len(),
            3,
            "the log, the new state and its snapshot, no more: {names:?}"
        );
    });
}

#[test]
fn the_suite_passes_in_memory() {
    let _limit = watchdog();
    Suite::test_all(Devices::Memory).unwrap();
}

#[test]
fn the_suite_passes_on_image_files() {
    let _limit = watchdog();
    Suite::test_all(Devices::Image).unwrap();
}
