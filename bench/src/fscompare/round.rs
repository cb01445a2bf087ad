//! One run of one side: make the file system, run the benchmarks, remove everything.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::args::Plan;
use super::disk::{self, Disk, Mounted};
use super::interrupt::Interrupt;
use super::memory::Bound;
use super::recipe::{Applied, Recipe};
use super::side::Side;

/// Runs sides.
#[derive(Debug)]
pub struct Runner<'a> {
    plan: &'a Plan,
    disk: &'a Disk,
    stop: &'a Interrupt,
    bound: Option<Bound>,
    scratch: tempfile::TempDir,
}

/// The results of one side in one round.
#[derive(Debug, Default)]
pub struct Ran {
    /// db_bench's reports, one for each process.
    pub reports: Vec<Value>,
    /// The settings of a file system that was made for the comparison.
    pub applied: Option<Applied>,
}

impl From<Vec<Value>> for Ran {
    fn from(reports: Vec<Value>) -> Self {
        Self {
            reports,
            applied: None,
        }
    }
}

/// A process that is killed when its value is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl<'a> Runner<'a> {
    /// Makes a runner for this plan on this disk.
    ///
    /// # Errors
    /// Fails when the memory cannot be bounded, or db_bench does not exist.
    pub fn new(plan: &'a Plan, disk: &'a Disk, stop: &'a Interrupt) -> Result<Self, String> {
        if !plan.db_bench.is_file() {
            return Err(format!(
                "{} is not there; build it, or name it by --db-bench",
                plan.db_bench.display()
            ));
        }
        Ok(Self {
            plan,
            disk,
            stop,
            bound: plan.memory.map(Bound::new).transpose()?,
            scratch: tempfile::tempdir().map_err(|e| format!("a temporary directory: {e}"))?,
        })
    }

    /// Runs one side through all stages.
    ///
    /// # Errors
    /// Returns a message for the user.
    pub fn run(&self, side: Side) -> Result<Ran, String> {
        disk::drop_caches()?;
        let result = match side {
            Side::Host => self.host().map(Ran::from),
            Side::Ext4 | Side::Ext4Tuned | Side::Xfs | Side::XfsTuned => self.made(side),
            Side::Pumice => self
                .ours(self.disk.image().ok_or("no image file")?)
                .map(Ran::from),
            Side::PumiceDev => {
                let device = self.disk.device()?;
                self.ours(device.path()).map(Ran::from)
            }
            // Memory does not outlive a process, so all stages run in one.
            Side::Mem => self
                .db_bench(side, &self.plan.stages.join(","), &["--env=mem".to_owned()])
                .map(|r| vec![r].into()),
        };
        result.map_err(|e| format!("{side}: {e}"))
    }

    fn host(&self) -> Result<Vec<Value>, String> {
        let dir = tempfile::Builder::new()
            .prefix("fscompare-db-")
            .tempdir_in(&self.plan.kernel_dir)
            .map_err(|e| format!("a directory in {}: {e}", self.plan.kernel_dir.display()))?;
        let mut reports = Vec::new();
        for (n, stage) in self.plan.stages.iter().enumerate() {
            if n > 0 {
                disk::drop_caches()?;
            }
            reports.push(self.kernel(Side::Host, stage, dir.path(), &[], n > 0)?);
        }
        Ok(reports)
    }

    fn made(&self, side: Side) -> Result<Ran, String> {
        let device = self.disk.device()?;
        let device = device.path();
        let recipe = Recipe::of(side, device)?;
        recipe.make(device)?;
        let mut ran = Ran::default();
        for (n, stage) in self.plan.stages.iter().enumerate() {
            let mounted = Mounted::at(device, recipe.mount)?;
            let applied = || recipe.applied(mounted.options());
            ran.applied.get_or_insert_with(applied);
            let report = self.kernel(side, stage, mounted.path(), recipe.db_bench, n > 0)?;
            ran.reports.push(report);
            drop(mounted);
            disk::drop_caches()?;
        }
        Ok(ran)
    }

    fn kernel(
        &self,
        side: Side,
        stage: &str,
        dir: &Path,
        of_side: &[&str],
        again: bool,
    ) -> Result<Value, String> {
        let mut flags = vec![
            "--env=kernel".to_owned(),
            format!("--db={}", dir.join("db").display()),
        ];
        flags.extend(of_side.iter().map(|f| (*f).to_owned()));
        if again {
            flags.push("--use_existing_db".to_owned());
        }
        self.db_bench(side, stage, &flags)
    }

    fn ours(&self, path: &Path) -> Result<Vec<Value>, String> {
        let absolute = path
            .canonicalize()
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let mut reports = Vec::new();
        for (n, stage) in self.plan.stages.iter().enumerate() {
            if n > 0 {
                disk::drop_caches()?;
            }
            let most = self.plan.memory.map_or(0, |m| m - m / 4);
            let flags = [
                format!("--device={}", absolute.display()),
                format!("--fs_cache_size={}", self.plan.fs_cache_size),
                format!("--fs_cache_most={most}"),
                if n > 0 {
                    "--use_existing_db".to_owned()
                } else {
                    "--force_format".to_owned()
                },
            ];
            reports.push(self.db_bench(Side::Pumice, stage, &flags)?);
        }
        Ok(reports)
    }

    fn db_bench(&self, side: Side, stage: &str, own: &[String]) -> Result<Value, String> {
        let json = self.scratch.path().join("report.json");
        let log = self.scratch.path().join("log");
        let _ = std::fs::remove_file(&json);
        let mut command = match &self.bound {
            Some(b) if side != Side::Mem => {
                let words = b.wrap(&self.plan.db_bench);
                let mut c = Command::new(&words[0]);
                c.args(&words[1..]);
                c
            }
            _ => Command::new(&self.plan.db_bench),
        };
        let out = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let err = out.try_clone().map_err(|e| e.to_string())?;
        command
            .args(&self.plan.flags)
            .args(own)
            .arg(format!("--benchmarks={stage}"))
            .arg(format!("--json={}", json.display()))
            .arg("--progress_reports=false")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        let child = command
            .spawn()
            .map_err(|e| format!("{}: {e}", self.plan.db_bench.display()))?;
        let mut running = Running(child);
        let status = loop {
            self.stop.check()?;
            match running.0.try_wait() {
                Ok(Some(s)) => break s,
                Ok(None) => std::thread::sleep(Duration::from_millis(50)),
                Err(e) => return Err(format!("db_bench: {e}")),
            }
        };
        if !status.success() {
            // On Ctrl-C the terminal signals both programs.
            self.stop.check()?;
            return Err(format!("db_bench {stage}: {status}\n{}", tail(&log)));
        }
        let text = std::fs::read_to_string(&json).map_err(|e| format!("db_bench's report: {e}"))?;
        serde_json::from_str(&text).map_err(|e| format!("db_bench's report: {e}"))
    }
}

/// Returns the last lines of a log.
fn tail(log: &PathBuf) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}
