//! What happens beside a sync that the journal carries. Each test names the rules of the protocol that it is about.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
mod task;

use common::faults::{all, fail};
use held::*;
use pumice_bdev::OpKind;
use pumice_blobfs::fs::MountOptions;
use task::spawn;

/// A failed append may have damaged the block of the file's end, also after a carried sync has begun.
#[test]
fn rule_20_a_block_that_a_failed_append_may_have_damaged_is_written_again() {
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = 1 << 20;
    let (dev, fs) = with_journal(4 << 20, &opts);
    let f = carried(&fs, "/log");
    f.allocate(0, 4 << 20).unwrap();
    f.append(&[3; 60]).unwrap();
    let behind = block_of(&fs, &f, 1);
    let sync = begin_sync(&dev, &f);
    let g = f.clone();
    // It waits for the sync with its first full buffer.
    let append = spawn(move || g.append(&vec![4; 3_500_000]));
    let waits = append.still_waits();
    dev.inject(fail(OpKind::Write, 1000, Some((behind, 1000))));
    dev.resume();
    sync.join("the sync").unwrap();
    append.join("the append").unwrap_err();
    assert!(waits);
    dev.clear();
    assert_eq!(f.len(), 210);
    let before = fs.io_stats();
    f.sync().unwrap();
    let sent = fs.io_stats().since(&before);
    assert_eq!(sent.writes, 1, "{sent:?}");
    assert!(all(&f) == [vec![1; 100], vec![2; 50], vec![3; 60]].concat());
    drop(f);
    fs.unmount().unwrap();
}
