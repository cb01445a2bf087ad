//! Tests of aborts that the caller asks for.

use std::time::{Duration, Instant};

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{IoOpcode, Status};
use pumice_nvme::{IoErrorKind, Op};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// The controller ends the command as aborted, which is a status after which others are sent again.
#[test]
fn an_aborted_command_is_not_sent_again() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let faults = rig.soft.faults();
    faults.add(FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER)));
    q.submit(&rig.ns, 5, read(0)).unwrap();
    let (mut out, start) = (Vec::new(), Instant::now());
    q.poll(&mut out);
    until_struck(&rig, 1);
    assert!(q.abort(5) && !q.abort(6));
    while out.is_empty() {
        q.poll(&mut out);
        assert_eq!(faults.struck(), 1, "sent again");
        assert!(start.elapsed() < PATIENCE, "not aborted");
    }
    assert_eq!((out[0].tag, kind(&out[0])), (5, IoErrorKind::Aborted));
}

/// Two of eight commands are sent, and the controller carries them out. The error names the abort, and not
/// a reset that there was none of.
#[test]
fn what_is_aborted_before_all_of_it_is_sent_says_so() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.depth = 2);
    let buf = DmaBuf::new(1 << 20).unwrap();
    q.submit(&rig.ns, 5, Op::Read { lba: 0, buf }).unwrap();
    assert!(q.abort(5));
    let done = settle(&mut q).pop().unwrap();
    assert_eq!(kind(&done), IoErrorKind::Aborted);
    let text = done.result.unwrap_err().to_string();
    assert!(
        text.contains("as was asked for") && !text.contains("reset"),
        "{text}"
    );
    assert_eq!(q.stats().commands, 2);
}

/// The slot belongs to nobody, or to the next command, when the time of the second attempt has come.
#[test]
fn what_is_aborted_between_two_attempts_is_not_sent_again() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    // The status names the first retry delay, a tenth of a second (Base section 3.3.3.2.1, CRD).
    let later = Fault::Status(Status(Status::INTERNAL.0 | 1 << 11));
    let rule = FaultRule::io(IoOpcode::READ, later);
    rig.soft.faults().add(rule.times(1));
    q.submit(&rig.ns, 5, read(0)).unwrap();
    let mut out = Vec::new();
    while q.stats().completions == 0 {
        q.poll(&mut out);
    }
    let ended = Instant::now();
    assert!(out.is_empty() && q.abort(5));
    let done = settle(&mut q).pop().unwrap();
    assert_eq!((done.tag, kind(&done)), (5, IoErrorKind::Aborted));
    while ended.elapsed() < Duration::from_millis(300) {
        q.poll(&mut out);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(q.stats().commands, 1, "sent again");
    assert!(one(&rig, &mut q, read(0)).result.is_ok());
}

/// The controller takes four aborts at a time. One that has ended makes room for another.
#[test]
fn aborts_that_have_ended_make_room_for_others() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let rule = FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER));
    rig.soft.faults().add(rule);
    for n in 1..=12 {
        q.submit(&rig.ns, n, read(0)).unwrap();
        let (mut out, start) = (Vec::new(), Instant::now());
        q.poll(&mut out);
        until_struck(&rig, n);
        assert!(q.abort(n));
        while q.poll(&mut out) == 0 {
            let limit = Duration::from_secs(20);
            assert!(start.elapsed() < limit, "abort {n} was not sent");
            std::thread::yield_now();
        }
        assert_eq!(kind(&out[0]), IoErrorKind::Aborted);
    }
    assert_eq!(q.stats().resets, 0);
}
