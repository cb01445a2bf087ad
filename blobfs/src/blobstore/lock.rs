//! The lock of the metadata: whoever waits for it gets it in turn.
//!
//! A plain mutex lets a thread that locks in a loop have it again and again, and asynchronous code that only
//! tries has next to no chance beside it. Here the one who unlocks hands the lock to the one who has waited
//! longest, whether that is a sleeping thread or a future. `tests/lock_model.rs` compiles this file a second time
//! and tries the orders in which threads can take its steps.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};

use super::sync::{AtomicBool, Mutex, MutexGuard, Ordering, Thread, current, park};

/// A value behind a lock that is handed over in the order of arrival.
#[derive(Debug)]
pub(crate) struct FairLock<T> {
    turn: Turn,
    value: Mutex<T>,
}

/// The lock, held. Dropping it hands it to the next.
#[derive(Debug)]
pub(crate) struct Guard<'a, T> {
    // Dropped in this order: the value is free before the next one's turn begins.
    value: MutexGuard<'a, T>,
    _place: Place<'a>,
}

#[derive(Debug, Default)]
struct Turn(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    taken: bool,
    waiting: VecDeque<Arc<Waiter>>,
}

#[derive(Debug)]
struct Waiter {
    granted: AtomicBool,
    waker: Mutex<Waker>,
}

/// Somebody whose turn it is; the next one's begins when it is dropped.
#[derive(Debug)]
struct Place<'a>(&'a Turn);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl<T> FairLock<T> {
    pub fn new(value: T) -> FairLock<T> {
        FairLock {
            turn: Turn::default(),
            value: Mutex::new(value),
        }
    }

    /// Locks; the thread sleeps until it is its turn.
    pub fn lock(&self) -> Guard<'_, T> {
        let place = self.turn.enter();
        self.guard(place)
    }

    /// As [`FairLock::lock`], for asynchronous code: this thread's own I/O goes on while it waits. A future
    /// that is dropped gives up its place.
    pub async fn lock_async(&self) -> Guard<'_, T> {
        let place = self.turn.enter_async().await;
        self.guard(place)
    }

    fn guard<'a>(&'a self, place: Place<'a>) -> Guard<'a, T> {
        Guard {
            value: self.value.lock(),
            _place: place,
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl Turn {
    /// Begins a turn at once if nobody has it; else queues with what `waker` gives.
    fn try_enter(&self, waker: impl FnOnce() -> Waker) -> Result<Place<'_>, Arc<Waiter>> {
        let mut queue = self.0.lock();
        if !queue.taken {
            queue.taken = true;
            return Ok(Place(self));
        }
        let waiter = Arc::new(Waiter {
            granted: AtomicBool::new(false),
            waker: Mutex::new(waker()),
        });
        queue.waiting.push_back(Arc::clone(&waiter));
        Err(waiter)
    }

    fn enter(&self) -> Place<'_> {
        let waker = || Waker::from(Arc::new(Unpark(current())));
        match self.try_enter(waker) {
            Ok(place) => place,
            Err(waiter) => {
                while !waiter.granted.load(Ordering::Acquire) {
                    park();
                }
                Place(self)
            }
        }
    }

    async fn enter_async(&self) -> Place<'_> {
        let mut waiting: Option<Waiting<'_>> = None;
        poll_fn(|cx| {
            let Some(place) = &mut waiting else {
                return match self.try_enter(|| cx.waker().clone()) {
                    Ok(place) => Poll::Ready(place),
                    Err(waiter) => {
                        waiting = Some(Waiting {
                            turn: self,
                            waiter: Some(waiter),
                        });
                        Poll::Pending
                    }
                };
            };
            place.poll(cx.waker())
        })
        .await
    }

    fn leave(&self) {
        let mut queue = self.0.lock();
        let next = queue.waiting.pop_front();
        queue.taken = next.is_some();
        let Some(next) = next else { return };
        next.granted.store(true, Ordering::Release);
        drop(queue);
        let waker = next.waker.lock().clone();
        waker.wake();
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A future's place in the queue.
struct Waiting<'a> {
    turn: &'a Turn,
    waiter: Option<Arc<Waiter>>,
}

impl<'a> Waiting<'a> {
    fn poll(&mut self, waker: &Waker) -> Poll<Place<'a>> {
        let waiter = self.waiter.as_ref().expect("polled after completion");
        waiter.waker.lock().clone_from(waker);
        // Looked at after the waker is there: whoever grants it later wakes that one.
        if waiter.granted.load(Ordering::Acquire) {
            self.waiter = None;
            Poll::Ready(Place(self.turn))
        } else {
            Poll::Pending
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter.take() else {
            return;
        };
        let mut queue = self.turn.0.lock();
        let before = queue.waiting.len();
        queue.waiting.retain(|other| !Arc::ptr_eq(other, &waiter));
        let granted = queue.waiting.len() == before;
        drop(queue);
        if granted {
            // It was this one's turn already.
            self.turn.leave();
        }
    }
}
