//! Tests of faults of the soft controller: errors, delays, lost and corrupt completions, fatal
//! status, removal, power cut. Every I/O ends exactly once and nothing hangs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{AdminOpcode, AsyncEvent, AsyncEventType, IoOpcode, Status};
use pumice_nvme::{
    Completion, Controller, ControllerEvent, ControllerOptions, IoErrorKind, Namespace, NvmeError,
    Op, QueuePair, SubmitError,
};
use pumice_nvme_soft::{Fault, FaultRule, SoftConfig, SoftController};

use common::*;

mod common;

/// Returns the error text of an I/O that failed.
fn text(done: &Completion) -> String {
    done.result.as_ref().unwrap_err().to_string()
}

#[test]
fn do_not_retry_is_kept() {
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    rig.soft.faults().add(FaultRule::io(
        IoOpcode::READ,
        Fault::Status(Status::UNRECOVERED_READ.dnr()),
    ));
    let done = one(&rig, &mut q, read(5));
    assert_eq!(status(&done), Some(Status::UNRECOVERED_READ.dnr()));
    assert_eq!(rig.soft.faults().struck(), 1);
    let text = done.result.unwrap_err().to_string();
    assert!(
        text.contains("READ sqid:1") && text.contains("lba:5 len:1"),
        "{text}"
    );
    assert!(
        text.contains("UNRECOVERED READ ERROR (02/81) dnr:1"),
        "{text}"
    );
}

#[test]
fn retries_have_a_limit() {
    let rig = rig();
    let mut q = queue(&rig, |o| o.max_retries = 2);
    rig.soft.faults().add(FaultRule::io(
        IoOpcode::WRITE,
        Fault::Status(Status::WRITE_FAULT),
    ));
    let done = one(&rig, &mut q, write(5, 1));
    assert_eq!(status(&done), Some(Status::WRITE_FAULT));
    assert_eq!(kind(&done), IoErrorKind::Media);
    assert_eq!(rig.soft.faults().struck(), 3);
    assert!(text(&done).contains("(sent again 2 times)"), "{done:?}");
    rig.soft.faults().clear();
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::WRITE, Fault::Status(Status::NAMESPACE_NOT_READY)).times(2));
    assert!(one(&rig, &mut q, write(5, 2)).result.is_ok());
    assert_eq!(q.stats().retries, 4);
}

#[test]
fn faults_strike_only_what_they_name() {
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let rule = FaultRule::any_io(Fault::Status(Status::INTERNAL.dnr()))
        .namespace(1)
        .blocks(10..20)
        .after(1)
        .times(1);
    rig.soft.faults().add(rule);
    let two = rig.controller.namespace(2).unwrap();
    q.submit(&two, 1, read(15)).unwrap();
    assert!(settle(&mut q)[0].result.is_ok());
    assert!(one(&rig, &mut q, read(20)).result.is_ok());
    assert!(one(&rig, &mut q, read(15)).result.is_ok());
    assert!(one(&rig, &mut q, read(15)).result.is_err());
    assert!(one(&rig, &mut q, read(15)).result.is_ok());
}

#[test]
fn a_part_that_fails_fails_the_whole_once() {
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    rig.soft.faults().add(
        FaultRule::io(
            IoOpcode::READ,
            Fault::Status(Status::UNRECOVERED_READ.dnr()),
        )
        .blocks(700..701),
    );
    let buf = DmaBuf::new(1 << 20).unwrap();
    let done = one(&rig, &mut q, Op::Read { lba: 0, buf });
    let error = done.result.unwrap_err();
    // All of the operation, and in the detail the command that failed.
    assert_eq!((error.lba, error.len_bytes), (0, 1 << 20));
    assert!(error.detail.contains("lba:512 "), "{error}");
    rig.soft.faults().clear();
    assert!(one(&rig, &mut q, read(700)).result.is_ok());
}

#[test]
fn a_delayed_command_is_aborted_and_sent_again() {
    let rig = rig();
    // The abort may come late on a busy machine. Then there is a reset and another attempt instead,
    // with the same result.
    let mut q = queue(&rig, |o| {
        o.timeout = SOON;
        o.max_retries = 200;
    });
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER)).times(1));
    assert!(one(&rig, &mut q, read(1)).result.is_ok());
    let stats = q.stats();
    assert!(stats.timeouts >= 1 && stats.retries >= 1, "{stats:?}");
    rig.soft
        .faults()
        .add(FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER)));
    let mut q = queue(&rig, |o| {
        o.timeout = SOON;
        o.max_retries = 0;
    });
    assert_eq!(kind(&one(&rig, &mut q, read(1))), IoErrorKind::TimedOut);
}

#[test]
fn a_lost_command_means_a_reset() {
    for fault in [Fault::Drop, Fault::DropCompletion, Fault::WrongPhase] {
        let rig = rig();
        let mut q = queue(&rig, |o| {
            o.timeout = SOON;
            o.max_retries = 200;
        });
        let mut bystander = queue(&rig, |_| {});
        rig.soft
            .faults()
            .add(FaultRule::io(IoOpcode::WRITE, fault.clone()).times(1));
        q.submit(&rig.ns, 1, write(9, 0xaa)).unwrap();
        q.submit(&rig.ns, 2, read(1)).unwrap();
        let done = settle(&mut q);
        assert!(done.iter().all(|d| d.result.is_ok()), "{fault:?}: {done:?}");
        assert!(q.stats().resets >= 1, "{fault:?}: {:?}", q.stats());
        // The other queue continues.
        let done = one(&rig, &mut bystander, read(9));
        let Op::Read { buf, .. } = done.op else {
            panic!()
        };
        assert!(buf.iter().all(|b| *b == 0xaa));
        let events = rig.controller.take_events();
        assert!(
            events
                .iter()
                .any(|e| matches!(e, ControllerEvent::Reset(_))),
            "{events:?}"
        );
    }
}

#[test]
fn impossible_completions_mean_a_reset_and_no_panic() {
    let raws = [
        [0, 0],
        [u64::MAX, u64::MAX],
        [0, 0xffff_0000_0001_0000 | 0xfff0_0000_0000],
        [0, 0x0000_0003_0001_0000],
    ];
    let faults = raws.iter().map(|r| Fault::Raw(*r)).chain([Fault::WrongId]);
    for fault in faults {
        let rig = rig();
        let mut q = queue(&rig, |_| {});
        rig.soft
            .faults()
            .add(FaultRule::any_io(fault.clone()).times(1));
        for tag in 0..8 {
            q.submit(&rig.ns, tag, read(tag)).unwrap();
        }
        let done = settle(&mut q);
        assert_eq!(done.len(), 8);
        assert!(done.iter().all(|d| d.result.is_ok()), "{fault:?}: {done:?}");
        assert_eq!(q.stats().resets, 1, "{fault:?}");
    }
}

#[test]
fn an_unknown_status_is_an_error() {
    let rig = rig();
    let mut q = queue(&rig, |o| o.max_retries = 1);
    rig.soft
        .faults()
        .add(FaultRule::any_io(Fault::UnknownStatus));
    let text = one(&rig, &mut q, read(1)).result.unwrap_err().to_string();
    assert!(text.contains("UNKNOWN STATUS (03/ff)"), "{text}");
}

#[test]
fn a_device_that_stays_broken_ends_every_io() {
    let rig = rig();
    let mut q = queue(&rig, |o| o.max_retries = 2);
    rig.soft.faults().add(FaultRule::any_io(Fault::WrongId));
    for tag in 0..8 {
        q.submit(&rig.ns, tag, write(tag, 1)).unwrap();
    }
    let done = settle(&mut q);
    assert_eq!(done.len(), 8);
    assert!(done.iter().all(|d| kind(d) == IoErrorKind::Aborted));
    rig.soft.faults().clear();
    assert!(one(&rig, &mut q, read(1)).result.is_ok());
}

#[test]
fn fatal_status_is_survived() {
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    rig.soft
        .faults()
        .add(FaultRule::any_io(Fault::Fatal).after(3).times(1));
    for tag in 0..16 {
        q.submit(&rig.ns, tag, write(tag, 7)).unwrap();
    }
    let done = settle(&mut q);
    assert_eq!(done.len(), 16);
    assert!(done.iter().all(|d| d.result.is_ok()), "{done:?}");
    assert!(rig.controller.generation() > 1);
}

#[test]
fn removal_ends_everything() {
    for how in 0..3 {
        let rig = rig();
        let mut q = queue(&rig, |_| {});
        let mut idle = queue(&rig, |_| {});
        rig.soft
            .faults()
            .add(FaultRule::any_io(Fault::Drop).after(2));
        for tag in 0..10 {
            q.submit(&rig.ns, tag, read(tag)).unwrap();
        }
        let mut out = Vec::new();
        q.poll(&mut out);
        // The loss of the first command does not affect a command that the controller has not
        // fetched yet, if the faults are removed first.
        until_struck(&rig, 8);
        match how {
            0 => rig.soft.unplug(),
            1 => rig.soft.request_removal(),
            _ => {
                rig.soft.faults().clear();
                rig.soft
                    .faults()
                    .add(FaultRule::any_io(Fault::Remove).times(1));
                q.submit(&rig.ns, 99, read(0)).unwrap();
            }
        }
        out.extend(settle(&mut q));
        let removed = out
            .iter()
            .filter(|d| matches!(&d.result, Err(e) if e.kind == IoErrorKind::Removed))
            .count();
        assert!(removed >= 8, "{how}: {out:?}");
        let refused = q.submit(&rig.ns, 1, read(0));
        assert!(
            matches!(&refused, Err(SubmitError::Refused(_, e)) if e.kind == IoErrorKind::Removed),
            "{refused:?}"
        );
        // A queue pair with nothing in flight notices it too.
        let refused = idle.submit(&rig.ns, 1, read(0));
        assert!(
            matches!(refused, Err(SubmitError::Refused(..))),
            "{refused:?}"
        );
        let error = rig.controller.smart_log().unwrap_err();
        assert!(error.is_removed(), "{error}");
        assert!(q.wait(Duration::from_secs(1)).is_err());
    }
}

#[test]
fn a_sleeper_is_woken_by_removal() {
    let rig = rig();
    let mut q = queue(&rig, |o| o.spin_max = Duration::ZERO);
    rig.soft.faults().add(FaultRule::any_io(Fault::Drop));
    q.submit(&rig.ns, 1, read(0)).unwrap();
    let soft = rig.soft.clone();
    let (sleeps, slept) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        slept.recv().unwrap();
        soft.unplug();
    });
    let mut out = Vec::new();
    q.poll(&mut out);
    q.wait(Duration::from_millis(1)).unwrap();
    sleeps.send(()).unwrap();
    assert_eq!(kind(&settle(&mut q)[0]), IoErrorKind::Removed);
    assert!(q.stats().sleeps > 0);
    thread.join().unwrap();
}

/// Reads the SMART log. A reset ends an admin command with an error; then it is sent again.
fn smart_log_again(rig: &Rig) {
    for _ in 0..5 {
        match rig.controller.smart_log() {
            Ok(_) => return,
            Err(NvmeError::Unfinished { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    panic!("no SMART log after five attempts");
}

#[test]
fn admin_faults() {
    let rig = rig_with(|_, options| options.admin_timeout = Duration::from_secs(2));
    rig.soft.faults().add(
        FaultRule::admin(
            AdminOpcode::GET_LOG_PAGE,
            Fault::Status(Status::INVALID_LOG_PAGE.dnr()),
        )
        .times(1),
    );
    let error = rig.controller.smart_log().unwrap_err();
    assert_eq!(
        error.status().map(Status::code),
        Some(Status::INVALID_LOG_PAGE)
    );
    // Without a completion the controller is reset and works again.
    rig.soft
        .faults()
        .add(FaultRule::admin(AdminOpcode::GET_LOG_PAGE, Fault::Drop).times(1));
    let error = rig.controller.smart_log().unwrap_err();
    assert!(matches!(error, NvmeError::Unfinished { .. }), "{error}");
    smart_log_again(&rig);
    let mut q = queue(&rig, |_| {});
    assert!(one(&rig, &mut q, read(3)).result.is_ok());
    // A wrong identifier has the same effect.
    rig.soft
        .faults()
        .add(FaultRule::admin(AdminOpcode::GET_LOG_PAGE, Fault::WrongId).times(1));
    assert!(rig.controller.smart_log().is_err());
    smart_log_again(&rig);
}

#[test]
fn a_reset_that_fails_gives_the_controller_up() {
    let rig = rig_with(|_, options| options.admin_timeout = Duration::from_secs(2));
    let mut q = queue(&rig, |o| o.timeout = SOON);
    rig.soft.faults().add(FaultRule::any_io(Fault::Drop));
    rig.soft
        .faults()
        .add(FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Drop));
    for tag in 0..4 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    let done = settle(&mut q);
    assert_eq!(done.len(), 4);
    assert!(
        done.iter()
            .all(|d| text(d).contains("the controller failed")),
        "{done:?}"
    );
    let error = rig.controller.reset().unwrap_err().to_string();
    assert!(error.contains("IDENTIFY"), "{error}");
}

#[test]
fn bring_up_is_bounded() {
    let mut config = SoftConfig::new(vec![disk()]);
    config.timeout_500ms = 1;
    config.ready_delay = NEVER;
    let soft = SoftController::new(config).unwrap();
    let error = Controller::new(soft.transport(), ControllerOptions::default()).unwrap_err();
    assert!(matches!(error, NvmeError::NotReady { .. }), "{error}");
}

#[test]
fn events_reach_the_caller() {
    fn until(rig: &Rig, what: &str, seen: impl Fn(&ControllerEvent) -> bool) {
        let start = Instant::now();
        let mut all = Vec::new();
        loop {
            all.extend(rig.controller.take_events());
            if all.iter().any(&seen) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {all:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let rig = rig();
    for _ in 0..6 {
        // There are more events than outstanding requests: each request is armed again.
        rig.soft
            .report(AsyncEvent::new(AsyncEventType::HEALTH, 1, 2));
        until(
            &rig,
            "health",
            |e| matches!(e, ControllerEvent::Async(a) if a.kind() == AsyncEventType::HEALTH),
        );
    }
    rig.soft.add_namespace(disk());
    until(&rig, "namespace", |e| {
        matches!(e, ControllerEvent::NamespacesChanged)
    });
    let three = rig.controller.namespace(3).unwrap();
    let mut q = queue(&rig, |_| {});
    q.submit(&three, 1, read(0)).unwrap();
    assert!(settle(&mut q)[0].result.is_ok());
    rig.soft.bus_error("a made-up bus error");
    until(
        &rig,
        "reset",
        |e| matches!(e, ControllerEvent::Reset(r) if r.contains("made-up")),
    );
}

/// Blocks that were flushed or written with FUA are there after a power cut. Each block that was
/// only in the cache may be there or not.
#[test]
fn power_cut_loses_exactly_the_cache() {
    let rig = rig_with(|config, _| config.write_cache = true);
    assert!(rig.ns.write_cache());
    let mut q = queue(&rig, |_| {});
    assert!(one(&rig, &mut q, write(1, 1)).result.is_ok());
    assert!(one(&rig, &mut q, Op::Flush).result.is_ok());
    assert!(one(&rig, &mut q, write(2, 2)).result.is_ok());
    assert!(one(&rig, &mut q, write(3, 3)).result.is_ok());
    assert!(one(&rig, &mut q, write(1, 9)).result.is_ok());
    let mut data = DmaBuf::new(512).unwrap();
    data.fill(4);
    let fua = Op::Write {
        lba: 4,
        data: data.freeze(),
        fua: true,
    };
    assert!(one(&rig, &mut q, fua).result.is_ok());
    let media = rig.soft.power_cut(|nsid, lba| (nsid, lba) == (1, 3));
    drop(q);
    drop(rig);
    let soft = SoftController::new(SoftConfig::new(media)).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    let ns = controller.namespace(1).unwrap();
    let rig = Rig {
        soft,
        controller,
        ns,
    };
    let mut q = queue(&rig, |_| {});
    for (lba, want) in [(1, 1), (2, 0), (3, 3), (4, 4)] {
        let Op::Read { buf, .. } = one(&rig, &mut q, read(lba)).op else {
            panic!()
        };
        assert!(buf.iter().all(|b| *b == want), "block {lba}: {}", buf[0]);
    }
}

/// A command that was aborted and completed late must not complete its successor in the slot.
#[test]
fn a_stale_completion_is_recognised() {
    let rig = rig();
    let mut q = queue(&rig, |o| o.max_retries = 8);
    // The identifiers of the first use of each slot.
    for tag in 0..16 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    settle(&mut q);
    let stale = [0u64, 1 << 16];
    rig.soft
        .faults()
        .add(FaultRule::any_io(Fault::Raw(stale)).times(1));
    let done = one(&rig, &mut q, read(0));
    assert!(done.result.is_ok());
    assert_eq!(q.stats().resets, 1, "a stale completion went unnoticed");
}

#[test]
fn resets_storm_while_threads_work() {
    let rig = rig();
    let rig = &rig;
    let rounds = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2u64)
            .map(|t| {
                scope.spawn(move || {
                    let mut q = queue(rig, |o| {
                        o.max_retries = 200;
                    });
                    for round in 0..60u64 {
                        let mut sent = 0;
                        for n in 0..16 {
                            let io = write(1000 * t + n, u8::try_from(round).unwrap());
                            match q.submit(&rig.ns, n, io) {
                                Ok(()) => sent += 1,
                                Err(SubmitError::Busy(_)) => {}
                                Err(other) => panic!("{other}"),
                            }
                        }
                        let done = settle(&mut q);
                        rounds.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(done.len(), sent);
                        assert!(done.iter().all(|d| d.result.is_ok()), "{done:?}");
                    }
                })
            })
            .collect();
        // There is one reset in each round: more of them could use up the retries.
        let mut seen = 0;
        while workers.iter().any(|w| !w.is_finished()) {
            if std::mem::replace(&mut seen, rounds.load(Ordering::Relaxed)) == seen {
                std::thread::yield_now();
                continue;
            }
            rig.controller.reset().unwrap();
        }
    });
}

/// A queue pair that is made while the controller is being reset works, whichever part of it the
/// reset has seen.
#[test]
fn queue_pairs_made_under_resets_work() {
    let rig = rig();
    let made = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let maker = scope.spawn(|| {
            for _ in 0..300 {
                let mut q = queue(&rig, |o| o.max_retries = 200);
                let done = one(&rig, &mut q, read(1));
                assert!(done.result.is_ok(), "{done:?}");
                drop(q);
                made.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut seen = u64::MAX;
        while !maker.is_finished() {
            if std::mem::replace(&mut seen, made.load(Ordering::Relaxed)) == seen {
                std::hint::spin_loop();
                continue;
            }
            rig.controller.reset().unwrap();
        }
    });
}

#[test]
fn format_changes_the_block_size() {
    let rig = rig();
    let format = pumice_nvme::spec::FormatNvm {
        lbaf: 1,
        secure_erase: 0,
    };
    let other = rig.controller.namespace(2).unwrap();
    let stale = |q: &mut QueuePair, ns: &Namespace| match q.submit(ns, 1, read(0)) {
        Err(SubmitError::Refused(_, e)) => e.detail,
        other => panic!("{other:?}"),
    };
    // A format is refused while there are queue pairs, and changes nothing.
    let mut q = queue(&rig, |_| {});
    let error = rig.controller.format(1, format).unwrap_err().to_string();
    assert!(error.contains("1 I/O queue pairs"), "{error}");
    assert!(one(&rig, &mut q, read(0)).result.is_ok());
    drop(q);

    rig.controller.format(1, format).unwrap();
    let ns = rig.controller.namespace(1).unwrap();
    assert_eq!((ns.block_size(), ns.num_blocks()), (4096, 1024));
    // A command for 512 bytes would now be filled with 4096.
    let mut q = queue(&rig, |_| {});
    assert!(stale(&mut q, &rig.ns).contains("namespace 1 is not this controller\'s"));
    q.submit(&other, 1, read(0)).unwrap();
    let buf = DmaBuf::new(4096).unwrap();
    q.submit(&ns, 2, Op::Read { lba: 0, buf }).unwrap();
    assert!(settle(&mut q).iter().all(|d| d.result.is_ok()));
    drop(q);
    // Handles stay valid over resets and rescans, and are never valid for another controller.
    rig.controller.reset().unwrap();
    rig.controller.rescan().unwrap();
    let mut q = queue(&rig, |_| {});
    q.submit(&other, 1, read(0)).unwrap();
    assert!(settle(&mut q)[0].result.is_ok());
    let second = rig_with(|_, _| {});
    assert!(stale(&mut q, &second.ns).contains("namespace 1 is not this controller\'s"));
    drop(q);
    let error = rig
        .controller
        .format(
            1,
            pumice_nvme::spec::FormatNvm {
                lbaf: 9,
                secure_erase: 0,
            },
        )
        .unwrap_err()
        .to_string();
    assert!(error.contains("formats 0 to 1"), "{error}");
}
