//! Tests of the orderly end of a controller.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{
    Backend, MemoryBackend, SoftConfig, SoftController, SoftNamespace, Transfer,
};

use common::*;

mod common;

/// A disk that tells the name of the thread that flushes it, and then waits while there is another
/// end of `goes_on`.
struct Told {
    disk: MemoryBackend,
    flushes: Sender<String>,
    goes_on: Option<Receiver<()>>,
}

impl Backend for Told {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()> {
        self.disk.read(offset, to)
    }

    fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()> {
        self.disk.write(offset, from)
    }

    fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.disk.read_bytes(offset, to)
    }

    fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.disk.write_bytes(offset, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        // A test that has ended is not there to hear it.
        let _ = self.flushes.send(name);
        if let Some(goes_on) = &self.goes_on {
            let _ = goes_on.recv();
        }
        self.disk.flush()
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.write_zeroes(offset, len)
    }
}

fn on_disk(backend: Told) -> Arc<Controller> {
    let mut config = SoftConfig::new(vec![SoftNamespace::new(Box::new(backend), 512)]);
    config.timeout_500ms = 240;
    let soft = SoftController::new(config).unwrap();
    Controller::new(soft.transport(), ControllerOptions::default()).unwrap()
}

/// The controller is told of its shutdown (CC.SHN), so that it puts its cache on the medium before it is taken away. The
/// soft controller does so in its own thread, and once more when it is detached, in the caller's.
#[test]
fn a_controller_is_told_of_its_shutdown() {
    let _watchdog = watchdog();
    for by_drop in [false, true] {
        let (flushes, flushed) = channel();
        let backend = Told {
            disk: MemoryBackend::new(4 << 20),
            flushes,
            goes_on: None,
        };
        let controller = on_disk(backend);
        if !by_drop {
            controller.shutdown().unwrap();
        }
        drop(controller);
        let names: Vec<String> = flushed.try_iter().collect();
        let its_own = names.first().is_some_and(|name| name.starts_with("soft-"));
        assert!(its_own, "by drop: {by_drop}: {names:?}");
    }
}

/// A second shutdown waits for the first one and does not take the controller away meanwhile.
#[test]
fn two_shutdowns_end_together() {
    let _watchdog = watchdog();
    let (flushes, flushed) = channel();
    let (go_on, goes_on) = channel();
    let backend = Told {
        disk: MemoryBackend::new(4 << 20),
        flushes,
        goes_on: Some(goes_on),
    };
    let controller = on_disk(backend);
    let (ends, ended) = channel();
    let shut_down = || {
        let (controller, ends) = (Arc::clone(&controller), ends.clone());
        std::thread::spawn(move || ends.send(controller.shutdown()).unwrap())
    };
    let first = shut_down();
    // The controller is shutting down, and takes as long as this test wants.
    flushed.recv_timeout(PATIENCE).unwrap();
    let second = shut_down();
    // The second has time to end, if it does not wait.
    let early = ended.recv_timeout(Duration::from_millis(200));
    drop(go_on);
    assert!(
        matches!(early, Err(RecvTimeoutError::Timeout)),
        "one has ended before the controller: {early:?}"
    );
    let results: Vec<_> = ended.iter().take(2).collect();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    first.join().unwrap();
    second.join().unwrap();
    assert!(controller.shutdown().is_ok());
}
