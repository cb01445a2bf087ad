//! The gate of a blob. I/O passes it without touching a shared cache line. A metadata operation
//! that moves clusters closes it and waits until nothing is inside.

use std::sync::OnceLock;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_bdev::thread_number;

use super::lanes::{LANES, Lanes};

/// Longest wait of a closing for I/O to leave, and of a thread for its turn in the order of changes.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait of I/O at a closed gate. The change behind it may wait for other I/O and for the
/// device, and has limits of its own for both.
pub(super) const ENTRY_TIMEOUT: Duration = Duration::from_mins(2);

/// The gate of a blob; see the module.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Made when first needed: they take a kilobyte, and most blobs of a large store see no I/O.
    lanes: OnceLock<Box<Lanes>>,
    waiting: Mutex<Vec<Waker>>,
}

/// I/O inside a gate. It leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    lanes: &'a Lanes,
    lane: usize,
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lanes.leave(self.lane);
    }
}

impl Gate {
    /// Enters, unless the gate is closed.
    #[inline]
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        let lane = thread_number() % LANES;
        // This is made only after the entry, since dropping it leaves.
        let lanes = self.lanes();
        lanes.enter(lane).then(|| Inside { lanes, lane })
    }

    /// Leaves a place that [`Inside::pass`] has given.
    pub fn leave(&self, lane: usize) {
        self.lanes().leave(lane);
    }

    #[inline]
    fn lanes(&self) -> &Lanes {
        self.lanes.get_or_init(Box::default)
    }

    /// Enters. Waits while the gate is closed. Returns `None` if that takes longer than `limit`, most
    /// likely because the gate was closed by a future that is not polled. The limit takes effect
    /// when this future is next polled.
    #[inline]
    pub async fn enter(&self, limit: Duration) -> Option<Inside<'_>> {
        match self.try_enter() {
            Some(inside) => Some(inside),
            None => self.enter_slow(limit).await,
        }
    }

    #[cold]
    async fn enter_slow(&self, limit: Duration) -> Option<Inside<'_>> {
        let deadline = Instant::now() + limit;
        std::future::poll_fn(|cx| {
            if let Some(inside) = self.try_enter() {
                return Poll::Ready(Some(inside));
            }
            if Instant::now() >= deadline {
                return Poll::Ready(None);
            }
            let mut waiting = self.waiting.lock();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            drop(waiting);
            // The gate may have been opened before the waker was there.
            self.try_enter()
                .map_or(Poll::Pending, |inside| Poll::Ready(Some(inside)))
        })
        .await
    }

    /// Waits until nobody is inside. `drive` takes completions of I/O that no particular thread
    /// waits for. Returns false if that takes too long, most likely because the caller's own thread
    /// has I/O in flight that it does not drive.
    pub fn wait_empty(&self, start: Instant, drive: &dyn Fn()) -> bool {
        let mut rounds = 0u32;
        while !self.lanes().is_empty() {
            drive();
            if start.elapsed() > DRAIN_TIMEOUT {
                return false;
            }
            rounds += 1;
            if rounds < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        true
    }

    /// Closes the gate, for asynchronous code: this thread's own I/O continues while it waits until
    /// nobody is inside. `drive` is as in [`Frozen::close`]. Returns `None`, with the gate open
    /// again, if that takes too long.
    pub async fn close_async(&self, drive: impl Fn()) -> Option<Closed<'_>> {
        self.shut();
        let closed = Closed { gate: self };
        let start = Instant::now();
        while !self.lanes().is_empty() {
            if start.elapsed() > DRAIN_TIMEOUT {
                return None;
            }
            drive();
            give_way().await;
        }
        Some(closed)
    }

    /// Refuses entries from now on.
    pub fn shut(&self) {
        self.lanes().shut();
    }

    /// Undoes one `shut`.
    pub fn open(&self) {
        if !self.lanes().open() {
            return;
        }
        let waiting = std::mem::take(&mut *self.waiting.lock());
        for waker in waiting {
            waker.wake();
        }
    }
}

/// Lets the executor drive this thread's other I/O, and lets other threads run.
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

/// A closed gate, which opens when this is dropped.
#[derive(Debug)]
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.open();
    }
}

impl Inside<'_> {
    /// Passes the entry to an object that lives as long as necessary, and that [leaves](Gate::leave) in place of this one.
    /// Returns the place in the gate.
    pub fn pass(self, gate: &Gate) -> usize {
        assert!(
            std::ptr::eq(self.lanes, gate.lanes()),
            "a place of this blob's gate"
        );
        let lane = self.lane;
        std::mem::forget(self);
        lane
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[test]
    fn closing_waits_and_opening_wakes() {
        let gate = std::sync::Arc::new(Gate::default());
        let inside = gate.try_enter().unwrap();
        let other = std::sync::Arc::clone(&gate);
        let closer = std::thread::spawn(move || {
            other.shut();
            assert!(other.wait_empty(Instant::now(), &|| ()));
            assert!(other.try_enter().is_none());
            other.open();
        });
        std::thread::sleep(Duration::from_millis(5));
        drop(inside);
        closer.join().unwrap();
        assert!(gate.try_enter().is_some());
    }

    #[test]
    fn whoever_waits_at_a_gate_that_stays_closed_gives_up() {
        let gate = Gate::default();
        let mut closing = Box::pin(gate.close_async(|| ()));
        let waker = Waker::noop();
        let mut cx = std::task::Context::from_waker(waker);
        let Poll::Ready(Some(closed)) = closing.as_mut().poll(&mut cx) else {
            panic!("nobody is inside");
        };
        let limit = Duration::from_millis(5);
        let mut entry = Box::pin(gate.enter(limit));
        assert!(entry.as_mut().poll(&mut cx).is_pending());
        std::thread::sleep(limit);
        assert!(matches!(entry.as_mut().poll(&mut cx), Poll::Ready(None)));
        drop(closed);
        let mut entry = Box::pin(gate.enter(limit));
        assert!(matches!(entry.as_mut().poll(&mut cx), Poll::Ready(Some(_))));
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Wakings(AtomicUsize);

    impl Wake for Wakings {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_last_of_two_openings_wakes_whoever_waits() {
        let gate = Gate::default();
        gate.shut();
        gate.shut();
        let wakings = Arc::new(Wakings::default());
        let waker = Waker::from(Arc::clone(&wakings));
        let mut cx = Context::from_waker(&waker);
        let mut entry = Box::pin(gate.enter(ENTRY_TIMEOUT));
        assert!(entry.as_mut().poll(&mut cx).is_pending());
        // An executor does not poll it again before it is woken.
        gate.open();
        gate.open();
        assert_eq!(wakings.0.load(Ordering::SeqCst), 1);
        assert!(matches!(entry.as_mut().poll(&mut cx), Poll::Ready(Some(_))));
    }

    /// I/O of which no thread takes the completion leaves when whoever closes takes it, and a future that waits for that asks to
    /// be polled again.
    #[test]
    fn whoever_closes_takes_the_completions_of_others() {
        let gate = Gate::default();
        let inside = std::cell::Cell::new(gate.try_enter());
        gate.shut();
        assert!(gate.wait_empty(Instant::now(), &|| drop(inside.take())));
        gate.open();

        let inside = std::cell::Cell::new(gate.try_enter());
        let mut closing = Box::pin(gate.close_async(|| drop(inside.take())));
        let wakings = Arc::new(Wakings::default());
        let waker = Waker::from(Arc::clone(&wakings));
        let mut cx = Context::from_waker(&waker);
        assert!(closing.as_mut().poll(&mut cx).is_pending());
        assert_eq!(wakings.0.load(Ordering::SeqCst), 1);
        assert!(matches!(
            closing.as_mut().poll(&mut cx),
            Poll::Ready(Some(_))
        ));
    }
}
