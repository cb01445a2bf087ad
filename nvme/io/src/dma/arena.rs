//! Arenas: size classes above the buddy lists. The process's arena has a cache for each thread too.
//!
//! Memory is taken from the thread's cache (no lock), else from the list of its size class (one
//! short lock; blocks move in batches), else from the buddy lists, which join and split blocks.
//! When the buddy lists have no block, the class lists are emptied into them. Only when that does
//! not help does the arena grow.
//!
//! A block records its arena. The process's arena has the number of the process's generation, see
//! [`process`]. A block of an arena that this process does not have was the parent's, and is
//! ignored when it is freed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::buddy::{CLASSES, MAX_SHIFT, Place, class_of};
use super::error::DmaError;
use super::free::{self, FreeBlocks};
use super::mapper::{AddressTable, DmaMapper, MAX_CHUNKS, MapperGuard};
use super::options::{ArenaOptions, ArenaStats, CONFIGURED, HugePages};
use super::region::{CHUNK_LEN, Region, RegionId};
use crate::process::{self, PerProcess};

/// The largest buffer, in bytes.
pub(super) const MAX_BUFFER: usize = 1 << MAX_SHIFT;
/// Most bytes and blocks of a class in a thread's cache.
const THREAD_BYTES: usize = 1 << 20;
const THREAD_BLOCKS: usize = 64;
/// Bounds of a new region, which is a quarter of the arena's size.
const REGION_MAX: usize = 256 << 20;
/// Most blocks that are given back to the system while nobody can make the arena grow.
const RELEASE_BLOCKS: usize = 32;
/// Most chunks of a domain: 16 GiB.
const DOMAIN_CHUNKS: usize = 8192;
/// Fewest bytes that a domain grows by: mapping them takes a message, to which the other side may
/// respond slowly. Pages that are never used cost nothing.
const DOMAIN_REGION: usize = 64 << 20;
/// The lowest number of a domain, above every generation.
const DOMAIN_IDS: u32 = 1 << 31;

/// A block outside the lists. Its owner owns its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub ptr: NonNull<u8>,
    pub region: RegionId,
    pub offset: u32,
    /// The arena that the block belongs to.
    pub arena: u32,
    pub slot: u16,
    pub class: u8,
}

#[allow(unsafe_code)]
// SAFETY: only the owner of a block may access its bytes, which belong to the process-wide arena
// and to no thread; moving the block to another thread moves that right.
unsafe impl Send for Block {}

impl free::Block for Block {
    type Region = (u32, Arc<Region>);

    fn at(regions: &[(u32, Arc<Region>)], place: Place, class: usize) -> Block {
        let (arena, region) = &regions[place.slot as usize];
        Block {
            ptr: region.ptr(place.offset as usize),
            region: region.id(),
            offset: place.offset,
            arena: *arena,
            slot: u16::try_from(place.slot).expect("MAX_CHUNKS regions at most"),
            class: u8::try_from(class).expect("few classes"),
        }
    }

    fn place(&self) -> Place {
        Place {
            slot: u32::from(self.slot),
            offset: self.offset,
        }
    }
}

struct Growth {
    options: ArenaOptions,
    regions: Vec<Arc<Region>>,
    mappers: Vec<(u64, Arc<dyn DmaMapper>)>,
    next_mapper: u64,
    total: usize,
}

impl Growth {
    /// Whether pages may be released and replaced: no device has them mapped, and they are not huge already.
    fn may_move(&self) -> bool {
        self.mappers.is_empty() && self.options.huge == HugePages::Never
    }
}

struct Arena {
    id: u32,
    /// The number of its first chunk. Chunks are numbered through all arenas.
    first_chunk: usize,
    max_chunks: usize,
    /// Locked before any list of the free blocks.
    growth: Mutex<Growth>,
    free: FreeBlocks<Block>,
    used: AtomicBool,
    /// Whether a domain has no handle left, so that it is freed with its last block.
    closed: AtomicBool,
}

static MAIN: PerProcess<Arena> = PerProcess::new(|| {
    let options = CONFIGURED.options();
    Arena::new(process::generation(), 0, MAX_CHUNKS, options)
});

/// A thread's cached blocks of the process's arena.
struct ThreadCache {
    arena: u32,
    lists: [Vec<Block>; CLASSES],
}

impl ThreadCache {
    /// Returns the list of a class. In a forked child, the parent's blocks are discarded first.
    #[inline]
    fn list(&mut self, class: usize) -> &mut Vec<Block> {
        if self.arena != process::generation() {
            self.lists.iter_mut().for_each(Vec::clear);
            self.arena = process::generation();
        }
        &mut self.lists[class]
    }
}

impl Drop for ThreadCache {
    fn drop(&mut self) {
        for class in 0..CLASSES {
            let blocks = self.list(class);
            if !blocks.is_empty() {
                MAIN.get().free.give(class, blocks.drain(..));
            }
        }
    }
}

thread_local! {
    static CACHE: RefCell<ThreadCache> = const {
        RefCell::new(ThreadCache { arena: 0, lists: [const { Vec::new() }; CLASSES] })
    };
}

const fn thread_limit(class: usize) -> usize {
    let by_bytes = THREAD_BYTES >> (class + super::buddy::MIN_SHIFT as usize);
    if by_bytes > THREAD_BLOCKS {
        THREAD_BLOCKS
    } else {
        by_bytes
    }
}

fn class_for(len: usize) -> Result<usize, DmaError> {
    if len == 0 || len > MAX_BUFFER {
        return Err(DmaError::Length {
            len,
            max: MAX_BUFFER,
        });
    }
    Ok(class_of(len))
}

/// Takes a block that holds `len` bytes, from the process's arena.
#[inline]
pub(super) fn take(len: usize) -> Result<Block, DmaError> {
    let class = class_for(len)?;
    let cached = CACHE.try_with(|c| c.borrow_mut().list(class).pop());
    match cached {
        Ok(Some(block)) => Ok(block),
        _ => take_slow(class),
    }
}

/// Frees a block.
#[inline]
pub(super) fn give(block: Block) {
    if block.arena != process::generation() {
        return give_to_domain(block);
    }
    let class = usize::from(block.class);
    let kept = CACHE.try_with(|c| {
        let mut cache = c.borrow_mut();
        let list = cache.list(class);
        if list.len() < thread_limit(class) {
            list.push(block);
            return true;
        }
        if list.is_empty() {
            return false;
        }
        // Half of a full cache moves to the shared list, so that threads which only free supply the
        // threads that only allocate.
        let keep = list.len() / 2;
        list.push(block);
        MAIN.get().free.give(class, list.drain(keep..));
        true
    });
    if kept != Ok(true) {
        MAIN.get().free.give(class, [block]);
    }
}

#[cold]
fn take_slow(class: usize) -> Result<Block, DmaError> {
    let arena = MAIN.get();
    let mut got = arena.take_some(class)?;
    let block = got.pop().expect("at least one block");
    if !got.is_empty() {
        let kept = CACHE.try_with(|c| c.borrow_mut().list(class).append(&mut got));
        if kept.is_err() {
            arena.free.give(class, got);
        }
    }
    Ok(block)
}

/// The domains whose memory is in use, by number.
static DOMAINS: PerProcess<Mutex<HashMap<u32, Arc<Arena>>>> = PerProcess::new(Mutex::default);

/// Frees a block of a domain. A block that belongs to no domain of this process is the parent's.
#[cold]
fn give_to_domain(block: Block) {
    let Some(arena) = DOMAINS.get().lock().get(&block.arena).cloned() else {
        return;
    };
    arena.free.give(usize::from(block.class), [block]);
    arena.forget_if_unused();
}

/// Memory apart from the process's arena, for one device. It can be shared with a device that must
/// not access the rest. Its regions are unmapped when the handle and all buffers are dropped.
pub struct DmaDomain {
    arena: Arc<Arena>,
}

impl std::fmt::Debug for DmaDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DmaDomain({})", self.arena.id - DOMAIN_IDS)
    }
}

impl Default for DmaDomain {
    fn default() -> Self {
        DmaDomain::new()
    }
}

impl DmaDomain {
    /// Makes an empty domain of ordinary pages.
    pub fn new() -> DmaDomain {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // The bound leaves numbers for the chunks of the last domain.
        let number = NEXT.fetch_add(1, Ordering::Relaxed) % (1 << 18);
        let first_chunk = MAX_CHUNKS + number as usize * DOMAIN_CHUNKS;
        let options = ArenaOptions {
            max_bytes: DOMAIN_CHUNKS * CHUNK_LEN,
            region_min: DOMAIN_REGION,
            ..ArenaOptions::default()
        };
        let id = DOMAIN_IDS + number;
        let arena = Arc::new(Arena::new(id, first_chunk, DOMAIN_CHUNKS, options));
        DOMAINS.get().lock().insert(id, Arc::clone(&arena));
        DmaDomain { arena }
    }

    /// Makes a table for the device's addresses of the domain.
    pub fn address_table(&self) -> AddressTable {
        AddressTable::with(self.arena.first_chunk, DOMAIN_CHUNKS)
    }

    /// Registers a mapper as [`register_mapper`] does, for the domain's regions.
    pub fn register_mapper(&self, mapper: Arc<dyn DmaMapper>) -> Result<MapperGuard, DmaError> {
        let id = self.arena.register_mapper(mapper)?;
        let arena = Arc::clone(&self.arena);
        Ok(MapperGuard::new(move || arena.unregister_mapper(id)))
    }

    /// Takes a block that holds `len` bytes.
    pub(super) fn take(&self, len: usize) -> Result<Block, DmaError> {
        let class = class_for(len)?;
        let mut got = self.arena.take_some(class)?;
        let block = got.pop().expect("at least one block");
        self.arena.free.give(class, got);
        Ok(block)
    }
}

impl Drop for DmaDomain {
    fn drop(&mut self) {
        self.arena.closed.store(true, Ordering::SeqCst);
        self.arena.forget_if_unused();
    }
}

impl Arena {
    fn new(id: u32, first_chunk: usize, max_chunks: usize, options: ArenaOptions) -> Arena {
        Arena {
            id,
            first_chunk,
            max_chunks,
            growth: Mutex::new(Growth {
                options,
                regions: Vec::new(),
                mappers: Vec::new(),
                next_mapper: 0,
                total: 0,
            }),
            free: FreeBlocks::new(),
            used: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// Takes at least one block of a class, and at most as many as a thread's cache should get.
    fn take_some(&self, class: usize) -> Result<Vec<Block>, DmaError> {
        let want = (thread_limit(class) / 2).max(1);
        let grow = |growth: &mut Growth, need| self.grow(growth, need);
        self.free.take(class, want, &self.growth, grow)
    }

    /// Frees the memory of a domain without a handle when its last block is freed.
    fn forget_if_unused(&self) {
        if self.closed.load(Ordering::SeqCst) && self.free.free_bytes() == self.growth.lock().total
        {
            DOMAINS.get().lock().remove(&self.id);
        }
    }

    fn register_mapper(&self, mapper: Arc<dyn DmaMapper>) -> Result<u64, DmaError> {
        let mut growth = self.growth.lock();
        self.used.store(true, Ordering::Relaxed);
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
        Ok(id)
    }

    fn unregister_mapper(&self, id: u64) {
        let mut growth = self.growth.lock();
        if let Some(at) = growth.mappers.iter().position(|(i, _)| *i == id) {
            let (_, mapper) = growth.mappers.swap_remove(at);
            for region in &growth.regions {
                mapper.unmap(region);
            }
        }
    }

    /// Gives free pages back to the system; see [`release_free`].
    fn release_free(&self) -> usize {
        self.free.collect();
        let mut bytes = 0;
        loop {
            // A mapper that comes meanwhile waits.
            let (released, failed) = self.free.release(
                RELEASE_BLOCKS,
                &self.growth,
                Growth::may_move,
                |(_, region), place, len| region.release(place.offset as usize, len),
            );
            bytes += released;
            if let Some(error) = &failed {
                tracing::debug!(%error, "free DMA memory stays");
            }
            if released == 0 || failed.is_some() {
                return bytes;
            }
        }
    }

    /// Makes huge pages; see [`join_pages`].
    fn join_pages(&self, most: usize) -> std::io::Result<usize> {
        if !self.growth.lock().may_move() {
            return Ok(0);
        }
        let joined = self.free.join(most, |(_, region), place| {
            region.join(place.offset as usize)
        });
        match joined {
            (0, Some(error)) => Err(error),
            (done, _) => Ok(done),
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
        // Try the preferred size first, then the smallest that suffices.
        for len in [wish.max(need), need] {
            if growth.total + len > growth.options.max_bytes.min(self.max_chunks * CHUNK_LEN) {
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
        let chunk = self.first_chunk + growth.total / CHUNK_LEN;
        let id = RegionId(u32::try_from(chunk).expect("arenas are numbered below 2^32"));
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
        self.free.add((self.id, region), len);
        tracing::debug!(len, total = growth.total, "DMA arena grown");
        Ok(())
    }
}

/// Sets the arena's options for this process and those that it forks. Call it before the first
/// buffer is taken and before the first device is opened. Afterwards it fails with
/// [`DmaError::AlreadyInUse`].
pub fn configure(options: ArenaOptions) -> Result<(), DmaError> {
    let arena = MAIN.get();
    let mut growth = arena.growth.lock();
    if arena.used.load(Ordering::Relaxed) {
        return Err(DmaError::AlreadyInUse);
    }
    CONFIGURED.set(&options);
    growth.options = options;
    Ok(())
}

/// Tells `mapper` of every region of the process's arena, existing and future, until the guard is
/// dropped. Fails, with nothing mapped, when the mapper refuses one of the existing regions.
///
/// Blocks for as long as mapping takes. `map` and `unmap` are called with the arena's growth
/// lock held: they must not take DMA memory themselves.
pub fn register_mapper(mapper: Arc<dyn DmaMapper>) -> Result<MapperGuard, DmaError> {
    let id = MAIN.get().register_mapper(mapper)?;
    Ok(MapperGuard::new(move || MAIN.get().unregister_mapper(id)))
}

/// Gives the free pages of the process's arena back to the system. Returns their number of bytes.
///
/// Gives back nothing while a device has the arena mapped, which keeps its pages in memory, and
/// nothing of huge pages. What the threads keep for themselves stays. Blocks for some microseconds for
/// each run of pages.
pub fn release_free() -> usize {
    MAIN.get().release_free()
}

/// Makes huge pages of the arena's memory that is in use, at most `most` of 2 MiB, without changing it. Returns their number, 0 if
/// nothing is left to do. Reads from a huge page need far fewer entries of the processor's address cache.
///
/// Makes none while a device has the arena mapped, and none if the arena has huge pages already ([`HugePages`]). Blocks for about a
/// millisecond for each, in which a thread that accesses the page may wait too.
///
/// # Errors
/// Fails if none could be made: with EINVAL where the kernel does not do so (before Linux 6.1, or where it was told not to),
/// otherwise because memory is short or in use by I/O, and another call may succeed.
pub fn join_pages(most: usize) -> std::io::Result<usize> {
    MAIN.get().join_pages(most)
}

/// Whether [`release_free`] can give anything back.
pub fn can_release() -> bool {
    MAIN.get().growth.lock().may_move()
}

/// Returns the current sizes of the process's arena.
pub fn stats() -> ArenaStats {
    let arena = MAIN.get();
    let (total_bytes, regions) = {
        let growth = arena.growth.lock();
        (growth.total, growth.regions.len())
    };
    ArenaStats {
        total_bytes,
        free_bytes: arena.free.free_bytes(),
        present_bytes: arena.free.present_bytes(),
        regions,
    }
}
