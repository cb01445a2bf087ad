//! How far a benchmark is: a bar on a terminal, a plain line now and then in a log, CSV in a file.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::flags::Flags;
use super::meter::Shared;

/// What one benchmark is to show.
#[derive(Debug)]
pub struct Progress<'a> {
    name: &'a str,
    shared: &'a Shared,
    /// Operations of all threads together; 0 when not known.
    total_ops: u64,
    /// Length in seconds when that decides.
    seconds: u64,
    bar: bool,
    lines: bool,
    csv: Option<(File, Duration)>,
    over: Mutex<bool>,
    wake: Condvar,
}

impl<'a> Progress<'a> {
    /// For a benchmark of `total_ops` operations, or `seconds` when above 0.
    ///
    /// # Errors
    /// The CSV file of `--report_file` cannot be made.
    pub fn new(
        f: &Flags,
        name: &'a str,
        shared: &'a Shared,
        total_ops: u64,
        seconds: u64,
    ) -> Result<Self, String> {
        let terminal = std::io::stderr().is_terminal();
        let shown = f.progress_reports && f.stats_interval == 0;
        let csv = match u64::try_from(f.report_interval_seconds) {
            Ok(s) if s > 0 => {
                let mut file = File::options()
                    .create(true)
                    .append(true)
                    .open(&f.report_file)
                    .map_err(|e| format!("--report_file={}: {e}", f.report_file))?;
                if file.metadata().map_or(0, |m| m.len()) == 0 {
                    writeln!(file, "secs_elapsed,interval_qps").map_err(|e| e.to_string())?;
                }
                Some((file, Duration::from_secs(s)))
            }
            _ => None,
        };
        Ok(Self {
            name,
            shared,
            total_ops,
            seconds,
            bar: shown && terminal,
            lines: shown && !terminal,
            csv,
            over: Mutex::new(false),
            wake: Condvar::new(),
        })
    }

    /// Whether a thread for [`Progress::watch`] is worth starting.
    #[must_use]
    pub fn wanted(&self) -> bool {
        self.bar || self.lines || self.csv.is_some()
    }

    /// Ends [`Progress::watch`].
    pub fn stop(&self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wake.notify_all();
    }

    /// Shows progress until [`Progress::stop`].
    pub fn watch(&self) {
        const LINE_EVERY: Duration = Duration::from_secs(10);
        let bar = self.bar.then(|| self.make_bar());
        let started = Instant::now();
        let tick = if self.bar {
            Duration::from_millis(200)
        } else {
            Duration::from_secs(1)
        };
        let mut next_line = LINE_EVERY;
        let mut csv_at = (Duration::ZERO, 0);
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        while !*over {
            over = self
                .wake
                .wait_timeout(over, tick)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let elapsed = started.elapsed();
            let done = self.shared.finished.load(Ordering::Relaxed);
            if let Some(bar) = &bar {
                bar.set_position(if self.seconds > 0 {
                    elapsed.as_secs().min(self.seconds)
                } else {
                    done
                });
                bar.set_message(format!(
                    "{:.0} ops/s",
                    done as f64 / elapsed.as_secs_f64().max(1e-9)
                ));
            }
            if self.lines && elapsed >= next_line && !*over {
                next_line += LINE_EVERY;
                pumice_bdev_control::complain!("{}", self.line(done, elapsed));
            }
            if let Some((file, every)) = &self.csv
                && elapsed >= csv_at.0 + *every
            {
                csv_at.0 += *every;
                let line = format!("{},{}\n", elapsed.as_secs(), done - csv_at.1);
                csv_at.1 = done;
                let mut file = file;
                if let Err(e) = file.write_all(line.as_bytes()) {
                    pumice_bdev_control::complain!("db_bench: report file: {e}");
                }
            }
        }
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }

    fn make_bar(&self) -> ProgressBar {
        let (len, template) = if self.seconds > 0 {
            (self.seconds, "{prefix:<14} {wide_bar} {pos}/{len} s {msg}")
        } else if self.total_ops > 0 {
            (
                self.total_ops,
                "{prefix:<14} {wide_bar} {human_pos}/{human_len} {msg} {eta}",
            )
        } else {
            (0, "{prefix:<14} {spinner} {human_pos} {msg}")
        };
        let bar = ProgressBar::new(len);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.with_prefix(self.name.to_owned())
    }

    fn line(&self, done: u64, elapsed: Duration) -> String {
        let secs = elapsed.as_secs_f64();
        let of = match (self.seconds, self.total_ops) {
            (0, 0) => String::new(),
            (0, n) => format!(" of {n}"),
            (s, _) => format!(" in {secs:.0} of {s} s"),
        };
        let rate = done as f64 / secs.max(1e-9);
        format!(
            "... {}: finished {done}{of} ops, {rate:.0} ops/s, {secs:.0} s",
            self.name
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_tells_where_it_is() {
        let shared = Shared::new(1);
        let p = Progress::new(&Flags::default(), "fillseq", &shared, 100, 0).unwrap();
        assert_eq!(
            p.line(50, Duration::from_secs(10)),
            "... fillseq: finished 50 of 100 ops, 5 ops/s, 10 s"
        );
    }

    #[test]
    fn csv_gets_one_line_per_interval() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.csv");
        let f = Flags {
            report_interval_seconds: 1,
            report_file: path.display().to_string(),
            progress_reports: false,
            ..Flags::default()
        };
        let shared = Shared::new(1);
        shared.finished.store(7, Ordering::Relaxed);
        let p = Progress::new(&f, "x", &shared, 0, 0).unwrap();
        assert!(p.wanted());
        std::thread::scope(|s| {
            s.spawn(|| p.watch());
            std::thread::sleep(Duration::from_millis(1300));
            p.stop();
        });
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "secs_elapsed,interval_qps\n1,7\n");
    }

    #[test]
    fn a_report_file_that_cannot_be_is_an_error() {
        let f = Flags {
            report_interval_seconds: 1,
            report_file: "/nowhere/at/all.csv".into(),
            ..Flags::default()
        };
        let shared = Shared::new(1);
        let e = Progress::new(&f, "x", &shared, 0, 0).unwrap_err();
        assert!(e.starts_with("--report_file=/nowhere/at/all.csv: "));
    }
}
