use super::*;
use pumice_io::IoErrorKind;

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
    assert_eq!(ch.inner.engine.borrow().owners().count(), 0);
}

/// An operation that ends before its future is dropped leaves its place to others, too.
#[test]
fn a_future_that_is_dropped_with_its_result_frees_its_place() {
    let ch = channel();
    let mut cx = Context::from_waker(Waker::noop());
    let mut io = Box::pin(ch.io(Op::Flush));
    assert!(io.as_mut().poll(&mut cx).is_pending());
    assert_eq!(ch.pump(), 1);
    drop(io);
    assert_eq!(ch.inner.engine.borrow().owners().count(), 0);
}

/// The slot of a dropped future is not used again before its operation has ended.
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
        // The second of a pair is started behind the first, and both end in one poll of the
        // device.
        let (op, result) = ch.block_on(read(lba + 1));
        result.unwrap();
        let Op::Read { lba: at, buf } = op else {
            panic!("{op:?}")
        };
        assert_eq!(at, lba + 1);
        assert!(buf.iter().all(|b| u64::from(*b) == lba + 1), "{lba}");
    }
    assert_eq!(ch.in_flight(), 0);
    assert_eq!(ch.inner.engine.borrow().owners().count(), 0);
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

/// An object whose destructor leaves an orphan of its own.
struct LeavesOrphan(AsyncChannel);

impl Drop for LeavesOrphan {
    fn drop(&mut self) {
        let mut io = Box::pin(self.0.io(Op::Flush));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(io.as_mut().poll(&mut cx).is_pending());
        drop(io);
        self.0.keep_for_orphans(Box::new(()));
    }
}

#[test]
fn what_was_kept_may_use_the_channel_when_it_goes() {
    let ch = channel();
    let mut cx = Context::from_waker(Waker::noop());
    let mut io = Box::pin(ch.io(Op::Flush));
    assert!(io.as_mut().poll(&mut cx).is_pending());
    drop(io);
    ch.keep_for_orphans(Box::new(LeavesOrphan(ch.clone())));
    assert_eq!(ch.pump(), 1);
    assert_eq!(ch.inner.keepers.borrow().len(), 1, "that of the other");
    ch.drain();
    assert_eq!(ch.inner.keepers.borrow().len(), 0);
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_completion_wakes_whoever_polled_last() {
    let ch = channel();
    let wakers = [(); 2].map(|()| Arc::new(Woken::default()));
    let mut io = Box::pin(ch.io(Op::Flush));
    for woken in &wakers {
        let waker = Waker::from(Arc::clone(woken));
        let mut cx = Context::from_waker(&waker);
        assert!(io.as_mut().poll(&mut cx).is_pending());
    }
    assert_eq!(ch.pump(), 1);
    assert_eq!(wakers.map(|w| w.0.load(Ordering::SeqCst)), [false, true]);
}

#[test]
fn a_wake_is_noticed_and_ends_a_sleep() {
    let signal = Signal::new();
    signal.woken.store(false, Ordering::SeqCst);
    signal.parked.store(true, Ordering::SeqCst);
    Waker::from(Arc::clone(&signal)).wake();
    assert!(signal.woken.load(Ordering::SeqCst));
    let start = std::time::Instant::now();
    thread::park_timeout(Duration::from_secs(60));
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_future_that_nobody_wakes_can_give_up() {
    let ch = channel();
    let deadline = std::time::Instant::now() + Duration::from_millis(5);
    ch.block_on(std::future::poll_fn(|_| {
        if std::time::Instant::now() < deadline {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }));
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
