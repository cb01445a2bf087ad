use super::super::steady::Steady;
use super::*;
use pumice_bdev::AsyncChannel;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev_testkit::crashsim::{Action, CrashDevice, CrashImage, CrashOptions, Event};

/// Devices on top of one that makes nothing durable without a flush.
struct Devices {
    holds: Arc<ErrorDevice>,
    fails: Arc<ErrorDevice>,
    base: CrashDevice,
    flushes: Arc<Flushes>,
    steady: Arc<Steady>,
}

fn channels<const N: usize>() -> (Devices, [MdIo; N]) {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(true)
        .fua(false);
    let base = CrashDevice::with_options(&options, CrashImage::zeroed(1 << 20));
    let fails = Arc::new(ErrorDevice::new(None, Arc::new(base.clone())));
    let holds = Arc::new(ErrorDevice::new(None, fails.clone()));
    let steady = Steady::new(holds.clone());
    let as_dyn: Arc<dyn BlockDevice> = steady.clone();
    let first = MdIo::new(&as_dyn, steady.failed_flush()).unwrap();
    let flushes = first.flushes;
    let all = std::array::from_fn(|_| MdIo::sharing(&as_dyn, Arc::clone(&flushes)).unwrap());
    let devices = Devices {
        holds,
        fails,
        base,
        flushes,
        steady,
    };
    (devices, all)
}

fn inject(dev: &ErrorDevice, failure: Failure) {
    dev.inject(Injection::new(failure).op(Some(OpKind::Flush)));
}

fn write(lba: u64) -> Vec<Op> {
    let data = DmaBuf::zeroed(4096).unwrap().freeze();
    vec![Op::Write {
        lba,
        data,
        fua: false,
    }]
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The first flush was sent before the others had written, so it does not cover them. One more
/// covers them all.
#[test]
fn one_flush_serves_all_that_wait_for_it_and_none_that_was_sent_before() {
    let (devices, all) = channels::<8>();
    inject(&devices.holds, Failure::Hang);
    std::thread::scope(|scope| {
        let mut all = all.into_iter();
        let mut first = all.next().unwrap();
        let first = scope.spawn(move || first.run_durable(write(0)));
        until("the first flush is held back", || {
            devices.holds.injections().is_empty()
        });
        let others: Vec<_> = (1..)
            .zip(all)
            .map(|(lba, mut io)| scope.spawn(move || io.run_durable(write(lba))))
            .collect();
        until("all have written", || {
            devices.flushes.completed.load(Ordering::Acquire) == 8
        });
        assert!(others.iter().all(|other| !other.is_finished()));
        devices.holds.resume();
        first.join().unwrap().unwrap();
        for other in others {
            other.join().unwrap().unwrap();
        }
    });
    let flush = |event: &Event| match event {
        Event::Submitted(change) => matches!(change.action, Action::Flush),
        _ => false,
    };
    let flushes = devices.base.log().into_iter().filter(flush).count();
    assert_eq!(flushes, 2);
}

/// A flush that fails while another channel's writes are in the cache may have lost them.
#[test]
fn a_failed_flush_fails_all_whose_writes_it_may_have_lost() {
    let (devices, [mut one, mut two]) = channels::<2>();
    inject(&devices.holds, Failure::Hang);
    inject(&devices.fails, Failure::Fail);
    std::thread::scope(|scope| {
        let one = scope.spawn(move || {
            let result = one.run_durable(write(0));
            (one, result)
        });
        until("the flush is held back", || {
            devices.holds.injections().is_empty()
        });
        let two = scope.spawn(move || two.run_durable(write(1)));
        until("both have written", || {
            devices.flushes.completed.load(Ordering::Acquire) == 2
        });
        devices.holds.resume();
        let (mut one, result) = one.join().unwrap();
        result.unwrap_err();
        two.join().unwrap().unwrap_err();
        // What is written once more is durable.
        one.run_durable(write(0)).unwrap();
    });
}

/// It may have failed between a write and the flush that was to cover it, or during that flush.
#[test]
fn a_failed_flush_of_another_channel_counts() {
    let (devices, [mut io]) = channels::<1>();
    let data = AsyncChannel::new(devices.steady.open_channel().unwrap());
    let failed = io.failed_flushes();
    io.run(write(0)).unwrap();
    inject(&devices.fails, Failure::Fail);
    data.block_on(data.flush()).unwrap_err();
    io.flush_since(failed).unwrap_err();
    inject(&devices.holds, Failure::Hang);
    std::thread::scope(|scope| {
        let held = scope.spawn(move || io.run_durable(write(0)));
        until("the flush is held back", || {
            devices.holds.injections().is_empty()
        });
        inject(&devices.fails, Failure::Fail);
        data.block_on(data.flush()).unwrap_err();
        devices.holds.resume();
        held.join().unwrap().unwrap_err();
    });
}

/// One that waits for its turn to flush finds that another's flush has covered it.
#[test]
fn a_flush_that_succeeds_does_not_bring_back_what_an_earlier_one_has_lost() {
    let (devices, [mut late, mut other]) = channels::<2>();
    let failed = late.failed_flushes();
    late.run(write(0)).unwrap();
    inject(&devices.fails, Failure::Fail);
    other.run_durable(write(1)).unwrap_err();
    other.run_durable(write(1)).unwrap();
    // The late one was counted before the last flush, and has waited since.
    let flushes = &devices.flushes;
    let counted = flushes.completed.load(Ordering::Acquire) + 1;
    flushes.covered.store(counted, Ordering::Release);
    late.flush_since(failed).unwrap_err();
    // What is written after that is covered by the same flush.
    let failed = late.failed_flushes();
    flushes.covered.store(counted + 1, Ordering::Release);
    late.flush_since(failed).unwrap();
}
