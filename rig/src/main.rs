//! `pumice-rig` boots Debian's kernel under QEMU, gives its NVMe controllers to the driver and runs
//! the driver's suite there. See `rig/README.md`.

mod console;
mod cpio;
mod device;
mod fetch;
mod guest;
mod image;
mod kernel;
mod modules;
mod qemu;
mod qmp;
mod scenario;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use clap::{Parser, Subcommand};

use console::Verdict;
use scenario::Programs;

/// An error on the host.
#[derive(Debug)]
pub enum Error {
    /// A file and its error.
    Io(PathBuf, std::io::Error),
    /// Any other error, as text.
    Other(String),
}

impl Error {
    fn at(path: &Path, error: std::io::Error) -> Error {
        Error::Io(path.to_path_buf(), error)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Io(path, e) => write!(f, "{}: {e}", path.display()),
            Error::Other(text) => f.write_str(text),
        }
    }
}

/// Runs `program args` with `input` on its standard input and returns its standard output, whatever
/// its exit code (xz reports bytes behind the stream as an error after it has written everything).
pub fn run_filter(program: &Path, args: &[&str], input: &[u8]) -> Result<Vec<u8>, Error> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| Error::at(program, e))?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A reader that needs no more closes early, which is not an error.
            stdin.map(|mut stdin| stdin.write_all(input));
        });
        child.wait_with_output()
    })
    .map_err(|e| Error::at(program, e))?;
    Ok(output.stdout)
}

#[derive(Parser)]
#[command(
    name = "pumice-rig",
    about = "Runs the NVMe driver's suite in a VM, under real VFIO"
)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Download the parts of the guest and say what else is missing
    Fetch,
    /// Boot the scenarios and print `N passed, N failed, N skipped`
    Run {
        /// Run only these scenarios (by name; see --list)
        scenarios: Vec<String>,
        /// Directory with the static guest binaries
        #[arg(long)]
        bin: PathBuf,
        /// db_bench as it was built; scenarios that need it are skipped without it
        #[arg(long, default_value = "db_bench")]
        db_bench: PathBuf,
        /// Print the names of the scenarios and exit
        #[arg(long)]
        list: bool,
        /// Show the console while a scenario runs
        #[arg(long, short)]
        verbose: bool,
        /// Keep the console of each boot in this directory
        #[arg(long)]
        logs: Option<PathBuf>,
        /// Fail, instead of skipping, when this machine cannot run the rig
        #[arg(long)]
        require: bool,
    },
    /// Boot the devices of a scenario and run shell commands in it
    Shell {
        /// Scenario whose devices to boot
        scenario: String,
        /// Directory with the static guest binaries
        #[arg(long)]
        bin: PathBuf,
        /// db_bench as it was built; scenarios that need it are skipped without it
        #[arg(long, default_value = "db_bench")]
        db_bench: PathBuf,
        /// Limit for the boot in seconds
        #[arg(long, default_value_t = 120)]
        timeout_s: u64,
        /// Commands for the guest's shell
        steps: String,
    },
    /// Test the driver on a device (in the guest)
    #[command(subcommand)]
    Test(device::Test),
    /// Run a command of the guest's own scripts
    #[command(subcommand, hide = true)]
    Guest(guest::Cmd),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Cmd::Fetch => fetch_all(),
        Cmd::Run { list: true, .. } => {
            for scenario in scenario::all() {
                println!("{:12} {}", scenario.name, scenario.about);
            }
            Ok(0)
        }
        Cmd::Run {
            scenarios,
            bin,
            db_bench,
            verbose,
            logs,
            require,
            ..
        } => {
            let programs = Programs { bin, db_bench };
            run(&scenarios, &programs, verbose, logs.as_deref(), require)
        }
        Cmd::Shell {
            scenario,
            bin,
            db_bench,
            timeout_s,
            steps,
        } => {
            let programs = Programs { bin, db_bench };
            shell(&scenario, &programs, Duration::from_secs(timeout_s), &steps)
        }
        Cmd::Test(test) => return test.run(),
        Cmd::Guest(command) => return command.run(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("pumice-rig: {e}");
            ExitCode::from(2)
        }
    }
}

fn fetch_all() -> Result<u8, Error> {
    if let Some(why) = fetch::missing_tools() {
        return Err(Error::Other(why));
    }
    let cache = fetch::cache_dir();
    let parts = fetch::parts(&cache)?;
    println!(
        "{} and busybox-static in {}",
        parts.kernel_name,
        cache.display()
    );
    Ok(0)
}

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Tally {
    fn count(&mut self, scenario: &str, name: &str, verdict: &Verdict) {
        match verdict {
            Verdict::Ok => {
                self.passed += 1;
                println!("ok      {scenario}: {name}");
            }
            Verdict::Failed(why) => {
                self.failed += 1;
                println!("FAILED  {scenario}: {name}: {why}");
            }
            Verdict::Skipped(why) => {
                self.skipped += 1;
                println!("skipped {scenario}: {name}: {why}");
            }
        }
    }

    fn print(&self) -> u8 {
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        );
        u8::from(self.failed > 0)
    }
}

fn run(
    names: &[String],
    programs: &Programs,
    verbose: bool,
    logs: Option<&Path>,
    require: bool,
) -> Result<u8, Error> {
    let chosen = choose(names)?;
    let mut tally = Tally::default();
    let ready = match fetch::missing_tools() {
        Some(why) => Err(why),
        None => fetch::parts(&fetch::cache_dir())
            .map_err(|e| format!("the guest's packages cannot be fetched: {e}")),
    };
    let parts = match ready {
        Ok(parts) => parts,
        Err(why) if require => return Err(Error::Other(why)),
        Err(why) => {
            for scenario in &chosen {
                tally.count(scenario.name, "all", &Verdict::Skipped(why.clone()));
            }
            return Ok(tally.print());
        }
    };
    let base = image::Base::prepare(&parts, &fetch::cache_dir())?;
    for scenario in &chosen {
        if let Some(why) = scenario.lacks(programs) {
            tally.count(scenario.name, "all", &Verdict::Skipped(why));
            continue;
        }
        let outcome = scenario.boot(&base, programs, None, verbose, None)?;
        for (name, verdict) in &outcome.tests {
            tally.count(scenario.name, name, verdict);
        }
        let mut broken = outcome.broken.clone().into_iter().collect::<Vec<_>>();
        broken.extend(outcome.faults.iter().cloned());
        if outcome.exit.is_some_and(|code| code != 0) {
            broken.push("the steps ended with an error".to_owned());
        }
        if outcome.tests.is_empty() {
            broken.push("no step was run".to_owned());
        }
        let whole = if broken.is_empty() {
            Verdict::Ok
        } else {
            Verdict::Failed(broken.join("; "))
        };
        tally.count(scenario.name, "boot to power-off without a fault", &whole);
        println!(
            "        {}: {:.1} s",
            scenario.name,
            outcome.wall.as_secs_f64()
        );
        let failed = !broken.is_empty()
            || outcome
                .tests
                .iter()
                .any(|(_, v)| matches!(v, Verdict::Failed(_)));
        if failed && !verbose {
            for line in &outcome.log {
                println!("  | {line}");
            }
        }
        if let Some(dir) = logs {
            std::fs::create_dir_all(dir).map_err(|e| Error::at(dir, e))?;
            let path = dir.join(format!("{}.log", scenario.name));
            std::fs::write(&path, outcome.log.join("\n")).map_err(|e| Error::at(&path, e))?;
        }
    }
    Ok(tally.print())
}

fn choose(names: &[String]) -> Result<Vec<scenario::Scenario>, Error> {
    let mut all = scenario::all();
    if names.is_empty() {
        return Ok(all);
    }
    for name in names {
        if !all.iter().any(|s| s.name == name) {
            let known: Vec<_> = all.iter().map(|s| s.name).collect();
            return Err(Error::Other(format!(
                "no scenario {name}; there are {}",
                known.join(", ")
            )));
        }
    }
    all.retain(|s| names.iter().any(|n| n == s.name));
    Ok(all)
}

fn shell(name: &str, programs: &Programs, timeout: Duration, steps: &str) -> Result<u8, Error> {
    if let Some(why) = fetch::missing_tools() {
        return Err(Error::Other(why));
    }
    let cache = fetch::cache_dir();
    let base = image::Base::prepare(&fetch::parts(&cache)?, &cache)?;
    let chosen = choose(&[name.to_owned()])?;
    let Some(scenario) = chosen.first() else {
        return Ok(2);
    };
    let outcome = scenario.boot(&base, programs, Some(steps), true, Some(timeout))?;
    for fault in &outcome.faults {
        eprintln!("pumice-rig: fault: {fault}");
    }
    if let Some(why) = &outcome.broken {
        eprintln!("pumice-rig: {why}");
    }
    let code = outcome.exit.and_then(|c| u8::try_from(c).ok());
    Ok(match code {
        Some(0) if !outcome.faults.is_empty() => 1,
        Some(code) => code,
        None => 125,
    })
}
