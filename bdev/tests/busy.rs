//! Devices that stand on one that is busy, or that does not respond: nothing is lost, overtaken or
//! left in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::registry::{Registry, TimeoutAction};
use pumice_bdev::split::Split;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, IoChannel, IoErrorKind,
    Op, OpKind, SubmitError,
};

type Dev = Arc<dyn BlockDevice>;

/// A device in memory whose channels have room for a few operations.
#[derive(Debug)]
struct Busy {
    base: Dev,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    /// Number of operations for which a channel has room.
    room: AtomicUsize,
    /// Whether reads end by an abort or a reset only.
    holds: AtomicBool,
    /// Number of aborts that come too early and end nothing.
    deaf: AtomicUsize,
    /// Whether the device was removed, and refuses everything.
    gone: AtomicBool,
}

struct BusyChannel {
    base: Box<dyn IoChannel>,
    info: DeviceInfo,
    state: Arc<State>,
    held: Vec<(u64, Op)>,
    ended: Vec<Completion>,
}

fn busy(room: usize) -> (Arc<Busy>, Arc<State>) {
    let state = Arc::new(State {
        room: AtomicUsize::new(room),
        holds: AtomicBool::new(false),
        deaf: AtomicUsize::new(0),
        gone: AtomicBool::new(false),
    });
    let device = Busy {
        base: pumice_bdev::open("malloc://4M").unwrap(),
        state: Arc::clone(&state),
    };
    (Arc::new(device), state)
}

/// A device whose reads end by an abort or a reset only.
fn holding() -> (Arc<Busy>, Arc<State>) {
    let (device, state) = busy(64);
    state.holds.store(true, Ordering::Relaxed);
    (device, state)
}

impl BlockDevice for Busy {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(BusyChannel {
            base: self.base.open_channel()?,
            info: self.base.info().clone(),
            state: Arc::clone(&self.state),
            held: Vec::new(),
            ended: Vec::new(),
        }))
    }
}

impl BusyChannel {
    /// Ends the operations in hand of which `which` is true.
    fn end(&mut self, which: impl Fn(u64) -> bool) {
        for (tag, op) in self.held.extract_if(.., |(tag, _)| which(*tag)) {
            let e = self.info.error(&op, IoErrorKind::Aborted, "");
            let result = Err(e);
            self.ended.push(Completion { tag, op, result });
        }
    }
}

impl IoChannel for BusyChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if self.state.gone.load(Ordering::Relaxed) {
            let e = self.info.error(&op, IoErrorKind::Removed, "");
            return Err(SubmitError::Refused(op, e));
        }
        if self.in_flight() >= self.state.room.load(Ordering::Relaxed) {
            return Err(SubmitError::Busy(op));
        }
        match op {
            Op::Read { .. } | Op::ReadV { .. } if self.state.holds.load(Ordering::Relaxed) => {
                self.held.push((tag, op));
                return Ok(());
            }
            Op::Reset => self.end(|_| true),
            Op::Abort { tag: target } => {
                let deaf = &self.state.deaf;
                let less = |n: usize| n.checked_sub(1);
                if deaf
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                    .is_err()
                {
                    self.end(|tag| tag == target);
                }
            }
            _ => return self.base.submit(tag, op),
        }
        let result = Ok(());
        self.ended.push(Completion { tag, op, result });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let n = self.ended.len();
        out.append(&mut self.ended);
        n + self.base.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if self.ended.is_empty() && self.base.in_flight() == 0 {
            std::thread::sleep(timeout.min(Duration::from_millis(1)));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.ended.len() + self.base.in_flight()
    }
}

fn read(lba: u64) -> Op {
    let buf = DmaBuf::zeroed(512).unwrap();
    Op::Read { lba, buf }
}

fn write(lba: u64, byte: u8) -> Op {
    let mut buf = DmaBuf::new(512).unwrap();
    buf.fill(byte);
    let data = buf.freeze();
    Op::Write {
        lba,
        data,
        fua: false,
    }
}

/// Polls more often than anything here needs. Returns the tags that have ended, and whether well.
fn ended(channel: &mut dyn IoChannel) -> Vec<(u64, bool)> {
    let mut out = Vec::new();
    for _ in 0..2000 {
        channel.poll(&mut out);
    }
    out.iter().map(|c| (c.tag, c.result.is_ok())).collect()
}

#[test]
fn what_a_part_does_not_take_comes_back_at_its_own_address() {
    let (base, state) = busy(1);
    let parts = Split::new(&(base as Dev), 2, None).unwrap();
    let mut ch = parts[1].open_channel().unwrap();
    ch.submit(1, read(3)).unwrap();
    let Err(SubmitError::Busy(op)) = ch.submit(2, write(5, 9)) else {
        panic!("there was room for one");
    };
    assert_eq!(op.lba(), 5);
    state.gone.store(true, Ordering::Relaxed);
    let Err(SubmitError::Refused(op, _)) = ch.submit(2, op) else {
        panic!("the device was removed");
    };
    assert_eq!(op.lba(), 5);
}

/// An operation that finds a leg full waits for it, in order.
#[test]
fn a_stripe_of_busy_legs_loses_nothing() {
    let (legs, states): (Vec<_>, Vec<_>) = (0..2).map(|_| busy(1)).unzip();
    let legs = legs.into_iter().map(|leg| leg as Dev).collect();
    let raid = Raid0::new("R", legs, 4, None).unwrap();
    let mut ch = raid.open_channel().unwrap();
    for lba in 0..32 {
        let byte = u8::try_from(lba + 1).unwrap();
        ch.submit(lba, write(lba, byte)).unwrap();
    }
    let done = ended(&mut *ch);
    assert_eq!((done.len(), ch.in_flight()), (32, 0));
    assert!(done.iter().all(|(_, ok)| *ok));
    let all = AsyncChannel::new(ch);
    let back = all.block_on(all.read(0, DmaBuf::new(32 * 512).unwrap()));
    let back = back.unwrap();
    assert!(back.chunks(512).map(|block| block[0]).eq(1..=32));

    let mut ch = raid.open_channel().unwrap();
    ch.submit(0, read(0)).unwrap();
    ch.submit(1, read(1)).unwrap();
    states[0].room.store(8, Ordering::Relaxed);
    ch.submit(2, read(2)).unwrap();
    let done = ended(&mut *ch);
    assert_eq!(done, [(0, true), (1, true), (2, true)], "none is overtaken");
}

/// An operation that waited for room at a leg ends with the error that the leg has for it then.
#[test]
fn a_stripe_ends_what_a_leg_refuses_later() {
    let (legs, states): (Vec<_>, Vec<_>) = (0..2).map(|_| busy(1)).unzip();
    let legs = legs.into_iter().map(|leg| leg as Dev).collect();
    let raid = Raid0::new("R", legs, 4, None).unwrap();
    let mut ch = raid.open_channel().unwrap();
    for tag in 0..3 {
        ch.submit(tag, write(tag, 1)).unwrap();
    }
    states[0].gone.store(true, Ordering::Relaxed);
    let done = ended(&mut *ch);
    assert_eq!(done, [(0, true), (1, false), (2, false)]);
    assert_eq!(ch.in_flight(), 0);
}

#[test]
fn a_fault_is_not_spent_on_what_was_not_taken() {
    let (base, state) = busy(1);
    let dev = ErrorDevice::new(None, base);
    let mut ch = dev.open_channel().unwrap();
    ch.submit(1, read(0)).unwrap();
    let corrupt = Injection::new(Failure::Corrupt {
        offset: 1,
        value: 1,
    })
    .op(Some(OpKind::Read));
    dev.inject(corrupt.clone());
    let refused = ch.submit(2, read(0));
    assert!(matches!(refused, Err(SubmitError::Busy(_))));
    assert_eq!(dev.injections(), [corrupt]);
    state.room.store(2, Ordering::Relaxed);
    ch.submit(2, read(0)).unwrap();
    assert!(dev.injections().is_empty());
}

/// The submitter gets its own bytes back, also when it has to come again, and the device gets them with one byte changed.
#[test]
fn a_write_is_corrupted_on_its_way_down_and_comes_back_as_it_was() {
    let (base, state) = busy(1);
    let dev = ErrorDevice::new(None, Arc::clone(&base) as Dev);
    let mut ch = dev.open_channel().unwrap();
    ch.submit(1, read(0)).unwrap();
    dev.inject(
        Injection::new(Failure::Corrupt {
            offset: 700,
            value: 0x10,
        })
        .op(Some(OpKind::Write)),
    );
    let sent: Vec<u8> = (0..1536)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let parts = [&sent[..512], &sent[512..]];
    let data = parts.map(|part| DmaBuf::copy_from(part).unwrap().into());
    let write = Op::WriteV {
        lba: 3,
        data: data.to_vec(),
        fua: false,
    };
    let is_own = |op: &Op| match op {
        Op::WriteV { lba: 3, data, .. } => data.iter().flat_map(|d| d.iter()).eq(&sent),
        _ => false,
    };
    let Err(SubmitError::Busy(write)) = ch.submit(2, write) else {
        panic!("there was room for one");
    };
    assert!(is_own(&write), "{write:?}");
    state.room.store(2, Ordering::Relaxed);
    ch.submit(2, write).unwrap();
    let mut out = Vec::new();
    while ch.in_flight() > 0 {
        ch.poll(&mut out);
    }
    let written = out.iter().find(|done| done.tag == 2).unwrap();
    written.result.as_ref().unwrap();
    assert!(is_own(&written.op), "{:?}", written.op);
    let below = AsyncChannel::new(base.base.open_channel().unwrap());
    let back = below.block_on(below.read(3, DmaBuf::new(1536).unwrap()));
    let mut expected = sent.clone();
    expected[700] ^= 0x10;
    assert!(back.unwrap()[..] == expected[..]);
}

#[test]
fn operations_that_are_resumed_together_all_end() {
    let (base, _) = busy(1);
    let dev = ErrorDevice::new(None, base);
    dev.inject(
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Read))
            .count(4),
    );
    let mut ch = dev.open_channel().unwrap();
    for tag in 0..4 {
        ch.submit(tag, read(tag)).unwrap();
    }
    assert!(ended(&mut *ch).is_empty());
    dev.resume();
    let mut done = ended(&mut *ch);
    done.sort_unstable();
    assert_eq!(done, [0, 1, 2, 3].map(|tag| (tag, true)));
}

/// An operation that was resumed and had no room below is held back like one that hangs: it ends
/// before a reset, and by an abort that names it, and never reaches the device.
#[test]
fn what_was_resumed_and_had_no_room_ends_before_a_reset() {
    for by_abort in [false, true] {
        let (base, state) = holding();
        state.room.store(1, Ordering::Relaxed);
        let dev = ErrorDevice::new(None, Arc::clone(&base) as Dev);
        let mut ch = dev.open_channel().unwrap();
        ch.submit(0, read(0)).unwrap();
        dev.inject(
            Injection::new(Failure::Hang)
                .op(Some(OpKind::Write))
                .count(2),
        );
        for tag in [1, 2] {
            ch.submit(tag, write(tag, 9)).unwrap();
        }
        dev.resume();
        assert_eq!(ended(&mut *ch), [], "the device below is full");
        state.room.store(2, Ordering::Relaxed);
        let mut expected = vec![];
        if by_abort {
            ch.submit(3, Op::Abort { tag: 2 }).unwrap();
            expected.extend([(2, false), (3, true)]);
        }
        ch.submit(4, Op::Reset).unwrap();
        let mut done = ended(&mut *ch);
        assert_eq!(done.pop(), Some((4, true)), "the reset is last");
        expected.extend([(0, false), (1, false), (2, false)]);
        expected.sort_unstable();
        expected.dedup();
        done.sort_unstable();
        assert_eq!(done, expected);
        assert_eq!(ch.in_flight(), 0);
        let ch = AsyncChannel::new(base.base.open_channel().unwrap());
        let back = ch.block_on(ch.read(1, DmaBuf::new(1024).unwrap())).unwrap();
        assert!(back.iter().all(|byte| *byte == 0), "a write came later");
    }
}

/// A future that is dropped while its operation waits for room takes it back.
#[test]
fn a_write_that_was_dropped_before_it_had_room_is_not_made() {
    let (base, _) = busy(1);
    let ch = AsyncChannel::new(base.open_channel().unwrap());
    let mut cx = Context::from_waker(Waker::noop());
    let mut first = Box::pin(ch.io(read(0)));
    let mut second = Box::pin(ch.io(write(7, 7)));
    assert!(first.as_mut().poll(&mut cx).is_pending());
    assert!(second.as_mut().poll(&mut cx).is_pending());
    drop(second);
    ch.block_on(first).1.unwrap();
    ch.drain();
    let back = ch.block_on(ch.read(7, DmaBuf::new(512).unwrap())).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
}

/// Puts each kind of device on one that holds its reads.
fn views() -> Vec<(&'static str, Dev)> {
    let base = || holding().0 as Dev;
    let registry = Registry::new();
    let below = Arc::new(Passthru::new("below", base()));
    let registered = registry.register(below, Vec::new()).unwrap();
    let legs = vec![base(), base()];
    vec![
        ("passthru", Arc::new(Passthru::new("P", base()))),
        (
            "delay",
            Arc::new(Delay::new("D", base(), Latencies::default())),
        ),
        ("error", Arc::new(ErrorDevice::new(None, base()))),
        (
            "split",
            Arc::new(Split::new(&base(), 2, None).unwrap().remove(1)),
        ),
        ("raid", Arc::new(Raid0::new("R", legs, 4, None).unwrap())),
        ("registry", Arc::new(registered)),
    ]
}

/// An abort reaches the operation that it names, on every leg, and a reset reaches the others.
#[test]
fn aborts_and_resets_pass_through_every_device() {
    for (name, dev) in views() {
        let mut ch = dev.open_channel().unwrap();
        // The longer ones lie on both legs of a stripe.
        for tag in [1000, 1001, 1002] {
            let buf = DmaBuf::zeroed(8192).unwrap();
            ch.submit(tag, Op::Read { lba: 4, buf }).unwrap();
        }
        ch.submit(1003, read(0)).unwrap();
        assert_eq!(ended(&mut *ch), [], "{name}");
        ch.submit(2000, Op::Abort { tag: 1001 }).unwrap();
        let mut out = Vec::new();
        while out.len() < 2 {
            ch.poll(&mut out);
        }
        out.sort_unstable_by_key(|done| done.tag);
        let done: Vec<_> = out.iter().map(|c| (c.tag, c.result.is_ok())).collect();
        assert_eq!(done, [(1001, false), (2000, true)], "{name}");
        // The submitter gets back what it has submitted.
        let own = matches!(out[1].op, Op::Abort { tag: 1001 });
        assert!(own, "{name}: {:?}", out[1].op);
        ch.submit(2001, Op::Reset).unwrap();
        let mut done = ended(&mut *ch);
        assert_eq!(done.pop(), Some((2001, true)), "{name}: the reset is last");
        done.sort_unstable();
        assert_eq!(done, [1000, 1002, 1003].map(|tag| (tag, false)), "{name}");
        assert_eq!(ch.in_flight(), 0, "{name}");
    }
}

/// A device that is too busy for the reset that ends its operations is asked again.
#[test]
fn a_busy_device_that_was_removed_ends_what_it_holds() {
    let registry = Registry::new();
    let (base, state) = holding();
    state.room.store(1, Ordering::Relaxed);
    let name = base.info().name.clone();
    let dev = registry.register(base, Vec::new()).unwrap();
    let mut ch = dev.open_channel().unwrap();
    ch.submit(1, read(0)).unwrap();
    registry.remove(&name).unwrap();
    assert_eq!(ended(&mut *ch), []);
    state.room.store(2, Ordering::Relaxed);
    assert_eq!(ended(&mut *ch), [(1, false)]);
}

/// A time limit holds on devices that come after it was set, and an abort that came too early for
/// the device is not the last.
#[test]
fn a_late_operation_is_aborted_until_it_ends() {
    let registry = Registry::new();
    registry.set_timeout(Duration::from_millis(2), TimeoutAction::Abort);
    let (base, state) = holding();
    state.deaf.store(2, Ordering::Relaxed);
    let dev = registry.register(base, Vec::new()).unwrap();
    let mut ch = dev.open_channel().unwrap();
    ch.submit(1, read(0)).unwrap();
    let (mut out, start) = (Vec::new(), Instant::now());
    while ch.poll(&mut out) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "it never ends");
        ch.wait(Duration::from_millis(1)).unwrap();
    }
    assert_eq!(
        out[0].result.as_ref().unwrap_err().kind,
        IoErrorKind::Aborted
    );
}

/// A device that had no room for the abort or the reset of a late operation is asked again.
#[test]
fn a_late_operation_of_a_busy_device_ends_when_there_is_room() {
    for action in [TimeoutAction::Abort, TimeoutAction::Reset] {
        let registry = Registry::new();
        registry.set_timeout(Duration::from_millis(2), action);
        let (base, state) = holding();
        state.room.store(1, Ordering::Relaxed);
        let dev = registry.register(base, Vec::new()).unwrap();
        let mut ch = dev.open_channel().unwrap();
        ch.submit(1, read(0)).unwrap();
        let (mut out, start) = (Vec::new(), Instant::now());
        while start.elapsed() < Duration::from_millis(20) {
            assert_eq!(ch.poll(&mut out), 0);
        }
        state.room.store(2, Ordering::Relaxed);
        while ch.poll(&mut out) == 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "{action:?}");
            ch.wait(Duration::from_millis(1)).unwrap();
        }
    }
}

/// A tag that was used before names the operation that has it now.
#[test]
fn an_abort_names_what_has_the_tag_now() {
    let (base, _) = holding();
    let dev = Registry::new().register(base, Vec::new()).unwrap();
    let mut ch = dev.open_channel().unwrap();
    for tag in [1, 9] {
        ch.submit(tag, write(tag, 1)).unwrap();
    }
    assert_eq!(ended(&mut *ch).len(), 2);
    for tag in [1, 2] {
        ch.submit(tag, read(tag)).unwrap();
        ch.submit(100 + tag, Op::Abort { tag }).unwrap();
        let mut done = ended(&mut *ch);
        done.sort_unstable();
        assert_eq!(done, [(tag, false), (100 + tag, true)]);
    }
}

/// A device that says of an operation that it was removed has no name any longer.
#[test]
fn a_device_that_refuses_as_removed_is_removed() {
    let registry = Registry::new();
    let (base, state) = busy(8);
    let dev = registry.register(base, Vec::new()).unwrap();
    let mut ch = dev.open_channel().unwrap();
    state.gone.store(true, Ordering::Relaxed);
    let refused = ch.submit(1, read(0));
    assert!(matches!(refused, Err(SubmitError::Refused(..))));
    assert!(registry.names().is_empty());
}
