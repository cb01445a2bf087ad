//! Writes that wait in a volatile cache when the device ends them, so that what they are promised with has to flush behind them.

use std::sync::Arc;

use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{Failure, Injection};
use pumice_bdev_testkit::crashsim::{Action, CrashDevice, CrashImage, CrashOptions, Event};
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};

use super::common::read;
use super::task::{spawn, wait_for};
use super::{blob, hang, held_write, store_on};

/// A snapshot waits for what is in flight. The device has that in its cache then.
#[test]
fn a_snapshot_makes_durable_what_it_has_waited_for() {
    let base = CrashDevice::new(4096, 2048, true, 1);
    let (dev, store) = store_on(Arc::new(base.clone()));
    let blob = blob(&store, 4, false);
    let writer = held_write(&dev, &blob, 2);
    let (other, id) = (store.clone(), blob.id());
    let task = spawn(move || other.snapshot(id, &[]));
    assert!(task.still_waits(), "a snapshot waits for a write in flight");
    dev.resume();
    writer.join("the write");
    let snapshot = task.join("the snapshot").unwrap();
    let image = base.image_after(base.len_events(), &mut |_| false);
    let left = CrashDevice::from_image(4096, image, true, 1);
    let after = Blobstore::load(Arc::new(left), &LoadOptions::default()).unwrap();
    let snapshot = after.open(snapshot).unwrap();
    assert_eq!(read(&snapshot, 0, 4096), [2; 4096]);
}

/// A flush that fails while a page is on its way may have lost it, so that the page is written once more.
#[test]
fn a_page_is_written_again_behind_a_flush_that_has_failed_beside_it() {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(true)
        .fua(false);
    let base = CrashDevice::with_options(&options, CrashImage::zeroed(8 << 20));
    let (dev, store) = store_on(Arc::new(base.clone()));
    let id = blob(&store, 1, false).id();
    let writes = || {
        let of_page = |event: &Event| match event {
            Event::Submitted(change) => matches!(change.action, Action::Write(_)),
            _ => false,
        };
        base.log().into_iter().filter(of_page).count()
    };
    let before = writes();
    hang(&dev, OpKind::Write, None);
    let other = store.clone();
    let change = spawn(move || {
        let mut change = other.transaction();
        change.set_xattr(id, "x", b"new");
        change.commit().map(drop)
    });
    wait_for("the page is held back", || dev.injections().is_empty());
    dev.inject(Injection::new(Failure::Fail).op(Some(OpKind::Flush)));
    store.flush().unwrap_err();
    dev.resume();
    change.join("the change").unwrap();
    assert_eq!(writes() - before, 2);
}
