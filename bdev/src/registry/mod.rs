//! The registry: devices by name, alias, UUID or URI; claims; hot add and remove; statistics.
//!
//! A device that is taken from the registry is a [`Bdev`]: the module's device, with an account
//! kept of what is done to it. Removing one removes first what is built on it, top down; whoever
//! has a channel open finds each operation ended once and new ones refused.

mod channel;
mod names;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use pumice_io::OpKind;
use pumice_io::sys::Clock;
use pumice_io::uri::{is_path, is_uri};

use crate::OpenOptions;
use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::read_only::ReadOnly;
use crate::stats::{BUCKETS, ChannelStats, Stats};
use channel::BdevChannel;
pub use channel::TimeoutAction;
pub use names::nearest;

/// What happened to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is there.
    Added(String),
    /// It is gone.
    Removed(String),
}

type Listener = Arc<dyn Fn(&Event) + Send + Sync>;

/// Devices by name. Cheap to clone: all clones are the same registry.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: RwLock<BTreeMap<String, Arc<Entry>>>,
    listeners: Mutex<Vec<Listener>>,
    timeout: Mutex<(Duration, TimeoutAction)>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set()
            .entries(self.inner.entries.read().keys())
            .finish()
    }
}

/// A device in a registry.
#[derive(Debug, Clone)]
pub struct Bdev {
    entry: Arc<Entry>,
}

/// A device of which the holder is the only user. The claim ends when it is dropped.
#[derive(Debug)]
pub struct Claimed {
    bdev: Bdev,
}

struct Entry {
    dev: Arc<dyn BlockDevice>,
    block_size: u32,
    /// Names of the devices that this one is built on.
    below: Vec<String>,
    claim: Mutex<Option<String>>,
    removed: AtomicBool,
    channels: Mutex<Vec<Arc<ChannelStats>>>,
    /// Of channels that are closed.
    past: Mutex<(Stats, Vec<u64>)>,
    /// What a reset of the statistics subtracts.
    zero: Mutex<Stats>,
    /// Whether there is a latency histogram, and of which operations only.
    histogram: Mutex<(bool, Option<OpKind>)>,
    next_channel: AtomicU64,
    /// 0: no limit.
    timeout_ticks: AtomicU64,
    timeout_action: Mutex<TimeoutAction>,
    registry: Weak<Inner>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let claim = self.claim.lock().clone();
        f.debug_struct("Bdev")
            .field("dev", &self.dev)
            .field("claim", &claim)
            .field("removed", &self.is_removed())
            .finish_non_exhaustive()
    }
}

impl Entry {
    fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// The device said that it is gone.
    fn surprise(&self) {
        if self.is_removed() {
            return;
        }
        if let Some(inner) = self.registry.upgrade() {
            let name = &self.dev.info().name;
            tracing::warn!(bdev = %name, "the device is gone");
            let registry = Registry { inner };
            if registry
                .get(name)
                .is_some_and(|b| std::ptr::eq(&raw const *b.entry, self))
            {
                let _ = registry.remove(name);
            }
        }
    }

    fn channel_closed(&self, stats: &Arc<ChannelStats>) {
        let mut channels = self.channels.lock();
        let mut past = self.past.lock();
        past.0.add(&stats.snapshot());
        if self.histogram.lock().0 {
            past.1.resize(BUCKETS, 0);
            stats.add_histogram_to(&mut past.1);
        }
        channels.retain(|c| !Arc::ptr_eq(c, stats));
    }
}

impl Registry {
    /// An empty one.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// Adds a device, which stands on the devices named `below`.
    ///
    /// # Errors
    /// [`BdevError::Exists`] when its name or an alias of it is taken,
    /// [`BdevError::InvalidOption`] when it has none.
    pub fn register(
        &self,
        dev: Arc<dyn BlockDevice>,
        below: Vec<String>,
    ) -> Result<Bdev, BdevError> {
        let info = dev.info();
        let name = info.name.clone();
        if name.is_empty() {
            return Err(BdevError::InvalidOption {
                name: "name".to_owned(),
                reason: "a device needs one".to_owned(),
            });
        }
        let (timeout, action) = *self.inner.timeout.lock();
        let mut entries = self.inner.entries.write();
        for wanted in std::iter::once(&name).chain(&info.aliases) {
            if entries.values().any(|e| answers_to(e.dev.info(), wanted)) {
                return Err(BdevError::Exists {
                    name: wanted.clone(),
                });
            }
        }
        let uuid = info.uuid;
        if uuid != [0; 16] && entries.values().any(|e| e.dev.info().uuid == uuid) {
            // A device answers to its UUID: two would answer to one.
            return Err(BdevError::Exists {
                name: crate::uuid::format(&uuid),
            });
        }
        // A device below may have gone since it was claimed.
        if let Some(gone) = below.iter().find(|b| !entries.contains_key(*b)) {
            return Err(BdevError::Removed { name: gone.clone() });
        }
        let entry = Arc::new(Entry {
            block_size: info.block_size,
            below,
            claim: Mutex::new(None),
            removed: AtomicBool::new(false),
            channels: Mutex::default(),
            past: Mutex::default(),
            zero: Mutex::default(),
            histogram: Mutex::default(),
            next_channel: AtomicU64::new(1),
            timeout_ticks: AtomicU64::new(0),
            timeout_action: Mutex::new(action),
            registry: Arc::downgrade(&self.inner),
            dev,
        });
        entries.insert(name.clone(), Arc::clone(&entry));
        drop(entries);
        let bdev = Bdev { entry };
        bdev.set_timeout(timeout, action);
        tracing::info!(bdev = %name, product = %bdev.info().product, "added");
        self.tell(&Event::Added(name));
        Ok(bdev)
    }

    /// The device of this name, alias or UUID.
    pub fn get(&self, name: &str) -> Option<Bdev> {
        let entries = self.inner.entries.read();
        let direct = entries.get(name);
        let found = direct.or_else(|| entries.values().find(|e| answers_to(e.dev.info(), name)));
        found.map(|entry| Bdev {
            entry: Arc::clone(entry),
        })
    }

    /// The device of this name, alias, UUID or URI, for I/O. A URI makes the device and adds it.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], with the nearest name or all of them; [`BdevError::Claimed`] when
    /// another module stands on it; whatever opening a URI says.
    pub fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
        self.open_with(name, OpenOptions::new())
    }

    /// As [`Registry::open`]. For reading only, a device that is there is given as a view that
    /// cannot be written.
    ///
    /// # Errors
    /// As [`Registry::open`].
    pub fn open_with(
        &self,
        name: &str,
        options: OpenOptions,
    ) -> Result<Arc<dyn BlockDevice>, BdevError> {
        if let Some(bdev) = self.get(name) {
            let claim = bdev.entry.claim.lock().clone();
            return match claim {
                Some(by) => Err(BdevError::Claimed {
                    name: bdev.info().name.clone(),
                    by,
                }),
                None if options.is_read_only() => Ok(ReadOnly::of(Arc::new(bdev))),
                None => Ok(Arc::new(bdev)),
            };
        }
        if is_uri(name) || is_path(name) {
            let dev = crate::open_with(name, options)?;
            return Ok(Arc::new(self.register(dev, Vec::new())?));
        }
        Err(self.not_found(name))
    }

    /// The error for a name that is not there.
    pub fn not_found(&self, name: &str) -> BdevError {
        let names = self.names();
        BdevError::NotFound {
            name: name.to_owned(),
            hint: names::hint(name, &names),
        }
    }

    /// Takes a device for the exclusive use of `by`.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], [`BdevError::Claimed`].
    pub fn claim(&self, name: &str, by: &str) -> Result<Claimed, BdevError> {
        let bdev = self.get(name).ok_or_else(|| self.not_found(name))?;
        let mut claim = bdev.entry.claim.lock();
        if let Some(by) = &*claim {
            return Err(BdevError::Claimed {
                name: bdev.info().name.clone(),
                by: by.clone(),
            });
        }
        *claim = Some(by.to_owned());
        drop(claim);
        Ok(Claimed { bdev })
    }

    /// Removes a device and, before it, all that stands on it. The names, in that order, are free
    /// when this returns. Channels that are open end what is in flight at their next polls.
    ///
    /// # Errors
    /// [`BdevError::NotFound`].
    pub fn remove(&self, name: &str) -> Result<Vec<String>, BdevError> {
        let bdev = self.get(name).ok_or_else(|| self.not_found(name))?;
        let mut gone = Vec::new();
        self.remove_tree(&bdev.info().name, &mut gone);
        Ok(gone)
    }

    fn remove_tree(&self, name: &str, gone: &mut Vec<String>) {
        loop {
            let above = {
                let entries = self.inner.entries.read();
                let on_it = |e: &&Arc<Entry>| e.below.iter().any(|b| b == name);
                entries
                    .values()
                    .find(on_it)
                    .map(|e| e.dev.info().name.clone())
            };
            match above {
                Some(above) => self.remove_tree(&above, gone),
                None => break,
            }
        }
        let entry = self.inner.entries.write().remove(name);
        if let Some(entry) = entry {
            entry.removed.store(true, Ordering::Release);
            tracing::info!(bdev = name, "removed");
            gone.push(name.to_owned());
            self.tell(&Event::Removed(name.to_owned()));
        }
    }

    /// All devices, by name.
    pub fn list(&self) -> Vec<Bdev> {
        let entries = self.inner.entries.read();
        entries
            .values()
            .map(|e| Bdev {
                entry: Arc::clone(e),
            })
            .collect()
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.inner.entries.read().keys().cloned().collect()
    }

    /// Calls `listener` for each device that comes or goes from now on, on the thread where it
    /// happens: of a removal that may be one that does I/O. A listener may use the registry.
    pub fn listen(&self, listener: impl Fn(&Event) + Send + Sync + 'static) {
        self.inner.listeners.lock().push(Arc::new(listener));
    }

    /// How long an operation may take, on devices there are and on those to come; zero: no limit.
    pub fn set_timeout(&self, timeout: Duration, action: TimeoutAction) {
        *self.inner.timeout.lock() = (timeout, action);
        for bdev in self.list() {
            bdev.set_timeout(timeout, action);
        }
    }

    /// How long an operation may take on devices to come, and what follows.
    pub fn timeout(&self) -> (Duration, TimeoutAction) {
        *self.inner.timeout.lock()
    }

    fn tell(&self, event: &Event) {
        // Not under the lock: a listener may add and remove devices itself.
        let listeners = self.inner.listeners.lock().clone();
        for listener in listeners {
            listener(event);
        }
    }
}

fn answers_to(info: &DeviceInfo, name: &str) -> bool {
    info.name == name
        || info.aliases.iter().any(|a| a == name)
        || crate::uuid::parse(name).is_some_and(|u| u == info.uuid)
}

impl Bdev {
    /// Who claims it.
    pub fn claimed_by(&self) -> Option<String> {
        self.entry.claim.lock().clone()
    }

    /// Names of the devices it stands on.
    pub fn below(&self) -> &[String] {
        &self.entry.below
    }

    /// Whether it has been removed.
    pub fn is_removed(&self) -> bool {
        self.entry.is_removed()
    }

    /// The module's device, without the account.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.entry.dev
    }

    /// What was done to it since it was added, or since [`Bdev::reset_stats`].
    pub fn stats(&self) -> Stats {
        let mut sum = self.total();
        sum.subtract(&self.entry.zero.lock());
        sum
    }

    fn total(&self) -> Stats {
        let channels = self.entry.channels.lock();
        let mut sum = self.entry.past.lock().0;
        for channel in &*channels {
            sum.add(&channel.snapshot());
        }
        sum
    }

    /// What was done through each channel that is open, since it was opened, by its number.
    pub fn channel_stats(&self) -> Vec<(u64, Stats)> {
        let channels = self.entry.channels.lock();
        channels.iter().map(|c| (c.id, c.snapshot())).collect()
    }

    /// Starts counting again, for the device as a whole.
    pub fn reset_stats(&self) {
        self.reset_extremes();
        let total = self.total();
        *self.entry.zero.lock() = total;
    }

    /// Forgets the shortest and longest latencies only, of the device and of its channels.
    pub fn reset_extremes(&self) {
        let channels = self.entry.channels.lock();
        self.entry.past.lock().0.clear_extremes();
        for channel in &*channels {
            channel.clear_extremes();
        }
    }

    /// Switches the latency histogram on or off: of all operations, or of `only` one kind.
    /// Switched on anew, it is empty.
    pub fn enable_histogram(&self, on: bool, only: Option<OpKind>) {
        let channels = self.entry.channels.lock();
        let before = std::mem::replace(&mut *self.entry.histogram.lock(), (on, only));
        for channel in &*channels {
            if before.1 != only {
                channel.set_histogram(false, only);
            }
            channel.set_histogram(on, only);
        }
        if !on || before.1 != only {
            self.entry.past.lock().1.clear();
        }
    }

    /// The latency histogram of each channel that is open, by its number, in ticks, by
    /// [`crate::stats::bucket_end`]. Empty when it is off.
    pub fn channel_histograms(&self) -> Vec<(u64, Vec<u64>)> {
        let channels = self.entry.channels.lock();
        if !self.entry.histogram.lock().0 {
            return Vec::new();
        }
        let of = |channel: &Arc<ChannelStats>| {
            let mut buckets = vec![0; BUCKETS];
            channel.add_histogram_to(&mut buckets);
            (channel.id, buckets)
        };
        channels.iter().map(of).collect()
    }

    /// The latency histogram, in ticks, by [`crate::stats::bucket_end`]; `None` when it is off.
    pub fn histogram(&self) -> Option<Vec<u64>> {
        let channels = self.entry.channels.lock();
        if !self.entry.histogram.lock().0 {
            return None;
        }
        let mut buckets = self.entry.past.lock().1.clone();
        buckets.resize(BUCKETS, 0);
        for channel in &*channels {
            channel.add_histogram_to(&mut buckets);
        }
        Some(buckets)
    }

    /// How long an operation may take; zero: no limit.
    pub fn set_timeout(&self, timeout: Duration, action: TimeoutAction) {
        let ticks = if timeout.is_zero() {
            0
        } else {
            Clock::get().ticks(timeout).max(1)
        };
        *self.entry.timeout_action.lock() = action;
        self.entry.timeout_ticks.store(ticks, Ordering::Relaxed);
    }
}

impl BlockDevice for Bdev {
    fn info(&self) -> &DeviceInfo {
        self.entry.dev.info()
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        self.entry.dev.host_space()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        if self.entry.is_removed() {
            return Err(BdevError::Removed {
                name: self.info().name.clone(),
            });
        }
        let inner = self.entry.dev.open_channel()?;
        let id = self.entry.next_channel.fetch_add(1, Ordering::Relaxed);
        let stats = Arc::new(ChannelStats::new(id));
        let mut channels = self.entry.channels.lock();
        let (on, only) = *self.entry.histogram.lock();
        stats.set_histogram(on, only);
        channels.push(Arc::clone(&stats));
        drop(channels);
        Ok(Box::new(BdevChannel::new(
            inner,
            Arc::clone(&self.entry),
            stats,
        )))
    }

    fn driver_specific(&self) -> serde_json::Value {
        self.entry.dev.driver_specific()
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        self.entry.dev.next_data(lba)
    }

    fn keep_file(&self, keep: bool) {
        self.entry.dev.keep_file(keep);
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        *self.bdev.entry.claim.lock() = None;
    }
}

impl BlockDevice for Claimed {
    fn info(&self) -> &DeviceInfo {
        self.bdev.info()
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        self.bdev.host_space()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        self.bdev.open_channel()
    }

    fn driver_specific(&self) -> serde_json::Value {
        self.bdev.driver_specific()
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        self.bdev.next_data(lba)
    }

    fn keep_file(&self, keep: bool) {
        self.bdev.keep_file(keep);
    }
}
