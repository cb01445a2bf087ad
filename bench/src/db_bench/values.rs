//! Values that compress as asked: windows that move over a pool of prepared bytes.

use super::random::{MinStd, Mt64};

/// How long values are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValueSize {
    /// All the same.
    Fixed(usize),
    /// Uniform, both ends included.
    Uniform(usize, usize),
    /// Normal, 99.7 % of it between the two, cut off there.
    Normal(usize, usize),
}

impl ValueSize {
    /// The longest.
    #[must_use]
    pub fn max(self) -> usize {
        match self {
            Self::Fixed(n) | Self::Uniform(_, n) | Self::Normal(_, n) => n,
        }
    }

    /// The mean.
    #[must_use]
    pub fn average(self) -> usize {
        match self {
            Self::Fixed(n) => n,
            Self::Uniform(a, b) | Self::Normal(a, b) => usize::midpoint(a, b),
        }
    }
}

/// Bytes that all threads take their values from. Pieces of 100 bytes, each made of random bytes
/// that repeat so that the piece compresses to the ratio; at least 1 MiB, more than a compressor's
/// window.
#[derive(Debug)]
pub struct ValuePool {
    bytes: Vec<u8>,
}

impl ValuePool {
    /// A pool for values of at most `max_len` bytes.
    #[must_use]
    pub fn new(compression_ratio: f64, max_len: usize) -> Self {
        const PIECE: usize = 100;
        // A ratio is 0.0 to 1.0, so this is 0 to 100.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 100"
        )]
        let raw = ((PIECE as f64 * compression_ratio) as usize).clamp(1, PIECE);
        let mut rng = MinStd::new(301);
        let mut bytes = Vec::with_capacity(max_len.max(1 << 20) + PIECE);
        let mut piece = Vec::with_capacity(PIECE);
        while bytes.len() < max_len.max(1 << 20) {
            piece.clear();
            piece.extend((0..raw).map(|_| u8::try_from(rng.draw() % 127).unwrap_or(0)));
            bytes.extend(piece.iter().cycle().take(PIECE));
        }
        Self { bytes }
    }

    /// The bytes of a value.
    #[inline]
    #[must_use]
    pub fn get(&self, span: Span) -> &[u8] {
        &self.bytes[span.at as usize..span.at as usize + span.len as usize]
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// Where in the pool a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// First byte.
    pub at: u32,
    /// Bytes.
    pub len: u32,
}

/// The values that one thread writes, one after the other.
#[derive(Debug, Clone)]
pub struct ValueStream {
    size: ValueSize,
    pool_len: usize,
    at: usize,
    same_percent: u64,
    rng: Mt64,
}

impl ValueStream {
    /// Values from `pool`; `same_percent` of them (0 to 100) are the pool's first bytes.
    #[must_use]
    pub fn new(size: ValueSize, pool: &ValuePool, same_percent: u64, seed: u64) -> Self {
        let rng = Mt64::new(seed ^ 0x5eed_7a1e);
        Self {
            size,
            pool_len: pool.len(),
            at: 0,
            same_percent,
            rng,
        }
    }

    /// The next value.
    #[inline]
    pub fn draw(&mut self) -> Span {
        let len = match self.size {
            ValueSize::Fixed(n) => n,
            other => self.draw_len(other),
        };
        let at = if self.same_percent > 0 && self.rng.below(100) < self.same_percent {
            0
        } else {
            if self.at + len > self.pool_len {
                self.at = 0;
            }
            self.at += len;
            self.at - len
        };
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Span {
            at: narrow(at),
            len: narrow(len),
        }
    }

    fn draw_len(&mut self, size: ValueSize) -> usize {
        match size {
            ValueSize::Fixed(n) => n,
            ValueSize::Uniform(a, b) => {
                let span = (b - a) as u64 + 1;
                a + usize::try_from(self.rng.below(span)).unwrap_or(0)
            }
            ValueSize::Normal(a, b) => {
                // Box and Muller's transform.
                let u = (1.0 - self.rng.unit()).ln() * -2.0;
                let z = u.sqrt() * (std::f64::consts::TAU * self.rng.unit()).cos();
                let (a_f, b_f) = (a as f64, b as f64);
                let x = (a_f + b_f) / 2.0 + z * (b_f - a_f) / 6.0;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "clamped"
                )]
                let n = x.clamp(a_f, b_f) as usize;
                n.clamp(a, b)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_walk_through_the_pool_and_start_again() {
        let pool = ValuePool::new(0.5, 100);
        let mut s = ValueStream::new(ValueSize::Fixed(400_000), &pool, 0, 1);
        let spans: Vec<_> = (0..3).map(|_| s.draw().at).collect();
        assert_eq!(spans, [0, 400_000, 0]);
        assert_eq!(
            pool.get(Span {
                at: 400_000,
                len: 7
            })
            .len(),
            7
        );
    }

    #[test]
    fn half_of_each_piece_repeats() {
        let pool = ValuePool::new(0.5, 100);
        let piece = pool.get(Span { at: 300, len: 100 });
        assert_eq!(piece[..50], piece[50..]);
        assert_ne!(piece[..25], piece[25..50]);
        // The same generator as RocksDB's: seed 301, 31 bits, modulo 127.
        let first = 301_u64 * 16_807 % 127;
        assert_eq!(u64::from(pool.get(Span { at: 0, len: 1 })[0]), first);
        let incompressible = ValuePool::new(1.0, 10);
        let piece = incompressible.get(Span { at: 0, len: 100 });
        assert_ne!(piece[..50], piece[50..]);
        assert_eq!(
            ValuePool::new(0.0, 3 << 20)
                .get(Span {
                    at: 0,
                    len: 3 << 20
                })
                .len(),
            3 << 20
        );
    }

    #[test]
    fn sizes_stay_within_their_bounds_and_spread() {
        let pool = ValuePool::new(0.5, 1000);
        for size in [ValueSize::Uniform(10, 1000), ValueSize::Normal(10, 1000)] {
            let mut s = ValueStream::new(size, &pool, 0, 9);
            let lens: Vec<_> = (0..20_000).map(|_| s.draw().len).collect();
            assert!(lens.iter().all(|l| (10..=1000).contains(l)));
            let mean = lens.iter().sum::<u32>() / 20_000;
            assert!((470..=540).contains(&mean), "{size:?}: {mean}");
        }
        assert_eq!(ValueSize::Uniform(10, 20).average(), 15);
    }

    #[test]
    fn the_same_value_as_often_as_asked() {
        let pool = ValuePool::new(0.5, 100);
        let mut s = ValueStream::new(ValueSize::Fixed(100), &pool, 100, 1);
        assert!((0..50).all(|_| s.draw().at == 0));
    }
}
