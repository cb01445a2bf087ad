//! Counting and timing of one thread's operations, and their sum.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::flags::Flags;
use super::histogram::Histogram;

/// What an operation is, for histograms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpKind {
    /// A get.
    Read,
    /// A put.
    Write,
    /// A delete.
    Delete,
    /// A seek with its nexts.
    Seek,
    /// A get and a put.
    Update,
    /// Anything else.
    Other,
}

impl OpKind {
    /// The word in "Microseconds per …".
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete",
            Self::Seek => "seek",
            Self::Update => "update",
            Self::Other => "op",
        }
    }
}

/// What the threads of one benchmark share.
#[derive(Debug)]
pub struct Shared {
    /// Operations finished, for the progress line; a little behind.
    pub finished: AtomicU64,
    /// A thread failed: the others stop at their next check.
    pub failed: AtomicBool,
    /// Threads that have finished.
    pub threads_done: AtomicU64,
    /// Nobody starts before everybody is ready.
    pub start: std::sync::Barrier,
}

impl Shared {
    /// For that many threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            finished: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            threads_done: AtomicU64::new(0),
            start: std::sync::Barrier::new(threads),
        }
    }
}

/// One thread's count.
#[derive(Debug)]
pub struct Meter<'a> {
    shared: &'a Shared,
    thread: usize,
    started: Instant,
    last_op: Instant,
    done: u64,
    published: u64,
    next_report: u64,
    bytes: u64,
    histograms: Option<BTreeMap<OpKind, Histogram>>,
    found: Option<(u64, u64)>,
    message: String,
    excluded: bool,
    interval: Interval,
}

/// `--stats_interval`: lines on standard error.
#[derive(Debug)]
struct Interval {
    ops: u64,
    seconds: u64,
    last_done: u64,
    last_time: Instant,
}

impl<'a> Meter<'a> {
    /// A meter that starts now.
    #[must_use]
    pub fn start(f: &Flags, shared: &'a Shared, thread: usize) -> Self {
        let now = Instant::now();
        let ops = u64::try_from(f.stats_interval).unwrap_or(0);
        Self {
            shared,
            thread,
            started: now,
            last_op: now,
            done: 0,
            published: 0,
            next_report: if ops > 0 { ops } else { 1 },
            bytes: 0,
            histograms: f.histogram.then(BTreeMap::new),
            found: None,
            message: String::new(),
            excluded: false,
            interval: Interval {
                ops,
                seconds: u64::try_from(f.stats_interval_seconds).unwrap_or(0),
                last_done: 0,
                last_time: now,
            },
        }
    }

    /// Counts `n` operations that ended together.
    #[inline]
    pub fn finished(&mut self, n: u64, kind: OpKind) {
        if self.histograms.is_some() {
            self.time(kind);
        }
        self.done += n;
        if self.done >= self.next_report {
            self.report();
        }
    }

    /// Counts bytes of keys and values.
    #[inline]
    pub fn add_bytes(&mut self, n: usize) {
        self.bytes += n as u64;
    }

    /// The time since the last operation belongs to none, for example a rate limit's sleep.
    pub fn skip_time(&mut self) {
        if self.histograms.is_some() {
            self.last_op = Instant::now();
        }
    }

    /// Tells how many of the keys asked for were there; summed over the threads.
    pub fn found(&mut self, found: u64, asked: u64) {
        self.found = Some((found, asked));
    }

    /// Adds words to the result line.
    pub fn say(&mut self, words: &str) {
        if !self.message.is_empty() {
            self.message.push(' ');
        }
        self.message.push_str(words);
    }

    /// Keeps this thread out of the sum.
    pub fn exclude(&mut self) {
        self.excluded = true;
    }

    /// Operations so far.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// What the threads share.
    #[must_use]
    pub fn shared(&self) -> &'a Shared {
        self.shared
    }

    /// Stops the clock.
    #[must_use]
    pub fn stop(self) -> Count {
        let finished = Instant::now();
        Count {
            seconds: (finished - self.started).as_secs_f64(),
            started: self.started,
            finished,
            done: self.done,
            bytes: self.bytes,
            histograms: self.histograms.unwrap_or_default(),
            found: self.found,
            message: self.message,
            excluded: self.excluded,
        }
    }

    #[cold]
    fn time(&mut self, kind: OpKind) {
        let now = Instant::now();
        let us = (now - self.last_op).as_micros();
        self.last_op = now;
        if let Some(all) = &mut self.histograms {
            let us = u64::try_from(us).unwrap_or(u64::MAX);
            all.entry(kind).or_default().add(us);
        }
    }

    #[cold]
    fn report(&mut self) {
        if !self.excluded {
            let new = self.done - self.published;
            self.shared.finished.fetch_add(new, Ordering::Relaxed);
            self.published = self.done;
        }
        if self.interval.ops == 0 {
            self.next_report = self.done + (self.done / 4).clamp(1, 1000);
            return;
        }
        self.next_report += self.interval.ops;
        let now = Instant::now();
        let since = (now - self.interval.last_time).as_secs_f64();
        if self.interval.seconds > 0 && since < self.interval.seconds as f64 {
            return;
        }
        let all = (now - self.started).as_secs_f64();
        let new = self.done - self.interval.last_done;
        pumice_bdev_control::complain!(
            "... thread {}: ({},{}) ops and ({:.1},{:.1}) ops/second in ({:.6},{:.6}) seconds",
            self.thread,
            new,
            self.done,
            new as f64 / since.max(1e-9),
            self.done as f64 / all.max(1e-9),
            since,
            all
        );
        self.interval.last_done = self.done;
        self.interval.last_time = now;
    }
}

/// A stopped meter, or the sum of several.
#[derive(Debug, Clone)]
pub struct Count {
    /// Sum of the threads' times.
    pub seconds: f64,
    started: Instant,
    finished: Instant,
    /// Operations.
    pub done: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Times by kind, when asked for.
    pub histograms: BTreeMap<OpKind, Histogram>,
    /// Keys found, and asked for.
    pub found: Option<(u64, u64)>,
    /// Words for the result line.
    pub message: String,
    excluded: bool,
}

impl Count {
    /// The sum of all threads but the excluded; the words of the first that has some.
    #[must_use]
    pub fn sum(parts: Vec<Self>) -> Self {
        let mut counted = parts.into_iter().filter(|p| !p.excluded);
        let now = Instant::now();
        let mut all = counted.next().unwrap_or(Self {
            seconds: 0.0,
            started: now,
            finished: now,
            done: 0,
            bytes: 0,
            histograms: BTreeMap::new(),
            found: None,
            message: String::new(),
            excluded: false,
        });
        for p in counted {
            all.seconds += p.seconds;
            all.started = all.started.min(p.started);
            all.finished = all.finished.max(p.finished);
            all.done += p.done;
            all.bytes += p.bytes;
            for (kind, h) in &p.histograms {
                all.histograms.entry(*kind).or_default().merge(h);
            }
            all.found = match (all.found, p.found) {
                (Some((f, a)), Some((g, b))) => Some((f + g, a + b)),
                (one, other) => one.or(other),
            };
            if all.message.is_empty() {
                all.message = p.message;
            }
        }
        all
    }

    /// From the first thread's start to the last one's end.
    #[must_use]
    pub fn elapsed(&self) -> f64 {
        (self.finished - self.started).as_secs_f64()
    }
}

/// How long a benchmark goes on: a number of operations, or seconds when those are given.
#[derive(Debug)]
pub struct Budget<'a> {
    ops: u64,
    max_ops: u64,
    deadline: Option<Instant>,
    check_every: u64,
    next_check: u64,
    failed: &'a AtomicBool,
}

impl<'a> Budget<'a> {
    /// Until `max_ops`, or for `seconds` when above 0.
    #[must_use]
    pub fn new(f: &Flags, shared: &'a Shared, seconds: i32, max_ops: u64) -> Self {
        let seconds = u64::try_from(seconds).unwrap_or(0);
        let check_every = u64::try_from(f.ops_between_duration_checks)
            .unwrap_or(1)
            .max(1);
        Self {
            ops: 0,
            max_ops,
            deadline: (seconds > 0).then(|| Instant::now() + Duration::from_secs(seconds)),
            check_every,
            next_check: check_every,
            failed: &shared.failed,
        }
    }

    /// Whether the next `n` operations are to be left out.
    #[inline]
    pub fn over(&mut self, n: u64) -> bool {
        self.ops += n;
        if self.ops >= self.next_check && self.check() {
            return true;
        }
        self.deadline.is_none() && self.ops > self.max_ops
    }

    #[cold]
    fn check(&mut self) -> bool {
        self.next_check = self.ops + self.check_every;
        self.failed.load(Ordering::Relaxed) || self.deadline.is_some_and(|d| Instant::now() >= d)
    }
}

/// Keeps to a rate by sleeping.
#[derive(Debug)]
pub struct Pace {
    per_second: u64,
    due: Instant,
}

impl Pace {
    /// That many units a second; `None` for 0.
    #[must_use]
    pub fn new(per_second: u64) -> Option<Self> {
        let due = Instant::now();
        (per_second > 0).then_some(Self { per_second, due })
    }

    /// Sleeps until `units` more may pass.
    pub fn take(&mut self, units: u64) {
        let now = Instant::now();
        self.due =
            self.due.max(now) + Duration::from_secs_f64(units as f64 / self.per_second as f64);
        // Short debts are gathered: a sleep shorter than the timer's grain would overshoot.
        if self.due > now + Duration::from_millis(1) {
            std::thread::sleep(self.due - now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_of_operations_ends_exactly() {
        let shared = Shared::new(1);
        let f = Flags {
            ops_between_duration_checks: 7,
            ..Flags::default()
        };
        let mut b = Budget::new(&f, &shared, 0, 100);
        assert_eq!((0..1000).take_while(|_| !b.over(1)).count(), 100);
        let mut b = Budget::new(&f, &shared, 0, 100);
        assert_eq!((0..1000).take_while(|_| !b.over(32)).count(), 3);
    }

    #[test]
    fn a_failure_elsewhere_ends_it() {
        let shared = Shared::new(1);
        let mut b = Budget::new(&Flags::default(), &shared, 3600, 1);
        shared.failed.store(true, Ordering::Relaxed);
        assert!((0..10_000).take_while(|_| !b.over(1)).count() < 1001);
    }

    #[test]
    fn seconds_go_before_operations() {
        let shared = Shared::new(1);
        let mut b = Budget::new(&Flags::default(), &shared, 1, 1);
        assert!((0..500).all(|_| !b.over(1)));
    }

    #[test]
    fn the_sum_leaves_out_the_excluded() {
        let shared = Shared::new(2);
        let f = Flags {
            histogram: true,
            ..Flags::default()
        };
        let mut a = Meter::start(&f, &shared, 0);
        a.finished(1, OpKind::Write);
        a.exclude();
        let mut b = Meter::start(&f, &shared, 1);
        b.finished(2, OpKind::Read);
        b.add_bytes(10);
        b.say("once");
        b.say("twice");
        b.found(1, 2);
        let mut c = Meter::start(&f, &shared, 2);
        c.found(3, 4);
        let sum = Count::sum(vec![a.stop(), b.stop(), c.stop()]);
        assert_eq!((sum.done, sum.bytes, sum.found), (2, 10, Some((4, 6))));
        assert_eq!(sum.message, "once twice");
        assert!(!sum.histograms.contains_key(&OpKind::Write));
    }

    #[test]
    fn a_pace_is_kept() {
        assert!(Pace::new(0).is_none());
        let mut p = Pace::new(1000).expect("a rate");
        let t = Instant::now();
        for _ in 0..30 {
            p.take(1);
        }
        assert!(t.elapsed() >= Duration::from_millis(25));
    }
}
