//! A channel per thread and device, for as long as the device is wanted.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op,
    SubmitError,
};

use super::error::Error;

/// A device's channel that can be taken away from the thread that uses it.
type Lease = Arc<Leasable>;
/// See [`Lease`].
type Leasable = Mutex<Option<Box<dyn IoChannel>>>;

/// The channels of all threads to one device. When it is closed or dropped, so are they: a thread that
/// goes on living does not keep the device open.
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

    /// This thread's channel.
    pub fn get(&self) -> Result<AsyncChannel, Error> {
        let found = CACHE.with_borrow(|cache| {
            cache
                .iter()
                .find(|cached| cached.key == self.key)
                .map(|cached| cached.channel.clone())
        });
        found.map_or_else(|| self.open(), Ok)
    }

    #[cold]
    fn open(&self) -> Result<AsyncChannel, Error> {
        let lease = Arc::new(Mutex::new(Some(self.dev.open_channel()?)));
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
        CACHE.with_borrow_mut(|cache| {
            cache.retain(|cached| cached.lease.lock().is_some());
            cache.push(cached);
        });
        Ok(channel)
    }

    /// Closes all channels; waits for what is in flight.
    pub fn close(&self) {
        let mut leases = self.leases.lock();
        leases.closed = true;
        for lease in leases.all.drain(..).filter_map(|lease| lease.upgrade()) {
            *lease.lock() = None;
        }
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.close();
    }
}

/// The channel that the thread sees. It holds nothing of the device: it lives as long as its thread.
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
            Some(channel) => channel.submit(tag, op),
            None => Err(self.closed(op)),
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.lease
            .lock()
            .as_mut()
            .map_or(0, |channel| channel.poll(out))
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.lease
            .lock()
            .as_mut()
            .map_or(Ok(()), |channel| channel.wait(timeout))
    }

    fn in_flight(&self) -> usize {
        self.lease
            .lock()
            .as_ref()
            .map_or(0, |channel| channel.in_flight())
    }
}
