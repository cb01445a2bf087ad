//! Bitmaps of used clusters and metadata pages.

use std::ops::Range;

/// A set of used numbers below `len`. It takes the lowest free one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
    len: u32,
    used: u32,
    /// No word before this one has a free bit.
    hint: usize,
}

impl Bitmap {
    pub fn new(len: u32) -> Bitmap {
        Bitmap {
            words: vec![0; (len as usize).div_ceil(64)],
            len,
            used: 0,
            hint: 0,
        }
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn used(&self) -> u32 {
        self.used
    }

    pub fn free(&self) -> u32 {
        self.len - self.used
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether the bit is used.
    pub fn is_set(&self, bit: u32) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        self.words[bit as usize / 64] >> (bit % 64) & 1 != 0
    }

    /// Marks a bit as used. Returns whether it was free before.
    pub fn set(&mut self, bit: u32) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        let word = &mut self.words[bit as usize / 64];
        let was_free = *word >> (bit % 64) & 1 == 0;
        *word |= 1 << (bit % 64);
        self.used += u32::from(was_free);
        was_free
    }

    /// Marks a bit as free. Returns whether it was used before.
    pub fn clear(&mut self, bit: u32) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        let index = bit as usize / 64;
        let was_used = self.words[index] >> (bit % 64) & 1 != 0;
        self.words[index] &= !(1 << (bit % 64));
        self.used -= u32::from(was_used);
        self.hint = self.hint.min(index);
        was_used
    }

    /// Takes the lowest free bit that is at least `from`.
    pub fn take(&mut self, from: u32) -> Option<u32> {
        if self.used == self.len {
            return None;
        }
        let first = (from as usize / 64).max(self.hint);
        let mut lowest_checked = first <= self.hint;
        for index in first..self.words.len() {
            let mut free = !self.words[index];
            if index == from as usize / 64 {
                free &= u64::MAX << (from % 64);
            }
            if free == 0 {
                if lowest_checked && self.words[index] == u64::MAX {
                    self.hint = index + 1;
                } else {
                    lowest_checked = false;
                }
                continue;
            }
            let bit = u32::try_from(index * 64).ok()? + free.trailing_zeros();
            if bit >= self.len {
                return None;
            }
            self.set(bit);
            return Some(bit);
        }
        None
    }

    /// Whether the `count` bits from `first` on are all free.
    pub fn is_free_run(&self, first: u32, count: u32) -> bool {
        first
            .checked_add(count)
            .is_some_and(|end| end <= self.len && self.next_used(first) >= end)
    }

    /// Returns the first of `count` consecutive free bits, in the lowest such run.
    pub fn find_run(&self, count: u32) -> Option<u32> {
        self.free_runs()
            .find_map(|run| (run.end - run.start >= count).then_some(run.start))
    }

    /// Returns the longest run of free bits, the lowest of several.
    pub fn longest_run(&self) -> Range<u32> {
        self.free_runs().fold(
            0..0,
            |best, run| if run.len() > best.len() { run } else { best },
        )
    }

    /// All maximal runs of free bits, in order.
    pub fn free_runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut at = u32::try_from(self.hint * 64)
            .unwrap_or(u32::MAX)
            .min(self.len);
        std::iter::from_fn(move || {
            let start = self.next_free(at);
            if start >= self.len {
                return None;
            }
            at = self.next_used(start);
            Some(start..at)
        })
    }

    /// Returns the first free bit from `from` on, or the length.
    fn next_free(&self, from: u32) -> u32 {
        self.next(from, |word| !word)
    }

    /// Returns the first used bit from `from` on, or the length.
    fn next_used(&self, from: u32) -> u32 {
        self.next(from, |word| word)
    }

    fn next(&self, from: u32, wanted: impl Fn(u64) -> u64) -> u32 {
        let first = from as usize / 64;
        for index in first..self.words.len() {
            let mut word = wanted(self.words[index]);
            if index == first {
                word &= u64::MAX << (from % 64);
            }
            if word != 0 {
                let bit = index as u64 * 64 + u64::from(word.trailing_zeros());
                return u32::try_from(bit).map_or(self.len, |bit| bit.min(self.len));
            }
        }
        self.len
    }

    /// Marks every bit used that is used in `words`.
    pub fn merge(&mut self, words: &[u64]) {
        for (mine, other) in self.words.iter_mut().zip(words) {
            *mine |= other;
        }
        self.used = self.words.iter().map(|word| word.count_ones()).sum();
    }

    /// Adds bits, which are free.
    pub fn grow(&mut self, len: u32) {
        assert!(len >= self.len, "a bitmap does not shrink");
        self.words.resize((len as usize).div_ceil(64), 0);
        self.len = len;
    }

    /// The bits that are used.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        iter_words(&self.words)
    }
}

/// The bits that are set in `words`.
pub(crate) fn iter_words(words: &[u64]) -> impl Iterator<Item = u32> + '_ {
    words.iter().zip(0u32..).flat_map(|(word, index)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            (rest != 0).then(|| {
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                index * 64 + bit
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_lowest() {
        let mut map = Bitmap::new(130);
        for bit in 0..130 {
            assert_eq!(map.take(0), Some(bit));
        }
        assert_eq!((map.take(0), map.free()), (None, 0));
        map.clear(3);
        map.clear(129);
        map.clear(64);
        assert_eq!(map.take(4), Some(64));
        assert_eq!(map.take(1), Some(3));
        assert_eq!(map.take(1), Some(129));
        assert_eq!(map.take(1), None);
        map.grow(131);
        assert_eq!(map.take(0), Some(130));
        assert_eq!(map.iter().count(), 131);
    }

    #[test]
    fn runs() {
        use rand::prelude::*;
        let mut rng = SmallRng::seed_from_u64(5);
        let mut map = Bitmap::new(200);
        for _ in 0..2000 {
            let bit = rng.random_range(0..200);
            if rng.random_bool(0.5) {
                map.clear(bit);
            } else {
                map.set(bit);
            }
            let used: std::collections::BTreeSet<u32> = map.iter().collect();
            let mut runs: Vec<Range<u32>> = Vec::new();
            for bit in (0..200).filter(|bit| !used.contains(bit)) {
                match runs.last_mut() {
                    Some(run) if run.end == bit => run.end += 1,
                    _ => runs.push(bit..bit + 1),
                }
            }
            assert!(map.free_runs().eq(runs.iter().cloned()), "{runs:?}");
            let longest = runs.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
            assert_eq!(map.longest_run().len(), longest);
            let count = rng.random_range(1..20);
            let first = runs.iter().find(|run| run.len() >= count as usize);
            assert_eq!(map.find_run(count), first.map(|run| run.start));
            let from = rng.random_range(0..200);
            let free = (from..from + count).all(|bit| bit < 200 && !used.contains(&bit));
            assert_eq!(map.is_free_run(from, count), free);
        }
    }

    #[test]
    fn like_a_model() {
        use rand::prelude::*;
        let mut rng = SmallRng::seed_from_u64(7);
        let mut map = Bitmap::new(300);
        let mut model = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            let bit = rng.random_range(0..300);
            if rng.random_bool(0.5) {
                assert_eq!(map.clear(bit), model.remove(&bit));
            } else {
                let expected = (bit..300).find(|b| !model.contains(b));
                assert_eq!(map.take(bit), expected);
                model.extend(expected);
            }
            assert_eq!(map.used() as usize, model.len());
        }
        assert!(map.iter().eq(model.iter().copied()));
    }
}
