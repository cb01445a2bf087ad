//! The nvme module over the soft controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pumice_bdev::config::App;
use pumice_bdev::registry::Registry;
use pumice_bdev::{
    AsyncChannel, BlockDevice, DmaBuf, IoErrorKind, Op, SubmitError, conformance, open,
};
use pumice_nvme::soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};
use pumice_nvme::{Controller, ControllerOptions};
use serde_json::json;

#[test]
fn a_namespace_conforms() {
    conformance::run(&*open("soft://memory?size=8M").unwrap());
    conformance::run(&*open("soft://memory?size=8M&block_size=4096&write_cache=1&mdts=1").unwrap());
}

#[test]
fn few_queues_are_shared() {
    let dev = open("soft://memory?size=8M&queues=2").unwrap();
    conformance::run(&*dev);
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

#[test]
fn attach_names_every_namespace_and_detach_takes_them_away() {
    let app = App::new();
    let params =
        json!({ "name": "Nvme0", "trtype": "SOFT", "traddr": "memory?size=4M&namespaces=2" });
    let names = app.call("bdev_nvme_attach_controller", &params).unwrap();
    assert_eq!(names, json!(["Nvme0n1", "Nvme0n2"]));
    let e = app.registry.open("Nvme0").unwrap_err().to_string();
    assert_eq!(e, "no bdev `Nvme0`; did you mean `Nvme0n1`?");
    conformance::run(&*app.registry.open("Nvme0n2").unwrap());
    let list = app.call("bdev_nvme_get_controllers", &json!({})).unwrap();
    assert_eq!(list[0]["ctrlrs"][0]["state"], "enabled");
    let saved = app.config().to_string();
    app.call("bdev_nvme_detach_controller", &json!({ "name": "Nvme0" }))
        .unwrap();
    assert!(app.registry.names().is_empty());
    pumice_bdev::config::load(&app, "saved", &saved).unwrap();
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
