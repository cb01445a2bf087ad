//! Asynchronous code on one thread: [`AsyncChannel`].
//!
//! The steps of a blob operation are written as an `async fn`. The thread that calls
//! [`AsyncChannel::block_on`] polls the device itself, so no other thread is involved.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use pumice_io::{IoError, Op};

use crate::device::IoChannel;
use crate::engine::Engine;
use crate::join::join_all;
use crate::{DmaBuf, DmaSlice};

/// Longest sleep while a future may also be woken from another thread.
const WAIT_MAX: Duration = Duration::from_millis(10);

/// The operation, with its buffers, and its result.
pub type IoOutcome = (Op, Result<(), Box<IoError>>);

/// A channel for asynchronous code on one thread. Clones share the channel. Not `Send`.
///
/// If a future is dropped before its operation has completed, the operation with its buffers stays
/// in the channel until the device no longer uses them.
#[derive(Clone)]
pub struct AsyncChannel {
    inner: Rc<Inner>,
}

struct Inner {
    engine: RefCell<Engine<Owner>>,
    /// Wakers of futures whose operations have ended. They are called while nothing is borrowed.
    woken: RefCell<Vec<Waker>>,
    /// Dropped after the engine, whose operations in flight use these objects.
    keepers: RefCell<Vec<Keeper>>,
    signal: Arc<Signal>,
    depth: Cell<u32>,
}

/// An object that is kept until operations whose futures were dropped have completed.
struct Keeper {
    tags: Vec<u64>,
    kept: Box<dyn Any>,
}

/// The owner of an operation.
enum Owner {
    /// A future that waits for the operation.
    Waits(Waker),
    /// A future that has not fetched the result yet.
    Done(Op, Result<(), Box<IoError>>),
    /// Nobody: the future was dropped, and the completion frees the tag.
    Orphan,
}

/// Wakes the thread inside `block_on`.
struct Signal {
    woken: AtomicBool,
    parked: AtomicBool,
    thread: Thread,
}

impl Signal {
    fn new() -> Arc<Signal> {
        Arc::new(Signal {
            woken: AtomicBool::new(true),
            parked: AtomicBool::new(false),
            thread: thread::current(),
        })
    }
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

impl AsyncChannel {
    /// Wraps a channel.
    pub fn new(channel: Box<dyn IoChannel>) -> AsyncChannel {
        AsyncChannel {
            inner: Rc::new(Inner {
                engine: RefCell::new(Engine::new(channel)),
                woken: RefCell::default(),
                keepers: RefCell::default(),
                signal: Signal::new(),
                depth: Cell::new(0),
            }),
        }
    }

    /// Runs `op`. It is submitted when the future is first polled, and waits while the queue is
    /// full.
    pub fn io(&self, op: Op) -> Io {
        Io {
            inner: Rc::clone(&self.inner),
            state: IoState::New(op),
        }
    }

    /// Reads into `buf`, a multiple of the block size, from block `lba`.
    ///
    /// # Errors
    /// Returns the device's error. The buffer is then freed.
    pub async fn read(&self, lba: u64, buf: DmaBuf) -> Result<DmaBuf, Box<IoError>> {
        match self.io(Op::Read { lba, buf }).await {
            (Op::Read { buf, .. }, Ok(())) => Ok(buf),
            (_, Err(e)) => Err(e),
            (op, Ok(())) => unreachable!("a read came back as {op:?}"),
        }
    }

    /// Writes `data`, a multiple of the block size, at block `lba`.
    ///
    /// # Errors
    /// Returns the device's error.
    pub async fn write(&self, lba: u64, data: DmaSlice, fua: bool) -> Result<(), Box<IoError>> {
        self.io(Op::Write { lba, data, fua }).await.1
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// Returns the device's error.
    pub async fn flush(&self) -> Result<(), Box<IoError>> {
        self.io(Op::Flush).await.1
    }

    /// Makes `len_blocks` blocks from `lba` read as zeroes.
    ///
    /// # Errors
    /// Returns the device's error.
    pub async fn write_zeroes(
        &self,
        lba: u64,
        len_blocks: u64,
        fua: bool,
    ) -> Result<(), Box<IoError>> {
        self.io(Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        })
        .await
        .1
    }

    /// Tells the device that the contents of `len_blocks` blocks from `lba` are not needed.
    ///
    /// # Errors
    /// Returns the device's error.
    pub async fn unmap(&self, lba: u64, len_blocks: u64) -> Result<(), Box<IoError>> {
        self.io(Op::Unmap { lba, len_blocks }).await.1
    }

    /// Runs `future` to its end on this thread: polls it, then the channel. When neither makes
    /// progress, the channel spins briefly and then sleeps. A future that nothing has woken is
    /// polled after at most 10 ms without a completion, so that it can keep to a time limit.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let depth = self.inner.depth.get();
        // A nested call needs a signal of its own, or it would take the outer one's wake-ups.
        let same_thread = self.inner.signal.thread.id() == thread::current().id();
        let signal = if depth == 0 && same_thread {
            Arc::clone(&self.inner.signal)
        } else {
            Signal::new()
        };
        signal.woken.store(true, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&signal));
        let mut cx = Context::from_waker(&waker);
        let _depth = Depth::enter(&self.inner.depth);
        loop {
            if signal.woken.swap(false, Ordering::SeqCst)
                && let Poll::Ready(out) = future.as_mut().poll(&mut cx)
            {
                return out;
            }
            let idled = !signal.woken.load(Ordering::SeqCst);
            if idled {
                self.idle(&signal);
            }
            if self.pump() == 0 && idled {
                // A future with a time limit looks at the clock.
                signal.woken.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Runs all operations together and returns their outcomes in the order given.
    pub async fn io_all(&self, ops: Vec<Op>) -> Vec<IoOutcome> {
        join_all(ops.into_iter().map(|op| self.io(op))).await
    }

    /// Takes completions and wakes their futures. Never blocks. Returns the number of completions.
    /// For callers that poll futures themselves.
    pub fn pump(&self) -> usize {
        let mut woken = self.inner.woken.take();
        let mut orphans = Vec::new();
        let n = self
            .inner
            .engine
            .borrow_mut()
            .reap(|tag, owner, op, result| match owner {
                Owner::Waits(waker) => {
                    woken.push(waker);
                    Some(Owner::Done(op, result))
                }
                Owner::Orphan => {
                    orphans.push(tag);
                    None
                }
                done @ Owner::Done(..) => {
                    tracing::error!(tag, "an operation completed twice");
                    Some(done)
                }
            });
        for waker in woken.drain(..) {
            waker.wake();
        }
        self.inner.woken.replace(woken);
        for tag in orphans {
            self.inner.release_keepers(tag);
        }
        n
    }

    /// Keeps `kept` until every operation in flight whose future was dropped has ended, and drops
    /// it at once if there is none. For objects that must not be released while a device may still
    /// write to them.
    pub fn keep_for_orphans(&self, kept: Box<dyn Any>) {
        let tags: Vec<u64> = {
            let engine = self.inner.engine.borrow();
            let owners = engine.owners();
            owners
                .filter_map(|(tag, owner)| matches!(owner, Owner::Orphan).then_some(tag))
                .collect()
        };
        if !tags.is_empty() {
            let keeper = Keeper { tags, kept };
            self.inner.keepers.borrow_mut().push(keeper);
        }
    }

    /// Number of operations that the device has not handed back.
    pub fn in_flight(&self) -> usize {
        self.inner.engine.borrow().in_flight()
    }

    /// Waits until nothing is in flight, including operations of dropped futures.
    pub fn drain(&self) {
        while self.in_flight() > 0 {
            self.inner.engine.borrow_mut().wait(WAIT_MAX);
            self.pump();
        }
    }

    fn idle(&self, signal: &Signal) {
        if self.in_flight() > 0 {
            self.inner.engine.borrow_mut().wait(WAIT_MAX);
        } else {
            // Only another thread can wake the future.
            signal.parked.store(true, Ordering::SeqCst);
            if !signal.woken.load(Ordering::SeqCst) {
                thread::park_timeout(WAIT_MAX);
            }
            signal.parked.store(false, Ordering::SeqCst);
        }
    }
}

impl Inner {
    /// An orphan is over.
    fn release_keepers(&self, tag: u64) {
        let mut over = Vec::new();
        self.keepers.borrow_mut().retain_mut(|keeper| {
            keeper.tags.retain(|kept| *kept != tag);
            if keeper.tags.is_empty() {
                over.push(std::mem::replace(&mut keeper.kept, Box::new(())));
            }
            !keeper.tags.is_empty()
        });
        // Dropped while nothing is borrowed, because its destructor may do anything.
        drop(over);
    }
}

impl std::fmt::Debug for AsyncChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AsyncChannel")
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

struct Depth<'a>(&'a Cell<u32>);

impl<'a> Depth<'a> {
    fn enter(depth: &'a Cell<u32>) -> Depth<'a> {
        depth.set(depth.get() + 1);
        Depth(depth)
    }
}

impl Drop for Depth<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The future of one operation; see [`AsyncChannel::io`].
#[must_use = "nothing is submitted until the future is polled"]
pub struct Io {
    inner: Rc<Inner>,
    state: IoState,
}

enum IoState {
    New(Op),
    /// In flight, or waiting for room.
    Submitted(u64),
    Over,
}

impl Future for Io {
    type Output = IoOutcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoOutcome> {
        let this = &mut *self;
        let mut engine = this.inner.engine.borrow_mut();
        match std::mem::replace(&mut this.state, IoState::Over) {
            IoState::New(op) => match engine.submit(Owner::Waits(cx.waker().clone()), op) {
                Ok(tag) => {
                    this.state = IoState::Submitted(tag);
                    Poll::Pending
                }
                Err((_, op, error)) => Poll::Ready((op, Err(error))),
            },
            IoState::Submitted(tag) => {
                if let Some(Owner::Waits(waker)) = engine.owner(tag) {
                    waker.clone_from(cx.waker());
                    this.state = IoState::Submitted(tag);
                    return Poll::Pending;
                }
                let Some(Owner::Done(op, result)) = engine.take(tag) else {
                    unreachable!("a tag was taken from under its future")
                };
                Poll::Ready((op, result))
            }
            IoState::Over => panic!("polled after completion"),
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        let IoState::Submitted(tag) = self.state else {
            return;
        };
        let mut engine = self.inner.engine.borrow_mut();
        let over = engine.take_back(tag).is_some();
        let owner = if over {
            None
        } else if matches!(engine.owner(tag), Some(Owner::Done(..))) {
            engine.take(tag)
        } else {
            // The tag is another's only after the completion.
            engine
                .owner(tag)
                .map(|owner| std::mem::replace(owner, Owner::Orphan))
        };
        drop(engine);
        drop(owner);
    }
}

#[cfg(test)]
mod tests;
