//! A bar chart as inline SVG: the median of each side, its spread and its rounds.

use std::fmt::Write as _;

/// A bar of a chart.
#[derive(Debug, Clone)]
pub struct Bar {
    /// Name of the side.
    pub name: String,
    /// The class of the style sheet that colours it.
    pub class: &'static str,
    /// The median.
    pub median: f64,
    /// Least and greatest.
    pub spread: (f64, f64),
    /// The value of each round.
    pub rounds: Vec<f64>,
}

/// Width of the drawing. Texts are readable where it is shown on a phone at about this width.
const WIDTH: f64 = 360.0;
/// Distance between the drawing's edge and a bar.
const MARGIN: f64 = 6.0;
/// Height of a side: a line of text with the bar below.
const ROW: f64 = 44.0;
/// Room for the axis.
const AXIS: f64 = 22.0;

/// Replaces the characters that mean something in HTML, and those that neither HTML nor XML allows.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Draws a chart. The bars begin at 0, so that their lengths can be compared. `id` is different for
/// each chart of a page.
#[must_use]
pub fn draw(id: &str, title: &str, bars: &[Bar]) -> String {
    let most = bars.iter().flat_map(values).fold(0.0, f64::max);
    let top = round_up(most);
    let x = |value: f64| MARGIN + value / top * (WIDTH - 2.0 * MARGIN);
    let height = ROW * bars.len() as f64 + AXIS;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg role=\"img\" viewBox=\"0 0 {WIDTH} {height}\" aria-labelledby=\"{id}-title {id}-about\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-about\">{}</desc>",
        escape(title),
        escape(&in_words(bars))
    );
    let floor = height - AXIS;
    for part in 0..=4 {
        let value = top * f64::from(part) / 4.0;
        let at = x(value);
        let anchor = ["start", "middle", "middle", "middle", "end"][part as usize];
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{floor}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            height - 6.0,
            short(value)
        );
    }
    for (n, bar) in bars.iter().enumerate() {
        draw_bar(&mut out, bar, ROW * n as f64, &x);
    }
    out.push_str("</svg>\n");
    out
}

fn draw_bar(out: &mut String, bar: &Bar, top: f64, x: &dyn Fn(f64) -> f64) {
    let finite = |value: f64| if value.is_finite() { value } else { 0.0 };
    let (median, low, high) = (
        finite(bar.median),
        finite(bar.spread.0),
        finite(bar.spread.1),
    );
    let (begin, middle) = (x(0.0), top + 29.0);
    let _ = writeln!(
        out,
        "<text class=\"side\" x=\"{begin:.1}\" y=\"{text:.1}\">{}</text>\
         <text class=\"value\" x=\"{right:.1}\" y=\"{text:.1}\" text-anchor=\"end\">{} µs</text>\n\
         <rect class=\"{}\" x=\"{begin:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\"/>",
        escape(&bar.name),
        short(median),
        bar.class,
        middle - 7.0,
        (x(median) - begin).max(0.5),
        text = top + 16.0,
        right = WIDTH - MARGIN,
    );
    let (low, high) = (x(low), x(high));
    let _ = writeln!(
        out,
        "<path class=\"spread\" d=\"M{low:.1} {a:.1}v10m0 -5H{high:.1}m0 -5v10\"/>",
        a = middle - 5.0
    );
    for round in bar.rounds.iter().filter(|r| r.is_finite()) {
        let at = x(*round);
        let _ = writeln!(
            out,
            "<circle class=\"round\" cx=\"{at:.1}\" cy=\"{middle:.1}\" r=\"2\"/>"
        );
    }
}

fn values(bar: &Bar) -> impl Iterator<Item = f64> {
    let all = [bar.median, bar.spread.1];
    all.into_iter().filter(|v| v.is_finite())
}

/// Describes the chart for those who do not see it.
fn in_words(bars: &[Bar]) -> String {
    let one = |b: &Bar| {
        let (low, high) = b.spread;
        format!(
            "{}: {} µs, from {} to {}",
            b.name,
            short(b.median),
            short(low),
            short(high)
        )
    };
    let all: Vec<String> = bars.iter().map(one).collect();
    format!(
        "Median of microseconds per operation, least and greatest. {}.",
        all.join("; ")
    )
}

/// Returns the end of an axis: the next of 1, 2, 4, 6, 8 and 10 times a power of ten, so that its
/// quarters are short numbers.
fn round_up(most: f64) -> f64 {
    if !(most.is_finite() && most > 0.0) {
        return 1.0;
    }
    let power = 10_f64.powf(most.log10().floor());
    let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    // A rounded logarithm may be the one of the next power.
    let step = steps.into_iter().find(|s| s * power >= most);
    step.unwrap_or(20.0) * power
}

/// Returns a number with about three digits.
fn short(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_html_would_read_as_markup_is_escaped() {
        assert_eq!(
            escape("<script>\"a\" & 'b'</script>\u{1b}[2J\n"),
            "&lt;script&gt;&quot;a&quot; &amp; &#39;b&#39;&lt;/script&gt;\u{fffd}[2J\n"
        );
        assert_eq!(escape("× µs – 96 %"), "× µs – 96 %");
    }

    #[test]
    fn an_axis_ends_at_a_short_number_that_all_bars_reach() {
        for (most, end) in [
            (0.93, 1.0),
            (1.0, 1.0),
            (1.2, 2.0),
            (3.7, 4.0),
            (686.0, 800.0),
            (8100.0, 10_000.0),
        ] {
            assert!((round_up(most) - end).abs() < 1e-9, "{most}");
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!((round_up(bad) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn numbers_have_about_three_digits() {
        let all = [686.4, 34.80, 3.456, 0.1234, 0.0, 10.0, 100.0, 1000.0];
        let shown = all.map(short);
        assert_eq!(
            shown,
            ["686", "34.8", "3.46", "0.123", "0", "10", "100", "1000"]
        );
        assert_eq!(short(f64::NAN), "–");
    }

    #[test]
    fn bars_are_as_long_as_their_medians_and_show_every_round() {
        let bar = |name: &str, median: f64| Bar {
            name: name.to_owned(),
            class: "kernel",
            median,
            spread: (median / 2.0, median * 2.0),
            rounds: vec![median / 2.0, median, median * 2.0],
        };
        let svg = draw("c0", "a & b", &[bar("ext4", 20.0), bar("<xfs>", 10.0)]);
        // The axis ends at 40, the drawing is 348 wide.
        assert!(svg.contains("width=\"174.0\""), "{svg}");
        assert!(svg.contains("width=\"87.0\""), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 6);
        assert!(svg.contains("&lt;xfs&gt;: 10 µs, from 5 to 20"), "{svg}");
        assert!(svg.contains("<title id=\"c0-title\">a &amp; b</title>"));
    }

    #[test]
    fn what_was_not_measured_is_drawn_as_nothing() {
        let bar = Bar {
            name: "ext4".to_owned(),
            class: "kernel",
            median: f64::NAN,
            spread: (f64::INFINITY, 0.0),
            rounds: vec![f64::NAN],
        };
        let svg = draw("c0", "t", &[bar]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 0);
    }
}
