//! The division of an operation among the legs, and the way back of what they have read.

use pumice_io::Op;

use crate::{DmaBuf, DmaSlice};

/// Most buffers of one operation of a leg: what a file takes. A write of many buffers has more on a leg, where strips divide
/// them.
pub(super) const BUFFERS_MAX: usize = 1024;

/// The part of an operation that lies on one leg.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Share {
    pub lba: u64,
    pub len_blocks: u64,
    /// Offset in the operation and length, in blocks, of each strip or part of a strip.
    pub parts: Vec<(u64, u64)>,
}

/// Divides `len` blocks from `lba` among `n` legs.
pub(super) fn shares(lba: u64, len: u64, strip: u64, n: u64, with_parts: bool) -> Vec<Share> {
    let mut shares = vec![Share::default(); usize::try_from(n).unwrap_or(0)];
    let (first, last) = (lba / strip, (lba + len - 1) / strip);
    if with_parts {
        let mut at = lba;
        while at < lba + len {
            let s = at / strip;
            let end = ((s + 1) * strip).min(lba + len);
            let share = &mut shares[usize::try_from(s % n).unwrap_or(0)];
            if share.len_blocks == 0 {
                share.lba = s / n * strip + at % strip;
            }
            share.len_blocks += end - at;
            share.parts.push((at - lba, end - at));
            at = end;
        }
        return shares;
    }
    // Without the parts, this uses arithmetic, since an unmap may cover millions of strips.
    for (leg, share) in (0..n).zip(&mut shares) {
        // The first and last strip in [first, last] that lie on this leg.
        let low = first + (leg + n - first % n) % n;
        if low > last {
            continue;
        }
        let high = last - (last % n + n - leg) % n;
        let start = low / n * strip + if low == first { lba % strip } else { 0 };
        let end = if high == last {
            (lba + len - 1) % strip + 1
        } else {
            strip
        };
        share.lba = start;
        share.len_blocks = high / n * strip + end - start;
    }
    shares
}

/// The parts of a child, and its operation.
type PartsAndOp = (Vec<(usize, usize)>, Op);

/// Makes writes of consecutive pieces, of whole blocks, none with more of them than a leg takes.
fn divided(mut lba: u64, pieces: &[DmaSlice], fua: bool, bs: u64) -> Vec<PartsAndOp> {
    let writes = pieces.chunks(BUFFERS_MAX).map(|pieces| {
        let write = Op::WriteV {
            lba,
            data: pieces.to_vec(),
            fua,
        };
        lba += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>() / bs;
        (Vec::new(), write)
    });
    writes.collect()
}

/// Makes the operations of one leg for its share of `op`.
pub(super) fn child_ops(op: &Op, share: &Share, bs: u64) -> Result<Vec<PartsAndOp>, String> {
    let bytes = |(at, n): &(u64, u64)| {
        let usize_of = |blocks: u64| usize::try_from(blocks * bs).unwrap_or(usize::MAX);
        (usize_of(*at), usize_of(*n))
    };
    let parts: Vec<(usize, usize)> = share.parts.iter().map(bytes).collect();
    let Share {
        lba, len_blocks, ..
    } = *share;
    let one = |parts, op| Ok(vec![(parts, op)]);
    match op {
        Op::Read { .. } | Op::ReadV { .. } => {
            let bufs: Result<Vec<_>, _> = parts.iter().map(|(_, len)| DmaBuf::new(*len)).collect();
            one(
                parts,
                Op::ReadV {
                    lba,
                    bufs: bufs.map_err(|e| e.to_string())?,
                },
            )
        }
        Op::Write { data, fua, .. } => {
            let data = parts
                .iter()
                .map(|(at, len)| data.slice(*at..at + len))
                .collect();
            one(
                parts,
                Op::WriteV {
                    lba,
                    data,
                    fua: *fua,
                },
            )
        }
        Op::WriteV { data, fua, .. } => {
            let pieces = parts.iter().flat_map(|(at, len)| pick(data, *at, *len));
            Ok(divided(lba, &pieces.collect::<Vec<_>>(), *fua, bs))
        }
        Op::WriteZeroes { fua, .. } => one(
            parts,
            Op::WriteZeroes {
                lba,
                len_blocks,
                fua: *fua,
            },
        ),
        Op::Unmap { .. } => one(parts, Op::Unmap { lba, len_blocks }),
        Op::Compare { data, .. } => {
            // One operation per strip, because a compare takes its data in one part.
            let mut lba = lba;
            let compares = parts.into_iter().map(|(at, len)| {
                let compare = Op::Compare {
                    lba,
                    data: data.slice(at..at + len),
                };
                lba += len as u64 / bs;
                (vec![(at, len)], compare)
            });
            Ok(compares.collect())
        }
        op => Err(format!("{} over several strips", op.kind())),
    }
}

/// Returns the bytes `[at, at + len)` of `data` as slices.
fn pick(data: &[DmaSlice], at: usize, len: usize) -> Vec<DmaSlice> {
    let mut picked = Vec::new();
    let mut start = 0;
    for slice in data {
        let end = start + slice.len();
        let (from, to) = (at.max(start), (at + len).min(end));
        if from < to {
            picked.push(slice.slice(from - start..to - start));
        }
        start = end;
    }
    picked
}

/// Copies data that a leg has read to its place in the whole.
pub(super) fn copy_back(whole: &mut Op, child: &Op, parts: &[(usize, usize)]) {
    let Op::ReadV { bufs, .. } = child else {
        return;
    };
    for (buf, (at, _)) in bufs.iter().zip(parts) {
        match whole {
            Op::Read { buf: target, .. } => target[*at..at + buf.len()].copy_from_slice(buf),
            Op::ReadV { bufs: targets, .. } => {
                let mut start = 0;
                for target in targets {
                    let end = start + target.len();
                    let (from, to) = ((*at).max(start), (at + buf.len()).min(end));
                    if from < to {
                        target[from - start..to - start].copy_from_slice(&buf[from - at..to - at]);
                    }
                    start = end;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_by_arithmetic_and_by_parts_agree() {
        for n in 1..5 {
            for strip in [1, 4, 8] {
                for lba in 0..40 {
                    for len in 1..60 {
                        let parts = shares(lba, len, strip, n, true);
                        let whole = shares(lba, len, strip, n, false);
                        let bare = parts.iter().map(|s| (s.lba, s.len_blocks));
                        assert!(
                            bare.eq(whole.iter().map(|s| (s.lba, s.len_blocks))),
                            "n {n} strip {strip} lba {lba} len {len}: {parts:?} {whole:?}"
                        );
                        assert_eq!(parts.iter().map(|s| s.len_blocks).sum::<u64>(), len);
                    }
                }
            }
        }
    }
}
