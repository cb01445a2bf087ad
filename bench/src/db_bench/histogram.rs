//! Times of operations in RocksDB's buckets, printed as its tool prints them.

use std::fmt::Write as _;

use serde::Serialize;

/// Upper limits of the buckets: 1, 2, then half as much again each time, cut to two digits
/// (RocksDB, `monitoring/histogram.cc`).
fn limits() -> Vec<u64> {
    let mut out = vec![1_u64, 2];
    // RocksDB multiplies the uncut value, as a double.
    let mut value = 2.0_f64 * 1.5;
    while value <= 18_446_744_073_709_551_615.0 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "within u64 by the loop's condition"
        )]
        let mut limit = value as u64;
        let mut power = 1;
        while limit / 10 > 10 {
            limit /= 10;
            power *= 10;
        }
        out.push(limit * power);
        value *= 1.5;
    }
    out
}

/// A histogram of microseconds.
#[derive(Debug, Clone)]
pub struct Histogram {
    limits: Vec<u64>,
    counts: Vec<u64>,
    min: u64,
    max: u64,
    count: u64,
    sum: u128,
    sum_squares: u128,
}

impl Default for Histogram {
    fn default() -> Self {
        let limits = limits();
        Self {
            counts: vec![0; limits.len()],
            limits,
            min: u64::MAX,
            max: 0,
            count: 0,
            sum: 0,
            sum_squares: 0,
        }
    }
}

/// A histogram in numbers, for machines; microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Operations.
    pub count: u64,
    /// Mean.
    pub average_us: f64,
    /// Standard deviation.
    pub stddev_us: f64,
    /// Least.
    pub min_us: u64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p99_9_us: f64,
    /// 99.99th percentile.
    pub p99_99_us: f64,
    /// Greatest.
    pub max_us: u64,
}

impl Histogram {
    /// Counts one time.
    pub fn add(&mut self, us: u64) {
        let at = self.limits.partition_point(|limit| *limit < us);
        let last = self.counts.len() - 1;
        self.counts[at.min(last)] += 1;
        self.min = self.min.min(us);
        self.max = self.max.max(us);
        self.count += 1;
        self.sum += u128::from(us);
        self.sum_squares += u128::from(us) * u128::from(us);
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.sum += other.sum;
        self.sum_squares += other.sum_squares;
    }

    /// The time below which `p` percent are, interpolated within its bucket.
    #[must_use]
    pub fn percentile(&self, p: f64) -> f64 {
        let threshold = self.count as f64 * (p / 100.0);
        let mut below = 0.0;
        for (b, count) in self.counts.iter().enumerate() {
            let here = *count as f64;
            if below + here < threshold {
                below += here;
                continue;
            }
            let left = if b == 0 { 0 } else { self.limits[b - 1] } as f64;
            let right = self.limits[b] as f64;
            let part = if here == 0.0 {
                0.0
            } else {
                (threshold - below) / here
            };
            let value = left + (right - left) * part;
            return value.clamp(self.least() as f64, self.max as f64);
        }
        self.max as f64
    }

    fn least(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    fn average(&self) -> f64 {
        if self.count == 0 {
            return 0.0;
        }
        self.sum as f64 / self.count as f64
    }

    fn stddev(&self) -> f64 {
        if self.count == 0 {
            return 0.0;
        }
        let n = self.count as f64;
        let mean = self.average();
        (self.sum_squares as f64 / n - mean * mean).max(0.0).sqrt()
    }

    /// The numbers.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            count: self.count,
            average_us: self.average(),
            stddev_us: self.stddev(),
            min_us: self.least(),
            p50_us: self.percentile(50.0),
            p99_us: self.percentile(99.0),
            p99_9_us: self.percentile(99.9),
            p99_99_us: self.percentile(99.99),
            max_us: self.max,
        }
    }

    /// The page that RocksDB's tool prints.
    #[must_use]
    pub fn render(&self) -> String {
        let p = |x| self.percentile(x);
        let mut out = String::new();
        let _ = writeln!(
            out,
            "Count: {} Average: {:.4}  StdDev: {:.2}",
            self.count,
            self.average(),
            self.stddev()
        );
        let _ = writeln!(
            out,
            "Min: {}  Median: {:.4}  Max: {}",
            self.least(),
            p(50.0),
            self.max
        );
        let _ = writeln!(
            out,
            "Percentiles: P50: {:.2} P75: {:.2} P99: {:.2} P99.9: {:.2} P99.99: {:.2}",
            p(50.0),
            p(75.0),
            p(99.0),
            p(99.9),
            p(99.99)
        );
        let _ = writeln!(out, "{}", "-".repeat(54));
        let mut so_far = 0;
        for (b, count) in self.counts.iter().enumerate() {
            if *count == 0 {
                continue;
            }
            so_far += count;
            let percent = |n: u64| 100.0 * n as f64 / self.count as f64;
            let (bracket, left) = match b.checked_sub(1) {
                None => ('[', 0),
                Some(before) => ('(', self.limits[before]),
            };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "0 to 20"
            )]
            let marks = (percent(*count) / 5.0 + 0.5) as usize;
            let _ = writeln!(
                out,
                "{bracket} {left:>7}, {:>7} ] {count:>8} {:>7.3}% {:>7.3}% {}",
                self.limits[b],
                percent(*count),
                percent(so_far),
                "#".repeat(marks)
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_rocksdbs() {
        let l = limits();
        assert_eq!(
            l[..16],
            [
                1, 2, 3, 4, 6, 10, 15, 22, 34, 51, 76, 110, 170, 250, 380, 580
            ]
        );
        assert_eq!(l.len(), 109);
    }

    #[test]
    fn percentiles_are_interpolated_and_bounded() {
        let mut h = Histogram::default();
        for us in 1..=100 {
            h.add(us);
        }
        let s = h.summary();
        assert_eq!((s.count, s.min_us, s.max_us), (100, 1, 100));
        assert!((s.average_us - 50.5).abs() < 1e-9);
        assert!((45.0..=55.0).contains(&s.p50_us), "{}", s.p50_us);
        assert!(s.p99_us <= 100.0 && s.p99_us >= 95.0);
        assert!((s.stddev_us - 28.866).abs() < 0.01);
    }

    #[test]
    fn merging_is_adding() {
        let (mut a, mut b, mut both) = <(Histogram, Histogram, Histogram)>::default();
        for us in [0, 3, 9, 1000, u64::MAX] {
            a.add(us);
            both.add(us);
        }
        for us in [5, 70] {
            b.add(us);
            both.add(us);
        }
        a.merge(&b);
        assert_eq!(a.render(), both.render());
    }

    #[test]
    fn the_page_has_rocksdbs_lines() {
        let mut h = Histogram::default();
        h.add(3);
        h.add(3);
        h.add(8);
        let page = h.render();
        assert!(page.starts_with("Count: 3 Average: 4.6667  StdDev: 2.36\nMin: 3  Median: "));
        assert!(page.contains("(       2,       3 ]        2  66.667%  66.667% #############\n"));
        assert!(
            Histogram::default()
                .render()
                .contains("Count: 0 Average: 0.0000")
        );
    }
}
