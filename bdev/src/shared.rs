//! Channels that threads share, for I/O that outlives the call that started it, such as a file
//! system's writeback and readahead.
//!
//! The thread that has a batch of operations submits it, and whichever thread next uses its channel
//! takes the completions. A thread that needs a batch drives the channel itself. So nothing waits
//! for a particular other thread to run, and there is no I/O thread.
//!
//! Locks: a channel's lock is a leaf. It is held while the channel sleeps, in slices, and given
//! up between them to whoever queues for it; completions run after it has been released.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use pumice_io::{IoError, Op};

use crate::device::{BlockDevice, DeviceInfo};
use crate::engine::Engine;
use crate::error::BdevError;

/// Longest wait on a shared channel, so that other threads can use it.
const SLICE: Duration = Duration::from_millis(1);

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

/// The shared channels; see the module.
pub struct SharedChannels {
    channels: Vec<Mutex<Engine<Part>>>,
    /// Number of batches whose completion has not returned.
    unfinished: AtomicUsize,
}

impl SharedChannels {
    /// Opens `want` channels, or as many as the device allows.
    ///
    /// # Errors
    /// Fails when the device allows none.
    pub fn new(dev: &Arc<dyn BlockDevice>, want: usize) -> Result<SharedChannels, BdevError> {
        let mut channels = Vec::new();
        for n in 0..want.max(1) {
            match dev.open_channel() {
                Ok(channel) => channels.push(Mutex::new(Engine::new(channel))),
                Err(e) if n == 0 => return Err(e),
                Err(e) => {
                    tracing::debug!(device = %dev.info().name, channels = n, error = %e, "fewer shared channels than wanted");
                    break;
                }
            }
        }
        Ok(SharedChannels {
            channels,
            unfinished: AtomicUsize::new(0),
        })
    }

    /// Starts `ops`. `on_done` runs once, without a lock, on whichever thread takes the last
    /// completion (possibly this one, at once).
    pub fn submit(&self, ops: Vec<Op>, on_done: impl FnOnce(Outcome) + Send + 'static) -> Ticket {
        let n = self.channels.len();
        let first = thread_number() % n;
        let free = (0..n).find_map(|k| {
            let i = (first + k) % n;
            self.channels[i].try_lock().map(|guard| (i, guard))
        });
        let (index, mut channel) = free.unwrap_or_else(|| (first, self.channels[first].lock()));
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
            self.try_reap(&self.channels[ticket.0.channel]);
        }
        ticket.is_done()
    }

    /// Drives the ticket's channel until the batch is done.
    pub fn wait(&self, ticket: &Ticket) {
        while !ticket.is_done() {
            self.drive(ticket.0.channel);
        }
    }

    /// Takes completions of every channel. Never blocks.
    pub fn poll_all(&self) {
        self.channels
            .iter()
            .for_each(|channel| self.try_reap(channel));
    }

    /// Waits a slice for any completion of any channel. Returns false if nothing is in flight.
    pub fn wait_any(&self) -> bool {
        let n = self.channels.len();
        let first = thread_number() % n;
        for k in 0..n {
            let i = (first + k) % n;
            if self.channels[i].lock().in_flight() > 0 {
                self.drive(i);
                return true;
            }
        }
        false
    }

    /// Releases the channels: later operations are refused. Nothing may be in flight.
    pub fn close(&self, info: &DeviceInfo) {
        for channel in &self.channels {
            channel.lock().close(info);
        }
    }

    /// Waits until nothing is in flight on any channel and all completions have returned, those
    /// that run on other threads included. Must not be called by a completion.
    pub fn drain(&self) {
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

    fn drive(&self, index: usize) {
        let mut finished = Vec::new();
        let mut channel = self.channels[index].lock();
        reap(&mut channel, &mut finished);
        if finished.is_empty() {
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

    /// Takes completions, unless another thread is doing so.
    fn try_reap(&self, channel: &Mutex<Engine<Part>>) {
        if let Some(mut channel) = channel.try_lock() {
            let mut finished = Vec::new();
            reap(&mut channel, &mut finished);
            drop(channel);
            self.finish(finished);
        }
    }

    /// Runs the completions of batches whose operations have ended.
    fn finish(&self, finished: Vec<Arc<Batch>>) {
        for batch in finished {
            let _returns = Returns(&self.unfinished);
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

/// Counts a completion as returned when it is dropped, also by a panic.
struct Returns<'a>(&'a AtomicUsize);

impl Drop for Returns<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for SharedChannels {
    fn drop(&mut self) {
        self.drain();
    }
}

impl std::fmt::Debug for SharedChannels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedChannels({})", self.channels.len())
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
    use crate::{DmaBuf, DmaSlice};

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
