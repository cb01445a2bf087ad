//! Tests of the nvme module over the soft controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pumice_bdev::registry::{Registry, TimeoutAction};
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, DmaBuf, IoErrorKind, Op, SubmitError, open,
};
use pumice_bdev_control::config::App;
use pumice_nvme::controller::Phase;
use pumice_nvme::spec::{AdminOpcode, Cns, Command, IdentifyNamespace, IoOpcode, Status};
use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{
    Fault, FaultRule, MemoryBackend, SoftConfig, SoftController, SoftNamespace,
};
use serde_json::json;

#[test]
fn a_namespace_conforms() {
    pumice_bdev_testkit::conformance::run(&*open("soft://memory?size=8M").unwrap());
    pumice_bdev_testkit::conformance::run(
        &*open("soft://memory?size=8M&block_size=4096&write_cache=1&mdts=1").unwrap(),
    );
}

#[test]
fn few_queues_are_shared() {
    let dev = open("soft://memory?size=8M&queues=2").unwrap();
    pumice_bdev_testkit::conformance::run(&*dev);
    let channels: Vec<_> = (0..5)
        .map(|_| AsyncChannel::new(dev.open_channel().unwrap()))
        .collect();
    for (i, ch) in (0_u8..).zip(&channels) {
        let mut data = DmaBuf::new(512).unwrap();
        data.fill(i);
        ch.block_on(ch.write(u64::from(i), data.freeze(), false))
            .unwrap();
    }
    for (i, ch) in (0_u8..).zip(channels.iter().rev()) {
        let back = ch
            .block_on(ch.read(u64::from(i), DmaBuf::new(512).unwrap()))
            .unwrap();
        assert!(back.iter().all(|b| *b == i));
    }
}

/// The controller has one queue pair, so every channel shares it, including those of other
/// namespaces and of another opening of the controller.
#[test]
fn one_queue_pair_serves_every_channel() {
    let dev = open("soft://memory?size=8M&queues=1").unwrap();
    pumice_bdev_testkit::conformance::run(&*dev);
    let soft = SoftController::new({
        let disk = || SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
        let mut config = SoftConfig::new(vec![disk(), disk()]);
        config.queues = 1;
        config
    });
    let options = ControllerOptions::default();
    let controller = Controller::new(soft.unwrap().transport(), options).unwrap();
    let open = |base| {
        let all = controller.namespaces();
        pumice_bdev::nvme::devices(base, &controller, all, "soft://memory").unwrap()
    };
    let devices = [open("A"), open("B")].concat();
    let channels: Vec<_> = devices.iter().map(|d| d.open_channel().unwrap()).collect();
    assert_eq!(channels.len(), 4);
    for channel in channels {
        let channel = AsyncChannel::new(channel);
        let data = DmaBuf::copy_from(&[5; 512]).unwrap().freeze();
        channel.block_on(channel.write(1, data, false)).unwrap();
    }
}

/// Threads begin and end at the same time, and no thread's first operation fails.
#[test]
fn channels_come_and_go_in_threads() {
    for queues in [1, 2, 3, 16] {
        let dev = open(&format!("soft://memory?size=8M&queues={queues}")).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..150 {
                        let channel = AsyncChannel::new(dev.open_channel().unwrap());
                        let buf = DmaBuf::new(512).unwrap();
                        channel.block_on(channel.read(0, buf)).unwrap();
                    }
                });
            }
        });
    }
}

#[test]
fn the_write_cache_is_told() {
    for (options, cache) in [
        ("", false),
        ("&write_cache=1", true),
        ("&write_cache=0", false),
    ] {
        let dev = open(&format!("soft://memory?size=16M{options}")).unwrap();
        assert_eq!(dev.info().write_cache, cache, "{options}");
    }
}

/// Every operation with FUA, and every one followed by a flush, survives a power cut that loses the
/// whole cache.
#[test]
fn what_was_durable_survives_a_power_cut() {
    let fill = |byte: u8| {
        let mut buf = DmaBuf::new(512).unwrap();
        buf.fill(byte);
        buf.freeze()
    };
    let write = |lba, fua| Op::Write {
        lba,
        data: fill(2),
        fua,
    };
    let write_v = |lba, fua| Op::WriteV {
        lba,
        data: vec![fill(2), fill(2)],
        fua,
    };
    let zeroes = |lba, fua| Op::WriteZeroes {
        lba,
        len_blocks: 2,
        fua,
    };
    let ops: [&dyn Fn(u64, bool) -> Op; 3] = [&write, &write_v, &zeroes];
    for op in ops {
        for (fua, flush) in [(true, false), (false, true), (false, false)] {
            let backend = Box::new(MemoryBackend::new(1 << 20));
            let (soft, dev) = on_soft(SoftNamespace::new(backend, 512), true);
            assert!(dev.info().write_cache);
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            ch.block_on(async {
                for lba in 0..4 {
                    ch.write(lba, fill(1), false).await.unwrap();
                }
                ch.flush().await.unwrap();
                ch.io(op(1, fua)).await.1.unwrap();
                if flush {
                    ch.flush().await.unwrap();
                }
            });
            let name = op(1, fua).kind();
            let media = soft.power_cut(|_, _| false).remove(0);
            drop((ch, dev));
            let (_soft, dev) = on_soft(media, true);
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            let back = ch.block_on(ch.read(0, DmaBuf::new(2048).unwrap())).unwrap();
            assert_eq!(back[0], 1);
            let landed = back[512] != 1;
            assert_eq!(landed, fua || flush, "{name}, FUA {fua}, flush {flush}");
        }
    }
}

/// After a failed flush the next one fails too, on any channel, whether the channels share their queue pair or not.
#[test]
fn after_a_failed_flush_no_flush_succeeds() {
    for queues in [1, 4] {
        a_failed_flush_stays(queues);
    }
}

fn a_failed_flush_stays(queues: u16) {
    let status = Status(Status::INTERNAL.0 | Status::DNR);
    let backend = Box::new(MemoryBackend::new(1 << 20));
    let mut config = SoftConfig::new(vec![SoftNamespace::new(backend, 512)]);
    (config.write_cache, config.queues) = (true, queues);
    let (soft, dev) = on(config);
    soft.faults()
        .add(FaultRule::io(IoOpcode::FLUSH, Fault::Status(status)).times(1));
    let (a, b) = (
        AsyncChannel::new(dev.open_channel().unwrap()),
        AsyncChannel::new(dev.open_channel().unwrap()),
    );
    let buf = || DmaBuf::zeroed(512).unwrap().freeze();
    a.block_on(a.write(0, buf(), false)).unwrap();
    a.block_on(a.flush()).unwrap_err();
    for ch in [&a, &b] {
        let e = ch.block_on(ch.flush()).unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Media, "{e}");
        ch.block_on(ch.write(0, buf(), true)).unwrap_err();
        ch.block_on(ch.write(0, buf(), false)).unwrap();
        ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    }
}

#[test]
fn errors_of_the_driver_keep_their_kind_and_cause() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    for scheme in ["soft", "vfio-user"] {
        let uri = format!("{scheme}://{}", missing.display());
        let e = open(&uri).unwrap_err();
        assert!(
            matches!(&e, BdevError::NoSuchFile { path, .. } if path.starts_with(&missing)),
            "{uri}: {e:?}"
        );
        assert_eq!(e.errno(), libc::ENOENT);
        let text = e.to_string();
        assert_eq!(text.matches("/missing").count(), 1, "{text}");
    }
    // The server listens but does not answer.
    let socket = dir.path().join("cntrl");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let uri = format!("vfio-user://{}?timeout_ms=50", socket.display());
    let e = open(&uri).unwrap_err();
    let me = std::process::id();
    assert!(
        matches!(e, BdevError::InUse { pid: Some(pid), .. } if pid == me),
        "{e:?}"
    );
    assert_eq!(e.errno(), libc::EBUSY);
    let image = dir.path().join("image");
    let uri = format!("soft://{}?size=1M&create=1", image.display());
    let _first = open(&uri).unwrap();
    assert!(matches!(open(&uri), Err(BdevError::InUse { .. })));
    let mode = std::os::unix::fs::MetadataExt::mode(&image.metadata().unwrap());
    assert_eq!(mode & 0o777, 0o600);
    let e = open("soft://memory?size=1M&nsid=7").unwrap_err();
    assert!(std::error::Error::source(&e).is_some() || matches!(e, BdevError::Nvme { .. }));
    assert_eq!(e.errno(), libc::ENODEV);
    for uri in [
        "nvme://0000:ff:1f.7?timeout=5",
        "vfio-user:///run?tmeout_ms=5",
        "soft://memory?colour=red",
    ] {
        let e = open(uri).unwrap_err();
        assert!(matches!(e, BdevError::InvalidUri { .. }), "{uri}: {e:?}");
    }
}

#[test]
fn attach_names_every_namespace_and_detach_takes_them_away() {
    let app = App::new();
    let params =
        json!({ "name": "Nvme0", "trtype": "SOFT", "traddr": "memory?size=4M&namespaces=2" });
    let names = app.call("bdev_nvme_attach_controller", &params).unwrap();
    assert_eq!(names, json!(["Nvme0n1", "Nvme0n2"]));
    let e = app.registry.open("Nvme0").unwrap_err().to_string();
    assert_eq!(e, "there is no bdev `Nvme0`; did you mean `Nvme0n1`?");
    pumice_bdev_testkit::conformance::run(&*app.registry.open("Nvme0n2").unwrap());
    let list = app.call("bdev_nvme_get_controllers", &json!({})).unwrap();
    assert_eq!(list[0]["ctrlrs"][0]["state"], "enabled");
    let saved = app.config().to_string();
    app.call("bdev_nvme_detach_controller", &json!({ "name": "Nvme0" }))
        .unwrap();
    assert!(app.registry.names().is_empty());
    pumice_bdev_control::config::load(&app, "saved", &saved).unwrap();
    assert_eq!(app.registry.names(), ["Nvme0n1", "Nvme0n2"]);
    let e = app.call(
        "bdev_nvme_attach_controller",
        &json!({
        "name": "N", "trtype": "TCP", "traddr": "10.0.0.1" }),
    );
    assert!(e.unwrap_err().message.contains("`trtype`"));
}

#[test]
fn threads_share_a_device() {
    let dev: Arc<dyn BlockDevice> = open("soft://memory?size=8M&queues=3").unwrap();
    std::thread::scope(|scope| {
        for t in 0..6_u8 {
            let dev = &dev;
            scope.spawn(move || {
                let ch = AsyncChannel::new(dev.open_channel().unwrap());
                for i in 0..100 {
                    let lba = u64::from(t) * 100 + i;
                    let mut data = DmaBuf::new(512).unwrap();
                    data.fill(t);
                    ch.block_on(async {
                        ch.write(lba, data.freeze(), false).await.unwrap();
                        let back = ch.read(lba, DmaBuf::new(512).unwrap()).await.unwrap();
                        assert!(back.iter().all(|b| *b == t));
                    });
                }
            });
        }
    });
}

#[test]
fn an_unplugged_function_takes_its_device_away_under_load() {
    let backend = Box::new(MemoryBackend::new(4 << 20));
    let config = SoftConfig::new(vec![SoftNamespace::new(backend, 512)]);
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    let namespaces = controller.namespaces();
    let devices = pumice_bdev::nvme::devices("N", &controller, namespaces, "soft").unwrap();
    let registry = Registry::new();
    for device in devices {
        registry.register(device, Vec::new()).unwrap();
    }
    let dev = registry.open("Nn1").unwrap();
    let (submitted, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (submitted, ended) = (&submitted, &ended);
            let mut ch = dev.open_channel().unwrap();
            scope.spawn(move || {
                let (mut tag, mut gone, mut out) = (0, false, Vec::new());
                while !gone || ch.in_flight() > 0 {
                    while !gone && ch.in_flight() < 16 {
                        tag += 1;
                        let op = Op::Read {
                            lba: tag % 4000,
                            buf: DmaBuf::new(512).unwrap(),
                        };
                        match ch.submit(tag, op) {
                            Ok(()) => {
                                submitted.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(SubmitError::Busy(_)) => break,
                            Err(SubmitError::Refused(_, e)) => {
                                assert_eq!(e.kind, IoErrorKind::Removed, "{e}");
                                gone = true;
                            }
                        }
                    }
                    ch.poll(&mut out);
                    for c in out.drain(..) {
                        ended.fetch_add(1, Ordering::Relaxed);
                        gone |= c.result.is_err();
                    }
                    let _ = ch.wait(Duration::from_millis(1));
                }
            });
        }
        std::thread::sleep(Duration::from_millis(30));
        soft.unplug();
    });
    assert_eq!(
        submitted.load(Ordering::Relaxed),
        ended.load(Ordering::Relaxed)
    );
    assert!(registry.names().is_empty(), "the name is gone");
    registry.open("malloc://1M?name=Nn1").unwrap();
}

/// Makes a namespace on a soft controller whose faults the test sets.
fn soft() -> (SoftController, Arc<dyn BlockDevice>) {
    let backend = Box::new(MemoryBackend::new(4 << 20));
    on_soft(SoftNamespace::new(backend, 512), false)
}

fn on_soft(namespace: SoftNamespace, cache: bool) -> (SoftController, Arc<dyn BlockDevice>) {
    let mut config = SoftConfig::new(vec![namespace]);
    config.write_cache = cache;
    on(config)
}

fn on(config: SoftConfig) -> (SoftController, Arc<dyn BlockDevice>) {
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    let namespaces = controller.namespaces();
    let mut devices = pumice_bdev::nvme::devices("N", &controller, namespaces, "soft").unwrap();
    (soft, devices.remove(0))
}

/// An error of the controller names the device, and the controller behind it.
#[test]
fn an_error_names_the_device_and_its_controller() {
    for queues in [1, 4] {
        let backend = Box::new(MemoryBackend::new(1 << 20));
        let mut config = SoftConfig::new(vec![SoftNamespace::new(backend, 512)]);
        config.queues = queues;
        let (soft, dev) = on(config);
        let status = Status(Status::INTERNAL.0 | Status::DNR);
        soft.faults()
            .add(FaultRule::io(IoOpcode::READ, Fault::Status(status)).times(1));
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let e = ch.block_on(ch.read(0, DmaBuf::new(512).unwrap()));
        let e = e.unwrap_err();
        assert_eq!(e.device, dev.info().name);
        assert!(e.detail.starts_with("soft"), "{e:?}");
    }
}

#[test]
fn a_namespace_that_cannot_be_used_is_no_device() {
    let disk = || SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk(), disk()])).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    let identify = Command::identify(Cns::NAMESPACE, 1);
    let page = Some(DmaBuf::zeroed(4096).unwrap());
    let (_, page) = controller.admin_command(identify, page).unwrap();
    let mut page = page.unwrap().to_vec();
    let format = usize::from(page[std::mem::offset_of!(IdentifyNamespace, flbas)] & 15);
    page[std::mem::offset_of!(IdentifyNamespace, lbaf) + 4 * format] = 8; // MS
    let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(page));
    soft.faults().add(rule.namespace(1).times(1));
    controller.rescan().unwrap();
    let [bad, good] = [1, 2].map(|nsid| controller.namespace(nsid).unwrap());
    let all = vec![Arc::clone(&bad), good];
    let devices = pumice_bdev::nvme::devices("N", &controller, all, "soft").unwrap();
    let names: Vec<_> = devices.iter().map(|d| d.info().name.clone()).collect();
    assert_eq!(names, ["Nn2"]);
    let none = pumice_bdev::nvme::devices("N", &controller, vec![bad], "soft");
    let e = none.unwrap_err().to_string();
    assert!(e.contains("namespace 1: ") && e.contains("metadata"), "{e}");
    let none = pumice_bdev::nvme::devices("N", &controller, Vec::new(), "soft");
    let e = none.unwrap_err().to_string();
    assert!(e.contains("no active namespace"), "{e}");
}

#[test]
fn a_late_operation_is_aborted_at_the_controller() {
    let (soft, dev) = soft();
    let registry = Registry::new();
    registry.register(dev, Vec::new()).unwrap();
    soft.faults()
        .add(FaultRule::io(IoOpcode::READ, Fault::Delay(Duration::from_secs(600))).times(1));
    registry.set_timeout(Duration::from_millis(10), TimeoutAction::Abort);
    let ch = AsyncChannel::new(registry.open("Nn1").unwrap().open_channel().unwrap());
    let read = || ch.block_on(ch.read(0, DmaBuf::new(512).unwrap()));
    let e = read().unwrap_err();
    assert_eq!(e.kind, IoErrorKind::Aborted, "{e}");
    read().unwrap();
    assert_eq!(ch.in_flight(), 0);
}

/// An operation that meets a reset of the controller waits for its end.
#[test]
fn a_future_that_meets_a_reset_is_woken() {
    let mut config = SoftConfig::new(vec![SoftNamespace::new(
        Box::new(MemoryBackend::new(4 << 20)),
        512,
    )]);
    config.ready_delay = Duration::from_millis(100);
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    let namespaces = controller.namespaces();
    let dev = pumice_bdev::nvme::devices("N", &controller, namespaces, "soft").unwrap();
    let ch = AsyncChannel::new(dev[0].open_channel().unwrap());
    let resets = Arc::clone(&controller);
    let reset = thread::spawn(move || resets.reset());
    while controller.phase() == Phase::Live {
        thread::yield_now();
    }
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    reset.join().unwrap().unwrap();
}

#[test]
fn an_abort_of_one_leaves_the_others() {
    let (soft, dev) = soft();
    let mut ch = dev.open_channel().unwrap();
    soft.faults()
        .add(FaultRule::io(IoOpcode::WRITE, Fault::Delay(Duration::from_secs(600))).times(1));
    let write = |lba| Op::Write {
        lba,
        data: DmaBuf::zeroed(512).unwrap().freeze(),
        fua: false,
    };
    let read = |lba| Op::Read {
        lba,
        buf: DmaBuf::new(512).unwrap(),
    };
    ch.submit(7, write(1)).unwrap();
    ch.submit(8, read(2)).unwrap();
    let mut out = Vec::new();
    // The read that was submitted after the write has ended, so the controller has fetched the
    // write. A controller cannot abort a command that it has not fetched.
    while out.is_empty() {
        ch.poll(&mut out);
        ch.wait(Duration::from_millis(5)).unwrap();
    }
    ch.submit(9, Op::Abort { tag: 7 }).unwrap();
    ch.submit(10, Op::Abort { tag: 4711 }).unwrap();
    while out.len() < 4 {
        ch.poll(&mut out);
        ch.wait(Duration::from_millis(5)).unwrap();
    }
    for c in &out {
        match (c.tag, &c.result) {
            (7, Err(e)) => assert_eq!(e.kind, IoErrorKind::Aborted, "{e}"),
            (7, Ok(())) => panic!("the write was aborted"),
            (_, result) => assert!(result.is_ok(), "{result:?}"),
        }
    }
    assert_eq!(ch.in_flight(), 0);
}

#[test]
fn what_is_told_of_a_namespace_has_spdks_shape() {
    let app = App::new();
    let params = json!({ "name": "Nvme0", "trtype": "soft", "traddr": "memory?size=4M" });
    app.call("bdev_nvme_attach_controller", &params).unwrap();
    let bdevs = app.call("bdev_get_bdevs", &json!({ "name": "Nvme0n1" }));
    let specific = bdevs.unwrap()[0]["driver_specific"].clone();
    assert_eq!(specific["mp_policy"], "active_passive");
    let path = &specific["nvme"][0];
    let trid = json!({ "trtype": "SOFT", "traddr": "memory?size=4M" });
    assert_eq!(path["trid"], trid);
    assert_eq!(path["ns_data"], json!({ "id": 1, "can_share": false }));
    assert!(path["vs"]["nvme_version"].is_string());
    let data = &path["ctrlr_data"];
    for key in [
        "vendor_id",
        "model_number",
        "serial_number",
        "firmware_revision",
        "subnqn",
    ] {
        assert!(data[key].is_string(), "{key}: {data}");
    }
    for key in ["security", "format", "firmware", "ns_manage"] {
        assert!(data["oacs"][key].is_u64(), "{key}: {data}");
    }
    assert!(data["cntlid"].is_u64() && data["multi_ctrlr"].is_boolean());
    let list = app.call("bdev_nvme_get_controllers", &json!({})).unwrap();
    assert_eq!(list[0]["ctrlrs"][0]["trid"], trid);
    assert_eq!(list[0]["ctrlrs"][0]["cntlid"], data["cntlid"]);
}

/// Channels keep apart, with a queue pair of their own and with one for both: an abort is of its own channel's operation, and a reset
/// comes back after everything else.
#[test]
fn channels_keep_apart() {
    for queues in [1, 4] {
        let backend = Box::new(MemoryBackend::new(4 << 20));
        let mut config = SoftConfig::new(vec![SoftNamespace::new(backend, 512)]);
        config.queues = queues;
        let soft = SoftController::new(config).unwrap();
        let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
        let all = controller.namespaces();
        let dev = pumice_bdev::nvme::devices("N", &controller, all, "soft").unwrap();
        let (mut first, mut second) = (
            dev[0].open_channel().unwrap(),
            dev[0].open_channel().unwrap(),
        );
        let late = Fault::Delay(Duration::from_secs(600));
        soft.faults().add(FaultRule::io(IoOpcode::READ, late));
        let read = || Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).unwrap(),
        };
        first.submit(7, read()).unwrap();
        second.submit(7, read()).unwrap();
        let (mut of_first, mut of_second) = (Vec::new(), Vec::new());
        while soft.faults().struck() < 2 {
            first.poll(&mut of_first);
            second.poll(&mut of_second);
        }
        second.submit(8, Op::Abort { tag: 7 }).unwrap();
        while of_second.len() < 2 {
            second.poll(&mut of_second);
            first.poll(&mut of_first);
            assert!(of_first.is_empty(), "{of_first:?}");
        }
        of_second.sort_by_key(|done| done.tag);
        assert_eq!([of_second[0].tag, of_second[1].tag], [7, 8]);
        let aborted = of_second[0].result.as_ref().unwrap_err();
        assert_eq!(aborted.kind, IoErrorKind::Aborted);

        soft.faults().clear();
        first.submit(9, Op::Reset).unwrap();
        assert_eq!(first.in_flight(), 2);
        let busy = first.submit(10, read());
        assert!(matches!(busy, Err(SubmitError::Busy(_))), "{busy:?}");
        while first.in_flight() > 0 {
            first.poll(&mut of_first);
        }
        let tags: Vec<u64> = of_first.iter().map(|done| done.tag).collect();
        assert_eq!(tags, [7, 9]);
        assert!(
            of_first.iter().all(|done| done.result.is_ok()),
            "{of_first:?}"
        );
    }
}
