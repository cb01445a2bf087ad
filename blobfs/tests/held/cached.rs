//! Writes that wait in a volatile cache when the device ends them, so that what they are promised with has to flush behind them.

use std::sync::Arc;

use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};

use super::common::read;
use super::task::spawn;
use super::{blob, held_write, store_on};

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
