//! The rules of the contract, one function for each.

use std::time::{Duration, Instant};

use pumice_bdev::{
    BlockDevice, CompareAndWrite, DmaBuf, DmaSlice, IoErrorKind, Op, OpKind, SubmitError,
    ZoneAction,
};

use super::driver::{Driver, pattern};

fn bs(dev: &dyn BlockDevice) -> usize {
    dev.info().block_size as usize
}

/// Returns the lengths in blocks to test, within the device and its limits.
fn lengths(dev: &dyn BlockDevice) -> Vec<u64> {
    let info = dev.info();
    let max = info.limits.at_most(u64::MAX);
    let boundary = info.limits.boundary_blocks.map_or(0, |n| n.get().into());
    let page = (4096 / u64::from(info.block_size)).max(1);
    let mega = (1 << 20) / u64::from(info.block_size);
    let mut lengths = vec![
        1,
        2,
        3,
        page,
        page + 1,
        16 * page,
        boundary,
        boundary + 1,
        mega,
    ];
    // The longest that the device accepts, if that is not too much for a test.
    lengths.extend(Some(max).filter(|n| *n <= 16 * mega));
    lengths.retain(|n| *n > 0 && *n <= max && *n <= info.num_blocks);
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

fn blocks(dev: &dyn BlockDevice, n: u64) -> usize {
    usize::try_from(n).expect("a length in blocks") * bs(dev)
}

pub(super) fn info(dev: &dyn BlockDevice) {
    let info = dev.info();
    assert!(!info.name.is_empty(), "a device has a name");
    assert!(
        info.block_size.is_power_of_two() && info.block_size >= 512,
        "block size {}",
        info.block_size
    );
    assert!(info.num_blocks > 0, "a device has blocks");
    assert!(
        info.num_blocks
            .checked_mul(u64::from(info.block_size))
            .is_some(),
        "capacity"
    );
    assert!(info.atomic_unit_blocks > 0, "at least one block is atomic");
    assert!(
        info.buf_align.is_power_of_two() && info.buf_align <= 4096,
        "{}",
        info.buf_align
    );
    assert!(info.ops.has(OpKind::Read), "a device can be read");
}

/// A device refuses at once, with an error that names it, what it cannot do.
pub(super) fn refusals(dev: &dyn BlockDevice) {
    let info = dev.info();
    let mut d = Driver::new(dev);
    let bs = bs(dev);
    let read = |lba, len| Op::Read {
        lba,
        buf: DmaBuf::new(len).expect("DMA memory"),
    };
    let out = IoErrorKind::OutOfRange;
    let mut wrong = vec![
        (read(info.num_blocks, bs), out),
        (read(info.num_blocks - 1, 2 * bs), out),
        (read(u64::MAX, bs), out),
        (read(0, bs + 1), IoErrorKind::Misaligned),
        (read(0, bs / 2), IoErrorKind::Misaligned),
        (
            Op::ReadV {
                lba: 0,
                bufs: Vec::new(),
            },
            IoErrorKind::Misaligned,
        ),
    ];
    if info.ops.has(OpKind::Write) {
        let empty = pattern(bs, 1).slice(0..0);
        let write = |lba, data| Op::Write {
            lba,
            data,
            fua: false,
        };
        wrong.push((write(info.num_blocks, pattern(bs, 1)), out));
        wrong.push((write(0, empty), IoErrorKind::Misaligned));
        let parts = vec![pattern(bs, 1), pattern(bs + 1, 2)];
        let vector = Op::WriteV {
            lba: 0,
            data: parts,
            fua: false,
        };
        wrong.push((vector, IoErrorKind::Misaligned));
    }
    for (kind, op) in [
        (
            OpKind::WriteZeroes,
            Op::WriteZeroes {
                lba: 1,
                len_blocks: u64::MAX,
                fua: false,
            },
        ),
        (
            OpKind::Unmap,
            Op::Unmap {
                lba: info.num_blocks - 1,
                len_blocks: 2,
            },
        ),
    ] {
        if info.ops.has(kind) {
            wrong.push((op, out));
        }
    }
    let zone = Op::Zone {
        lba: 0,
        action: ZoneAction::Reset,
    };
    wrong.push((zone, IoErrorKind::Unsupported));
    let unsupported = [
        (
            OpKind::Unmap,
            Op::Unmap {
                lba: 0,
                len_blocks: 1,
            },
        ),
        (
            OpKind::Compare,
            Op::Compare {
                lba: 0,
                data: pattern(bs, 1),
            },
        ),
        (
            OpKind::Copy,
            Op::Copy {
                src_lba: 0,
                dst_lba: 1,
                len_blocks: 1,
            },
        ),
        (
            OpKind::Write,
            Op::Write {
                lba: 0,
                data: pattern(bs, 1),
                fua: false,
            },
        ),
        (OpKind::Abort, Op::Abort { tag: 0 }),
    ];
    let unsupported = unsupported
        .into_iter()
        .filter(|(kind, _)| !info.ops.has(*kind));
    wrong.extend(unsupported.map(|(_, op)| (op, IoErrorKind::Unsupported)));
    let longest = info.limits.at_most(u64::MAX);
    if longest < info.num_blocks && longest <= (16 << 20) / bs as u64 {
        let len = blocks(dev, longest) + bs;
        wrong.push((read(0, len), IoErrorKind::TooLong));
        if info.ops.has(OpKind::Write) {
            let data = vec![pattern(bs, 1), pattern(len - bs, 2)];
            let fua = info.ops.has(OpKind::Fua);
            let op = Op::WriteV { lba: 0, data, fua };
            wrong.push((op, IoErrorKind::TooLong));
        }
    }
    if info.ops.has(OpKind::CompareAndWrite) {
        let len = (info.atomic_unit_blocks as usize + 1) * bs;
        if (len / bs) as u64 <= info.num_blocks {
            let op = Op::CompareAndWrite(Box::new(CompareAndWrite {
                lba: 0,
                compare: pattern(len, 1),
                write: pattern(len, 1),
                fua: false,
            }));
            wrong.push((op, IoErrorKind::TooLong));
        }
    }
    if info.ops.has(OpKind::Write) && !info.ops.has(OpKind::Fua) {
        let op = Op::Write {
            lba: 0,
            data: pattern(bs, 1),
            fua: true,
        };
        wrong.push((op, IoErrorKind::Unsupported));
    }
    for (op, kind) in wrong {
        let text = format!("{op:?}");
        match d.submit(op) {
            Err(SubmitError::Refused(_, e)) => {
                assert_eq!(e.kind, kind, "{text}: {e}");
                assert!(
                    !e.device.is_empty() && e.to_string().starts_with(&e.device),
                    "{e}"
                );
            }
            other => panic!("{}: {text} should be refused: {other:?}", info.name),
        }
    }
}

/// Neither poll nor wait waits when nothing is in flight.
pub(super) fn idle(dev: &dyn BlockDevice) {
    let mut d = Driver::new(dev);
    let start = Instant::now();
    assert!(d.reap().is_empty());
    d.wait(Duration::from_secs(20));
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "wait with nothing in flight waits"
    );
}

/// Written data is read back, at both ends and at every length, and the neighbouring blocks stay as
/// they were.
pub(super) fn round_trips(dev: &dyn BlockDevice) {
    let info = dev.info();
    if !info.ops.has(OpKind::Write) {
        return;
    }
    let mut d = Driver::new(dev);
    for (i, n) in (0_u64..).zip(lengths(dev)) {
        let len = blocks(dev, n);
        for (j, lba) in [0, (info.num_blocks - n) / 2, info.num_blocks - n]
            .into_iter()
            .enumerate()
        {
            let data = pattern(len, i * 3 + j as u64 + 1);
            let fua = info.ops.has(OpKind::Fua) && i % 2 == 0;
            let before = (lba > 0).then(|| d.read(lba - 1, bs(dev)).to_vec());
            let after = (lba + n < info.num_blocks).then(|| d.read(lba + n, bs(dev)).to_vec());
            d.must(Op::Write {
                lba,
                data: data.clone(),
                fua,
            });
            if !info.keeps_data {
                continue;
            }
            let back = d.read(lba, len);
            assert!(
                back[..] == data[..],
                "{}: {n} blocks at {lba} read back",
                info.name
            );
            if let Some(before) = before {
                assert!(
                    d.read(lba - 1, bs(dev))[..] == before[..],
                    "block before {lba}"
                );
            }
            if let Some(after) = after {
                assert!(
                    d.read(lba + n, bs(dev))[..] == after[..],
                    "block after {lba} + {n}"
                );
            }
        }
    }
    if info.ops.has(OpKind::Flush) {
        d.must(Op::Flush);
    }
}

/// A vectored operation has the effect of its parts, one after the other.
pub(super) fn vectors(dev: &dyn BlockDevice) {
    let info = dev.info();
    if !info.ops.has(OpKind::Write) || info.num_blocks < 16 {
        return;
    }
    let bs = bs(dev);
    let mut d = Driver::new(dev);
    let whole = pattern(7 * bs, 99);
    let parts: Vec<DmaSlice> = [0..1, 1..4, 4..7]
        .map(|r: std::ops::Range<usize>| whole.slice(r.start * bs..r.end * bs))
        .into();
    d.must(Op::WriteV {
        lba: 3,
        data: parts,
        fua: false,
    });
    let bufs = [2, 5]
        .map(|n| DmaBuf::zeroed(n * bs).expect("DMA memory"))
        .into();
    let Op::ReadV { bufs, .. } = d.must(Op::ReadV { lba: 3, bufs }) else {
        unreachable!()
    };
    if info.keeps_data {
        assert!(d.read(3, 7 * bs)[..] == whole[..], "a vectored write");
        assert!(
            bufs[0][..] == whole[..2 * bs],
            "a vectored read, first part"
        );
        assert!(
            bufs[1][..] == whole[2 * bs..],
            "a vectored read, second part"
        );
    }
}

/// Returns the blocks just before and just after a range.
fn neighbours(dev: &dyn BlockDevice, lba: u64, n: u64) -> impl Iterator<Item = u64> {
    let after = Some(lba + n).filter(|at| *at < dev.info().num_blocks);
    [lba.checked_sub(1), after].into_iter().flatten()
}

/// Zeroed blocks read as zeroes, and so do unmapped ones where the device says so.
pub(super) fn zeroes_and_unmap(dev: &dyn BlockDevice) {
    let info = dev.info();
    let bs = bs(dev);
    let mut d = Driver::new(dev);
    for kind in [OpKind::WriteZeroes, OpKind::Unmap] {
        if !info.ops.has(kind) || !info.ops.has(OpKind::Write) {
            continue;
        }
        for n in lengths(dev) {
            let lba = (info.num_blocks - n) / 2;
            let edge = pattern(bs, 5);
            for at in neighbours(dev, lba, n) {
                d.must(Op::Write {
                    lba: at,
                    data: edge.clone(),
                    fua: false,
                });
            }
            d.must(Op::Write {
                lba,
                data: pattern(blocks(dev, n), 6),
                fua: false,
            });
            let fua = info.ops.has(OpKind::Fua);
            d.must(match kind {
                OpKind::Unmap => Op::Unmap { lba, len_blocks: n },
                _ => Op::WriteZeroes {
                    lba,
                    len_blocks: n,
                    fua,
                },
            });
            if !info.keeps_data {
                continue;
            }
            if kind == OpKind::WriteZeroes || info.unmap_zeroes {
                let back = d.read(lba, blocks(dev, n));
                assert!(
                    back.iter().all(|b| *b == 0),
                    "{kind} of {n} blocks at {lba}"
                );
            }
            for at in neighbours(dev, lba, n) {
                assert!(
                    d.read(at, bs)[..] == edge[..],
                    "{kind}: neighbour {at} of {lba}+{n}"
                );
            }
        }
    }
}

pub(super) fn compares(dev: &dyn BlockDevice) {
    let info = dev.info();
    let bs = bs(dev);
    if !info.keeps_data || !info.ops.has(OpKind::Write) {
        return;
    }
    let mut d = Driver::new(dev);
    let data = pattern(2 * bs, 11);
    let other = {
        let mut buf = DmaBuf::copy_from(&data).expect("DMA memory");
        buf[bs + 9] ^= 1;
        buf.freeze()
    };
    if info.ops.has(OpKind::Compare) {
        d.must(Op::Write {
            lba: 2,
            data: data.clone(),
            fua: false,
        });
        d.must(Op::Compare {
            lba: 2,
            data: data.clone(),
        });
        let e = d
            .run(Op::Compare {
                lba: 2,
                data: other,
            })
            .1
            .expect_err("different data");
        assert!(matches!(e.kind, IoErrorKind::Miscompare { .. }), "{e}");
    }
    if info.ops.has(OpKind::CompareAndWrite) {
        let swap = |compare, write| {
            Op::CompareAndWrite(Box::new(CompareAndWrite {
                lba: 2,
                compare,
                write,
                fua: false,
            }))
        };
        let (a, b) = (data.slice(0..bs), data.slice(bs..2 * bs));
        d.must(Op::Write {
            lba: 2,
            data: a.clone(),
            fua: false,
        });
        let e = d
            .run(swap(b.clone(), b.clone()))
            .1
            .expect_err("different data");
        assert!(matches!(e.kind, IoErrorKind::Miscompare { .. }), "{e}");
        assert!(d.read(2, bs)[..] == a[..], "a miscompare writes nothing");
        d.must(swap(a, b.clone()));
        assert!(d.read(2, bs)[..] == b[..], "a match writes");
    }
}

pub(super) fn copies(dev: &dyn BlockDevice) {
    let info = dev.info();
    if !info.ops.has(OpKind::Copy) || !info.keeps_data || info.num_blocks < 64 {
        return;
    }
    let len = 8 * bs(dev);
    let mut d = Driver::new(dev);
    let data = pattern(len, 21);
    d.must(Op::Write {
        lba: 1,
        data: data.clone(),
        fua: false,
    });
    d.must(Op::Copy {
        src_lba: 1,
        dst_lba: 40,
        len_blocks: 8,
    });
    assert!(d.read(40, len)[..] == data[..], "a copy");
    let overlapping = Op::Copy {
        src_lba: 1,
        dst_lba: 5,
        len_blocks: 8,
    };
    assert!(
        d.run(overlapping).1.is_err(),
        "a copy onto itself is refused"
    );
}

/// A full queue returns `Busy` with the operation, and accepts again after a poll.
pub(super) fn queue_full(dev: &dyn BlockDevice) {
    const MANY: u64 = 10_000;
    let info = dev.info();
    let mut d = Driver::new(dev);
    let mut submitted = 0_u64;
    let mut busy = false;
    while submitted < MANY && !busy {
        let buf = DmaBuf::new(bs(dev)).expect("DMA memory");
        match d.submit(Op::Read {
            lba: submitted % info.num_blocks,
            buf,
        }) {
            Ok(_) => submitted += 1,
            Err(SubmitError::Busy(_)) => busy = true,
            Err(SubmitError::Refused(_, e)) => panic!("{e}"),
        }
    }
    let done = d.drain();
    assert_eq!(
        done.len() as u64,
        submitted,
        "each operation completes once"
    );
    for c in done {
        c.result.unwrap_or_else(|e| panic!("{e}"));
    }
    d.read(0, bs(dev));
}

/// Operations around a reset or an abort end once each, and before it where it is a reset.
pub(super) fn reset_and_abort(dev: &dyn BlockDevice) {
    let info = dev.info();
    for kind in [OpKind::Reset, OpKind::Abort] {
        if !info.ops.has(kind) {
            continue;
        }
        let mut d = Driver::new(dev);
        let mut last = 0;
        for i in 0..16 {
            let buf = DmaBuf::new(bs(dev)).expect("DMA memory");
            match d.submit(Op::Read {
                lba: i % info.num_blocks,
                buf,
            }) {
                Ok(tag) => last = tag,
                Err(e) => panic!("{e}"),
            }
        }
        let op = if kind == OpKind::Reset {
            Op::Reset
        } else {
            Op::Abort { tag: last }
        };
        let tag = d.submit(op).unwrap_or_else(|e| panic!("{kind}: {e}"));
        let done = d.drain();
        assert_eq!(done.len(), 17, "{kind}: everything ends once");
        for c in &done {
            if let Err(e) = &c.result {
                assert_eq!(e.kind, IoErrorKind::Aborted, "{kind}: {e}");
                assert_ne!(c.tag, tag, "{kind} itself succeeds: {e}");
            }
        }
        if kind == OpKind::Reset {
            assert_eq!(done.last().map(|c| c.tag), Some(tag), "a reset ends last");
        }
        d.read(0, bs(dev));
    }
}

/// Two channels on two threads access the same device.
pub(super) fn two_channels(dev: &dyn BlockDevice) {
    let info = dev.info();
    if !info.ops.has(OpKind::Write) || info.num_blocks < 64 {
        return;
    }
    let half = info.num_blocks.min(4096) / 2;
    let bs = bs(dev);
    std::thread::scope(|scope| {
        for t in 0..2 {
            scope.spawn(move || {
                let mut d = Driver::new(dev);
                for i in 0..64 {
                    let lba = t * half + i % half;
                    let data = pattern(bs, lba + 1000);
                    d.must(Op::Write {
                        lba,
                        data: data.clone(),
                        fua: false,
                    });
                    if info.keeps_data {
                        assert!(d.read(lba, bs)[..] == data[..], "thread {t}, block {lba}");
                    }
                }
            });
        }
    });
    if info.keeps_data {
        let (mut a, mut b) = (Driver::new(dev), Driver::new(dev));
        let data = pattern(bs, 31);
        a.must(Op::Write {
            lba: 9,
            data: data.clone(),
            fua: false,
        });
        assert!(
            b.read(9, bs)[..] == data[..],
            "one channel's completed write on another"
        );
    }
}

/// A channel may be dropped with operations in flight.
pub(super) fn dropped_channel(dev: &dyn BlockDevice) {
    let info = dev.info();
    let mut d = Driver::new(dev);
    for i in 0..32 {
        let buf = DmaBuf::new(bs(dev)).expect("DMA memory");
        if d.submit(Op::Read {
            lba: i % info.num_blocks,
            buf,
        })
        .is_err()
        {
            break;
        }
    }
    drop(d);
    Driver::new(dev).read(0, bs(dev));
}
