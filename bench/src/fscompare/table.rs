//! The results, and the numbers of the table.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::args::Plan;
use super::interval::Interval;
use super::machine::Conditions;
use super::recipe::Applied;
use super::round::Ran;
use super::side::Side;
use crate::db_bench::report::median;

/// One side's runs of one benchmark.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Runs {
    /// Microseconds per operation, one for each round.
    pub micros_per_op: Vec<f64>,
    /// Operations per second, one for each round.
    pub ops_per_sec: Vec<f64>,
    /// Processor time of the process per operation, one for each round.
    pub cpu_us_per_op: Vec<f64>,
    /// The part of that time in the kernel, one for each round.
    pub system_us_per_op: Vec<f64>,
    /// Voluntary context switches of the process per operation, one for each round.
    pub voluntary_switches_per_op: Vec<f64>,
    /// Whether every write was synced.
    pub synced: bool,
    /// Message of the last run, such as "(632 of 1000 found)".
    pub message: String,
    /// Device writes, read operations and flushes per operation, where they are counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_per_op: Option<IoPerOp>,
}

/// Device operations per operation of the benchmark, as medians over the rounds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct IoPerOp {
    /// Reads.
    pub reads: f64,
    /// Writes.
    pub writes: f64,
    /// Bytes written.
    pub write_bytes: f64,
    /// Flushes.
    pub flushes: f64,
    /// Whether they were counted at the block device, including those of other users.
    pub whole_device: bool,
    #[serde(skip)]
    all: [Vec<f64>; 4],
}

/// All results of a comparison.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The command line, the time and the machine.
    #[serde(flatten)]
    pub(super) conditions: Conditions,
    pub(super) sides: Vec<Side>,
    pub(super) baseline: Side,
    /// The description of each side, with the durability of its completed writes.
    pub(super) about: BTreeMap<Side, About>,
    pub(super) memory: Option<u64>,
    pub(super) fs_cache_size: u64,
    flags: Vec<String>,
    /// The benchmarks in the order of the run, each with its sides.
    pub(super) benchmarks: Vec<(String, BTreeMap<Side, Runs>)>,
    summary: Vec<Line>,
    /// The reason why not every round was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_short: Option<String>,
}

/// The description of a side.
#[derive(Debug, Clone, Serialize)]
pub(super) struct About {
    pub(super) file_system: String,
    pub(super) durability: String,
    /// The settings of a file system that was made for the comparison.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) settings: Option<Applied>,
}

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Name of the benchmark.
    pub benchmark: String,
    /// The side.
    pub side: Side,
    /// Median of microseconds per operation.
    pub micros_per_op: f64,
    /// Least and greatest of the rounds.
    pub spread: (f64, f64),
    /// Median of the process's processor time per operation.
    pub cpu_us_per_op: f64,
    /// Median of the part of that time in the kernel.
    pub system_us_per_op: f64,
    /// Median of the process's voluntary context switches per operation.
    pub voluntary_switches_per_op: f64,
    /// Median of operations per second.
    pub ops_per_sec: f64,
    /// Median over the rounds of this side's rate by the baseline's of the same round.
    pub rate_to_baseline: Option<f64>,
    /// The confidence interval of that median. The baseline has none.
    pub rate_interval: Option<Interval>,
    /// Median over the rounds of the time less the memory env's of the same round.
    pub own_cost_us: Option<f64>,
    /// Own cost in relation to the baseline's own cost.
    pub own_cost_to_baseline: Option<f64>,
}

impl Comparison {
    /// Makes an empty comparison.
    #[must_use]
    pub fn new(plan: &Plan, conditions: Conditions) -> Self {
        Self {
            conditions,
            sides: plan.sides.clone(),
            baseline: plan.baseline,
            about: BTreeMap::new(),
            memory: plan.memory,
            fs_cache_size: plan.fs_cache_size,
            flags: plan.flags.clone(),
            benchmarks: Vec::new(),
            summary: Vec::new(),
            cut_short: None,
        }
    }

    /// Whether anything was measured.
    #[must_use]
    pub fn has_results(&self) -> bool {
        !self.benchmarks.is_empty()
    }

    /// Adds one round of one side, which is the reports of its processes.
    pub fn add(&mut self, side: Side, ran: Ran) {
        let mut names: Vec<String> = Vec::new();
        for report in ran.reports {
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            self.about.entry(side).or_insert_with(|| About {
                file_system: text(&report["file_system"]),
                durability: text(&report["durability"]["words"]),
                settings: ran.applied.clone(),
            });
            for r in report["results"].as_array().into_iter().flatten() {
                let mut name = text(&r["name"]);
                // The same benchmark twice in a run makes two lines.
                let before = names.iter().filter(|n| **n == name).count();
                names.push(name.clone());
                if before > 0 {
                    name = format!("{name}#{}", before + 1);
                }
                let at = match self.benchmarks.iter().position(|(n, _)| *n == name) {
                    Some(at) => at,
                    None => {
                        self.benchmarks.push((name, BTreeMap::new()));
                        self.benchmarks.len() - 1
                    }
                };
                self.benchmarks[at].1.entry(side).or_default().add(r);
            }
        }
        self.summary = self.lines();
    }

    /// Returns the lines of the table.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let mut out = Vec::new();
        for (benchmark, runs) in &self.benchmarks {
            let mem = runs.get(&Side::Mem).map(|r| r.micros_per_op.as_slice());
            let base = runs.get(&self.baseline);
            let own = |r: &Runs| Some(median(&pairs(&r.micros_per_op, mem?, |a, b| a - b)));
            let base_own = base.and_then(own);
            for side in &self.sides {
                let Some(r) = runs.get(side) else { continue };
                let own_cost_us = own(r).filter(|_| *side != Side::Mem);
                out.push(Line {
                    own_cost_us,
                    own_cost_to_baseline: own_cost_us
                        .zip(base_own.filter(|b| *b > 0.0))
                        .map(|(a, b)| a / b),
                    ..self.line(benchmark, *side, r, base)
                });
            }
        }
        out
    }

    /// Returns the line of one side without its own cost.
    fn line(&self, benchmark: &str, side: Side, r: &Runs, base: Option<&Runs>) -> Line {
        let t = &r.micros_per_op;
        let ratios = base.map(|b| pairs(&r.ops_per_sec, &b.ops_per_sec, |a, b| a / b));
        Line {
            benchmark: benchmark.to_owned(),
            side,
            micros_per_op: median(t),
            spread: (
                t.iter().copied().fold(f64::INFINITY, f64::min),
                t.iter().copied().fold(0.0, f64::max),
            ),
            cpu_us_per_op: median(&r.cpu_us_per_op),
            system_us_per_op: median(&r.system_us_per_op),
            voluntary_switches_per_op: median(&r.voluntary_switches_per_op),
            ops_per_sec: median(&r.ops_per_sec),
            rate_to_baseline: ratios.as_deref().map(median),
            rate_interval: ratios
                .filter(|_| side != self.baseline)
                .map(|ratios| Interval::of_median(&ratios)),
            own_cost_us: None,
            own_cost_to_baseline: None,
        }
    }
}

impl Runs {
    fn add(&mut self, r: &Value) {
        let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
        self.micros_per_op.push(number(&r["micros_per_op"]));
        self.ops_per_sec.push(number(&r["ops_per_sec"]));
        self.cpu_us_per_op.push(number(&r["cpu_us_per_op"]));
        self.system_us_per_op.push(number(&r["system_us_per_op"]));
        let switches = number(&r["voluntary_switches_per_op"]);
        self.voluntary_switches_per_op.push(switches);
        self.synced = r["synced"].as_bool().unwrap_or(false);
        let message = r["message"].as_str().unwrap_or_default();
        message.clone_into(&mut self.message);
        if r["io"].is_object() {
            let whole_device = r["io"]["whole_device"].as_bool().unwrap_or(false);
            let ops = number(&r["operations"]);
            let io = self.io_per_op.get_or_insert_with(IoPerOp::default);
            let names = ["reads", "writes", "write_bytes", "flushes"];
            for (all, name) in io.all.iter_mut().zip(names) {
                all.push(number(&r["io"][name]) / ops);
            }
            let [reads, writes, write_bytes, flushes] = &io.all;
            io.whole_device = whole_device;
            io.reads = median(reads);
            io.writes = median(writes);
            io.write_bytes = median(write_bytes);
            io.flushes = median(flushes);
        }
    }
}

fn pairs(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    fn applied() -> Applied {
        Applied {
            mkfs: "mkfs.ext4 -q".to_owned(),
            mount: "noatime".to_owned(),
            mounted_with: Some("rw,noatime".to_owned()),
            db_bench_flags: vec!["--recycle_log_file_num=4".to_owned()],
            left_out: Vec::new(),
        }
    }

    /// Returns a comparison of three sides with one round for each number of microseconds, by which
    /// all sides are slower in it.
    pub(in super::super) fn of_rounds(rounds: &[f64]) -> Comparison {
        let mut c = Comparison {
            conditions: Conditions::default(),
            sides: vec![Side::Ext4, Side::Pumice, Side::Mem],
            baseline: Side::Ext4,
            about: BTreeMap::new(),
            memory: None,
            fs_cache_size: 1 << 30,
            flags: Vec::new(),
            benchmarks: Vec::new(),
            summary: Vec::new(),
            cut_short: None,
        };
        for noise in rounds {
            for (side, us) in [(Side::Ext4, 4.0), (Side::Pumice, 2.0), (Side::Mem, 1.0)] {
                let us = us + noise;
                let mut result = json!({"name": "fillseq", "micros_per_op": us, "ops_per_sec": 1e6 / us,
                    "operations": 100, "synced": true,
                    "io": {"reads": 0, "writes": 200, "write_bytes": 400, "flushes": 100}});
                if side != Side::Mem {
                    result["cpu_us_per_op"] = json!(3.0);
                    result["system_us_per_op"] = json!(2.0);
                    result["voluntary_switches_per_op"] = json!(0.5);
                }
                let report = json!({
                    "file_system": "words", "durability": {"words": "w"}, "results": [result],
                });
                let applied = (side == Side::Ext4).then(applied);
                let reports = vec![report];
                c.add(side, Ran { reports, applied });
            }
        }
        c
    }

    pub(in super::super) fn comparison() -> Comparison {
        of_rounds(&[0.0, 0.5, 5.0])
    }

    #[test]
    fn own_cost_is_taken_round_by_round() {
        let c = comparison();
        let lines = c.lines();
        let ours = lines.iter().find(|l| l.side == Side::Pumice).unwrap();
        assert!((ours.own_cost_us.unwrap() - 1.0).abs() < 1e-9);
        assert!((ours.own_cost_to_baseline.unwrap() - 1.0 / 3.0).abs() < 1e-9);
        assert!((ours.rate_to_baseline.unwrap() - 4.5 / 2.5).abs() < 1e-9);
        assert!((ours.micros_per_op - 2.5).abs() < 1e-9);
        assert_eq!(ours.spread, (2.0, 7.0));
        let mem = lines.iter().find(|l| l.side == Side::Mem).unwrap();
        assert!(mem.own_cost_us.is_none());
    }

    #[test]
    fn intervals_are_of_ratios_within_a_round() {
        // All sides are slower in the last round, which changes the ratios less than the times.
        let c = of_rounds(&[0.0, 0.5, 1.0, 5.0]);
        let lines = c.lines();
        let of = |side| lines.iter().find(|l| l.side == side).unwrap().rate_interval;
        assert_eq!(of(Side::Ext4), None, "the baseline is by itself 1");
        let Some(Interval::Bounds { low, high, .. }) = of(Side::Pumice) else {
            panic!("four rounds are enough");
        };
        assert!((low - 9.0 / 7.0).abs() < 1e-9 && (high - 2.0).abs() < 1e-9);
        let json = serde_json::to_value(&c).unwrap();
        let ours = &json["summary"][1];
        assert_eq!(ours["side"], "pumice");
        assert_eq!(ours["rate_interval"]["confidence"], 0.875);
        assert_eq!(ours["system_us_per_op"], 2.0);
        assert_eq!(ours["voluntary_switches_per_op"], 0.5);
        assert_eq!(json["about"]["ext4"]["settings"]["mount"], "noatime");
    }

    #[test]
    fn a_benchmark_run_twice_is_two_lines() {
        let mut c = comparison();
        c.benchmarks.clear();
        let result =
            |us: f64| json!({"name": "readrandom", "micros_per_op": us, "ops_per_sec": 1.0});
        let report = json!({"results": [result(1.0), result(2.0)]});
        let reports = vec![report, json!({"results": [result(3.0)]})];
        c.add(Side::Mem, reports.into());
        let names: Vec<_> = c.lines().into_iter().map(|l| l.benchmark).collect();
        assert_eq!(names, ["readrandom", "readrandom#2", "readrandom#3"]);
    }
}
