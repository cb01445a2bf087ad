//! Confidence intervals of ratios that were measured in pairs.
//!
//! Each round gives one ratio, of two sides that ran shortly after each other. The interval is the
//! exact one of the median by order statistics (the inverted sign test): between the k-th least and
//! the k-th greatest ratio lies the true median unless fewer than k of the rounds fell on one side
//! of it, which has the probability of as many heads among as many tosses of a coin. So it needs no
//! assumption about the distribution but that the rounds are independent of each other, and none of
//! its bounds is a number that was not measured. Source: H. A. David and H. N. Nagaraja, Order
//! Statistics, third edition, section 7.1.

use std::fmt;

use serde::Serialize;

/// The wanted confidence.
pub const CONFIDENCE: f64 = 0.95;
/// The fewest rounds for which an interval is given.
pub const FEWEST: usize = 4;
/// The fewest rounds for which an interval can have the wanted confidence: among 5 rounds all lie on
/// one side of the median with a probability of 1/16.
pub const ENOUGH: usize = 6;

/// An interval of a median, or the reason why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Interval {
    /// The bounds and the probability that the true median lies between them.
    Bounds {
        /// The lower bound.
        low: f64,
        /// The upper bound.
        high: f64,
        /// The exact confidence: at least 0.95, except with fewer than 6 rounds, which cannot have
        /// it. The interval is then that from the least to the greatest.
        confidence: f64,
    },
    /// The number of rounds, which is too small.
    TooFew {
        /// The number of rounds that both sides have.
        too_few_rounds: usize,
    },
}

impl Interval {
    /// Returns the interval of the median of these values.
    #[must_use]
    pub fn of_median(values: &[f64]) -> Self {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        if n < FEWEST {
            return Self::TooFew { too_few_rounds: n };
        }
        let mut k = 1;
        while k < n.div_ceil(2) && confidence(n, k + 1) >= CONFIDENCE {
            k += 1;
        }
        Self::Bounds {
            low: sorted[k - 1],
            high: sorted[n - k],
            confidence: confidence(n, k),
        }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bounds {
                low,
                high,
                confidence,
            } => write!(out, "{low:.2} – {high:.2} ({:.1} %)", confidence * 100.0),
            Self::TooFew { .. } => out.write_str("too few rounds"),
        }
    }
}

/// Returns the probability that the median lies between the k-th least and the k-th greatest of `n`
/// values: one less twice that of fewer than `k` heads in `n` tosses.
fn confidence(n: usize, k: usize) -> f64 {
    let mut ways = 1.0;
    let mut fewer = 0.0;
    for heads in 0..k {
        fewer += ways;
        ways = ways * (n - heads) as f64 / (heads + 1) as f64;
    }
    // Beyond a thousand rounds the power is infinite: the interval stays that of all rounds, surely.
    1.0 - 2.0 * fewer / 2_f64.powi(i32::try_from(n).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the ranks of the bounds, counted from 1, and the confidence for so many rounds.
    fn ranks(n: u32) -> (f64, f64, f64) {
        let values: Vec<f64> = (1..=n).rev().map(f64::from).collect();
        match Interval::of_median(&values) {
            Interval::Bounds {
                low,
                high,
                confidence,
            } => (low, high, confidence),
            Interval::TooFew { .. } => panic!("{n} rounds are enough"),
        }
    }

    #[test]
    fn ranks_are_those_of_the_tables() {
        // (rounds, rank, confidence), as printed tables of the sign test have them.
        for (n, low, confidence) in [
            (4, 1.0, 0.875),
            (5, 1.0, 0.9375),
            (6, 1.0, 0.96875),
            (8, 1.0, 0.992_187_5),
            (9, 2.0, 0.960_937_5),
            (10, 2.0, 0.978_515_625),
            (15, 4.0, 0.964_843_75),
            (20, 6.0, 0.958_610_5),
            (100, 40.0, 0.964_8),
        ] {
            let found = ranks(n);
            assert!((found.0 - low).abs() < 1e-9, "{n}: {found:?}");
            assert!((found.1 - (f64::from(n) + 1.0 - low)).abs() < 1e-9);
            assert!((found.2 - confidence).abs() < 1e-6, "{n}: {found:?}");
        }
    }

    #[test]
    fn six_rounds_are_the_fewest_for_the_wanted_confidence() {
        for n in 4..300 {
            let enough = usize::try_from(n).unwrap() >= ENOUGH;
            assert_eq!(ranks(n).2 >= CONFIDENCE, enough, "{n} rounds");
        }
    }

    #[test]
    fn fewer_than_four_rounds_are_too_few() {
        for n in 0..FEWEST {
            let few = Interval::of_median(&[1.0, 2.0, 3.0][..n]);
            assert_eq!(few, Interval::TooFew { too_few_rounds: n });
            assert_eq!(few.to_string(), "too few rounds");
        }
        // A round without a rate, such as one by a rate of 0, is not counted.
        let infinite = Interval::of_median(&[1.0, 2.0, 3.0, f64::INFINITY]);
        assert_eq!(infinite, Interval::TooFew { too_few_rounds: 3 });
    }

    /// The promise itself: of many comparisons as many have the true median in the interval as the
    /// confidence says, whatever the distribution.
    #[test]
    fn the_true_median_is_as_often_inside_as_promised() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = || {
            // Xorshift64 (G. Marsaglia, Xorshift RNGs, 2003), seeded: the test is the same each time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        for n in [4, 6, 9, 12] {
            let (mut inside, mut promised) = (0, 0.0);
            const TIMES: u32 = 20_000;
            for _ in 0..TIMES {
                // Skewed, with a long tail and the median 1, as ratios of times are.
                let values: Vec<f64> = (0..n).map(|_| (0.5 / uniform()).powi(2)).collect();
                if let Interval::Bounds {
                    low,
                    high,
                    confidence,
                } = Interval::of_median(&values)
                {
                    inside += u32::from(low <= 1.0 && 1.0 <= high);
                    promised = confidence;
                }
            }
            let share = f64::from(inside) / f64::from(TIMES);
            assert!((share - promised).abs() < 0.01, "{n}: {share} {promised}");
        }
    }

    #[test]
    fn json_has_the_bounds_or_the_number_of_rounds() {
        let json = |values: &[f64]| serde_json::to_value(Interval::of_median(values)).unwrap();
        assert_eq!(
            json(&[2.0, 1.0, 4.0, 3.0]),
            serde_json::json!({"low": 1.0, "high": 4.0, "confidence": 0.875})
        );
        assert_eq!(json(&[1.0]), serde_json::json!({"too_few_rounds": 1}));
    }
}
