//! Tests of the order of changes. They are apart from it because a model compiles its file too.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::format::BlobId;
use super::order::{Order, Scope, Turn};

/// Longer than any test takes.
const LIMIT: Duration = Duration::from_secs(60);

fn blobs(pages: &[u32]) -> Scope {
    Scope::Blobs(pages.iter().map(|page| BlobId::from_page(*page)).collect())
}

fn enter(order: &Order, scope: Scope) -> Turn<'_> {
    let turn = order.enter(scope, LIMIT);
    turn.expect("nobody keeps the turn")
}

/// A waiting future is next, whatever a thread that enters in a loop does.
#[test]
fn the_turn_goes_to_the_one_who_has_waited_longest() {
    let order = Order::default();
    let mut cx = Context::from_waker(Waker::noop());
    let running = enter(&order, blobs(&[1]));
    let mut first = pin!(order.enter_async(blobs(&[1, 2]), LIMIT));
    let mut second = pin!(order.enter_async(blobs(&[2]), LIMIT));
    assert!(first.as_mut().poll(&mut cx).is_pending());
    // No running change names blob 2, but the first in the queue does.
    assert!(second.as_mut().poll(&mut cx).is_pending());
    drop(running);
    assert!(second.as_mut().poll(&mut cx).is_pending());
    let Poll::Ready(Some(turn)) = first.as_mut().poll(&mut cx) else {
        panic!("the first in the queue has its turn");
    };
    drop(turn);
    assert!(second.as_mut().poll(&mut cx).is_ready());
}

#[test]
fn changes_of_different_blobs_overlap_and_one_of_all_does_not() {
    let order = Order::default();
    let mut cx = Context::from_waker(Waker::noop());
    let one = enter(&order, blobs(&[1]));
    let two = enter(&order, blobs(&[2, 3]));
    let new = enter(&order, blobs(&[]));
    let mut all = pin!(order.enter_async(Scope::All, LIMIT));
    assert!(all.as_mut().poll(&mut cx).is_pending());
    // Those that come later wait for it, or it would never get its turn.
    let mut late = pin!(order.enter_async(blobs(&[4]), LIMIT));
    assert!(late.as_mut().poll(&mut cx).is_pending());
    drop(one);
    drop(two);
    assert!(all.as_mut().poll(&mut cx).is_pending());
    drop(new);
    let Poll::Ready(Some(turn)) = all.as_mut().poll(&mut cx) else {
        panic!("nothing else runs");
    };
    assert!(late.as_mut().poll(&mut cx).is_pending());
    drop(turn);
    assert!(late.as_mut().poll(&mut cx).is_ready());
}

/// A dropped future does not block the turn of others, whether it was granted before or not.
#[test]
fn a_dropped_future_gives_up_its_place() {
    for granted in [false, true] {
        let order = Order::default();
        let mut cx = Context::from_waker(Waker::noop());
        let held = enter(&order, Scope::All);
        let mut gone = Box::pin(order.enter_async(Scope::All, LIMIT));
        let mut next = pin!(order.enter_async(blobs(&[7]), LIMIT));
        assert!(gone.as_mut().poll(&mut cx).is_pending());
        assert!(next.as_mut().poll(&mut cx).is_pending());
        if granted {
            drop(held);
            drop(gone);
        } else {
            drop(gone);
            drop(held);
        }
        assert!(next.as_mut().poll(&mut cx).is_ready());
        drop(enter(&order, Scope::All));
    }
}

/// A future that has its turn and is not polled holds others up, but not for ever: a thread gives
/// up, and its place with that.
#[test]
fn a_thread_gives_up_its_place_when_the_turn_does_not_come() {
    let order = Order::default();
    let mut cx = Context::from_waker(Waker::noop());
    let held = enter(&order, Scope::All);
    let mut granted = pin!(order.enter_async(blobs(&[1]), LIMIT));
    assert!(granted.as_mut().poll(&mut cx).is_pending());
    drop(held);
    for scope in [Scope::All, blobs(&[1])] {
        assert!(order.enter(scope, Duration::from_millis(5)).is_none());
    }
    drop(enter(&order, blobs(&[2])));
    let Poll::Ready(Some(turn)) = granted.as_mut().poll(&mut cx) else {
        panic!("its turn had come");
    };
    drop(turn);
    drop(enter(&order, Scope::All));
}

/// A future gives up as well, when it is polled after its limit.
#[test]
fn a_future_gives_up_its_place_when_the_turn_does_not_come() {
    let order = Order::default();
    let mut cx = Context::from_waker(Waker::noop());
    let held = enter(&order, blobs(&[1]));
    let mut late = pin!(order.enter_async(Scope::All, Duration::from_millis(5)));
    assert!(late.as_mut().poll(&mut cx).is_pending());
    let mut behind = pin!(order.enter_async(blobs(&[2]), LIMIT));
    assert!(behind.as_mut().poll(&mut cx).is_pending());
    std::thread::sleep(Duration::from_millis(6));
    assert!(matches!(late.as_mut().poll(&mut cx), Poll::Ready(None)));
    assert!(matches!(
        behind.as_mut().poll(&mut cx),
        Poll::Ready(Some(_))
    ));
    drop(held);
    drop(enter(&order, Scope::All));
}

#[test]
fn many_threads_count() {
    let order = Order::default();
    let counters = [const { AtomicU32::new(0) }; 3];
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (order, counters) = (&order, &counters);
            scope.spawn(move || {
                for round in 0..300 {
                    let wanted: Vec<u32> = match (round + thread) % 4 {
                        3 => vec![0, 1, 2],
                        one => vec![one],
                    };
                    let _turn = enter(order, blobs(&wanted));
                    for number in wanted {
                        // The value is read and written separately: two threads at once would lose
                        // an increment.
                        let seen = counters[number as usize].load(Ordering::Relaxed);
                        std::thread::yield_now();
                        counters[number as usize].store(seen + 1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let total: u32 = counters.iter().map(|c| c.load(Ordering::Relaxed)).sum();
    assert_eq!(total, 6 * (75 * 3 + 225));
}
