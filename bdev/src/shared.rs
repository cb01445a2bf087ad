//! Channels that threads share, for I/O that outlives the call that started it, such as a file
//! system's writeback and readahead.
//!
//! The thread that has a batch of operations submits it, and whichever thread next uses its channel
//! takes the completions. A thread that needs a batch drives the channel itself. So nothing waits
//! for a particular other thread to run, and there is no I/O thread.
//!
//! Locks: a channel's lock is a leaf. It is held while the channel sleeps, in slices, and given
//! up between them to whoever queues for it; completions run after it has been released.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use pumice_io::process::Birth;
use pumice_io::{IoError, Op};

use crate::device::{BlockDevice, DeviceInfo};
use crate::engine::Engine;
use crate::error::BdevError;

/// Longest wait on a shared channel, so that other threads can use it.
const SLICE: Duration = Duration::from_millis(1);

/// The pause before a device that has refused a channel is asked again.
const REFUSED: Duration = Duration::from_secs(1);

/// The result of a batch. The operations are in the given order.
#[derive(Debug)]
pub struct Outcome {
    /// The operations, with their buffers.
    pub ops: Vec<Op>,
    /// The first error.
    pub result: Result<(), Box<IoError>>,
}

type OnDone = Box<dyn FnOnce(Outcome) + Send>;

struct BatchState {
    ops: Vec<Option<Op>>,
    error: Option<Box<IoError>>,
    on_done: Option<OnDone>,
}

struct Batch {
    channel: usize,
    remaining: AtomicUsize,
    done: AtomicBool,
    state: Mutex<BatchState>,
}

/// A batch in flight. Dropping this does not stop the operations or the completion.
#[derive(Clone)]
pub struct Ticket(Arc<Batch>);

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ticket(done: {})", self.is_done())
    }
}

impl Ticket {
    /// Whether the completion has run.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.0.done.load(Ordering::Acquire)
    }
}

/// The batch of an operation, and its number in the batch.
type Part = (Arc<Batch>, usize);

/// Returns a small number of this thread, to choose one of several equal objects.
#[inline]
pub fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    MINE.with(|mine| *mine)
}

/// The shared channels; see the module. There is one at first. Another is opened when a thread has
/// operations and finds each of them in use.
pub struct SharedChannels {
    channels: Box<[OnceLock<Mutex<Engine<Part>>>]>,
    /// Number of open channels, which are the first of them.
    open: AtomicUsize,
    /// The source of further ones, until they are closed. The lock is held while the device makes a
    /// channel, and only [`SharedChannels::close`] waits for it.
    more: Mutex<Option<More>>,
    /// Number of batches whose completion has not returned.
    unfinished: AtomicUsize,
    /// The process that opened them. In a forked child nothing of theirs ends.
    born: Birth,
}

/// The source of channels.
struct More {
    dev: Arc<dyn BlockDevice>,
    /// The device is asked again from then on, since it has refused a channel.
    not_before: Option<Instant>,
}

impl SharedChannels {
    /// Opens a channel of `dev`. There will be at most `most`, or as many as the device allows, and
    /// at most half of those that the device has queues for: the others are for threads.
    ///
    /// # Errors
    /// Fails when the device allows none.
    pub fn new(dev: &Arc<dyn BlockDevice>, most: usize) -> Result<SharedChannels, BdevError> {
        let first = OnceLock::from(Mutex::new(Engine::new(dev.open_channel()?)));
        let most = dev.own_channels().map_or(most, |own| most.min(own / 2));
        let later = (1..most).map(|_| OnceLock::new());
        Ok(SharedChannels {
            channels: std::iter::once(first).chain(later).collect(),
            open: AtomicUsize::new(1),
            more: Mutex::new(Some(More {
                dev: Arc::clone(dev),
                not_before: None,
            })),
            unfinished: AtomicUsize::new(0),
            born: Birth::now(),
        })
    }

    /// The open channels.
    fn opened(&self) -> impl Iterator<Item = &Mutex<Engine<Part>>> {
        let open = self.open.load(Ordering::Acquire);
        self.channels[..open].iter().filter_map(OnceLock::get)
    }

    fn channel(&self, index: usize) -> &Mutex<Engine<Part>> {
        self.channels[index].get().expect("an open channel")
    }

    /// Opens another channel, unless another thread is doing so. Returns its number.
    fn open_another(&self) -> Option<usize> {
        let mut more = self.more.try_lock()?;
        let more = more.as_mut()?;
        let index = self.open.load(Ordering::Acquire);
        let place = self.channels.get(index)?;
        if more.not_before.is_some_and(|then| Instant::now() < then) {
            return None;
        }
        let channel = match more.dev.open_channel() {
            Ok(channel) => channel,
            Err(error) => {
                let device = &more.dev.info().name;
                tracing::debug!(%device, channels = index, %error, "the device gives no more channels");
                more.not_before = Some(Instant::now() + REFUSED);
                return None;
            }
        };
        place.get_or_init(|| Mutex::new(Engine::new(channel)));
        self.open.store(index + 1, Ordering::Release);
        Some(index)
    }

    /// Starts `ops`. `on_done` runs once, without a lock, on whichever thread takes the last
    /// completion (possibly this one, at once).
    pub fn submit(&self, ops: Vec<Op>, on_done: impl FnOnce(Outcome) + Send + 'static) -> Ticket {
        let n = self.open.load(Ordering::Acquire);
        let first = thread_number() % n;
        let free = (0..n).find_map(|k| {
            let i = (first + k) % n;
            self.channel(i).try_lock().map(|guard| (i, guard))
        });
        let (index, mut channel) = free.unwrap_or_else(|| {
            let index = self.open_another().unwrap_or(first);
            (index, self.channel(index).lock())
        });
        let batch = Arc::new(Batch {
            channel: index,
            remaining: AtomicUsize::new(ops.len()),
            done: AtomicBool::new(false),
            state: Mutex::new(BatchState {
                ops: ops.iter().map(|_| None).collect(),
                error: None,
                on_done: Some(Box::new(on_done)),
            }),
        });
        self.unfinished.fetch_add(1, Ordering::Relaxed);
        let mut finished = Vec::new();
        if ops.is_empty() {
            finished.push(Arc::clone(&batch));
        }
        for (i, op) in ops.into_iter().enumerate() {
            if let Err((part, op, error)) = channel.submit((Arc::clone(&batch), i), op) {
                complete(part, op, Err(error), &mut finished);
            }
        }
        reap(&mut channel, &mut finished);
        drop(channel);
        self.finish(finished);
        Ticket(batch)
    }

    /// Runs `ops` and waits for them.
    ///
    /// # Errors
    /// Returns the first error.
    pub fn run(&self, ops: Vec<Op>) -> Result<(), Box<IoError>> {
        let result = Arc::new(Mutex::new(Ok(())));
        let slot = Arc::clone(&result);
        let ticket = self.submit(ops, move |o| *slot.lock() = o.result);
        self.wait(&ticket);
        std::mem::replace(&mut *result.lock(), Ok(()))
    }

    /// Takes completions of the ticket's channel. Returns whether the batch is done.
    pub fn poll(&self, ticket: &Ticket) -> bool {
        if !ticket.is_done() {
            self.try_reap(self.channel(ticket.0.channel));
        }
        ticket.is_done()
    }

    /// Drives the ticket's channel until the batch is done.
    pub fn wait(&self, ticket: &Ticket) {
        while !ticket.is_done() {
            self.drive(ticket.0.channel, || ticket.is_done());
        }
    }

    /// Takes completions of every channel. Returns whether a batch has ended. Never blocks.
    pub fn poll_all(&self) -> bool {
        let ended = self.opened().filter(|channel| self.try_reap(channel));
        ended.count() > 0
    }

    /// Waits a slice for any completion of any channel. Returns false if nothing is in flight.
    pub fn wait_any(&self) -> bool {
        // What has ended on one channel does not wait for what has not on another.
        if self.poll_all() {
            return true;
        }
        let n = self.open.load(Ordering::Acquire);
        let first = thread_number() % n;
        for k in 0..n {
            let i = (first + k) % n;
            if self.channel(i).lock().in_flight() > 0 {
                self.drive(i, || false);
                return true;
            }
        }
        false
    }

    /// Releases the channels: later operations are refused. Nothing may be in flight.
    pub fn close(&self, info: &DeviceInfo) {
        self.more.lock().take();
        for channel in self.opened() {
            channel.lock().close(info);
        }
    }

    /// Waits until nothing is in flight on any channel and all completions have returned, also those
    /// on other threads. Must not be called by a completion. A forked child has nothing in flight.
    pub fn drain(&self) {
        if !self.born.is_here() {
            return;
        }
        loop {
            if self.wait_any() {
                continue;
            }
            if self.unfinished.load(Ordering::Acquire) == 0 {
                return;
            }
            // A completion is running on another thread.
            std::thread::yield_now();
        }
    }

    /// Takes completions of a channel, or waits a slice for one. Does not wait if `is_done` by the
    /// time that the channel is free: another thread may have taken the completion.
    fn drive(&self, index: usize, is_done: impl Fn() -> bool) {
        let mut finished = Vec::new();
        let mut channel = self.channel(index).lock();
        reap(&mut channel, &mut finished);
        if finished.is_empty() && !is_done() {
            if channel.in_flight() > 0 {
                channel.wait(SLICE);
                reap(&mut channel, &mut finished);
            } else {
                // The completion is running on another thread.
                MutexGuard::unlocked_fair(&mut channel, std::thread::yield_now);
            }
        }
        MutexGuard::unlock_fair(channel);
        self.finish(finished);
    }

    /// Takes completions, unless another thread is doing so. Returns whether a batch has ended.
    fn try_reap(&self, channel: &Mutex<Engine<Part>>) -> bool {
        let Some(mut channel) = channel.try_lock() else {
            return false;
        };
        let mut finished = Vec::new();
        reap(&mut channel, &mut finished);
        drop(channel);
        let any = !finished.is_empty();
        self.finish(finished);
        any
    }

    /// Runs the completions of batches whose operations have ended.
    fn finish(&self, finished: Vec<Arc<Batch>>) {
        if finished.is_empty() {
            return;
        }
        let _returns = Returns(&self.unfinished, finished.len());
        for batch in finished {
            let mut state = batch.state.lock();
            let on_done = state.on_done.take();
            let ops = state.ops.iter_mut().filter_map(Option::take).collect();
            let result = state.error.take().map_or(Ok(()), Err);
            drop(state);
            if let Some(on_done) = on_done {
                on_done(Outcome { ops, result });
            }
            batch.done.store(true, Ordering::Release);
        }
    }
}

/// Counts so many completions as returned when it is dropped, also by a panic of one of them.
struct Returns<'a>(&'a AtomicUsize, usize);

impl Drop for Returns<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Release);
    }
}

impl Drop for SharedChannels {
    fn drop(&mut self) {
        self.drain();
    }
}

impl std::fmt::Debug for SharedChannels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedChannels({})", self.opened().count())
    }
}

fn reap(channel: &mut Engine<Part>, finished: &mut Vec<Arc<Batch>>) {
    channel.reap(|_, part, op, result| {
        complete(part, op, result, finished);
        None
    });
}

fn complete(
    (batch, index): Part,
    op: Op,
    result: Result<(), Box<IoError>>,
    finished: &mut Vec<Arc<Batch>>,
) {
    let mut state = batch.state.lock();
    state.ops[index] = Some(op);
    if let Err(e) = result {
        state.error.get_or_insert(e);
    }
    drop(state);
    if batch.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
        finished.push(batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Completion, DmaBuf, DmaSlice, IoChannel, SubmitError};

    /// A device that gives `left` channels. Waiting for one of them is a mistake.
    #[derive(Debug)]
    struct Few {
        base: Arc<dyn BlockDevice>,
        own: Option<usize>,
        left: AtomicUsize,
    }

    struct Unwaited(Box<dyn IoChannel>);

    impl BlockDevice for Few {
        fn info(&self) -> &DeviceInfo {
            self.base.info()
        }

        fn own_channels(&self) -> Option<usize> {
            self.own
        }

        fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
            let taken = self
                .left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if taken.is_err() {
                return Err(BdevError::Unsupported {
                    device: self.info().name.clone(),
                    reason: "it has no more channels".to_owned(),
                });
            }
            Ok(Box::new(Unwaited(self.base.open_channel()?)))
        }
    }

    impl IoChannel for Unwaited {
        fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
            self.0.submit(tag, op)
        }

        fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
            0
        }

        fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
            panic!("nobody has to wait here");
        }

        fn in_flight(&self) -> usize {
            self.0.in_flight()
        }
    }

    #[test]
    fn channels_are_opened_when_they_are_needed_and_the_device_has_them() {
        let base = crate::open("malloc://1M?block_size=512").unwrap();
        let dev: Arc<dyn BlockDevice> = Arc::new(Few {
            base,
            own: None,
            left: AtomicUsize::new(3),
        });
        let shared = SharedChannels::new(&dev, 8).unwrap();
        let mut tickets = Vec::new();
        for _ in 0..10 {
            tickets.push(shared.submit(Vec::new(), |_| {}));
        }
        assert_eq!(shared.opened().count(), 1, "one thread needs one");
        let mut held = vec![shared.channel(0).lock()];
        for n in 1..3 {
            let ticket = shared.submit(Vec::new(), |_| {});
            assert_eq!((ticket.0.channel, shared.opened().count()), (n, n + 1));
            held.push(shared.channel(n).lock());
        }
        assert_eq!(shared.open_another(), None, "the device gives no more");
        assert!(shared.more.lock().as_ref().unwrap().not_before.is_some());
        drop(held);

        let two = crate::open("malloc://1M?block_size=512").unwrap();
        let shared = SharedChannels::new(&two, 2).unwrap();
        assert_eq!(shared.open_another(), Some(1));
        assert_eq!(shared.open_another(), None, "two are allowed");
        shared.close(two.info());
        assert!(shared.more.lock().is_none());
    }

    #[test]
    fn half_of_the_hardware_is_for_threads() {
        for (own, most) in [(64, 8), (5, 2), (1, 1), (0, 1)] {
            let dev: Arc<dyn BlockDevice> = Arc::new(Few {
                base: crate::open("malloc://1M?block_size=512").unwrap(),
                own: Some(own),
                left: AtomicUsize::new(1),
            });
            let mut halves = crate::split::Split::new(&dev, 2, None).unwrap();
            let half: Arc<dyn BlockDevice> = Arc::new(halves.remove(0));
            assert_eq!(half.own_channels(), Some(own));
            assert_eq!(SharedChannels::new(&half, 8).unwrap().channels.len(), most);
        }
    }

    #[test]
    fn whose_batch_is_done_does_not_wait_for_others() {
        let base = crate::open("malloc://1M?block_size=512").unwrap();
        let dev: Arc<dyn BlockDevice> = Arc::new(Few {
            base,
            own: None,
            left: AtomicUsize::new(1),
        });
        let shared = SharedChannels::new(&dev, 1).unwrap();
        let buf = DmaBuf::new(512).unwrap();
        let never = shared.submit(vec![Op::Read { lba: 0, buf }], |_| {});
        shared.drive(0, || true);
        assert!(!never.is_done());
        // What is in flight stays there: its channel never says that it is done.
        std::mem::forget(shared);
    }

    #[test]
    fn what_has_ended_is_taken_although_another_channel_is_busy() {
        let base = crate::open("malloc://1M?block_size=512").unwrap();
        let busy: Arc<dyn BlockDevice> = Arc::new(Few {
            base: Arc::clone(&base),
            own: None,
            left: AtomicUsize::new(1),
        });
        let shared = SharedChannels::new(&busy, 2).unwrap();
        let read = || {
            let buf = DmaBuf::new(512).unwrap();
            vec![Op::Read { lba: 0, buf }]
        };
        // The first channel never completes anything, and whoever waits for it panics.
        let never = shared.submit(read(), |_| {});
        let quick = Mutex::new(Engine::new(base.open_channel().unwrap()));
        shared.channels[1].get_or_init(|| quick);
        shared.open.store(2, Ordering::Release);
        let held = shared.channel(0).lock();
        let ended = shared.submit(read(), |_| {});
        drop(held);
        assert_eq!(ended.0.channel, 1);
        while !ended.is_done() {
            assert!(shared.wait_any());
        }
        assert!(!never.is_done());
        std::mem::forget(shared);
    }

    fn channels() -> SharedChannels {
        let dev = crate::open("malloc://4M?block_size=512").unwrap();
        SharedChannels::new(&dev, 2).unwrap()
    }

    #[test]
    fn batches_complete_once_and_in_order() {
        let shared = channels();
        let data: DmaSlice = DmaBuf::copy_from(&[5; 1024]).unwrap().into();
        let write = |lba| Op::Write {
            lba,
            data: data.clone(),
            fua: false,
        };
        let t = shared.submit((0..600).map(|i| write(i * 2)).collect(), |o| {
            assert!(o.result.is_ok());
            assert_eq!(o.ops.len(), 600);
        });
        shared.wait(&t);
        let (tx, rx) = std::sync::mpsc::channel();
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = shared.submit(vec![read(3), read(7)], move |o| tx.send(o).unwrap());
        shared.wait(&t);
        let o = rx.try_recv().unwrap();
        assert!(matches!(&o.ops[1], Op::Read { lba: 7, buf } if buf[0] == 5));
        let t = shared.submit(Vec::new(), |o| assert!(o.result.is_ok()));
        assert!(t.is_done());
    }

    #[test]
    fn an_error_reaches_the_completion() {
        let shared = channels();
        let (tx, rx) = std::sync::mpsc::channel();
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = shared.submit(vec![read(0), read(1 << 50)], move |o| tx.send(o).unwrap());
        shared.wait(&t);
        assert!(rx.try_recv().unwrap().result.is_err());
    }

    #[test]
    fn a_drain_waits_for_completions_on_other_threads() {
        let shared = Arc::new(channels());
        let ended = Arc::new(AtomicBool::new(false));
        let (running, is_running) = std::sync::mpsc::channel();
        let (other, ends) = (Arc::clone(&shared), Arc::clone(&ended));
        let reaper = std::thread::spawn(move || {
            let buf = DmaBuf::new(512).unwrap();
            let ticket = other.submit(vec![Op::Read { lba: 0, buf }], move |_| {
                running.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(50));
                ends.store(true, Ordering::Release);
            });
            other.wait(&ticket);
        });
        is_running.recv().unwrap();
        shared.drain();
        assert!(ended.load(Ordering::Acquire));
        reaper.join().unwrap();
    }

    #[test]
    fn any_thread_reaps() {
        let shared = Arc::new(channels());
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = shared.submit((0..50).map(read).collect(), |_| {});
        let other = Arc::clone(&shared);
        std::thread::spawn(move || other.wait(&t)).join().unwrap();
    }
}
