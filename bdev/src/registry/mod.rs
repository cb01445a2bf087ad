//! The registry: devices by name, alias, UUID or URI; claims; hot add and remove; statistics.
//!
//! A device from the registry is a [`Bdev`]: the module's device with statistics of its operations.
//! Removing one first removes the devices built on it, from the top down. In channels that are
//! open, each operation ends once and new ones are refused.

mod channel;
mod claim;
mod events;
mod names;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
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
use crate::stats::{BUCKETS, ChannelStats, Queue, Stats};
use channel::BdevChannel;
pub use channel::TimeoutAction;
pub use claim::Claimed;
pub use events::Event;
use events::Events;
pub use names::nearest;

/// Devices by name. All clones are the same registry.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: RwLock<BTreeMap<String, Arc<Entry>>>,
    events: Events,
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

struct Entry {
    dev: Arc<dyn BlockDevice>,
    block_size: u32,
    /// Names of the devices that this one is built on.
    below: Vec<String>,
    claim: Mutex<Option<String>>,
    removed: AtomicBool,
    channels: Mutex<Vec<Arc<ChannelStats>>>,
    /// Statistics and histogram of closed channels.
    past: Mutex<(Stats, Vec<u64>)>,
    /// The counts at the last reset of the statistics, which are subtracted.
    zero: Mutex<Stats>,
    /// Whether latencies are recorded in a histogram, and of which operations only.
    histogram: Mutex<(bool, Option<OpKind>)>,
    next_channel: AtomicU64,
    /// Time limit of an operation in ticks; 0: no limit.
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

    /// Handles a removal that the device has reported.
    fn surprise(self: &Arc<Self>) {
        if self.is_removed() {
            return;
        }
        if let Some(inner) = self.registry.upgrade() {
            tracing::warn!(bdev = %self.dev.info().name, "the device is gone");
            Registry { inner }.remove_tree(self, &mut Vec::new());
        }
    }

    fn set_timeout(&self, timeout: Duration, action: TimeoutAction) {
        let ticks = match timeout.is_zero() {
            true => 0,
            false => Clock::get().ticks(timeout).max(1),
        };
        *self.timeout_action.lock() = action;
        self.timeout_ticks.store(ticks, Ordering::Relaxed);
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
    /// Makes an empty registry.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// Adds a device, which is built on the devices named `below` and has claimed them.
    ///
    /// # Errors
    /// [`BdevError::Exists`] when a device has its name or an alias of it already,
    /// [`BdevError::InvalidOption`] when it has no name, [`BdevError::Removed`] when a device below
    /// is no longer there or not claimed.
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
        let mut entries = self.inner.entries.write();
        // A time limit that is set from here on finds the device.
        let (timeout, action) = *self.inner.timeout.lock();
        for wanted in std::iter::once(&name).chain(&info.aliases) {
            if entries.values().any(|e| answers_to(e.dev.info(), wanted)) {
                return Err(BdevError::Exists {
                    name: wanted.clone(),
                });
            }
        }
        let uuid = info.uuid;
        if uuid != [0; 16] && entries.values().any(|e| e.dev.info().uuid == uuid) {
            // A device can be found by its UUID, so no two may have the same.
            return Err(BdevError::Exists {
                name: crate::uuid::format(&uuid),
            });
        }
        // A device below may have been removed since it was claimed, and another have its name.
        let is_claimed = |name: &String| {
            let entry = entries.get(name);
            entry.is_some_and(|e| e.claim.lock().is_some())
        };
        if let Some(gone) = below.iter().find(|name| !is_claimed(name)) {
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
        let bdev = Bdev { entry };
        bdev.set_timeout(timeout, action);
        entries.insert(name.clone(), Arc::clone(&bdev.entry));
        tracing::info!(bdev = %name, product = %bdev.info().product, "added");
        self.inner.events.note(entries, Event::Added(name));
        self.inner.events.tell();
        Ok(bdev)
    }

    /// Returns the device of this name, alias or UUID.
    pub fn get(&self, name: &str) -> Option<Bdev> {
        find(&self.inner.entries.read(), name)
    }

    /// Opens the device of this name, alias, UUID or URI for I/O. A URI makes the device and adds
    /// it.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], with the nearest name or all of them; [`BdevError::Claimed`] when
    /// another module is built on it; or the error of opening a URI.
    pub fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
        self.open_with(name, OpenOptions::new())
    }

    /// Opens a device as [`Registry::open`] does. For reading only, a registered device is returned
    /// as a view that cannot be written.
    ///
    /// # Errors
    /// Fails as [`Registry::open`] does.
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
            let bdev = self.register(Arc::clone(&dev), Vec::new());
            // A failed opening leaves no file behind, also if only the name was taken.
            return Ok(Arc::new(bdev.inspect_err(|_| dev.keep_file(false))?));
        }
        Err(self.not_found(name))
    }

    /// Returns the error for a name that does not exist.
    pub fn not_found(&self, name: &str) -> BdevError {
        let names = self.names();
        BdevError::NotFound {
            name: name.to_owned(),
            hint: names::hint(name, &names),
        }
    }

    /// Claims a device for the exclusive use of `by`.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], [`BdevError::Claimed`].
    pub fn claim(&self, name: &str, by: &str) -> Result<Claimed, BdevError> {
        {
            // The device is not removed meanwhile.
            let entries = self.inner.entries.read();
            if let Some(bdev) = find(&entries, name) {
                return Claimed::new(bdev, by);
            }
        }
        Err(self.not_found(name))
    }

    /// Removes a device and, before it, all devices built on it. Returns their names in that order;
    /// the names are free then. Open channels end what is in flight at their next polls.
    ///
    /// # Errors
    /// [`BdevError::NotFound`].
    pub fn remove(&self, name: &str) -> Result<Vec<String>, BdevError> {
        let bdev = self.get(name).ok_or_else(|| self.not_found(name))?;
        let mut gone = Vec::new();
        self.remove_tree(&bdev.entry, &mut gone);
        Ok(gone)
    }

    /// Removes this device, and no other that has got its name, after those built on it.
    fn remove_tree(&self, entry: &Arc<Entry>, gone: &mut Vec<String>) {
        while let Some(step) = self.remove_next(entry) {
            match step {
                Removal::Above(above) => self.remove_tree(&above, gone),
                Removal::Done => gone.push(entry.dev.info().name.clone()),
            }
        }
    }

    /// Removes the device unless one is built on it, which is returned. Returns `None` when the
    /// device is not there. No device is added between the look and the removal.
    fn remove_next(&self, entry: &Arc<Entry>) -> Option<Removal> {
        let name = &entry.dev.info().name;
        let mut entries = self.inner.entries.write();
        entries.get(name).filter(|e| Arc::ptr_eq(e, entry))?;
        let above = entries.values().find(|e| e.below.contains(name));
        if let Some(above) = above {
            return Some(Removal::Above(Arc::clone(above)));
        }
        entries.remove(name);
        entry.removed.store(true, Ordering::Release);
        tracing::info!(bdev = %name, "removed");
        let removed = Event::Removed(name.clone());
        self.inner.events.note(entries, removed);
        self.inner.events.tell();
        Some(Removal::Done)
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

    /// Calls `listener` for each device that is added or removed from now on, in that order, on a
    /// thread that adds or removes one. A removal may happen on a thread that does I/O. A listener
    /// may use the registry.
    pub fn listen(&self, listener: impl Fn(&Event) + Send + Sync + 'static) {
        self.inner.events.listen(Arc::new(listener));
    }

    /// Sets the time limit of an operation on existing and future devices; zero: no limit.
    pub fn set_timeout(&self, timeout: Duration, action: TimeoutAction) {
        // No device is being added meanwhile.
        let entries = self.inner.entries.read();
        *self.inner.timeout.lock() = (timeout, action);
        for entry in entries.values() {
            entry.set_timeout(timeout, action);
        }
    }

    /// Returns the time limit of an operation on future devices, and the reaction.
    pub fn timeout(&self) -> (Duration, TimeoutAction) {
        *self.inner.timeout.lock()
    }
}

/// The next step of a removal.
enum Removal {
    /// This device has to be removed first.
    Above(Arc<Entry>),
    /// The device was removed.
    Done,
}

fn find(entries: &BTreeMap<String, Arc<Entry>>, name: &str) -> Option<Bdev> {
    let direct = entries.get(name);
    let found = direct.or_else(|| entries.values().find(|e| answers_to(e.dev.info(), name)));
    found.map(|entry| Bdev {
        entry: Arc::clone(entry),
    })
}

fn answers_to(info: &DeviceInfo, name: &str) -> bool {
    info.name == name
        || info.aliases.iter().any(|a| a == name)
        || crate::uuid::parse(name).is_some_and(|u| u == info.uuid)
}

impl Bdev {
    /// Removes this device as [`Registry::remove`] does, but no other one that has got its name.
    /// Returns the names of the removed devices: none if it was removed before.
    pub fn remove(&self) -> Vec<String> {
        let mut gone = Vec::new();
        if let Some(inner) = self.entry.registry.upgrade() {
            Registry { inner }.remove_tree(&self.entry, &mut gone);
        }
        gone
    }

    /// Returns the module that claims it.
    pub fn claimed_by(&self) -> Option<String> {
        self.entry.claim.lock().clone()
    }

    /// Names of the devices that it is built on.
    pub fn below(&self) -> &[String] {
        &self.entry.below
    }

    /// Whether it has been removed.
    pub fn is_removed(&self) -> bool {
        self.entry.is_removed()
    }

    /// Returns the module's device, without statistics.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.entry.dev
    }

    /// Returns the statistics since it was added or since [`Bdev::reset_stats`].
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

    /// Returns the statistics of each open channel since it was opened, by its number.
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

    /// Clears only the shortest and longest latencies, of the device and of its channels.
    pub fn reset_extremes(&self) {
        let channels = self.entry.channels.lock();
        self.entry.past.lock().0.clear_extremes();
        for channel in &*channels {
            channel.clear_extremes();
        }
    }

    /// Switches the latency histogram on or off: of all operations, or of `only` one kind. It is
    /// empty when it is switched on.
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

    /// Returns the queue of each open channel.
    #[must_use]
    pub fn queues(&self) -> Vec<Queue> {
        let channels = self.entry.channels.lock();
        channels.iter().map(|channel| channel.queue()).collect()
    }

    /// Returns the latency histogram of each open channel by its number, in ticks, by
    /// [`crate::stats::bucket_end`]. Returns none when it is off.
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

    /// Returns the latency histogram, in ticks, by [`crate::stats::bucket_end`], or `None` when it
    /// is off.
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

    /// Sets the time limit of an operation; zero: no limit.
    pub fn set_timeout(&self, timeout: Duration, action: TimeoutAction) {
        self.entry.set_timeout(timeout, action);
    }
}

impl BlockDevice for Bdev {
    fn info(&self) -> &DeviceInfo {
        self.entry.dev.info()
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.entry.dev)
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
}
