//! The two random generators of RocksDB's tool, so that a seed gives the same keys and values here.

/// The 64-bit Mersenne twister (M. Matsumoto and T. Nishimura, "MT19937-64"; C++'s `std::mt19937_64`).
#[derive(Debug, Clone)]
pub struct Mt64 {
    state: [u64; Mt64::N],
    at: usize,
}

impl Mt64 {
    const N: usize = 312;
    const M: usize = 156;

    /// A generator that `seed` alone decides.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = [0_u64; Self::N];
        state[0] = seed;
        let mut last = seed;
        let mut i = 0_u64;
        for word in state.iter_mut().skip(1) {
            i += 1;
            last = 6_364_136_223_846_793_005_u64
                .wrapping_mul(last ^ (last >> 62))
                .wrapping_add(i);
            *word = last;
        }
        Self { state, at: Self::N }
    }

    /// The next 64 bits.
    #[inline]
    pub fn draw(&mut self) -> u64 {
        if self.at >= Self::N {
            self.refill();
        }
        let mut x = self.state[self.at];
        self.at += 1;
        x ^= (x >> 29) & 0x5555_5555_5555_5555;
        x ^= (x << 17) & 0x71D6_7FFF_EDA6_0000;
        x ^= (x << 37) & 0xFFF7_EEE0_0000_0000;
        x ^ (x >> 43)
    }

    /// Uniform in 0..n; `n` above 0.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }

    /// Uniform in 0.0..1.0.
    pub fn unit(&mut self) -> f64 {
        // 53 bits fill a double's mantissa exactly.
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
        let bits = (self.draw() >> 11) as f64;
        bits / (1_u64 << 53) as f64
    }

    #[cold]
    fn refill(&mut self) {
        const LOW: u64 = (1 << 31) - 1;
        for i in 0..Self::N {
            let x = (self.state[i] & !LOW) | (self.state[(i + 1) % Self::N] & LOW);
            let twist = if x & 1 == 0 { 0 } else { 0xB502_6F5A_A966_19E9 };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (x >> 1) ^ twist;
        }
        self.at = 0;
    }
}

/// Park and Miller's "minimal standard" generator with 31 bits of state (Comm. ACM 31:10, 1988).
#[derive(Debug, Clone)]
pub struct MinStd(u64);

impl MinStd {
    const M: u64 = (1 << 31) - 1;

    /// A generator that `seed` alone decides.
    #[must_use]
    pub fn new(seed: u32) -> Self {
        let s = u64::from(seed) & Self::M;
        Self(if s == 0 { 1 } else { s })
    }

    /// The next value, 1 to 2^31 - 2.
    #[inline]
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0 * 16_807 % Self::M;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standards_own_check_values() {
        // C++ [rand.predef]: the 10000th value of a default-seeded mt19937_64 and minstd_rand0.
        let mut mt = Mt64::new(5489);
        let last = (0..10_000).map(|_| mt.draw()).last();
        assert_eq!(last, Some(9_981_545_732_273_789_042));
        let mut min = MinStd::new(1);
        let last = (0..10_000).map(|_| min.draw()).last();
        assert_eq!(last, Some(1_043_618_065));
    }

    #[test]
    fn unit_stays_below_one() {
        let mut mt = Mt64::new(3);
        assert!(
            (0..1000)
                .map(|_| mt.unit())
                .all(|u| (0.0..1.0).contains(&u))
        );
    }
}
