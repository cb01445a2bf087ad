//! The parts of a file that the device has accepted and may still have in a volatile cache.
//!
//! Byte ranges are recorded with the sequences of the writes that a flush has to cover before the
//! range is durable. A range is removed when a flush has covered it, when it is written again (the
//! new write replaces it) or when the file is truncated below it. So after a failed flush exactly
//! those bytes are in doubt that nobody has supplied since.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

/// Sequence numbers of writes.
pub(crate) type Seqs = RangeInclusive<u64>;

/// The unflushed ranges of a file; see the module.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    /// The ranges by their beginnings; they are disjoint.
    ranges: BTreeMap<u64, (u64, Seqs)>,
}

impl Unflushed {
    /// Records that the user supplied `range` and that it was written with the sequence `seq`. The
    /// sequences up to `doubtful` may be in doubt.
    pub fn written(&mut self, range: Range<u64>, seq: u64, doubtful: u64) {
        if range.is_empty() {
            return;
        }
        self.cut(range.clone());
        let mut start = range.start;
        let mut seqs = seq..=seq;
        // An appending writer extends one range, but not one that may be in doubt: the doubt is of
        // those bytes only.
        if let Some((from, (end, before))) = self.ranges.range(..range.start).next_back()
            && *end == range.start
            && *before.start() > doubtful
        {
            seqs = (*before.start()).min(seq)..=(*before.end()).max(seq);
            start = *from;
        }
        self.ranges.insert(start, (range.end, seqs));
    }

    /// Records that `range` was written with the sequence `seq`, with bytes that may have been read
    /// from the device: bytes in doubt stay so.
    pub fn rewritten(&mut self, range: Range<u64>, seq: u64) {
        for (part, seqs) in self.take(range.clone()) {
            let seqs = *seqs.start()..=(*seqs.end()).max(seq);
            self.ranges.insert(part.start, (part.end, seqs));
        }
        let mut at = range.start;
        let known: Vec<Range<u64>> = self.inside(&range);
        for part in known {
            if at < part.start {
                self.ranges.insert(at, (part.start, seq..=seq));
            }
            at = part.end;
        }
        if at < range.end {
            self.ranges.insert(at, (range.end, seq..=seq));
        }
    }

    /// Records that `range` is durable, or no longer exists.
    pub fn cut(&mut self, range: Range<u64>) {
        self.take(range);
    }

    /// Records that a flush has covered the sequences up to `upto`.
    pub fn flushed(&mut self, upto: u64) {
        self.ranges.retain(|_, (_, seqs)| *seqs.end() > upto);
        for (_, seqs) in self.ranges.values_mut() {
            *seqs = (*seqs.start()).max(upto + 1)..=*seqs.end();
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Returns all ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, Seqs)> + '_ {
        self.ranges
            .iter()
            .map(|(start, (end, seqs))| (*start..*end, seqs.clone()))
    }

    fn inside(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let inside = self.ranges.range(range.start..range.end);
        inside.map(|(start, (end, _))| *start..*end).collect()
    }

    /// Removes the ranges in `range`, and returns them.
    fn take(&mut self, range: Range<u64>) -> Vec<(Range<u64>, Seqs)> {
        let before = self.ranges.range(..range.start).next_back();
        let first = before.filter(|(_, (end, _))| *end > range.start);
        let mut starts: Vec<u64> = first.map(|(start, _)| *start).into_iter().collect();
        if range.start < range.end {
            starts.extend(self.ranges.range(range.start..range.end).map(|(s, _)| *s));
        }
        let mut taken = Vec::with_capacity(starts.len());
        for start in starts {
            let Some((end, seqs)) = self.ranges.remove(&start) else {
                continue;
            };
            if start < range.start {
                self.ranges.insert(start, (range.start, seqs.clone()));
            }
            if end > range.end {
                self.ranges.insert(range.end, (end, seqs.clone()));
            }
            taken.push((start.max(range.start)..end.min(range.end), seqs));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(u: &Unflushed) -> Vec<(Range<u64>, Seqs)> {
        u.iter().collect()
    }

    #[test]
    fn appended_ranges_become_one() {
        let mut u = Unflushed::default();
        u.written(0..100, 1, 0);
        u.written(100..300, 2, 0);
        u.written(300..300, 3, 0);
        assert_eq!(list(&u), [(0..300, 1..=2)]);
        u.flushed(1);
        assert_eq!(list(&u), [(0..300, 2..=2)]);
        u.flushed(2);
        assert_eq!(list(&u), []);
    }

    #[test]
    fn what_is_written_once_more_takes_the_place_of_the_old() {
        let mut u = Unflushed::default();
        u.written(0..1000, 1, 0);
        u.written(200..300, 5, 0);
        assert_eq!(
            list(&u),
            [(0..300, 1..=5), (300..1000, 1..=1)],
            "one range with both sequences says no less than two"
        );
        u.cut(250..u64::MAX);
        assert_eq!(list(&u), [(0..250, 1..=5)]);
        u.written(0..250, 6, 0);
        assert_eq!(list(&u), [(0..250, 6..=6)]);
        u.cut(0..u64::MAX);
        assert_eq!(list(&u), []);
    }

    #[test]
    fn what_follows_bytes_in_doubt_is_a_range_of_its_own() {
        let mut u = Unflushed::default();
        u.written(0..100, 1, 0);
        u.written(100..200, 3, 2);
        u.written(200..300, 4, 2);
        assert_eq!(list(&u), [(0..100, 1..=1), (100..300, 3..=4)]);
    }

    #[test]
    fn bytes_that_were_read_back_stay_in_doubt() {
        let mut u = Unflushed::default();
        u.written(10..20, 1, 0);
        u.rewritten(0..30, 4);
        assert_eq!(list(&u), [(0..10, 4..=4), (10..20, 1..=4), (20..30, 4..=4)]);
        u.rewritten(15..18, 5);
        assert_eq!(list(&u)[2], (15..18, 1..=5));
        u.flushed(3);
        assert_eq!(list(&u)[1], (10..15, 4..=4));
    }
}
