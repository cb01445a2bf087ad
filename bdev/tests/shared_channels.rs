//! Tests of channels that threads share: what a thread that waits for a batch can rely on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, IoChannel, IoErrorKind, Op, OpKind,
    SharedChannels, SubmitError, open,
};

/// A batch is done when its completion has returned, and not before: a thread that waits for the
/// batch reads what the completion has noted, such as the error of a flush.
#[test]
fn a_batch_is_done_when_its_completion_has_returned() {
    let device = Arc::new(ErrorDevice::new(None, open("malloc://1M").unwrap()));
    device.inject(Injection::new(Failure::Hang).op(Some(OpKind::Flush)));
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

/// The first operation that fails says why a batch has failed.
#[test]
fn a_batch_ends_with_its_first_error() {
    let dev = open("malloc://1M?block_size=512").unwrap();
    let shared = SharedChannels::new(&dev, 1).unwrap();
    let read = |lba, len| Op::Read {
        lba,
        buf: DmaBuf::new(len).unwrap(),
    };
    let refused = [read(1 << 40, 512), read(0, 100)];
    let kinds = [IoErrorKind::OutOfRange, IoErrorKind::Misaligned];
    assert_eq!(shared.run(refused.into()).unwrap_err().kind, kinds[0]);
    let refused = [read(0, 512), read(0, 100), read(1 << 40, 512)];
    assert_eq!(shared.run(refused.into()).unwrap_err().kind, kinds[1]);
}

/// A batch is run to its end, however often its channel has to be asked.
#[test]
fn what_is_run_or_polled_for_has_ended() {
    let device = Arc::new(ErrorDevice::new(None, open("malloc://1M").unwrap()));
    let hang = |count| {
        device.inject(
            Injection::new(Failure::Hang)
                .op(Some(OpKind::Flush))
                .count(count),
        );
    };
    let dev = Arc::clone(&device) as Arc<dyn BlockDevice>;
    let shared = SharedChannels::new(&dev, 1).unwrap();
    hang(2);
    let ticket = shared.submit(vec![Op::Flush], |_| {});
    assert!(!shared.poll(&ticket));
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            // It ends when the device goes on, with an error that only its end can tell.
            let read = Op::Read {
                lba: 1 << 40,
                buf: DmaBuf::new(512).unwrap(),
            };
            let result = shared.run(vec![Op::Flush, read]);
            (result.unwrap_err().kind, device.injections().len())
        });
        while !device.injections().is_empty() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(5));
        assert!(!run.is_finished(), "the flush hangs");
        device.resume();
        assert_eq!(run.join().unwrap(), (IoErrorKind::OutOfRange, 0));
    });
    while !shared.poll(&ticket) {
        std::thread::yield_now();
    }
    hang(1);
    let ticket = shared.submit(vec![Op::Flush], |_| {});
    device.resume();
    // Nobody but this thread takes its completion.
    let polls = (0..1000).position(|_| shared.poll(&ticket));
    assert!(polls.is_some());
}

/// A completion runs when the channel is free again: others use it meanwhile.
#[test]
fn a_completion_holds_no_channel() {
    let dev = open("malloc://1M?block_size=512").unwrap();
    let shared = Arc::new(SharedChannels::new(&dev, 1).unwrap());
    let other = Arc::clone(&shared);
    let (tell, told) = mpsc::channel();
    let ticket = shared.submit(vec![Op::Flush], move |_| {
        let (ran, has_run) = mpsc::channel();
        std::thread::spawn(move || ran.send(other.run(vec![Op::Flush]).is_ok()));
        tell.send(has_run.recv_timeout(Duration::from_secs(20)))
            .unwrap();
    });
    shared.wait(&ticket);
    assert_eq!(told.recv().unwrap(), Ok(true));
}

/// A completion that panics has returned: whoever waits for all of them does not wait for it.
#[test]
fn a_drain_ends_after_a_completion_that_panics() {
    let dev = open("malloc://1M?block_size=512").unwrap();
    let shared = Arc::new(SharedChannels::new(&dev, 1).unwrap());
    let other = Arc::clone(&shared);
    let panics = std::thread::spawn(move || {
        other.submit(Vec::new(), |_| panic!("as the test wants"));
    });
    panics.join().unwrap_err();
    let (drained, is_drained) = mpsc::channel();
    std::thread::spawn(move || {
        shared.drain();
        let _ = drained.send(());
    });
    is_drained.recv_timeout(Duration::from_secs(60)).unwrap();
}

/// A device whose channels say that a thread sleeps on them, and sleep until the test wakes them.
#[derive(Debug)]
struct Sleepy(Arc<dyn BlockDevice>, Arc<Mutex<Bed>>);

#[derive(Debug)]
struct Bed {
    asleep: mpsc::Sender<()>,
    woken: mpsc::Receiver<()>,
}

struct SleepyChannel(Box<dyn IoChannel>, Arc<Mutex<Bed>>);

impl BlockDevice for Sleepy {
    fn info(&self) -> &DeviceInfo {
        self.0.info()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let channel = SleepyChannel(self.0.open_channel()?, Arc::clone(&self.1));
        Ok(Box::new(channel))
    }
}

impl IoChannel for SleepyChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.0.submit(tag, op)
    }

    fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        let bed = self.1.lock().unwrap();
        let _ = bed.asleep.send(());
        let _ = bed.woken.recv();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

/// A thread that polls is not kept by one that sleeps on a channel.
#[test]
fn a_poll_does_not_wait_for_a_thread_that_waits() {
    let (asleep, is_asleep) = mpsc::channel();
    let (wake, woken) = mpsc::channel();
    let bed = Arc::new(Mutex::new(Bed { asleep, woken }));
    let base = open("malloc://1M?block_size=512").unwrap();
    let dev: Arc<dyn BlockDevice> = Arc::new(Sleepy(base, bed));
    // What is in flight stays there, since its channel never says that it is done.
    let shared: &SharedChannels = Box::leak(Box::new(SharedChannels::new(&dev, 1).unwrap()));
    let ticket = shared.submit(vec![Op::Flush], |_| {});
    let sleeper = std::thread::spawn(|| shared.wait_any());
    is_asleep.recv().unwrap();
    let (polled, is_polled) = mpsc::channel();
    std::thread::spawn(move || {
        let ended = shared.poll(&ticket) || shared.poll_all();
        let _ = polled.send(ended);
    });
    let ended = is_polled.recv_timeout(Duration::from_secs(60));
    wake.send(()).unwrap();
    assert!(sleeper.join().unwrap());
    assert_eq!(ended, Ok(false), "no poll waits");
}
