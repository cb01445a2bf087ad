//! The lists of what is allowed for now.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::{Findings, git};

/// Places that a message shows of one file.
const SHOWN: usize = 5;

/// Compares the findings of a rule with its list and returns how many files differ. With `bless`
/// it writes the list, if that makes it shorter.
pub fn check(top: &Path, rule: &str, what: &str, findings: &Findings, bless: bool) -> usize {
    let name = format!("tests/tidy/allow/{rule}.txt");
    let path = top.join(&name);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let allowed = match parse(&text) {
        Ok(allowed) => allowed,
        Err(line) => {
            eprintln!("tidy: {name}: the line {line:?} is not a path and a number");
            return 1;
        }
    };
    let found: usize = findings.values().map(Vec::len).sum();
    let bound: usize = allowed.values().sum();

    // Moving a file keeps the sum; lengthening a list needs a change of its rule.
    let before = shortest(top, &name);
    if before.is_some_and(|before| bound > before) {
        eprintln!(
            "tidy: {name} allows {bound} places and an earlier commit allowed {}: it may only get shorter",
            before.unwrap_or(0)
        );
        return 1;
    }

    if bless && (before.is_none() || found <= bound) {
        let mut list = String::new();
        for (file, places) in findings.iter().filter(|(_, places)| !places.is_empty()) {
            let _ = writeln!(list, "{file} {}", places.len());
        }
        if let Err(e) = std::fs::write(&path, list) {
            eprintln!("tidy: {name} cannot be written: {e}");
            return 1;
        }
        return 0;
    }

    let mut differ = 0;
    for (file, places) in findings {
        let may = allowed.get(file).copied().unwrap_or(0);
        if places.len() > may {
            differ += 1;
            eprintln!(
                "tidy: {file} {what} {} times, {may} are allowed (rule {rule}):",
                places.len()
            );
            for place in places.iter().take(SHOWN) {
                eprintln!("    {place}");
            }
        } else if places.len() < may {
            differ += 1;
            eprintln!(
                "tidy: {file} has {} places left of rule {rule} and its list says {may}: run `scripts/tidy --bless`",
                places.len()
            );
        }
    }
    for (file, may) in allowed
        .iter()
        .filter(|(file, _)| !findings.contains_key(*file))
    {
        differ += 1;
        eprintln!(
            "tidy: {name} allows {may} places in {file}, which has none: run `scripts/tidy --bless`"
        );
    }
    differ
}

/// The smallest sum that the list had since the rules were last changed, as far as this clone knows.
fn shortest(top: &Path, name: &str) -> Option<usize> {
    let rules = git(top, &["log", "-1", "--format=%H", "--", "tests/tidy/src"]).ok()?;
    let rules = rules.trim();
    let since = git(
        top,
        &["log", "--format=%H", &format!("{rules}..HEAD"), "--", name],
    )
    .ok()?;
    since
        .lines()
        .chain([rules])
        .filter_map(|commit| git(top, &["show", &format!("{commit}:{name}")]).ok())
        .filter_map(|text| parse(&text).ok())
        .map(|list| list.values().sum())
        .min()
}

/// The list of a rule, or the line that cannot be read.
fn parse(text: &str) -> Result<BTreeMap<String, usize>, String> {
    text.lines()
        .map(|line| {
            line.rsplit_once(' ')
                .and_then(|(path, count)| Some((path.to_owned(), count.parse().ok()?)))
                .ok_or_else(|| line.to_owned())
        })
        .collect()
}
