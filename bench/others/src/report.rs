//! The table of the results.

use std::fmt::Write as _;

use crate::kind::StoreKind;
use crate::workloads::{ComparedPhase, Measured};

const PHASES: [ComparedPhase; 6] = [
    ComparedPhase::Fill,
    ComparedPhase::DurablePut,
    ComparedPhase::DurableBatch,
    ComparedPhase::WarmGet,
    ComparedPhase::WarmScan,
    ComparedPhase::ColdGet,
];

/// Returns the table in Markdown: for each store the median of its microseconds per operation, and what the baseline took by
/// what it took in the same round: the median, the least and the most.
#[must_use]
pub fn table(rounds: &[Vec<Measured>], kinds: &[StoreKind], baseline: StoreKind) -> String {
    let mut text = String::from("| store |");
    for phase in PHASES {
        let _ = write!(text, " {} |", phase.name());
    }
    text.push_str(" on disk |\n| --- |");
    text.push_str(&" ---: |".repeat(PHASES.len() + 1));
    text.push('\n');
    for kind in kinds {
        let _ = write!(text, "| {} |", kind.name());
        for phase in PHASES {
            let own: Vec<f64> = rounds
                .iter()
                .filter_map(|r| micros(r, *kind, phase))
                .collect();
            let ratios: Vec<f64> = rounds
                .iter()
                .filter_map(|r| Some(micros(r, baseline, phase)? / micros(r, *kind, phase)?))
                .collect();
            match (median(&own), median(&ratios)) {
                (Some(own), Some(ratio)) => {
                    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
                    let most = ratios.iter().copied().fold(0.0, f64::max);
                    let _ = write!(text, " {own:.1} us, {ratio:.2} ({least:.2} to {most:.2}) |");
                }
                _ => text.push_str(" not run |"),
            }
        }
        let disk = rounds.iter().flatten().filter(|m| m.kind == *kind);
        let disk: Vec<f64> = disk
            .map(|m| m.disk_bytes as f64 / (1 << 20) as f64)
            .collect();
        let _ = writeln!(text, " {:.0} MiB |", median(&disk).unwrap_or_default());
    }
    text
}

fn micros(round: &[Measured], kind: StoreKind, phase: ComparedPhase) -> Option<f64> {
    let measured = round.iter().find(|measured| measured.kind == kind)?;
    let found = measured.micros.iter().find(|(of, _)| *of == phase)?;
    Some(found.1)
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        let round = |kind, micros| Measured {
            kind,
            micros: vec![(ComparedPhase::WarmGet, micros)],
            disk_bytes: 3 << 20,
        };
        let rounds = [
            vec![round(StoreKind::Pumice, 1.0), round(StoreKind::Redb, 2.0)],
            vec![round(StoreKind::Pumice, 4.0), round(StoreKind::Redb, 4.0)],
            vec![round(StoreKind::Pumice, 3.0), round(StoreKind::Redb, 9.0)],
        ];
        let text = table(
            &rounds,
            &[StoreKind::Pumice, StoreKind::Redb],
            StoreKind::Redb,
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2],
            "| pumice | not run | not run | not run | 3.0 us, 2.00 (1.00 to 3.00) | not run | not run | 3 MiB |"
        );
        assert!(
            lines[3].contains("| 4.0 us, 1.00 (1.00 to 1.00) |"),
            "{text}"
        );
    }
}
