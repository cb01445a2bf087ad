//! Tests of operations that take several commands.

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{IoOpcode, Status};
use pumice_nvme::{IoErrorKind, Op, SubmitError};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// An operation of eight commands: MDTS is 256 blocks.
fn long_write() -> Op {
    let mut buf = DmaBuf::new(1 << 20).unwrap();
    buf.fill(0x77);
    Op::Write {
        lba: 0,
        data: buf.freeze(),
        fua: false,
    }
}

/// With one slot the commands are sent one after the other. The second fails, and none is sent after it.
#[test]
fn nothing_is_sent_after_a_command_that_failed() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.depth = 1);
    let fault = Fault::Status(Status::WRITE_FAULT.dnr());
    let rule = FaultRule::io(IoOpcode::WRITE, fault);
    rig.soft.faults().add(rule.blocks(256..257));
    let done = one(&rig, &mut q, long_write());
    assert_eq!(kind(&done), IoErrorKind::Media);
    assert_eq!(q.stats().commands, 2);
}

/// The first failure is the one that is told, whatever fails after it.
#[test]
fn the_first_failure_is_told() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.depth = 2);
    for (block, status) in [(0, Status::WRITE_FAULT), (256, Status::INTERNAL)] {
        let rule = FaultRule::io(IoOpcode::WRITE, Fault::Status(status.dnr()));
        rig.soft.faults().add(rule.blocks(block..block + 1));
    }
    let done = one(&rig, &mut q, long_write());
    assert_eq!(status(&done), Some(Status::WRITE_FAULT.dnr()));
    assert_eq!(q.stats().commands, 2);
}

/// No more such operations are accepted than there are slots, so that their memory is bounded.
#[test]
fn as_many_are_accepted_as_there_are_slots() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.depth = 2);
    let mut accepted = 0;
    for tag in 0..6 {
        match q.submit(&rig.ns, tag, long_write()) {
            Ok(()) => accepted += 1,
            Err(SubmitError::Busy(_)) => break,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(accepted, 2);
    assert!(settle(&mut q).iter().all(|done| done.result.is_ok()));
}
