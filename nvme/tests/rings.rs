//! Tests of the rings over many passes and resets, and of completions that name the wrong command.

use std::time::{Duration, Instant};

use pumice_nvme::controller::Phase;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{AdminOpcode, IoOpcode, Status};
use pumice_nvme::{Completion, IoErrorKind, Op, QueuePair};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// Makes a successful completion of queue 1 for this command, as the device would write it.
fn completion(cid: u16, sq_head: u16) -> Fault {
    Fault::Raw([0, u64::from(sq_head) | 1 << 16 | u64::from(cid) << 32])
}

fn data(done: &Completion) -> &DmaBuf {
    match &done.op {
        Op::Read { buf, .. } => buf,
        other => panic!("{other:?}"),
    }
}

fn read_all(rig: &Rig, q: &mut QueuePair, count: usize, byte: u8) {
    for _ in 0..count {
        let done = one(rig, q, read(3));
        assert!(done.result.is_ok(), "{:?}", done.result);
        assert!(data(&done).iter().all(|b| *b == byte));
    }
}

/// Both rings wrap many times, at every length, with and without shadow doorbells.
#[test]
fn rings_come_round() {
    let _watchdog = watchdog();
    for shadow in [true, false] {
        for depth in [1, 2, 3, 5, 16] {
            let rig = rig_with(|config, _| config.shadow_doorbells = shadow);
            let mut q = queue(&rig, |options| options.depth = depth);
            assert!(one(&rig, &mut q, write(3, 0x77)).result.is_ok());
            read_all(&rig, &mut q, 150, 0x77);
            assert_eq!(rig.controller.generation(), 1, "depth {depth}: a reset");
        }
    }
}

/// Wherever in its pass a reset meets a ring, the ring starts at its beginning again.
#[test]
fn a_reset_starts_the_rings_over() {
    let _watchdog = watchdog();
    for commands in [1, 15, 33, 40, 65] {
        let rig = rig();
        let mut q = queue(&rig, |_| {});
        assert!(one(&rig, &mut q, write(3, 0x77)).result.is_ok());
        for resets in 1..=4 {
            read_all(&rig, &mut q, commands, 0x77);
            rig.controller.reset().unwrap();
            read_all(&rig, &mut q, commands, 0x77);
            assert_eq!(q.stats().resets, resets, "{commands} commands");
            assert_eq!(rig.controller.generation(), resets + 1);
        }
    }
}

/// A command that is sent again is another command: a completion of the first attempt, however
/// late, is not taken for the second's.
#[test]
fn a_second_attempt_has_a_name_of_its_own() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    assert!(one(&rig, &mut q, write(3, 0x77)).result.is_ok());
    let reads = || FaultRule::io(IoOpcode::READ, Fault::Drop).times(1);
    // This is the slot's second command: there are 16 slots, so its identifier is 16.
    let again = Fault::Status(Status::INTERNAL);
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::READ, again).times(1));
    rig.soft.faults().add(reads());
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::READ, completion(16, 0)).times(1));
    let blank = || Op::Read {
        lba: 3,
        buf: DmaBuf::zeroed(512).unwrap(),
    };
    let mut out = Vec::new();
    q.submit(&rig.ns, 1, blank()).unwrap();
    // The controller drops the second attempt.
    while rig.soft.faults().struck() < 2 {
        q.poll(&mut out);
    }
    assert!(out.is_empty());
    q.submit(&rig.ns, 2, blank()).unwrap();
    q.poll(&mut out);
    let with_data = |done: &Completion| data(done).iter().all(|b| *b == 0x77);
    while q.in_flight() > 0 {
        let before = out.len();
        q.poll(&mut out);
        for done in &out[before..] {
            assert!(with_data(done), "I/O {} ended without its data", done.tag);
        }
    }
    assert!(out.len() == 2 && out.iter().all(|done| done.result.is_ok()));
    assert_eq!(q.stats().resets, 1);
}

/// A completion's submission queue head is checked as well.
#[test]
fn a_queue_head_behind_the_end_means_a_reset() {
    let _watchdog = watchdog();
    for head in [17, 18, u16::MAX] {
        let rig = rig();
        let mut q = queue(&rig, |_| {});
        let rule = FaultRule::io(IoOpcode::READ, completion(0, head));
        rig.soft.faults().add(rule.times(1));
        assert!(one(&rig, &mut q, read(3)).result.is_ok());
        assert_eq!(q.stats().resets, 1, "head {head}");
    }
}

/// Submits a write that the controller completes, and one behind it that it drops, and waits until
/// it has done so. The completion is not taken.
fn completed_and_dropped(rig: &Rig) -> QueuePair {
    let mut q = queue(rig, |options| options.max_retries = 0);
    let dropped = FaultRule::io(IoOpcode::WRITE, Fault::Drop);
    rig.soft.faults().add(dropped.blocks(9..10).times(1));
    for lba in [8, 9] {
        q.submit(&rig.ns, lba, write(lba, 1)).unwrap();
    }
    // This rings the doorbell and takes nothing.
    q.wait(Duration::ZERO).unwrap();
    until_struck(rig, 1);
    q
}

/// Checks that what the controller had completed before the resets is done, and not sent again.
fn is_done_after(resets: impl FnOnce(&Rig)) {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = completed_and_dropped(&rig);
    resets(&rig);
    for done in settle(&mut q) {
        match done.tag {
            8 => assert!(done.result.is_ok(), "{:?}", done.result),
            _ => assert_eq!(kind(&done), IoErrorKind::Aborted),
        }
    }
    assert_eq!(q.stats().commands, 2);
    read_all(&rig, &mut q, 40, 0);
}

#[test]
fn what_was_completed_before_a_reset_is_done() {
    is_done_after(|rig| rig.controller.reset().unwrap());
}

/// The owner of the queue pair does not look between them.
#[test]
fn what_was_completed_before_several_resets_is_done() {
    for count in [2, 3] {
        is_done_after(|rig| {
            for _ in 0..count {
                rig.controller.reset().unwrap();
            }
        });
    }
}

/// The first attempt of the reset comes as far as the completion queue.
#[test]
fn what_was_completed_before_a_reset_in_two_attempts_is_done() {
    is_done_after(|rig| {
        let refused = Fault::Status(Status::INTERNAL.dnr());
        let rule = FaultRule::admin(AdminOpcode::CREATE_CQ, refused);
        rig.soft.faults().add(rule.times(1));
        rig.controller.reset().unwrap();
    });
}

/// The same before a removal.
#[test]
fn what_was_completed_before_a_removal_is_done() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = completed_and_dropped(&rig);
    rig.soft.unplug();
    let start = Instant::now();
    while rig.controller.phase() != Phase::Removed {
        assert!(start.elapsed() < PATIENCE, "the removal is not noticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    for done in settle(&mut q) {
        match done.tag {
            8 => assert!(done.result.is_ok(), "{:?}", done.result),
            _ => assert_eq!(kind(&done), IoErrorKind::Removed),
        }
    }
}

/// A queue begins with its own commands, wherever the doorbells of an earlier one of its number were left.
#[test]
fn a_queue_does_not_begin_where_its_predecessor_ended() {
    let _watchdog = watchdog();
    for shadow in [true, false] {
        let rig = rig_with(|config, _| config.shadow_doorbells = shadow);
        for commands in [5, 3, 4] {
            let mut q = queue(&rig, |options| options.max_retries = 0);
            assert_eq!(q.qid(), 1);
            read_all(&rig, &mut q, commands, 0);
            assert_eq!(q.stats().commands, commands as u64);
        }
        assert_eq!(rig.controller.generation(), 1, "a reset");
    }
}
