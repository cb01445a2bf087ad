//! Tests of the registry: names, claims, statistics, time-outs, hot removal under load at every
//! layer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pumice_bdev::contents::{Overwrite, may_overwrite};
use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::malloc::{Malloc, MallocOptions};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::registry::{Event, Registry, TimeoutAction};
use pumice_bdev::split::Split;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, DeviceInfo, DmaBuf, IoErrorKind, Op, OpKind, OpenOptions,
    SubmitError,
};

fn malloc(registry: &Registry, name: &str) {
    let options = MallocOptions::default()
        .name(Some(name.to_owned()))
        .num_blocks(8192);
    registry
        .register(Arc::new(Malloc::new(&options).unwrap()), Vec::new())
        .unwrap();
}

fn claim(registry: &Registry, name: &str, by: &str) -> Arc<dyn BlockDevice> {
    Arc::new(registry.claim(name, by).unwrap())
}

#[test]
fn a_registered_device_conforms() {
    let registry = Registry::new();
    malloc(&registry, "M");
    pumice_bdev_testkit::conformance::run(&*registry.open("M").unwrap());
}

#[test]
fn names_aliases_uuids_uris() {
    let registry = Registry::new();
    let e = registry.open("M").unwrap_err().to_string();
    assert_eq!(
        e,
        "there is no bdev `M`: no bdevs configured: pass --json or a URI"
    );
    malloc(&registry, "Malloc0");
    let dev = registry.open("Malloc0").unwrap();
    let uuid = pumice_bdev::uuid::format(&dev.info().uuid);
    assert_eq!(registry.open(&uuid).unwrap().info().name, "Malloc0");
    let e = registry.open("Malloc").unwrap_err().to_string();
    assert_eq!(e, "there is no bdev `Malloc`; did you mean `Malloc0`?");
    let other = registry.open("malloc://1M?name=Other").unwrap();
    assert_eq!(other.info().name, "Other");
    assert!(matches!(
        registry.open("malloc://1M?name=Other"),
        Err(BdevError::Exists { .. })
    ));
    assert_eq!(registry.names(), ["Malloc0", "Other"]);
}

/// A new image whose device finds its name taken is not left behind.
#[test]
fn a_name_that_is_taken_leaves_no_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image");
    let uri = pumice_bdev::file_uri(&image);
    let registry = Registry::new();
    malloc(&registry, "M");
    let taken = registry.open(&format!("{uri}?size=1M&create=1&name=M"));
    assert!(matches!(taken, Err(BdevError::Exists { .. })), "{taken:?}");
    drop(taken);
    assert!(!image.exists());
    // An image that was there stays.
    std::fs::write(&image, [7; 4096]).unwrap();
    assert!(registry.open(&format!("{uri}?name=M")).is_err());
    assert_eq!(std::fs::read(&image).unwrap(), [7; 4096]);
}

/// A registered device that is opened for reading is written by nobody who has only that.
#[test]
fn a_view_for_reading_changes_nothing() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let all = AsyncChannel::new(registry.open("M").unwrap().open_channel().unwrap());
    let data = |byte| DmaBuf::copy_from(&[byte; 512]).unwrap().freeze();
    all.block_on(all.write(3, data(7), false)).unwrap();
    let view = registry.open_with("M", OpenOptions::new().read_only(true));
    let view = view.unwrap();
    let refused = may_overwrite(&*view, Overwrite::Anything);
    assert!(matches!(refused, Err(BdevError::Unsupported { .. })));
    let ch = AsyncChannel::new(view.open_channel().unwrap());
    let (lba, fua) = (3, false);
    let (src_lba, dst_lba, len_blocks) = (0, 3, 1);
    for op in [
        Op::Write {
            lba,
            data: data(9),
            fua,
        },
        Op::WriteV {
            lba,
            data: vec![data(9)],
            fua,
        },
        Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        },
        Op::Unmap { lba, len_blocks },
        Op::Copy {
            src_lba,
            dst_lba,
            len_blocks,
        },
    ] {
        let (op, result) = ch.block_on(ch.io(op));
        let e = result.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Unsupported, "{op:?}");
    }
    let back = ch.block_on(ch.read(3, DmaBuf::new(512).unwrap())).unwrap();
    assert_eq!(back[..], [7; 512]);
}

/// A device keeps its alias for itself, and none is built on one that has gone.
#[test]
fn what_cannot_be_registered_is_not() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let named = |name: &str, alias: Option<&str>| {
        let base = pumice_bdev::open("malloc://1M").unwrap();
        let mut info = DeviceInfo::new(name, "test", 512, base.info().num_blocks);
        info.aliases.extend(alias.map(ToOwned::to_owned));
        Arc::new(Named(info, base))
    };
    let exists = |dev, name: &str| {
        let e = registry.register(dev, Vec::new()).unwrap_err();
        assert!(
            matches!(&e, BdevError::Exists { name: n } if n == name),
            "{e}"
        );
    };
    exists(named("A", Some("M")), "M");
    registry.register(named("A", Some("a")), vec![]).unwrap();
    exists(named("a", None), "a");
    exists(named("B", Some("a")), "a");
    registry.remove("M").unwrap();
    let on_it = registry.register(named("B", None), vec!["M".to_owned()]);
    assert!(matches!(on_it, Err(BdevError::Removed { name }) if name == "M"));
    assert_eq!(registry.names(), ["A"]);
}

/// A device with a description of its own.
#[derive(Debug)]
struct Named(DeviceInfo, Arc<dyn BlockDevice>);

impl BlockDevice for Named {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_channel(&self) -> Result<Box<dyn pumice_bdev::IoChannel>, BdevError> {
        self.1.open_channel()
    }
}

#[test]
fn a_claim_excludes_and_ends() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let claim = registry.claim("M", "passthru PT").unwrap();
    let e = registry.open("M").unwrap_err().to_string();
    assert_eq!(e, "bdev `M` is claimed by passthru PT");
    assert!(registry.claim("M", "x").is_err());
    assert_eq!(
        registry.get("M").unwrap().claimed_by().as_deref(),
        Some("passthru PT")
    );
    drop(claim);
    registry.open("M").unwrap();
}

/// A device that shows the blocks of another one is that device for those who have to know whether
/// it is in use; a part of it is not.
#[test]
fn a_view_of_a_device_is_that_device() {
    let base = pumice_bdev::open("malloc://9M").unwrap();
    let views: [Arc<dyn BlockDevice>; 3] = [
        Arc::new(Passthru::new("PT", Arc::clone(&base))),
        Arc::new(Delay::new("D", Arc::clone(&base), Latencies::default())),
        Arc::new(ErrorDevice::new(None, Arc::clone(&base))),
    ];
    for view in &views {
        assert_eq!(view.identity(), base.identity(), "{}", view.info().name);
        let upper = Passthru::new("upper", Arc::clone(view));
        assert_eq!(upper.identity(), base.identity(), "{}", view.info().name);
    }
    let parts = Split::new(&base, 3, None).unwrap();
    let mut seen = vec![base.identity()];
    for part in &parts {
        assert!(!seen.contains(&part.identity()), "{}", part.info().name);
        seen.push(part.identity());
    }
}

#[test]
fn statistics_count() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let bdev = registry.get("M").unwrap();
    bdev.enable_histogram(true, None);
    let ch = AsyncChannel::new(bdev.open_channel().unwrap());
    ch.block_on(async {
        for i in 0..10 {
            ch.write(i, DmaBuf::zeroed(512).unwrap().freeze(), false)
                .await
                .unwrap();
        }
        ch.read(0, DmaBuf::new(4096).unwrap()).await.unwrap();
    });
    let writes = *bdev.stats().of(OpKind::Write);
    assert_eq!((writes.ops, writes.bytes, writes.errors), (10, 5120, 0));
    assert!(writes.min_latency_ticks <= writes.max_latency_ticks && writes.latency_ticks > 0);
    assert_eq!(bdev.channel_stats().len(), 1);
    assert_eq!(bdev.histogram().unwrap().iter().sum::<u64>(), 11);
    drop(ch);
    assert_eq!(bdev.channel_stats().len(), 0);
    assert_eq!(bdev.stats().of(OpKind::Read).bytes, 4096);
    assert_eq!(bdev.histogram().unwrap().iter().sum::<u64>(), 11);
    bdev.reset_stats();
    assert_eq!(bdev.stats().of(OpKind::Read).ops, 0);
    assert_eq!(bdev.stats().of(OpKind::Read).max_latency_ticks, 0);
}

#[test]
fn queues_say_what_is_in_flight_and_whose_they_are() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let bdev = registry.get("M").unwrap();
    assert_eq!(bdev.queues(), []);
    let opener = std::thread::Builder::new().name("opener".to_owned());
    let mut ch = std::thread::scope(|scope| {
        let opened = opener.spawn_scoped(scope, || bdev.open_channel().unwrap());
        opened.unwrap().join().unwrap()
    });
    let in_flight = || {
        let queues = bdev.queues();
        assert_eq!((queues.len(), &queues[0].opened_by[..]), (1, "opener"));
        queues[0].in_flight
    };
    assert_eq!(in_flight(), 0);
    for tag in 0..3 {
        let buf = DmaBuf::new(512).unwrap();
        let op = pumice_bdev::Op::Read { lba: tag, buf };
        ch.submit(tag, op).unwrap();
        assert_eq!(in_flight(), tag + 1);
    }
    let mut ended = Vec::new();
    while ended.len() < 3 {
        ch.poll(&mut ended);
        assert_eq!(in_flight(), 3 - ended.len() as u64);
    }
    drop(ch);
    assert_eq!(bdev.queues(), []);
}

#[test]
fn histograms_by_channel_and_by_kind() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let bdev = registry.get("M").unwrap();
    assert!(bdev.histogram().is_none() && bdev.channel_histograms().is_empty());
    let open = || AsyncChannel::new(bdev.open_channel().unwrap());
    let (a, b) = (open(), open());
    let read = |ch: &AsyncChannel| ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    let write = |ch: &AsyncChannel| {
        let data = DmaBuf::zeroed(512).unwrap().freeze();
        ch.block_on(ch.write(0, data, false)).unwrap();
    };
    let counts = || -> Vec<u64> {
        let all = bdev.channel_histograms();
        all.iter().map(|(_, h)| h.iter().sum()).collect()
    };
    bdev.enable_histogram(true, None);
    read(&a);
    write(&a);
    read(&b);
    assert_eq!(counts(), [2, 1]);
    let ids: Vec<u64> = bdev
        .channel_histograms()
        .iter()
        .map(|(id, _)| *id)
        .collect();
    let of_stats: Vec<u64> = bdev.channel_stats().iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, of_stats);
    // One kind only, starting from an empty histogram.
    bdev.enable_histogram(true, Some(OpKind::Write));
    read(&a);
    write(&b);
    assert_eq!(counts(), [0, 1]);
    drop(b);
    assert_eq!(bdev.histogram().unwrap().iter().sum::<u64>(), 1);
    bdev.enable_histogram(false, None);
    bdev.enable_histogram(true, None);
    assert_eq!(bdev.histogram().unwrap().iter().sum::<u64>(), 0);
}

#[test]
fn a_listener_may_use_the_registry() {
    let registry = Registry::new();
    let (inner, names) = (registry.clone(), Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&names);
    registry.listen(move |event| {
        if let Event::Removed(name) = event {
            seen.lock().unwrap().push(inner.names());
            // A spare device takes the name.
            if name == "M" {
                malloc(&inner, "Spare");
            }
        }
    });
    malloc(&registry, "M");
    registry.remove("M").unwrap();
    assert_eq!(registry.names(), ["Spare"]);
    assert_eq!(*names.lock().unwrap(), [Vec::<String>::new()]);
}

#[test]
fn late_operations_are_aborted_or_reset() {
    for action in [TimeoutAction::Abort, TimeoutAction::Reset] {
        let registry = Registry::new();
        malloc(&registry, "M");
        let error = Arc::new(ErrorDevice::new(None, claim(&registry, "M", "error")));
        registry
            .register(Arc::clone(&error) as Arc<dyn BlockDevice>, vec!["M".into()])
            .unwrap();
        registry.set_timeout(Duration::from_millis(5), action);
        error.inject(Injection::new(Failure::Hang));
        let ch = AsyncChannel::new(registry.open("EE_M").unwrap().open_channel().unwrap());
        let e = ch
            .block_on(ch.read(0, DmaBuf::new(512).unwrap()))
            .unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Aborted, "{action:?}: {e}");
        ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
        assert_eq!(ch.in_flight(), 0);
    }
}

/// Makes delay D on raid0 R on error devices E0, E1 on passthru P0, P1 on malloc M0, M1.
fn tower(registry: &Registry) -> Vec<Arc<ErrorDevice>> {
    let mut errors = Vec::new();
    for i in 0..2 {
        let [m, p, e] = ["M", "P", "E"].map(|n| format!("{n}{i}"));
        malloc(registry, &m);
        let pt = Passthru::new(&p, claim(registry, &m, &p));
        registry.register(Arc::new(pt), vec![m]).unwrap();
        let error = Arc::new(ErrorDevice::new(Some(&e), claim(registry, &p, &e)));
        registry
            .register(Arc::clone(&error) as Arc<dyn BlockDevice>, vec![p])
            .unwrap();
        errors.push(error);
    }
    let legs = vec![claim(registry, "E0", "R"), claim(registry, "E1", "R")];
    let raid = Raid0::new("R", legs, 4, None).unwrap();
    registry
        .register(Arc::new(raid), vec!["E0".into(), "E1".into()])
        .unwrap();
    let slow = Latencies::default().avg_read_us(50).p99_read_us(500);
    let delay = Delay::new("D", claim(registry, "R", "D"), slow);
    registry
        .register(Arc::new(delay), vec!["R".into()])
        .unwrap();
    errors
}

#[test]
fn removal_under_load_at_every_layer() {
    for (victim, order) in [
        ("D", &["D"][..]),
        ("R", &["D", "R"]),
        ("E0", &["D", "R", "E0"]),
        ("P1", &["D", "R", "E1", "P1"]),
        ("M0", &["D", "R", "E0", "P0", "M0"]),
    ] {
        let registry = Registry::new();
        let errors = tower(&registry);
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        registry.listen(move |e| heard.lock().unwrap().push(e.clone()));
        // Some operations hang below, and the removal must end them too.
        for error in &errors {
            error.inject(
                Injection::new(Failure::Hang)
                    .op(Some(OpKind::Read))
                    .count(3)
                    .queue_depth(4),
            );
        }
        let dev = registry.open("D").unwrap();
        let (submitted, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for t in 0..2_u64 {
                let (submitted, ended, started) = (&submitted, &ended, &started);
                let mut ch = dev.open_channel().unwrap();
                scope.spawn(move || {
                    let mut out = Vec::new();
                    let (mut tag, mut refused) = (0, false);
                    while !refused || ch.in_flight() > 0 {
                        while !refused && ch.in_flight() < 16 {
                            tag += 1;
                            let lba = (tag * 7 + t) % 4000;
                            let op = Op::Read {
                                lba,
                                buf: DmaBuf::new(1024).unwrap(),
                            };
                            match ch.submit(tag, op) {
                                Ok(()) => {
                                    submitted.fetch_add(1, Ordering::Relaxed);
                                }
                                Err(SubmitError::Busy(_)) => break,
                                Err(SubmitError::Refused(_, e)) => {
                                    assert_eq!(e.kind, IoErrorKind::Removed, "{e}");
                                    refused = true;
                                }
                            }
                        }
                        ch.poll(&mut out);
                        ended.fetch_add(out.len() as u64, Ordering::Relaxed);
                        if !out.is_empty() {
                            started.store(true, Ordering::Relaxed);
                        }
                        out.clear();
                        ch.wait(Duration::from_millis(1)).unwrap();
                    }
                });
            }
            while !started.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(registry.remove(victim).unwrap(), order, "{victim}");
        });
        assert_eq!(
            submitted.load(Ordering::Relaxed),
            ended.load(Ordering::Relaxed),
            "{victim}"
        );
        let events: Vec<_> = events.lock().unwrap().clone();
        let removed: Vec<_> = order
            .iter()
            .map(|n| Event::Removed((*n).to_owned()))
            .collect();
        assert_eq!(events, removed);
        // The devices below are free again, and a new device can have the name.
        drop(dev);
        malloc(&registry, victim);
        registry.open(victim).unwrap();
    }
}

#[test]
fn a_removed_device_refuses_politely() {
    let registry = Registry::new();
    malloc(&registry, "M");
    let dev = registry.open("M").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    registry.remove("M").unwrap();
    let e = ch
        .block_on(ch.read(0, DmaBuf::new(512).unwrap()))
        .unwrap_err();
    assert_eq!(
        e.to_string(),
        "M: read of 512 bytes at LBA 0 (byte offset 0): device removed"
    );
    assert!(matches!(dev.open_channel(), Err(BdevError::Removed { .. })));
    assert!(matches!(
        registry.remove("M"),
        Err(BdevError::NotFound { .. })
    ));
}

#[test]
fn two_devices_with_one_uuid() {
    let registry = Registry::new();
    let device = |name: &str| {
        let options = MallocOptions::default()
            .name(Some(name.to_owned()))
            .num_blocks(8)
            .uuid(Some([7; 16]));
        Arc::new(Malloc::new(&options).unwrap())
    };
    registry.register(device("A"), Vec::new()).unwrap();
    let e = registry.register(device("B"), Vec::new()).unwrap_err();
    assert!(matches!(e, BdevError::Exists { .. }), "{e}");
    assert_eq!(registry.names(), ["A"]);
    registry.remove("A").unwrap();
    registry.register(device("B"), Vec::new()).unwrap();
}
