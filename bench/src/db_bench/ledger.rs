//! What the database must hold after what was done to it.

use std::collections::HashMap;

use super::script::{Script, ScriptSpec, Step};
use super::values::{Span, ValuePool};

/// What threads did at the same time: their scripts, and how many steps each took.
pub type Phase = Vec<(ScriptSpec, u64)>;

/// What was done since the database was fresh, or since an existing one was opened.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    phases: Vec<Phase>,
    /// The database held something before that is not known here.
    inherited: bool,
}

/// What a key may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Written before this run: anything.
    Unknown,
    /// No such key.
    Absent,
    /// This value.
    Value(Span),
    /// Several threads wrote at the same time: one of these, `None` for absent.
    OneOf(Vec<Option<Span>>),
}

const UNTOUCHED: u64 = u64::MAX;
const ABSENT: u64 = u64::MAX - 1;

impl Ledger {
    /// Starts over with an empty database, or one with contents that are not known.
    pub fn reset(&mut self, inherited: bool) {
        self.phases.clear();
        self.inherited = inherited;
    }

    /// Adds what threads did at the same time.
    pub fn add(&mut self, phase: Phase) {
        if !phase.is_empty() {
            self.phases.push(phase);
        }
    }

    /// Whether everything in the database is known.
    #[must_use]
    pub fn complete(&self) -> bool {
        !self.inherited
    }

    /// What every key below `num` must hold.
    #[must_use]
    pub fn expect(&self, num: u64, pool: &ValuePool) -> Holdings {
        let len = usize::try_from(num).unwrap_or(usize::MAX);
        let start = if self.inherited { UNTOUCHED } else { ABSENT };
        let mut all = Holdings {
            single: vec![start; len],
            several: HashMap::new(),
        };
        for phase in &self.phases {
            let mut touched = vec![false; if phase.len() > 1 { len } else { 0 }];
            for (spec, steps) in phase {
                let last = replay(*spec, *steps, len, pool);
                for (key, code) in last.into_iter().enumerate() {
                    if code == UNTOUCHED {
                        continue;
                    }
                    match touched.get_mut(key) {
                        Some(t) if *t => {
                            let first = all.single[key];
                            let list = all.several.entry(key).or_insert_with(|| vec![first]);
                            list.push(code);
                        }
                        other => {
                            if let Some(t) = other {
                                *t = true;
                            }
                            all.single[key] = code;
                            all.several.remove(&key);
                        }
                    }
                }
            }
        }
        all
    }
}

/// The last thing that a script did to each key.
fn replay(spec: ScriptSpec, steps: u64, len: usize, pool: &ValuePool) -> Vec<u64> {
    let mut last = vec![UNTOUCHED; len];
    let mut script = Script::new(spec, pool);
    for _ in 0..steps {
        let (key, code) = match script.step() {
            Step::Put(key, span) => (key, (u64::from(span.at) << 32) | u64::from(span.len)),
            Step::Delete(key) => (key, ABSENT),
            Step::Get(_) => continue,
        };
        let slot = usize::try_from(key).ok().and_then(|k| last.get_mut(k));
        if let Some(slot) = slot {
            *slot = code;
        }
    }
    last
}

/// What every key must hold.
#[derive(Debug)]
pub struct Holdings {
    single: Vec<u64>,
    several: HashMap<usize, Vec<u64>>,
}

impl Holdings {
    /// What this key must hold.
    #[must_use]
    pub fn of(&self, key: u64) -> Expected {
        let Some((at, code)) = usize::try_from(key)
            .ok()
            .and_then(|k| Some((k, *self.single.get(k)?)))
        else {
            return Expected::Absent;
        };
        if let Some(list) = self.several.get(&at) {
            return Expected::OneOf(list.iter().map(|c| span(*c)).collect());
        }
        match code {
            UNTOUCHED => Expected::Unknown,
            other => span(other).map_or(Expected::Absent, Expected::Value),
        }
    }

    /// Whether `found` is what this key may hold.
    #[must_use]
    pub fn accepts(&self, key: u64, found: Option<&[u8]>, pool: &ValuePool) -> bool {
        let same = |want: Option<Span>| want.map(|s| pool.get(s)) == found;
        match self.of(key) {
            Expected::Unknown => true,
            Expected::Absent => found.is_none(),
            Expected::Value(s) => same(Some(s)),
            Expected::OneOf(list) => list.into_iter().any(same),
        }
    }
}

fn span(code: u64) -> Option<Span> {
    let low = u32::try_from(code & u64::from(u32::MAX)).unwrap_or(0);
    let high = u32::try_from(code >> 32).unwrap_or(0);
    (code != ABSENT).then_some(Span { at: high, len: low })
}

#[cfg(test)]
mod tests {
    use super::super::script::Pattern;
    use super::super::values::ValueSize;
    use super::*;

    fn spec(pattern: Pattern, seed: u64) -> ScriptSpec {
        ScriptSpec {
            pattern,
            seed,
            num: 50,
            batch: 1,
            value_size: ValueSize::Fixed(10),
            same_percent: 0,
        }
    }

    #[test]
    fn later_writes_replace_earlier_ones() {
        let pool = ValuePool::new(0.5, 10);
        let mut l = Ledger::default();
        l.add(vec![(spec(Pattern::PutSequential, 1), 50)]);
        l.add(vec![(spec(Pattern::DeleteSequential, 2), 10)]);
        let h = l.expect(50, &pool);
        assert_eq!(h.of(9), Expected::Absent);
        assert_eq!(h.of(10), Expected::Value(Span { at: 100, len: 10 }));
        assert_eq!(h.of(50), Expected::Absent);
        assert!(h.accepts(10, Some(pool.get(Span { at: 100, len: 10 })), &pool));
        assert!(!h.accepts(10, Some(pool.get(Span { at: 101, len: 10 })), &pool));
        assert!(!h.accepts(10, None, &pool) && !h.accepts(9, Some(b""), &pool));
    }

    #[test]
    fn threads_at_the_same_time_leave_a_choice() {
        let pool = ValuePool::new(0.5, 10);
        let mut l = Ledger::default();
        let writer = (spec(Pattern::PutSequential, 1), 50);
        l.add(vec![writer, (spec(Pattern::DeleteSequential, 2), 10)]);
        let h = l.expect(50, &pool);
        let value = Some(Span { at: 0, len: 10 });
        assert_eq!(h.of(0), Expected::OneOf(vec![value, None]));
        assert!(h.accepts(0, None, &pool));
        assert!(h.accepts(0, value.map(|s| pool.get(s)), &pool));
        assert!(!h.accepts(0, Some(b"other"), &pool));
        assert_eq!(h.of(20), Expected::Value(Span { at: 200, len: 10 }));
        l.add(vec![writer]);
        assert_eq!(
            l.expect(50, &pool).of(0),
            Expected::Value(Span { at: 0, len: 10 })
        );
    }

    #[test]
    fn an_inherited_database_is_unknown_until_written() {
        let pool = ValuePool::new(0.5, 10);
        let mut l = Ledger::default();
        l.reset(true);
        l.add(vec![(spec(Pattern::PutSequential, 1), 3)]);
        let h = l.expect(50, &pool);
        assert!(!l.complete());
        assert_eq!(h.of(3), Expected::Unknown);
        assert!(h.accepts(3, None, &pool) && h.accepts(3, Some(b"x"), &pool));
        assert!(!h.accepts(2, None, &pool));
    }
}
