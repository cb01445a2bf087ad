//! Tests of the channel that uses io_uring.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicI32};

use io_uring::squeue;
use pumice_io::sys::file as sys;

use super::super::Zeroing;
use super::super::slot::Step;
use super::*;
use crate::DmaBuf;
use crate::file::FileOptions;

/// The fields of an entry that the tests look at (linux/io_uring.h, `struct io_uring_sqe`).
#[derive(Debug, PartialEq, Eq)]
struct Fields {
    opcode: u8,
    off: u64,
    addr: u64,
    len: u32,
    op_flags: u32,
}

const FSYNC: u8 = 3;
const WRITE: u8 = 23;
const READ: u8 = 22;

fn fields(entry: &squeue::Entry) -> Fields {
    assert_eq!(size_of::<squeue::Entry>(), 64);
    // SAFETY: an entry is the kernel's structure of 64 bytes, all of them initialised.
    let raw = unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() };
    let u32_at = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_ne_bytes(raw[at..at + 8].try_into().unwrap());
    Fields {
        opcode: raw[0],
        off: u64_at(8),
        addr: u64_at(16),
        len: u32_at(24),
        op_flags: u32_at(28),
    }
}

fn shared(buffered: bool) -> (tempfile::TempDir, Arc<SharedFile>) {
    // This is not in /tmp, which is memory without direct I/O on many machines.
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap());
    let dir = dir.unwrap();
    let file = crate::file::File::open(
        &FileOptions::new(dir.path().join("image"))
            .size(Some(1 << 20))
            .create(true)
            .buffered(buffered),
    );
    (dir, file.unwrap().shared)
}

fn flight(op: Op, shared: &SharedFile) -> InFlight {
    InFlight::new(Slot::new(7, op, shared, true))
}

fn write(fua: bool) -> Op {
    Op::Write {
        lba: 3,
        data: DmaBuf::zeroed(4096).unwrap().freeze(),
        fua,
    }
}

/// Whether the calls for `op` make its data durable when each of them succeeds.
fn is_durable(op: Op, shared: &Arc<SharedFile>) -> bool {
    let mut flight = flight(op, shared);
    for _ in 0..8 {
        let entry = fields(&flight.entry(shared));
        let dsync = entry.op_flags & libc::RWF_DSYNC.cast_unsigned() != 0;
        // A data sync covers everything written before it.
        let durable = match entry.opcode {
            FSYNC => true,
            opcode => dsync && opcode == WRITE,
        };
        match flight.slot.advance(Ok(entry.len), shared) {
            None => {}
            Some(result) => {
                result.unwrap();
                return durable;
            }
        }
    }
    panic!("the operation does not end");
}

/// B22: an abort ends the wait for a discard and not the discard; and its result is nobody else's.
#[test]
fn an_aborted_discard_ends_when_it_is_done() {
    let (_dir, shared) = shared(true);
    let mut channel = RingChannel::new(Arc::clone(&shared)).unwrap();
    let unmap = Op::Unmap {
        lba: 0,
        len_blocks: 8,
    };
    // As if the device took `BLKDISCARD`: a thread is at it.
    let mut flight = flight(unmap, &shared);
    flight.slot.step = Step::Discard;
    let event = sys::eventfd().unwrap();
    let mut signal = event.try_clone().unwrap();
    let (errno, over) = (
        Arc::new(AtomicI32::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    flight.discard = Some(Discarding {
        event,
        errno: Arc::clone(&errno),
        over: Arc::clone(&over),
        counter: [0; 8],
    });
    let number = channel.free.pop().unwrap();
    channel.slots[number as usize] = Some(Box::new(flight));
    channel.in_flight = 1;
    channel.completed(number, -libc::ECANCELED);
    let mut out = Vec::new();
    assert_eq!(channel.poll(&mut out), 0, "the thread is still at it");
    errno.store(libc::EIO, Ordering::Release);
    over.store(true, Ordering::Release);
    signal.write_all(&1_u64.to_ne_bytes()).unwrap();
    while channel.poll(&mut out) == 0 {
        channel.wait(Duration::from_secs(1)).unwrap();
    }
    assert!(out[0].result.is_err(), "{:?}", out[0]);
    // The next operation of the slot has a result of its own.
    channel.submit(2, write(false)).unwrap();
    out.clear();
    while channel.poll(&mut out) == 0 {
        channel.wait(Duration::from_secs(1)).unwrap();
    }
    assert!(out[0].result.is_ok(), "{:?}", out[0]);
}

#[test]
fn what_promises_to_be_durable_is() {
    for buffered in [false, true] {
        let (_dir, shared) = shared(buffered);
        let zeroes = |fua| Op::WriteZeroes {
            lba: 0,
            len_blocks: 8,
            fua,
        };
        assert!(is_durable(Op::Flush, &shared));
        assert!(is_durable(write(true), &shared));
        assert!(!is_durable(write(false), &shared));
        for method in [Zeroing::ZeroRange, Zeroing::Write] {
            shared.zeroing.store(method as u8, Ordering::Relaxed);
            assert!(is_durable(zeroes(true), &shared), "{method:?}");
            assert!(!is_durable(zeroes(false), &shared), "{method:?}");
        }
    }
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let (_dir, shared) = shared(true);
    let buf = DmaBuf::zeroed(8192).unwrap();
    let start = buf.as_ptr().addr() as u64;
    let mut read = flight(Op::Read { lba: 2, buf }, &shared);
    let first = fields(&read.entry(&shared));
    let want = Fields {
        opcode: READ,
        off: 1024,
        addr: start,
        len: 8192,
        op_flags: 0,
    };
    assert_eq!(first, want);
    assert!(read.slot.advance(Ok(1536), &shared).is_none());
    let rest = fields(&read.entry(&shared));
    let want = Fields {
        off: 1024 + 1536,
        addr: start + 1536,
        len: 8192 - 1536,
        ..want
    };
    assert_eq!(rest, want);
    assert!(read.slot.advance(Ok(8192 - 1536), &shared).unwrap().is_ok());

    // The rest of one buffer, and the buffers behind it.
    let bufs = vec![DmaBuf::zeroed(512).unwrap(), DmaBuf::zeroed(1024).unwrap()];
    let second = bufs[1].as_ptr().addr();
    let mut read = flight(Op::ReadV { lba: 0, bufs }, &shared);
    read.entry(&shared);
    assert_eq!(read.iov.len(), 2);
    assert!(read.slot.advance(Ok(612), &shared).is_none());
    read.entry(&shared);
    let parts: Vec<_> = read
        .iov
        .iter()
        .map(|v| (v.iov_base.addr(), v.iov_len))
        .collect();
    assert_eq!(parts, [(second + 100, 924)]);
}

#[test]
fn calls_that_were_interrupted_are_made_again() {
    let (_dir, shared) = shared(false);
    let ops = [write(true), Op::Flush];
    for op in ops {
        let mut slot = Slot::new(0, op, &shared, true);
        for errno in [libc::EAGAIN, libc::EINTR, libc::EAGAIN] {
            assert!(slot.advance(Err(errno), &shared).is_none());
        }
        let n = u32::try_from(slot.len).unwrap();
        assert!(slot.advance(Ok(n), &shared).unwrap().is_ok());
    }
    // The number of attempts is limited.
    let mut slot = Slot::new(0, write(false), &shared, true);
    let ended = (0..1000).find_map(|_| slot.advance(Err(libc::EAGAIN), &shared));
    assert!(ended.unwrap().is_err());
}

/// Submits operations and waits once. Returns the number of those that the wait has ended itself,
/// without the ring.
fn called(channel: &mut RingChannel, ops: Vec<Op>, timeout: Duration) -> usize {
    let n = ops.len();
    for (tag, op) in (0..).zip(ops) {
        channel.submit(tag, op).unwrap();
    }
    channel.wait(timeout).unwrap();
    let called = channel.done.len();
    let mut out = Vec::new();
    let start = Instant::now();
    while out.len() < n {
        assert!(start.elapsed() < Duration::from_secs(20), "{out:?}");
        channel.wait(Duration::from_millis(1)).unwrap();
        channel.poll(&mut out);
    }
    assert!(out.iter().all(|done| done.result.is_ok()), "{out:?}");
    assert_eq!(channel.in_flight(), 0);
    called
}

#[test]
fn who_waits_for_one_durable_write_makes_the_call() {
    let (_dir, shared) = shared(false);
    let mut channel = RingChannel::new(Arc::clone(&shared)).unwrap();
    let long = Duration::from_secs(1);
    for op in [|| write(true), || Op::Flush] {
        assert_eq!(called(&mut channel, vec![op()], long), 1);
        // A thread that waits for a shorter time must not be blocked.
        assert_eq!(called(&mut channel, vec![op()], CALL_MIN / 2), 0);
        assert_eq!(called(&mut channel, vec![op(), op()], long), 0);
        assert_eq!(called(&mut channel, vec![write(false), op()], long), 0);
        assert_eq!(called(&mut channel, vec![op(), write(false)], long), 0);
    }
    let read = Op::Read {
        lba: 3,
        buf: DmaBuf::new(4096).unwrap(),
    };
    assert_eq!(called(&mut channel, vec![read], long), 0);
}

#[test]
fn what_was_left_for_a_call_is_polled_aborted_and_dropped_like_anything_else() {
    let (_dir, shared) = shared(false);
    let mut channel = RingChannel::new(Arc::clone(&shared)).unwrap();
    let mut out = Vec::new();
    channel.submit(1, write(true)).unwrap();
    let start = Instant::now();
    while channel.poll(&mut out) == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "poll sends it");
    }
    channel.submit(2, write(true)).unwrap();
    channel.submit(3, Op::Abort { tag: 2 }).unwrap();
    while out.len() < 3 {
        channel.wait(Duration::from_secs(1)).unwrap();
        channel.poll(&mut out);
    }
    channel.submit(4, write(true)).unwrap();
    channel.submit(5, Op::Reset).unwrap();
    while out.len() < 5 {
        channel.wait(Duration::from_secs(1)).unwrap();
        channel.poll(&mut out);
    }
    let tags: Vec<u64> = out.iter().map(|done| done.tag).collect();
    assert_eq!((tags[0], tags[3], tags[4]), (1, 4, 5), "a reset is last");
    // The drop waits for it, and does not wait for ever.
    channel.submit(6, write(true)).unwrap();
    let (ended, dropped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(channel);
        let _ = ended.send(());
    });
    let dropped = dropped.recv_timeout(Duration::from_secs(20));
    dropped.expect("the drop ends");
}

/// A durable write fails for its own sake, or because the flush behind it has failed, which was for
/// other writes, too. The same write without a flush tells.
#[test]
fn a_failed_flush_behind_a_durable_write_is_a_failed_flush() {
    for flush_has_failed in [false, true] {
        let (_dir, shared) = shared(false);
        let mut flight = flight(write(true), &shared);
        let dsync = |flight: &mut InFlight| fields(&flight.entry(&shared)).op_flags != 0;
        assert!(dsync(&mut flight));
        // What may pass is tried again by others, and says nothing about a flush.
        let mut busy = flight.slot.take();
        assert!(busy.advance(Err(libc::ENOMEM), &shared).unwrap().is_err());
        flight.slot = Slot::new(7, write(true), &shared, true);
        assert!(flight.slot.advance(Err(libc::EIO), &shared).is_none());
        assert!(!dsync(&mut flight), "only the write");
        let again = if flush_has_failed {
            Ok(u32::try_from(flight.slot.len).unwrap())
        } else {
            Err(libc::EIO)
        };
        let error = flight.slot.advance(again, &shared).unwrap().unwrap_err();
        assert_eq!(error.kind, IoErrorKind::Media);
        let flushed = shared.flush_fault.check(&shared.info, &Op::Flush);
        assert_eq!(flushed.is_err(), flush_has_failed);
    }
}

#[test]
fn a_call_writes_what_it_is_given_and_makes_it_durable() {
    let (dir, shared) = shared(false);
    let mut data = DmaBuf::zeroed(4096).unwrap();
    data.fill(7);
    let op = Op::Write {
        lba: 3,
        data: data.freeze(),
        fua: true,
    };
    let mut slot = Slot::new(0, op, &shared, true);
    assert!(slot.is_dsync());
    let done = run(&shared, slot.take());
    done.result.unwrap();
    let image = std::fs::read(dir.path().join("image")).unwrap();
    assert_eq!(image[3 * 512..3 * 512 + 4096], [7; 4096]);
    assert_eq!(image.iter().filter(|byte| **byte != 0).count(), 4096);
}
