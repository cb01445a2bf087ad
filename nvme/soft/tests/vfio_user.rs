//! Tests of the driver over a vfio-user socket, against a soft controller behind it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::queue::QueueStats;
use pumice_nvme::spec::IoOpcode;
use pumice_nvme::transport::{NvmeUri, OpenTransport, TransportError, open_transport};
use pumice_nvme::{
    Completion, Controller, ControllerEvent, ControllerOptions, Op, QueueOptions, QueuePair,
    open_with,
};
use pumice_nvme_soft::conformance::{self, Verdict};
use pumice_nvme_soft::{
    Fault, FaultRule, MemoryBackend, SoftConfig, SoftController, SoftNamespace, SoftServer,
};

/// Longest wait for an event that must come, however slow the machine is.
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

    fn open(&self) -> Result<OpenTransport, TransportError> {
        let uri = format!("vfio-user://{}?timeout_ms=120000", self.path().display());
        open_transport(&NvmeUri::parse(&uri)?)
    }

    fn connect(&self) -> Arc<Controller> {
        let device = self.open().expect("connected");
        Controller::new(device, ControllerOptions::default()).expect("enabled")
    }
}

fn run(queue: &mut QueuePair, controller: &Controller, ios: Vec<Op>) -> Vec<Completion> {
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
        writes.push(Op::Write {
            lba,
            data: buf.freeze(),
            fua: false,
        });
        reads.push(Op::Read {
            lba,
            buf: DmaBuf::zeroed(len).expect("memory"),
        });
        lba += len as u64 / 512;
    }
    for done in run(&mut queue, controller, writes) {
        done.result.expect("written");
    }
    run(&mut queue, controller, vec![Op::Flush])
        .remove(0)
        .result
        .expect("flushed");
    for (done, n) in run(&mut queue, controller, reads).into_iter().zip(seed..) {
        done.result.expect("read");
        let Op::Read { buf, .. } = done.op else {
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
    let mut options = QueueOptions::default().depth(8);
    options.spin_max = Duration::ZERO;
    // On a busy machine an I/O may end before its owner sleeps.
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
    let error = target.open().expect_err("held");
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
        let io = Op::Read {
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
    // A socket that an ended process left behind is replaced.
    drop(std::os::unix::net::UnixListener::bind(&other).expect("bound"));
    SoftServer::start(soft, &other).expect("replaced");
}

/// The file could be an image, for example.
#[test]
fn what_is_not_a_socket_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("disk.img");
    std::fs::write(&file, "important").expect("written");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    for path in [&file, &link] {
        let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
        let soft = SoftController::new(SoftConfig::new(vec![disk]).served()).expect("made");
        let error = SoftServer::start(soft, path)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("nothing was changed"), "{error}");
    }
    assert_eq!(std::fs::read(&file).expect("there"), b"important");
    assert!(link.is_symlink());
    assert_eq!(dir.path().read_dir().expect("listed").count(), 2);
}

/// No other user can connect to the controller, whatever the umask.
#[test]
fn the_socket_is_its_owners() {
    use std::os::unix::fs::PermissionsExt;
    let target = target();
    let mode = target
        .path()
        .join("cntrl")
        .metadata()
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(target.path().read_dir().expect("listed").count(), 1);
}

#[test]
fn two_spellings_are_one_controller() {
    let target = target();
    let path = target.path().display().to_string();
    let first = pumice_nvme::open(&format!("vfio-user://{path}")).expect("opened");
    for spelling in [
        format!("{path}/cntrl"),
        format!(
            "{path}/../{}/cntrl",
            target.path().file_name().unwrap().display()
        ),
    ] {
        let again = pumice_nvme::open(&format!("vfio-user://{spelling}")).expect("opened");
        assert!(
            Arc::ptr_eq(&first.controller, &again.controller),
            "{spelling}"
        );
    }
    let unknown = pumice_nvme::open(&format!("vfio-user://{path}?tmeout_ms=5"));
    let error = unknown.map(|_| ()).expect_err("an unknown parameter");
    assert!(error.to_string().contains("tmeout_ms"), "{error}");
}

/// A target in a process of its own, which can be stopped.
struct Stopped {
    child: std::process::Child,
    dir: tempfile::TempDir,
}

impl Stopped {
    fn start() -> Stopped {
        let dir = tempfile::tempdir().expect("a directory");
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_nvme-soft-target"))
            .args([dir.path().as_os_str(), "soft://memory?size=16M".as_ref()])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("started");
        let stopped = Stopped { child, dir };
        let deadline = Instant::now() + PATIENCE;
        while !stopped.dir.path().join("cntrl").exists() {
            assert!(Instant::now() < deadline, "no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        stopped
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let done = std::process::Command::new("kill")
            .args([name, &pid])
            .status();
        assert!(done.expect("kill").success());
        if name == "-STOP" {
            let start = Instant::now();
            while !self.is_stopped() {
                assert!(start.elapsed() < PATIENCE, "it does not stop");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Whether no thread of it runs any longer.
    fn is_stopped(&self) -> bool {
        let tasks = format!("/proc/{}/task", self.child.id());
        let tasks = std::fs::read_dir(tasks).expect("it lives");
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // The state stands behind the name, which is in brackets.
            let state = stat
                .rsplit_once(") ")
                .map(|(_, rest)| rest.starts_with('T'));
            state.unwrap_or(false)
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal("-CONT");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stopped controller carries out reads after the driver has given up on it. They write to its
/// own memory, whatever the caller does with the buffers meanwhile, and other users of the arena
/// can still take memory.
#[test]
fn a_stopped_controller_changes_no_buffer_that_came_back() {
    for round in 0..4 {
        let target = Stopped::start();
        let uri = format!("vfio-user://{}?timeout_ms=200", target.dir.path().display());
        let opened = pumice_nvme::open(&uri).expect("opened");
        let ns = opened.namespace().expect("one");
        let mut options = QueueOptions::default().depth(64);
        options.timeout = Duration::from_millis(100);
        options.max_retries = 0;
        let mut queue = opened.controller.queue_pair(&options).expect("a queue");
        let mut data = DmaBuf::new(1 << 20).expect("memory");
        data.fill(0x5a);
        let write = Op::Write {
            lba: 0,
            data: data.freeze(),
            fua: false,
        };
        run(&mut queue, &opened.controller, vec![write])
            .remove(0)
            .result
            .expect("written");
        target.signal("-STOP");
        let mut done = Vec::new();
        for tag in 0..6 {
            let buf = DmaBuf::zeroed(1 << 20).expect("memory");
            queue
                .submit(&ns, tag, Op::Read { lba: 0, buf })
                .expect("accepted");
        }
        let start = Instant::now();
        while done.len() < 6 {
            queue.poll(&mut done);
            let _ = queue.wait(Duration::from_millis(20));
            assert!(start.elapsed() < PATIENCE, "{} of 6 came back", done.len());
        }
        // The buffer is larger than any arena of this test, so the arena must grow.
        DmaBuf::new(128 << 20).expect("memory for others");
        let mut bufs: Vec<DmaBuf> = Vec::new();
        for done in done {
            assert!(done.result.is_err(), "the target is stopped");
            if let Op::Read { mut buf, .. } = done.op {
                buf.fill(0xee);
                bufs.push(buf);
            }
        }
        target.signal("-CONT");
        std::thread::sleep(Duration::from_millis(300));
        let changed = bufs
            .iter()
            .filter(|buf| buf.iter().any(|b| *b != 0xee))
            .count();
        assert_eq!((bufs.len(), changed), (6, 0), "round {round}");
    }
}

/// The driver numbers the copies of the data that the other process gets. An abort names the caller's tag all the same,
/// and is accepted when every slot is taken.
#[test]
fn an_abort_ends_the_operation_of_its_tag() {
    let target = target();
    let faults = target.soft.faults();
    faults.add(FaultRule::io(IoOpcode::READ, Fault::Delay(PATIENCE * 5)));
    let controller = target.connect();
    let ns = controller.namespace(1).expect("a namespace");
    let mut options = QueueOptions::default().depth(2);
    options.timeout = PATIENCE * 5;
    let mut queue = controller.queue_pair(&options).expect("a queue");
    for tag in [1, 0] {
        let buf = DmaBuf::zeroed(512).expect("memory");
        let read = Op::Read { lba: tag, buf };
        queue.submit(&ns, tag, read).expect("accepted");
    }
    let (mut done, start) = (Vec::new(), Instant::now());
    while faults.struck() < 2 {
        queue.poll(&mut done);
        assert!(start.elapsed() < PATIENCE, "the reads are not fetched");
    }
    let abort = Op::Abort { tag: 1 };
    queue.submit(&ns, 9, abort).expect("accepted");
    while done.len() < 2 {
        queue.poll(&mut done);
        assert!(start.elapsed() < PATIENCE, "{done:?}");
    }
    let ended: Vec<_> = done.iter().map(|d| (d.tag, d.result.is_ok())).collect();
    assert_eq!(ended, [(9, true), (1, false)]);
    assert!(matches!(done[0].op, Op::Abort { tag: 1 }), "{done:?}");
}

/// Reads a message, whose length is in its header.
fn message(stream: &mut UnixStream) -> Vec<u8> {
    let mut message = vec![0; 16];
    stream.read_exact(&mut message).expect("a header");
    let len = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
    message.resize(len as usize, 0);
    stream.read_exact(&mut message[16..]).expect("a body");
    message
}

/// A device that does not respond while it is opened delays the opening of no other.
#[test]
fn a_silent_device_delays_no_other_opening() {
    let silent = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(silent.path().join("cntrl")).expect("bound");
    let uri = format!("vfio-user://{}?timeout_ms=60000", silent.path().display());
    let first = std::thread::spawn(move || pumice_nvme::open(&uri).is_err());
    let (mut connection, _) = listener.accept().expect("connected");
    // It gives another target's answer to the first message, and none after that.
    let behind = target();
    let mut real = UnixStream::connect(behind.path().join("cntrl")).expect("connected");
    real.write_all(&message(&mut connection)).expect("sent");
    connection.write_all(&message(&mut real)).expect("sent");
    message(&mut connection);
    let target = target();
    let uri = format!("vfio-user://{}", target.path().display());
    let opened = pumice_nvme::open(&uri).expect("opened");
    assert!(!first.is_finished(), "the silent device's time was over");
    drop((opened, connection));
    assert!(first.join().expect("no panic"), "nobody answered");
}
