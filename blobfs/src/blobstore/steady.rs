//! The device as the blobstore and everything above it use it: operations that fail with a
//! transient error are tried again, here and nowhere above.
//!
//! There is one policy for the metadata, the channels of threads and the file system's shared
//! channels. An operation whose error says that the same operation may succeed
//! ([`IoErrorKind::is_retryable`]) is sent again up to [`TRIES`] times, at once and then after
//! pauses that double, a quarter of a second in all. Meanwhile it counts as in flight. One that is
//! due goes before operations that come later: while it finds no room, nothing else is submitted.
//!
//! [`IoErrorKind::is_retryable`]: pumice_bdev::IoErrorKind::is_retryable

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoError, Op, OpKind, SubmitError,
};

use super::late_writes::LateWrites;
use super::replayed::{Replayed, Unplaced, show};

/// Most times that an operation is sent again.
const TRIES: u32 = 9;
/// The pause before the second repetition; there is none before the first.
const PAUSE: Duration = Duration::from_millis(1);
/// The pause when others have all places of a queue.
const FULL: Duration = Duration::from_micros(20);

/// A device that retries; see the module.
#[derive(Debug)]
pub(crate) struct Steady {
    inner: Arc<dyn BlockDevice>,
    lost: Arc<FailedFlush>,
    late: Arc<LateWrites>,
    /// Blocks that a journal has and that may not be in place.
    replayed: Arc<OnceLock<Mutex<Replayed>>>,
}

/// The failed flushes of all channels.
#[derive(Debug, Default)]
pub(crate) struct FailedFlush(Mutex<(u64, Option<Box<IoError>>)>);

impl FailedFlush {
    /// Returns the error of the first one, if there was one.
    pub fn get(&self) -> Option<Box<IoError>> {
        self.0.lock().1.clone()
    }

    /// Returns their number. A writer reads it before its first write and again after the flush
    /// that makes the writes durable: one that has failed in between may have lost them.
    pub fn count(&self) -> u64 {
        self.0.lock().0
    }

    fn add(&self, error: &IoError) {
        let mut failed = self.0.lock();
        failed.0 += 1;
        failed.1.get_or_insert_with(|| Box::new(error.clone()));
    }
}

impl Steady {
    pub fn new(inner: Arc<dyn BlockDevice>) -> Arc<Steady> {
        let late = LateWrites::new(inner.info().block_size);
        Arc::new(Steady {
            inner,
            lost: Arc::default(),
            late: Arc::new(late),
            replayed: Arc::default(),
        })
    }

    /// Has reads find these blocks, and these parts of blocks, instead of what is in their places. It is called once.
    pub fn set_replayed(&self, blocks: Unplaced) {
        if blocks.len() > 0 {
            let unit = self.inner.info().block_size as usize;
            let replayed = Replayed::new(unit, blocks);
            let _ = self.replayed.set(Mutex::new(replayed));
        }
    }

    /// The failed flushes of all channels.
    pub fn failed_flush(&self) -> Arc<FailedFlush> {
        Arc::clone(&self.lost)
    }

    /// The writes of all channels that have timed out.
    pub fn late_writes(&self) -> Arc<LateWrites> {
        Arc::clone(&self.late)
    }
}

impl BlockDevice for Steady {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.inner)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let inner = self.inner.open_channel()?;
        let (lost, late) = (Arc::clone(&self.lost), Arc::clone(&self.late));
        let mut channel = SteadyChannel::new(inner, lost, late);
        channel.replayed = Arc::clone(&self.replayed);
        Ok(Box::new(channel))
    }
}

/// An operation that waits to be sent again.
struct Again {
    tag: u64,
    op: Op,
    at: Instant,
}

struct SteadyChannel {
    inner: Box<dyn IoChannel>,
    lost: Arc<FailedFlush>,
    late: Arc<LateWrites>,
    replayed: Arc<OnceLock<Mutex<Replayed>>>,
    again: Vec<Again>,
    /// Whether an operation that was due found no room.
    full: bool,
    /// Number of times that each failed operation was sent again.
    tries: HashMap<u64, u32>,
    /// Operations that ended while they waited.
    ended: Vec<Completion>,
}

impl SteadyChannel {
    fn new(
        inner: Box<dyn IoChannel>,
        lost: Arc<FailedFlush>,
        late: Arc<LateWrites>,
    ) -> SteadyChannel {
        SteadyChannel {
            inner,
            lost,
            late,
            replayed: Arc::default(),
            again: Vec::new(),
            full: false,
            tries: HashMap::new(),
            ended: Vec::new(),
        }
    }

    /// Keeps the operation to be sent again, or returns it with its error.
    fn failed(&mut self, tag: u64, op: Op, error: Box<IoError>) -> Option<(Op, Box<IoError>)> {
        let tries = self.tries.entry(tag).or_insert(0);
        if !error.is_retryable() || op.kind() == OpKind::Abort || *tries == TRIES {
            self.tries.remove(&tag);
            if op.kind() == OpKind::Flush {
                self.lost.add(&error);
            }
            // Before anybody learns that it has ended, and frees its blocks.
            self.late.note(&op, &error);
            return Some((op, error));
        }
        tracing::warn!(%error, "I/O failed, sent again");
        let pause = match *tries {
            0 => Duration::ZERO,
            n => PAUSE * 2u32.pow(n - 1),
        };
        *tries += 1;
        let at = Instant::now() + pause;
        self.again.push(Again { tag, op, at });
        None
    }

    /// Sends the operations that are due, as many as there is room for. Returns whether there was
    /// one.
    fn repeat(&mut self) -> bool {
        let now = Instant::now();
        let mut sent = false;
        self.full = false;
        for waiting in std::mem::take(&mut self.again) {
            if self.full || waiting.at > now {
                self.again.push(waiting);
                continue;
            }
            let Again { tag, op, at } = waiting;
            match self.inner.submit(tag, op) {
                Ok(()) => sent = true,
                Err(SubmitError::Busy(op)) => {
                    self.full = true;
                    self.again.push(Again { tag, op, at });
                }
                Err(SubmitError::Refused(op, error)) => {
                    if let Some((op, error)) = self.failed(tag, op, error) {
                        let result = Err(error);
                        self.ended.push(Completion { tag, op, result });
                    }
                }
            }
        }
        sent
    }

    /// Takes failed operations that are to be sent again out of `out[start..]`.
    #[cold]
    fn sift(&mut self, out: &mut Vec<Completion>, start: usize) {
        for completion in out.split_off(start) {
            let Completion { tag, op, result } = completion;
            match result {
                Ok(()) => {
                    self.tries.remove(&tag);
                    out.push(Completion { tag, op, result });
                }
                Err(error) => {
                    if let Some((op, error)) = self.failed(tag, op, error) {
                        let result = Err(error);
                        out.push(Completion { tag, op, result });
                    }
                }
            }
        }
    }
}

impl IoChannel for SteadyChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if self.full {
            return Err(SubmitError::Busy(op));
        }
        match self.inner.submit(tag, op) {
            Err(SubmitError::Refused(op, error)) => match self.failed(tag, op, error) {
                Some((op, error)) => Err(SubmitError::Refused(op, error)),
                None => Ok(()),
            },
            other => other,
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        loop {
            let now = out.len();
            self.inner.poll(out);
            if !self.tries.is_empty() || out[now..].iter().any(|c| c.result.is_err()) {
                self.sift(out, now);
            }
            // What is due gets the room that was made, and then has to reach the device.
            if self.again.is_empty() || !self.repeat() {
                break;
            }
        }
        out.append(&mut self.ended);
        if let Some(replayed) = self.replayed.get() {
            show(&mut replayed.lock(), &mut out[start..]);
        }
        out.len() - start
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if self.full {
            // Room is made by completions.
            if self.inner.in_flight() > 0 {
                return self.inner.wait(timeout);
            }
            std::thread::sleep(timeout.min(FULL));
            return Ok(());
        }
        let Some(due) = self.again.iter().map(|again| again.at).min() else {
            return self.inner.wait(timeout);
        };
        let pause = timeout.min(due.saturating_duration_since(Instant::now()));
        if self.inner.in_flight() > 0 {
            self.inner.wait(pause)
        } else {
            std::thread::sleep(pause);
            Ok(())
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.again.len() + self.ended.len()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    use pumice_bdev::{AsyncChannel, DmaBuf, Engine, IoErrorKind};

    fn device(count: u64, op: OpKind, failure: Failure) -> Arc<Steady> {
        let base = pumice_bdev::open("malloc://1M?block_size=4096").unwrap();
        let dev = ErrorDevice::new(None, base);
        dev.inject(Injection::new(failure).op(Some(op)).count(count));
        Steady::new(Arc::new(dev))
    }

    #[test]
    fn passing_errors_pass_and_lasting_ones_end() {
        for (count, failure, ok) in [
            (1, Failure::NoMemory, true),
            (u64::from(TRIES), Failure::NoMemory, true),
            (1000, Failure::NoMemory, false),
            (1, Failure::Fail, false),
        ] {
            let dev = device(count, OpKind::Write, failure);
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            let data = DmaBuf::zeroed(4096).unwrap().freeze();
            let result = ch.block_on(ch.write(3, data, false));
            assert_eq!(result.is_ok(), ok, "{count} of {failure:?}");
            assert_eq!(ch.in_flight(), 0);
        }
    }

    #[test]
    fn others_go_on_beside_one_that_is_repeated() {
        let dev = device(4, OpKind::Read, Failure::NoMemory);
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let ops = (0..20).map(|lba| Op::Read {
            lba,
            buf: DmaBuf::new(4096).unwrap(),
        });
        let done = ch.block_on(ch.io_all(ops.collect()));
        for ((op, result), lba) in done.iter().zip(0..) {
            assert_eq!((op.lba(), result.is_ok()), (lba, true));
        }
    }

    /// A queue with few places, of which others have some. It completes one operation at a poll, and
    /// the first ones of block 0 fail.
    #[derive(Default)]
    struct Narrow {
        taken: VecDeque<(u64, Op)>,
        order: Vec<u64>,
        failures: u32,
        waits: Vec<Duration>,
        others: usize,
    }

    #[derive(Clone, Default)]
    struct NarrowChannel(Arc<Mutex<Narrow>>);

    const PLACES: usize = 2;

    impl IoChannel for NarrowChannel {
        fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
            let mut narrow = self.0.lock();
            if narrow.taken.len() + narrow.others >= PLACES {
                return Err(SubmitError::Busy(op));
            }
            narrow.order.push(op.lba());
            narrow.taken.push_back((tag, op));
            Ok(())
        }

        fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
            let mut narrow = self.0.lock();
            let Some((tag, op)) = narrow.taken.pop_front() else {
                return 0;
            };
            let mut result = Ok(());
            if op.lba() == 0 && narrow.failures > 0 {
                narrow.failures -= 1;
                let info = pumice_bdev::open("null://1M").unwrap().info().clone();
                result = Err(info.error(&op, IoErrorKind::NoMemory, "injected"));
            }
            out.push(Completion { tag, op, result });
            1
        }

        fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
            self.0.lock().waits.push(timeout);
            Ok(())
        }

        fn in_flight(&self) -> usize {
            self.0.lock().taken.len()
        }
    }

    fn narrow(failures: u32) -> (NarrowChannel, SteadyChannel) {
        let shared = NarrowChannel::default();
        shared.0.lock().failures = failures;
        let channel = SteadyChannel::new(
            Box::new(shared.clone()),
            Arc::default(),
            Arc::new(LateWrites::new(512)),
        );
        (shared, channel)
    }

    fn read(lba: u64) -> Op {
        let buf = DmaBuf::new(4096).unwrap();
        Op::Read { lba, buf }
    }

    #[test]
    fn a_repeated_operation_does_not_starve_behind_new_ones() {
        let (_, channel) = narrow(3);
        let limit = Instant::now() + Duration::from_secs(20);
        let mut engine = Engine::new(Box::new(channel));
        let mut next = 0;
        let mut first_is_done = false;
        while !first_is_done {
            // There is always more to do than there is room.
            while engine.in_flight() < 4 * PLACES {
                engine.submit((), read(next)).unwrap();
                next += 1;
            }
            engine.reap(|_, (), op, result| {
                assert!(result.is_ok());
                first_is_done |= op.lba() == 0;
                None
            });
            assert!(Instant::now() < limit, "block 0 is not read, others are");
        }
    }

    #[test]
    fn what_is_due_goes_first_and_is_waited_for_without_spinning() {
        let (shared, mut channel) = narrow(1);
        let mut out = Vec::new();
        channel.submit(0, read(0)).unwrap();
        shared.0.lock().others = PLACES;
        assert_eq!(channel.poll(&mut out), 0);
        assert_eq!(channel.in_flight(), 1);
        // Room that others make is for the operation that is due.
        shared.0.lock().others = PLACES - 1;
        assert!(matches!(
            channel.submit(1, read(1)),
            Err(SubmitError::Busy(_))
        ));
        channel.poll(&mut out);
        assert_eq!(shared.0.lock().order, [0, 0]);
        channel.poll(&mut out);
        assert!(matches!(
            &out[..],
            [Completion {
                tag: 0,
                result: Ok(()),
                ..
            }]
        ));

        // While all places are taken, a wait lasts until there may be room.
        shared.0.lock().failures = 1;
        shared.0.lock().others = 0;
        channel.submit(0, read(0)).unwrap();
        channel.submit(1, read(1)).unwrap();
        shared.0.lock().others = PLACES - 1;
        channel.poll(&mut out);
        channel.wait(Duration::from_secs(7)).unwrap();
        assert_eq!(shared.0.lock().waits, [Duration::from_secs(7)]);
    }

    #[test]
    fn a_failed_flush_is_remembered() {
        let dev = device(1, OpKind::Flush, Failure::Fail);
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        assert!(dev.failed_flush().get().is_none());
        assert!(ch.block_on(ch.flush()).is_err());
        assert!(ch.block_on(ch.flush()).is_ok());
        assert!(dev.failed_flush().get().is_some());
        assert_eq!(dev.failed_flush().count(), 1);
    }

    /// A read into several buffers finds the blocks of a journal in each of them.
    #[test]
    fn every_part_of_a_read_shows_the_blocks_of_the_journal() {
        let dev = Steady::new(pumice_bdev::open("malloc://1M?block_size=4096").unwrap());
        let block = |byte: u8| vec![byte; 4096].into_boxed_slice();
        let blocks = [
            (11, block(1)),
            (12, block(2)),
            (14, block(4)),
            (17, block(7)),
        ];
        dev.set_replayed(Unplaced {
            blocks: blocks.into(),
            ..Unplaced::default()
        });
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        // Blocks 10 and 11, block 12, blocks 13 to 15, block 16.
        let bufs = [2, 1, 3, 1].map(|count| DmaBuf::zeroed(count * 4096).unwrap());
        let read = Op::ReadV {
            lba: 10,
            bufs: bufs.into(),
        };
        let (read, result) = ch.block_on(ch.io(read));
        result.unwrap();
        let Op::ReadV { bufs, .. } = read else {
            panic!("another operation");
        };
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let found: Vec<u8> = bytes.chunks(4096).map(|block| block[0]).collect();
        assert_eq!(found, [0, 1, 2, 0, 4, 0, 0]);
        let whole = |block: &[u8]| block.iter().all(|byte| *byte == block[0]);
        assert!(bytes.chunks(4096).all(whole));
    }
}
