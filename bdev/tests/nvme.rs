//! The nvme module over the soft controller.

use std::sync::Arc;

use pumice_bdev::config::App;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, conformance, open};
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
