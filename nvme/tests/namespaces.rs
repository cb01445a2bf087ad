//! Tests of namespaces over resets, rescans and transient errors: handles stay valid while the
//! namespace is unchanged, are valid again when it comes back, and never refer to another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pumice_nvme::controller::Phase;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{AdminOpcode, Cns, Command, FormatNvm, Status};
use pumice_nvme::{IoErrorKind, NvmeError, Op, QueuePair, SubmitError};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// Whether the namespace has become another one.
fn is_stale(e: &SubmitError) -> bool {
    e.to_string()
        .contains("namespace 1 is not this controller's")
}

fn refused(rig: &Rig, q: &mut QueuePair) -> bool {
    q.submit(&rig.ns, 1, write(0, 1))
        .is_err_and(|e| is_stale(&e))
}

/// The driver waits for a transient state to pass; the keeper finds out about the others later.
#[test]
fn a_namespace_that_is_not_ready_comes_back() {
    let _watchdog = watchdog();
    for (status, times) in [
        (Status::NAMESPACE_NOT_READY, 1),
        (Status::NAMESPACE_NOT_READY, 9),
        (Status::INTERNAL, 3),
        // The fault applies more often than the command is tried, and has Do Not Retry.
        (Status::INTERNAL, 40),
        (Status::INTERNAL.dnr(), 1),
    ] {
        for again in [true, false] {
            let rig = rig();
            let mut q = queue(&rig, |_| {});
            let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Status(status));
            rig.soft.faults().add(rule.namespace(1).times(times));
            if again {
                rig.controller.reset().unwrap();
            } else {
                rig.controller.rescan().unwrap();
            }
            let start = Instant::now();
            while refused(&rig, &mut q) {
                assert!(start.elapsed() < PATIENCE, "{status:?} {times}");
                if status.do_not_retry() {
                    rig.controller.rescan().unwrap();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            settle(&mut q);
            assert!(one(&rig, &mut q, read(0)).result.is_ok());
        }
    }
}

fn identify_page(rig: &Rig, cns: Cns) -> Vec<u8> {
    let page = DmaBuf::zeroed(4096).unwrap();
    let (_, page) = rig
        .controller
        .admin_command(Command::identify(cns, 1), Some(page))
        .unwrap();
    page.unwrap().to_vec()
}

/// Another namespace takes the identifier. Each field of its identity is enough to notice it.
#[test]
fn another_namespace_of_the_number_is_not_written_to() {
    let _watchdog = watchdog();
    for (cns, at) in [
        // The fields are NGUID, EUI-64, and the UUID among the descriptors.
        (Cns::NAMESPACE, 104),
        (Cns::NAMESPACE, 120),
        (Cns::NS_DESCRIPTORS, 4 + 15),
    ] {
        let rig = rig();
        let mut q = queue(&rig, |_| {});
        assert!(one(&rig, &mut q, write(0, 1)).result.is_ok());
        let mut page = identify_page(&rig, cns);
        page[at] ^= 0xff;
        // The fault applies only to this kind of page: the first command of a rescan for namespace
        // 1 identifies it, the second asks for its descriptors.
        let skip = u64::from(cns == Cns::NS_DESCRIPTORS);
        let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(page));
        rig.soft
            .faults()
            .add(rule.namespace(1).after(skip).times(1));
        rig.controller.rescan().unwrap();
        assert!(refused(&rig, &mut q), "{cns:?} {at}");
        let now = rig.controller.namespace(1).unwrap();
        q.submit(&now, 1, read(0)).unwrap();
        settle(&mut q);
        // The namespace of the handle comes back.
        rig.soft.faults().clear();
        rig.controller.rescan().unwrap();
        assert!(q.submit(&now, 1, read(0)).is_err());
    }
}

/// Makes the next look at namespace 1 find another namespace of that number.
fn replace_namespace(rig: &Rig) {
    let mut page = identify_page(rig, Cns::NAMESPACE);
    page[104] ^= 0xff;
    let another = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(page));
    rig.soft.faults().add(another.namespace(1).times(1));
}

/// Another namespace takes the identifier while commands wait to be sent again after a reset: none
/// of them reaches it.
#[test]
fn no_command_is_sent_again_to_another_namespace_of_the_number() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.max_retries = 8);
    replace_namespace(&rig);
    let dropped = FaultRule::any_io(Fault::Drop).times(3);
    rig.soft.faults().add(dropped);
    for (tag, op) in [(1, write(8, 7)), (2, Op::Flush), (3, read(8))] {
        q.submit(&rig.ns, tag, op).unwrap();
    }
    q.poll(&mut Vec::new());
    until_struck(&rig, 3);
    rig.controller.reset().unwrap();
    for done in settle(&mut q) {
        assert_eq!(kind(&done), IoErrorKind::Removed, "{:?}", done.result);
    }
    assert_eq!(q.stats().commands, 3, "one was sent after the reset");
}

/// The same while parts of an I/O wait for room.
#[test]
fn no_part_is_sent_to_another_namespace_of_the_number() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |options| options.depth = 2);
    replace_namespace(&rig);
    let mut buf = DmaBuf::new(1 << 20).unwrap();
    buf.fill(7);
    let (lba, data, fua) = (8, buf.freeze(), false);
    // Two parts have slots, and the others wait for them.
    q.submit(&rig.ns, 1, Op::Write { lba, data, fua }).unwrap();
    // This rings the doorbell and takes nothing.
    q.wait(Duration::ZERO).unwrap();
    rig.controller.rescan().unwrap();
    let done = settle(&mut q).pop().unwrap();
    assert_eq!(kind(&done), IoErrorKind::Removed, "{:?}", done.result);
    assert_eq!(q.stats().commands, 2, "one was sent after the rescan");
}

/// The size of a namespace that has no name tells whether it is the earlier one.
#[test]
fn a_namespace_without_a_name_is_known_by_its_size() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    // NGUID and EUI-64 are not set, and the only descriptor is that of the command set.
    let mut page = identify_page(&rig, Cns::NAMESPACE);
    page[104..128].fill(0);
    let mut descriptors = vec![0; 4096];
    descriptors[..2].copy_from_slice(&[4, 1]);
    let rescan = |page: &[u8]| {
        for answer in [page, &descriptors[..]] {
            let fault = Fault::Data(answer.to_vec());
            let rule = FaultRule::admin(AdminOpcode::IDENTIFY, fault);
            rig.soft.faults().add(rule.namespace(1).times(1));
        }
        rig.controller.rescan().unwrap();
    };
    rescan(&page);
    let ns = rig.controller.namespace(1).unwrap();
    rescan(&page);
    q.submit(&ns, 1, write(0, 1)).unwrap();
    assert!(settle(&mut q)[0].result.is_ok());
    // Another one of the same number has half the size.
    let blocks = u64::from_le_bytes(page[..8].try_into().unwrap()) / 2;
    page[..8].copy_from_slice(&blocks.to_le_bytes());
    rescan(&page);
    let e = q.submit(&ns, 1, write(0, 1)).unwrap_err();
    assert!(is_stale(&e), "{e}");
    let now = rig.controller.namespace(1).unwrap();
    assert_eq!(now.num_blocks(), blocks);
}

/// A refused format has no effect.
#[test]
fn a_refused_format_disturbs_nobody() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                let refused = rig.controller.format(2, FormatNvm::default());
                assert!(matches!(refused, Err(NvmeError::Unsupported { .. })));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let mut out = Vec::new();
        let mut tag = 0;
        while !stop.load(Ordering::Relaxed) {
            match q.submit(&rig.ns, tag, read(0)) {
                Ok(()) => tag += 1,
                Err(SubmitError::Busy(_)) => {}
                Err(e) => panic!("{e}"),
            }
            q.poll(&mut out);
            out.clear();
        }
        settle(&mut q);
    });
}

/// A thread that waits while the controller is being reset sleeps.
#[test]
fn waiting_during_a_reset_is_sleeping() {
    let _watchdog = watchdog();
    for completed_before in [true, false] {
        let rig = rig_with(|config, _| config.ready_delay = Duration::from_millis(300));
        let mut q = queue(&rig, |_| {});
        if completed_before {
            q.submit(&rig.ns, 1, read(0)).unwrap();
            q.poll(&mut Vec::new());
            let start = Instant::now();
            while rig.soft.stats().commands == 0 && start.elapsed() < PATIENCE {}
        }
        let controller = Arc::clone(&rig.controller);
        let reset = std::thread::spawn(move || controller.reset());
        while rig.controller.phase() == Phase::Live {
            std::thread::yield_now();
        }
        let (mut returns, mut out) = (0, Vec::new());
        while rig.controller.phase() == Phase::Resetting {
            q.wait(Duration::from_millis(100)).unwrap();
            q.poll(&mut out);
            returns += 1;
        }
        reset.join().unwrap().unwrap();
        assert!(returns < 50, "{returns} returns");
        settle(&mut q);
    }
}

#[test]
fn the_io_comes_back_from_a_namespace_that_is_not_the_handles() {
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let other = rig_with(|_, _| {});
    let io = Op::Flush;
    let error = q.submit(&other.ns, 1, io).unwrap_err();
    assert!(is_stale(&error), "{error}");
    assert!(matches!(error.into_op(), Op::Flush));
}
