//! Tests of the metadata's lock, apart from it: its file is compiled into a model, too.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::lock::FairLock;

/// A future that waits has its turn next, whatever a thread that locks in a loop does.
#[test]
fn the_lock_goes_to_the_one_who_has_waited_longest() {
    let lock = FairLock::new(0);
    let mut cx = Context::from_waker(Waker::noop());
    let held = lock.lock();
    let mut first = pin!(lock.lock_async());
    let mut second = pin!(lock.lock_async());
    assert!(first.as_mut().poll(&mut cx).is_pending());
    assert!(second.as_mut().poll(&mut cx).is_pending());
    drop(held);
    assert!(second.as_mut().poll(&mut cx).is_pending());
    let Poll::Ready(mut guard) = first.as_mut().poll(&mut cx) else {
        panic!("the first in the queue has its turn");
    };
    *guard += 1;
    drop(guard);
    let Poll::Ready(guard) = second.as_mut().poll(&mut cx) else {
        panic!("then the second");
    };
    assert_eq!(*guard, 1);
}

/// A dropped future takes nobody's turn with it, before and after it was granted.
#[test]
fn a_dropped_future_gives_up_its_place() {
    for granted in [false, true] {
        let lock = FairLock::new(());
        let mut cx = Context::from_waker(Waker::noop());
        let held = lock.lock();
        let mut gone = Box::pin(lock.lock_async());
        let mut next = pin!(lock.lock_async());
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
        drop(lock.lock());
    }
}

#[test]
fn many_threads_count() {
    let lock = FairLock::new(0u32);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    *lock.lock() += 1;
                }
            });
        }
    });
    assert_eq!(*lock.lock(), 2000);
}
