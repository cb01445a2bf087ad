//! The policy for clean frames in memory: S3-FIFO (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023) with a bound in bytes, which may follow the memory that is free
//! ([`elastic`]).
//!
//! A frame is young at first. The young have a tenth of the memory: what has been used again when it
//! reaches the end of their queue becomes old, the rest goes, so that a long scan does not displace what is used.
//! What came in bulk, written or read ahead, is read soon in any case, by a compaction or a scan: it is
//! fresh for as long again before it is young, and that use does not count.
//! What comes back soon after it went is old at once. The old are passed over as long as they are
//! used. `benches/policies.rs` compares this with other policies on what RocksDB reads.
//!
//! The files' tables own the frames. The cache only has weak references to them and adds up their
//! bytes. A hit does not come here: it sets a bit in its frame. A frame with unwritten bytes is not
//! in the cache at all, so it cannot be evicted.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::utils::CachePadded;
use parking_lot::Mutex;
use pumice_bdev::thread_number;

use super::elastic::{self, Bound, Bounded};
use super::frame::{Frame, PAGE};
use super::huge::HugePages;

const SHARDS: usize = 16;
const STRIPES: usize = 16;
/// The part of the memory that the fresh frames have, and the young ones, as a divisor.
const YOUNG_SHARE: u64 = 10;
/// Two whole buffers, in bytes.
const BUFFERS: u64 = 2 << 20;

/// Counters of the page cache since the mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Number of reads that were answered from memory alone.
    pub hits: u64,
    /// Number of reads that needed the device.
    pub misses: u64,
    /// Current bytes of clean frames in memory.
    pub used_bytes: u64,
    /// The bound in bytes. It changes if the cache follows the memory that is free.
    pub capacity_bytes: u64,
    /// The bound up to which it may grow.
    pub most_bytes: u64,
    /// Number of evicted frames.
    pub evictions: u64,
}

/// The queue of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Age {
    Fresh,
    Young,
    Old,
}

/// A queue of frames, each with the number of bytes that it has when it comes.
#[derive(Default)]
struct FrameQueue {
    frames: VecDeque<(Weak<Frame>, u32)>,
    /// Length at which dead entries are removed.
    sweep_at: usize,
}

impl FrameQueue {
    /// Adds a frame. Returns the bytes of dead entries that were removed.
    fn push(&mut self, frame: Weak<Frame>, bytes: u32) -> u64 {
        let mut swept = 0;
        if self.frames.len() >= self.sweep_at.max(256) {
            self.frames.retain(|(frame, bytes)| {
                let lives = frame.strong_count() > 0;
                swept += if lives { 0 } else { u64::from(*bytes) };
                lives
            });
            self.sweep_at = self.frames.len() * 2;
        }
        self.frames.push_back((frame, bytes));
        swept
    }
}

/// The places of frames that went while they were young, as hashes.
#[derive(Default)]
struct Gone {
    places: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Gone {
    fn add(&mut self, place: u64, most: usize) {
        if self.places.insert(place) {
            self.order.push_back(place);
        }
        while self.order.len() > most
            && let Some(oldest) = self.order.pop_front()
        {
            self.places.remove(&oldest);
        }
    }

    fn take(&mut self, place: u64) -> bool {
        self.places.remove(&place)
    }
}

#[derive(Default)]
struct Shard {
    fresh: FrameQueue,
    young: FrameQueue,
    old: FrameQueue,
    gone: Gone,
}

impl Shard {
    fn queue(&mut self, age: Age) -> &mut FrameQueue {
        match age {
            Age::Fresh => &mut self.fresh,
            Age::Young => &mut self.young,
            Age::Old => &mut self.old,
        }
    }
}

/// The cache; see the module.
pub(crate) struct Cache {
    bound: Bound,
    huge: HugePages,
    used: AtomicU64,
    /// Bytes of the entries of the fresh and of the young queues.
    fresh: AtomicU64,
    young: AtomicU64,
    evictions: AtomicU64,
    /// The shards of the next entry and of the next pop, for each age: so the entries of a queue in
    /// sixteen parts are passed nearly in their order.
    next: [AtomicUsize; 3],
    hand: [AtomicUsize; 3],
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    hits: Box<[CachePadded<AtomicU64>]>,
    misses: Box<[CachePadded<AtomicU64>]>,
}

impl Cache {
    /// A cache without huge pages.
    #[cfg(test)]
    pub fn new(bound: Bound) -> Arc<Cache> {
        Cache::with(bound, HugePages::of(false))
    }

    pub fn with(bound: Bound, huge: HugePages) -> Arc<Cache> {
        Arc::new(Cache {
            bound,
            huge,
            used: AtomicU64::new(0),
            fresh: AtomicU64::new(0),
            young: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            next: Default::default(),
            hand: Default::default(),
            shards: (0..SHARDS).map(|_| CachePadded::default()).collect(),
            hits: (0..STRIPES).map(|_| CachePadded::default()).collect(),
            misses: (0..STRIPES).map(|_| CachePadded::default()).collect(),
        })
    }

    #[inline]
    pub fn count_hit(&self) {
        self.hits[thread_number() % STRIPES].fetch_add(1, Ordering::Relaxed);
    }

    pub fn count_miss(&self) {
        self.misses[thread_number() % STRIPES].fetch_add(1, Ordering::Relaxed);
    }

    /// The bound in bytes.
    pub fn capacity(&self) -> u64 {
        self.bound.bytes()
    }

    pub fn uncharge(&self, bytes: usize) {
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    pub fn stats(&self) -> CacheStats {
        let sum = |c: &[CachePadded<AtomicU64>]| c.iter().map(|c| c.load(Ordering::Relaxed)).sum();
        CacheStats {
            hits: sum(&self.hits),
            misses: sum(&self.misses),
            used_bytes: self.used(),
            capacity_bytes: self.bound.bytes(),
            most_bytes: self.bound.most(),
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }

    /// Adds a clean frame that is in its file's table, and makes room if necessary. Takes no lock
    /// but one shard's and, for evicted frames, their files' table locks.
    pub fn admit(self: &Arc<Cache>, frame: &Arc<Frame>) {
        let bytes = frame.bytes.cap();
        let before = frame.set_charge(bytes);
        if self.huge.count(bytes) {
            self.bound.look_soon();
            self.huge.start();
        }
        self.used.fetch_add(bytes as u64, Ordering::Relaxed);
        self.uncharge(before);
        let place = place_of(frame);
        let was_here = self.shard_of(place).lock().gone.take(place);
        let age = match was_here {
            true => Age::Old,
            false if frame.is_bulk() => Age::Fresh,
            false => Age::Young,
        };
        self.push(age, Arc::downgrade(frame), bytes);
        if self.used() > self.capacity() {
            if self.bound.is_full() {
                let me: Arc<dyn Bounded> = self.clone();
                elastic::watch(Arc::downgrade(&me));
            }
            self.evict_beyond();
        }
    }

    fn push(&self, age: Age, frame: Weak<Frame>, bytes: usize) {
        let n = self.next[age as usize].fetch_add(1, Ordering::Relaxed);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let swept = self.shards[n % SHARDS].lock().queue(age).push(frame, bytes);
        if let Some(sum) = self.sum(age) {
            sum.fetch_add(bytes.into(), Ordering::Relaxed);
            sum.fetch_sub(swept, Ordering::Relaxed);
        }
    }

    /// The bytes of a queue that has its own bound.
    fn sum(&self, age: Age) -> Option<&AtomicU64> {
        match age {
            Age::Fresh => Some(&self.fresh),
            Age::Young => Some(&self.young),
            Age::Old => None,
        }
    }

    /// Takes the first entry of a queue that has one.
    fn pop(&self, age: Age) -> Option<Weak<Frame>> {
        for _ in 0..SHARDS {
            let n = self.hand[age as usize].fetch_add(1, Ordering::Relaxed);
            let popped = self.shards[n % SHARDS].lock().queue(age).frames.pop_front();
            if let Some((frame, bytes)) = popped {
                if let Some(sum) = self.sum(age) {
                    sum.fetch_sub(bytes.into(), Ordering::Relaxed);
                }
                return Some(frame);
            }
        }
        None
    }

    /// Takes frames from the queues until one was evicted. Returns false if there is nothing left to
    /// evict.
    fn evict_one(&self) -> bool {
        // Every frame is passed at most four times: once in each queue to clear its marks, and once to evict it.
        for _ in 0..1 << 20 {
            let most = share_of_young(self.capacity());
            let first = if self.fresh.load(Ordering::Relaxed) > most {
                [Age::Fresh, Age::Young, Age::Old]
            } else if self.young.load(Ordering::Relaxed) > most {
                [Age::Young, Age::Old, Age::Fresh]
            } else {
                [Age::Old, Age::Young, Age::Fresh]
            };
            let entry = |age: Age| self.pop(age).map(|frame| (age, frame));
            let Some((age, weak)) = first.into_iter().find_map(entry) else {
                return false;
            };
            let Some(frame) = weak.upgrade() else {
                continue;
            };
            let hot = frame.take_hot();
            if age == Age::Fresh {
                self.push(Age::Young, weak, frame.bytes.cap());
                continue;
            }
            let hot_pages: u32 = hot.iter().map(|w| w.count_ones()).sum();
            let Some(owner) = frame.owner() else { continue };
            if hot_pages == 0 {
                if age == Age::Young {
                    self.remember(&frame);
                }
                owner.remove(&frame);
            } else if frame.is_large() && hot_pages < 96 && owner.is_whole(&frame) {
                for kept in owner.thin_out(&frame, hot) {
                    let bytes = kept.bytes.cap();
                    kept.set_charge(bytes);
                    self.used.fetch_add(bytes as u64, Ordering::Relaxed);
                    self.push(Age::Old, Arc::downgrade(&kept), bytes);
                }
            } else {
                self.push(Age::Old, weak, frame.bytes.cap());
                continue;
            }
            self.evictions.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        false
    }

    /// The shard that remembers a place.
    fn shard_of(&self, place: u64) -> &Mutex<Shard> {
        &self.shards[usize::try_from(place % SHARDS as u64).expect("few shards")]
    }

    /// Remembers that a young frame goes, as long as about as many more go as the cache has room for.
    fn remember(&self, frame: &Frame) {
        let most = self.capacity() / PAGE as u64 / SHARDS as u64;
        let place = place_of(frame);
        let mut shard = self.shard_of(place).lock();
        shard
            .gone
            .add(place, usize::try_from(most).unwrap_or(usize::MAX));
    }
}

/// Returns the bytes that the fresh frames may have, and the young ones. A cache that is worth it has room for two
/// whole buffers.
fn share_of_young(capacity: u64) -> u64 {
    let least = if capacity >= 4 * BUFFERS { BUFFERS } else { 0 };
    (capacity / YOUNG_SHARE).max(least)
}

/// Returns a hash of the place in its file where a frame begins.
fn place_of(frame: &Frame) -> u64 {
    let mut hasher = DefaultHasher::new();
    (frame.owner_address(), frame.region, frame.start).hash(&mut hasher);
    hasher.finish()
}

impl Bounded for Cache {
    fn bound(&self) -> &Bound {
        &self.bound
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn evict_beyond(&self) {
        while self.used() > self.capacity() && self.evict_one() {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::fill::FillBuf;
    use super::super::frame::{FileCache, split};
    use super::*;
    use pumice_bdev::DmaBuf;
    use std::ops::Range;

    fn fixed(bytes: u64) -> Arc<Cache> {
        Cache::new(Bound::new(bytes, bytes))
    }

    fn put(fc: &Arc<FileCache>, page: u64) {
        put_bulk(fc, page, 1);
    }

    fn put_bulk(fc: &Arc<FileCache>, page: u64, pages: usize) {
        let buf = DmaBuf::zeroed(pages * PAGE).unwrap();
        let (region, start) = split(page * PAGE as u64);
        let fill = Arc::new(FillBuf::from_buf(buf, pages * PAGE));
        let frame = Frame::new(fc, region, start, fill, false);
        assert!(fc.install(fc.generation(), &frame));
    }

    #[test]
    fn it_is_bounded_and_spares_what_is_used() {
        let cache = fixed(100 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let mut b = [0u8; 1];
        for page in 0..1000 {
            put(&fc, page);
            assert!(cache.used() <= 100 * PAGE as u64);
            assert_eq!(fc.copy(0, &mut b), 1, "page 0 is used all the time");
        }
        let present = (0..1000)
            .filter(|p| fc.find(p * PAGE as u64).is_some())
            .count();
        assert!((90..=100).contains(&present), "{present}");
        assert!(cache.stats().evictions >= 900);
    }

    #[test]
    fn dirty_frames_are_not_its_business() {
        let cache = fixed(4 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let fill = Arc::new(FillBuf::from_buf(DmaBuf::zeroed(PAGE).unwrap(), PAGE));
        let dirty = Frame::new(&fc, 0, 0, fill, true);
        fc.replace_pages(&dirty);
        for page in 10..100 {
            put(&fc, page);
        }
        assert!(fc.find(0).is_some());
        dirty.take_hot();
        dirty.release_dirty();
        for page in 100..200 {
            put(&fc, page);
        }
        drop(dirty);
        assert!(fc.find(0).is_none());
        assert!(cache.used() <= 4 * PAGE as u64);
    }

    #[test]
    fn dead_entries_do_not_pile_up() {
        let cache = fixed(1 << 30);
        for _ in 0..50 {
            let fc = FileCache::new(&cache);
            for page in 0..500 {
                put(&fc, page);
            }
        }
        assert_eq!(cache.used(), 0);
        let entries: usize = cache
            .shards
            .iter()
            .map(|s| s.lock().young.frames.len())
            .sum();
        assert!(entries < 16 * 600, "{entries}");
        let entries = (entries * PAGE) as u64;
        assert_eq!(cache.young.load(Ordering::Relaxed), entries);
    }

    fn present(fc: &Arc<FileCache>, pages: Range<u64>) -> usize {
        pages.filter(|p| fc.find(p * PAGE as u64).is_some()).count()
    }

    /// A scan much longer than the cache leaves what has been used again, although nobody uses it meanwhile.
    #[test]
    fn a_scan_does_not_displace_what_is_used() {
        let cache = fixed(100 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let mut b = [0u8; 1];
        for page in 0..80 {
            put(&fc, page);
            assert_eq!(fc.copy(page * PAGE as u64, &mut b), 1);
        }
        for page in 1000..3000 {
            put(&fc, page);
        }
        assert_eq!(present(&fc, 0..80), 80);
    }

    /// A scan that reads ahead uses each of its pages soon, more than once where blocks are not whole
    /// pages, and never again.
    #[test]
    fn a_scan_that_reads_ahead_does_not_either() {
        let cache = fixed(1000 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let mut b = [0u8; 1];
        for page in 0..800 {
            put(&fc, page);
            assert_eq!(fc.copy(page * PAGE as u64, &mut b), 1);
        }
        for first in (1024..9024).step_by(16) {
            put_bulk(&fc, first, 16);
            for page in first..first + 16 {
                assert_eq!(fc.copy(page * PAGE as u64, &mut b), 1);
            }
        }
        assert_eq!(present(&fc, 0..800), 800);
    }

    /// The smallest cache of a mount, too, has what was just written.
    #[test]
    fn a_small_cache_keeps_the_last_buffer() {
        let cache = fixed(8 << 20);
        let fc = FileCache::new(&cache);
        let mut b = [0u8; 1];
        for page in 0..1536 {
            put(&fc, page);
            assert_eq!(fc.copy(page * PAGE as u64, &mut b), 1);
        }
        for region in 8..40 {
            let before = (region - 1) * 256;
            put_bulk(&fc, region * 256, 256);
            assert!(
                region == 8 || present(&fc, before..before + 1) == 1,
                "{region}"
            );
        }
    }

    /// A frame that is read again soon after it went stays through a scan.
    #[test]
    fn what_comes_back_soon_is_old() {
        let cache = fixed(1600 * PAGE as u64);
        let fc = FileCache::new(&cache);
        for page in 0..2000 {
            put(&fc, page);
        }
        assert_eq!(present(&fc, 0..200), 0, "they went while they were young");
        for page in (0..200).chain(10_000..20_000) {
            put(&fc, page);
        }
        assert_eq!(present(&fc, 0..200), 200);
        let gone: usize = cache.shards.iter().map(|s| s.lock().gone.order.len()).sum();
        assert!(gone <= 1600, "{gone} places are remembered");
    }
}
