//! Tests of channels that threads share: what a thread that waits for a batch can rely on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, Op, OpKind, SharedChannels, open};

/// A batch is done when its completion has returned, and not before: a thread that waits for the
/// batch reads what the completion has noted, such as the error of a flush.
#[test]
fn a_batch_is_done_when_its_completion_has_returned() {
    let device = Arc::new(ErrorDevice::new(None, open("malloc://1M").unwrap()));
    device.inject(Injection {
        op: Some(OpKind::Flush),
        failure: Failure::Hang,
        count: 1,
        range: None,
        queue_depth: 0,
    });
    let dev = Arc::clone(&device) as Arc<dyn BlockDevice>;
    let shared = Arc::new(SharedChannels::new(&dev, 1).unwrap());
    let ended = Arc::new(AtomicBool::new(false));
    let (running, is_running) = mpsc::channel();
    let (end, may_end) = mpsc::channel::<()>();
    let ends = Arc::clone(&ended);
    let ticket = shared.submit(vec![Op::Flush], move |outcome| {
        running.send(outcome.result.is_ok()).unwrap();
        // Nothing is sent if the test has failed.
        let _ = may_end.recv();
        ends.store(true, Ordering::Release);
    });
    let (other, flush) = (Arc::clone(&shared), ticket.clone());
    let reaper = std::thread::spawn(move || other.wait(&flush));
    device.resume();
    assert!(is_running.recv().unwrap(), "the flush was only slow");
    let is_done = shared.poll(&ticket);
    end.send(()).unwrap();
    reaper.join().unwrap();
    assert!(!is_done, "the completion was still running");
    assert!(ticket.is_done() && ended.load(Ordering::Acquire));
}
