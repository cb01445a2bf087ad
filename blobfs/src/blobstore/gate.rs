//! The gate of a blob: I/O passes it without touching a shared cache line, a metadata operation that moves
//! clusters closes it and waits until what is inside has come out.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Counters of a gate; threads are spread over them.
const LANES: usize = 8;
/// How long a closing waits for I/O to come out.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

thread_local! {
    static LANE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The lane of this thread.
#[inline]
fn lane() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    LANE.with(|lane| {
        if lane.get() == usize::MAX {
            lane.set(NEXT.fetch_add(1, Ordering::Relaxed) % LANES);
        }
        lane.get()
    })
}

#[repr(align(128))]
#[derive(Debug, Default)]
struct Lane(AtomicUsize);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// By how many it is closed.
    closed: AtomicUsize,
    lanes: [Lane; LANES],
    waiting: Mutex<Vec<Waker>>,
}

/// Somebody inside; leaves when dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    lane: &'a AtomicUsize,
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lane.fetch_sub(1, Ordering::Release);
    }
}

impl Gate {
    /// Enters, unless the gate is closed.
    #[inline]
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        let lane = &self.lanes[lane()].0;
        // SeqCst on both sides: either the closer sees the count, or the one who enters sees `closed`.
        lane.fetch_add(1, Ordering::SeqCst);
        let inside = Inside { lane };
        if self.closed.load(Ordering::SeqCst) != 0 {
            return None;
        }
        Some(inside)
    }

    /// Enters; waits while the gate is closed.
    #[inline]
    pub async fn enter(&self) -> Inside<'_> {
        match self.try_enter() {
            Some(inside) => inside,
            None => self.enter_slow().await,
        }
    }

    #[cold]
    async fn enter_slow(&self) -> Inside<'_> {
        std::future::poll_fn(|cx| {
            if let Some(inside) = self.try_enter() {
                return Poll::Ready(inside);
            }
            self.waiting.lock().push(cx.waker().clone());
            // It may have been opened before the waker was there.
            self.try_enter().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Closes the gate and waits until nobody is inside. `None` (and open again) if that takes too long:
    /// most likely the caller's own thread has I/O in flight that it does not drive.
    pub fn close(&self) -> Option<Closed<'_>> {
        let closed = self.shut();
        let start = Instant::now();
        let mut rounds = 0u32;
        while !self.is_empty() {
            if start.elapsed() > DRAIN_TIMEOUT {
                return None;
            }
            rounds += 1;
            if rounds < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Some(closed)
    }

    /// As [`Gate::close`], for asynchronous code: this thread's own I/O goes on while it waits.
    pub async fn close_async(&self) -> Option<Closed<'_>> {
        let closed = self.shut();
        let start = Instant::now();
        while !self.is_empty() {
            if start.elapsed() > DRAIN_TIMEOUT {
                return None;
            }
            give_way().await;
        }
        Some(closed)
    }

    /// Lets nobody in any more.
    fn shut(&self) -> Closed<'_> {
        self.closed.fetch_add(1, Ordering::SeqCst);
        Closed { gate: self }
    }

    fn is_empty(&self) -> bool {
        self.lanes
            .iter()
            .all(|lane| lane.0.load(Ordering::SeqCst) == 0)
    }
}

/// Lets the executor drive what else this thread has in flight, and other threads run.
pub(crate) async fn give_way() {
    let mut given = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        std::thread::yield_now();
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A closed gate; opens when dropped.
#[derive(Debug)]
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if self.gate.closed.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        for waker in self.gate.waiting.lock().drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_waits_and_opening_wakes() {
        let gate = std::sync::Arc::new(Gate::default());
        let inside = gate.try_enter().unwrap();
        let other = std::sync::Arc::clone(&gate);
        let closer = std::thread::spawn(move || {
            let closed = other.close().unwrap();
            assert!(other.try_enter().is_none());
            drop(closed);
        });
        std::thread::sleep(Duration::from_millis(5));
        drop(inside);
        closer.join().unwrap();
        assert!(gate.try_enter().is_some());
    }
}
