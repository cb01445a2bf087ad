//! The order of changes. Of two changes that name the same blob, the later one begins when the
//! earlier one has ended on the device and in memory. Changes of different blobs overlap.
//!
//! A thread enters the order before it reads what it is going to change, and leaves it when the
//! change is published or taken back. The state's own lock is only held briefly, never while a
//! device works. A waiting thread or future is let in before any that came later and names the same
//! blob. Otherwise asynchronous code, which can only try, would have little chance beside a thread
//! in a loop.
//! `tests/order_model.rs` compiles this file a second time and tries the orders in which threads can take its steps.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::format::BlobId;
use super::sync::{AtomicBool, Mutex, Ordering, Thread, current, park_timeout};

/// The blobs that a change may touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Everything: no other change runs.
    All,
    /// These blobs, and blobs that the change creates.
    Blobs(Vec<BlobId>),
}

impl Scope {
    /// Whether one must wait for the other.
    fn meets(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::Blobs(a), Scope::Blobs(b)) => a.iter().any(|id| b.contains(id)),
            _ => true,
        }
    }

    /// Whether it allows everything that the other one allows.
    pub fn covers(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::All, _) => true,
            (Scope::Blobs(_), Scope::All) => false,
            (Scope::Blobs(a), Scope::Blobs(b)) => b.iter().all(|id| a.contains(id)),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Order(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    running: Vec<Entry>,
    waiting: VecDeque<(Entry, Arc<Waiter>)>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    scope: Scope,
}

#[derive(Debug)]
struct Waiter {
    granted: AtomicBool,
    waker: Mutex<Waker>,
}

/// A place in the order whose turn has come. Dropping it lets in those that waited for it.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    order: &'a Order,
    number: u64,
    scope: Scope,
}

impl Turn<'_> {
    /// Returns what may be changed.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.order.leave(self.number);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Queue {
    /// Whether neither a running change nor one of the first `before` waiting ones names the same
    /// blob.
    fn is_free(&self, scope: &Scope, before: usize) -> bool {
        let waiting = self.waiting.iter().take(before).map(|(entry, _)| entry);
        !self
            .running
            .iter()
            .chain(waiting)
            .any(|entry| entry.scope.meets(scope))
    }

    /// Lets in those whose turn has come.
    fn let_in(&mut self) -> Vec<Arc<Waiter>> {
        let mut let_in = Vec::new();
        let mut at = 0;
        while at < self.waiting.len() {
            if !self.is_free(&self.waiting[at].0.scope, at) {
                at += 1;
                continue;
            }
            let (entry, waiter) = self.waiting.remove(at).expect("it is within the queue");
            self.running.push(entry);
            let_in.push(waiter);
        }
        let_in
    }
}

fn wake(waiters: Vec<Arc<Waiter>>) {
    for waiter in waiters {
        waiter.granted.store(true, Ordering::Release);
        let waker = waiter.waker.lock().clone();
        waker.wake();
    }
}

impl Order {
    /// Waits until it is this scope's turn. The thread sleeps. It must not hold the state's lock or
    /// another turn. Returns `None` if that takes longer than `limit`, most likely because a turn
    /// belongs to a future that is not polled, perhaps one of this thread.
    pub fn enter(&self, scope: Scope, limit: Duration) -> Option<Turn<'_>> {
        let deadline = Instant::now() + limit;
        let waker = || Waker::from(Arc::new(Unpark(current())));
        let (number, waiter) = self.join(&scope, waker);
        while waiter
            .as_ref()
            .is_some_and(|waiter| !waiter.granted.load(Ordering::Acquire))
        {
            let now = Instant::now();
            if now >= deadline {
                // It may have been granted by now, and is given up all the same.
                self.leave(number);
                return None;
            }
            park_timeout(deadline - now);
        }
        Some(Turn {
            order: self,
            number,
            scope,
        })
    }

    /// Enters as [`Order::enter`] does, for asynchronous code: this thread's own I/O goes on while
    /// it waits. A future that is dropped gives up its place. The limit takes effect when the future
    /// is next polled, and nothing wakes it for that.
    pub async fn enter_async(&self, scope: Scope, limit: Duration) -> Option<Turn<'_>> {
        let mut waiting: Option<Waiting<'_>> = None;
        let number = poll_fn(|cx| {
            if let Some(place) = &mut waiting {
                return place.poll(cx.waker());
            }
            match self.join(&scope, || cx.waker().clone()) {
                (number, None) => Poll::Ready(Some(number)),
                (number, Some(waiter)) => {
                    waiting = Some(Waiting {
                        order: self,
                        number,
                        waiter: Some(waiter),
                        deadline: Instant::now() + limit,
                    });
                    Poll::Pending
                }
            }
        })
        .await?;
        Some(Turn {
            order: self,
            number,
            scope,
        })
    }

    /// Takes a place. Returns a waiter if its turn has not come yet.
    fn join(&self, scope: &Scope, waker: impl FnOnce() -> Waker) -> (u64, Option<Arc<Waiter>>) {
        let mut queue = self.0.lock();
        let number = queue.next;
        queue.next += 1;
        let entry = Entry {
            number,
            scope: scope.clone(),
        };
        if queue.is_free(scope, usize::MAX) {
            queue.running.push(entry);
            return (number, None);
        }
        let waiter = Arc::new(Waiter {
            granted: AtomicBool::new(false),
            waker: Mutex::new(waker()),
        });
        queue.waiting.push_back((entry, Arc::clone(&waiter)));
        (number, Some(waiter))
    }

    /// Gives up a place, whether its turn has come or not.
    fn leave(&self, number: u64) {
        let mut queue = self.0.lock();
        queue.running.retain(|entry| entry.number != number);
        queue.waiting.retain(|(entry, _)| entry.number != number);
        let next = queue.let_in();
        drop(queue);
        wake(next);
    }
}

/// A future's place in the queue.
struct Waiting<'a> {
    order: &'a Order,
    number: u64,
    waiter: Option<Arc<Waiter>>,
    deadline: Instant,
}

impl Waiting<'_> {
    /// Returns the number of the place when its turn has come, or `None` when it is given up.
    fn poll(&mut self, waker: &Waker) -> Poll<Option<u64>> {
        let waiter = self.waiter.as_ref().expect("polled after completion");
        waiter.waker.lock().clone_from(waker);
        // This is read after the waker was stored: a thread that grants the turn later wakes that one.
        if waiter.granted.load(Ordering::Acquire) {
            self.waiter = None;
            Poll::Ready(Some(self.number))
        } else if Instant::now() >= self.deadline {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.waiter.is_some() {
            self.order.leave(self.number);
        }
    }
}
