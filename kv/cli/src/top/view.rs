//! The terminal view of `pumice top`.

use std::io;
use std::time::Duration;

use pumice_bdev_control::terminal::visible;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};

use super::report::Report;
use crate::files::human;

/// A request of the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Nothing,
    /// The terminal has another size.
    Redraw,
    End,
}

/// The terminal, which shows the view until this is dropped.
pub struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    pub fn open() -> io::Result<Screen> {
        Ok(Screen {
            terminal: ratatui::try_init()?,
        })
    }

    pub fn draw(&mut self, target: &str, report: &Report) -> io::Result<()> {
        self.terminal
            .draw(|frame| draw(frame, target, report))
            .map(|_| ())
    }

    /// Returns the user's request that comes within `wait`.
    pub fn asked(&mut self, wait: Duration) -> io::Result<Asked> {
        if !event::poll(wait)? {
            return Ok(Asked::Nothing);
        }
        Ok(match event::read()? {
            Event::Key(key) if key.kind != KeyEventKind::Release => match key.code {
                KeyCode::Char('q') | KeyCode::Esc => Asked::End,
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Asked::End,
                _ => Asked::Nothing,
            },
            Event::Resize(..) => Asked::Redraw,
            _ => Asked::Nothing,
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

fn draw(frame: &mut Frame<'_>, target: &str, report: &Report) {
    let heights = [
        Constraint::Length(1),
        Constraint::Length(7),
        Constraint::Length(3),
        Constraint::Min(0),
        Constraint::Length(1),
    ];
    let [title, device, cache, rest, help] = Layout::vertical(heights).areas(frame.area());
    let bold = Style::new().add_modifier(Modifier::BOLD);
    frame.render_widget(Line::styled(format!("pumice top  {target}"), bold), title);
    draw_device(frame, device, report);
    draw_cache(frame, cache, report);
    let [left, right] =
        Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(rest);
    draw_channels(frame, left, report);
    draw_rocksdb(frame, right, report);
    frame.render_widget(Line::raw("q quits"), help);
}

fn draw_device(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let latency = match report.latency_ns {
        None if report.counts_latency => "no operation".to_owned(),
        None => "not counted by this process".to_owned(),
        Some(ns) => {
            let [p50, p99, p999, max] = ns.map(us);
            format!("p50 {p50}  p99 {p99}  p99.9 {p999}  longest {max}")
        }
    };
    let lines = vec![
        Line::raw(format!(
            "reads      {:>10.0} /s  {:>12}/s",
            report.reads,
            bytes(report.read_bytes)
        )),
        Line::raw(format!(
            "writes     {:>10.0} /s  {:>12}/s   flushes {:.0} /s",
            report.writes,
            bytes(report.written_bytes),
            report.flushes
        )),
        Line::raw(format!("latency    {latency}")),
        Line::raw(format!(
            "space      {} of {} used",
            human(report.space.0),
            human(report.space.1),
        )),
        Line::raw(format!(
            "dirty      {}, of which {} are on the way to the device",
            human(report.dirty_bytes),
            human(report.writeback_bytes)
        )),
    ];
    let block = Block::bordered().title("device");
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn draw_cache(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let (used, capacity) = report.cache;
    let title = format!("page cache: {} of {}", human(used), human(capacity));
    let hits = match report.hit_rate {
        None => "no reads".to_owned(),
        Some(rate) => format!("{:.1} % of reads from memory", rate * 100.0),
    };
    let gauge = Gauge::default()
        .block(Block::bordered().title(title))
        .ratio(report.hit_rate.unwrap_or(0.0).clamp(0.0, 1.0))
        .label(hits);
    frame.render_widget(gauge, area);
}

fn draw_channels(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let rows = report.channels.iter().map(|channel| {
        Row::new([
            channel.id.to_string(),
            visible(&channel.opened_by),
            channel.in_flight.to_string(),
            format!("{:.0}", channel.reads),
            format!("{:.0}", channel.writes),
            format!("{}/s", bytes(channel.bytes)),
        ])
    });
    let widths = [
        Constraint::Length(5),
        Constraint::Min(8),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(10),
    ];
    let table = Table::new(rows, widths)
        .header(Row::new([
            "queue",
            "opened by",
            "flying",
            "reads/s",
            "writes/s",
            "bytes",
        ]))
        .block(Block::bordered().title("queues: one for each thread that reads, and shared ones"));
    frame.render_widget(table, area);
}

fn draw_rocksdb(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let rows = report.rocksdb.iter().map(|(name, value)| {
        let is_bytes = ["size", "bytes", "usage", "capacity", "tables"];
        let shown = if is_bytes.iter().any(|end| name.ends_with(end)) {
            human(*value)
        } else {
            value.to_string()
        };
        Row::new([visible(&name.replace('_', " ")), shown])
    });
    let widths = [Constraint::Min(24), Constraint::Length(12)];
    let table = Table::new(rows, widths).block(Block::bordered().title("RocksDB"));
    frame.render_widget(table, area);
}

fn us(ns: u64) -> String {
    format!("{}.{} us", ns / 1000, ns % 1000 / 100)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rates are positive, and people want no fractions of a byte"
)]
fn bytes(rate: f64) -> String {
    human(rate.max(0.0) as u64)
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    use super::*;
    use crate::top::report::Sample;

    fn shown(width: u16, height: u16) -> String {
        let sample = Sample::new(&json!({
            "uptime_ms": 1000,
            "fs": {
                "device_reads": 500, "cache_hits": 300, "cache_misses": 100,
                "dirty_bytes": 3 << 20, "writeback_bytes": 2 << 20, "device_flushes": 40,
                "cache_used_bytes": 1 << 20, "cache_capacity_bytes": 4 << 20, "total_bytes": 1 << 30,
            },
            "latency": [[12_300, 500]],
            "channels": [{ "id": 9, "opened_by": "reader-3", "in_flight": 17, "reads": 500, "read_bytes": 6 << 20 }],
            "rocksdb": { "estimate_num_keys": 77 },
        }));
        let report = Report::since_the_start(&sample);
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal
            .draw(|frame| draw(frame, "kv.img", &report))
            .unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_view_has_every_figure() {
        let text = shown(100, 30);
        for part in [
            "kv.img",
            "500 /s",
            "flushes 40 /s",
            "dirty      3 MiB, of which 2 MiB",
            "reader-3",
            "17",
            "6 MiB/s",
            "p50 12.3 us",
            "75.0 % of reads",
            "1 MiB of 4 MiB",
            "estimate num keys",
            "77",
            "q quits",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn latencies_that_are_not_counted_are_not_zero() {
        let sample = Sample::new(&json!({ "uptime_ms": 1000, "latency": null }));
        let report = Report::since_the_start(&sample);
        let mut terminal = Terminal::new(TestBackend::new(100, 30)).unwrap();
        terminal
            .draw(|frame| draw(frame, "kv.img", &report))
            .unwrap();
        let text = terminal.backend().to_string();
        assert!(text.contains("not counted"), "{text}");
    }

    #[test]
    fn any_size_can_be_drawn() {
        for (width, height) in [(1, 1), (20, 5), (300, 3), (3, 100)] {
            shown(width, height);
        }
    }
}
