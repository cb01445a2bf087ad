//! Rules about words and widths, in sources, scripts and documents.

use regex::Regex;

use crate::{Findings, Source};

/// The widest line of a document, in characters. A table's cell that needs more is a paragraph.
const DOCUMENT_WIDTH: usize = 200;
/// The widest line of anything else.
const SOURCE_WIDTH: usize = 140;
/// Words of another century, and metaphors for which the field has a word.
const WORDS: &str = r"(?i)\b(shall|anew|mend(s|ed|ing)?|to be had|any more|let go of|letting go of|graveyard|landing)\b";
/// A negated noun where the verb can be negated: "is no partition table".
const NO_NOUN: &str = r"\b(\w+) (is|are|was|were) no (\w+)";

/// The rules with what they found.
pub fn find(sources: &[Source]) -> Vec<(&'static str, &'static str, Findings)> {
    let words = Regex::new(WORDS).expect("the pattern is a constant");
    let no_noun = Regex::new(NO_NOUN).expect("the pattern is a constant");
    let mut wordy = Findings::new();
    let mut wide = Findings::new();
    for source in sources {
        let width = if source.path.ends_with(".md") {
            DOCUMENT_WIDTH
        } else {
            SOURCE_WIDTH
        };
        for (n, line) in source.text.lines().enumerate() {
            let place = || {
                format!(
                    "line {}: {}",
                    n + 1,
                    line.trim().chars().take(120).collect::<String>()
                )
            };
            let negated = no_noun.captures_iter(line).any(|found| {
                let subject = found[1].to_lowercase();
                subject != "there" && !matches!(&found[3], "longer" | "more" | "less" | "fewer")
            });
            // CONTRIBUTING shows the words that are not used.
            if (negated || words.is_match(line)) && source.path != "CONTRIBUTING.md" {
                wordy.entry(source.path.clone()).or_default().push(place());
            }
            if line.chars().count() > width {
                wide.entry(source.path.clone()).or_default().push(place());
            }
        }
    }
    vec![
        ("words", "uses words that CONTRIBUTING.md lists", wordy),
        ("widths", "has lines that are too wide", wide),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_negated_nouns() {
        let count = |text: &str| {
            let source = Source {
                path: "a.rs".to_owned(),
                text: text.to_owned(),
            };
            find(&[source])
                .into_iter()
                .find(|rule| rule.0 == "words")
                .unwrap()
                .2
                .len()
        };
        assert_eq!(count("it shall be"), 1);
        assert_eq!(count("a boot signature is no table"), 1);
        assert_eq!(
            count("there is no table, it is no longer here, the amendment"),
            0
        );
    }
}
