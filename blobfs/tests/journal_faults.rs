//! Tests of the journal on a device that fails, or that has one channel: the next change and the
//! unload behind a failure keep the rules.

mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::faults::{fail, hang};
use common::journal::*;
use flaky::{Flaky, Plan};
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, Error, LoadOptions};

/// The first change of a use of the ring fails. The change of the super block behind it must not
/// take away the guard, without which the next change would be read by nobody.
#[test]
fn rule_14_a_change_of_the_super_block_keeps_the_guard() {
    for device in DEVICES {
        for from in 0..6 {
            let what = format!("{device:?}, from {from}");
            let base = device.with(device.store(), 7);
            let store = load(&base);
            make(&store);
            store.unload().unwrap();
            drop(store);
            let flaky = Flaky::new(Arc::new(base.clone()));
            let store = Blobstore::load(flaky.clone(), &LoadOptions::default()).unwrap();
            flaky.arm(Some(Plan {
                from,
                count: 3,
                kind: IoErrorKind::Media,
                done: false,
            }));
            // Whether it fails depends on the device: some failures are made good.
            let _ = set(&store, 5);
            flaky.arm(None);
            store.set_super_blob(Some(nth(&store, 0))).unwrap();
            assert_eq!(version(&base.image()), (GUARDED, 0), "{what}");
            set(&store, 6).unwrap();
            let last = describe(&store);
            for all in [false, true] {
                let cut = base.image_after(base.len_events(), &mut |_| all);
                assert_eq!(describe(&load(&device.with(cut, 1))), last, "{what}");
            }
            store.unload().unwrap();
            drop(store);
            assert_eq!(describe(&load(&base)), last, "{what}");
        }
    }
}

/// An unload fails at each of its writes, which the device has done or not. Then the next change begins another use of the
/// ring: one of the super block, or an ordinary one, which needs the guard.
#[test]
fn rule_14_a_store_whose_unload_has_failed_takes_changes() {
    for (device, done) in DEVICES.into_iter().flat_map(|d| [(d, false), (d, true)]) {
        let mut failed = 0;
        loop {
            let what = format!("{device:?}, from {failed}, done {done}");
            let base = device.with(device.store(), 7);
            let flaky = Flaky::new(Arc::new(base.clone()));
            let store = Blobstore::load(flaky.clone(), &LoadOptions::default()).unwrap();
            make(&store);
            flaky.arm(Some(Plan {
                from: failed,
                count: 1000,
                kind: IoErrorKind::Media,
                done,
            }));
            let result = store.unload();
            flaky.arm(None);
            if result.is_ok() {
                break;
            }
            failed += 1;
            if !done {
                store.set_super_blob(Some(nth(&store, 0))).unwrap();
            }
            set(&store, 6).unwrap_or_else(|error| panic!("{what}: {error}"));
            let last = describe(&store);
            let cut = base.image_after(base.len_events(), &mut |_| false);
            assert_eq!(describe(&load(&device.with(cut, 1))), last, "{what}");
            store.unload().unwrap();
            drop(store);
            assert_eq!(describe(&load(&base)), last, "{what}");
        }
        // Pages, a header, masks and the mark.
        assert!(failed > 4, "{device:?}: {failed}");
    }
}

#[test]
fn rule_7_a_store_whose_checkpoint_may_still_land_is_not_unloaded_in_order() {
    let device = DEVICES[0];
    let base = device.with(device.store(), 7);
    let flaky = Flaky::new(Arc::new(base.clone()));
    let store = Blobstore::load(flaky.clone(), &LoadOptions::default()).unwrap();
    make(&store);
    let state = describe(&store);
    flaky.arm(Some(Plan {
        from: 0,
        count: 1,
        kind: IoErrorKind::TimedOut,
        done: false,
    }));
    assert!(matches!(store.unload(), Err(Error::Owed(_))));
    flaky.arm(None);
    assert!(matches!(set(&store, 6), Err(Error::Stopped(_))));
    assert!(matches!(store.unload(), Err(Error::Stopped(_))));
    drop(store);
    assert_eq!(version(&base.image()), (GUARDED, 0));
    assert_eq!(describe(&load(&base)), state);
}

/// The mark of an orderly unload may land behind a later change, so there is none.
#[test]
fn a_store_whose_mark_may_still_land_takes_no_changes() {
    let device = DEVICES[0];
    let base = device.with(device.store(), 7);
    let flaky = Flaky::new(Arc::new(base.clone()));
    let mut writes = 0;
    // The mark is the last write of an unload.
    for kind in [None, Some(IoErrorKind::TimedOut)] {
        let store = Blobstore::load(flaky.clone(), &LoadOptions::default()).unwrap();
        make(&store);
        let from = match kind {
            None => u64::MAX,
            Some(_) => writes - 1,
        };
        flaky.arm(Some(Plan {
            from,
            count: 1,
            kind: kind.unwrap_or(IoErrorKind::Media),
            done: false,
        }));
        let result = store.unload();
        writes = flaky.seen();
        flaky.arm(None);
        if kind.is_none() {
            result.unwrap();
            continue;
        }
        assert!(matches!(result, Err(Error::Io(_))), "{result:?}");
        assert_eq!(version(&base.image()), (GUARDED, 0));
        assert!(matches!(set(&store, 6), Err(Error::Stopped(_))));
        assert!(matches!(store.unload(), Err(Error::Stopped(_))));
    }
}

/// A device with one channel, each of whose writes takes a moment.
#[derive(Debug)]
struct Narrow {
    base: Arc<dyn BlockDevice>,
    opened: AtomicUsize,
}

impl BlockDevice for Narrow {
    fn info(&self) -> &pumice_bdev::DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn pumice_bdev::IoChannel>, pumice_bdev::BdevError> {
        if self.opened.fetch_add(1, Ordering::SeqCst) > 0 {
            return Err(pumice_bdev::BdevError::Os {
                device: self.base.info().name.clone(),
                what: "channel".to_owned(),
                source: std::io::Error::from_raw_os_error(24),
            });
        }
        Ok(Box::new(NarrowChannel(self.base.open_channel()?)))
    }
}

struct NarrowChannel(Box<dyn pumice_bdev::IoChannel>);

impl pumice_bdev::IoChannel for NarrowChannel {
    fn submit(&mut self, tag: u64, op: pumice_bdev::Op) -> Result<(), pumice_bdev::SubmitError> {
        std::thread::sleep(Duration::from_micros(500));
        self.0.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<pumice_bdev::Completion>) -> usize {
        self.0.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), pumice_bdev::BdevError> {
        self.0.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

/// A checkpoint in the background needs the channel that the unload has.
#[test]
fn rule_7_an_unload_waits_for_a_checkpoint_without_holding_the_only_channel() {
    let device = DEVICES[0];
    let unloads = task::spawn(move || {
        for _ in 0..5 {
            let base = device.with(device.store(), 7);
            let dev = Narrow {
                base: Arc::new(base.clone()),
                opened: AtomicUsize::new(0),
            };
            let store = Blobstore::load(Arc::new(dev), &LoadOptions::default()).unwrap();
            make(&store);
            // Each takes two of thirty blocks, so a checkpoint begins with the last.
            for byte in 0..3 {
                set(&store, byte).unwrap();
            }
            store.unload().unwrap();
            assert_eq!(version(&base.image()), (3, 1));
        }
    });
    unloads.join("the unload");
}

/// The blocks of the ring's file (docs/format.md).
fn journal_blocks(dev: &CrashDevice) -> (u64, u64) {
    let mut page = [0; 4096];
    dev.image().read(0, &mut page);
    let cluster = u32::from_le_bytes(page[128..132].try_into().unwrap());
    (u64::from(cluster) * CLUSTER / 4096, RING / 4096)
}

/// A batch fails, and what would make it void fails too, so that it may be on the device. A change that waits behind it is not
/// acknowledged. Returns false if that one came so late that the doubt was resolved.
fn fails_behind_a_batch_in_doubt() -> bool {
    let device = DEVICES[0];
    let crash = device.with(device.store(), 7);
    let fails = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let hangs = Arc::new(ErrorDevice::new(None, fails.clone()));
    let store = Blobstore::load(hangs.clone(), &LoadOptions::default()).unwrap();
    make(&store);
    make(&store);
    hangs.inject(hang(OpKind::Write, 1, None));
    let change = |n: usize| {
        let store = store.clone();
        task::spawn(move || {
            let blob = store.open(nth(&store, n)).unwrap();
            let mut all = store.transaction();
            all.set_xattr(&blob, "v", &[9; 100]);
            all.commit().map(drop)
        })
    };
    let first = change(0);
    task::wait_for("the batch", || hangs.injections().is_empty());
    let second = change(1);
    assert!(second.still_waits());
    // The batch and each of the two headers, three times.
    fails.inject(fail(OpKind::Write, 9, Some(journal_blocks(&crash))));
    hangs.resume();
    first.join("the first change").unwrap_err();
    let refused = second.join("the second change").is_err();
    assert_eq!(fails.injections(), []);
    set(&store, 6).unwrap();
    let last = describe(&store);
    let cut = crash.image_after(crash.len_events(), &mut |_| true);
    assert_eq!(describe(&load(&device.with(cut, 1))), last);
    store.unload().unwrap();
    refused
}

#[test]
fn rule_5_a_change_behind_a_batch_in_doubt_is_not_made() {
    assert!((0..20).any(|_| fails_behind_a_batch_in_doubt()));
}

/// A page of a large change, which goes in place, is none that the ring has again: a recovery would put the older one there.
#[test]
fn rules_6_and_23_a_large_change_writes_over_nothing_that_is_carried_again() {
    let device = DEVICES[0];
    let crash = device.with(device.store(), 7);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    let with_xattrs = |count: u8| {
        CreateOptions::default().num_clusters(1).xattrs(
            (0..count)
                .map(|n| (format!("x{n}"), vec![n; 3000]))
                .collect(),
        )
    };
    let gone = store.create(&with_xattrs(2)).unwrap();
    store.delete(gone).unwrap();
    // Its three pages, each once with the others and three times by itself, and again when no batch is on its way.
    let sb = store.super_block();
    let pages = (sb.md_start.get().into(), sb.md_len.get().into());
    dev.inject(fail(OpKind::Write, 24, Some(pages)));
    let error = store.create(&with_xattrs(12)).unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error}");
    assert_eq!(dev.injections().len(), 0);
    let state = describe(&store);
    let cut = crash.image_after(crash.len_events(), &mut |_| true);
    assert_eq!(describe(&load(&device.with(cut, 1))), state);
    store.create(&with_xattrs(12)).unwrap();
    let state = describe(&store);
    let cut = crash.image_after(crash.len_events(), &mut |_| true);
    assert_eq!(describe(&load(&device.with(cut, 1))), state);
    store.unload().unwrap();
}

/// A change of the super block may put the pages elsewhere, so it fails while the ring has some.
#[test]
fn rules_6_and_23_the_super_block_is_not_changed_while_the_ring_has_pages() {
    let device = DEVICES[0];
    let crash = device.with(device.store(), 7);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    let id = store.create(&CreateOptions::default()).unwrap();
    let sb = store.super_block();
    let pages = (sb.md_start.get().into(), sb.md_len.get().into());
    dev.inject(fail(OpKind::Write, u64::MAX, Some(pages)));
    let error = store.set_super_blob(Some(id)).unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error}");
    assert_eq!(store.super_blob(), None);
    let state = describe(&store);
    let cut = crash.image_after(crash.len_events(), &mut |_| true);
    assert_eq!(describe(&load(&device.with(cut, 1))), state);
    dev.clear();
    store.set_super_blob(Some(id)).unwrap();
    store.unload().unwrap();
}
