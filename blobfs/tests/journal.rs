//! Tests of the rules of the journal's protocol: each has the rule's number in its name.
//! `journal_cuts.rs` cuts the power everywhere.

mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::journal::*;
use common::listing;
use flaky::{Flaky, Plan};
use pumice_bdev::{BlockDevice, IoErrorKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, Event};
use pumice_blobfs::blobstore::check::{Severity, check, plan, repair};
use pumice_blobfs::blobstore::format::SuperBlock;
use pumice_blobfs::blobstore::{Blobstore, Error, InitOptions, LoadOptions};

/// The first block and the number of blocks of the ring's file, from the super block.
fn ring_of(device: Device, image: &CrashImage) -> (u64, u64) {
    let mut page = [0; 4096];
    image.read(0, &mut page);
    let number = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let blocks = CLUSTER / u64::from(device.block_size);
    (
        u64::from(number(128)) * blocks,
        u64::from(number(132)) * blocks,
    )
}

/// The writes that the log has from this event on: each with its first block, and the events of
/// its submission and completion.
fn writes(dev: &CrashDevice, from: usize) -> Vec<(u64, usize, usize)> {
    let mut writes: Vec<(u64, u64, usize, usize)> = Vec::new();
    for (event, at) in dev.log().into_iter().zip(0..) {
        match event {
            Event::Submitted(change) if at >= from && change.len_blocks > 0 => {
                writes.push((change.id, change.lba, at, usize::MAX));
            }
            Event::Completed { id } => {
                if let Some(write) = writes.iter_mut().find(|write| write.0 == id) {
                    write.3 = at;
                }
            }
            _ => {}
        }
    }
    writes
        .into_iter()
        .map(|(_, lba, from, to)| (lba, from, to))
        .collect()
}

/// The epoch of the header with the greater turn.
fn epoch(device: Device, image: &CrashImage) -> u64 {
    let start = ring_of(device, image).0 * u64::from(device.block_size);
    let word = |at: u64| {
        let mut bytes = [0; 8];
        image.read(start + at, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    let newer = if word(32) > word(4096 + 32) { 0 } else { 4096 };
    word(newer + 16)
}

/// A store with a blob, in which five changes are in the ring, and nowhere else.
fn five_in_the_ring(device: Device) -> (CrashDevice, Vec<String>) {
    let dev = device.with(device.store(), 7);
    let store = load(&dev);
    make(&store);
    for byte in 0..4 {
        set(&store, byte).unwrap();
    }
    let state = describe(&store);
    drop(store);
    (dev, state)
}

#[test]
fn rules_13_and_14_a_new_epoch_is_durable_before_the_guard_and_that_before_a_batch() {
    for device in DEVICES {
        let dev = device.with(device.store(), 7);
        let (ring, _) = ring_of(device, &dev.image());
        let mut epochs = HashSet::from([epoch(device, &dev.image())]);
        for mount in 0..3 {
            let store = load(&dev);
            let from = dev.len_events();
            assert_eq!(version(&dev.image()), (3, 1));
            if mount == 0 {
                make(&store);
            } else {
                set(&store, mount).unwrap();
            }
            assert_eq!(version(&dev.image()), (GUARDED, 0));
            assert!(epochs.insert(epoch(device, &dev.image())), "an old epoch");
            let writes = writes(&dev, from);
            let header = writes.iter().find(|write| write.0 >= ring).unwrap();
            let guard = writes.iter().find(|write| write.0 == 0).unwrap();
            let batch = writes.iter().rfind(|write| write.0 >= ring).unwrap();
            assert!(header.2 < guard.1 && guard.2 < batch.1, "{writes:?}");
            if mount == 1 {
                // A load that recovers begins an epoch too, and keeps the guard.
                drop(store);
                let store = load(&dev);
                assert!(epochs.insert(epoch(device, &dev.image())), "an old epoch");
                assert_eq!(version(&dev.image()), (GUARDED, 0));
                let from = dev.len_events();
                set(&store, 77).unwrap();
                assert!(self::writes(&dev, from).iter().all(|write| write.0 > ring));
                store.unload().unwrap();
            } else {
                store.unload().unwrap();
            }
        }
    }
}

#[test]
fn rule_14_the_guard_of_an_orderly_unload_goes_last() {
    let device = DEVICES[2];
    let (dev, _) = five_in_the_ring(device);
    let store = load(&dev);
    set(&store, 9).unwrap();
    let last = listing(&store);
    let from = dev.len_events();
    store.unload().unwrap();
    let mut points = dev.crash_points();
    while points.advance().is_some() {
        for all in [false, true] {
            let image = points.image(&mut |_| all);
            if points.position() <= from || version(&image) != (3, 1) {
                continue;
            }
            // Those who do not know the journal find everything in place.
            let blind = without_place(&image);
            let store = load(&device.with(blind, 1));
            assert_eq!(store.journal(), None);
            let found = listing(&store);
            assert!(last.iter().all(|line| found.contains(line)), "{found:?}");
        }
    }
}

/// The image as one that no journal is known of.
fn without_place(image: &CrashImage) -> CrashImage {
    let mut page = [0; 4096];
    image.read(0, &mut page);
    let mut sb = SuperBlock::decode(&page).unwrap();
    sb.reserved[..40].fill(0);
    let mut image = image.clone();
    image.write(0, &sb.encode());
    image
}

#[test]
fn rule_13_a_journal_whose_blob_another_program_has_changed_is_not_used() {
    let device = DEVICES[1];
    let image = device.store();
    let mut first = [0; 4096];
    image.read(0, &mut first);
    let place = SuperBlock::decode(&first).unwrap().reserved[..40].to_vec();
    // It deletes the file with that name, and keeps the reserved bytes.
    let dev = device.with(without_place(&image), 1);
    let store = load(&dev);
    store.delete(nth(&store, 0)).unwrap();
    make(&store);
    store.unload().unwrap();
    let mut image = dev.image();
    image.read(0, &mut first);
    let mut sb = SuperBlock::decode(&first).unwrap();
    sb.reserved[..40].copy_from_slice(&place);
    image.write(0, &sb.encode());
    let dev = device.with(image, 1);
    let store = load(&dev);
    assert_eq!(store.journal(), None);
    set(&store, 9).unwrap();
    assert_eq!(version(&dev.image()), (3, 0));
    store.unload().unwrap();
    assert_eq!(version(&dev.image()), (3, 1));
}

#[test]
fn the_blob_of_the_journal_is_nobody_elses() {
    let dev = DEVICES[0].with(DEVICES[0].store(), 1);
    let store = load(&dev);
    let id = store.journal().unwrap();
    assert_eq!(store.blobs(), []);
    let refused = |result: Result<(), Error>| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("the journal of the store"), "{text}");
    };
    refused(store.open(id).map(drop));
    refused(store.delete(id));
    refused(store.snapshot(id, &[]).map(drop));
    refused(store.set_read_only(id));
    let mut all = store.transaction();
    all.resize(id, 1);
    refused(all.commit().map(drop));
    assert_eq!(dev.len_events(), 0);
    for (bytes, text) in [(4096, "too small"), (3 << 20, "more than half")] {
        let opts = InitOptions::default()
            .cluster_size(u32::try_from(CLUSTER).unwrap())
            .journal(Some(bytes));
        let dev = DEVICES[0].with(CrashImage::zeroed(STORE), 0);
        let error = Blobstore::init(Arc::new(dev), &opts)
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn rules_12_and_24_a_damaged_ring_is_read_and_not_written() {
    let device = DEVICES[1];
    let (dev, state) = five_in_the_ring(device);
    let (ring, blocks) = ring_of(device, &dev.image());
    let block = u64::from(device.block_size);
    // The beginning of the fourth batch. Each of these takes nine blocks.
    let batches: Vec<u64> = writes(&dev, 0)
        .iter()
        .map(|write| write.0)
        .filter(|lba| (ring + 8192 / block..ring + blocks).contains(lba))
        .collect();
    let mut kept = Vec::new();
    for (at, what) in [
        (
            batches[3] * block + 700,
            "batch 4 is not whole, and there is batch 5",
        ),
        (ring * block + 20, "header 0 cannot be used"),
        (ring * block + 4096 + 20, "header 1 cannot be used"),
    ] {
        let mut image = dev.image();
        let mut byte = [0];
        image.read(at, &mut byte);
        image.write(at, &[byte[0] ^ 1]);
        let dev = device.with(image, 1);
        let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
        let error = Blobstore::load(Arc::clone(&as_dyn), &LoadOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Journal { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        let report = check(&as_dyn).unwrap();
        assert_eq!(report.worst(), Some(Severity::Error));
        let read_only = LoadOptions::default().read_only(true);
        let store = Blobstore::load(Arc::clone(&as_dyn), &read_only).unwrap();
        assert!(store.journal_damage().unwrap().contains(what));
        let found: Vec<String> = listing(&store)
            .iter()
            .map(|line| line.replace(" ro=1", " ro=0"))
            .collect();
        drop(store);
        let steps = plan(&as_dyn).unwrap();
        assert!(steps.lines()[0].contains("give up"), "{:?}", steps.lines());
        assert_eq!(dev.len_events(), 0, "{what}: something was written");
        repair(&as_dyn).unwrap();
        assert_eq!(check(&as_dyn).unwrap().worst(), None);
        let store = load(&dev);
        assert_eq!(listing(&store), found);
        kept.push(describe(&store) == state);
        make(&store);
    }
    // The batch and what came behind it are gone, and everything is without the header that counts.
    assert!(!kept[0]);
    assert!(kept[1] != kept[2], "{kept:?}");
}

/// Returns a store that has been changed, and perhaps loaded again, so that the next change begins a
/// use of the ring.
fn used(device: &Arc<Flaky>, again: bool) -> Blobstore {
    let load = || Blobstore::load(device.clone(), &LoadOptions::default()).unwrap();
    let store = load();
    make(&store);
    if !again {
        return store;
    }
    store.unload().unwrap();
    load()
}

/// A write or a flush fails, for a moment or for good, whether the device has done it or not: what
/// has failed has not happened, now and after the next load.
#[test]
fn rules_4_and_5_a_change_whose_batch_fails_was_not_made() {
    let mut failures = 0;
    let counts = [1, 3, 1000].map(|count| [(count, false), (count, true)]);
    for device in DEVICES {
        let made = {
            let store = load(&device.with(device.store(), 7));
            make(&store);
            set(&store, 5).unwrap();
            describe(&store)
        };
        for (count, done) in counts.concat() {
            for from in 0..9 {
                let what = format!("{device:?}, {count} from {from}, done {done}");
                let base = device.with(device.store(), 7);
                let cut = |at, all| {
                    let image = base.image_after(at, &mut |_| all);
                    describe(&load(&device.with(image, 1)))
                };
                let flaky = Flaky::new(Arc::new(base.clone()));
                let store = used(&flaky, from < 5);
                let old = describe(&store);
                let before = base.len_events();
                flaky.arm(Some(Plan {
                    from: if from < 5 { from } else { from - 5 },
                    count,
                    kind: IoErrorKind::Media,
                    done,
                }));
                let result = set(&store, 5);
                flaky.arm(None);
                // Until a change that has failed is taken back, it may be there or not.
                for at in before..base.len_events() {
                    for all in [false, true] {
                        let found = cut(at, all);
                        assert!(found == old || found == made, "{what}, after event {at}");
                    }
                }
                failures += u32::from(result.is_err());
                if !matches!(result, Err(Error::Undecided(_))) {
                    let now = describe(&store);
                    assert_eq!(now == old, result.is_err(), "{what}: {result:?}");
                    let durable = cut(base.len_events(), false);
                    assert_eq!(durable, now, "{what}: {result:?}");
                }
                // The device works again, and so does the store.
                set(&store, 6).unwrap_or_else(|error| panic!("{what}: {error}"));
                let last = describe(&store);
                for all in [false, true] {
                    assert_eq!(cut(base.len_events(), all), last, "{what}");
                }
                store.unload().unwrap();
                drop(store);
                assert_eq!(describe(&load(&base)), last, "{what}");
            }
        }
    }
    assert!(failures > 20, "{failures}");
}

/// A device that holds back the first write to the ring until all threads have come.
#[derive(Debug)]
struct Gathering {
    base: Arc<dyn BlockDevice>,
    ring: u64,
    here: Arc<AtomicUsize>,
    wanted: usize,
}

struct GatheringChannel {
    base: Box<dyn pumice_bdev::IoChannel>,
    ring: u64,
    here: Arc<AtomicUsize>,
    wanted: usize,
}

impl BlockDevice for Gathering {
    fn info(&self) -> &pumice_bdev::DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn pumice_bdev::IoChannel>, pumice_bdev::BdevError> {
        Ok(Box::new(GatheringChannel {
            base: self.base.open_channel()?,
            ring: self.ring,
            here: Arc::clone(&self.here),
            wanted: self.wanted,
        }))
    }
}

impl pumice_bdev::IoChannel for GatheringChannel {
    fn submit(&mut self, tag: u64, op: pumice_bdev::Op) -> Result<(), pumice_bdev::SubmitError> {
        if op.kind() == pumice_bdev::OpKind::Write && op.lba() >= self.ring {
            while (1..self.wanted).contains(&self.here.load(Ordering::SeqCst)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            // The last one has come, but may not have its place among the changes yet.
            if self.here.load(Ordering::SeqCst) == self.wanted {
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        self.base.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<pumice_bdev::Completion>) -> usize {
        self.base.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), pumice_bdev::BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn event_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

#[test]
fn rule_2_one_batch_is_on_its_way_and_the_next_takes_all_that_have_come() {
    const THREADS: usize = 8;
    const EACH: usize = 10;
    for device in DEVICES {
        let base = device.with(device.store(), 7);
        let (ring, blocks) = ring_of(device, &base.image());
        let here = Arc::new(AtomicUsize::new(0));
        let dev = Gathering {
            base: Arc::new(base.clone()),
            ring: ring + 8192 / u64::from(device.block_size),
            here: Arc::clone(&here),
            wanted: THREADS,
        };
        let store = Blobstore::load(Arc::new(dev), &LoadOptions::default()).unwrap();
        for _ in 0..THREADS {
            make(&store);
        }
        let from = base.len_events();
        std::thread::scope(|scope| {
            for id in store.blobs() {
                let (store, here) = (&store, &here);
                scope.spawn(move || {
                    for round in 0..EACH {
                        here.fetch_add(1, Ordering::SeqCst);
                        let mut all = store.transaction();
                        all.set_xattr(id, "v", &[u8::try_from(round).unwrap(); 50]);
                        all.commit().unwrap();
                    }
                });
            }
        });
        let start = ring + 8192 / u64::from(device.block_size);
        let batches: Vec<(u64, usize, usize)> = writes(&base, from)
            .into_iter()
            .filter(|write| (start..ring + blocks).contains(&write.0))
            .collect();
        for pair in batches.windows(2) {
            assert!(
                pair[0].2 < pair[1].1,
                "{device:?}: two batches on their way"
            );
        }
        assert!(
            batches.len() < THREADS * EACH,
            "{device:?}: {} batches",
            batches.len()
        );
        let state = describe(&store);
        let cut = base.image_after(base.len_events(), &mut |_| false);
        assert_eq!(describe(&load(&device.with(cut, 1))), state);
    }
}

// What was the ring may be another blob's next, and must not be read as a ring then.
#[test]
fn rule_13_a_guard_without_a_usable_place_goes_before_any_change() {
    let device = DEVICES[1];
    let (dev, _) = five_in_the_ring(device);
    let mut page = [0; 4096];
    let mut image = dev.image();
    image.read(0, &mut page);
    let mut sb = SuperBlock::decode(&page).unwrap();
    sb.reserved[36] ^= 1;
    image.write(0, &sb.encode());
    let dev = device.with(image, 1);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let error = Blobstore::load(Arc::clone(&as_dyn), &LoadOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Journal { .. }), "{error}");
    let read_only = LoadOptions::default().read_only(true);
    let store = Blobstore::load(Arc::clone(&as_dyn), &read_only).unwrap();
    assert!(store.journal_damage().unwrap().contains("checksum"));
    drop(store);
    assert_eq!(dev.len_events(), 0, "something was written");
    let accepting = LoadOptions::default().accept_journal_damage(true);
    let store = Blobstore::load(Arc::clone(&as_dyn), &accepting).unwrap();
    assert_eq!(store.journal(), None);
    assert_eq!(version(&dev.image()), (3, 0));
    drop(store);
    repair(&as_dyn).unwrap();
    assert_eq!(version(&dev.image()), (3, 1));
    let store = load(&dev);
    assert_eq!(store.journal_damage(), None);
    // Nothing of the place is left, so that there may be another.
    store.add_journal(RING).unwrap();
    store.unload().unwrap();
    drop(store);
    assert!(load(&dev).journal().is_some());
}
