//! What a checkpoint cannot put in place is carried again, so that one bad block stops nothing else. Each test names the rules of
//! the protocol that it is about.

#[path = "common/carry.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod carry;
mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
mod task;

use std::sync::Arc;

use carry::{Promise, State, assert_one_of, bytes, formatted};
use common::faults::{content_of, fail, hang};
use common::journal::{DEVICES, Device};
use common::{content, memory_with};
use held::{block_of, carried, first_cluster, metadata, with_journal};
use pumice_bdev::error_inject::{ErrorDevice, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::CrashImage;
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::fs::{File, FileSystem, FsError, MountOptions, OpenOptions};
use rand::prelude::*;
use task::{spawn, wait_for};

const FOREVER: u64 = u64::MAX;
const RING: u64 = 128 << 10;

/// Appends and syncs many times. `all` has what the file has.
fn laps(file: &File, all: &mut Vec<u8>, syncs: usize) {
    for n in 0..syncs {
        let more = bytes(n, 50);
        file.append(&more).unwrap();
        file.sync().unwrap_or_else(|e| panic!("sync {n}: {e}"));
        all.extend(more);
    }
}

/// The content of the device, as a killed process leaves it, with these faults.
fn killed(dev: &ErrorDevice, base: &Arc<dyn BlockDevice>) -> Arc<ErrorDevice> {
    let next = ErrorDevice::new(None, memory_with(&content(base), 4096));
    dev.injections()
        .into_iter()
        .for_each(|one| next.inject(one));
    Arc::new(next)
}

fn mount(dev: &Arc<ErrorDevice>) -> Result<FileSystem, FsError> {
    FileSystem::mount(dev.clone(), &MountOptions::default())
}

fn open(fs: &FileSystem, path: &str) -> File {
    fs.open(path, OpenOptions::CREATE).unwrap()
}

/// A store with files whose syncs are carried: `/bad`, of which some blocks are going to be bad, and `/good`.
struct Store {
    base: Arc<dyn BlockDevice>,
    dev: Arc<ErrorDevice>,
    fs: FileSystem,
    bad: File,
    good: File,
    /// Their contents.
    bad_bytes: Vec<u8>,
    good_bytes: Vec<u8>,
}

impl Store {
    fn new(journal: u64) -> Store {
        let base = common::memory(32 << 20, 4096);
        FileSystem::format(Arc::clone(&base), &carry::options(journal)).unwrap();
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        let fs = mount(&dev).unwrap();
        let [bad, good] = ["/bad", "/good"].map(|path| carried(&fs, path));
        let both = [vec![1; 100], vec![2; 50]].concat();
        Store {
            base,
            dev,
            fs,
            bad,
            good,
            bad_bytes: both.clone(),
            good_bytes: both,
        }
    }

    fn break_blocks(&self, kind: OpKind, range: Option<(u64, u64)>) {
        self.dev.inject(fail(kind, FOREVER, range));
    }

    /// The first block of `/bad`.
    fn first_block(&self) -> Option<(u64, u64)> {
        Some((block_of(&self.fs, &self.bad, 0), 1))
    }

    /// The root page of `/bad`.
    fn root(&self) -> Option<(u64, u64)> {
        let (first, _) = metadata(&self.fs).unwrap();
        Some((first + (self.bad.blob_id().0 & 0xffff_ffff), 1))
    }

    /// Appends to a file of which a block, or the metadata page, cannot be written.
    fn begin_with_a_bad_block(&mut self, breaks_page: bool) {
        let block = if breaks_page {
            self.root()
        } else {
            self.first_block()
        };
        self.break_blocks(OpKind::Write, block);
        self.append_to_bad(20);
    }

    fn append_to_bad(&mut self, len: usize) {
        let more = bytes(7, len);
        self.bad.append(&more).unwrap();
        self.bad.sync().unwrap();
        self.bad_bytes.extend(more);
    }

    /// Closes its files.
    fn close(self) {
        drop((self.bad, self.good));
    }

    fn holds(&self, fs: &FileSystem, what: &str) {
        assert!(content_of(fs, "/bad") == self.bad_bytes, "{what}: /bad");
        assert!(content_of(fs, "/good") == self.good_bytes, "{what}: /good");
    }

    /// Unmounts what is on a device that has no faults any longer, and looks at everything again.
    fn ends(&self, dev: &Arc<ErrorDevice>, fs: FileSystem, what: &str) {
        fs.unmount().unwrap();
        drop(fs);
        let base: Arc<dyn BlockDevice> = dev.clone();
        assert_eq!(check(&base).unwrap().worst(), None, "{what}");
        let fs = mount(dev).unwrap();
        self.holds(&fs, what);
        fs.unmount().unwrap();
    }
}

/// Several laps of the ring beside a block of a file, or a metadata page, that cannot be written; the same on the next mounts.
#[test]
fn rule_23_a_bad_block_stops_nothing_else() {
    for breaks_page in [false, true] {
        let what = format!("the metadata page: {breaks_page}");
        let mut store = Store::new(RING);
        store.begin_with_a_bad_block(breaks_page);
        let mut all = std::mem::take(&mut store.good_bytes);
        laps(&store.good, &mut all, 200);
        // What needs a checkpoint for this file, and what is long.
        store.good.append(&[8; 60_000]).unwrap();
        store.good.sync().unwrap();
        all.extend([8; 60_000]);
        store.good.truncate(50_000).unwrap();
        all.truncate(50_000);
        store.good_bytes = all;
        for n in 0..30 {
            store.fs.mkdir(&format!("/d{n}")).unwrap();
            store
                .fs
                .rename(&format!("/d{n}"), &format!("/e{n}"))
                .unwrap();
        }
        store.append_to_bad(20);
        store.holds(&store.fs, &what);
        let left = killed(&store.dev, &store.base);
        // The block is still bad at the next mount, and at the one after that.
        let next = mount(&left).unwrap();
        store.holds(&next, &format!("{what}, mounted again"));
        let good = open(&next, "/good");
        let mut all = std::mem::take(&mut store.good_bytes);
        laps(&good, &mut all, 200);
        store.good_bytes = all;
        drop(good);
        store.holds(&next, &format!("{what}, mounted again, later"));
        let error = next.unmount().unwrap_err().to_string();
        assert!(error.contains("what the journal has"), "{error}");
        let error = next.unmount_anyway().unwrap_err().to_string();
        assert!(error.contains("what the journal has"), "{error}");
        drop(next);
        let last = mount(&left).unwrap();
        store.holds(&last, &format!("{what}, mounted a third time"));
        left.clear();
        store.ends(&left, last, &what);
        drop((store.bad, store.good));
        store.fs.unmount_anyway().unwrap_err();
    }
}

/// The error passes: the next checkpoint puts everything in place, and the file can be written to in every way.
#[test]
fn rule_23_what_was_carried_again_goes_in_place_when_the_block_works_again() {
    for breaks_page in [false, true] {
        let mut store = Store::new(RING);
        store.begin_with_a_bad_block(breaks_page);
        let mut all = std::mem::take(&mut store.good_bytes);
        laps(&store.good, &mut all, 50);
        store.good_bytes = all;
        let left = killed(&store.dev, &store.base);
        let next = mount(&left).unwrap();
        for (dev, fs) in [(&store.dev, &store.fs), (&left, &next)] {
            dev.clear();
            let bad = open(fs, "/bad");
            bad.write_at(3, b"over").unwrap();
            // Over bytes that it was owed: older ones must not follow.
            bad.write_at(152, b"over").unwrap();
            bad.sync().unwrap();
            bad.truncate(160).unwrap();
        }
        store.bad_bytes[3..7].copy_from_slice(b"over");
        store.bad_bytes[152..156].copy_from_slice(b"over");
        store.bad_bytes.truncate(160);
        store.holds(&next, "another mount");
        store.ends(&left, next, "another mount");
        store.holds(&store.fs, "the same mount");
        let (dev, fs) = (store.dev.clone(), store.fs.clone());
        store.close();
        fs.unmount().unwrap();
        drop(fs);
        let base: Arc<dyn BlockDevice> = dev;
        assert_eq!(check(&base).unwrap().worst(), None);
    }
}

/// The file that is concerned is told: what is acknowledged is true, and the rest fails with the device's error.
#[test]
fn rules_21_and_23_the_file_with_the_bad_block_is_told() {
    let mut store = Store::new(4 << 20);
    store.break_blocks(OpKind::Write, store.first_block());
    store.append_to_bad(20);
    let told = |result: Result<(), FsError>, what: &str| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FsError::Io { .. }), "{what}: {text}");
        assert!(text.contains("what the journal has"), "{what}: {text}");
    };
    told(store.bad.truncate(165), "a truncation");
    store.append_to_bad(20);
    // The first block is bad, and nothing before it.
    store.bad.append(&[6; 80_000]).unwrap();
    told(store.bad.sync(), "a sync that is too long");
    store
        .bad
        .truncate(store.bad_bytes.len() as u64)
        .unwrap_err();
    let left = killed(&store.dev, &store.base);
    let next = mount(&left).unwrap();
    store.holds(&next, "what was acknowledged");
    let bad = open(&next, "/bad");
    bad.append(&[6; 80_000]).unwrap();
    told(bad.sync(), "a sync of the next mount that is too long");
    drop(bad);
    next.unlink("/bad").unwrap();
    left.clear();
    next.unmount().unwrap();
    store.dev.clear();
    store.bad.sync().unwrap();
    store.bad_bytes.extend([6; 80_000]);
    store.holds(&store.fs, "when the block works again");
    drop((store.bad, store.good));
    store.fs.unmount().unwrap();
}

/// A block that can be neither read nor written: the bytes are in memory, and after a mount they are in the journal.
#[test]
fn rule_23_a_block_that_cannot_be_read_either() {
    let mut store = Store::new(RING);
    for kind in [OpKind::Write, OpKind::Read] {
        store.break_blocks(kind, store.first_block());
    }
    store.append_to_bad(20);
    let mut all = std::mem::take(&mut store.good_bytes);
    laps(&store.good, &mut all, 100);
    store.good_bytes = all;
    store.holds(&store.fs, "from memory");
    let left = killed(&store.dev, &store.base);
    let next = mount(&left).unwrap();
    let bad = open(&next, "/bad");
    let mut out = [0; 170];
    // The bytes before them in the block are lost as long as it cannot be read.
    let error = bad.read_at(0, &mut out).unwrap_err().to_string();
    assert!(error.contains("injected"), "{error}");
    drop(bad);
    let good = open(&next, "/good");
    let mut all = std::mem::take(&mut store.good_bytes);
    laps(&good, &mut all, 100);
    store.good_bytes = all;
    drop(good);
    left.clear();
    store.ends(&left, next, "it can be read again");
    drop((store.bad, store.good));
    store.fs.unmount_anyway().unwrap_err();
}

/// However full changes make the ring, there is room in it to carry again what cannot be put in place.
#[test]
fn rule_23_a_full_ring_has_room_for_what_cannot_be_put_in_place() {
    let mut store = Store::new(RING);
    store.break_blocks(OpKind::Write, store.first_block());
    store.append_to_bad(5000);
    for n in 0..100 {
        let made = store.fs.mkdir("/d").and_then(|()| store.fs.rmdir("/d"));
        made.unwrap_or_else(|e| panic!("change {n}: {e}"));
    }
    store.dev.clear();
    let fs = store.fs.clone();
    store.holds(&fs, "at the end");
    store.close();
    fs.unmount().unwrap();
    drop(fs);
}

/// A file whose bytes cannot be put in place has its syncs carried until these are half of what is carried again.
#[test]
fn rules_21_and_23_syncs_of_a_file_with_a_bad_block_end_before_the_ring_is_full_of_them() {
    let mut store = Store::new(RING);
    store.break_blocks(OpKind::Write, store.first_block());
    store.append_to_bad(20);
    store.bad.truncate(165).unwrap_err();
    store.append_to_bad(5000);
    store.append_to_bad(5000);
    store.bad.append(&[5; 5000]).unwrap();
    let error = store.bad.sync().unwrap_err().to_string();
    assert!(error.contains("what the journal has"), "{error}");
    let mut all = std::mem::take(&mut store.good_bytes);
    laps(&store.good, &mut all, 100);
    store.good_bytes = all;
    let left = killed(&store.dev, &store.base);
    left.clear();
    let next = mount(&left).unwrap();
    store.holds(&next, "mounted again");
    store.ends(&left, next, "mounted again");
    store.dev.clear();
    store.bad.sync().unwrap();
    let fs = store.fs.clone();
    store.close();
    fs.unmount().unwrap();
}

/// More cannot be put in place than the ring can carry again: changes fail with the device's error, and none waits for ever.
#[test]
fn rule_23_too_much_that_cannot_be_put_in_place_fails_changes_until_it_can() {
    let store = Store::new(RING);
    let files: Vec<File> = (0..30).map(|n| open(&store.fs, &format!("/{n}"))).collect();
    let pages = metadata(&store.fs);
    store.break_blocks(OpKind::Write, pages);
    let fs = store.fs.clone();
    let full = spawn(move || {
        let changes = (0..200).map(|n| fs.mkdir(&format!("/d{n}")));
        let made = changes.take_while(Result::is_ok).count();
        (made, fs.mkdir("/last").unwrap_err().to_string())
    });
    let (made, error) = full.join("changes that fill the ring");
    assert!(made < 20, "{made}");
    assert!(error.contains("injected"), "{error}");
    store.holds(&store.fs, "full");
    let left = killed(&store.dev, &store.base);
    mount(&left).unwrap_err();
    left.clear();
    let next = mount(&left).unwrap();
    store.holds(&next, "mounted again");
    assert!(next.exists(&format!("/d{}", made - 1)).unwrap());
    next.unmount().unwrap();
    store.dev.clear();
    store.fs.mkdir("/last").unwrap();
    drop((files, store.bad, store.good));
    store.fs.unmount().unwrap();
}

/// The next epoch begins when the batch on its way has ended: what that acknowledges is not in an epoch that is over.
#[test]
fn rules_2_and_23_what_is_left_is_carried_when_no_batch_is_on_its_way() {
    let (dev, fs) = with_journal(1 << 20, &MountOptions::default());
    let [bad, good] = ["/bad", "/good"].map(|path| carried(&fs, path));
    dev.inject(fail(OpKind::Write, FOREVER, first_cluster(&fs, &bad)));
    bad.append(b"owed").unwrap();
    bad.sync().unwrap();
    good.append(b"batch").unwrap();
    dev.inject(hang(OpKind::Write, 1, None));
    let sync = {
        let good = good.clone();
        spawn(move || good.sync())
    };
    // The other fault stays.
    wait_for("the batch", || dev.injections().len() == 1);
    let checkpoint = {
        let bad = bad.clone();
        spawn(move || bad.truncate(151))
    };
    assert!(checkpoint.still_waits());
    dev.resume();
    sync.join("the sync").unwrap();
    checkpoint.join("the checkpoint").unwrap_err();
    let base: Arc<dyn BlockDevice> = dev.clone();
    let left = memory_with(&content(&base), 4096);
    let next = FileSystem::mount(left, &MountOptions::default()).unwrap();
    assert!(content_of(&next, "/good").ends_with(b"batch"));
    assert!(content_of(&next, "/bad").ends_with(b"owed"));
    next.unmount().unwrap();
    dev.clear();
    drop((bad, good));
    fs.unmount().unwrap();
}

/// A device with bad blocks whose power was cut.
fn cut_with(device: Device, image: CrashImage, seed: u64, bad: &Injection) -> Arc<ErrorDevice> {
    let dev = ErrorDevice::new(None, Arc::new(device.with(image, seed)));
    dev.inject(bad.clone());
    Arc::new(dev)
}

/// Power cuts anywhere in several laps of the ring beside a bad block, and in the recovery, which has it too.
fn cut_beside(device: Device, breaks_page: bool) -> usize {
    let crash = device.with(formatted(device), 3);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let fs = mount(&dev).unwrap();
    let mut now = State::new();
    let files = ["/bad", "/good"].map(|path| {
        let data = [vec![1; 100], vec![2; 50]].concat();
        let synced = data.len();
        now.insert(path.to_owned(), Promise { data, synced });
        carried(&fs, path)
    });
    let scale = 4096 / u64::from(device.block_size);
    let (lba, page) = (
        block_of(&fs, &files[0], 0),
        files[0].blob_id().0 & 0xffff_ffff,
    );
    let (first, _) = metadata(&fs).unwrap();
    let range = if breaks_page {
        ((first + page) * scale, scale)
    } else {
        (lba, scale)
    };
    let bad = fail(OpKind::Write, FOREVER, Some(range));
    dev.inject(bad.clone());
    let mut history = vec![(crash.len_events(), now.clone())];
    for n in 0..16 {
        // Only a few of them go to the file with the bad block.
        let which = usize::from(n % 6 != 1);
        let more = bytes(n, 30);
        files[which].append(&more).unwrap();
        let promise = now.get_mut(["/bad", "/good"][which]).unwrap();
        promise.data.extend(&more);
        history.push((crash.len_events(), now.clone()));
        files[which].sync().unwrap();
        let promise = now.get_mut(["/bad", "/good"][which]).unwrap();
        promise.synced = promise.data.len();
        history.push((crash.len_events(), now.clone()));
    }
    let begun = history[0].0;
    let mut rng = SmallRng::seed_from_u64(5);
    let mut points = crash.crash_points();
    let mut states = 0;
    while points.advance().is_some() {
        let at = points.position();
        // A device without FUA has twice as many.
        if at < begun || (!device.fua && at.is_multiple_of(2)) {
            continue;
        }
        let done = history.iter().rposition(|(event, _)| *event <= at).unwrap();
        let (old, new) = (
            &history[done].1,
            &history[(done + 1).min(history.len() - 1)].1,
        );
        // Every point once, and a few in every way.
        for round in if at.is_multiple_of(5) { 0..3 } else { 2..3 } {
            let image = points.image(&mut |_| match round {
                0 => false,
                1 => true,
                _ => rng.random_bool(0.5),
            });
            let what = format!("{device:?}, page: {breaks_page}, event {at}, round {round}");
            let seen = cut_again(
                device,
                image,
                &bad,
                [old, new],
                &what,
                at.is_multiple_of(30) && round == 2,
            );
            states += seen;
        }
    }
    states
}

/// Mounts a state with the bad block; if `deep`, cuts the power anywhere in that. Then the block works.
fn cut_again(
    device: Device,
    image: CrashImage,
    bad: &Injection,
    states: [&State; 2],
    what: &str,
    deep: bool,
) -> usize {
    let crash = device.with(image, 4);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    dev.inject(bad.clone());
    let next = mount(&dev).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_one_of(&next, states, what);
    let mut seen = 1;
    let mut points = crash.crash_points();
    while deep && points.advance().is_some() {
        for keep in [false, true] {
            let what = format!("{what}, second cut after event {}", points.position());
            let again = cut_with(device, points.image(&mut |_| keep), 6, bad);
            let fs = mount(&again).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_one_of(&fs, states, &what);
            seen += 1;
        }
    }
    dev.clear();
    next.unmount().unwrap();
    drop(next);
    assert_one_of(&mount(&dev).unwrap(), states, what);
    seen
}

#[test]
fn rules_12_and_23_a_power_cut_anywhere_beside_a_bad_block() {
    for device in DEVICES {
        for breaks_page in [false, true] {
            let states = cut_beside(device, breaks_page);
            println!("{device:?}, page {breaks_page}: {states} states");
        }
    }
}

/// The metadata region grows beside a block of a file that cannot be written, and the power is cut meanwhile.
#[test]
fn rule_23_the_metadata_region_grows_beside_a_bad_block() {
    let device = DEVICES[0];
    let crash = device.with(formatted(device), 3);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let fs = mount(&dev).unwrap();
    let mut now = State::new();
    let file = carried(&fs, "/bad");
    let mut data = [vec![1; 100], vec![2; 50]].concat();
    let bad = fail(OpKind::Write, FOREVER, Some((block_of(&fs, &file, 0), 1)));
    dev.inject(bad.clone());
    file.append(&[3; 20]).unwrap();
    file.sync().unwrap();
    data.extend([3; 20]);
    let synced = data.len();
    now.insert("/bad".to_owned(), Promise { data, synced });
    let pages = || fs.blobstore().super_block().md_len.get();
    let before = pages();
    let mut history = vec![(crash.len_events(), now.clone())];
    let mut after = 0;
    for n in 0.. {
        let path = format!("/n{n:03}");
        open(&fs, &path);
        now.insert(path, Promise::default());
        history.push((crash.len_events(), now.clone()));
        after += usize::from(pages() > before);
        if after > 3 {
            break;
        }
    }
    // The last few changes, of which one has made it grow.
    history.drain(..history.len() - 6);
    let mut points = crash.crash_points();
    let mut states = 0;
    while points.advance().is_some() {
        let at = points.position();
        let Some(done) = history.iter().rposition(|(event, _)| *event <= at) else {
            continue;
        };
        let (old, new) = (
            &history[done].1,
            &history[(done + 1).min(history.len() - 1)].1,
        );
        let image = points.image(&mut |_| at.is_multiple_of(2));
        let what = format!("growth, event {at}");
        states += cut_again(device, image, &bad, [old, new], &what, false);
    }
    assert!(states > 10, "{states}");
    drop(file);
    dev.clear();
    fs.unmount().unwrap();
}
