//! What the journal carries again, beside faults of the ring, of the journal's blob and of reads. Each test names the rules of
//! the protocol that it is about.

#[path = "common/carry.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod carry;
mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::faults::{content_of, fail, hang};
use common::{content, memory, memory_with};
use flaky::{Flaky, Plan};
use held::{block_of, carried, metadata, with_journal};
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_blobfs::blobstore::format::SuperBlock;
use pumice_blobfs::blobstore::{BlobId, Blobstore, LoadOptions};
use pumice_blobfs::fs::{File, FileSystem, FsError, MountOptions};
use task::{spawn, wait_for};

const FOREVER: u64 = u64::MAX;

fn mount(dev: Arc<dyn BlockDevice>) -> Result<FileSystem, FsError> {
    FileSystem::mount(dev, &MountOptions::default())
}

/// The content of a device, as a killed process leaves it, with faults of one block.
fn killed(
    base: &Arc<dyn BlockDevice>,
    kinds: &[OpKind],
    block: Option<(u64, u64)>,
) -> Arc<ErrorDevice> {
    let dev = ErrorDevice::new(None, memory_with(&content(base), 4096));
    kinds
        .iter()
        .for_each(|kind| dev.inject(fail(*kind, FOREVER, block)));
    Arc::new(dev)
}

/// A file system with a file that is owed bytes for a block that cannot be written.
struct Store {
    base: Arc<dyn BlockDevice>,
    flaky: Arc<Flaky>,
    dev: Arc<ErrorDevice>,
    fs: FileSystem,
    file: File,
    block: Option<(u64, u64)>,
    bytes: Vec<u8>,
}

impl Store {
    fn new() -> Store {
        let base = memory(32 << 20, 4096);
        FileSystem::format(Arc::clone(&base), &carry::options(4 << 20)).unwrap();
        let flaky = Flaky::new(Arc::clone(&base));
        let dev = Arc::new(ErrorDevice::new(None, flaky.clone()));
        let fs = mount(dev.clone()).unwrap();
        let file = carried(&fs, "/bad");
        let block = Some((block_of(&fs, &file, 0), 1));
        dev.inject(fail(OpKind::Write, FOREVER, block));
        file.append(&[3; 20]).unwrap();
        file.sync().unwrap();
        Store {
            base,
            flaky,
            dev,
            fs,
            file,
            block,
            bytes: [vec![1; 100], vec![2; 50], vec![3; 20]].concat(),
        }
    }

    /// Has a checkpoint carry again what cannot be put in place.
    fn checkpoint(&self) {
        self.file.truncate(165).unwrap_err();
    }

    fn assert_mounts(&self, dev: Arc<dyn BlockDevice>, what: &str) {
        let next = mount(dev).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(content_of(&next, "/bad") == self.bytes, "{what}");
        next.unmount().unwrap();
    }

    fn end(self) {
        self.dev.clear();
        self.flaky.arm(None);
        drop(self.file);
        self.fs.unmount().unwrap();
    }
}

/// A header that could not be written may count, with what is carried again behind it. Another checkpoint leaves that in the ring
/// until it is sure of the header, wherever the power is cut.
#[test]
fn rules_12_and_23_another_checkpoint_behind_a_header_that_may_be_on_the_device() {
    let count = {
        let store = Store::new();
        store.flaky.arm(Some(Plan {
            from: u64::MAX,
            count: 0,
            kind: IoErrorKind::Media,
            done: false,
        }));
        store.checkpoint();
        let count = store.flaky.seen();
        store.end();
        count
    };
    // The header is the last operation of it.
    for from in 0..count + 4 {
        let store = Store::new();
        let plan = |from, done| Plan {
            from,
            count: u64::MAX,
            kind: IoErrorKind::Media,
            done,
        };
        store.flaky.arm(Some(plan(count - 1, true)));
        store.checkpoint();
        assert!(store.flaky.seen() >= count + 5, "{}", store.flaky.seen());
        store.flaky.arm(Some(plan(from, false)));
        store.checkpoint();
        let what = format!("cut before operation {from} of the second checkpoint");
        store.assert_mounts(memory_with(&content(&store.base), 4096), &what);
        store.end();
    }
}

/// A block that could not be read when the store was mounted, and can be read later, has the bytes in the journal.
#[test]
fn rule_23_readers_find_the_bytes_when_the_block_can_be_read_again() {
    let store = Store::new();
    let left = killed(&store.base, &[OpKind::Read, OpKind::Write], store.block);
    let next = mount(left.clone()).unwrap();
    left.clear();
    left.inject(fail(OpKind::Write, FOREVER, store.block));
    assert!(content_of(&next, "/bad") == store.bytes);
    left.clear();
    next.unmount().unwrap();
    drop(next);
    store.assert_mounts(left, "mounted again");
    store.end();
}

/// The first sync of a mount is carried, too, if the file is owed bytes.
#[test]
fn rules_21_and_23_the_first_sync_of_a_mount_is_carried_beside_what_is_owed() {
    let mut store = Store::new();
    let left = killed(&store.base, &[OpKind::Write], store.block);
    let next = mount(left.clone()).unwrap();
    let file = next
        .open("/bad", pumice_blobfs::fs::OpenOptions::CREATE)
        .unwrap();
    file.append(&[4; 30]).unwrap();
    file.sync().unwrap();
    store.bytes.extend([4; 30]);
    let base: Arc<dyn BlockDevice> = left.clone();
    store.assert_mounts(memory_with(&content(&base), 4096), "mounted again");
    left.clear();
    drop(file);
    next.unmount().unwrap();
    store.end();
}

/// On a device that the host knows, a mount ends the session of the process that was killed, and begins another, whatever cannot be
/// put in place.
#[test]
fn rule_23_sessions_go_on_beside_what_cannot_be_put_in_place() {
    let dir = tempfile::tempdir().unwrap();
    for breaks_pages in [false, true] {
        let open = |name: &str, create: &str| {
            let path = dir.path().join(format!("{name}-{breaks_pages}"));
            let uri = format!("file://{}?block_size=4096{create}", path.display());
            (path, pumice_bdev::open(&uri).unwrap())
        };
        let (path, base) = open("image", "&size=32M&create=1");
        FileSystem::format(Arc::clone(&base), &carry::options(4 << 20)).unwrap();
        let dev = Arc::new(ErrorDevice::new(None, base));
        let fs = mount(dev.clone()).unwrap();
        let file = carried(&fs, "/bad");
        let bad = match breaks_pages {
            true => metadata(&fs),
            false => Some((block_of(&fs, &file, 0), 1)),
        };
        dev.inject(fail(OpKind::Write, FOREVER, bad));
        file.append(&[3; 20]).unwrap();
        file.sync().unwrap();
        assert_ne!(fs.blobstore().super_block().session(), 0);
        std::fs::copy(&path, dir.path().join(format!("killed-{breaks_pages}"))).unwrap();
        let (_, base) = open("killed", "");
        let left = Arc::new(ErrorDevice::new(None, base));
        left.inject(fail(OpKind::Write, FOREVER, bad));
        let next = mount(left.clone()).unwrap();
        assert_eq!(next.blobstore().super_block().session(), 0);
        assert!(content_of(&next, "/bad").ends_with(&[3; 20]));
        let other = next
            .open("/bad", pumice_blobfs::fs::OpenOptions::CREATE)
            .unwrap();
        other.append(&[4; 30]).unwrap();
        assert_ne!(next.blobstore().super_block().session(), 0);
        other.sync().unwrap();
        drop(other);
        left.clear();
        next.unmount().unwrap();
        dev.clear();
        drop(file);
        fs.unmount().unwrap();
    }
}

/// A ring whose blob is no longer the journal's is not given up while it is the only place of some bytes.
#[test]
fn rules_13_and_23_a_ring_that_has_bytes_without_a_place_is_not_given_up() {
    let store = Store::new();
    let mut image = content(&store.base);
    let first = image[..4096].to_vec();
    // Another program renames the blob.
    let mut sb = SuperBlock::decode(&first.clone().try_into().unwrap()).unwrap();
    let journal = u64::from_le_bytes(sb.reserved[8..16].try_into().unwrap());
    sb.reserved[..40].fill(0);
    sb.version = 3.into();
    image[..4096].copy_from_slice(&sb.encode());
    let other = memory_with(&image, 4096);
    let blobs = Blobstore::load(Arc::clone(&other), &LoadOptions::default()).unwrap();
    let mut renamed = blobs.transaction();
    renamed.set_xattr(BlobId(journal), "name", b"other");
    renamed.commit().unwrap();
    blobs.unload().unwrap();
    drop(blobs);
    let mut image = content(&other);
    image[..4096].copy_from_slice(&first);
    let base = memory_with(&image, 4096);
    let left = killed(&base, &[OpKind::Write], store.block);
    let error = mount(left.clone()).unwrap_err().to_string();
    assert!(error.contains("cannot be put in place"), "{error}");
    left.clear();
    let next = mount(left).unwrap();
    assert!(content_of(&next, "/bad") == store.bytes);
    drop(next);
    store.end();
}

/// While a checkpoint hangs, no more is carried than fits the part of the ring that is for carrying it again: one bad block
/// stops neither changes nor mounts.
#[test]
fn rule_23_all_that_is_owed_can_be_carried_again() {
    let (dev, fs) = with_journal(1 << 20, &MountOptions::default());
    let file = carried(&fs, "/bad");
    file.allocate(0, 1 << 20).unwrap();
    let block = Some((block_of(&fs, &file, 0), 1));
    dev.inject(fail(OpKind::Write, FOREVER, block));
    dev.inject(hang(OpKind::Write, 1, metadata(&fs)));
    let done = Arc::new(AtomicUsize::new(0));
    let syncs = {
        let (done, file) = (Arc::clone(&done), file.clone());
        spawn(move || {
            (0..30).try_for_each(|_| {
                file.append(&[9; 30_000])?;
                file.sync()?;
                done.fetch_add(1, Ordering::SeqCst);
                Ok::<(), FsError>(())
            })
        })
    };
    // The other fault stays.
    wait_for("a checkpoint", || dev.injections().len() == 1);
    assert!(syncs.still_waits());
    dev.resume();
    // The file is told.
    syncs.join("the syncs").unwrap_err();
    for n in 0..300 {
        let made = fs.mkdir("/d").and_then(|()| fs.rmdir("/d"));
        made.unwrap_or_else(|error| panic!("change {n}: {error}"));
    }
    let base: Arc<dyn BlockDevice> = dev.clone();
    let left = killed(&base, &[OpKind::Write], block);
    let next = mount(left.clone()).unwrap();
    let found = content_of(&next, "/bad");
    assert!(found.len() >= 150 + done.load(Ordering::SeqCst) * 30_000);
    assert!(found[150..].iter().all(|byte| *byte == 9));
    left.clear();
    next.unmount().unwrap();
    dev.clear();
    file.sync().unwrap();
    drop(file);
    fs.unmount().unwrap();
}
