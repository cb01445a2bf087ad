//! The results as one page that needs no other file.
//!
//! Each element is closed and each attribute quoted, so that the page is well-formed XML but for the
//! line of its document type. Every text that is not from here goes through [`escape`].

use std::fmt::Write as _;

use super::chart::{Bar, draw, escape};
use super::side::Side;
use super::table::{Comparison, Line};
use super::text::{conditions, notes, or_dash};

const STYLE: &str = include_str!("page.css");

impl Comparison {
    /// Returns the page.
    #[must_use]
    pub fn page(&self) -> String {
        let lines = self.lines();
        let title = format!("RocksDB on {}", listed(&self.sides));
        let title = escape(&title);
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        );
        if let Some(why) = &self.cut_short {
            let _ = writeln!(
                out,
                "<p class=\"cut\">Not every round was run: {}</p>",
                escape(why)
            );
        }
        self.write_conditions(&mut out);
        for n in 0..self.benchmarks.len() {
            self.write_benchmark(&mut out, n, &lines);
        }
        out.push_str("<section>\n<h2>Sides</h2>\n<dl>\n");
        for side in &self.sides {
            let words = self.words_about(*side);
            let words = words.unwrap_or("It has not run.".to_owned());
            write_term(&mut out, &side.to_string(), &escape(&words));
        }
        out.push_str("</dl>\n</section>\n<section>\n<h2>How to read it</h2>\n<ul>\n");
        let chart = "Bars: the median over the rounds; the line goes from the least to the greatest, and each circle is a round. \
                     Shorter is faster."
            .to_owned();
        for note in [chart].into_iter().chain(self.notes(&lines)) {
            let _ = writeln!(out, "<li>{}</li>", escape(&note));
        }
        out.push_str("</ul>\n</section>\n</main>\n</body>\n</html>\n");
        out
    }

    fn write_conditions(&self, out: &mut String) {
        let conditions = &self.conditions;
        let machine = &conditions.machine;
        out.push_str("<section>\n<h2>Conditions</h2>\n<dl>\n");
        let command = format!("<code>{}</code>", escape(&conditions.command));
        write_term(out, "Command", &command);
        write_term(out, "Date", &escape(&conditions.date));
        let commit = conditions.commit.as_deref().unwrap_or("not known");
        write_term(out, "Commit", &escape(commit));
        let processor = format!("{}, {} cores", machine.cpu, machine.cores);
        write_term(out, "Processor", &escape(&processor));
        let memory = format!("{} MiB", machine.memory_bytes >> 20);
        write_term(out, "Memory", &memory);
        write_term(out, "Kernel", &escape(&machine.kernel));
        write_term(out, "Disk", &escape(&machine.disks.join("; ")));
        out.push_str("</dl>\n</section>\n");
    }

    fn write_benchmark(&self, out: &mut String, n: usize, lines: &[Line]) {
        let (benchmark, runs) = &self.benchmarks[n];
        let here: Vec<&Line> = lines.iter().filter(|l| l.benchmark == *benchmark).collect();
        let bars: Vec<Bar> = here
            .iter()
            .map(|l| Bar {
                name: l.side.to_string(),
                class: class(l.side),
                median: l.micros_per_op,
                spread: l.spread,
                rounds: runs[&l.side].micros_per_op.clone(),
            })
            .collect();
        let name = escape(benchmark);
        let _ = writeln!(
            out,
            "<section>\n<h2 id=\"b{n}\">{name}</h2>\n<p>{}.</p>\n<figure>\n{}\
             <figcaption>{name}: microseconds per operation. Shorter is faster.</figcaption>\n</figure>",
            escape(&conditions(runs.values())),
            draw(
                &format!("chart{n}"),
                &format!("{benchmark}: microseconds per operation by side"),
                &bars
            )
        );
        // A wide table scrolls by itself, by the keyboard as well.
        let _ = writeln!(
            out,
            "<div class=\"wide\" role=\"region\" aria-labelledby=\"b{n}\" tabindex=\"0\">\n<table>\n\
             <caption>{name}: ratios by {}, in the same round</caption>",
            self.baseline
        );
        self.write_head(out);
        for line in here {
            self.write_line(out, line);
        }
        out.push_str("</tbody>\n</table>\n</div>\n<ul class=\"faint\">\n");
        for side in &self.sides {
            for note in runs.get(side).map(notes).unwrap_or_default() {
                let _ = writeln!(out, "<li>{side}: {}</li>", escape(&note));
            }
        }
        out.push_str("</ul>\n</section>\n");
    }

    fn write_head(&self, out: &mut String) {
        out.push_str("<thead><tr>");
        let base = self.baseline;
        for head in [
            "side",
            "median µs/op",
            "least – most",
            "ops/s",
            &format!("× {base}"),
            "interval (confidence)",
            "own cost µs",
            &format!("of {base}'s"),
            "CPU µs/op",
            "of it in the kernel",
            "waits/op",
        ] {
            let _ = write!(out, "<th scope=\"col\">{}</th>", escape(head));
        }
        out.push_str("</tr></thead>\n<tbody>\n");
    }

    fn write_line(&self, out: &mut String, l: &Line) {
        let baseline = if l.side == self.baseline {
            " (baseline)"
        } else {
            ""
        };
        let _ = write!(out, "<tr><th scope=\"row\">{}{baseline}</th>", l.side);
        for cell in [
            or_dash(Some(l.micros_per_op), 3, ""),
            format!("{:.3} – {:.3}", l.spread.0, l.spread.1),
            or_dash(Some(l.ops_per_sec), 0, ""),
            or_dash(l.rate_to_baseline, 2, ""),
            l.rate_interval.map_or("–".to_owned(), |i| i.to_string()),
            or_dash(l.own_cost_us, 2, ""),
            or_dash(l.own_cost_to_baseline, 2, ""),
            or_dash(Some(l.cpu_us_per_op), 3, ""),
            or_dash(Some(l.system_us_per_op), 3, ""),
            or_dash(Some(l.voluntary_switches_per_op), 3, ""),
        ] {
            let _ = write!(out, "<td>{}</td>", escape(&cell));
        }
        out.push_str("</tr>\n");
    }
}

/// Returns the class of the style sheet for a side's bar.
fn class(side: Side) -> &'static str {
    match side {
        Side::Host | Side::Ext4 | Side::Ext4Tuned | Side::Xfs | Side::XfsTuned => "kernel",
        Side::Pumice | Side::PumiceDev => "ours",
        Side::Mem => "memory",
    }
}

/// Writes a term and its description, which is markup.
fn write_term(out: &mut String, term: &str, description: &str) {
    let _ = writeln!(out, "<dt>{}</dt><dd>{description}</dd>", escape(term));
}

/// Lists names: "a, b and c".
fn listed(sides: &[Side]) -> String {
    let names: Vec<String> = sides.iter().map(ToString::to_string).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::super::side::search_path;
    use super::super::table::tests::of_rounds;
    use super::*;

    /// Reads a page as XML and returns its text. It fails where an element is not closed by its own
    /// end, an attribute is not quoted or twice there, or a character is not escaped.
    fn well_formed(page: &str) -> Result<String, String> {
        let mut rest = page
            .strip_prefix("<!DOCTYPE html>\n")
            .ok_or("no document type")?;
        let (mut open, mut text) = (Vec::new(), String::new());
        let mut ids = Vec::new();
        while let Some((before, tag)) = rest.split_once('<') {
            text.push_str(&plain(before)?);
            let (tag, after) = tag.split_once('>').ok_or("a tag without an end")?;
            rest = after;
            if let Some(name) = tag.strip_prefix('/') {
                let last = open.pop();
                if last != Some(name) {
                    return Err(format!("</{name}> ends {last:?}"));
                }
                text.push(' ');
                continue;
            }
            let (tag, empty) = match tag.strip_suffix('/') {
                Some(tag) => (tag, true),
                None => (tag, false),
            };
            let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(format!("<{name}> is not an element"));
            }
            let attributes = read_attributes(attributes)?;
            ids.extend(
                attributes
                    .iter()
                    .filter(|a| a.0 == "id")
                    .map(|a| a.1.clone()),
            );
            if !empty {
                open.push(name);
            }
        }
        if !open.is_empty() || !plain(rest)?.trim().is_empty() {
            return Err(format!("open at the end: {open:?}, {rest}"));
        }
        ids.sort();
        if let Some(twice) = ids.windows(2).find(|w| w[0] == w[1]) {
            return Err(format!("the identifier {} is there twice", twice[0]));
        }
        Ok(text)
    }

    /// Reads `name="value"` with a space between two of them.
    fn read_attributes(text: &str) -> Result<Vec<(String, String)>, String> {
        let (mut rest, mut out) = (text.trim(), Vec::<(String, String)>::new());
        while !rest.is_empty() {
            let (name, value) = rest.split_once("=\"").ok_or(format!("attributes {rest}"))?;
            let (value, after) = value.split_once('"').ok_or(format!("quotes of {name}"))?;
            if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
                return Err(format!("attribute {name}"));
            }
            if out.iter().any(|(other, _)| other == name) {
                return Err(format!("attribute {name} is there twice"));
            }
            out.push((name.to_owned(), plain(value)?));
            rest = match after.strip_prefix(' ') {
                Some(after) => after,
                None if after.is_empty() => after,
                None => return Err(format!("no space after {name}")),
            };
        }
        Ok(out)
    }

    /// Replaces references to characters, of which XML knows five by name.
    fn plain(text: &str) -> Result<String, String> {
        if let Some(c) = text
            .chars()
            .find(|c| c.is_control() && !"\n\t".contains(*c))
        {
            return Err(format!("the control character {c:?}"));
        }
        let mut out = String::new();
        let mut pieces = text.split('&');
        out.push_str(pieces.next().unwrap_or_default());
        for piece in pieces {
            let (name, after) = piece.split_once(';').ok_or(format!("&{piece}"))?;
            out.push(match name {
                "amp" => '&',
                "lt" => '<',
                "gt" => '>',
                "quot" => '"',
                "#39" => '\'',
                _ => return Err(format!("&{name};")),
            });
            out.push_str(after);
        }
        Ok(out)
    }

    /// Returns a comparison with texts that want to be markup.
    fn hostile() -> Comparison {
        let mut c = of_rounds(&[0.0, 0.5, 1.0, 5.0]);
        let evil = "</title><script src=x>\"'&amp;\u{1b}\u{fffe}";
        c.conditions.command = format!("fscompare --image '{evil}'");
        c.conditions.commit = Some(evil.to_owned());
        c.conditions.date = evil.to_owned();
        c.conditions.machine.cpu = evil.to_owned();
        c.conditions.machine.kernel = evil.to_owned();
        c.conditions.machine.disks = vec![evil.to_owned()];
        c.cut_short = Some(evil.to_owned());
        for about in c.about.values_mut() {
            about.file_system = evil.to_owned();
            about.durability = evil.to_owned();
            if let Some(settings) = &mut about.settings {
                settings.left_out = vec![evil.to_owned()];
            }
        }
        let (_, runs) = c.benchmarks[0].clone();
        c.benchmarks.push((evil.to_owned(), runs));
        for runs in c.benchmarks[1].1.values_mut() {
            runs.message = evil.to_owned();
        }
        c
    }

    #[test]
    fn the_page_is_well_formed_and_complete() {
        let c = hostile();
        let page = c.page();
        let text = well_formed(&page).unwrap_or_else(|e| panic!("{e}\n{page}"));
        for side in &c.sides {
            assert!(page.contains(&format!("<dt>{side}</dt>")), "{side}");
            let row = format!("<th scope=\"row\">{side}");
            assert_eq!(page.matches(&row).count(), 2, "{side}");
        }
        for part in [
            "fillseq: microseconds per operation",
            "every write synced",
            "</title><script src=x>\"'&amp;\u{fffd}\u{fffd}",
            "1.29 – 2.00 (87.5 %)",
            "Durability: ",
            "Made by mkfs.ext4 -q; mounted with -o noatime",
            "per operation 2.000 device writes",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(page.matches("<svg ").count(), 2);
        assert_eq!(page.matches("<caption>").count(), 2);
        // Four rounds of three sides in two charts.
        assert_eq!(page.matches("<circle").count(), 24);
    }

    #[test]
    fn the_page_needs_nothing_from_outside() {
        let page = hostile().page();
        for word in [
            "http://", "https://", "url(", "@import", "<link", "<script", "<img", " src=\"",
            " href=",
        ] {
            assert!(!page.contains(word), "{word}");
        }
        for word in [
            "prefers-color-scheme: dark",
            "@media print",
            "name=\"viewport\"",
        ] {
            assert!(page.contains(word), "{word}");
        }
    }

    #[test]
    fn the_check_finds_what_is_not_well_formed() {
        let page = |body: &str| well_formed(&format!("<!DOCTYPE html>\n{body}"));
        assert_eq!(page("<p id=\"a\">1 &lt; 2<br/></p>").unwrap(), "1 < 2 ");
        for bad in [
            "<p>",
            "<p></b>",
            "<p></p></p>",
            "<p a=1></p>",
            "<p a=\"1\"b=\"2\"></p>",
            "<p a=\"1\" a=\"2\"></p>",
            "<p>a & b</p>",
            "<p>&nbsp;</p>",
            "<p>\u{1b}</p>",
            "<p id=\"a\"/><b id=\"a\"/>",
            "text",
        ] {
            assert!(page(bad).is_err(), "{bad}");
        }
    }

    /// Returns the browser that is installed, if there is one that draws without a screen.
    fn browser() -> Option<std::path::PathBuf> {
        let names = ["chromium", "google-chrome", "chromium-headless-shell"];
        let path = search_path();
        let dirs: Vec<_> = std::env::split_paths(&path).collect();
        let found = |name: &&str| dirs.iter().map(|d| d.join(name)).find(|p| p.is_file());
        names.iter().find_map(found)
    }

    #[test]
    fn a_browser_draws_the_page() {
        let Some(browser) = browser() else {
            println!("skipped: a_browser_draws_the_page: no chromium or google-chrome");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let (page, picture) = (dir.path().join("p.html"), dir.path().join("p.png"));
        std::fs::write(&page, hostile().page()).unwrap();
        let mut running = Command::new(&browser)
            .args(["--headless", "--no-sandbox", "--disable-gpu"])
            .arg(format!(
                "--user-data-dir={}",
                dir.path().join("user").display()
            ))
            .args(["--window-size=400,1600"])
            .arg(format!("--screenshot={}", picture.display()))
            .arg(format!("file://{}", page.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while running.try_wait().unwrap().is_none() {
            if began.elapsed() > Duration::from_secs(120) {
                let _ = running.kill();
                let _ = running.wait();
                panic!("the browser does not end");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let picture = std::fs::read(&picture).unwrap();
        assert!(picture.starts_with(b"\x89PNG"), "not a picture");
        // A blank page of this size takes a tenth of it.
        assert!(picture.len() > 20_000, "{} bytes", picture.len());
    }

    #[test]
    fn names_are_listed() {
        assert_eq!(listed(&[Side::Mem]), "mem");
        let all = [Side::Ext4, Side::Pumice, Side::Mem];
        assert_eq!(listed(&all), "ext4, pumice and mem");
    }
}
