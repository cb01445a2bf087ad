//! `pumice top`: what a running process does to its file system and its database, from its socket.

mod report;
mod view;

use std::io::IsTerminal as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use pumice_bdev::BdevError;
use pumice_bdev_control::say;
use pumice_bdev_control::terminal::visible;
use serde_json::Value;

use crate::failure::{Failure, fail};
use crate::holder::Holder;
use crate::signals;
use report::{Report, Sample};

/// Time within which a key, a signal or a new size of the terminal is noticed.
const NOTICE: Duration = Duration::from_millis(100);

/// Show what a running process does: throughput, latencies, cache, database
#[derive(Args)]
pub struct Top {
    /// The device that the process has, or the socket on which it answers
    target: String,
    /// Seconds between two reports, 0.1 to 3600
    #[arg(short, long, default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Print a line of JSON for each report
    #[arg(long)]
    json: bool,
    /// Print one report: the averages since the process began to answer
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err("0.1 to 3600 seconds are possible".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Runs the command.
pub fn run(args: &Top) -> ExitCode {
    let result = signals::catch()
        .and_then(|()| find(&args.target))
        .and_then(|mut holder| {
            if args.once {
                let sample = look(&mut holder)?;
                tell(args, &Report::since_the_start(&sample), true);
                Ok(())
            } else if args.json || !std::io::stdout().is_terminal() {
                lines(args, &mut holder)
            } else {
                watch(args, &mut holder)
            }
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail("top", &e),
    }
}

/// Returns the process that serves the socket, or has the device.
fn find(target: &str) -> Result<Holder, Failure> {
    let path = Path::new(target);
    if path
        .metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
    {
        return Holder::connect(path);
    }
    let how = pumice_bdev::OpenOptions::new().read_only(true);
    match pumice_bdev::open_with(target, how) {
        Ok(device) => Holder::of_reader(&device.info().name).ok_or_else(|| {
            let text = "no process writes to it, and none that reads it answers questions; one \
                        that opens it with `DbOptions::rpc_socket` does";
            format!("{target}: {text}").into()
        }),
        Err(BdevError::InUse {
            device,
            pid: Some(pid),
        }) => Holder::find(&device, pid).ok_or_else(|| {
            let text =
                "answers no questions; a process that opens it with `DbOptions::rpc_socket` does";
            format!("{device}: process {pid}, which has it, {text}").into()
        }),
        Err(e) => Err(e.into()),
    }
}

fn look(holder: &mut Holder) -> Result<Sample, Failure> {
    let stats = holder.ask("pumice_get_stats", &Value::Null);
    stats.map(|stats| Sample::new(&stats))
}

/// Prints a report, on a terminal or elsewhere.
fn tell(args: &Top, report: &Report, with_heading: bool) {
    if args.json {
        say!("{}", report.json());
        return;
    }
    if with_heading {
        say!("{}", Report::HEADING);
    }
    say!("{}", report.line());
}

/// Prints a line for each interval, until a signal comes or the process ends.
fn lines(args: &Top, holder: &mut Holder) -> Result<(), Failure> {
    let mut before = look(holder)?;
    for count in 0_u64.. {
        let next = Instant::now() + args.interval;
        while Instant::now() < next {
            if signals::check().is_err() {
                return Ok(());
            }
            thread::sleep(NOTICE.min(next.saturating_duration_since(Instant::now())));
        }
        let sample = look(holder)?;
        tell(args, &Report::between(&before, &sample), count % 20 == 0);
        before = sample;
    }
    Ok(())
}

/// Shows the view on a terminal, until a key or a signal ends it.
fn watch(args: &Top, holder: &mut Holder) -> Result<(), Failure> {
    let mut before = look(holder)?;
    let mut report = Report::since_the_start(&before);
    let target = visible(&args.target);
    let mut screen = view::Screen::open().map_err(|e| format!("the terminal: {e}"))?;
    let mut next = Instant::now() + args.interval;
    let mut stale = true;
    loop {
        if std::mem::take(&mut stale) {
            let drawn = screen.draw(&target, &report);
            drawn.map_err(|e| format!("the terminal: {e}"))?;
        }
        // This waits until the next report is due, or there is something else to draw.
        let wait = next.saturating_duration_since(Instant::now()).min(NOTICE);
        match screen
            .asked(wait)
            .map_err(|e| format!("the terminal: {e}"))?
        {
            view::Asked::End => return Ok(()),
            view::Asked::Redraw => stale = true,
            view::Asked::Nothing => {}
        }
        if signals::check().is_err() {
            return Ok(());
        }
        if Instant::now() >= next {
            let sample = look(holder)?;
            report = Report::between(&before, &sample);
            before = sample;
            stale = true;
            next = Instant::now() + args.interval;
        }
    }
}
