//! An executable model of the journal protocol: a device that reorders, tears, forgets and rots; a writer; its
//! recovery; and the promise.
//!
//! It walks at random through what the application, the background, the device and the environment can do. At every
//! step it cuts the power in many ways, also during recovery, and lets a block of the ring rot, and it checks what a
//! recovery finds. Without any one of the rules the promise is broken; with all of them it is not.
//!
//! - `cargo run --release -p pumice-journal-model` checks both, and fails if one of them is not so.
//! - `… -- walk [N]` takes random walks with all rules, N states.
//! - `… -- stories [NAME [N]]` tells the short stories in every order, with all rules or without the rule NAME.
//! - `… -- NAME [N]` prints the shortest broken walk without the rule NAME, step by step.
//! - `… -- coverage [N]` counts what happens in N walks.
//!
//! It is deterministic: the same build prints the same.

mod device;
mod format;
mod oracle;
mod process;
mod rules;
mod scenario;
mod superblock;
mod world;
mod writer;

use device::Kind;
use rules::{MOST, Rules, table};
use world::{Broken, KINDS, coverage, search};

/// Tells all stories on all kinds of device. Returns the number of states, and the stories that are broken.
fn stories(rules: &Rules, budget: u64, aloud: bool) -> (u64, Vec<String>) {
    let (mut total, mut broken) = (0, Vec::new());
    for (name, story) in scenario::STORIES {
        for kind in KINDS {
            match scenario::tell(kind, rules, story, budget) {
                Ok(states) => total += states,
                Err((what, trace)) => {
                    if aloud {
                        println!("{name}, {kind:?}: {what}\n  {}", trace.join("\n  "));
                    }
                    broken.push(format!("{name} ({kind:?})"));
                }
            }
        }
    }
    (total, broken)
}

/// Returns how these rules break the promise: in a story, or in a walk.
fn first_broken(rules: &Rules) -> Option<String> {
    let (_, told) = stories(rules, 300, false);
    if let Some(story) = told.first() {
        return Some(format!("broken in the story \"{story}\""));
    }
    let (_, first, broken, _) = search(rules, MOST, 1);
    (broken > 0).then(|| format!("broken after {first} states"))
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |n: usize, or: u64| args.get(n).and_then(|n| n.parse().ok()).unwrap_or(or);
    let show = |(kind, seed, b): (Kind, u64, Broken)| {
        println!(
            "  {kind:?}, seed {seed}: {}\n  {}",
            b.what,
            b.trace.join("\n  ")
        );
    };
    let rows = table();
    let ok = match args.first().map_or("check", String::as_str) {
        "check" => {
            let mut ok = superblock::check() & process::check();
            let budget = number(1, 300_000);
            let (states, _, broken, best) = search(&Rules::all(), budget, 1);
            println!("all rules: {states} states, {broken} walks broken");
            best.into_iter().for_each(show);
            let (states, told) = stories(&Rules::all(), 300, true);
            println!(
                "all rules, short stories: {states} states, {} broken",
                told.len()
            );
            ok &= broken == 0 && told.is_empty();
            scenario::pinned(&Rules::all());
            for without in rows {
                let mut rules = Rules::all();
                (without.change)(&mut rules);
                let found = first_broken(&rules);
                println!(
                    "without rule {} ({}): {}",
                    without.rule,
                    without.name,
                    found.as_deref().unwrap_or("never broken")
                );
                ok &= found.is_some();
            }
            ok
        }
        "walk" => {
            let (states, _, broken, best) = search(&Rules::all(), number(1, 3_000_000), 1);
            println!("all rules: {states} states, {broken} walks broken");
            best.into_iter().for_each(show);
            broken == 0
        }
        "coverage" => {
            coverage(number(1, 300));
            true
        }
        "stories" => {
            let mut rules = Rules::all();
            if let Some(without) = args
                .get(1)
                .and_then(|name| rows.iter().find(|w| w.name == name))
            {
                (without.change)(&mut rules);
                println!("without rule {}", without.rule);
            }
            let (states, told) = stories(&rules, number(2, 2000), true);
            println!(
                "{states} states without a fault; broken: {}",
                told.join("; ")
            );
            told.is_empty()
        }
        name => {
            let Some(without) = rows.iter().find(|w| w.name == name) else {
                let names: Vec<&str> = rows.iter().map(|w| w.name).collect();
                eprintln!(
                    "journal-model: there is no rule {name}; choose one of {}",
                    names.join(", ")
                );
                std::process::exit(2);
            };
            let mut rules = Rules::all();
            (without.change)(&mut rules);
            let (states, _, broken, best) = search(&rules, number(1, 3_000_000), 40);
            println!(
                "without rule {}: {states} states, {broken} walks broken",
                without.rule
            );
            best.into_iter().for_each(show);
            true
        }
    };
    std::process::exit(i32::from(!ok));
}
