//! Tests of queue identifiers: one stays taken until the device has no queue of that number.

use std::sync::atomic::{AtomicU64, Ordering};

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{AdminOpcode, IoOpcode, Status};
use pumice_nvme::{NvmeError, Op, QueueOptions, QueuePair, SubmitError};
use pumice_nvme_soft::{Fault, FaultRule};

use common::*;

mod common;

/// Threads make a pair, read and drop it, repeatedly. None may be refused.
fn come_and_go(queues: u16, threads: u32, rounds: u32) {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.queues = queues);
    let refused = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..rounds {
                    match rig.controller.queue_pair(&QueueOptions::default().depth(8)) {
                        Ok(mut pair) => assert!(one(&rig, &mut pair, read(0)).result.is_ok()),
                        Err(error) => {
                            eprintln!("{error}");
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(refused.into_inner(), 0, "refused queue pairs");
}

#[test]
fn pairs_come_and_go_in_threads() {
    come_and_go(16, 4, 300);
}

/// Each thread's pair takes the place of one that is being deleted.
#[test]
fn pairs_come_and_go_where_there_are_no_more() {
    come_and_go(4, 4, 300);
}

#[test]
fn a_refused_deletion_costs_one_identifier_and_only_until_a_reset() {
    let _watchdog = watchdog();
    for op in [AdminOpcode::DELETE_SQ, AdminOpcode::DELETE_CQ] {
        let rig = rig_with(|config, _| config.queues = 3);
        let make = || rig.controller.queue_pair(&QueueOptions::default().depth(8));
        let refusal = Fault::Status(Status::INTERNAL.dnr());
        rig.soft.faults().add(FaultRule::admin(op, refusal));
        drop(make().unwrap());
        rig.soft.faults().clear();
        let mut two = [make().unwrap(), make().unwrap()];
        assert_eq!(two.each_ref().map(QueuePair::qid), [2, 3]);
        // A reset makes the third available, which costs the other two nothing.
        let generation = rig.controller.generation();
        let mut third = make().unwrap();
        assert_eq!(third.qid(), 1);
        assert_eq!(rig.controller.generation(), generation + 1);
        for pair in two.iter_mut().chain([&mut third]) {
            assert!(one(&rig, pair, read(7)).result.is_ok());
        }
        assert!(matches!(make(), Err(NvmeError::NoQueues { limit: 3, .. })));
    }
}

#[test]
fn a_pair_that_cannot_be_made_leaves_its_identifier() {
    let _watchdog = watchdog();
    for op in [AdminOpcode::CREATE_CQ, AdminOpcode::CREATE_SQ] {
        let rig = rig_with(|config, _| config.queues = 1);
        let refusal = Fault::Status(Status::INTERNAL.dnr());
        rig.soft
            .faults()
            .add(FaultRule::admin(op, refusal).times(1));
        let make = || rig.controller.queue_pair(&QueueOptions::default().depth(8));
        assert!(matches!(make(), Err(NvmeError::Status { .. })));
        assert!(one(&rig, &mut make().unwrap(), read(0)).result.is_ok());
        assert_eq!(rig.controller.generation(), 1, "no reset was needed");
    }
}

/// Resets while queue pairs are being deleted: nobody gets an identifier before its deletion has
/// ended, and a deletion does not hit the queue that has the identifier afterwards.
#[test]
fn resets_beside_deletions() {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.queues = 2);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut options = QueueOptions::default().depth(8);
    // On a busy machine one read may meet many resets.
    (options.max_retries, options.timeout) = (u8::MAX - 1, NEVER);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..100 {
                        // A creation that a reset has interrupted is tried again.
                        let mut pair = loop {
                            match rig.controller.queue_pair(&options) {
                                Ok(pair) => break pair,
                                Err(NvmeError::Unfinished { .. }) => {}
                                Err(error) => panic!("{error}"),
                            }
                        };
                        let done = one(&rig, &mut pair, read(0));
                        assert!(done.result.is_ok(), "{:?}", done.result);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rig.controller.reset().unwrap();
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        let ended: Vec<_> = workers
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
}

/// Queues that the device refuses to delete may still transfer, so the buffers of their commands
/// are kept until it is reset.
#[test]
fn buffers_of_queues_that_were_not_deleted_are_kept() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut pair = queue(&rig, |_| {});
    // The command is carried out but not completed, so it is in flight.
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::WRITE, Fault::DropCompletion));
    let buf = DmaBuf::copy_from(&[7; 512]).unwrap();
    let data = buf.freeze();
    let watch = data.clone();
    let io = Op::Write {
        lba: 0,
        data,
        fua: false,
    };
    pair.submit(&rig.ns, 1, io).unwrap();
    pair.poll(&mut Vec::new());
    until_struck(&rig, 1);
    let refusal = Fault::Status(Status::INTERNAL.dnr());
    rig.soft
        .faults()
        .add(FaultRule::admin(AdminOpcode::DELETE_SQ, refusal).times(1));
    drop(pair);
    // The driver still holds its view, so the buffer cannot be taken out.
    let watch = watch.try_into_buf().expect_err("the buffer is free");
    rig.controller.reset().unwrap();
    assert!(watch.try_into_buf().is_ok(), "the reset did not free it");
}

/// A controller may grant fewer queues after a reset. A pair that has none any longer says so and takes nothing more.
#[test]
fn a_pair_without_queues_after_a_reset_refuses() {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.queues = 2);
    let mut pairs = [queue(&rig, |_| {}), queue(&rig, |_| {})];
    let faults = rig.soft.faults();
    faults.add(FaultRule::any_io(Fault::Drop).queue(2));
    pairs[1].submit(&rig.ns, 7, read(0)).unwrap();
    pairs[1].poll(&mut Vec::new());
    until_struck(&rig, 1);
    // The first feature that a reset sets is the number of queues, which is counted from 0.
    faults.add(FaultRule::admin(AdminOpcode::SET_FEATURES, Fault::Result(0)).times(1));
    rig.controller.reset().unwrap();
    assert_eq!(rig.controller.queue_limit(), 1);
    let [first, second] = &mut pairs;
    assert!(one(&rig, first, read(0)).result.is_ok());
    let done = settle(second);
    assert!(done.len() == 1 && done[0].tag == 7, "{done:?}");
    for _ in 0..2 {
        let refused = second.submit(&rig.ns, 8, read(0)).unwrap_err();
        assert!(matches!(refused, SubmitError::Refused(..)), "{refused:?}");
        let text = refused.to_string();
        assert!(text.contains("fewer I/O queues since a reset"), "{text}");
        assert_eq!(second.poll(&mut Vec::new()), 0);
    }
    let error = second.wait(PATIENCE).unwrap_err();
    assert!(
        matches!(error, NvmeError::NoQueues { limit: 1, .. }),
        "{error}"
    );
}
