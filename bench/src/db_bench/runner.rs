//! Runs the benchmarks one after the other: database, threads, results.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use rocksdb::{
    BottommostLevelCompaction, ColumnFamilyDescriptor, CompactOptions, DB, Options,
    WaitForCompactOptions,
};

use super::flags::Flags;
use super::gflags::FlagSet;
use super::keys::KeyFormat;
use super::ledger::{Holdings, Ledger, Phase};
use super::meter::{Count, Meter, Shared};
use super::options;
use super::plan::{self, Action, Beside, Job, Meta, Plan, Timed};
use super::progress::Progress;
use super::report::{self, BenchResult, Report, RunInfo};
use super::target::Target;
use super::values::{ValuePool, ValueSize};
use super::work::{self, Context, Outcome};

/// Version of the RocksDB that is linked; a test holds it against the LOG of a database.
pub const ROCKSDB_VERSION: &str = "11.8.1";

/// The lengths of values that the flags ask for.
#[must_use]
pub fn value_size(f: &Flags) -> ValueSize {
    let size = |n: i32| usize::try_from(n).unwrap_or(0);
    match f.value_size_distribution_type.as_str() {
        "uniform" => ValueSize::Uniform(size(f.value_size_min), size(f.value_size_max)),
        "normal" => ValueSize::Normal(size(f.value_size_min), size(f.value_size_max)),
        _ => ValueSize::Fixed(size(f.value_size)),
    }
}

/// Runs everything that the flags ask for. `say` gets the text, line by line.
///
/// # Errors
/// In words for the user; what was printed before stays true.
pub fn run(f: &Flags, say: &mut dyn FnMut(&str)) -> Result<Report, String> {
    let plans = plan::parse(f)?;
    let target = Target::open(f)?;
    let result = run_on(f, &target, &plans, say);
    let closed = target.close();
    let report = result?;
    closed?;
    Ok(report)
}

fn run_on(
    f: &Flags,
    target: &Target,
    plans: &[Plan],
    say: &mut dyn FnMut(&str),
) -> Result<Report, String> {
    let mut env = target.env();
    for (threads, set) in [
        (f.num_high_pri_threads, true),
        (f.num_low_pri_threads, false),
    ] {
        if threads > 0 && set {
            env.set_high_priority_background_threads(threads);
        } else if threads > 0 {
            env.set_low_priority_background_threads(threads);
        }
    }
    if f.num_bottom_pri_threads > 0 {
        env.set_bottom_priority_background_threads(f.num_bottom_pri_threads);
    }
    let opts = options::build(f, &env).map_err(|e| e.to_string())?;
    let seed = if f.seed == 0 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(1, |d| u64::try_from(d.as_micros()).unwrap_or(1));
        say(&format!("Set seed to {now} because --seed was 0"));
        now
    } else {
        f.seed.cast_unsigned()
    };
    let longest = plans.iter().filter_map(|p| match &p.action {
        Action::Timed(t) => Some(t.value_size.max()),
        Action::Meta(_) => None,
    });
    let mut runner = Runner {
        f,
        target,
        opts,
        pool: ValuePool::new(f.compression_ratio, longest.max().unwrap_or(0)),
        db: None,
        ledger: Ledger::default(),
        seed,
        threads_started: 0,
        results: Vec::new(),
    };
    let info = RunInfo {
        rocksdb_version: ROCKSDB_VERSION.to_owned(),
        env: f.env.clone(),
        file_system: target.to_string(),
        db: target.db().to_owned(),
        durability: target.durability().clone(),
        cpu: report::cpu(),
        seed,
        flags: changed_flags(f),
    };
    say(&report::header(f, &info));
    runner.open(!f.use_existing_db)?;
    for plan in plans {
        runner.plan(plan, say)?;
    }
    if let Some(text) = runner.opts.get_statistics().filter(|_| f.statistics) {
        say(&format!("STATISTICS:\n{text}"));
    }
    runner.db = None;
    Ok(Report {
        info,
        results: std::mem::take(&mut runner.results),
    })
}

fn changed_flags(f: &Flags) -> BTreeMap<String, String> {
    let defaults = Flags::table();
    f.values()
        .into_iter()
        .zip(defaults)
        .filter(|((_, value), default)| *value != default.default)
        .map(|((name, value), _)| (name.to_owned(), value))
        .collect()
}

struct Runner<'a> {
    f: &'a Flags,
    target: &'a Target,
    opts: Options,
    pool: ValuePool,
    db: Option<DB>,
    ledger: Ledger,
    seed: u64,
    threads_started: u64,
    results: Vec<BenchResult>,
}

impl Runner<'_> {
    /// Opens the database, an empty one when asked for.
    fn open(&mut self, fresh: bool) -> Result<(), String> {
        self.db = None;
        let path = self.target.db();
        let fail = |e: rocksdb::Error| format!("database {path} on {}: {e}", self.target);
        if fresh {
            DB::destroy(&self.opts, path).map_err(fail)?;
        }
        let families = [ColumnFamilyDescriptor::new("default", self.opts.clone())];
        let db = if self.f.readonly {
            DB::open_cf_descriptors_read_only(&self.opts, path, families, false)
        } else {
            DB::open_cf_descriptors(&self.opts, path, families)
        };
        self.db = Some(db.map_err(fail)?);
        self.ledger.reset(!fresh);
        Ok(())
    }

    fn plan(&mut self, plan: &Plan, say: &mut dyn FnMut(&str)) -> Result<(), String> {
        let timed = match &plan.action {
            Action::Meta(m) => return self.meta(*m, say),
            Action::Timed(t) => t,
        };
        if timed.fresh {
            if self.f.use_existing_db {
                let name = &plan.name;
                say(&format!("{name:<12} : skipped (--use_existing_db is true)"));
                return Ok(());
            }
            self.open(true)?;
        }
        say(&format!("DB path: [{}]", self.target.db()));
        if plan.warmup > 0 {
            say(&format!(
                "Warming up benchmark by running {} times",
                plan.warmup
            ));
        }
        for _ in 0..plan.warmup {
            let warm = self.once(plan, timed)?;
            say(&warm.render());
        }
        if plan.repeat > 1 {
            say(&format!("Running benchmark for {} times", plan.repeat));
        }
        let mut runs: Vec<BenchResult> = Vec::new();
        for _ in 0..plan.repeat {
            let result = self.once(plan, timed)?;
            say(&result.render());
            runs.push(result);
            let so_far = report::repeats(&plan.name, &runs, self.f.confidence_interval_only, false);
            if !so_far.is_empty() {
                say(&so_far);
            }
        }
        let last = report::repeats(&plan.name, &runs, false, true);
        if !last.is_empty() {
            say(&last);
        }
        self.results.append(&mut runs);
        Ok(())
    }

    /// One timed run.
    fn once(&mut self, plan: &Plan, timed: &Timed) -> Result<BenchResult, String> {
        let f = self.f;
        let holdings = self.holdings(timed)?;
        let db = self.db.as_ref().ok_or("no database is open")?;
        let beside = usize::from(timed.beside != Beside::Nobody);
        let threads = timed.threads + beside;
        let seconds = u64::try_from(timed.seconds(f)).unwrap_or(0);
        let total = timed.ops_per_thread(f) * timed.threads as u64;
        let shared = Shared::new(threads);
        let progress = Progress::new(f, &plan.name, &shared, total, seconds)?;
        let key_len = usize::try_from(f.key_size).unwrap_or(1) + usize::from(timed.longer_keys);
        let unsigned = |n: i64| u64::try_from(n).unwrap_or(0);
        let context = Context {
            f,
            db,
            timed,
            pool: &self.pool,
            holdings: holdings.as_ref(),
            keys: KeyFormat::new(
                key_len,
                usize::try_from(f.prefix_size).unwrap_or(0),
                unsigned(f.keys_per_prefix),
                unsigned(f.num),
            ),
            threads,
        };
        let first_seed = self.threads_started;
        self.threads_started += threads as u64;
        let io_before = self.target.io();
        let cpu_before = report::cpu_seconds();
        let outcomes: Vec<Result<Outcome, String>> = std::thread::scope(|s| {
            let watcher = progress.wanted().then(|| s.spawn(|| progress.watch()));
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let seed = self.seed.wrapping_add(first_seed + thread as u64 + 1);
                    let (context, shared) = (&context, &shared);
                    s.spawn(move || worker(context, shared, thread, seed))
                })
                .collect();
            let outcomes = handles
                .into_iter()
                .map(|h| {
                    h.join()
                        .unwrap_or_else(|_| Err("a benchmark thread panicked".to_owned()))
                })
                .collect();
            progress.stop();
            if let Some(w) = watcher {
                let _ = w.join();
            }
            outcomes
        });
        let io_after = self.target.io();
        let cpu = cpu_before
            .zip(report::cpu_seconds())
            .map(|(before, after)| after - before);
        let mut counts = Vec::new();
        let mut phase = Phase::new();
        for outcome in outcomes {
            let outcome = outcome.map_err(|e| format!("{}: {e}", plan.name))?;
            counts.push(outcome.count);
            phase.extend(outcome.wrote);
        }
        self.ledger.add(phase);
        let mut count = Count::sum(counts);
        if unsigned(f.num) != timed.num {
            let ops = format!("({} ops)", timed.ops_per_thread(f));
            count.message = format!("{ops} {}", count.message).trim().to_owned();
        }
        let mut result = BenchResult::new(&plan.name, count, timed.sync);
        result.cpu_us_per_op = cpu.map(|s| s * 1e6 / result.operations as f64);
        result.io = io_before.zip(io_after).map(|(b, a)| a.since(b));
        Ok(result)
    }

    /// What every key must hold, for `verify`.
    fn holdings(&self, timed: &Timed) -> Result<Option<Holdings>, String> {
        if timed.job != Job::Verify {
            return Ok(None);
        }
        Ok(Some(self.ledger.expect(timed.num, &self.pool)))
    }

    fn meta(&self, m: Meta, say: &mut dyn FnMut(&str)) -> Result<(), String> {
        let db = self.db.as_ref().ok_or("no database is open")?;
        let property = |name: &str| match db.property_value(name) {
            Ok(Some(text)) => text,
            _ => "(failed)".to_owned(),
        };
        match m {
            Meta::Property(name) => say(&format!("\n{}", property(name))),
            Meta::MemStats => {
                for name in [
                    "rocksdb.num-immutable-mem-table",
                    "rocksdb.cur-size-active-mem-table",
                    "rocksdb.cur-size-all-mem-tables",
                    "rocksdb.size-all-mem-tables",
                    "rocksdb.num-entries-active-mem-table",
                    "rocksdb.num-entries-imm-mem-tables",
                ] {
                    say(&format!("{name}: {}", property(name)));
                }
            }
            Meta::Flush => {
                db.flush().map_err(|e| format!("flush: {e}"))?;
                say("flush memtable");
            }
            Meta::CompactAll => {
                let mut how = CompactOptions::default();
                how.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
                db.compact_range_opt(None::<&[u8]>, None::<&[u8]>, &how);
            }
            Meta::WaitForCompaction => {
                let how = WaitForCompactOptions::default();
                db.wait_for_compact(&how)
                    .map_err(|e| format!("waitforcompaction: {e}"))?;
                say("waitforcompaction: done");
            }
        }
        Ok(())
    }
}

fn worker(
    context: &Context<'_>,
    shared: &Shared,
    thread: usize,
    seed: u64,
) -> Result<Outcome, String> {
    let prepared = work::prepare(context, thread, seed);
    shared.start.wait();
    let meter = Meter::start(context.f, shared, thread);
    let outcome = prepared.run(context, meter);
    if outcome.is_err() {
        shared.failed.store(true, Ordering::Relaxed);
    }
    shared.threads_done.fetch_add(1, Ordering::Release);
    outcome
}
