//! Tests of Identify, logs, features and refused commands.

use pumice_io::dma::DmaBuf;
use pumice_nvme::NvmeError;
use pumice_nvme::spec::{AdminOpcode, Cns, Command, FeatureId, LogPage, Status, ascii};

use super::{Bench, Entry, Outcome, check, fail, skip};

pub(super) const TESTS: &[Entry] = &[
    ("identify", identify),
    ("namespaces", namespaces),
    ("logs", logs),
    ("features", features),
    ("refused_admin_command", refused),
    ("admin_from_many_threads", threads),
    ("write_cache_switch", write_cache),
];

fn identify(b: &Bench) -> Outcome {
    let id = b.controller.identify()?;
    check(!ascii(&id.mn).is_empty(), || "no model number".into())?;
    check(id.sqes & 15 <= 6 && id.cqes & 15 <= 4, || {
        "entry sizes".into()
    })?;
    check(b.controller.transfer_bytes()? >= 4096, || {
        "transfer size".into()
    })?;
    check(b.controller.queue_limit() >= 1, || "no I/O queue".into())
}

fn namespaces(b: &Bench) -> Outcome {
    let first: Vec<u32> = b.controller.namespaces().iter().map(|n| n.nsid()).collect();
    check(!first.is_empty(), || "no namespace".into())?;
    check(first.is_sorted(), || "not in order".into())?;
    b.controller.rescan()?;
    let again: Vec<u32> = b.controller.namespaces().iter().map(|n| n.nsid()).collect();
    check(first == again, || format!("{first:?}, then {again:?}"))?;
    match b.controller.namespace(0xffff_fff0) {
        Err(NvmeError::NoNamespace { .. }) => Ok(()),
        other => fail(format!("a namespace that is not there: {other:?}")),
    }
}

fn logs(b: &Bench) -> Outcome {
    let smart = b.controller.smart_log()?;
    check(smart.available_spare <= 100, || "spare above 100 %".into())?;
    b.controller.error_log(8)?;
    b.controller.firmware_slots()?;
    Ok(())
}

fn features(b: &Bench) -> Outcome {
    let queues = b.controller.feature(FeatureId::NUMBER_OF_QUEUES, 0)?;
    check(queues & 0xffff != 0xffff, || "number of queues".into())?;
    let before = b.controller.feature(FeatureId::ARBITRATION, 0)?;
    let set = b
        .controller
        .set_feature(FeatureId::ARBITRATION, 0, before, false);
    match set {
        // A controller may have a fixed arbitration, as QEMU's does.
        Err(NvmeError::Status { status, .. })
            if status.code() == Status::FEATURE_NOT_CHANGEABLE =>
        {
            Ok(())
        }
        other => Ok(other.map(|_| ())?),
    }
}

fn refused(b: &Bench) -> Outcome {
    // CNS ffh is reserved.
    let command = Command::identify(Cns(0xff), 0);
    match b
        .controller
        .admin_command(command, Some(DmaBuf::zeroed(4096)?))
    {
        Err(NvmeError::Status { .. }) => {}
        Ok(_) => return fail("a reserved CNS value was accepted"),
        Err(other) => return Err(other.into()),
    }
    // A command that would delete the driver's queues is refused before it is sent.
    let command = Command::delete_queue(AdminOpcode::DELETE_SQ, 1);
    match b.controller.admin_command(command, None) {
        Err(NvmeError::Unsupported { .. }) => {}
        other => return fail(format!("deleting a queue: {other:?}")),
    }
    // Data that does not fit its buffer is refused too.
    let command = Command::get_log(LogPage::ERROR, u32::MAX, 0, 8192, true);
    match b
        .controller
        .admin_command(command, Some(DmaBuf::zeroed(512)?))
    {
        Err(NvmeError::Unsupported { .. }) => Ok(()),
        other => fail(format!("8 KiB into 512 bytes: {other:?}")),
    }
}

fn threads(b: &Bench) -> Outcome {
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..16 {
                        let id = b.controller.admin_command(
                            Command::identify(Cns::CONTROLLER, 0),
                            Some(DmaBuf::zeroed(4096).map_err(|e| e.to_string())?),
                        );
                        let (_, page) = id.map_err(|e| e.to_string())?;
                        if page.is_none_or(|p| p[24] == 0) {
                            return Err("an empty identify page".to_owned());
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| Err("panicked".into())))
            .collect()
    });
    match results.into_iter().find_map(Result::err) {
        None => Ok(()),
        Some(text) => fail(text),
    }
}

fn write_cache(b: &Bench) -> Outcome {
    if b.controller.identify()?.vwc & 1 == 0 {
        return skip("no volatile write cache");
    }
    let before = b.controller.write_cache();
    match b.controller.set_write_cache(!before) {
        Err(NvmeError::Status { status, .. }) => {
            return skip(format!("cannot be switched: {status}"));
        }
        other => other?,
    }
    let after = b.controller.write_cache();
    b.controller.set_write_cache(before)?;
    check(after != before, || "the switch did nothing".into())?;
    for ns in b.controller.namespaces() {
        check(ns.write_cache() == before, || {
            "namespaces do not follow".into()
        })?;
    }
    Ok(())
}
