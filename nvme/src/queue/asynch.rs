//! Futures over a queue pair, for one thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pumice_io::{Completion as IoCompletion, IoError, Op, SubmitError};

use super::pair::QueuePair;
use crate::dma::{DmaBuf, DmaSlice};
use crate::namespace::Namespace;

/// A queue pair of a namespace for the `async` code of one thread. Clones share the queue pair.
///
/// A dropped future does not cancel its I/O: the buffers stay with the queue pair until the
/// device is done with them.
#[derive(Clone, Debug)]
pub struct AsyncQueue {
    inner: Rc<RefCell<Inner>>,
    ns: Arc<Namespace>,
}

#[derive(Debug)]
struct Inner {
    pair: QueuePair,
    cells: Vec<Cell>,
    free: Vec<usize>,
    full: VecDeque<Waker>,
    done: Vec<IoCompletion>,
}

#[derive(Debug)]
enum Cell {
    Free,
    Pending(Option<Waker>),
    Abandoned,
    Done(Box<IoCompletion>),
}

impl AsyncQueue {
    /// Wraps a queue pair for I/O on one namespace.
    pub fn new(pair: QueuePair, ns: Arc<Namespace>) -> AsyncQueue {
        AsyncQueue {
            inner: Rc::new(RefCell::new(Inner {
                pair,
                cells: Vec::new(),
                free: Vec::new(),
                full: VecDeque::new(),
                done: Vec::new(),
            })),
            ns,
        }
    }

    /// The namespace.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.ns
    }

    /// Does one I/O, which comes back with its buffers. A refused I/O comes back with the refusal
    /// as its error.
    pub fn io(&self, io: Op) -> impl Future<Output = (Op, Result<(), AsyncError>)> + use<> {
        IoFuture {
            queue: self.clone(),
            state: State::New(Some(io)),
        }
    }

    /// Reads `buf.len()` bytes.
    pub async fn read(&self, lba: u64, buf: DmaBuf) -> Result<DmaBuf, AsyncError> {
        match self.io(Op::Read { lba, buf }).await {
            (Op::Read { buf, .. }, Ok(())) => Ok(buf),
            (_, Err(e)) => Err(e),
            (_, Ok(())) => unreachable!("an I/O comes back as what it was"),
        }
    }

    /// Writes `data` to the blocks from `lba`; with `fua` it is durable on completion.
    pub async fn write(&self, lba: u64, data: DmaSlice, fua: bool) -> Result<(), AsyncError> {
        self.io(Op::Write { lba, data, fua }).await.1
    }

    /// Makes all completed writes durable.
    pub async fn flush(&self) -> Result<(), AsyncError> {
        self.io(Op::Flush).await.1
    }

    /// Takes completions and wakes their futures. Never blocks. Returns the number of I/Os that
    /// ended.
    pub fn poll(&self) -> usize {
        let mut wake = Vec::new();
        let count = {
            let mut guard = self.inner.borrow_mut();
            let inner = &mut *guard;
            let mut done = std::mem::take(&mut inner.done);
            inner.pair.poll(&mut done);
            let count = done.len();
            for item in done.drain(..) {
                let at = usize::try_from(item.tag).unwrap_or(usize::MAX);
                let Some(cell) = inner.cells.get_mut(at) else {
                    continue;
                };
                match std::mem::replace(cell, Cell::Free) {
                    Cell::Pending(waker) => {
                        *cell = Cell::Done(Box::new(item));
                        wake.extend(waker);
                    }
                    _ => inner.free.push(at),
                }
            }
            inner.done = done;
            // A completion has made room, or a reset that handed nothing back has ended.
            if count > 0 || (!inner.full.is_empty() && inner.pair.takes_more()) {
                wake.extend(inner.full.drain(..));
            }
            count
        };
        for waker in wake {
            waker.wake();
        }
        count
    }

    /// Runs a future to its end on this thread. Polls the queue pair, and sleeps when nothing
    /// completes.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
                return value;
            }
            if self.poll() == 0 {
                let waited = self
                    .inner
                    .borrow_mut()
                    .pair
                    .wait(Duration::from_millis(100));
                if waited.is_err() {
                    // The controller is gone: new I/O is refused, so the future ends.
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Returns the queue pair, if this is the last handle and no future is alive.
    pub fn into_inner(self) -> Result<QueuePair, AsyncQueue> {
        let AsyncQueue { inner, ns } = self;
        match Rc::try_unwrap(inner) {
            Ok(cell) => Ok(cell.into_inner().pair),
            Err(inner) => Err(AsyncQueue { inner, ns }),
        }
    }
}

/// The reason why an asynchronous I/O failed.
#[derive(Debug, thiserror::Error)]
pub enum AsyncError {
    /// The device or the driver ended the I/O with an error.
    #[error(transparent)]
    Io(#[from] Box<IoError>),
    /// The queue pair did not accept the I/O; the reason as text.
    #[error("{0}")]
    Refused(String),
}

enum State {
    New(Option<Op>),
    Sent(usize),
    Over,
}

struct IoFuture {
    queue: AsyncQueue,
    state: State,
}

impl Future for IoFuture {
    type Output = (Op, Result<(), AsyncError>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut guard = this.queue.inner.borrow_mut();
        let inner = &mut *guard;
        match &mut this.state {
            State::New(io) => {
                let Some(given) = io.take() else {
                    return Poll::Pending;
                };
                let at = inner.free.pop().unwrap_or_else(|| {
                    inner.cells.push(Cell::Free);
                    inner.cells.len() - 1
                });
                match inner.pair.submit(&this.queue.ns, at as u64, given) {
                    Ok(()) => {
                        inner.cells[at] = Cell::Pending(Some(cx.waker().clone()));
                        this.state = State::Sent(at);
                        Poll::Pending
                    }
                    Err(SubmitError::Busy(given)) => {
                        inner.free.push(at);
                        *io = Some(given);
                        inner.full.push_back(cx.waker().clone());
                        Poll::Pending
                    }
                    Err(refused) => {
                        inner.free.push(at);
                        let text = refused.to_string();
                        this.state = State::Over;
                        Poll::Ready((refused.into_op(), Err(AsyncError::Refused(text))))
                    }
                }
            }
            State::Sent(at) => {
                let at = *at;
                match std::mem::replace(&mut inner.cells[at], Cell::Free) {
                    Cell::Done(done) => {
                        inner.free.push(at);
                        this.state = State::Over;
                        Poll::Ready((done.op, done.result.map_err(AsyncError::Io)))
                    }
                    _ => {
                        inner.cells[at] = Cell::Pending(Some(cx.waker().clone()));
                        Poll::Pending
                    }
                }
            }
            State::Over => Poll::Pending,
        }
    }
}

impl Drop for IoFuture {
    fn drop(&mut self) {
        if let State::Sent(at) = self.state
            && let Ok(mut inner) = self.queue.inner.try_borrow_mut()
        {
            match inner.cells[at] {
                Cell::Done(_) => {
                    inner.cells[at] = Cell::Free;
                    inner.free.push(at);
                }
                _ => inner.cells[at] = Cell::Abandoned,
            }
        }
    }
}
