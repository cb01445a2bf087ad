//! Asynchronous code on one thread: [`AsyncChannel`].
//!
//! The steps of a blob operation read top to bottom as an `async fn`; the thread that calls
//! [`AsyncChannel::block_on`] polls the device itself, so there is no hand-off to another thread.

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

use crate::device::IoChannel;
use crate::error::IoError;
use crate::op::{Completion, Op, SubmitError};
use crate::{DmaBuf, DmaSlice};

/// Longest sleep while a future may also be woken from another thread.
const WAIT_MAX: Duration = Duration::from_millis(10);

/// How an operation ended: the operation, with its buffers, and its result.
pub type IoOutcome = (Op, Result<(), Box<IoError>>);

/// A channel for asynchronous code on one thread. Cheap to clone; not `Send`.
///
/// A future that is dropped before its operation has completed leaves the operation, with its
/// buffers, in the channel until the device is done with it.
#[derive(Clone)]
pub struct AsyncChannel {
    inner: Rc<Inner>,
}

struct Inner {
    channel: RefCell<Box<dyn IoChannel>>,
    slots: RefCell<Slots>,
    reaped: RefCell<Vec<Completion>>,
    /// Futures whose submission found the queue full.
    starved: RefCell<Vec<Waker>>,
    /// Dropped after the channel: what it is in flight with is theirs.
    keepers: RefCell<Vec<Keeper>>,
    signal: Arc<Signal>,
    depth: Cell<u32>,
}

/// Something that is kept until the device has answered operations whose futures were dropped.
struct Keeper {
    slots: Vec<usize>,
    kept: Box<dyn Any>,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

enum Slot {
    Free,
    InFlight(Waker),
    Done(Op, Result<(), Box<IoError>>),
    /// Its future was dropped: the completion frees it.
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
                channel: RefCell::new(channel),
                slots: RefCell::default(),
                reaped: RefCell::default(),
                starved: RefCell::default(),
                keepers: RefCell::default(),
                signal: Signal::new(),
                depth: Cell::new(0),
            }),
        }
    }

    /// Does `op`. It is submitted when the future is first polled; a full queue makes it wait.
    pub fn io(&self, op: Op) -> Io {
        Io {
            inner: Rc::clone(&self.inner),
            state: State::New(op),
        }
    }

    /// Reads into `buf`, a multiple of the block size, from block `lba`.
    ///
    /// # Errors
    /// Whatever the device says; the buffer is then freed.
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
    /// Whatever the device says.
    pub async fn write(&self, lba: u64, data: DmaSlice, fua: bool) -> Result<(), Box<IoError>> {
        self.io(Op::Write { lba, data, fua }).await.1
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// Whatever the device says.
    pub async fn flush(&self) -> Result<(), Box<IoError>> {
        self.io(Op::Flush).await.1
    }

    /// Makes `len_blocks` blocks from `lba` read as zeroes.
    ///
    /// # Errors
    /// Whatever the device says.
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
    /// Whatever the device says.
    pub async fn unmap(&self, lba: u64, len_blocks: u64) -> Result<(), Box<IoError>> {
        self.io(Op::Unmap { lba, len_blocks }).await.1
    }

    /// Runs `future` to its end on this thread: polls it, then the channel; when neither gets any
    /// further, the channel spins briefly and sleeps.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let depth = self.inner.depth.get();
        // A nested call has a signal of its own, or it would swallow the outer one's wake-ups.
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
            if !signal.woken.load(Ordering::SeqCst) {
                self.idle(&signal);
            }
            self.pump();
        }
    }

    /// Runs all operations together and returns their outcomes in the order given.
    pub async fn io_all(&self, ops: Vec<Op>) -> Vec<IoOutcome> {
        join_all(ops.into_iter().map(|op| self.io(op))).await
    }

    /// Reaps completions and wakes their futures; never blocks. Returns how many there were. For
    /// callers that drive futures themselves.
    pub fn pump(&self) -> usize {
        let mut reaped = self.inner.reaped.take();
        let n = self.inner.channel.borrow_mut().poll(&mut reaped);
        for completion in reaped.drain(..) {
            let tag = completion.tag;
            let waker = self.inner.slots.borrow_mut().complete(completion);
            match waker {
                Some(waker) => waker.wake(),
                None => self.inner.release_keepers(tag),
            }
        }
        self.inner.reaped.replace(reaped);
        if !self.inner.starved.borrow().is_empty() {
            for waker in self.inner.starved.take() {
                waker.wake();
            }
        }
        n
    }

    /// Keeps `kept` until every operation is over that is in flight now and whose future was dropped; drops it
    /// at once if there is none. For what must not be given away while a device may still write to it.
    pub fn keep_for_orphans(&self, kept: Box<dyn Any>) {
        let slots: Vec<usize> = self.inner.slots.borrow().orphans().collect();
        if !slots.is_empty() {
            let keeper = Keeper { slots, kept };
            self.inner.keepers.borrow_mut().push(keeper);
        }
    }

    /// Operations that the device has not handed back.
    pub fn in_flight(&self) -> usize {
        self.inner.channel.borrow().in_flight()
    }

    /// Waits until nothing is in flight, orphans of dropped futures included.
    pub fn drain(&self) {
        while self.in_flight() > 0 {
            self.sleep(WAIT_MAX);
            self.pump();
        }
    }

    fn idle(&self, signal: &Signal) {
        if self.in_flight() > 0 {
            self.sleep(WAIT_MAX);
        } else if !self.inner.starved.borrow().is_empty() {
            // Told to come again while nothing of its own is in flight: a reset, or others have all
            // the places. The channel may know how long; it is not asked again at once.
            self.sleep(WAIT_MAX);
            thread::sleep(Duration::from_micros(20));
        } else {
            // Only another thread can wake the future.
            signal.parked.store(true, Ordering::SeqCst);
            if !signal.woken.load(Ordering::SeqCst) {
                thread::park_timeout(WAIT_MAX);
            }
            signal.parked.store(false, Ordering::SeqCst);
        }
    }

    fn sleep(&self, timeout: Duration) {
        let result = self.inner.channel.borrow_mut().wait(timeout);
        if let Err(error) = result {
            tracing::warn!(%error, "waiting for completions failed; polling instead");
            thread::sleep(Duration::from_micros(50));
        }
    }
}

impl Inner {
    /// The orphan in a slot is over.
    fn release_keepers(&self, tag: u64) {
        let mut over = Vec::new();
        self.keepers.borrow_mut().retain_mut(|keeper| {
            keeper.slots.retain(|slot| *slot as u64 != tag);
            if keeper.slots.is_empty() {
                over.push(std::mem::replace(&mut keeper.kept, Box::new(())));
            }
            !keeper.slots.is_empty()
        });
        // Dropped with nothing borrowed: it may do anything.
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

impl Slots {
    fn take(&mut self, waker: &Waker) -> usize {
        let slot = Slot::InFlight(waker.clone());
        if let Some(i) = self.free.pop() {
            self.slots[i] = slot;
            i
        } else {
            self.slots.push(slot);
            self.slots.len() - 1
        }
    }

    /// The slots of operations whose futures were dropped.
    fn orphans(&self) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(i, slot)| matches!(slot, Slot::Orphan).then_some(i))
    }

    fn release(&mut self, i: usize) -> Slot {
        self.free.push(i);
        std::mem::replace(&mut self.slots[i], Slot::Free)
    }

    fn complete(&mut self, c: Completion) -> Option<Waker> {
        let Some(i) = usize::try_from(c.tag)
            .ok()
            .filter(|i| *i < self.slots.len())
        else {
            tracing::error!(
                tag = c.tag,
                "completion with a tag that was never submitted"
            );
            return None;
        };
        match std::mem::replace(&mut self.slots[i], Slot::Done(c.op, c.result)) {
            Slot::InFlight(waker) => Some(waker),
            Slot::Orphan => {
                self.release(i);
                None
            }
            Slot::Free => {
                tracing::error!(
                    tag = c.tag,
                    "completion of an operation that is not in flight"
                );
                self.slots[i] = Slot::Free;
                None
            }
            done @ Slot::Done(..) => {
                tracing::error!(tag = c.tag, "an operation completed twice");
                self.slots[i] = done;
                None
            }
        }
    }
}

/// The future of one operation; see [`AsyncChannel::io`].
#[must_use = "nothing is submitted until the future is polled"]
pub struct Io {
    inner: Rc<Inner>,
    state: State,
}

enum State {
    New(Op),
    InFlight(usize),
    Over,
}

impl Future for Io {
    type Output = IoOutcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoOutcome> {
        let this = &mut *self;
        match std::mem::replace(&mut this.state, State::Over) {
            State::New(op) => {
                let slot = this.inner.slots.borrow_mut().take(cx.waker());
                let submitted = this.inner.channel.borrow_mut().submit(slot as u64, op);
                match submitted {
                    Ok(()) => {
                        this.state = State::InFlight(slot);
                        Poll::Pending
                    }
                    Err(SubmitError::Busy(op)) => {
                        this.inner.slots.borrow_mut().release(slot);
                        this.inner.starved.borrow_mut().push(cx.waker().clone());
                        this.state = State::New(op);
                        Poll::Pending
                    }
                    Err(SubmitError::Refused(op, e)) => {
                        this.inner.slots.borrow_mut().release(slot);
                        Poll::Ready((op, Err(e)))
                    }
                }
            }
            State::InFlight(slot) => {
                let mut slots = this.inner.slots.borrow_mut();
                match &mut slots.slots[slot] {
                    Slot::InFlight(waker) => {
                        waker.clone_from(cx.waker());
                        drop(slots);
                        this.state = State::InFlight(slot);
                        Poll::Pending
                    }
                    Slot::Done(..) => {
                        let Slot::Done(op, result) = slots.release(slot) else {
                            unreachable!()
                        };
                        Poll::Ready((op, result))
                    }
                    Slot::Free | Slot::Orphan => unreachable!("slot taken from under its future"),
                }
            }
            State::Over => panic!("polled after completion"),
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if let State::InFlight(slot) = self.state {
            let mut slots = self.inner.slots.borrow_mut();
            let old = match slots.slots[slot] {
                Slot::Done(..) => slots.release(slot),
                _ => std::mem::replace(&mut slots.slots[slot], Slot::Orphan),
            };
            drop(slots);
            drop(old);
        }
    }
}

/// Runs futures together on one thread; their outputs in the order given.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    enum Join<F: Future> {
        Running(Pin<Box<F>>),
        Done(Option<F::Output>),
    }
    let mut joins: Vec<Join<F>> = futures
        .into_iter()
        .map(|f| Join::Running(Box::pin(f)))
        .collect();
    std::future::poll_fn(move |cx| {
        let mut pending = false;
        for join in &mut joins {
            if let Join::Running(future) = join {
                match future.as_mut().poll(cx) {
                    Poll::Ready(out) => *join = Join::Done(Some(out)),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            return Poll::Pending;
        }
        let outs = joins.iter_mut().filter_map(|join| match join {
            Join::Done(out) => out.take(),
            Join::Running(_) => None,
        });
        Poll::Ready(outs.collect())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::IoErrorKind;

    fn channel() -> AsyncChannel {
        let dev = crate::open("malloc://1M?block_size=512").unwrap();
        AsyncChannel::new(dev.open_channel().unwrap())
    }

    #[test]
    fn a_write_is_read_back() {
        let ch = channel();
        let mut buf = DmaBuf::zeroed(1024).unwrap();
        buf.fill(7);
        ch.block_on(async {
            ch.write(3, buf.freeze(), true).await.unwrap();
            ch.flush().await.unwrap();
            let buf = ch.read(2, DmaBuf::new(2048).unwrap()).await.unwrap();
            assert!(buf[..512].iter().all(|b| *b == 0));
            assert!(buf[512..1536].iter().all(|b| *b == 7));
            assert!(buf[1536..].iter().all(|b| *b == 0));
        });
    }

    #[test]
    fn many_at_once_come_back_in_order() {
        let ch = channel();
        let ops = (0..300)
            .map(|i| Op::Read {
                lba: i,
                buf: DmaBuf::new(512).unwrap(),
            })
            .collect();
        let done = ch.block_on(ch.io_all(ops));
        assert_eq!(done.len(), 300);
        for (i, (op, result)) in done.iter().enumerate() {
            assert_eq!(op.lba(), i as u64);
            assert!(result.is_ok());
        }
        assert_eq!(ch.in_flight(), 0);
    }

    #[test]
    fn nested_block_on_and_refusals() {
        let ch = channel();
        let kind = ch.block_on(async {
            let inner = ch.block_on(ch.read(0, DmaBuf::new(512).unwrap()));
            assert!(inner.is_ok());
            ch.read(1 << 40, DmaBuf::new(512).unwrap())
                .await
                .unwrap_err()
                .kind
        });
        assert_eq!(kind, IoErrorKind::OutOfRange);
    }

    #[test]
    fn a_dropped_future_leaves_the_operation_to_the_channel() {
        let ch = channel();
        let mut io = Box::pin(ch.io(Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).unwrap(),
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(io.as_mut().poll(&mut cx).is_pending());
        drop(io);
        assert_eq!(ch.in_flight(), 1);
        ch.drain();
        assert_eq!(ch.in_flight(), 0);
        assert_eq!(
            ch.inner.slots.borrow().free.len(),
            ch.inner.slots.borrow().slots.len()
        );
    }

    /// The slot of a future that was dropped is not another's before its operation has ended.
    #[test]
    fn a_dropped_future_gives_nobody_its_bytes() {
        let ch = channel();
        for lba in 0..64 {
            let mut buf = DmaBuf::zeroed(512).unwrap();
            buf.fill(u8::try_from(lba).unwrap());
            ch.block_on(ch.write(lba, buf.freeze(), false)).unwrap();
        }
        let mut cx = Context::from_waker(Waker::noop());
        for lba in 0..63 {
            let read = |lba| {
                Box::pin(ch.io(Op::Read {
                    lba,
                    buf: DmaBuf::new(512).unwrap(),
                }))
            };
            let mut dropped = read(lba);
            assert!(dropped.as_mut().poll(&mut cx).is_pending());
            drop(dropped);
            // The second of a pair is started behind it, and both end in one poll of the device.
            let (op, result) = ch.block_on(read(lba + 1));
            result.unwrap();
            let Op::Read { lba: at, buf } = op else {
                panic!("{op:?}")
            };
            assert_eq!(at, lba + 1);
            assert!(buf.iter().all(|b| u64::from(*b) == lba + 1), "{lba}");
        }
        assert_eq!(ch.in_flight(), 0);
        let slots = ch.inner.slots.borrow();
        assert_eq!(slots.free.len(), slots.slots.len());
    }

    #[test]
    fn what_is_kept_for_orphans_goes_when_they_have_ended() {
        let ch = channel();
        let kept = Rc::new(());
        ch.keep_for_orphans(Box::new(Rc::clone(&kept)));
        assert_eq!(Rc::strong_count(&kept), 1, "nothing is in flight");
        let mut cx = Context::from_waker(Waker::noop());
        let mut ios: Vec<_> = (0..2)
            .map(|lba| {
                let buf = DmaBuf::new(512).unwrap();
                Box::pin(ch.io(Op::Read { lba, buf }))
            })
            .collect();
        for io in &mut ios {
            assert!(io.as_mut().poll(&mut cx).is_pending());
        }
        drop(ios);
        ch.keep_for_orphans(Box::new(Rc::clone(&kept)));
        assert_eq!(Rc::strong_count(&kept), 2);
        ch.drain();
        assert_eq!(Rc::strong_count(&kept), 1);
    }

    #[test]
    fn a_wake_from_another_thread_ends_the_wait() {
        let ch = channel();
        let (tx, rx) = std::sync::mpsc::channel::<Waker>();
        let flag = Arc::new(AtomicBool::new(false));
        let set = Arc::clone(&flag);
        let waker_thread = thread::spawn(move || {
            let waker = rx.recv().unwrap();
            set.store(true, Ordering::SeqCst);
            waker.wake();
        });
        ch.block_on(std::future::poll_fn(|cx| {
            if flag.load(Ordering::SeqCst) {
                return Poll::Ready(());
            }
            let _ = tx.send(cx.waker().clone());
            Poll::Pending
        }));
        waker_thread.join().unwrap();
    }
}
