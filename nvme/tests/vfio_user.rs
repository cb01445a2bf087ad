//! The driver over a vfio-user socket, against a soft controller on the other end of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_nvme::conformance::{self, Verdict};
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::queue::QueueStats;
use pumice_nvme::soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace, SoftServer};
use pumice_nvme::transport::{NvmeUri, TransportError, VfioUser};
use pumice_nvme::{
    Controller, ControllerEvent, ControllerOptions, Io, IoDone, QueueOptions, QueuePair, open_with,
};

/// How long something may take that has to come, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(120);

struct Target {
    dir: tempfile::TempDir,
    soft: SoftController,
    server: Option<SoftServer>,
}

fn target() -> Target {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(16 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk]).served()).expect("a controller");
    let server = SoftServer::start(soft.clone(), &dir.path().join("cntrl")).expect("served");
    Target {
        dir,
        soft,
        server: Some(server),
    }
}

impl Target {
    fn path(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }

    fn connect(&self) -> Arc<Controller> {
        let device = VfioUser::connect(&self.path(), PATIENCE).expect("connected");
        Controller::new(device, ControllerOptions::default()).expect("enabled")
    }
}

fn run(queue: &mut QueuePair, controller: &Controller, ios: Vec<Io>) -> Vec<IoDone> {
    let ns = controller.namespace(1).expect("a namespace");
    let total = ios.len();
    for (tag, io) in (0..).zip(ios) {
        queue.submit(&ns, tag, io).expect("accepted");
    }
    let mut done = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while done.len() < total {
        assert!(
            Instant::now() < deadline,
            "{} of {total} I/Os are left",
            total - done.len()
        );
        if queue.poll(&mut done) == 0 {
            queue
                .wait(Duration::from_millis(200))
                .expect("the device is there");
        }
    }
    done.sort_by_key(|d| d.tag);
    done
}

fn write_and_read(controller: &Arc<Controller>, options: &QueueOptions, seed: u8) -> QueueStats {
    let mut queue = controller.queue_pair(options).expect("a queue");
    let sizes = [512usize, 4096, 8192, 65536, 131_072, 300_032];
    let (mut lba, mut writes, mut reads) = (0, Vec::new(), Vec::new());
    for (n, len) in (seed..).zip(sizes) {
        let mut buf = DmaBuf::new(len).expect("memory");
        buf.iter_mut()
            .zip(0u32..)
            .for_each(|(b, i)| *b = n ^ i.to_le_bytes()[0] ^ i.to_le_bytes()[1]);
        writes.push(Io::Write {
            lba,
            data: buf.freeze(),
            fua: false,
        });
        reads.push(Io::Read {
            lba,
            buf: DmaBuf::zeroed(len).expect("memory"),
        });
        lba += len as u64 / 512;
    }
    for done in run(&mut queue, controller, writes) {
        done.result.expect("written");
    }
    run(&mut queue, controller, vec![Io::Flush])
        .remove(0)
        .result
        .expect("flushed");
    for (done, n) in run(&mut queue, controller, reads).into_iter().zip(seed..) {
        done.result.expect("read");
        let Io::Read { buf, .. } = done.io else {
            panic!("another I/O came back");
        };
        let good = buf
            .iter()
            .zip(0u32..)
            .all(|(b, i)| *b == n ^ i.to_le_bytes()[0] ^ i.to_le_bytes()[1]);
        assert!(good, "{} bytes differ", buf.len());
    }
    queue.stats()
}

#[test]
fn one_client_after_another() {
    let target = target();
    for seed in [1, 50, 90] {
        let controller = target.connect();
        assert!(controller.interrupt_count() > 1);
        write_and_read(&controller, &QueueOptions::default(), seed);
        controller.shutdown().expect("shut down");
    }
    assert!(target.soft.stats().commands > 30);
}

#[test]
fn sleeping_on_interrupts() {
    let target = target();
    let controller = target.connect();
    let mut options = QueueOptions::depth(8);
    options.spin_max = Duration::ZERO;
    // On a busy machine an I/O may be over before its owner sleeps.
    let woken = (0..200u8).any(|n| write_and_read(&controller, &options, n).interrupts > 0);
    assert!(woken, "no interrupt ended a sleep");
}

#[test]
fn reset_between_ios() {
    let target = target();
    let controller = target.connect();
    for seed in 1..4 {
        write_and_read(&controller, &QueueOptions::default(), seed);
        controller.reset().expect("reset");
    }
    write_and_read(&controller, &QueueOptions::default(), 9);
}

#[test]
fn a_second_client_is_told_who_holds_the_socket() {
    let target = target();
    let first = target.connect();
    let error = VfioUser::connect(&target.path(), PATIENCE).expect_err("held");
    assert!(matches!(error, TransportError::InUse { .. }), "{error}");
    assert!(
        error.to_string().contains("one client at a time"),
        "{error}"
    );
    write_and_read(&first, &QueueOptions::default(), 7);
    first.shutdown().expect("shut down");
    drop(first);
    write_and_read(&target.connect(), &QueueOptions::default(), 8);
}

#[test]
fn the_target_goes_away() {
    let mut target = target();
    let controller = target.connect();
    let mut queue = controller
        .queue_pair(&QueueOptions::default())
        .expect("a queue");
    target.server.take();
    let deadline = Instant::now() + PATIENCE;
    let ns = controller.namespace(1).expect("known");
    let mut done = Vec::new();
    loop {
        let io = Io::Read {
            lba: 0,
            buf: DmaBuf::new(512).expect("memory"),
        };
        if queue.submit(&ns, 0, io).is_err() && queue.in_flight() == 0 {
            break;
        }
        queue.poll(&mut done);
        let _ = queue.wait(Duration::from_millis(10));
        assert!(Instant::now() < deadline, "the driver does not notice");
    }
    let events = controller.take_events();
    assert!(
        events.iter().any(|e| matches!(e, ControllerEvent::Removed)),
        "{events:?}"
    );
}

#[test]
fn by_uri() {
    let target = target();
    let uri = format!("vfio-user://{}?nsid=1", target.path().display());
    assert_eq!(NvmeUri::parse(&uri).expect("a URI").nsid, Some(1));
    let opened = pumice_nvme::open(&uri).expect("opened");
    assert_eq!(opened.namespace().expect("there").block_size(), 512);
}

/// The same suite as on every other transport.
#[test]
fn the_suite() {
    let target = target();
    let uri = format!("vfio-user://{}", target.path().display());
    let open = |options| open_with(&uri, options).map(|o| o.controller);
    let mut failures = Vec::new();
    let summary = conformance::run(&open, "default/", 1, &mut |name, verdict, _: Duration| {
        if let Verdict::Failed(what) = verdict {
            failures.push(format!("{name}: {what}"));
        }
    });
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(summary.passed > 20, "{summary:?}");
}

#[test]
fn a_socket_that_is_served_is_not_taken() {
    let target = target();
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
    let plain = SoftController::new(SoftConfig::new(vec![])).expect("a controller");
    let other = target.path().join("other");
    assert!(
        SoftServer::start(plain, &other).is_err(),
        "not made to be served"
    );
    let soft = SoftController::new(SoftConfig::new(vec![disk]).served()).expect("a controller");
    let error = SoftServer::start(soft.clone(), &target.path().join("cntrl")).expect_err("served");
    assert!(matches!(error, TransportError::InUse { .. }), "{error}");
    // One that was left behind is replaced.
    drop(std::os::unix::net::UnixListener::bind(&other).expect("bound"));
    SoftServer::start(soft, &other).expect("replaced");
}
