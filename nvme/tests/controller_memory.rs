//! Tests of queues in the controller's memory buffer, which has room for one.

use pumice_nvme::{NvmeError, QueueOptions};
use pumice_nvme_soft::SoftConfig;

use common::*;

mod common;

fn small(change: impl FnOnce(&mut SoftConfig)) -> Rig {
    rig_with(|config, _| {
        config.cmb_len = 4096;
        change(config);
    })
}

fn wish(options: &mut QueueOptions) {
    options.controller_memory = true;
}

/// The next pair gets the room of one that is gone. One for which there is none gets the host's memory.
#[test]
fn room_is_given_back() {
    let _watchdog = watchdog();
    let rig = small(|_| {});
    for _ in 0..3 {
        let mut first = queue(&rig, wish);
        let mut second = queue(&rig, wish);
        assert!(first.in_controller_memory() && !second.in_controller_memory());
        for pair in [&mut first, &mut second] {
            assert!(one(&rig, pair, read(0)).result.is_ok());
        }
    }
}

/// A pair that is refused keeps no room.
#[test]
fn a_refused_pair_keeps_no_room() {
    let _watchdog = watchdog();
    let rig = small(|config| config.queues = 1);
    let holder = queue(&rig, |_| {});
    let mut options = QueueOptions::default().depth(16);
    wish(&mut options);
    let refused = rig.controller.queue_pair(&options).unwrap_err();
    assert!(matches!(refused, NvmeError::NoQueues { .. }), "{refused}");
    drop(holder);
    assert!(queue(&rig, wish).in_controller_memory());
}
