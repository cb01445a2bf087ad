//! A channel for each thread and device, for as long as the device is in use.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op,
    SubmitError,
};

use super::error::Error;

/// A device's channel that can be taken away from its thread.
type Lease = Arc<Leasable>;
/// See [`Lease`].
type Leasable = Mutex<Leasing>;

/// Longest wait of a closing for I/O in flight on the channels of all threads together.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time for which a closing holds one channel, since its thread has to poll it too.
const SLICE: Duration = Duration::from_millis(1);

struct Leasing {
    channel: Option<Box<dyn IoChannel>>,
    /// Whether new operations are refused.
    closing: bool,
    /// Completions that the closing thread has taken for the thread of the operations.
    left: Vec<Completion>,
}

/// The channels of all threads to one device. They are closed when this is closed or dropped, so a
/// living thread does not keep the device open.
#[derive(Debug)]
pub(crate) struct Channels {
    dev: Arc<dyn BlockDevice>,
    key: u64,
    leases: Mutex<Leases>,
}

#[derive(Default)]
struct Leases {
    closed: bool,
    all: Vec<Weak<Leasable>>,
}

impl std::fmt::Debug for Leases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leases")
            .field("count", &self.all.len())
            .finish()
    }
}

struct Cached {
    key: u64,
    lease: Lease,
    channel: AsyncChannel,
}

thread_local! {
    static CACHE: RefCell<Vec<Cached>> = const { RefCell::new(Vec::new()) };
}

impl Channels {
    pub fn new(dev: Arc<dyn BlockDevice>) -> Channels {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Channels {
            dev,
            key: NEXT.fetch_add(1, Ordering::Relaxed),
            leases: Mutex::default(),
        }
    }

    /// Returns this thread's channel. While the thread ends and its thread-locals are being
    /// dropped, the channel is for this call only.
    pub fn get(&self) -> Result<AsyncChannel, Error> {
        let found = CACHE.try_with(|cache| {
            let cache = cache.borrow();
            let cached = cache.iter().find(|cached| cached.key == self.key);
            cached.map(|cached| cached.channel.clone())
        });
        found.ok().flatten().map_or_else(|| self.open(), Ok)
    }

    #[cold]
    fn open(&self) -> Result<AsyncChannel, Error> {
        let lease = Arc::new(Mutex::new(Leasing {
            channel: Some(self.dev.open_channel()?),
            closing: false,
            left: Vec::new(),
        }));
        {
            let mut leases = self.leases.lock();
            if leases.closed {
                return Err(Error::Unloaded);
            }
            leases.all.retain(|lease| lease.strong_count() > 0);
            leases.all.push(Arc::downgrade(&lease));
        }
        let channel = AsyncChannel::new(Box::new(Leased {
            info: self.dev.info().clone(),
            lease: Arc::clone(&lease),
        }));
        let cached = Cached {
            key: self.key,
            lease,
            channel: channel.clone(),
        };
        let _ = CACHE.try_with(|cache| {
            let mut cache = cache.borrow_mut();
            cache.retain(|cached| cached.lease.lock().channel.is_some());
            cache.push(cached);
        });
        Ok(channel)
    }

    /// Refuses new operations on every channel and waits until nothing is in flight. If that takes
    /// too long, returns false and accepts operations again. The completions are kept for the
    /// threads of the operations.
    pub fn quiesce(&self) -> bool {
        let all: Vec<Lease> = {
            let mut leases = self.leases.lock();
            leases.closed = true;
            leases.all.iter().filter_map(Weak::upgrade).collect()
        };
        for lease in &all {
            lease.lock().closing = true;
        }
        let start = Instant::now();
        let quiet = all.iter().all(|lease| drain(lease, start));
        if !quiet {
            self.reopen();
        }
        quiet
    }

    /// Accepts operations again after [`Channels::quiesce`].
    pub fn reopen(&self) {
        let mut leases = self.leases.lock();
        leases.closed = false;
        for lease in leases.all.iter().filter_map(Weak::upgrade) {
            lease.lock().closing = false;
        }
    }

    /// Closes all channels. Waits for operations in flight and keeps their completions.
    pub fn close(&self) {
        let all: Vec<Weak<Leasable>> = {
            let mut leases = self.leases.lock();
            leases.closed = true;
            leases.all.drain(..).collect()
        };
        let start = Instant::now();
        for lease in all.iter().filter_map(Weak::upgrade) {
            lease.lock().closing = true;
            drain(&lease, start);
            // The threads of operations that have not ended by now do not get their completions.
            // Dropping the channel waits for the buffers.
            lease.lock().channel = None;
        }
    }
}

/// Polls a channel for its thread until nothing is in flight. Returns false if that takes too long.
fn drain(lease: &Lease, start: Instant) -> bool {
    loop {
        {
            let mut leasing = lease.lock();
            let Leasing { channel, left, .. } = &mut *leasing;
            let Some(channel) = channel else { return true };
            channel.poll(left);
            if channel.in_flight() == 0 {
                return true;
            }
            if channel.wait(SLICE).is_err() {
                std::thread::sleep(SLICE);
            }
        }
        if start.elapsed() > DRAIN_TIMEOUT {
            return false;
        }
        std::thread::yield_now();
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.close();
    }
}

/// The channel that a thread has. It owns nothing of the device and lives as long as its thread.
struct Leased {
    info: DeviceInfo,
    lease: Lease,
}

impl Leased {
    fn closed(&self, op: Op) -> SubmitError {
        let error = self
            .info
            .error(&op, IoErrorKind::Removed, "the blobstore was unloaded");
        SubmitError::Refused(op, error)
    }
}

impl IoChannel for Leased {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        match &mut *self.lease.lock() {
            Leasing {
                channel: Some(channel),
                closing: false,
                ..
            } => channel.submit(tag, op),
            _ => Err(self.closed(op)),
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let mut leasing = self.lease.lock();
        let kept = leasing.left.len();
        out.append(&mut leasing.left);
        kept + leasing
            .channel
            .as_mut()
            .map_or(0, |channel| channel.poll(out))
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        let mut leasing = self.lease.lock();
        if !leasing.left.is_empty() {
            return Ok(());
        }
        leasing
            .channel
            .as_mut()
            .map_or(Ok(()), |channel| channel.wait(timeout))
    }

    fn in_flight(&self) -> usize {
        let leasing = self.lease.lock();
        let below = leasing.channel.as_ref();
        leasing.left.len() + below.map_or(0, |channel| channel.in_flight())
    }
}
