//! Hints for a name that does not exist.

/// Returns the name that `wanted` most probably means, if any is similar.
pub fn nearest<'a>(wanted: &str, names: &'a [String]) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    let cost = |name: &str| {
        let name = name.to_lowercase();
        // A name that begins with the wanted one is the likeliest: `Nvme0n1` for `Nvme0`.
        if !wanted.is_empty() && (name.starts_with(&wanted) || wanted.starts_with(&name)) {
            return 0;
        }
        distance(&wanted, &name)
    };
    let best = names.iter().map(|n| (cost(n), n)).min_by_key(|(c, _)| *c)?;
    let len = wanted.chars().count();
    let limit = (len / 3).max(if len < 4 { 1 } else { 2 });
    (best.0 <= limit).then_some(best.1.as_str())
}

/// Returns the edit distance (Levenshtein), at most what two short names can have.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Returns the end of a "no bdev" message.
pub(super) fn hint(wanted: &str, names: &[String]) -> String {
    if names.is_empty() {
        return ": no bdevs configured: pass --json or a URI".to_owned();
    }
    if let Some(name) = nearest(wanted, names) {
        return format!("; did you mean `{name}`?");
    }
    let mut list = names
        .iter()
        .take(16)
        .map(|n| format!("`{n}`"))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > 16 {
        list.push_str(", …");
    }
    format!("; there are {list}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found() {
        let names = ["Nvme0n1", "Malloc0", "Raid"].map(ToOwned::to_owned);
        assert_eq!(nearest("Nvme0", &names), Some("Nvme0n1"));
        assert_eq!(nearest("malloc0", &names), Some("Malloc0"));
        assert_eq!(nearest("Maloc0", &names), Some("Malloc0"));
        assert_eq!(nearest("zzz", &names), None);
        assert_eq!(hint("Nvme0", &names), "; did you mean `Nvme0n1`?");
        assert_eq!(
            hint("x", &[]),
            ": no bdevs configured: pass --json or a URI"
        );
        assert!(hint("zzzz", &names).contains("`Raid`"));
    }
}
