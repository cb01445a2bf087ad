//! The results as text.

use std::fmt::Write as _;

use super::interval::{CONFIDENCE, ENOUGH, FEWEST, Interval};
use super::side::Side;
use super::table::{Comparison, Line, Runs};

impl Comparison {
    /// Returns the table, with the description and the durability of each side.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        let lines = self.lines();
        for (benchmark, runs) in &self.benchmarks {
            let here: Vec<&Line> = lines.iter().filter(|l| l.benchmark == *benchmark).collect();
            let _ = writeln!(out, "{benchmark}  ({})", conditions(runs.values()));
            self.write_times(&mut out, &here);
            write_processor(&mut out, &here);
            for side in &self.sides {
                for note in runs.get(side).map(notes).unwrap_or_default() {
                    let _ = writeln!(out, "  {side}: {note}");
                }
            }
            out.push('\n');
        }
        for note in self.notes(&lines) {
            let _ = writeln!(out, "{note}");
        }
        for side in &self.sides {
            if let Some(words) = self.words_about(*side) {
                let _ = writeln!(out, "{side}: {words}");
            }
        }
        out
    }

    fn write_times(&self, out: &mut String, lines: &[&Line]) {
        let _ = writeln!(
            out,
            "  {:<11} {:>12} {:>19} {:>11} {:>12} {:>24} {:>11} {:>15}",
            "side",
            "median µs/op",
            "least – most",
            "ops/s",
            format!("× {}", self.baseline),
            "interval (confidence)",
            "own cost",
            format!("of {}'s", self.baseline)
        );
        for l in lines {
            let _ = writeln!(
                out,
                "  {:<11} {:>12.3} {:>19} {:>11.0} {:>12} {:>22} {:>10} {:>15}",
                l.side.to_string(),
                l.micros_per_op,
                format!("{:.3} – {:.3}", l.spread.0, l.spread.1),
                l.ops_per_sec,
                or_dash(l.rate_to_baseline, 2, ""),
                l.rate_interval.map_or("–".to_owned(), |i| i.to_string()),
                or_dash(l.own_cost_us, 2, " µs"),
                or_dash(l.own_cost_to_baseline, 2, "")
            );
        }
    }

    /// Returns the sentences about all sides.
    pub(super) fn notes(&self, lines: &[Line]) -> Vec<String> {
        let mut out = vec![
            "Own cost: the time less the memory env's in the same round.".to_owned(),
            "CPU: processor time of the process, its part in the kernel, and its voluntary context \
             switches (waits); not of the kernel's own threads."
                .to_owned(),
        ];
        out.extend(interval_note(lines));
        out.push(match self.memory {
            Some(m) => format!(
                "Memory: each run but mem in a control group of {} MiB, page cache included; Pumice has {} to {} MiB of it.",
                m >> 20,
                self.fs_cache_size >> 20,
                (m - m / 4) >> 20
            ),
            None => format!(
                "Memory: the kernel's page cache is not bounded; Pumice's is {} MiB.",
                self.fs_cache_size >> 20
            ),
        });
        out
    }

    /// Returns the description of a side that has run.
    pub(super) fn words_about(&self, side: Side) -> Option<String> {
        let about = self.about.get(&side)?;
        let mut words = format!("{}. Durability: {}.", about.file_system, about.durability);
        if let Some(settings) = &about.settings {
            let _ = write!(words, " {}", settings.words());
        }
        Some(words)
    }
}

/// Returns the number of rounds of a benchmark, and whether its writes were synced.
pub(super) fn conditions<'a>(runs: impl Iterator<Item = &'a Runs> + Clone) -> String {
    let rounds = runs.clone().map(|r| r.micros_per_op.len()).max();
    let synced = if runs.into_iter().any(|r| r.synced) {
        "every write synced"
    } else {
        "writes not synced"
    };
    format!("{} rounds; {synced}", rounds.unwrap_or(0))
}

fn write_processor(out: &mut String, lines: &[&Line]) {
    let _ = writeln!(
        out,
        "  {:<11} {:>12} {:>19} {:>11}",
        "", "CPU µs/op", "of it in the kernel", "waits/op"
    );
    for l in lines {
        let _ = writeln!(
            out,
            "  {:<11} {:>12} {:>19} {:>11}",
            l.side.to_string(),
            or_dash(Some(l.cpu_us_per_op), 3, ""),
            or_dash(Some(l.system_us_per_op), 3, ""),
            or_dash(Some(l.voluntary_switches_per_op), 3, "")
        );
    }
}

/// Returns what one side's runs tell beside the numbers of the table.
pub(super) fn notes(runs: &Runs) -> Vec<String> {
    let mut out = Vec::new();
    if !runs.message.is_empty() {
        out.push(runs.message.clone());
    }
    if let Some(io) = &runs.io_per_op {
        out.push(format!(
            "per operation {:.3} device writes ({:.0} bytes), {:.3} reads, {:.3} flushes{}",
            io.writes,
            io.write_bytes,
            io.reads,
            io.flushes,
            if io.whole_device {
                " (of the whole block device)"
            } else {
                ""
            }
        ));
    }
    out
}

/// Returns the sentences that explain the intervals of these lines, or their absence.
fn interval_note(lines: &[Line]) -> Option<String> {
    let intervals: Vec<Interval> = lines.iter().filter_map(|l| l.rate_interval).collect();
    let wanted = CONFIDENCE * 100.0;
    let is_less =
        |i: &Interval| matches!(i, Interval::Bounds { confidence, .. } if *confidence < CONFIDENCE);
    let few = |i: &Interval| matches!(i, Interval::TooFew { .. });
    if intervals.is_empty() {
        return None;
    }
    let mut note = format!(
        "Interval: exact, of the median of the ratio, by order statistics over the rounds; the confidence is at least {wanted:.0} % \
         from {ENOUGH} rounds on."
    );
    if intervals.iter().any(is_less) {
        let _ = write!(
            note,
            " There are fewer, so it is that from the least to the greatest ratio."
        );
    }
    if intervals.iter().any(few) {
        let _ = write!(
            note,
            " There are too few rounds for one: it needs at least {FEWEST}."
        );
    }
    Some(note)
}

/// Returns a number with so many digits behind the point, or a dash where it is not known.
pub(super) fn or_dash(value: Option<f64>, digits: usize, unit: &str) -> String {
    match value {
        Some(v) if v.is_finite() => format!("{v:.digits$}{unit}"),
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{comparison, of_rounds};

    #[test]
    fn the_table_says_what_is_synced_and_counted() {
        let text = comparison().render();
        assert!(text.contains("every write synced"), "{text}");
        assert!(
            text.contains("pumice: per operation 2.000 device writes (4 bytes)"),
            "{text}"
        );
        assert!(text.contains("1.00 µs"), "{text}");
    }

    #[test]
    fn the_processors_part_is_beside_the_time() {
        let text = comparison().render();
        let line = "  pumice             3.000               2.000       0.500";
        assert!(text.lines().any(|l| l == line), "{text}");
        // The memory env of the example reports none.
        assert!(text.contains("  mem                    –"), "{text}");
    }

    #[test]
    fn too_few_rounds_are_named() {
        let text = comparison().render();
        assert!(text.contains("too few rounds"), "{text}");
        assert!(text.contains("needs at least 4"), "{text}");
    }

    #[test]
    fn intervals_have_their_confidence() {
        let four = of_rounds(&[0.0, 0.5, 1.0, 5.0]).render();
        assert!(four.contains("1.29 – 2.00 (87.5 %)"), "{four}");
        assert!(four.contains("There are fewer"), "{four}");
        let six = of_rounds(&[0.0, 0.5, 1.0, 5.0, 2.0, 3.0]).render();
        assert!(six.contains("1.29 – 2.00 (96.9 %)"), "{six}");
        assert!(!six.contains("There are"), "{six}");
    }

    #[test]
    fn the_settings_of_a_side_are_told() {
        let text = comparison().render();
        let told = "ext4: words. Durability: w. Made by mkfs.ext4 -q; mounted with -o noatime (in effect: rw,noatime)";
        assert!(text.contains(told), "{text}");
    }
}
