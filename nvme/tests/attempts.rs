//! Tests of further attempts of a command.

use std::time::{Duration, Instant};

use pumice_nvme::Op;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{IoOpcode, Status};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// A slot whose last command has used up its attempts has all of them for the next one, of whichever kind.
#[test]
fn each_command_has_all_of_its_attempts() {
    let _watchdog = watchdog();
    let long = || Op::Read {
        lba: 0,
        buf: DmaBuf::new(1 << 20).unwrap(),
    };
    let kinds: [&dyn Fn() -> Op; 3] = [&|| read(0), &|| Op::Flush, &long];
    for (n, kind) in kinds.iter().enumerate() {
        let rig = rig();
        let mut q = queue(&rig, |options| {
            options.depth = 1;
            options.max_retries = 1;
        });
        let faults = |times| {
            let fault = Fault::Status(Status::INTERNAL);
            rig.soft.faults().add(FaultRule::any_io(fault).times(times));
        };
        faults(2);
        assert!(one(&rig, &mut q, read(0)).result.is_err());
        faults(1);
        let done = one(&rig, &mut q, kind());
        assert!(done.result.is_ok(), "{n}: {:?}", done.result);
    }
}

/// Blocks that differ do so the next time too.
#[test]
fn a_comparison_that_fails_is_not_repeated() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let mut buf = DmaBuf::new(512).unwrap();
    buf.fill(1);
    let data = buf.freeze();
    let done = one(&rig, &mut q, Op::Compare { lba: 0, data });
    assert_eq!(status(&done), Some(Status::COMPARE_FAILURE));
    assert_eq!((q.stats().retries, q.stats().commands), (0, 1));
}

/// A status may name one of three delays that the controller has given (CRD, CRDT).
#[test]
fn the_delay_that_a_status_names_is_kept() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    // The soft controller's delays are 100, 500 and 1000 ms.
    for (crd, delay_ms) in [(1u16, 100), (2, 500), (3, 1000)] {
        let fault = Fault::Status(Status(Status::INTERNAL.0 | crd << 11));
        let rule = FaultRule::io(IoOpcode::READ, fault);
        rig.soft.faults().add(rule.times(1));
        let start = Instant::now();
        assert!(one(&rig, &mut q, read(0)).result.is_ok());
        assert!(start.elapsed() >= Duration::from_millis(delay_ms), "{crd}");
    }
    assert_eq!(q.stats().retries, 3);
}
