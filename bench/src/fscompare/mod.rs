//! `fscompare`: RocksDB on several file systems of the same disk, which take turns.

pub mod args;
pub mod chart;
pub mod disk;
pub mod html;
pub mod interrupt;
pub mod interval;
pub mod machine;
pub mod memory;
pub mod recipe;
pub mod round;
pub mod side;
pub mod table;
pub mod text;

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use self::args::{Args, Plan};
use self::disk::Disk;
pub use self::interrupt::Interrupt;
use self::machine::Conditions;
use self::round::Runner;
use self::table::Comparison;

/// Runs the whole comparison. Everything created for it is removed when this returns, also after an
/// error.
///
/// # Errors
/// Returns a message for the user.
pub fn run(args: &Args, stop: &Interrupt) -> Result<Comparison, String> {
    let plan = Plan::new(args)?;
    let disk = Disk::prepare(&plan, stop)?;
    let runner = Runner::new(&plan, &disk, stop)?;
    let mut comparison = Comparison::new(&plan, Conditions::of(&plan));
    let steps = plan.rounds * plan.sides.len() as u64;
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    'rounds: for round in 0..plan.rounds {
        for at in 0..plan.sides.len() {
            // Each round starts with another side, so that none is always first.
            let turn = (at + usize::try_from(round).unwrap_or(0)) % plan.sides.len();
            let side = plan.sides[turn];
            bar.set_message(format!("round {} of {}: {side}", round + 1, plan.rounds));
            if bar.is_hidden() {
                pumice_bdev_control::complain!("round {} of {}: {side}", round + 1, plan.rounds);
            }
            match stop.check().and_then(|()| runner.run(side)) {
                Ok(ran) => comparison.add(side, ran),
                // Results measured before the interruption are useful.
                Err(e) if comparison.has_results() => {
                    comparison.cut_short = Some(e);
                    break 'rounds;
                }
                Err(e) => return Err(e),
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(comparison)
}
