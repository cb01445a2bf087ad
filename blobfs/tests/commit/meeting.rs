//! A device whose writes wait for one another.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, Op, OpKind, SubmitError,
};

use super::task::LIMIT;

/// Writes that meet. Once armed, the device holds each of them back until this many are in flight.
#[derive(Debug)]
pub struct Meeting {
    base: Arc<dyn BlockDevice>,
    shared: Arc<Met>,
}

#[derive(Debug, Default)]
struct Met {
    /// Number of writes that have to meet.
    wanted: AtomicUsize,
    here: AtomicUsize,
    gone: AtomicBool,
}

struct MeetingChannel {
    base: Box<dyn IoChannel>,
    shared: Arc<Met>,
    kept: Vec<(u64, Op)>,
}

impl Meeting {
    pub fn new(base: Arc<dyn BlockDevice>) -> Arc<Meeting> {
        Arc::new(Meeting {
            base,
            shared: Arc::default(),
        })
    }

    fn arm(&self, wanted: usize) {
        self.shared.here.store(0, Ordering::SeqCst);
        self.shared.gone.store(false, Ordering::SeqCst);
        self.shared.wanted.store(wanted, Ordering::SeqCst);
    }

    /// Lets the waiting writes continue, whether all have met or not. Returns how many have.
    fn end(&self) -> usize {
        self.shared.wanted.store(0, Ordering::SeqCst);
        self.shared.gone.store(true, Ordering::SeqCst);
        self.shared.here.load(Ordering::SeqCst)
    }
}

impl BlockDevice for Meeting {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn identity(&self) -> usize {
        self.base.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(MeetingChannel {
            base: self.base.open_channel()?,
            shared: Arc::clone(&self.shared),
            kept: Vec::new(),
        }))
    }
}

impl IoChannel for MeetingChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let wanted = self.shared.wanted.load(Ordering::SeqCst);
        let met = self.shared.gone.load(Ordering::SeqCst);
        if wanted == 0 || met || op.kind() != OpKind::Write {
            return self.base.submit(tag, op);
        }
        if self.shared.here.fetch_add(1, Ordering::SeqCst) + 1 >= wanted {
            self.shared.gone.store(true, Ordering::SeqCst);
        }
        self.kept.push((tag, op));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if self.shared.gone.load(Ordering::SeqCst) {
            for (tag, op) in self.kept.drain(..) {
                self.base.submit(tag, op).unwrap();
            }
        }
        self.base.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if self.kept.is_empty() {
            return self.base.wait(timeout);
        }
        std::thread::sleep(timeout.min(Duration::from_millis(1)));
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight() + self.kept.len()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Runs the jobs, each on a thread. Their writes end only when this many are in flight. Returns how
/// many were.
pub fn meet<T: Send + 'static>(
    dev: &Meeting,
    wanted: usize,
    jobs: Vec<Box<dyn FnOnce() -> T + Send>>,
) -> usize {
    dev.arm(wanted);
    let threads: Vec<JoinHandle<T>> = jobs.into_iter().map(std::thread::spawn).collect();
    let start = Instant::now();
    while !dev.shared.gone.load(Ordering::SeqCst) && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
    let met = dev.end();
    for thread in threads {
        thread.join().unwrap();
    }
    met
}
