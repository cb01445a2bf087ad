//! What a thread does to the database, step by step, decided by a seed.
//!
//! A benchmark runs a script; afterwards the same script, run again without a database, tells which
//! value each key must hold. So every key can be checked without a second database.

use super::random::Mt64;
use super::values::{Span, ValuePool, ValueSize, ValueStream};

/// The pattern of the steps. Each draws random numbers in the order of RocksDB's tool, so the same
/// seed visits the same keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Puts with keys 0, 1, 2, …
    PutSequential,
    /// Puts with random keys.
    PutRandom,
    /// Puts with every key once, in random order.
    PutUnique,
    /// The puts of a background writer.
    PutBackground,
    /// Deletes of keys 0, 1, 2, …
    DeleteSequential,
    /// Deletes of random keys.
    DeleteRandom,
    /// A get of a random key, then a put of the same.
    Update,
    /// Gets and puts of random keys, this many gets in a hundred.
    Mixed(u32),
}

/// Everything that decides a script.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScriptSpec {
    /// The pattern.
    pub pattern: Pattern,
    /// The thread's seed.
    pub seed: u64,
    /// Keys are below this.
    pub num: u64,
    /// Steps per write batch.
    pub batch: u64,
    /// Lengths of values.
    pub value_size: ValueSize,
    /// Percentage of equal values.
    pub same_percent: u64,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Write the value.
    Put(u64, Span),
    /// Delete the key.
    Delete(u64),
    /// Only read the key.
    Get(u64),
}

/// A running script.
#[derive(Debug, Clone)]
pub struct Script {
    spec: ScriptSpec,
    rng: Mt64,
    values: ValueStream,
    next: u64,
    left_in_batch: u64,
    shuffled: Vec<u64>,
    gets_left: u32,
    puts_left: u32,
}

impl Script {
    /// A script at its start.
    #[must_use]
    pub fn new(spec: ScriptSpec, pool: &ValuePool) -> Self {
        let mut shuffled = Vec::new();
        if spec.pattern == Pattern::PutUnique {
            shuffled = (0..spec.num).collect();
            let mut rng = Mt64::new(spec.seed ^ 0x0005_4aff_1e00);
            for i in (1..shuffled.len()).rev() {
                let j = usize::try_from(rng.below(i as u64 + 1)).unwrap_or(0);
                shuffled.swap(i, j);
            }
        }
        Self {
            rng: Mt64::new(spec.seed),
            values: ValueStream::new(spec.value_size, pool, spec.same_percent, spec.seed),
            spec,
            next: 0,
            left_in_batch: 0,
            shuffled,
            gets_left: 0,
            puts_left: 0,
        }
    }

    /// The next step.
    #[inline]
    pub fn step(&mut self) -> Step {
        let num = self.spec.num;
        match self.spec.pattern {
            Pattern::PutSequential => {
                let key = self.next;
                self.next += 1;
                Step::Put(key, self.values.draw())
            }
            Pattern::PutRandom => {
                self.draw_database();
                let key = self.rng.below(num);
                Step::Put(key, self.values.draw())
            }
            Pattern::PutUnique => {
                self.draw_database();
                let at = usize::try_from(self.next).unwrap_or(usize::MAX);
                // More writes than keys start over; RocksDB's tool refuses them.
                let key = self.shuffled[at % self.shuffled.len()];
                self.next += 1;
                Step::Put(key, self.values.draw())
            }
            Pattern::PutBackground => {
                self.rng.draw();
                let key = self.rng.below(num);
                Step::Put(key, self.values.draw())
            }
            Pattern::DeleteSequential => {
                self.draw_database();
                let key = self.next;
                self.next += 1;
                Step::Delete(key)
            }
            Pattern::DeleteRandom => {
                self.draw_database();
                Step::Delete(self.rng.below(num))
            }
            Pattern::Update => {
                self.rng.draw();
                let key = self.rng.below(num);
                Step::Put(key, self.values.draw())
            }
            Pattern::Mixed(gets) => {
                self.rng.draw();
                let key = self.rng.below(num);
                if self.gets_left == 0 && self.puts_left == 0 {
                    self.gets_left = gets;
                    self.puts_left = 100 - gets.min(100);
                }
                if self.gets_left > 0 {
                    self.gets_left -= 1;
                    Step::Get(key)
                } else {
                    self.puts_left -= 1;
                    Step::Put(key, self.values.draw())
                }
            }
        }
    }

    /// RocksDB's tool draws a number per batch to choose among databases, also when there is one.
    #[inline]
    fn draw_database(&mut self) {
        if self.left_in_batch == 0 {
            self.rng.draw();
            self.left_in_batch = self.spec.batch;
        }
        self.left_in_batch -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(pattern: Pattern) -> ScriptSpec {
        ScriptSpec {
            pattern,
            seed: 7,
            num: 100,
            batch: 4,
            value_size: ValueSize::Fixed(10),
            same_percent: 0,
        }
    }

    #[test]
    fn a_script_repeats_itself() {
        let pool = ValuePool::new(0.5, 10);
        for p in [
            Pattern::PutSequential,
            Pattern::PutRandom,
            Pattern::PutUnique,
            Pattern::PutBackground,
            Pattern::DeleteRandom,
            Pattern::DeleteSequential,
            Pattern::Update,
            Pattern::Mixed(50),
        ] {
            let steps = |mut s: Script| (0..100).map(|_| s.step()).collect::<Vec<_>>();
            let first = steps(Script::new(spec(p), &pool));
            assert_eq!(first, steps(Script::new(spec(p), &pool)), "{p:?}");
            let other = ScriptSpec { seed: 8, ..spec(p) };
            let random = !matches!(p, Pattern::PutSequential | Pattern::DeleteSequential);
            assert_eq!(first != steps(Script::new(other, &pool)), random, "{p:?}");
        }
    }

    #[test]
    fn unique_means_every_key_once() {
        let pool = ValuePool::new(0.5, 10);
        let mut s = Script::new(spec(Pattern::PutUnique), &pool);
        let mut seen = [false; 100];
        for _ in 0..100 {
            match s.step() {
                Step::Put(k, _) => assert!(!std::mem::replace(
                    &mut seen[usize::try_from(k).unwrap()],
                    true
                )),
                other => panic!("{other:?}"),
            }
        }
        assert!(seen.iter().all(|s| *s));
    }

    #[test]
    fn random_keys_are_those_of_the_twister() {
        let pool = ValuePool::new(0.5, 10);
        let mut s = Script::new(spec(Pattern::PutRandom), &pool);
        let mut rng = Mt64::new(7);
        for i in 0..20 {
            if i % 4 == 0 {
                rng.draw();
            }
            match s.step() {
                Step::Put(k, _) => assert_eq!(k, rng.below(100)),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_mix_keeps_its_share() {
        let pool = ValuePool::new(0.5, 10);
        let mut s = Script::new(spec(Pattern::Mixed(90)), &pool);
        let gets = (0..1000)
            .filter(|_| matches!(s.step(), Step::Get(_)))
            .count();
        assert_eq!(gets, 900);
        let mut all = Script::new(spec(Pattern::Mixed(100)), &pool);
        assert!((0..500).all(|_| matches!(all.step(), Step::Get(_))));
    }
}
