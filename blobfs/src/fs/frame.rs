//! The memory of a file: frames, found through a table that is read without a lock.
//!
//! A file is divided into regions of 1 MiB. A region is either one *whole* frame (its bytes were
//! appended, and the append buffer became the cache) or up to 256 page slots that point to frames
//! of one or more pages (its bytes were read). Readers follow `ArcSwap` pointers. A thread that
//! changes them holds [`FileCache::lock`], which no hit takes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::cache::Cache;
use super::fill::FillBuf;
use super::pins::Pins;

/// Granularity of the cache in bytes.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a region, and of a full append buffer.
pub(crate) const REGION: usize = 1 << 20;
const PAGES: usize = REGION / PAGE;
/// The longest frame that counts as one that was read for itself.
const BULK: usize = 4 * PAGE;

/// Returns `n / REGION` and the rest.
#[inline]
pub(crate) fn split(off: u64) -> (usize, usize) {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "64-bit targets; the rest is below 1 MiB"
    )]
    (
        (off / REGION as u64) as usize,
        (off % REGION as u64) as usize,
    )
}

/// Consecutive bytes of one file inside one region.
pub(crate) struct Frame {
    /// The bytes.
    pub bytes: Arc<FillBuf>,
    /// Offset in the region, a multiple of the page size.
    pub start: usize,
    /// Number of the region in the file.
    pub region: usize,
    /// Number of device writes that must complete before the frame may be evicted, plus one while
    /// it is being appended to.
    dirty: Pins,
    hot: [AtomicU64; PAGES / 64],
    charge: AtomicUsize,
    cache: Arc<Cache>,
    owner: Weak<FileCache>,
}

impl Frame {
    pub fn new(
        owner: &Arc<FileCache>,
        region: usize,
        start: usize,
        bytes: Arc<FillBuf>,
        dirty: bool,
    ) -> Arc<Frame> {
        Arc::new(Frame {
            bytes,
            start,
            region,
            dirty: Pins::new(dirty),
            hot: Default::default(),
            charge: AtomicUsize::new(0),
            cache: Arc::clone(&owner.cache),
            owner: Arc::downgrade(owner),
        })
    }

    /// Marks the page at `off` (in the region) as used since the cache last passed it. Writes the
    /// shared word only if the bit is not set yet.
    #[inline]
    fn touch(&self, off: usize) {
        let page = off / PAGE;
        let bit = 1u64 << (page % 64);
        let word = &self.hot[page / 64];
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Clears the marks and returns them.
    pub fn take_hot(&self) -> [u64; PAGES / 64] {
        std::array::from_fn(|i| self.hot[i].swap(0, Ordering::Relaxed))
    }

    /// Whether it came in bulk, with more than the few pages of one read.
    pub fn is_bulk(&self) -> bool {
        self.bytes.cap() > BULK
    }

    /// Returns the end of its bytes in the region.
    fn end(&self) -> usize {
        self.start + self.bytes.filled()
    }

    /// Whether it has a whole region's buffer.
    pub fn is_large(&self) -> bool {
        self.bytes.cap() > 64 << 10
    }

    /// Records one more write that must complete before the frame is clean.
    pub fn hold_dirty(&self) {
        self.dirty.hold();
    }

    /// Records that a write has completed. The last one adds the frame to the cache.
    pub fn release_dirty(self: &Arc<Self>) {
        if !self.dirty.release() {
            return;
        }
        match self.owner.upgrade() {
            Some(owner) if owner.transient.load(Ordering::Relaxed) => owner.remove(self),
            _ => self.cache.admit(self),
        }
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty.any()
    }

    pub fn set_charge(&self, bytes: usize) -> usize {
        self.charge.swap(bytes, Ordering::Relaxed)
    }

    pub fn owner(&self) -> Option<Arc<FileCache>> {
        self.owner.upgrade()
    }

    /// Returns the address of the owner, which another one may get when it is gone.
    pub fn owner_address(&self) -> usize {
        self.owner.as_ptr().addr()
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.cache.uncharge(self.charge.load(Ordering::Relaxed));
    }
}

#[derive(Default)]
struct Region {
    whole: ArcSwapOption<Frame>,
    pages: OnceLock<Box<[ArcSwapOption<Frame>]>>,
}

type Segment = OnceLock<Box<[Region]>>;

const SEGMENTS: usize = 24;
const SEGMENT0: usize = 8;
/// Number of regions that a table has places for.
const REGIONS: usize = SEGMENT0 * ((1 << SEGMENTS) - 1);
/// The longest file that can be written to, in bytes: nearly 128 TiB.
pub(crate) const LONGEST: u64 = REGIONS as u64 * REGION as u64;

/// The frames of one file.
pub(crate) struct FileCache {
    /// Segment k has `8 << k` regions. It is allocated when first needed and never moved. So is the
    /// table, since most files of a large store are not read.
    segments: OnceLock<Box<[Segment; SEGMENTS]>>,
    /// Held by a thread that changes the table.
    lock: Mutex<()>,
    /// Number of changes of existing bytes. A page that was read from the device is only installed
    /// if there was none meanwhile.
    generation: AtomicU64,
    /// Whether frames are dropped after their last write (direct I/O).
    transient: AtomicBool,
    cache: Arc<Cache>,
}

fn segment_of(region: usize) -> (usize, usize) {
    let n = region / SEGMENT0 + 1;
    let k = n.ilog2() as usize;
    (k, region - SEGMENT0 * ((1 << k) - 1))
}

impl FileCache {
    pub fn new(cache: &Arc<Cache>) -> Arc<FileCache> {
        Arc::new(FileCache {
            segments: OnceLock::new(),
            lock: Mutex::new(()),
            generation: AtomicU64::new(0),
            transient: AtomicBool::new(false),
            cache: Arc::clone(cache),
        })
    }

    /// Sets whether frames are dropped after their last write.
    pub fn set_transient(&self, on: bool) {
        self.transient.store(on, Ordering::Relaxed);
    }

    #[inline]
    fn region(&self, region: usize) -> Option<&Region> {
        let (k, i) = segment_of(region);
        self.segments.get()?.get(k)?.get()?.get(i)
    }

    /// Whether frames of a region have a place. A thin file can be so long that they have none: it is read without the cache.
    pub fn has_place(&self, region: usize) -> bool {
        region < REGIONS
    }

    fn region_or_new(&self, region: usize) -> &Region {
        let (k, i) = segment_of(region);
        let segment = self.segments.get_or_init(Box::default)[k]
            .get_or_init(|| (0..SEGMENT0 << k).map(|_| Region::default()).collect());
        &segment[i]
    }

    /// Returns the generation, before a read from the device; see [`FileCache::install`].
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Copies cached bytes at `off` up to the first byte that is not cached. Returns their number,
    /// and marks the pages as used.
    #[inline]
    pub fn copy(&self, off: u64, out: &mut [u8]) -> usize {
        let mut done = 0;
        while done < out.len() {
            let n = self.copy_one(off + done as u64, &mut out[done..]);
            if n == 0 {
                break;
            }
            done += n;
        }
        done
    }

    #[inline]
    fn copy_one(&self, off: u64, out: &mut [u8]) -> usize {
        let (region_no, at) = split(off);
        let Some(region) = self.region(region_no) else {
            return 0;
        };
        let whole = region.whole.load();
        if let Some(frame) = whole.as_deref() {
            return copy_from(frame, at, out);
        }
        let Some(pages) = region.pages.get() else {
            return 0;
        };
        match pages[at / PAGE].load().as_deref() {
            Some(frame) => copy_from(frame, at, out),
            None => 0,
        }
    }

    /// Returns the frame that has the byte at `off`.
    #[inline]
    pub fn find(&self, off: u64) -> Option<Arc<Frame>> {
        let (region_no, at) = split(off);
        let region = self.region(region_no)?;
        let frame = match region.whole.load_full() {
            Some(frame) => frame,
            None => region.pages.get()?[at / PAGE].load_full()?,
        };
        if at - frame.start >= frame.bytes.filled() {
            return None;
        }
        frame.touch(at);
        Some(frame)
    }

    /// Returns the whole frame of a region.
    pub fn whole(&self, region: usize) -> Option<Arc<Frame>> {
        self.region(region)?.whole.load_full()
    }

    /// Whether `frame` is the whole frame of its region.
    pub fn is_whole(&self, frame: &Arc<Frame>) -> bool {
        self.whole(frame.region)
            .is_some_and(|f| Arc::ptr_eq(&f, frame))
    }

    /// Returns the first run of pages in `[from, to)` (byte offsets) that is not cached, as byte
    /// offsets rounded to pages, inside one region.
    pub fn first_missing(&self, from: u64, to: u64) -> Option<Range<u64>> {
        let page = PAGE as u64;
        let mut at = from / page * page;
        let mut run: Option<Range<u64>> = None;
        while at < to {
            let (region_no, in_region) = split(at);
            if let Some(r) = &run
                && split(r.start).0 != region_no
            {
                return run;
            }
            let page_end = (at + page).min(to);
            let (cached, step) = self.cached(region_no, in_region, split_end(page_end, region_no));
            match (&mut run, cached) {
                (Some(_), true) => return run,
                (Some(r), false) => r.end = at + page,
                (None, false) => run = Some(at..at + page),
                (None, true) => {}
            }
            at += step;
        }
        run
    }

    /// Returns whether the bytes from `in_region` up to `end` in the region, all of one page, are
    /// cached, and for how many bytes the answer holds.
    fn cached(&self, region_no: usize, in_region: usize, end: usize) -> (bool, u64) {
        let page = PAGE as u64;
        let region = self.region(region_no);
        if let Some(frame) = region.and_then(|r| r.whole.load_full()) {
            let filled = frame.bytes.filled();
            // Check whole pages at once.
            let pages = filled.saturating_sub(in_region) / PAGE * PAGE;
            return (filled >= end, (pages as u64).max(page));
        }
        let slot = region
            .and_then(|r| r.pages.get())
            .map(|p| &p[in_region / PAGE]);
        let frame = slot.and_then(arc_swap::ArcSwapAny::load_full);
        // A page at the end of the file may be short from a time when the file was shorter.
        (frame.is_some_and(|f| f.end() >= end), page)
    }

    /// Puts a frame of pages that were read from the device into the slots that it covers and that
    /// are empty or have fewer bytes, unless bytes of the file were changed since `generation` was
    /// taken. Adds it to the cache. A page that an old end of the file had cut short counts as
    /// missing once the file has grown, and is replaced in this way.
    pub fn install(&self, generation: u64, frame: &Arc<Frame>) -> bool {
        {
            let _guard = self.lock.lock();
            let is_current = self.generation.load(Ordering::Relaxed) == generation;
            if !is_current || !self.has_place(frame.region) {
                return false;
            }
            let region = self.region_or_new(frame.region);
            if region.whole.load().is_some() {
                return false;
            }
            let pages = region
                .pages
                .get_or_init(|| (0..PAGES).map(|_| ArcSwapOption::empty()).collect());
            let first = frame.start / PAGE;
            let count = frame.bytes.cap() / PAGE;
            let mut used = false;
            for (slot, page) in pages[first..first + count].iter().zip(first..) {
                let end = frame.end().min((page + 1) * PAGE);
                if slot.load().as_ref().is_none_or(|old| old.end() < end) {
                    slot.store(Some(Arc::clone(frame)));
                    used = true;
                }
            }
            if !used {
                return false;
            }
        }
        self.cache.admit(frame);
        true
    }

    /// Makes `frame` the whole frame of its region, and empties the region's page slots.
    pub fn install_whole(&self, frame: &Arc<Frame>) {
        let _guard = self.lock.lock();
        self.generation.fetch_add(1, Ordering::Release);
        let region = self.region_or_new(frame.region);
        region.whole.store(Some(Arc::clone(frame)));
        clear_pages(region);
    }

    /// Replaces the pages that `frame` covers, in a region without a whole frame.
    pub fn replace_pages(&self, frame: &Arc<Frame>) {
        let _guard = self.lock.lock();
        self.generation.fetch_add(1, Ordering::Release);
        let region = self.region_or_new(frame.region);
        let pages = region
            .pages
            .get_or_init(|| (0..PAGES).map(|_| ArcSwapOption::empty()).collect());
        let range = frame.start..frame.start + frame.bytes.cap();
        for slot in pages {
            // A frame that overlaps would show its old bytes through its other slots.
            let overlaps = slot.load().as_ref().is_some_and(|old| {
                old.start < range.end && range.start < old.start + old.bytes.cap()
            });
            if overlaps {
                slot.store(None);
            }
        }
        for slot in &pages[range.start / PAGE..range.end / PAGE] {
            slot.store(Some(Arc::clone(frame)));
        }
    }

    /// Removes everything in regions from `first` on.
    pub fn remove_from(&self, first: usize) {
        let _guard = self.lock.lock();
        self.generation.fetch_add(1, Ordering::Release);
        for (k, segment) in self
            .segments
            .get()
            .into_iter()
            .flat_map(|s| s.iter())
            .enumerate()
        {
            let Some(segment) = segment.get() else {
                continue;
            };
            let base = SEGMENT0 * ((1 << k) - 1);
            for region in segment.iter().skip(first.saturating_sub(base)) {
                region.whole.store(None);
                clear_pages(region);
            }
        }
    }

    /// Removes everything of a region, which has no unwritten bytes.
    pub fn forget_region(&self, region: usize) {
        let _guard = self.lock.lock();
        self.generation.fetch_add(1, Ordering::Release);
        if let Some(region) = self.region(region) {
            region.whole.store(None);
            clear_pages(region);
        }
    }

    /// Removes clean frames that begin in `[from, to)`.
    pub fn drop_clean(&self, from: u64, to: u64) {
        let _guard = self.lock.lock();
        let mut at = from / PAGE as u64 * PAGE as u64;
        while at < to {
            let (region_no, in_region) = split(at);
            let Some(region) = self.region(region_no) else {
                at += (REGION - in_region) as u64;
                continue;
            };
            // The last region of a file ends before its frame does.
            let clean = region
                .whole
                .load()
                .as_ref()
                .is_some_and(|f| !f.is_dirty() && to - at >= f.bytes.filled() as u64);
            if clean && in_region == 0 {
                region.whole.store(None);
            }
            if let Some(pages) = region.pages.get() {
                let slot = &pages[in_region / PAGE];
                if slot.load().as_ref().is_some_and(|f| !f.is_dirty()) {
                    slot.store(None);
                }
                at += PAGE as u64;
            } else {
                at += (REGION - in_region) as u64;
            }
        }
    }

    /// Removes `frame` from the table, wherever it still is.
    pub fn remove(&self, frame: &Arc<Frame>) {
        let _guard = self.lock.lock();
        self.remove_locked(frame);
    }

    fn remove_locked(&self, frame: &Arc<Frame>) {
        let Some(region) = self.region(frame.region) else {
            return;
        };
        if region
            .whole
            .load()
            .as_ref()
            .is_some_and(|f| Arc::ptr_eq(f, frame))
        {
            region.whole.store(None);
        }
        if let Some(pages) = region.pages.get() {
            let first = frame.start / PAGE;
            let count = frame.bytes.cap().div_ceil(PAGE);
            for slot in pages.iter().skip(first).take(count) {
                if slot.load().as_ref().is_some_and(|f| Arc::ptr_eq(f, frame)) {
                    slot.store(None);
                }
            }
        }
    }

    /// Removes a whole frame, but keeps copies of the pages in `hot`, as frames of their own.
    /// Returns these; the caller adds them to the cache.
    pub fn thin_out(
        self: &Arc<Self>,
        frame: &Arc<Frame>,
        hot: [u64; PAGES / 64],
    ) -> Vec<Arc<Frame>> {
        let mut kept = Vec::new();
        let is_hot = |page: usize| hot[page / 64] & (1 << (page % 64)) != 0;
        let pages_filled = frame.bytes.filled() / PAGE;
        let mut page = 0;
        while page < pages_filled {
            if !is_hot(page) {
                page += 1;
                continue;
            }
            let first = page;
            while page < pages_filled && page - first < 4 && is_hot(page) {
                page += 1;
            }
            let bytes = frame.bytes.get(first * PAGE..page * PAGE);
            if let Some(bytes) = bytes
                && let Ok(buf) = pumice_bdev::DmaBuf::copy_from(bytes)
            {
                let fill = Arc::new(FillBuf::from_buf(buf, bytes.len()));
                kept.push(Frame::new(self, frame.region, first * PAGE, fill, false));
            }
        }
        let _guard = self.lock.lock();
        let region = self.region_or_new(frame.region);
        if !region
            .whole
            .load()
            .as_ref()
            .is_some_and(|f| Arc::ptr_eq(f, frame))
        {
            return Vec::new();
        }
        let pages = region
            .pages
            .get_or_init(|| (0..PAGES).map(|_| ArcSwapOption::empty()).collect());
        for f in &kept {
            let at = f.start / PAGE;
            for slot in &pages[at..at + f.bytes.cap() / PAGE] {
                slot.store(Some(Arc::clone(f)));
            }
        }
        region.whole.store(None);
        kept
    }
}

fn clear_pages(region: &Region) {
    if let Some(pages) = region.pages.get() {
        for slot in pages {
            if slot.load().is_some() {
                slot.store(None);
            }
        }
    }
}

/// Returns the position of `off` in the region `region`, or its end.
fn split_end(off: u64, region: usize) -> usize {
    let base = region as u64 * REGION as u64;
    usize::try_from(off - base).unwrap_or(REGION)
}

#[inline]
fn copy_from(frame: &Frame, at: usize, out: &mut [u8]) -> usize {
    let from = at - frame.start;
    let filled = frame.bytes.filled();
    if from >= filled {
        return 0;
    }
    let n = out.len().min(filled - from);
    let Some(bytes) = frame.bytes.get(from..from + n) else {
        return 0;
    };
    out[..n].copy_from_slice(bytes);
    frame.touch(at);
    if n > PAGE {
        frame.touch(at + n - 1);
    }
    n
}

#[cfg(test)]
mod tests;
