//! `malloc`: a block device in ordinary memory.
//!
//! Memory is allocated when it is written and freed when it is unmapped, so a large device costs
//! only the memory of its content. Blocks that were never written read as zeroes. The content is
//! lost when the process ends.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use pumice_io::sys::Zeroed;
use pumice_io::uri::Uri;
use pumice_io::{Completion, IoError, IoErrorKind, Limits, Op, OpKind, OpSet, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::module::{Module, memory_params, size_in_place};
use crate::queue::{Completed, refuse};
use crate::uuid;

/// The smallest allocation: a huge page, since random access to small pages costs a walk through
/// the page tables each time.
const STRIPE_MIN: u64 = 2 << 20;
/// Most allocations, so that the table of a large device stays small.
const STRIPES_MAX: u64 = 1 << 16;

/// Number of bytes of the next operation that are prefetched while one is copied.
const PREFETCH: u64 = 1024;

/// Size above which a device is not expected to fit a processor's caches.
const CACHE_LEN: u64 = 32 << 20;

/// Length from which on a write bypasses the caches.
const STREAM_MIN: usize = 1024;

/// Options of a [`Malloc`] device.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MallocOptions {
    /// Name; `None`: the next free `MallocN`.
    pub name: Option<String>,
    /// Bytes per block: a power of two from 512 to 65536.
    pub block_size: u32,
    /// Capacity in blocks.
    pub num_blocks: u64,
    /// UUID; `None`: a random one.
    pub uuid: Option<[u8; 16]>,
    /// I/O that does not cross a multiple of this many blocks is faster; 0: no boundary.
    pub optimal_io_boundary_blocks: u32,
}

pumice_io::setters!(MallocOptions: name: Option<String>, block_size: u32, num_blocks: u64, uuid: Option<[u8; 16]>,
    optimal_io_boundary_blocks: u32);

impl Default for MallocOptions {
    fn default() -> Self {
        MallocOptions {
            name: None,
            block_size: 512,
            num_blocks: 0,
            uuid: None,
            optimal_io_boundary_blocks: 0,
        }
    }
}

/// A block device in memory.
#[derive(Debug, Clone)]
pub struct Malloc {
    shared: Arc<MallocDisk>,
}

#[derive(Debug)]
struct MallocDisk {
    info: DeviceInfo,
    memory: Memory,
}

/// A sparse array of bytes, in stripes with a lock each.
struct Memory {
    stripe_shift: u32,
    stripes: Vec<RwLock<Option<Zeroed>>>,
    /// Whether the device is larger than the processor's caches.
    beyond_cache: bool,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} stripes of {} bytes",
            self.stripes.len(),
            1_u64 << self.stripe_shift
        )
    }
}

impl Malloc {
    /// Makes the device.
    ///
    /// # Errors
    /// Fails for a block size that is not a power of two from 512 to 65536, and without any block.
    pub fn new(options: &MallocOptions) -> Result<Malloc, BdevError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = options
            .name
            .clone()
            .unwrap_or_else(|| format!("Malloc{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        check_geometry(&name, options.block_size, options.num_blocks)?;
        let mut info = DeviceInfo::new(&name, "malloc", options.block_size, options.num_blocks);
        info.outlives_process = false;
        "Malloc disk".clone_into(&mut info.product);
        info.uuid = options.uuid.unwrap_or_else(uuid::random);
        info.limits = Limits::new(0, options.optimal_io_boundary_blocks);
        info.unmap_zeroes = true;
        info.ops = OpSet::BASIC
            .with(OpKind::Unmap)
            .with(OpKind::Compare)
            .with(OpKind::CompareAndWrite)
            .with(OpKind::Copy)
            .with(OpKind::Abort);
        let memory = Memory::new(info.len_bytes());
        Ok(Malloc {
            shared: Arc::new(MallocDisk { info, memory }),
        })
    }
}

/// Checks the geometry, for every module.
pub(crate) fn check_geometry(
    name: &str,
    block_size: u32,
    num_blocks: u64,
) -> Result<(), BdevError> {
    let invalid = |reason: String| {
        Err(BdevError::InvalidOption {
            name: format!("{name}: block_size"),
            reason,
        })
    };
    if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
        return invalid(format!(
            "{block_size} is not a block size: use a power of two from 512 to 65536"
        ));
    }
    if num_blocks == 0
        || num_blocks
            .checked_mul(u64::from(block_size))
            .is_none_or(|n| n > 1 << 60)
    {
        return Err(BdevError::InvalidOption {
            name: format!("{name}: size"),
            reason: format!(
                "{num_blocks} blocks of {block_size} bytes: a device has at least one block and at \
                 most 1 EiB"
            ),
        });
    }
    Ok(())
}

/// There is no memory for a part of the device.
#[derive(Debug, Clone, Copy)]
struct OutOfMemory;

impl OutOfMemory {
    #[cold]
    fn error(self, info: &DeviceInfo, memory: &Memory, op: &Op) -> Box<IoError> {
        let detail = format!(
            "the process gets no {} bytes more; make the device smaller, or unmap",
            1_u64 << memory.stripe_shift
        );
        info.error(op, IoErrorKind::NoSpace, detail)
    }
}

impl Memory {
    fn new(len: u64) -> Memory {
        let stripe = (len / STRIPES_MAX).next_power_of_two().max(STRIPE_MIN);
        let n = usize::try_from(len.div_ceil(stripe)).unwrap_or(usize::MAX);
        let mut stripes = Vec::with_capacity(n);
        stripes.resize_with(n, || RwLock::new(None));
        Memory {
            stripe_shift: stripe.trailing_zeros(),
            stripes,
            beyond_cache: len > CACHE_LEN,
        }
    }

    /// Calls `f(stripe, first byte in it, range of the caller's bytes)` for each part of `[offset,
    /// offset + len)`.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by the stripe and by `len`"
    )]
    fn pieces(&self, offset: u64, len: u64, mut f: impl FnMut(usize, usize, usize, usize)) {
        let stripe_len = 1_u64 << self.stripe_shift;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let within = at & (stripe_len - 1);
            let n = (stripe_len - within).min(len - done);
            f(
                (at >> self.stripe_shift) as usize,
                within as usize,
                done as usize,
                n as usize,
            );
            done += n;
        }
    }

    /// Prefetches the beginning of a range. The processor's own prefetching does the rest.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by the number of stripes and by the stripe"
    )]
    fn prefetch(&self, offset: u64, len: u64) {
        let stripe = &self.stripes[(offset >> self.stripe_shift) as usize];
        if let Some(guard) = stripe.try_read()
            && let Some(bytes) = &*guard
        {
            let within = offset & ((1_u64 << self.stripe_shift) - 1);
            bytes.prefetch(within as usize, len.min(PREFETCH) as usize);
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        self.pieces(offset, out.len() as u64, |stripe, at, done, n| {
            let out = &mut out[done..done + n];
            match &*self.stripes[stripe].read() {
                Some(bytes) => out.copy_from_slice(&bytes[at..at + n]),
                None => out.fill(0),
            }
        });
    }

    /// Whether a write of this many bytes bypasses the caches.
    #[inline]
    fn streams(&self, len: usize) -> bool {
        self.beyond_cache && len >= STREAM_MIN
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfMemory> {
        let mut result = Ok(());
        self.pieces(offset, data.len() as u64, |stripe, at, done, n| {
            let mut guard = self.stripes[stripe].write();
            match self.bytes_of(&mut guard) {
                Ok(bytes) if self.streams(n) => bytes.stream(at, &data[done..done + n]),
                Ok(bytes) => bytes[at..at + n].copy_from_slice(&data[done..done + n]),
                Err(e) => result = Err(e),
            }
        });
        result
    }

    /// Returns the bytes of a stripe, and allocates them if there are none.
    #[inline]
    fn bytes_of<'a>(&self, stripe: &'a mut Option<Zeroed>) -> Result<&'a mut Zeroed, OutOfMemory> {
        if stripe.is_none() {
            *stripe = Some(self.fresh()?);
        }
        stripe.as_mut().ok_or(OutOfMemory)
    }

    /// Allocates a zeroed stripe. A stripe of a very large device may exceed the available memory.
    #[cold]
    fn fresh(&self) -> Result<Zeroed, OutOfMemory> {
        Zeroed::new(1 << self.stripe_shift).ok_or(OutOfMemory)
    }

    fn zero(&self, offset: u64, len: u64) {
        self.pieces(offset, len, |stripe, at, _, n| {
            let mut guard = self.stripes[stripe].write();
            if n == 1 << self.stripe_shift {
                *guard = None;
            } else if let Some(bytes) = &mut *guard {
                bytes[at..at + n].fill(0);
            }
        });
    }

    /// Returns the next bytes at or behind `offset` that may have been written.
    fn next_written(&self, offset: u64) -> Option<Range<u64>> {
        let first = usize::try_from(offset >> self.stripe_shift).unwrap_or(usize::MAX);
        let found = (first..self.stripes.len()).find(|i| self.stripes[*i].read().is_some())?;
        let start = (found as u64) << self.stripe_shift;
        Some(start.max(offset)..start + (1 << self.stripe_shift))
    }

    /// Returns the offset of the first difference from `data`.
    fn differs(&self, offset: u64, data: &[u8]) -> Option<u64> {
        let mut found = None;
        self.pieces(offset, data.len() as u64, |stripe, at, done, n| {
            if found.is_some() {
                return;
            }
            let data = &data[done..done + n];
            let guard = self.stripes[stripe].read();
            let diff = match &*guard {
                Some(bytes) => bytes[at..at + n].iter().zip(data).position(|(a, b)| a != b),
                None => data.iter().position(|b| *b != 0),
            };
            found = diff.map(|d| (done + d) as u64);
        });
        found
    }

    /// Compares and writes bytes that lie in one stripe, as one step. Returns `Ok(Err(offset))`
    /// when they differ.
    fn compare_and_write(
        &self,
        offset: u64,
        compare: &[u8],
        write: &[u8],
    ) -> Result<Result<(), u64>, OutOfMemory> {
        let mut result = Ok(Ok(()));
        self.pieces(offset, write.len() as u64, |stripe, at, done, n| {
            let mut guard = self.stripes[stripe].write();
            let bytes = match self.bytes_of(&mut guard) {
                Ok(bytes) => bytes,
                Err(e) => {
                    result = Err(e);
                    return;
                }
            };
            let here = &mut bytes[at..at + n];
            let same = here
                .iter()
                .zip(&compare[done..done + n])
                .position(|(a, b)| a != b);
            match same {
                Some(diff) => result = Ok(Err((done + diff) as u64)),
                None => here.copy_from_slice(&write[done..done + n]),
            }
        });
        result
    }

    fn copy(&self, src: u64, dst: u64, len: u64) -> Result<(), OutOfMemory> {
        const PIECE: usize = 64 << 10;
        let mut piece = vec![0; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
        let mut done = 0;
        while done < len {
            let n = piece
                .len()
                .min(usize::try_from(len - done).unwrap_or(PIECE));
            self.read(src + done, &mut piece[..n]);
            self.write(dst + done, &piece[..n])?;
            done += n as u64;
        }
        Ok(())
    }
}

impl BlockDevice for Malloc {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(MallocChannel {
            shared: Arc::clone(&self.shared),
            queue: Completed::default(),
        }))
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        let info = &self.shared.info;
        let block = u64::from(info.block_size);
        let bytes = self.shared.memory.next_written(lba.saturating_mul(block));
        Ok(bytes.and_then(|r| {
            let blocks = r.start / block..r.end.div_ceil(block).min(info.num_blocks);
            (blocks.start < blocks.end).then_some(blocks)
        }))
    }
}

/// A channel that does operations when it is polled and not when they are submitted, so that the
/// memory of the next one can be fetched while one is copied.
struct MallocChannel {
    shared: Arc<MallocDisk>,
    queue: Completed,
}

impl MallocDisk {
    fn prefetch(&self, op: &Op) {
        let wanted = match op {
            Op::Read { .. } => true,
            Op::Write { data, .. } => !self.memory.streams(data.len()),
            _ => false,
        };
        if wanted {
            let bs = self.info.block_size;
            self.memory
                .prefetch(op.lba() * u64::from(bs), op.len_bytes(bs));
        }
    }

    fn execute(&self, op: &mut Op) -> Result<(), Box<IoError>> {
        let MallocDisk { info, memory } = self;
        let bs = u64::from(info.block_size);
        let at = op.lba() * bs;
        let len = op.len_bytes(info.block_size);
        match op {
            Op::Read { buf, .. } => memory.read(at, buf),
            Op::ReadV { bufs, .. } => {
                let mut at = at;
                for buf in bufs {
                    memory.read(at, buf);
                    at += buf.len() as u64;
                }
            }
            Op::Write { data, .. } => {
                if let Err(e) = memory.write(at, data) {
                    return Err(e.error(info, memory, op));
                }
            }
            Op::WriteV { data, .. } => {
                let mut at = at;
                let mut written = Ok(());
                for data in &*data {
                    written = written.and(memory.write(at, data));
                    at += data.len() as u64;
                }
                if let Err(e) = written {
                    return Err(e.error(info, memory, op));
                }
            }
            Op::WriteZeroes { .. } | Op::Unmap { .. } => memory.zero(at, len),
            Op::Compare { data, .. } => {
                if let Some(offset_bytes) = memory.differs(at, data) {
                    return Err(info.error(op, IoErrorKind::Miscompare { offset_bytes }, ""));
                }
            }
            Op::CompareAndWrite(c) => match memory.compare_and_write(at, &c.compare, &c.write) {
                Ok(Ok(())) => {}
                Ok(Err(offset_bytes)) => {
                    return Err(info.error(op, IoErrorKind::Miscompare { offset_bytes }, ""));
                }
                Err(e) => return Err(e.error(info, memory, op)),
            },
            Op::Copy { src_lba, .. } => {
                if let Err(e) = memory.copy(*src_lba * bs, at, len) {
                    return Err(e.error(info, memory, op));
                }
            }
            Op::Flush | Op::Reset | Op::Abort { .. } | Op::Verify { .. } | Op::Zone { .. } => {}
        }
        Ok(())
    }
}

impl MallocChannel {
    fn run(&mut self) {
        let mut rest = self.queue.as_mut_slice();
        while let [first, others @ ..] = rest {
            if let Some(next) = others.first() {
                self.shared.prefetch(&next.op);
            }
            first.result = self.shared.execute(&mut first.op);
            rest = others;
        }
    }
}

impl IoChannel for MallocChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if self.queue.is_full() {
            return Err(SubmitError::Busy(op));
        }
        if let Err(e) = self.shared.info.check(&op) {
            return refuse(op, e);
        }
        self.queue.push(tag, op, Ok(()));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if !self.shared.info.is_here() {
            return 0;
        }
        self.run();
        self.queue.drain_into(out)
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        if !self.shared.info.is_here() {
            return 0;
        }
        self.queue.len()
    }
}

impl Drop for MallocChannel {
    fn drop(&mut self) {
        // In a forked child the buffers belong to the parent.
        if self.shared.info.is_here() {
            self.run();
        }
    }
}

/// Opens devices by URI.
pub(crate) static MODULE: Module = Module {
    examples: &["malloc://1G"],
    open: |uri, _| open_uri(uri),
    call: |_, info| Some(("bdev_malloc_create", memory_params(info))),
};

fn open_uri(uri: &mut Uri) -> Result<Arc<dyn BlockDevice>, BdevError> {
    let block_size = uri.number("block_size", 0..=u64::MAX)?.unwrap_or(512);
    let options = MallocOptions::default()
        .name(uri.option("name"))
        .block_size(block_size)
        .num_blocks(size_in_place(uri, block_size)?);
    uri.finish()?;
    Ok(Arc::new(Malloc::new(&options)?))
}
