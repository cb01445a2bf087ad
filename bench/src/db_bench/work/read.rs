//! Benchmarks that only read.

use std::sync::atomic::Ordering;

use rocksdb::{DBRawIterator, ReadOptions};

use super::super::flags::Flags;
use super::super::meter::{Budget, Meter, OpKind, Pace};
use super::super::random::Mt64;
use super::{Context, read_options};

/// A random key to read: uniform, or skewed with `--read_random_exp_range`.
fn random_key(f: &Flags, num: u64, rng: &mut Mt64) -> u64 {
    let draw = rng.draw();
    if f.read_random_exp_range == 0.0 {
        return draw % num;
    }
    const LIMIT: u64 = 1 << 62;
    let order = -((draw % LIMIT) as f64) / LIMIT as f64 * f.read_random_exp_range;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to num"
    )]
    let skewed = (order.exp() * num as f64) as u64;
    // Spread, so that neighbours in rank are no neighbours in the table.
    skewed.wrapping_mul(0x5bd1_e995) % num
}

/// `readrandom`, `readmissing`.
pub fn random(c: &Context<'_>, m: &mut Meter<'_>, rng: &mut Mt64) -> Result<(), String> {
    let mut options = read_options(c.f);
    options.set_tailing(c.f.use_tailing_iterator);
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), c.timed.reads);
    let mut pace = Pace::new(c.f.benchmark_read_rate_limit);
    let mut key = c.keys.buffer();
    let mut stride = Stride::new(c);
    let num = u64::try_from(c.f.num).unwrap_or(1);
    let (mut found, mut read) = (0, 0);
    while !budget.over(1) {
        // RocksDB's tool draws a number to choose among databases.
        rng.draw();
        let k = match &mut stride {
            Some(s) => s.next(c.f, num, rng),
            None => random_key(c.f, num, rng),
        };
        c.keys.fill(k, &mut key);
        read += 1;
        match c.db.get_pinned_opt(&key, &options) {
            Ok(Some(value)) => {
                found += 1;
                m.add_bytes(key.len() + value.len());
            }
            Ok(None) => {}
            Err(e) => return Err(format!("get error: {e}")),
        }
        if let Some(p) = &mut pace {
            p.take(1);
        }
        m.finished(1, OpKind::Read);
    }
    m.found(found, read);
    Ok(())
}

/// `--multiread_stride` with `--batch_size` for single gets: runs of keys at a distance.
struct Stride {
    batch: u64,
    stride: u64,
    at: u64,
    key: u64,
}

impl Stride {
    fn new(c: &Context<'_>) -> Option<Self> {
        let stride = u64::try_from(c.f.multiread_stride).ok()?;
        (c.timed.batch > 1 && stride > 0).then_some(Self {
            batch: c.timed.batch,
            stride,
            at: 0,
            key: 0,
        })
    }

    fn next(&mut self, f: &Flags, num: u64, rng: &mut Mt64) -> u64 {
        self.at += 1;
        if self.at >= self.batch {
            self.at = 0;
            self.key = first_of_stride(random_key(f, num, rng), num, self.batch, self.stride);
        } else {
            self.key += self.stride;
        }
        self.key
    }
}

/// Moves the first key of a run down so that the whole run is below `num`.
fn first_of_stride(key: u64, num: u64, batch: u64, stride: u64) -> u64 {
    let length = (batch - 1).saturating_mul(stride);
    if key.saturating_add(length) >= num {
        num.saturating_sub(batch.saturating_mul(stride))
    } else {
        key
    }
}

/// `multireadrandom`.
pub fn multi(c: &Context<'_>, m: &mut Meter<'_>, rng: &mut Mt64) -> Result<(), String> {
    let options = read_options(c.f);
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), c.timed.reads);
    let mut pace = Pace::new(c.f.benchmark_read_rate_limit);
    let batch = c.timed.batch;
    let stride = u64::try_from(c.f.multiread_stride).unwrap_or(0);
    let num = u64::try_from(c.f.num).unwrap_or(1);
    let mut keys: Vec<Vec<u8>> = (0..batch).map(|_| c.keys.buffer()).collect();
    let family =
        c.db.cf_handle("default")
            .ok_or("the default column family is not open")?;
    let (mut found, mut read) = (0, 0);
    while !budget.over(batch) {
        rng.draw();
        if stride > 0 {
            let mut k = first_of_stride(random_key(c.f, num, rng), num, batch, stride);
            for key in &mut keys {
                c.keys.fill(k, key);
                k += stride;
            }
        } else {
            for key in &mut keys {
                c.keys.fill(random_key(c.f, num, rng), key);
            }
        }
        read += batch;
        let mut hit = |len: usize| {
            found += 1;
            m.add_bytes(c.keys.len() + len);
        };
        if c.f.multiread_batched {
            let values =
                c.db.batched_multi_get_cf_opt(family, &keys, false, &options);
            for v in values {
                if let Some(v) = v.map_err(|e| format!("multiget error: {e}"))? {
                    hit(v.len());
                }
            }
        } else {
            for v in c.db.multi_get_opt(&keys, &options) {
                if let Some(v) = v.map_err(|e| format!("multiget error: {e}"))? {
                    hit(v.len());
                }
            }
        }
        if let Some(p) = &mut pace {
            p.take(batch);
        }
        m.finished(batch, OpKind::Read);
    }
    m.found(found, read);
    Ok(())
}

fn iterator<'a>(c: &Context<'a>, options: ReadOptions) -> DBRawIterator<'a> {
    c.db.raw_iterator_opt(options)
}

/// `readseq`, `readreverse`.
pub fn scan(c: &Context<'_>, m: &mut Meter<'_>, reverse: bool) -> Result<(), String> {
    let mut it = iterator(c, read_options(c.f));
    if reverse {
        it.seek_to_last();
    } else {
        it.seek_to_first();
    }
    let mut pace = Pace::new(c.f.benchmark_read_rate_limit);
    let mut left = c.timed.reads;
    while left > 0 {
        let Some((key, value)) = it.item() else {
            break;
        };
        m.add_bytes(key.len() + value.len());
        left -= 1;
        m.finished(1, OpKind::Read);
        if let Some(p) = &mut pace {
            p.take(1);
        }
        if reverse {
            it.prev();
        } else {
            it.next();
        }
    }
    it.status().map_err(|e| format!("iterator error: {e}"))
}

/// Scans again and again until the other threads are done.
pub fn scan_beside(c: &Context<'_>, m: &mut Meter<'_>) -> Result<(), String> {
    m.exclude();
    let others = c.threads as u64 - 1;
    let mut it = iterator(c, read_options(c.f));
    it.seek_to_first();
    loop {
        let shared = m.shared();
        let alone = shared.threads_done.load(Ordering::Acquire) >= others;
        if alone || shared.failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        match it.item() {
            Some((key, value)) => {
                m.add_bytes(key.len() + value.len());
                m.finished(1, OpKind::Read);
                it.next();
            }
            None => {
                it.status().map_err(|e| format!("iterator error: {e}"))?;
                it.seek_to_first();
                if !it.valid() {
                    // An empty database: look again, but not as fast as the processor can.
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    it.seek_to_first();
                }
            }
        }
    }
}

/// `newiterator`.
pub fn new_iterators(c: &Context<'_>, m: &mut Meter<'_>) -> Result<(), String> {
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), c.timed.reads);
    while !budget.over(1) {
        let it = iterator(c, read_options(c.f));
        it.status().map_err(|e| format!("iterator error: {e}"))?;
        drop(it);
        m.finished(1, OpKind::Other);
    }
    Ok(())
}

/// `seekrandom`.
pub fn seek(c: &Context<'_>, m: &mut Meter<'_>, rng: &mut Mt64) -> Result<(), String> {
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), c.timed.reads);
    let mut pace = Pace::new(c.f.benchmark_read_rate_limit);
    let num = u64::try_from(c.f.num).unwrap_or(1);
    let distance = u64::try_from(c.f.max_scan_distance).unwrap_or(0);
    let mut key = c.keys.buffer();
    let mut copy = [0_u8; 256];
    let mut tailing = c.f.use_tailing_iterator.then(|| {
        let mut options = read_options(c.f);
        options.set_tailing(true);
        iterator(c, options)
    });
    let (mut found, mut read) = (0, 0);
    while !budget.over(1) {
        let k = rng.below(num);
        c.keys.fill(k, &mut key);
        let mut own;
        let it = if let Some(t) = &mut tailing {
            t
        } else {
            let mut options = read_options(c.f);
            if distance > 0 {
                let mut bound = c.keys.buffer();
                if c.f.reverse_iterator {
                    c.keys.fill(k.saturating_sub(distance), &mut bound);
                    options.set_iterate_lower_bound(bound);
                } else {
                    c.keys.fill(num.min(k.saturating_add(distance)), &mut bound);
                    options.set_iterate_upper_bound(bound);
                }
            }
            own = iterator(c, options);
            &mut own
        };
        it.seek(&key);
        read += 1;
        if it.key() == Some(key.as_slice()) {
            found += 1;
        }
        for _ in 0..c.f.seek_nexts {
            let Some((k, v)) = it.item() else { break };
            // The value is read, not only pointed at.
            let n = v.len().min(copy.len());
            copy[..n].copy_from_slice(&v[..n]);
            std::hint::black_box(&copy);
            m.add_bytes(k.len() + v.len());
            if c.f.reverse_iterator {
                it.prev();
            } else {
                it.next();
            }
        }
        it.status().map_err(|e| format!("iterator error: {e}"))?;
        if let Some(p) = &mut pace {
            p.take(1);
        }
        m.finished(1, OpKind::Seek);
    }
    m.found(found, read);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skew_stays_below_num_and_is_one() {
        let f = Flags {
            read_random_exp_range: 10.0,
            ..Flags::default()
        };
        let mut rng = Mt64::new(1);
        let mut seen = std::collections::HashMap::new();
        for _ in 0..10_000 {
            let k = random_key(&f, 1000, &mut rng);
            assert!(k < 1000);
            *seen.entry(k).or_insert(0) += 1;
        }
        // Uniform keys would come ten times each.
        assert!(seen.values().any(|n| *n > 100));
    }

    #[test]
    fn runs_end_before_num() {
        assert_eq!(first_of_stride(95, 100, 4, 10), 60);
        assert_eq!(first_of_stride(5, 100, 4, 10), 5);
        assert_eq!(first_of_stride(5, 10, 4, 10), 0);
    }
}
