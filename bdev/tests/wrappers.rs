//! Tests of what devices on top of another one say of it.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::malloc::{Malloc, MallocOptions};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::read_only::ReadOnly;
use pumice_bdev::registry::Registry;
use pumice_bdev::split::Split;
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, HostSpace, IoChannel, IoErrorKind,
    Limits, Op, OpKind, SubmitError,
};

const SPACE: HostSpace = HostSpace {
    free_bytes: 7,
    allocated_bytes: 5,
};

/// A device of 100 blocks, of which block 40 holds data.
#[derive(Debug)]
struct Base {
    info: DeviceInfo,
    keeps: AtomicBool,
}

impl Base {
    fn new() -> Arc<Base> {
        Base::with(Limits::default())
    }

    fn with(limits: Limits) -> Arc<Base> {
        let mut info = DeviceInfo::new("Base0", "test", 512, 100);
        info.limits = limits;
        info.ops = info.ops.with(OpKind::Abort);
        info.aliases = vec!["alias".to_owned()];
        Arc::new(Base {
            info,
            keeps: AtomicBool::new(true),
        })
    }
}

impl BlockDevice for Base {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let file = tempfile::tempfile().expect("a file");
        Ok(Box::new(Full(file)))
    }

    fn own_channels(&self) -> Option<usize> {
        Some(3)
    }

    fn host_name(&self) -> Option<String> {
        Some("base".to_owned())
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        Ok((lba <= 40).then_some(40..41))
    }

    fn keep_file(&self, keep: bool) {
        self.keeps.store(keep, Ordering::Relaxed);
    }

    fn host_space(&self) -> Option<HostSpace> {
        Some(SPACE)
    }
}

/// A channel that takes nothing.
struct Full(std::fs::File);

impl IoChannel for Full {
    fn submit(&mut self, _tag: u64, op: Op) -> Result<(), SubmitError> {
        Err(SubmitError::Busy(op))
    }

    fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// The upper device says what the lower one would: how many threads have a queue of their own, what has to be read, how much room
/// there is, and that two names are one device.
#[test]
fn a_device_on_the_whole_of_another_answers_for_it() {
    type Make = fn(Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice>;
    let makes: [Make; 5] = [
        |base| Arc::new(Passthru::new("upper", base)),
        |base| Arc::new(Delay::new("upper", base, Latencies::default())),
        |base| Arc::new(ErrorDevice::new(Some("upper"), base)),
        ReadOnly::of,
        |base| {
            let registry = Registry::new();
            registry.register(base, Vec::new()).expect("registered");
            Arc::new(registry.claim("Base0", "a test").expect("claimed"))
        },
    ];
    for make in makes {
        let base = Base::new();
        let upper = make(Arc::clone(&base) as Arc<dyn BlockDevice>);
        let module = upper.info().module;
        assert_eq!(upper.own_channels(), Some(3), "{module}");
        assert_eq!(upper.identity(), base.identity(), "{module}");
        assert_eq!(upper.host_name().as_deref(), Some("base"), "{module}");
        let range = upper.next_data(1).expect("known");
        // Faults are met where everything is read.
        let want = if module == "error" { 1..100 } else { 40..41 };
        assert_eq!(range, Some(want), "{module}");
        assert_eq!(upper.host_space(), Some(SPACE), "{module}");
        upper.keep_file(false);
        // Who only reads does not decide that a file goes.
        let reads = !upper.info().ops.has(OpKind::Write);
        assert_eq!(base.keeps.load(Ordering::Relaxed), reads, "{module}");
        if upper.info().name == "upper" {
            assert!(upper.info().aliases.is_empty(), "{module}");
        }
    }
}

#[test]
fn a_passthru_channel_is_waited_for_as_the_lower_one() {
    let base = Base::new() as Arc<dyn BlockDevice>;
    let upper = Passthru::new("upper", base);
    let channel = upper.open_channel().expect("a channel");
    assert!(channel.event_fd().is_some());
}

/// The caller gets back what it has submitted, and data is found where it lies in the part.
#[test]
fn a_part_counts_its_own_blocks() {
    let base = Base::new() as Arc<dyn BlockDevice>;
    let parts = Split::new(&base, 5, None).expect("parts of 20 blocks");
    let second = 2;
    let mut channel = parts[second].open_channel().expect("a channel");
    assert!(channel.event_fd().is_some());
    let op = Op::Read {
        lba: 3,
        buf: DmaBuf::new(512).expect("memory"),
    };
    match channel.submit(1, op) {
        Err(SubmitError::Busy(op)) => assert_eq!(op.lba(), 3),
        other => panic!("{other:?}"),
    }
    // Block 40 is the first one of the third part.
    let found = |part: usize, lba| parts[part].next_data(lba).expect("known");
    assert_eq!(
        [found(0, 0), found(1, 0), found(2, 0)],
        [None, None, Some(0..1)]
    );
    assert_eq!(
        [found(2, 1), found(2, 19), found(2, 20), found(3, 0)],
        [None, None, None, None]
    );
    // The blocks that are allocated may be those of any part.
    let space = parts[second].host_space().expect("known");
    assert_eq!((space.free_bytes, space.allocated_bytes), (7, 0));
}

/// It would abort another operation when it is submitted again.
#[test]
fn an_abort_that_finds_no_room_keeps_its_target() {
    let base = || Base::new() as Arc<dyn BlockDevice>;
    let registered = Registry::new().register(base(), Vec::new());
    let uppers: [Box<dyn BlockDevice>; 5] = [
        Box::new(registered.expect("a free name")),
        Box::new(Passthru::new("upper", base())),
        Box::new(Delay::new("upper", base(), Latencies::default())),
        Box::new(ErrorDevice::new(Some("upper"), base())),
        Box::new(Split::new(&base(), 1, None).expect("a part").remove(0)),
    ];
    for upper in uppers {
        let mut channel = upper.open_channel().expect("a channel");
        let returned = channel.submit(1, Op::Abort { tag: 77 });
        let kept = matches!(returned, Err(SubmitError::Busy(Op::Abort { tag: 77 })));
        assert!(kept, "{}", upper.info().module);
        assert_eq!(channel.in_flight(), 0, "{}", upper.info().module);
    }
}

/// A channel of a device that was removed. It is told of neither aborts nor resets, which its device does not have.
struct Gone(DeviceInfo);

impl IoChannel for Gone {
    fn submit(&mut self, _tag: u64, op: Op) -> Result<(), SubmitError> {
        assert!(matches!(op, Op::Read { .. }), "{op:?}");
        let error = self.0.error(&op, IoErrorKind::Removed, "");
        Err(SubmitError::Refused(op, error))
    }

    fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }
}

#[derive(Debug)]
struct Removed(DeviceInfo);

impl BlockDevice for Removed {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(Gone(self.0.clone())))
    }
}

/// An operation that hangs above such a device ends by an abort, by a reset, or with the error that the device has for it when it goes on.
#[test]
fn what_hangs_ends_where_the_device_below_takes_nothing() {
    let mut info = DeviceInfo::new("Gone0", "test", 512, 100);
    info.ops = info.ops.without(OpKind::Reset).without(OpKind::Abort);
    let dev = ErrorDevice::new(None, Arc::new(Removed(info)));
    dev.inject(
        Injection::new(Failure::Hang)
            .op(Some(OpKind::Read))
            .count(3),
    );
    let mut channel = dev.open_channel().expect("a channel");
    for tag in [1, 2, 3] {
        let buf = DmaBuf::new(512).expect("memory");
        channel
            .submit(tag, Op::Read { lba: tag, buf })
            .expect("it hangs");
        if tag == 1 {
            dev.resume();
        }
        let end = match tag {
            1 => None,
            2 => Some((4, Op::Abort { tag: 2 })),
            _ => Some((5, Op::Reset)),
        };
        if let Some((tag, op)) = end {
            channel.submit(tag, op).expect("it has an end");
        }
        let mut out = Vec::new();
        channel.poll(&mut out);
        let kinds = out
            .iter()
            .map(|done| (done.tag, done.result.as_ref().err().map(|e| e.kind)));
        let expected = match tag {
            1 => vec![(1, Some(IoErrorKind::Removed))],
            2 => vec![(2, Some(IoErrorKind::Aborted)), (4, None)],
            _ => vec![(3, Some(IoErrorKind::Aborted)), (5, None)],
        };
        assert_eq!(kinds.collect::<Vec<_>>(), expected);
        assert_eq!(channel.in_flight(), 0);
    }
    // An abort that finds nothing has succeeded, too.
    channel
        .submit(6, Op::Abort { tag: 9 })
        .expect("it ends here");
    let mut out = Vec::new();
    channel.poll(&mut out);
    assert!(matches!(&out[..], [done] if done.tag == 6 && done.result.is_ok()));
}

/// No operation on a part crosses a boundary of the base that it would not cross on the base.
#[test]
fn parts_begin_at_boundaries() {
    let base = Base::with(Limits::new(0, 8)) as Arc<dyn BlockDevice>;
    let blocks = |count| {
        let parts = Split::new(&base, count, None).expect("parts");
        parts[0].info().num_blocks
    };
    assert_eq!(
        [blocks(1), blocks(3), blocks(12), blocks(13)],
        [96, 32, 8, 7]
    );
}

/// No device has such blocks, or so many of them, whoever makes it.
#[test]
fn a_geometry_that_no_device_has_is_refused() {
    for (block_size, num_blocks) in [
        (0, 8),
        (256, 8),
        (1000, 8),
        (1 << 17, 8),
        (512, 0),
        (512, u64::MAX),
    ] {
        let made = Malloc::new(
            &MallocOptions::default()
                .block_size(block_size)
                .num_blocks(num_blocks),
        );
        let e = made.expect_err("it was made");
        assert!(matches!(e, BdevError::InvalidOption { .. }), "{e}");
    }
}
