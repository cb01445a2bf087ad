//! Tests of every I/O command, on every namespace.

use pumice_io::dma::{DmaBuf, DmaSlice};
use pumice_nvme::{IoErrorKind, Op, SubmitError};

use super::{Bench, Entry, Outcome, check, fail, good, one, pattern, read, same, skip, write};

pub(super) const TESTS: &[Entry] = &[
    ("write_read", write_read),
    ("last_block", last_block),
    ("large_transfers_split", large),
    ("boundary_split", boundary),
    ("offsets_in_a_page", offsets),
    ("vectored", vectored),
    ("vectored_small_pieces", vectored_small),
    ("fua_and_flush", fua),
    ("write_zeroes", write_zeroes),
    ("deallocate", deallocate),
    ("compare", compare),
    ("verify", verify),
    ("copy", copy),
    ("refused_io", refused),
];

fn write_read(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        for (lba, blocks) in [(0, 1), (1, 1), (2, 7), (9, 16), (100, 3)] {
            write(
                &mut q,
                &ns,
                lba,
                pattern(&ns, lba, blocks, b.seed)?.freeze(),
                false,
            )?;
        }
        for (lba, blocks) in [(0, 1), (1, 1), (2, 7), (9, 16), (100, 3), (0, 25)] {
            let got = read(&mut q, &ns, lba, blocks)?;
            same(
                &format!("block {lba}"),
                &got,
                &pattern(&ns, lba, blocks, b.seed)?,
            )?;
        }
    }
    Ok(())
}

fn last_block(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        let lba = ns.num_blocks() - 2;
        write(
            &mut q,
            &ns,
            lba,
            pattern(&ns, lba, 2, b.seed)?.freeze(),
            false,
        )?;
        same(
            "the end",
            &read(&mut q, &ns, lba, 2)?,
            &pattern(&ns, lba, 2, b.seed)?,
        )?;
    }
    Ok(())
}

fn large(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(4)?;
        let most = b.controller.transfer_bytes()? / ns.block_size() as usize;
        // The I/O has more parts than the queue has entries, and a remainder.
        for blocks in [most, most + 1, 3 * most + 1, 7 * most + 3] {
            let bytes = blocks as u64 * u64::from(ns.block_size());
            if blocks as u64 + 5 > ns.num_blocks() || bytes > 16 << 20 {
                continue;
            }
            let data = pattern(&ns, 5, blocks, b.seed ^ blocks as u64)?.freeze();
            write(&mut q, &ns, 5, data.clone(), false)?;
            same(
                &format!("{blocks} blocks"),
                &read(&mut q, &ns, 5, blocks)?,
                &data,
            )?;
        }
        check(q.in_flight() == 0, || "something is left".into())?;
    }
    Ok(())
}

fn boundary(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b.namespaces()? {
        let Some(boundary) = ns.limits().data.boundary_blocks else {
            continue;
        };
        let boundary = u64::from(boundary.get());
        any = true;
        let mut q = b.queue(8)?;
        let blocks = usize::try_from(boundary).unwrap_or(1) + 2;
        let before = q.stats().commands;
        let data = pattern(&ns, boundary - 1, blocks, b.seed)?.freeze();
        write(&mut q, &ns, boundary - 1, data.clone(), false)?;
        let commands = q.stats().commands - before;
        check(commands >= 3, || {
            format!("{commands} commands over two boundaries")
        })?;
        same(
            "over boundaries",
            &read(&mut q, &ns, boundary - 1, blocks)?,
            &data,
        )?;
    }
    if any {
        Ok(())
    } else {
        skip("no namespace has an optimal I/O boundary")
    }
}

fn offsets(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        let size = ns.block_size() as usize;
        let len = 40 * 1024 / size * size;
        for offset in [0usize, 4, 512, 516, 2048, 4092] {
            let mut whole = DmaBuf::zeroed(64 << 10)?;
            let data = pattern(&ns, 3, len / size, b.seed + offset as u64)?;
            whole[offset..offset + len].copy_from_slice(&data);
            let part = whole.freeze().slice(offset..offset + len);
            write(&mut q, &ns, 3, part, false)?;
            let got = read(&mut q, &ns, 3, len / size)?;
            same(&format!("written from offset {offset}"), &got, &data)?;
        }
    }
    Ok(())
}

fn vectored(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        let size = ns.block_size() as usize;
        let lens = [4096, 8192, 4096, 65_536, 12_288];
        let total: usize = lens.iter().sum();
        let whole = pattern(&ns, 11, total / size, b.seed)?;
        let mut at = 0;
        let mut data = Vec::new();
        for len in lens {
            data.push(DmaBuf::copy_from(&whole[at..at + len])?.freeze());
            at += len;
        }
        good(
            &mut q,
            &ns,
            Op::WriteV {
                lba: 11,
                data,
                fua: false,
            },
        )?;
        same("gathered", &read(&mut q, &ns, 11, total / size)?, &whole)?;
        let bufs = lens
            .iter()
            .rev()
            .map(|l| DmaBuf::zeroed(*l))
            .collect::<Result<Vec<_>, _>>()?;
        let Op::ReadV { bufs, .. } = good(&mut q, &ns, Op::ReadV { lba: 11, bufs })? else {
            return fail("a read came back as something else");
        };
        let got: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        same("scattered", &got, &whole)?;
    }
    Ok(())
}

fn vectored_small(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        let size = ns.block_size() as usize;
        // Single blocks, at offsets in their pages that no PRP list allows.
        let count = 70;
        let whole = pattern(&ns, 40, count, b.seed)?;
        let mut data = Vec::new();
        for block in whole.chunks_exact(size) {
            let mut buf = DmaBuf::zeroed(2 * size)?;
            buf[512..512 + size].copy_from_slice(block);
            data.push(buf.freeze().slice(512..512 + size));
        }
        good(
            &mut q,
            &ns,
            Op::WriteV {
                lba: 40,
                data,
                fua: false,
            },
        )?;
        same("gathered blocks", &read(&mut q, &ns, 40, count)?, &whole)?;
    }
    Ok(())
}

fn fua(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        write(&mut q, &ns, 1, pattern(&ns, 1, 2, b.seed)?.freeze(), true)?;
        good(&mut q, &ns, Op::Flush)?;
        same(
            "fua",
            &read(&mut q, &ns, 1, 2)?,
            &pattern(&ns, 1, 2, b.seed)?,
        )?;
    }
    Ok(())
}

fn write_zeroes(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b
        .namespaces()?
        .into_iter()
        .filter(|n| n.supports().write_zeroes)
    {
        any = true;
        let mut q = b.queue(8)?;
        write(&mut q, &ns, 0, pattern(&ns, 0, 40, b.seed)?.freeze(), false)?;
        let io = Op::WriteZeroes {
            lba: 4,
            len_blocks: 30,
            fua: false,
        };
        good(&mut q, &ns, io)?;
        let mut want = pattern(&ns, 0, 40, b.seed)?;
        let size = ns.block_size() as usize;
        want[4 * size..34 * size].fill(0);
        same("zeroes", &read(&mut q, &ns, 0, 40)?, &want)?;
        // The range is longer than one command allows.
        let blocks = ns.num_blocks().min(70_000);
        if blocks > 65_536 {
            let io = Op::WriteZeroes {
                lba: 0,
                len_blocks: blocks,
                fua: false,
            };
            good(&mut q, &ns, io)?;
            let end = read(&mut q, &ns, blocks - 3, 3)?;
            check(end.iter().all(|b| *b == 0), || {
                "the end of a long range".into()
            })?;
        }
    }
    if any {
        Ok(())
    } else {
        skip("write zeroes is not supported")
    }
}

fn deallocate(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b
        .namespaces()?
        .into_iter()
        .filter(|n| n.supports().deallocate)
    {
        any = true;
        let mut q = b.queue(8)?;
        write(
            &mut q,
            &ns,
            0,
            pattern(&ns, 0, 256, b.seed)?.freeze(),
            false,
        )?;
        for lba in (0..200).step_by(2) {
            let len_blocks = 1;
            good(&mut q, &ns, Op::Unmap { lba, len_blocks })?;
        }
        let got = read(&mut q, &ns, 0, 256)?;
        let want = pattern(&ns, 0, 256, b.seed)?;
        let size = ns.block_size() as usize;
        for n in 0..256 {
            let (g, w) = (
                &got[n * size..(n + 1) * size],
                &want[n * size..(n + 1) * size],
            );
            if n < 200 && n % 2 == 0 {
                let gone = g.iter().all(|b| *b == 0) || g == w || g.iter().all(|b| *b == 0xff);
                check(gone, || {
                    format!("deallocated block {n} shows foreign bytes")
                })?;
            } else {
                same(&format!("block {n} beside deallocated ones"), g, w)?;
            }
        }
    }
    if any {
        Ok(())
    } else {
        skip("dataset management is not supported")
    }
}

fn compare(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b.namespaces()?.into_iter().filter(|n| n.supports().compare) {
        any = true;
        let mut q = b.queue(8)?;
        let data = pattern(&ns, 8, 8, b.seed)?.freeze();
        write(&mut q, &ns, 8, data.clone(), false)?;
        good(&mut q, &ns, Op::Compare { lba: 8, data })?;
        let mut other = pattern(&ns, 8, 8, b.seed)?;
        let last = other.len() - 1;
        other[last] ^= 1;
        let done = one(
            &mut q,
            &ns,
            Op::Compare {
                lba: 8,
                data: other.freeze(),
            },
        )?;
        match done.result {
            Err(e) if matches!(e.kind, IoErrorKind::Miscompare { .. }) => {}
            other => return fail(format!("a difference was not reported: {other:?}")),
        }
    }
    if any {
        Ok(())
    } else {
        skip("compare is not supported")
    }
}

fn verify(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b.namespaces()?.into_iter().filter(|n| n.supports().verify) {
        any = true;
        let mut q = b.queue(8)?;
        let (lba, len_blocks) = (0, ns.num_blocks().min(1000));
        good(&mut q, &ns, Op::Verify { lba, len_blocks })?;
    }
    if any {
        Ok(())
    } else {
        skip("verify is not supported")
    }
}

fn copy(b: &Bench) -> Outcome {
    let mut any = false;
    for ns in b.namespaces()?.into_iter().filter(|n| n.supports().copy) {
        any = true;
        let mut q = b.queue(8)?;
        write(&mut q, &ns, 0, pattern(&ns, 0, 64, b.seed)?.freeze(), false)?;
        // One range, and more than one command may hold.
        for (dst_lba, count) in [(500, 2), (600, 64)] {
            let io = Op::Copy {
                src_lba: 0,
                dst_lba,
                len_blocks: count as u64,
            };
            good(&mut q, &ns, io)?;
            let want = pattern(&ns, 0, count, b.seed)?;
            let got = read(&mut q, &ns, dst_lba, count)?;
            same(&format!("{count} copied blocks"), &got, &want)?;
        }
    }
    if any {
        Ok(())
    } else {
        skip("copy is not supported")
    }
}

fn refused(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(8)?;
        let size = ns.block_size() as usize;
        let end = ns.num_blocks();
        let buf = |n: usize| DmaBuf::zeroed(n).map(DmaSlice::from);
        let cases: Vec<(Op, IoErrorKind)> = vec![
            (
                Op::Write {
                    lba: end,
                    data: buf(size)?,
                    fua: false,
                },
                IoErrorKind::OutOfRange,
            ),
            (
                Op::Read {
                    lba: end - 1,
                    buf: DmaBuf::zeroed(2 * size)?,
                },
                IoErrorKind::OutOfRange,
            ),
            (
                Op::Read {
                    lba: u64::MAX,
                    buf: DmaBuf::zeroed(size)?,
                },
                IoErrorKind::OutOfRange,
            ),
            (
                Op::Write {
                    lba: 0,
                    data: buf(size - 1)?,
                    fua: false,
                },
                IoErrorKind::Misaligned,
            ),
            (
                Op::Write {
                    lba: 0,
                    data: buf(2 * size)?.slice(1..1 + size),
                    fua: false,
                },
                IoErrorKind::Misaligned,
            ),
            (
                Op::ReadV {
                    lba: 0,
                    bufs: vec![],
                },
                IoErrorKind::Misaligned,
            ),
        ];
        for (io, kind) in cases {
            let text = format!("{io:?}");
            match q.submit(&ns, 1, io) {
                Err(SubmitError::Refused(_, e)) if e.kind == kind => {}
                other => return fail(format!("{text}: {other:?}")),
            }
        }
        check(q.in_flight() == 0, || "a refused I/O is in flight".into())?;
    }
    Ok(())
}
