//! Limits of the length of one operation.

use std::num::NonZeroU32;
use std::ops::Range;

/// The most blocks of one read, write or compare, and the boundary that it should not cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Most blocks of one operation; `None`: any number.
    pub max_blocks: Option<NonZeroU32>,
    /// An operation that crosses a multiple of this many blocks takes longer; `None`: there is no
    /// such boundary.
    pub boundary_blocks: Option<NonZeroU32>,
}

impl Limits {
    /// Makes limits from fields in which 0 stands for none, as in NVMe and SPDK.
    pub fn new(max_blocks: u32, boundary_blocks: u32) -> Limits {
        Limits {
            max_blocks: NonZeroU32::new(max_blocks),
            boundary_blocks: NonZeroU32::new(boundary_blocks),
        }
    }

    /// Returns how many of `blocks` one operation may have.
    #[inline]
    pub fn at_most(self, blocks: u64) -> u64 {
        match self.max_blocks {
            None => blocks,
            Some(max) => blocks.min(max.get().into()),
        }
    }

    /// Returns how many of the blocks from `lba` on the first operation has when they are cut at
    /// the limits: at least one, unless there are none.
    #[inline]
    pub fn first(self, lba: u64, blocks: u64) -> u64 {
        let most = self.at_most(blocks);
        match self.boundary_blocks {
            None => most,
            Some(boundary) => {
                let boundary = u64::from(boundary.get());
                most.min(boundary - lba % boundary)
            }
        }
    }

    /// Divides `range` into the ranges of its operations.
    pub fn pieces(self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let Range { mut start, end } = range;
        std::iter::from_fn(move || {
            let blocks = self.first(start, end.saturating_sub(start));
            let piece = start..start + blocks;
            start = piece.end;
            (blocks > 0).then_some(piece)
        })
    }

    /// Returns the limits of what several devices do together: the smaller of each.
    #[must_use]
    pub fn and(self, other: Limits) -> Limits {
        let shorter = |a: Option<NonZeroU32>, b: Option<NonZeroU32>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Limits {
            max_blocks: shorter(self.max_blocks, other.max_blocks),
            boundary_blocks: shorter(self.boundary_blocks, other.boundary_blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(limits: Limits, range: Range<u64>) -> Vec<Range<u64>> {
        limits.pieces(range).collect()
    }

    #[test]
    fn ranges_are_cut_where_they_must_be() {
        let whole = 3..1000;
        assert_eq!(pieces(Limits::new(0, 0), whole.clone()), [whole]);
        assert_eq!(pieces(Limits::new(4, 0), 3..10), [3..7, 7..10]);
        assert_eq!(pieces(Limits::new(0, 8), 3..20), [3..8, 8..16, 16..20]);
        assert_eq!(pieces(Limits::new(5, 8), 3..14), [3..8, 8..13, 13..14]);
        assert_eq!(pieces(Limits::new(4, 8), 8..8), []);
        let end = u64::MAX;
        assert_eq!(
            pieces(Limits::new(2, 1), end - 2..end),
            [end - 2..end - 1, end - 1..end]
        );
    }

    #[test]
    fn the_shorter_limit_counts() {
        let both = Limits::new(7, 0).and(Limits::new(9, 16));
        assert_eq!(both, Limits::new(7, 16));
        assert_eq!((both.at_most(8), both.at_most(6)), (7, 6));
        assert_eq!(Limits::default().at_most(u64::MAX), u64::MAX);
    }
}
