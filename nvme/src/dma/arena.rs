//! The process's arena: size classes with a cache per thread over the buddy lists.
//!
//! Three stages: the thread's cache (no lock), a list per class (one short lock, moved in
//! batches), the buddy lists (joins and splits). When the buddy lists cannot serve, the class
//! lists are poured back into them; only when that does not help does the arena grow.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use super::buddy::{Buddy, CLASSES, MAX_SHIFT, Place, class_len, class_of};
use super::error::DmaError;
use super::mapper::{DmaMapper, MAX_CHUNKS, MapperGuard};
use super::region::{CHUNK_LEN, Region, RegionId};

/// The largest buffer, in bytes.
pub(super) const MAX_BUFFER: usize = 1 << MAX_SHIFT;
/// What a thread's cache may hold per class, in bytes and in blocks.
const THREAD_BYTES: usize = 1 << 20;
const THREAD_BLOCKS: usize = 64;
/// The arena doubles slowly: a new region is a quarter of what is there, within these bounds.
const REGION_MAX: usize = 256 << 20;

/// Whether the arena's memory is huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    Never,
    /// Huge pages as long as the system has free ones, then ordinary pages.
    Auto,
    /// Huge pages only; an error when there are none left. Needed without an IOMMU.
    Always,
}

/// How the arena gets its memory; see [`configure`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ArenaOptions {
    /// Huge pages or ordinary ones.
    pub huge: HugePages,
    /// Most bytes that the arena may take.
    pub max_bytes: usize,
    /// Least bytes to grow by; rounded up to a multiple of 2 MiB, at most 256 MiB.
    pub region_min: usize,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        ArenaOptions {
            huge: HugePages::Never,
            max_bytes: MAX_CHUNKS * CHUNK_LEN,
            region_min: CHUNK_LEN,
        }
    }
}

/// What the arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaStats {
    /// Bytes taken from the system.
    pub total_bytes: usize,
    /// Bytes free in the shared lists; what threads keep in their caches counts as used.
    pub free_bytes: usize,
    /// Regions.
    pub regions: usize,
}

/// A block on its way between the stages; whoever holds it owns its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub ptr: NonNull<u8>,
    pub region: RegionId,
    pub offset: u32,
    pub slot: u16,
    pub class: u8,
}

/// Blocks in a list: a wrapper, because a bare pointer is not `Send`.
#[derive(Default)]
struct BlockList(Vec<Block>);

#[allow(unsafe_code)]
// SAFETY: a block is the sole title to its bytes, which belong to the process-wide arena and to
// no thread; moving the title to another thread moves the right to use them.
unsafe impl Send for BlockList {}

struct Growth {
    options: ArenaOptions,
    regions: Vec<Arc<Region>>,
    mappers: Vec<(u64, Arc<dyn DmaMapper>)>,
    next_mapper: u64,
    total: usize,
}

struct Arena {
    /// Lock order: `growth`, then `buddy`, then one of `lists`.
    growth: Mutex<Growth>,
    buddy: Mutex<(Buddy, Vec<Arc<Region>>)>,
    lists: [Mutex<BlockList>; CLASSES],
    used: AtomicBool,
}

static ARENA: LazyLock<Arena> = LazyLock::new(|| Arena {
    growth: Mutex::new(Growth {
        options: ArenaOptions::default(),
        regions: Vec::new(),
        mappers: Vec::new(),
        next_mapper: 0,
        total: 0,
    }),
    buddy: Mutex::new((Buddy::default(), Vec::new())),
    lists: std::array::from_fn(|_| Mutex::new(BlockList::default())),
    used: AtomicBool::new(false),
});

struct ThreadCache([Vec<Block>; CLASSES]);

impl Drop for ThreadCache {
    fn drop(&mut self) {
        for (class, blocks) in self.0.iter_mut().enumerate() {
            if !blocks.is_empty() {
                ARENA.lists[class].lock().0.append(blocks);
            }
        }
    }
}

thread_local! {
    static CACHE: RefCell<ThreadCache> =
        const { RefCell::new(ThreadCache([const { Vec::new() }; CLASSES])) };
}

const fn thread_limit(class: usize) -> usize {
    let by_bytes = THREAD_BYTES >> (class + super::buddy::MIN_SHIFT as usize);
    if by_bytes > THREAD_BLOCKS {
        THREAD_BLOCKS
    } else {
        by_bytes
    }
}

/// Takes a block that holds `len` bytes.
#[inline]
pub(super) fn take(len: usize) -> Result<Block, DmaError> {
    if len == 0 || len > MAX_BUFFER {
        return Err(DmaError::Length {
            len,
            max: MAX_BUFFER,
        });
    }
    let class = class_of(len);
    let cached = CACHE.try_with(|c| c.borrow_mut().0[class].pop());
    match cached {
        Ok(Some(block)) => Ok(block),
        _ => take_slow(class),
    }
}

/// Gives a block back.
#[inline]
pub(super) fn give(block: Block) {
    let class = usize::from(block.class);
    let kept = CACHE.try_with(|c| {
        let list = &mut c.borrow_mut().0[class];
        if list.len() < thread_limit(class) {
            list.push(block);
            return true;
        }
        if list.is_empty() {
            return false;
        }
        // Half of a full cache moves to the shared list, so that a thread which only frees
        // feeds the ones that only allocate.
        let keep = list.len() / 2;
        list.push(block);
        ARENA.lists[class].lock().0.extend(list.drain(keep..));
        true
    });
    if kept != Ok(true) {
        ARENA.lists[class].lock().0.push(block);
    }
}

#[cold]
fn take_slow(class: usize) -> Result<Block, DmaError> {
    let arena = &*ARENA;
    let want = (thread_limit(class) / 2).max(1);
    let mut got = Vec::with_capacity(want);
    {
        let mut list = arena.lists[class].lock();
        let keep = list.0.len().saturating_sub(want);
        got.extend(list.0.drain(keep..));
    }
    if got.is_empty() {
        arena.refill(class, want, &mut got);
    }
    if got.is_empty() {
        let mut growth = arena.growth.lock();
        // Another thread may have grown the arena while this one waited.
        arena.refill(class, want, &mut got);
        if got.is_empty() {
            arena.collect();
            arena.refill(class, want, &mut got);
        }
        // Threads that find the class lists empty take from a new region without the growth
        // lock, so one region need not be enough.
        while got.is_empty() {
            arena.grow(&mut growth, class_len(class))?;
            arena.refill(class, want, &mut got);
        }
    }
    let block = got.pop().expect("the loop ends with a block or an error");
    if !got.is_empty() {
        let kept = CACHE.try_with(|c| c.borrow_mut().0[class].append(&mut got));
        if kept.is_err() {
            arena.lists[class].lock().0.append(&mut got);
        }
    }
    Ok(block)
}

impl Arena {
    fn refill(&self, class: usize, want: usize, out: &mut Vec<Block>) {
        let mut guard = self.buddy.lock();
        let (buddy, regions) = &mut *guard;
        while out.len() < want {
            let Some(place) = buddy.take(class) else {
                break;
            };
            let region = &regions[place.slot as usize];
            out.push(Block {
                ptr: region.ptr(place.offset as usize),
                region: region.id(),
                offset: place.offset,
                slot: u16::try_from(place.slot).expect("MAX_CHUNKS regions at most"),
                class: u8::try_from(class).expect("few classes"),
            });
        }
    }

    /// Pours the class lists back, so that free neighbours join.
    fn collect(&self) {
        let mut guard = self.buddy.lock();
        for (class, list) in self.lists.iter().enumerate() {
            for block in list.lock().0.drain(..) {
                let place = Place {
                    slot: u32::from(block.slot),
                    offset: block.offset,
                };
                guard.0.give(place, class);
            }
        }
    }

    fn grow(&self, growth: &mut Growth, need: usize) -> Result<(), DmaError> {
        self.used.store(true, Ordering::Relaxed);
        let need = need.next_multiple_of(CHUNK_LEN);
        let floor = growth.options.region_min.clamp(CHUNK_LEN, REGION_MAX);
        let wish = (growth.total / 4)
            .clamp(floor, REGION_MAX)
            .next_multiple_of(CHUNK_LEN);
        let mut last = None;
        // The comfortable size first, then what is needed at the least.
        for len in [wish.max(need), need] {
            if growth.total + len > growth.options.max_bytes.min(MAX_CHUNKS * CHUNK_LEN) {
                last = Some(DmaError::Limit {
                    asked: len,
                    total: growth.total,
                    limit: growth.options.max_bytes,
                });
                continue;
            }
            match self.add_region(growth, len) {
                Ok(()) => return Ok(()),
                Err(e) => last = Some(e),
            }
        }
        Err(last.expect("two sizes were tried"))
    }

    fn add_region(&self, growth: &mut Growth, len: usize) -> Result<(), DmaError> {
        let id = RegionId(
            u32::try_from(growth.total / CHUNK_LEN).expect("the arena has at most MAX_CHUNKS"),
        );
        let region = match growth.options.huge {
            HugePages::Never => Region::map(id, len, false)?,
            HugePages::Auto => {
                Region::map(id, len, true).or_else(|_| Region::map(id, len, false))?
            }
            HugePages::Always => Region::map(id, len, true).map_err(|e| match e {
                DmaError::Os { source, .. } => DmaError::NoHugePages {
                    len,
                    pages: (growth.total + len) / CHUNK_LEN,
                    source,
                },
                other => other,
            })?,
        };
        let region = Arc::new(region);
        for (done, (_, mapper)) in growth.mappers.iter().enumerate() {
            if let Err(e) = mapper.map(&region) {
                for (_, earlier) in &growth.mappers[..done] {
                    earlier.unmap(&region);
                }
                tracing::warn!(len, error = %e, "a device could not map new DMA memory");
                return Err(e);
            }
        }
        growth.total += len;
        growth.regions.push(Arc::clone(&region));
        let mut guard = self.buddy.lock();
        guard.0.add_region(len);
        guard.1.push(region);
        tracing::debug!(len, total = growth.total, "DMA arena grown");
        Ok(())
    }
}

/// Sets the arena's options. Call it before the first buffer is taken and before the first
/// device is opened; afterwards it fails with [`DmaError::AlreadyInUse`].
pub fn configure(options: ArenaOptions) -> Result<(), DmaError> {
    let mut growth = ARENA.growth.lock();
    if ARENA.used.load(Ordering::Relaxed) {
        return Err(DmaError::AlreadyInUse);
    }
    growth.options = options;
    Ok(())
}

/// Makes `mapper` know every region, those that exist now and those to come, until the guard
/// is dropped. Fails, with nothing mapped, when it refuses one of the existing regions.
///
/// Blocks for as long as mapping takes. `map` and `unmap` are called with the arena's growth
/// lock held: they must not take DMA memory themselves.
pub fn register_mapper(mapper: Arc<dyn DmaMapper>) -> Result<MapperGuard, DmaError> {
    let mut growth = ARENA.growth.lock();
    ARENA.used.store(true, Ordering::Relaxed);
    for (done, region) in growth.regions.iter().enumerate() {
        if let Err(e) = mapper.map(region) {
            for earlier in &growth.regions[..done] {
                mapper.unmap(earlier);
            }
            return Err(e);
        }
    }
    let id = growth.next_mapper;
    growth.next_mapper += 1;
    growth.mappers.push((id, mapper));
    Ok(MapperGuard(id))
}

pub(super) fn unregister_mapper(id: u64) {
    let mut growth = ARENA.growth.lock();
    if let Some(at) = growth.mappers.iter().position(|(i, _)| *i == id) {
        let (_, mapper) = growth.mappers.swap_remove(at);
        for region in &growth.regions {
            mapper.unmap(region);
        }
    }
}

/// What the arena holds at this moment.
pub fn stats() -> ArenaStats {
    let (total_bytes, regions) = {
        let growth = ARENA.growth.lock();
        (growth.total, growth.regions.len())
    };
    let mut free_bytes = ARENA.buddy.lock().0.free_bytes();
    for (class, list) in ARENA.lists.iter().enumerate() {
        free_bytes += list.lock().0.len() * class_len(class);
    }
    ArenaStats {
        total_bytes,
        free_bytes,
        regions,
    }
}
