//! `crashsim`: a device in memory for crash tests.
//!
//! It separates durable contents from those in a volatile cache, and logs every write, FUA, flush,
//! write zeroes and unmap. Afterwards it returns the possible contents of the medium for a power
//! cut after any event: everything durable, with any subset of what was unflushed or in flight,
//! torn at block or page size. A seed determines the late and reordered completions.
//!
//! ```
//! use pumice_bdev_testkit::crashsim::CrashDevice;
//! use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
//!
//! let dev = CrashDevice::new(512, 1024, true, 42);
//! let ch = AsyncChannel::new(dev.open_channel()?);
//! ch.block_on(async {
//!     ch.write(7, DmaBuf::zeroed(512).unwrap().freeze(), false).await.unwrap();
//!     dev.mark(1); // "the write of block 7 was acknowledged"
//!     ch.flush().await.unwrap();
//! });
//! let mut points = dev.crash_points();
//! while points.advance().is_some() {
//!     let after_the_cut = CrashDevice::from_image(512, points.image(&mut |_piece| false), true, 42);
//!     // Open the store on `after_the_cut`; it must hold what was promised by `points.marks()`.
//! }
//! # Ok::<(), pumice_bdev::BdevError>(())
//! ```

mod image;
mod log;
mod states;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub use image::CrashImage;
pub use log::{Action, Change, CrashPoints, Event, Unsettled};
pub use states::checked;

use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoError, IoErrorKind, Op, OpKind,
    OpSet, SubmitError,
};

/// The byte that unmapped blocks read as unless the options ask for zeroes: a pattern that is easy
/// to see.
const UNMAPPED: u8 = 0xa5;
/// Most operations in flight on a channel.
const DEPTH: usize = 1024;

/// Behaviour of a [`CrashDevice`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CrashOptions {
    /// Bytes per block.
    pub block_size: u32,
    /// Whether there is a volatile write cache: a completed write is durable only after a flush, or
    /// with FUA.
    pub write_cache: bool,
    /// Seed of the order of completions.
    pub seed: u64,
    /// A power cut tears a write at multiples of this many bytes: the block size or, for devices
    /// with larger pages, 4096.
    pub tear_bytes: u32,
    /// Whether unmapped blocks read as zeroes; otherwise they read as 0xa5.
    pub unmap_zeroes: bool,
    /// Whether the device supports FUA, which makes a write durable when it completes. Otherwise
    /// only a flush makes anything durable.
    pub fua: bool,
    /// Whether the device supports copies.
    pub copy: bool,
    /// Whether the device supports writing zeroes without a buffer.
    pub write_zeroes: bool,
    /// Whether the device supports unmaps.
    pub unmap: bool,
    /// Whether completions come late and out of order; otherwise they come at the next poll, in
    /// order.
    pub reorder: bool,
}

pumice_bdev::setters!(CrashOptions: block_size: u32, write_cache: bool, seed: u64, tear_bytes: u32, unmap_zeroes: bool, fua: bool,
    copy: bool, write_zeroes: bool, unmap: bool, reorder: bool);

impl Default for CrashOptions {
    fn default() -> Self {
        CrashOptions {
            block_size: 512,
            write_cache: true,
            seed: 0,
            tear_bytes: 512,
            unmap_zeroes: false,
            fua: true,
            copy: false,
            write_zeroes: true,
            unmap: true,
            reorder: true,
        }
    }
}

/// A simulated device that records every operation, in order.
#[derive(Debug, Clone)]
pub struct CrashDevice {
    shared: Arc<CrashShared>,
}

#[derive(Debug)]
struct CrashShared {
    info: DeviceInfo,
    options: CrashOptions,
    state: Mutex<CrashState>,
    channels: AtomicU64,
}

#[derive(Debug)]
struct CrashState {
    base: CrashImage,
    live: CrashImage,
    log: Vec<Event>,
    next_id: u64,
    cut_at: usize,
}

impl CrashState {
    fn is_cut(&self) -> bool {
        self.log.len() >= self.cut_at
    }
}

impl CrashDevice {
    /// Makes a device of zeroes, on which writes are torn at blocks.
    pub fn new(block_size: u32, num_blocks: u64, write_cache: bool, seed: u64) -> CrashDevice {
        let image = CrashImage::zeroed(num_blocks * u64::from(block_size));
        CrashDevice::from_image(block_size, image, write_cache, seed)
    }

    /// Makes a device with these contents and an empty log, as after a restart.
    pub fn from_image(
        block_size: u32,
        image: CrashImage,
        write_cache: bool,
        seed: u64,
    ) -> CrashDevice {
        let tear_bytes = block_size;
        let options = CrashOptions::default()
            .block_size(block_size)
            .write_cache(write_cache)
            .seed(seed)
            .tear_bytes(tear_bytes);
        CrashDevice::with_options(&options, image)
    }

    /// Makes a device with these contents and this behaviour.
    ///
    /// # Panics
    /// Panics when the contents are not whole blocks.
    pub fn with_options(options: &CrashOptions, image: CrashImage) -> CrashDevice {
        let bs = u64::from(options.block_size);
        assert!(
            image.len_bytes() >= bs && image.len_bytes().is_multiple_of(bs),
            "{image:?}"
        );
        let mut info = DeviceInfo::new(
            "crashsim",
            "crashsim",
            options.block_size,
            image.len_bytes() / bs,
        );
        "Simulated disk".clone_into(&mut info.product);
        info.uuid = pumice_bdev::uuid::derived(&options.seed.to_be_bytes());
        info.write_cache = options.write_cache;
        info.atomic_unit_blocks = (options.tear_bytes / options.block_size).max(1);
        info.unmap_zeroes = options.unmap_zeroes;
        info.ops = ops(options);
        let state = CrashState {
            base: image.clone(),
            live: image,
            log: Vec::new(),
            next_id: 0,
            cut_at: usize::MAX,
        };
        CrashDevice {
            shared: Arc::new(CrashShared {
                info,
                options: options.clone(),
                state: Mutex::new(state),
                channels: AtomicU64::new(0),
            }),
        }
    }

    /// Returns the log so far.
    pub fn log(&self) -> Vec<Event> {
        self.shared.state.lock().log.clone()
    }

    /// Length of the log.
    pub fn len_events(&self) -> usize {
        self.shared.state.lock().log.len()
    }

    /// Adds a note to the log, for example that the program under test has promised something.
    pub fn mark(&self, note: u64) {
        self.shared.state.lock().log.push(Event::Mark(note));
    }

    /// Makes every operation from the `n`-th event on fail as on a device without power. The log no
    /// longer grows.
    pub fn cut_power_after(&self, n_events: usize) {
        self.shared.state.lock().cut_at = n_events;
    }

    /// Returns the device's current contents, those of the cache included.
    pub fn image(&self) -> CrashImage {
        self.shared.state.lock().live.clone()
    }

    /// Iterates over the log: for each event, the possible contents of the medium after a power cut
    /// there.
    pub fn crash_points(&self) -> CrashPoints {
        let state = self.shared.state.lock();
        let options = &self.shared.options;
        let tear = u64::from((options.tear_bytes / options.block_size).max(1));
        let (log, base) = (state.log.clone(), state.base.clone());
        CrashPoints::new(log, base, options.block_size, tear, options.write_cache)
    }

    /// Returns the contents after a power cut after `n_events`, with those unsettled parts that
    /// `choose` accepts. [`CrashDevice::crash_points`] is cheaper for every point in turn.
    pub fn image_after(
        &self,
        n_events: usize,
        choose: &mut dyn FnMut(&Unsettled) -> bool,
    ) -> CrashImage {
        let mut points = self.crash_points();
        while points.position() < n_events && points.advance().is_some() {}
        points.image(choose)
    }

    /// Returns the device as it comes back from a power cut after `n_events`.
    #[must_use]
    pub fn reopen_after(
        &self,
        n_events: usize,
        choose: &mut dyn FnMut(&Unsettled) -> bool,
    ) -> CrashDevice {
        let image = self.image_after(n_events, choose);
        CrashDevice::with_options(&self.shared.options, image)
    }
}

impl BlockDevice for CrashDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn identity(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let n = self.shared.channels.fetch_add(1, Ordering::Relaxed);
        let seed = self.shared.options.seed ^ n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Ok(Box::new(CrashChannel {
            shared: Arc::clone(&self.shared),
            rng: SmallRng::seed_from_u64(seed),
            queue: Vec::new(),
        }))
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        let info = &self.shared.info;
        let block = u64::from(info.block_size);
        let state = self.shared.state.lock();
        let bytes = state.live.next_written(lba.saturating_mul(block));
        Ok(bytes.and_then(|r| {
            let blocks = r.start / block..r.end.div_ceil(block).min(info.num_blocks);
            (blocks.start < blocks.end).then_some(blocks)
        }))
    }
}

/// Returns the operations that a device of this behaviour supports.
fn ops(options: &CrashOptions) -> OpSet {
    let mut ops = OpSet::BASIC.with(OpKind::Abort);
    for (can, kind) in [
        (options.fua, OpKind::Fua),
        (options.copy, OpKind::Copy),
        (options.write_zeroes, OpKind::WriteZeroes),
        (options.unmap, OpKind::Unmap),
    ] {
        ops = if can {
            ops.with(kind)
        } else {
            ops.without(kind)
        };
    }
    ops
}

struct CrashChannel {
    shared: Arc<CrashShared>,
    rng: SmallRng,
    queue: Vec<Queued>,
}

struct Queued {
    tag: u64,
    op: Op,
    change: Option<Arc<Change>>,
}

impl CrashChannel {
    fn change_of(&self, live: &CrashImage, id: u64, op: &Op) -> Option<Change> {
        let bs = self.shared.info.block_size;
        let action = match op {
            Op::Write { data, .. } => Action::Write(Arc::from(&data[..])),
            Op::WriteV { data, .. } => {
                let bytes: Vec<u8> = data.iter().flat_map(|d| d.iter().copied()).collect();
                Action::Write(Arc::from(bytes))
            }
            Op::WriteZeroes { .. } => Action::Zero,
            Op::Unmap { .. } => {
                let filler = if self.shared.options.unmap_zeroes {
                    0
                } else {
                    UNMAPPED
                };
                Action::Unmap { filler }
            }
            Op::Copy {
                src_lba,
                len_blocks,
                ..
            } => {
                let len = usize::try_from(len_blocks * u64::from(bs)).ok()?;
                let mut bytes = vec![0; len];
                live.read(src_lba * u64::from(bs), &mut bytes);
                Action::Write(Arc::from(bytes))
            }
            Op::Flush => Action::Flush,
            _ => return None,
        };
        let len_blocks = op.len_bytes(bs) / u64::from(bs);
        Some(Change {
            id,
            action,
            lba: op.lba(),
            len_blocks,
            fua: op.fua(),
        })
    }

    fn cut_error(&self, op: &Op) -> Box<IoError> {
        let info = &self.shared.info;
        info.error(op, IoErrorKind::Removed, "power was cut")
    }

    fn finish(&mut self, queued: Queued) -> Completion {
        let Queued {
            tag,
            mut op,
            change,
        } = queued;
        let bs = self.shared.info.block_size;
        let mut state = self.shared.state.lock();
        if state.is_cut() {
            let e = self.cut_error(&op);
            return Completion {
                tag,
                op,
                result: Err(e),
            };
        }
        if let Some(change) = change {
            log::apply(&mut state.live, &change, bs, change.lba, change.len_blocks);
            state.log.push(Event::Completed { id: change.id });
        }
        let mut at = op.lba() * u64::from(bs);
        match &mut op {
            Op::Read { buf, .. } => state.live.read(at, buf),
            Op::ReadV { bufs, .. } => {
                for buf in bufs {
                    state.live.read(at, buf);
                    at += buf.len() as u64;
                }
            }
            _ => {}
        }
        Completion {
            tag,
            op,
            result: Ok(()),
        }
    }
}

impl IoChannel for CrashChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.shared.info.check(&op) {
            return Err(SubmitError::Refused(op, e));
        }
        if self.queue.len() >= DEPTH {
            return Err(SubmitError::Busy(op));
        }
        let mut state = self.shared.state.lock();
        if state.is_cut() {
            let e = self.cut_error(&op);
            return Err(SubmitError::Refused(op, e));
        }
        let change = self
            .change_of(&state.live, state.next_id, &op)
            .map(Arc::new);
        if let Some(change) = &change {
            state.next_id += 1;
            state.log.push(Event::Submitted(Arc::clone(change)));
        }
        drop(state);
        self.queue.push(Queued { tag, op, change });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if self.queue.is_empty() {
            return 0;
        }
        let n = if self.shared.options.reorder {
            self.rng.random_range(1..=self.queue.len())
        } else {
            self.queue.len()
        };
        for _ in 0..n {
            // A reset ends the operations before it, so it is accepted only when it is alone.
            let i = if self.shared.options.reorder {
                self.rng.random_range(0..self.queue.len())
            } else {
                0
            };
            let i = match self.queue[i].op {
                Op::Reset => 0,
                _ => i,
            };
            let queued = self.queue.remove(i);
            out.push(self.finish(queued));
        }
        n
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }
}
