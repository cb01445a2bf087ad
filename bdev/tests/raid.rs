//! `raid0` beside what its legs refuse and what they report.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_bdev::raid0::Raid0;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, DmaSlice, IoChannel,
    IoErrorKind, Op, SubmitError,
};

const BS: usize = 512;

/// A write of as many buffers as a file takes has more of them on a leg, where the strips divide them.
#[test]
fn a_write_of_many_buffers_over_strips_is_divided() {
    for legs in [1, 2, 3] {
        let dir = tempfile::tempdir().unwrap();
        let legs: Vec<Arc<dyn BlockDevice>> = (0..legs)
            .map(|n| {
                let uri = format!(
                    "file://{}/{n}?size=4M&create=1&block_size=512",
                    dir.path().display()
                );
                pumice_bdev::open(&uri).unwrap()
            })
            .collect();
        let raid: Arc<dyn BlockDevice> = Arc::new(Raid0::new("R", legs, 4, None).unwrap());
        let ch = AsyncChannel::new(raid.open_channel().unwrap());
        // Each third buffer of three blocks lies across the end of a strip of eight.
        let data: Vec<DmaSlice> = (0..1024u32)
            .map(|n| {
                let mut buf = DmaBuf::new(3 * BS).unwrap();
                buf.chunks_mut(4)
                    .for_each(|word| word.copy_from_slice(&n.to_le_bytes()));
                buf.freeze()
            })
            .collect();
        let (_, written) = ch.block_on(ch.io(Op::WriteV {
            lba: 5,
            data,
            fua: false,
        }));
        written.unwrap();
        let buf = DmaBuf::zeroed(1024 * 3 * BS).unwrap();
        let found = ch.block_on(ch.read(5, buf)).unwrap();
        for (n, chunk) in (0..1024u32).zip(found.chunks(3 * BS)) {
            assert!(
                chunk.chunks(4).all(|word| word == n.to_le_bytes()),
                "buffer {n}"
            );
        }
    }
}

/// A leg that ends every operation with this error, after so many polls.
#[derive(Debug)]
struct Fails {
    base: Arc<dyn BlockDevice>,
    kind: IoErrorKind,
    polls: u32,
}

struct FailsChannel {
    info: DeviceInfo,
    kind: IoErrorKind,
    polls: u32,
    held: Vec<(u32, u64, Op)>,
}

impl BlockDevice for Fails {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(FailsChannel {
            info: self.info().clone(),
            kind: self.kind,
            polls: self.polls,
            held: Vec::new(),
        }))
    }
}

impl IoChannel for FailsChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.held.push((self.polls, tag, op));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let start = out.len();
        for (polls, tag, op) in std::mem::take(&mut self.held) {
            if polls > 0 {
                self.held.push((polls - 1, tag, op));
                continue;
            }
            let result = Err(self.info.error(&op, self.kind, "planned"));
            out.push(Completion { tag, op, result });
        }
        out.len() - start
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.held.len()
    }
}

/// A write that has timed out on one leg may still land there, whatever another leg says and whichever is first.
#[test]
fn a_leg_that_times_out_is_told_of_before_one_that_fails() {
    let others = [IoErrorKind::NoMemory, IoErrorKind::Media, IoErrorKind::Busy];
    for other in others {
        for late in [0, 1] {
            let leg = |n: u32| -> Arc<dyn BlockDevice> {
                Arc::new(Fails {
                    base: pumice_bdev::open("malloc://1M?block_size=512").unwrap(),
                    kind: if n == late {
                        IoErrorKind::TimedOut
                    } else {
                        other
                    },
                    polls: 3 * n,
                })
            };
            let raid = Raid0::new("R", vec![leg(0), leg(1)], 4, None).unwrap();
            let ch = AsyncChannel::new(raid.open_channel().unwrap());
            let data = DmaBuf::zeroed(16 * BS).unwrap().freeze();
            let error = ch.block_on(ch.write(0, data, false)).unwrap_err();
            assert_eq!(
                error.kind,
                IoErrorKind::TimedOut,
                "leg {late} beside {other:?}"
            );
        }
    }
}

/// An abort that finds nothing in flight has nothing to pass on, and ends.
#[test]
fn an_abort_of_nothing_ends() {
    let leg = || pumice_bdev::open("malloc://1M?block_size=512").unwrap();
    let raid = Raid0::new("R", vec![leg(), leg()], 4, None).unwrap();
    let mut ch = raid.open_channel().unwrap();
    ch.submit(1, Op::Abort { tag: 7 }).unwrap();
    let mut out = Vec::new();
    ch.poll(&mut out);
    assert!(matches!(&out[..], [done] if done.tag == 1 && done.result.is_ok()));
    assert_eq!(ch.in_flight(), 0);
}

/// A leg that has a descriptor, which never tells anything, and ends what it has at a poll.
#[derive(Debug)]
struct Polled(DeviceInfo);

struct PolledChannel {
    held: Vec<(u64, Op)>,
    ends: (std::io::PipeReader, std::io::PipeWriter),
}

impl BlockDevice for Polled {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(PolledChannel {
            held: Vec::new(),
            ends: std::io::pipe().unwrap(),
        }))
    }
}

impl IoChannel for PolledChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.held.push((tag, op));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let n = self.held.len();
        let held = self.held.drain(..);
        out.extend(held.map(|(tag, op)| Completion {
            tag,
            op,
            result: Ok(()),
        }));
        n
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.held.len()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ends.0.as_fd())
    }
}

/// A wait passes what was submitted to every leg, and does not sleep over what it finds there.
#[test]
fn a_wait_for_several_legs_finds_what_has_ended() {
    let leg = |n: u32| -> Arc<dyn BlockDevice> {
        Arc::new(Polled(DeviceInfo::new(&format!("leg{n}"), "test", 512, 64)))
    };
    let raid = Raid0::new("R", vec![leg(0), leg(1)], 4, None).unwrap();
    let mut ch = raid.open_channel().unwrap();
    ch.submit(1, Op::Flush).unwrap();
    let start = Instant::now();
    ch.wait(Duration::from_secs(60)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(30));
    let mut out = Vec::new();
    ch.poll(&mut out);
    assert!(matches!(&out[..], [done] if done.tag == 1 && done.result.is_ok()));
}
