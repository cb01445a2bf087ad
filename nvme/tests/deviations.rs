//! Tests of what controllers may do otherwise than most: take few aborts, format all namespaces at
//! once or slowly, have boundaries of atomicity, deviate from the specification.

use std::time::{Duration, Instant};

use pumice_nvme::controller::ControllerOptions;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::{
    AdminOpcode, Cns, Command, FormatNvm, IdentifyController, IdentifyNamespace, IoOpcode, Status,
};
use pumice_nvme::{Controller, IoErrorKind, NvmeError};
use pumice_nvme_soft::{Fault, FaultRule, SoftConfig, SoftController};

use common::*;

mod common;

fn page(controller: &Controller, cns: Cns) -> Vec<u8> {
    let page = DmaBuf::zeroed(4096).unwrap();
    let command = Command::identify(cns, u32::from(cns == Cns::NAMESPACE));
    let (_, page) = controller.admin_command(command, Some(page)).unwrap();
    page.unwrap().to_vec()
}

/// Makes the controller's next answer to Identify of namespace 1 this page, after `skip` others.
fn answer(rig: &Rig, page: Vec<u8>, skip: u64) {
    let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(page));
    let faults = rig.soft.faults();
    faults.add(rule.namespace(1).after(skip).times(1));
}

/// The controller takes four aborts at a time and is slow with them.
#[test]
fn no_more_aborts_are_sent_than_the_controller_takes() {
    let _watchdog = watchdog();
    let rig = rig();
    let abort = FaultRule::admin(AdminOpcode::ABORT, Fault::Delay(Duration::from_millis(30)));
    let late = FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER));
    rig.soft.faults().add(abort);
    rig.soft.faults().add(late.times(13));
    let mut q = queue(&rig, |options| {
        options.max_retries = 0;
        options.timeout = SOON;
    });
    for tag in 0..13 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    // On a slow machine a reset ends some of them.
    let done = settle(&mut q);
    assert_eq!(done.len(), 13);
    assert!(
        done.iter()
            .all(|d| matches!(kind(d), IoErrorKind::TimedOut | IoErrorKind::Aborted))
    );
    rig.soft.faults().clear();
    let refused: Vec<Status> = rig
        .controller
        .error_log(64)
        .unwrap()
        .iter()
        .map(|entry| Status(entry.status_phase.get() >> 1))
        .filter(|status| status.code() == Status::ABORT_LIMIT)
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// A queue pair ends while aborts of its commands wait for the controller to take them. The next one gets its number,
/// and its commands the same numbers: they are not aborted.
#[test]
fn aborts_for_a_queue_that_is_gone_do_not_reach_its_successor() {
    let _watchdog = watchdog();
    let rig = rig();
    let faults = rig.soft.faults();
    faults.add(FaultRule::admin(
        AdminOpcode::ABORT,
        Fault::Delay(Duration::from_secs(1)),
    ));
    faults.add(FaultRule::io(IoOpcode::READ, Fault::Delay(NEVER)).times(13));
    let mut q = queue(&rig, |options| {
        options.max_retries = 0;
        options.timeout = SOON;
    });
    let qid = q.qid();
    for tag in 0..13 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    // Four aborts are on their way, and nine wait.
    let start = Instant::now();
    while faults.struck() < 13 + 4 {
        q.poll(&mut Vec::new());
        assert!(start.elapsed() < PATIENCE, "no aborts");
    }
    drop(q);
    // They take longer than the aborts that are on their way.
    faults.add(FaultRule::io(
        IoOpcode::READ,
        Fault::Delay(Duration::from_secs(3)),
    ));
    let mut q = queue(&rig, |options| options.max_retries = 0);
    assert_eq!(q.qid(), qid);
    for tag in 0..13 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    for done in settle(&mut q) {
        assert!(done.result.is_ok(), "{:?}", done.result);
    }
}

/// The controller says that a format of one namespace formats all of them.
#[test]
fn a_format_of_one_namespace_spares_the_others() {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.formats_all = true);
    let other = rig.controller.namespace(2).unwrap();
    let mut q = queue(&rig, |_| {});
    q.submit(&other, 1, write(0, 7)).unwrap();
    assert!(settle(&mut q)[0].result.is_ok());
    drop(q);
    let format = FormatNvm::default();
    let refused = rig.controller.format(1, format).unwrap_err();
    assert!(
        matches!(refused, NvmeError::Unsupported { .. }),
        "{refused}"
    );
    let first_byte = |rig: &Rig| {
        let mut q = queue(rig, |_| {});
        q.submit(&other, 1, read(0)).unwrap();
        let pumice_nvme::Op::Read { buf, .. } = settle(&mut q).remove(0).op else {
            panic!("another operation");
        };
        buf[0]
    };
    assert_eq!(first_byte(&rig), 7);
    rig.controller.format_all(format).unwrap();
    assert_eq!(first_byte(&rig), 0);
}

/// The controller says that an erase of one namespace erases all of them.
#[test]
fn an_erase_of_one_namespace_spares_the_others() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut identify = page(&rig.controller, Cns::CONTROLLER);
    identify[std::mem::offset_of!(IdentifyController, fna)] |= 2;
    let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(identify));
    rig.soft.faults().add(rule.namespace(0).times(1));
    rig.controller.reset().unwrap();
    for secure_erase in [1, 2] {
        let format = FormatNvm {
            secure_erase,
            ..FormatNvm::default()
        };
        let refused = rig.controller.format(1, format).unwrap_err();
        assert!(
            matches!(refused, NvmeError::Unsupported { .. }),
            "{secure_erase}: {refused}"
        );
    }
    // A format without an erase is one of that namespace.
    rig.controller.format(1, FormatNvm::default()).unwrap();
}

/// A controller that takes no format for all namespaces gets one for each, whatever it erases with.
#[test]
fn namespaces_are_formatted_one_by_one() {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.formats_one_by_one = true);
    let spaces = [1, 2].map(|nsid| rig.controller.namespace(nsid).unwrap());
    for secure_erase in [0, 1] {
        let mut q = queue(&rig, |_| {});
        for ns in &spaces {
            q.submit(ns, 1, write(0, 7)).unwrap();
            assert!(settle(&mut q)[0].result.is_ok());
        }
        drop(q);
        let format = FormatNvm {
            secure_erase,
            ..FormatNvm::default()
        };
        rig.controller.format_all(format).unwrap();
        let mut q = queue(&rig, |_| {});
        for ns in &spaces {
            q.submit(ns, 1, read(0)).unwrap();
            let pumice_nvme::Op::Read { buf, .. } = settle(&mut q).remove(0).op else {
                panic!("another operation");
            };
            assert_eq!(buf[0], 0, "namespace {}, erase {secure_erase}", ns.nsid());
        }
    }
}

/// A controller with one namespace formats it, whatever else it would format.
#[test]
fn a_controller_of_one_namespace_is_formatted() {
    let _watchdog = watchdog();
    let mut config = SoftConfig::new(vec![disk()]);
    config.formats_all = true;
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    controller.format(1, FormatNvm::default()).unwrap();
}

/// A format goes on for as long as the namespace reports progress. Without any it leads to a reset.
#[test]
fn a_format_has_time_while_it_makes_progress() {
    let _watchdog = watchdog();
    for progresses in [true, false] {
        let rig = rig_with(|_, options| options.format_timeout = SOON);
        let mut identify = page(&rig.controller, Cns::NAMESPACE);
        // FPI: bit 7 says that it counts, the others are the percentage that is left.
        let fpi = std::mem::offset_of!(pumice_nvme::spec::IdentifyNamespace, fpi);
        identify[fpi] = 0x80;
        answer(&rig, identify.clone(), 0);
        rig.controller.rescan().unwrap();
        for left in (1..=99).rev() {
            identify[fpi] = 0x80 | if progresses { left } else { 99 };
            answer(&rig, identify.clone(), 0);
        }
        let fault = match progresses {
            true => Fault::Delay(SOON * 6),
            false => Fault::Drop,
        };
        let rule = FaultRule::admin(AdminOpcode::FORMAT_NVM, fault);
        rig.soft.faults().add(rule);
        let formatted = rig.controller.format(1, FormatNvm::default());
        assert_eq!(formatted.is_ok(), progresses, "{formatted:?}");
        if !progresses {
            assert!(matches!(formatted, Err(NvmeError::Unfinished { .. })));
        }
    }
}

/// The driver has no memory for a block's metadata, and does not take them for data.
#[test]
fn a_format_with_metadata_is_not_used() {
    let _watchdog = watchdog();
    let (flbas, dps, lbaf) = (
        std::mem::offset_of!(IdentifyNamespace, flbas),
        std::mem::offset_of!(IdentifyNamespace, dps),
        std::mem::offset_of!(IdentifyNamespace, lbaf),
    );
    for extended in [0, 1 << 4] {
        for protection in [0, 1] {
            let rig = rig();
            let mut identify = page(&rig.controller, Cns::NAMESPACE);
            let format = lbaf + 4 * usize::from(identify[flbas] & 15);
            identify[format] = 8; // MS
            identify[flbas] |= extended;
            identify[dps] = protection;
            answer(&rig, identify, 0);
            rig.controller.rescan().unwrap();
            let ns = rig.controller.namespace(1).unwrap();
            let why = ns.unusable().unwrap_or_default();
            assert!(why.contains("8 bytes of metadata"), "{why:?}");
            let mut q = queue(&rig, |_| {});
            assert!(q.submit(&ns, 1, write(0, 1)).is_err());
            // What was opened with the earlier format does not write either.
            assert!(q.submit(&rig.ns, 1, write(0, 1)).is_err());
        }
    }
}

/// A write that crosses a boundary of atomicity, or that the driver cuts, can be torn.
#[test]
fn what_is_not_torn_keeps_to_the_boundaries() {
    let _watchdog = watchdog();
    let rig = rig();
    assert_eq!(rig.ns.untorn_blocks(), 1);
    let plain = page(&rig.controller, Cns::NAMESPACE);
    let set = |page: &mut Vec<u8>, at: usize, value: u16| {
        page[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    // NAWUPF, NABSPF and NABO in blocks, NOIOB, and what is not torn. MDTS is 256 blocks.
    for (blocks, boundary, first, optimal, untorn) in [
        (32, 0, 0, 0, 32),
        (33, 0, 0, 0, 32),
        (1, 0, 0, 0, 1),
        (32, 16, 0, 0, 16),
        (32, 64, 8, 0, 8),
        (32, 48, 0, 0, 16),
        (32, 0, 0, 8, 8),
        (32, 0, 0, 24, 8),
        (4096, 0, 0, 0, 256),
    ] {
        let mut changed = plain.clone();
        changed[24] |= 2; // NSFEAT: the fields are there
        set(&mut changed, 36, blocks - 1);
        set(&mut changed, 42, first);
        set(&mut changed, 44, u16::max(boundary, 1) - 1);
        set(&mut changed, 46, optimal);
        answer(&rig, changed, 0);
        rig.controller.rescan().unwrap();
        let ns = rig.controller.namespace(1).unwrap();
        let case = (blocks, boundary, first, optimal);
        assert_eq!(ns.untorn_blocks(), untorn, "{case:?}");
    }
}

fn known_as(vendor: u16, device: u16) -> Rig {
    rig_with(|config, _| config.pci_id = Some((vendor, device)))
}

/// The status register of some controllers must be left alone after they were disabled.
#[test]
fn a_controller_that_needs_quiet_after_it_was_disabled_has_it() {
    let _watchdog = watchdog();
    let rig = known_as(0x1c58, 0x0023);
    let start = Instant::now();
    rig.controller.reset().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(2300));
}

#[test]
fn write_zeroes_that_does_not_work_is_not_used() {
    let _watchdog = watchdog();
    assert!(known_as(0x8086, 0x0001).ns.supports().write_zeroes);
    assert!(!known_as(0x8086, 0xf1a5).ns.supports().write_zeroes);
}

/// Some controllers report the boundary that I/O should not cross in a field of their own.
#[test]
fn a_boundary_in_a_field_of_the_vendor_is_kept() {
    let _watchdog = watchdog();
    for (device, blocks) in [(0x0953, Some(256)), (0x0001, None)] {
        let rig = known_as(0x8086, device);
        let mut identify = page(&rig.controller, Cns::CONTROLLER);
        identify[3072 + 3] = 5; // 2^5 pages
        let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(identify));
        rig.soft.faults().add(rule.namespace(0).times(1));
        rig.controller.reset().unwrap();
        let ns = rig.controller.namespace(1).unwrap();
        let boundary = ns.limits().data.boundary_blocks;
        assert_eq!(boundary.map(std::num::NonZero::get), blocks);
    }
}

/// A controller that does not answer whether its cache is on counts as one whose cache is on, so
/// that it is flushed.
#[test]
fn a_cache_of_which_nothing_is_said_is_on() {
    let _watchdog = watchdog();
    let mut config = SoftConfig::new(vec![disk()]);
    config.write_cache = true;
    let soft = SoftController::new(config).unwrap();
    let refused = Fault::Status(Status::INVALID_FIELD.dnr());
    soft.faults()
        .add(FaultRule::admin(AdminOpcode::GET_FEATURES, refused));
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    assert!(soft.faults().struck() > 0, "it was not asked");
    assert!(controller.write_cache());
    assert!(controller.namespace(1).unwrap().write_cache());
}

/// A cache that was switched on, and whose state could not be read then, counts as on.
#[test]
fn a_cache_that_may_have_been_switched_on_is_on() {
    let _watchdog = watchdog();
    let rig = rig_with(|config, _| config.write_cache = true);
    rig.controller.set_write_cache(false).unwrap();
    assert!(!rig.controller.write_cache());
    let refused = Fault::Status(Status::INVALID_FIELD.dnr());
    let faults = rig.soft.faults();
    // A refused command has changed nothing.
    faults.add(FaultRule::admin(AdminOpcode::SET_FEATURES, refused.clone()).times(1));
    assert!(rig.controller.set_write_cache(true).is_err());
    assert!(!rig.controller.write_cache());
    faults.add(FaultRule::admin(AdminOpcode::GET_FEATURES, refused).times(1));
    assert!(rig.controller.set_write_cache(true).is_err());
    assert!(rig.controller.write_cache());
    assert!(rig.controller.namespace(1).unwrap().write_cache());
}

/// Deallocated blocks read as zeroes only where the controller says just that.
#[test]
fn deallocated_blocks_are_not_taken_for_zeroes() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut identify = page(&rig.controller, Cns::NAMESPACE);
    let dlfeat = std::mem::offset_of!(IdentifyNamespace, dlfeat);
    // Bits 2:0 are 0 (nothing is said), 1 (zeroes) or 2 (ones). The others mean something else.
    for (value, zeroes) in [
        (0, false),
        (1, true),
        (2, false),
        (8, false),
        (9, true),
        (10, false),
    ] {
        identify[dlfeat] = value;
        answer(&rig, identify.clone(), 0);
        rig.controller.rescan().unwrap();
        let ns = rig.controller.namespace(1).unwrap();
        assert_eq!(ns.deallocated_reads_zero(), zeroes, "{value}");
        assert_eq!(ns.zeroes_may_deallocate(), value & 8 != 0, "{value}");
    }
}

/// The limits of commands without data, each in its own field and unit: NVM figure 102.
#[test]
fn limits_of_commands_without_data_are_kept() {
    let _watchdog = watchdog();
    let rig = rig();
    let limits = |rig: &Rig| {
        let ns = rig.controller.namespace(1).unwrap();
        let l = *ns.limits();
        let discard = (
            l.deallocate_ranges,
            l.deallocate_blocks,
            l.deallocate_total_blocks,
        );
        (l.verify_blocks, l.zeroes_blocks, discard)
    };
    assert_eq!(limits(&rig), (65_536, 65_536, (256, u32::MAX, u64::MAX)));
    // VSL and WZSL are powers of two of the page, DMRL, DMRSL and DMSL counts.
    let mut identify = vec![2, 1, 0, 3];
    identify.extend(100u32.to_le_bytes());
    identify.extend(150u64.to_le_bytes());
    identify.resize(4096, 0);
    // The first page of a reset is the controller's, the second this one.
    let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(identify));
    rig.soft.faults().add(rule.namespace(0).after(1).times(1));
    rig.controller.reset().unwrap();
    assert_eq!(limits(&rig), (32, 16, (3, 100, 150)));
}

/// A namespace of a size that no device has is left out, so that the others can be used.
#[test]
fn a_size_that_no_device_has_is_not_used() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut identify = page(&rig.controller, Cns::NAMESPACE);
    // In blocks of 512 bytes: 1 EiB, and one block more.
    for (blocks, usable) in [
        (1u64 << 51, true),
        ((1 << 51) + 1, false),
        (u64::MAX, false),
    ] {
        identify[..8].copy_from_slice(&blocks.to_le_bytes());
        answer(&rig, identify.clone(), 0);
        rig.controller.rescan().unwrap();
        let ns = rig.controller.namespace(1).unwrap();
        assert_eq!(
            ns.unusable().is_none(),
            usable,
            "{blocks}: {:?}",
            ns.unusable()
        );
    }
}
