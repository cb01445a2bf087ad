//! One boot: QEMU's command line, its run under a time limit, and the result.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::Error;
use crate::console::{self, Line, Verdict};
use crate::qmp::Monitor;

/// The IOMMU of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iommu {
    /// Intel VT-d.
    Intel,
    /// AMD-Vi.
    Amd,
    /// No IOMMU, for `uio` and no-IOMMU mode.
    None,
}

/// The parameters of a boot.
pub struct Boot<'a> {
    /// Path of vmlinux or bzImage.
    pub kernel: &'a Path,
    /// Path of the initramfs.
    pub initrd: &'a Path,
    /// Directory for sockets of this run.
    pub work: &'a Path,
    /// IOMMU of the machine.
    pub iommu: Iommu,
    /// Mode of the guest's init: `vfio`, `uio`, `kernel` or `none`.
    pub mode: &'a str,
    /// Number of 2 MiB pages to reserve in the guest.
    pub huge_pages: u32,
    /// Memory of the guest in MiB.
    pub memory_mib: u32,
    /// Further arguments of QEMU: devices, block devices.
    pub devices: &'a [String],
    /// Time limit of the whole boot.
    pub timeout: Duration,
    /// Whether to show the console while it runs.
    pub verbose: bool,
}

/// The result of a boot.
#[derive(Default)]
pub struct Outcome {
    /// Each step with its verdict, in order.
    pub tests: Vec<(String, Verdict)>,
    /// The guest's own exit code, if it got so far.
    pub exit: Option<i32>,
    /// Kernel messages and lines of QEMU that fail the run.
    pub faults: Vec<String>,
    /// The reason why the boot ended early, if it did.
    pub broken: Option<String>,
    /// Lines of the console and of QEMU's errors.
    pub log: Vec<String>,
    /// Duration of the boot.
    pub wall: Duration,
}

enum Event {
    Console(String),
    Stderr(String),
    Closed,
}

impl Boot<'_> {
    fn command(&self, socket: &Path) -> Command {
        let mut machine = "q35,usb=off,vmport=off,smbus=off,sata=off".to_owned();
        let mut kernel_args = String::new();
        let mut command = Command::new("qemu-system-x86_64");
        // Stock kernels do not start under every /dev/kvm of a nested host. Plain emulation always
        // works, and only counts and correctness matter here.
        command.args(["-accel", "tcg,thread=multi"]);
        match self.iommu {
            Iommu::Intel => {
                machine.push_str(",kernel-irqchip=split");
                command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
                kernel_args.push_str("intel_iommu=on ");
            }
            Iommu::Amd => {
                machine.push_str(",kernel-irqchip=split");
                command.args(["-device", "amd-iommu,intremap=on"]);
                kernel_args.push_str("amd_iommu=on ");
            }
            Iommu::None => {}
        }
        if let Some(khz) = host_tsc_khz() {
            kernel_args.push_str(&format!("tsc=reliable tsc_early_khz={khz} "));
        }
        if self.huge_pages > 0 {
            kernel_args.push_str(&format!("rig.huge={} ", self.huge_pages));
        }
        command
            // The programs are built for x86-64-v2 and PCLMULQDQ, which the default model lacks.
            .args(["-machine", &machine, "-smp", "2", "-cpu", "Westmere"])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args([
                "-append",
                &format!(
                    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check \
                     random.trust_cpu=on {kernel_args}rig.mode={}",
                    self.mode
                ),
            ])
            .args(self.devices)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Boots, follows the console to its end or the time limit, and returns the result.
    pub fn run(&self) -> Result<Outcome, Error> {
        let socket = self.work.join("monitor");
        let started = Instant::now();
        let mut child = self
            .command(&socket)
            .spawn()
            .map_err(|e| Error::Other(format!("qemu-system-x86_64: {e}")))?;
        let (sender, events) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            forward(stdout, sender.clone(), Event::Console);
        }
        if let Some(stderr) = child.stderr.take() {
            forward(stderr, sender, Event::Stderr);
        }
        let mut follower = Follower {
            outcome: Outcome::default(),
            monitor: None,
            socket,
            current: None,
            verbose: self.verbose,
        };
        let deadline = started + self.timeout;
        let mut open = 2;
        while open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Closed) => open -= 1,
                Ok(Event::Console(line)) => follower.console(line),
                Ok(Event::Stderr(line)) => follower.stderr(&line),
                Err(_) => {
                    follower.outcome.broken =
                        Some(format!("no end after {} s", self.timeout.as_secs()));
                    break;
                }
            }
        }
        end(&mut child);
        let mut outcome = follower.finish();
        outcome.wall = started.elapsed();
        Ok(outcome)
    }
}

fn end(child: &mut Child) {
    for _ in 0..20 {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn forward(
    from: impl Read + Send + 'static,
    to: mpsc::Sender<Event>,
    wrap: impl Fn(String) -> Event + Send + 'static,
) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut bytes = Vec::new();
        while matches!(reader.read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
            let line = String::from_utf8_lossy(&bytes);
            let line = line.trim_end_matches(['\r', '\n']).to_owned();
            if to.send(wrap(line)).is_err() {
                return;
            }
            bytes.clear();
        }
        let _ = to.send(Event::Closed);
    });
}

struct Follower {
    outcome: Outcome,
    monitor: Option<Monitor>,
    socket: PathBuf,
    current: Option<String>,
    verbose: bool,
}

impl Follower {
    fn log(&mut self, line: String) {
        if self.verbose {
            eprintln!("  | {line}");
        }
        self.outcome.log.push(line);
    }

    fn console(&mut self, line: String) {
        match console::parse(&line) {
            Line::Step(name) => self.current = Some(name.to_owned()),
            Line::Test(name, verdict) => {
                self.current = None;
                self.outcome.tests.push((name.to_owned(), verdict));
            }
            Line::Host(words) => {
                let words = words.to_owned();
                if let Err(e) = self.host(&words) {
                    self.outcome
                        .faults
                        .push(format!("host request {words}: {e}"));
                }
            }
            Line::Kernel(message) => self.outcome.faults.push(message.to_owned()),
            Line::Exit(code) => self.outcome.exit = Some(code),
            Line::Text => {}
        }
        self.log(line);
    }

    fn stderr(&mut self, line: &str) {
        if console::is_dma_fault(line) {
            self.outcome.faults.push(line.to_owned());
        }
        self.log(format!("qemu: {line}"));
    }

    fn host(&mut self, words: &str) -> Result<(), Error> {
        if self.monitor.is_none() {
            self.monitor = Some(Monitor::connect(&self.socket)?);
        }
        match &mut self.monitor {
            Some(monitor) => monitor.request(words),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Outcome {
        if let Some(name) = self.current.take() {
            self.outcome.tests.push((
                name,
                Verdict::Failed("the guest ended in the middle".into()),
            ));
        }
        if self.outcome.exit.is_none() && self.outcome.broken.is_none() {
            self.outcome.broken = Some("the guest died without a verdict".into());
        }
        self.outcome
    }
}

/// Returns the clock of the host in kHz. With it the guest needs no calibration, which goes wrong
/// under load.
fn host_tsc_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let mhz = text
        .lines()
        .find(|l| l.starts_with("cpu MHz"))?
        .split(':')
        .nth(1)?
        .trim();
    let (whole, part) = mhz.split_once('.').unwrap_or((mhz, "0"));
    let part: String = part.chars().chain("000".chars()).take(3).collect();
    Some(whole.parse::<u64>().ok()? * 1000 + part.parse::<u64>().ok()?)
}
