//! Channels that threads share, for I/O that outlives the call that started it: write-behind,
//! read-ahead, asynchronous reads.
//!
//! A batch of operations is submitted by the thread that has it and reaped by whichever thread
//! next comes by its channel; a thread that needs a batch drives its channel itself. So nothing
//! waits for a particular other thread to run, and there is no I/O thread.
//!
//! Locks: a channel's lock is a leaf. It is held while the channel sleeps, in slices, and given
//! up between them to whoever queues for it; completions run after it has been released.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoError, Op, SubmitError,
};

use super::cache::thread_stripe;
use crate::closed::ClosedChannel;

/// How long one wait on a shared channel lasts at the most, so that others get at it.
const SLICE: Duration = Duration::from_millis(1);

/// What a batch came to: its operations with their buffers, in the order given, and the first
/// error.
pub(crate) struct Outcome {
    pub ops: Vec<Op>,
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

/// A batch on its way. Dropping it forgets it; the operations and the completion go on.
#[derive(Clone)]
pub(crate) struct Ticket(Arc<Batch>);

impl Ticket {
    /// Whether the completion has run.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.0.done.load(Ordering::Acquire)
    }
}

struct InFlight {
    batch: Arc<Batch>,
    index: usize,
}

struct Channel {
    io: Box<dyn IoChannel>,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Operations that found the queue full.
    waiting: VecDeque<(InFlight, Op)>,
    reaped: Vec<Completion>,
}

/// The shared channels; see the module.
pub(crate) struct IoPool {
    channels: Vec<Mutex<Channel>>,
}

impl IoPool {
    /// Opens `want` channels, or as many as the device gives.
    ///
    /// # Errors
    /// When it gives none.
    pub fn new(dev: &Arc<dyn BlockDevice>, want: usize) -> Result<IoPool, BdevError> {
        let mut channels = Vec::new();
        for n in 0..want.max(1) {
            match dev.open_channel() {
                Ok(io) => channels.push(Mutex::new(Channel {
                    io,
                    slots: Vec::new(),
                    free: Vec::new(),
                    waiting: VecDeque::new(),
                    reaped: Vec::new(),
                })),
                Err(e) if n == 0 => return Err(e),
                Err(e) => {
                    tracing::debug!(device = %dev.info().name, channels = n, error = %e, "fewer shared channels than wanted");
                    break;
                }
            }
        }
        Ok(IoPool { channels })
    }

    /// Starts `ops`. `on_done` runs once, on whichever thread reaps the last of them (it may be
    /// this one, now), without a lock of the pool.
    pub fn submit(&self, ops: Vec<Op>, on_done: OnDone) -> Ticket {
        let n = self.channels.len();
        let first = thread_stripe() % n;
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
                on_done: Some(on_done),
            }),
        });
        let mut finished = Vec::new();
        if ops.is_empty() {
            finished.push(Arc::clone(&batch));
        }
        for (i, op) in ops.into_iter().enumerate() {
            let slot = InFlight {
                batch: Arc::clone(&batch),
                index: i,
            };
            channel.start(slot, op, &mut finished);
        }
        channel.reap(&mut finished);
        drop(channel);
        finish(finished);
        Ticket(batch)
    }

    /// Reaps what is there on the ticket's channel; true if the batch is done.
    pub fn poll(&self, ticket: &Ticket) -> bool {
        if !ticket.is_done()
            && let Some(mut channel) = self.channels[ticket.0.channel].try_lock()
        {
            let mut finished = Vec::new();
            channel.reap(&mut finished);
            drop(channel);
            finish(finished);
        }
        ticket.is_done()
    }

    /// Drives the ticket's channel until the batch is done.
    pub fn wait(&self, ticket: &Ticket) {
        while !ticket.is_done() {
            self.drive(ticket.0.channel);
        }
    }

    /// Waits a slice for any completion of any channel; false if nothing is in flight.
    pub fn wait_any(&self) -> bool {
        let n = self.channels.len();
        let first = thread_stripe() % n;
        for k in 0..n {
            let i = (first + k) % n;
            let busy = {
                let channel = self.channels[i].lock();
                channel.io.in_flight() > 0 || !channel.waiting.is_empty()
            };
            if busy {
                self.drive(i);
                return true;
            }
        }
        false
    }

    /// Gives up the channels: what comes from now on is refused. Nothing may be in flight.
    pub fn close(&self, info: &DeviceInfo) {
        for channel in &self.channels {
            channel.lock().io = Box::new(ClosedChannel(info.clone()));
        }
    }

    /// Waits until nothing is in flight anywhere.
    pub fn drain(&self) {
        while self.wait_any() {}
    }

    fn drive(&self, index: usize) {
        let mut finished = Vec::new();
        let mut channel = self.channels[index].lock();
        channel.reap(&mut finished);
        if finished.is_empty() {
            if channel.io.in_flight() > 0 {
                if let Err(error) = channel.io.wait(SLICE) {
                    tracing::warn!(%error, "waiting for completions failed; polling instead");
                    std::thread::sleep(Duration::from_micros(50));
                }
                channel.reap(&mut finished);
            } else {
                // The completion is running on another thread.
                MutexGuard::unlocked_fair(&mut channel, std::thread::yield_now);
            }
        }
        MutexGuard::unlock_fair(channel);
        finish(finished);
    }
}

impl Drop for IoPool {
    fn drop(&mut self) {
        self.drain();
    }
}

impl std::fmt::Debug for IoPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoPool({} channels)", self.channels.len())
    }
}

impl Channel {
    fn start(&mut self, what: InFlight, op: Op, finished: &mut Vec<Arc<Batch>>) {
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        match self.io.submit(tag as u64, op) {
            Ok(()) => self.slots[tag] = Some(what),
            Err(SubmitError::Busy(op)) => {
                self.free.push(tag);
                self.waiting.push_back((what, op));
            }
            Err(SubmitError::Refused(op, e)) => {
                self.free.push(tag);
                complete(&what, op, Err(e), finished);
            }
        }
    }

    fn reap(&mut self, finished: &mut Vec<Arc<Batch>>) {
        let mut reaped = std::mem::take(&mut self.reaped);
        loop {
            let n = self.io.poll(&mut reaped);
            for c in reaped.drain(..) {
                let slot = usize::try_from(c.tag)
                    .ok()
                    .and_then(|t| self.slots.get_mut(t));
                let Some(what) = slot.and_then(Option::take) else {
                    tracing::error!(
                        tag = c.tag,
                        "completion of an operation that is not in flight"
                    );
                    continue;
                };
                self.free.push(usize::try_from(c.tag).unwrap_or_default());
                complete(&what, c.op, c.result, finished);
            }
            // As many as fit now; what does not fit comes back to the queue's end, in order.
            let mut again = self.waiting.len();
            let retry = again > 0;
            while again > 0 {
                again -= 1;
                let Some((what, op)) = self.waiting.pop_front() else {
                    break;
                };
                let before = self.waiting.len();
                self.start(what, op, finished);
                if self.waiting.len() > before {
                    self.waiting.rotate_right(1);
                    break;
                }
            }
            if n == 0 || !retry {
                break;
            }
        }
        self.reaped = reaped;
    }
}

fn complete(
    what: &InFlight,
    op: Op,
    result: Result<(), Box<IoError>>,
    finished: &mut Vec<Arc<Batch>>,
) {
    let mut state = what.batch.state.lock();
    state.ops[what.index] = Some(op);
    if let Err(e) = result {
        state.error.get_or_insert(e);
    }
    drop(state);
    if what.batch.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
        finished.push(Arc::clone(&what.batch));
    }
}

fn finish(finished: Vec<Arc<Batch>>) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use pumice_bdev::{DmaBuf, DmaSlice};

    fn pool() -> IoPool {
        IoPool::new(&pumice_bdev::open("malloc://4M?block_size=512").unwrap(), 2).unwrap()
    }

    #[test]
    fn batches_complete_once_and_in_order() {
        let pool = pool();
        let data: DmaSlice = DmaBuf::copy_from(&[5; 1024]).unwrap().into();
        let write = |lba| Op::Write {
            lba,
            data: data.clone(),
            fua: false,
        };
        let t = pool.submit(
            (0..600).map(|i| write(i * 2)).collect(),
            Box::new(|o| {
                assert!(o.result.is_ok());
                assert_eq!(o.ops.len(), 600);
            }),
        );
        pool.wait(&t);
        let (tx, rx) = std::sync::mpsc::channel();
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = pool.submit(
            vec![read(3), read(7)],
            Box::new(move |o| tx.send(o).unwrap()),
        );
        pool.wait(&t);
        let o = rx.try_recv().unwrap();
        assert!(matches!(&o.ops[1], Op::Read { lba: 7, buf } if buf[0] == 5));
        let t = pool.submit(Vec::new(), Box::new(|o| assert!(o.result.is_ok())));
        assert!(t.is_done());
    }

    #[test]
    fn an_error_reaches_the_completion() {
        let pool = pool();
        let (tx, rx) = std::sync::mpsc::channel();
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = pool.submit(
            vec![read(0), read(1 << 50)],
            Box::new(move |o| tx.send(o).unwrap()),
        );
        pool.wait(&t);
        assert!(rx.try_recv().unwrap().result.is_err());
    }

    #[test]
    fn any_thread_reaps() {
        let pool = Arc::new(pool());
        let read = |lba| Op::Read {
            lba,
            buf: DmaBuf::new(512).unwrap(),
        };
        let t = pool.submit((0..50).map(read).collect(), Box::new(|_| {}));
        let p = Arc::clone(&pool);
        std::thread::spawn(move || p.wait(&t)).join().unwrap();
    }
}
