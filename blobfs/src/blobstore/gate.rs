//! The gate of a blob: I/O passes it without touching a shared cache line, a metadata operation that moves
//! clusters closes it and waits until what is inside has come out.

use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_bdev::thread_number;

use super::blob::Shared;
use super::format::BlobId;
use super::lanes::{LANES, Lanes};

/// How long a closing waits for I/O to come out.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    lanes: Lanes,
    waiting: Mutex<Vec<Waker>>,
}

/// Somebody inside; leaves when dropped.
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
        // Made only after the entry: dropping it leaves.
        self.lanes.enter(lane).then(|| Inside {
            lanes: &self.lanes,
            lane,
        })
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

    /// Waits until nobody is inside. `drive` reaps I/O that no particular thread waits for. False if that takes
    /// too long: most likely the caller's own thread has I/O in flight that it does not drive.
    fn wait_empty(&self, start: Instant, drive: &dyn Fn()) -> bool {
        let mut rounds = 0u32;
        while !self.lanes.is_empty() {
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

    /// Closes the gate, for asynchronous code: this thread's own I/O goes on while it waits until nobody is
    /// inside; `drive` as in [`Frozen::close`]. `None` (and open again) if that takes too long.
    pub async fn close_async(&self, drive: impl Fn()) -> Option<Closed<'_>> {
        self.shut();
        let closed = Closed { gate: self };
        let start = Instant::now();
        while !self.lanes.is_empty() {
            if start.elapsed() > DRAIN_TIMEOUT {
                return None;
            }
            drive();
            give_way().await;
        }
        Some(closed)
    }

    /// Lets nobody in any more.
    fn shut(&self) {
        self.lanes.shut();
    }

    /// Takes one `shut` back.
    fn open(&self) {
        if !self.lanes.open() {
            return;
        }
        let waiting = std::mem::take(&mut *self.waiting.lock());
        for waker in waiting {
            waker.wake();
        }
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
        self.gate.open();
    }
}

/// Blobs whose gates are closed; they open when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Frozen(Vec<Arc<Shared>>);

impl Frozen {
    /// Are the gates of all these closed?
    pub fn covers(&self, blobs: &[Arc<Shared>]) -> bool {
        blobs.iter().all(|blob| self.has(blob))
    }

    fn has(&self, blob: &Arc<Shared>) -> bool {
        self.0.iter().any(|closed| Arc::ptr_eq(closed, blob))
    }

    /// Closes those gates that are open, and waits until no I/O is in flight behind them. Meanwhile `drive`
    /// reaps I/O that no particular thread waits for. Not with the metadata locked: others need that meanwhile.
    ///
    /// # Errors
    /// The blob whose I/O does not come to an end.
    pub fn close(&mut self, blobs: Vec<Arc<Shared>>, drive: &dyn Fn()) -> Result<(), BlobId> {
        let first = self.0.len();
        for blob in blobs {
            if !self.has(&blob) {
                blob.gate.shut();
                self.0.push(blob);
            }
        }
        let start = Instant::now();
        let stuck = self.0[first..]
            .iter()
            .find(|blob| !blob.gate.wait_empty(start, drive));
        stuck.map_or(Ok(()), |blob| Err(blob.id))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for blob in &self.0 {
            blob.gate.open();
        }
    }
}

/// The place inside a gate of I/O that outlives the call that began it; it leaves when it is dropped, which is
/// when the device has answered.
#[derive(Debug)]
pub(crate) struct Owed {
    /// The blob counts as open.
    blob: Option<Arc<Shared>>,
    gate: Arc<Gate>,
    lane: usize,
}

impl Drop for Owed {
    fn drop(&mut self) {
        // In this order: whoever finds the gate empty may delete the blob.
        self.blob = None;
        self.gate.lanes.leave(self.lane);
    }
}

impl Inside<'_> {
    /// Hands the place over to something that lives as long as it has to. `blob` is the one whose gate it is.
    pub fn owe(self, blob: &Arc<Shared>) -> Owed {
        assert!(
            std::ptr::eq(self.lanes, &raw const blob.gate.lanes),
            "a place of this blob's gate"
        );
        let lane = self.lane;
        std::mem::forget(self);
        Owed {
            blob: Some(Arc::clone(blob)),
            gate: Arc::clone(&blob.gate),
            lane,
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
}
