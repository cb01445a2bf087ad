//! Futures that run together on one thread: [`join_all`].

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The time after which a [`join_all`] polls futures that nobody has woken.
const FULL_ROUND: Duration = Duration::from_secs(1);

/// The futures of a [`join_all`] that were woken, by their numbers.
struct Joined {
    woken: Mutex<Vec<usize>>,
    /// The waker of the whole.
    whole: Mutex<Waker>,
}

/// Wakes one future of a [`join_all`].
struct Child {
    number: usize,
    is_woken: AtomicBool,
    joined: Arc<Joined>,
}

impl Wake for Child {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_woken.swap(true, Ordering::AcqRel) {
            self.joined.woken.lock().push(self.number);
        }
        let whole = self.joined.whole.lock().clone();
        whole.wake();
    }
}

/// Runs futures together on one thread. Returns their outputs in the order given. A wake polls the
/// futures that were woken; a poll without one polls all of them, as does one a second, so that a
/// future with a time limit can look at the clock beside others that are busy.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running = Vec::new();
    let joined = Arc::new(Joined {
        woken: Mutex::default(),
        whole: Mutex::new(Waker::noop().clone()),
    });
    for (number, future) in futures.into_iter().enumerate() {
        let child = Arc::new(Child {
            number,
            is_woken: AtomicBool::new(false),
            joined: Arc::clone(&joined),
        });
        running.push(Some((Box::pin(future), child)));
    }
    let mut outs: Vec<Option<F::Output>> = running.iter().map(|_| None).collect();
    let mut left = running.len();
    let mut all_at = Instant::now();
    std::future::poll_fn(move |cx| {
        joined.whole.lock().clone_from(cx.waker());
        let mut now = std::mem::take(&mut *joined.woken.lock());
        if now.is_empty() || all_at.elapsed() >= FULL_ROUND {
            now = (0..running.len()).collect();
            all_at = Instant::now();
        }
        for number in now {
            let Some((future, child)) = &mut running[number] else {
                continue;
            };
            // A wake from here on is for the next poll.
            child.is_woken.swap(false, Ordering::AcqRel);
            let waker = Waker::from(Arc::clone(child));
            if let Poll::Ready(out) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                outs[number] = Some(out);
                running[number] = None;
                left -= 1;
            }
        }
        if left > 0 {
            return Poll::Pending;
        }
        Poll::Ready(outs.drain(..).flatten().collect())
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::Pin;

    use pumice_io::{Completion, Op, SubmitError};

    use super::*;
    use crate::{AsyncChannel, BdevError, DmaBuf, IoChannel};

    /// A channel whose operations complete one by one.
    struct OneByOne {
        base: Box<dyn IoChannel>,
        ended: Vec<Completion>,
    }

    impl IoChannel for OneByOne {
        fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
            self.base.submit(tag, op)
        }

        fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
            self.base.poll(&mut self.ended);
            let one = self.ended.pop();
            let n = usize::from(one.is_some());
            out.extend(one);
            n
        }

        fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
            Ok(())
        }

        fn in_flight(&self) -> usize {
            self.base.in_flight() + self.ended.len()
        }
    }

    #[test]
    fn a_future_that_nobody_wakes_is_polled_beside_one_that_is_busy() {
        let dev = crate::open("malloc://1M?block_size=512").unwrap();
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let (given_up, begun) = (Cell::new(false), Instant::now());
        let waiting = std::future::poll_fn(|_| {
            if begun.elapsed() < Duration::from_millis(10) {
                return Poll::Pending;
            }
            given_up.set(true);
            Poll::Ready(())
        });
        let busy = std::future::poll_fn(|cx| {
            if given_up.get() {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        let both: [Pin<Box<dyn Future<Output = ()>>>; 2] = [Box::pin(waiting), Box::pin(busy)];
        ch.block_on(join_all(both));
    }

    /// Each of many futures that run together is polled when it can go on, and not with every other.
    #[test]
    fn together_each_is_polled_for_itself() {
        const MANY: u64 = 400;
        let dev = crate::open("malloc://1M?block_size=512").unwrap();
        let ch = AsyncChannel::new(Box::new(OneByOne {
            base: dev.open_channel().unwrap(),
            ended: Vec::new(),
        }));
        let (polls, begun) = (Cell::new(0), Instant::now());
        let futures = (0..MANY).map(|lba| {
            let (ch, polls) = (&ch, &polls);
            let read = |lba| {
                let buf = DmaBuf::new(512).unwrap();
                ch.io(Op::Read { lba, buf })
            };
            let mut both = Box::pin(async move {
                read(lba).await.1.unwrap();
                read(MANY - lba).await.1.unwrap();
                lba
            });
            std::future::poll_fn(move |cx| {
                polls.set(polls.get() + 1);
                both.as_mut().poll(cx)
            })
        });
        let done = ch.block_on(join_all(futures));
        assert!(done.into_iter().eq(0..MANY));
        let full_rounds = begun.elapsed().as_secs();
        assert!((3 * MANY..=(3 + full_rounds) * MANY).contains(&polls.get()));
    }

    /// Nobody polls the whole before it is woken.
    #[test]
    fn a_wake_of_one_wakes_the_whole() {
        use std::sync::atomic::AtomicUsize;

        #[derive(Default)]
        struct Count(AtomicUsize);

        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }

        let wakers = Mutex::new(Vec::new());
        let one = || {
            std::future::poll_fn(|cx| {
                wakers.lock().push(cx.waker().clone());
                Poll::<()>::Pending
            })
        };
        let mut both = Box::pin(join_all([one(), one()]));
        // The second waker takes the place of the first.
        for _ in 0..2 {
            let count = Arc::new(Count::default());
            let whole = Waker::from(Arc::clone(&count));
            assert!(
                both.as_mut()
                    .poll(&mut Context::from_waker(&whole))
                    .is_pending()
            );
            let second = wakers.lock().pop().expect("polled");
            second.wake_by_ref();
            assert_eq!(count.0.load(Ordering::Relaxed), 1);
        }
    }
}
