//! The conditions of a comparison: the command line, the time, the program's commit and the machine.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::Plan;
use super::disk::system;
use super::side::Side;
use crate::db_bench::target::Mount;

/// The conditions under which a comparison ran.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Conditions {
    /// The command line, quoted for a shell.
    pub command: String,
    /// The time of the start, in UTC.
    pub date: String,
    /// The commit of the source tree in which db_bench lies, with `-dirty` if files differ from it.
    /// `None` outside such a tree.
    pub commit: Option<String>,
    /// The machine.
    pub machine: Machine,
}

/// A machine.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// Number of processors that the kernel runs.
    pub cores: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// The disks of the comparison: that of the image file or the device, and that of the side
    /// "host" if it is another one.
    pub disks: Vec<String>,
}

impl Conditions {
    /// Returns the conditions of this process.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let tree = plan.db_bench.parent();
        Self {
            command: quoted(std::env::args()),
            date: system("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
            commit: tree.and_then(commit_around),
            machine: Machine::this(plan),
        }
    }
}

impl Machine {
    fn this(plan: &Plan) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpu, cores) = processors(&read("/proc/cpuinfo"));
        Self {
            cpu,
            cores,
            memory_bytes: memory(&read("/proc/meminfo")),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            disks: disks(plan),
        }
    }
}

/// Joins the words of a command line so that a shell takes them apart again. Of the program's path
/// the name is enough.
fn quoted(words: impl Iterator<Item = String>) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    let quote = |(n, word): (usize, String)| match Path::new(&word).file_name() {
        Some(name) if n == 0 => name.to_string_lossy().into_owned(),
        _ if !word.is_empty() && word.chars().all(is_plain) => word,
        _ => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.enumerate().map(quote).collect::<Vec<_>>().join(" ")
}

/// Returns the commit of the clone that holds a directory, if it is one of this project.
fn commit_around(dir: &Path) -> Option<String> {
    let dir = dir.display().to_string();
    let top = system("git", &["-C", &dir, "rev-parse", "--show-toplevel"]).ok()?;
    // A program that was installed may lie in the clone of something else.
    Path::new(&top)
        .join("bench/src/fscompare")
        .is_dir()
        .then_some(())?;
    let describe = [
        "--no-optional-locks",
        "-c",
        "core.fsmonitor=false",
        "-C",
        &dir,
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ];
    system("git", &describe).ok()
}

/// Returns the model and the number of processors in a text such as `/proc/cpuinfo`.
fn processors(text: &str) -> (String, usize) {
    let value = |line: &str, name: &str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    };
    let model = text.lines().find_map(|l| value(l, "model name"));
    let cores = text.lines().filter_map(|l| value(l, "processor")).count();
    // Other architectures than x86 have no name there.
    (model.unwrap_or(std::env::consts::ARCH.to_owned()), cores)
}

/// Returns the bytes of memory in a text such as `/proc/meminfo`.
fn memory(text: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn disks(plan: &Plan) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(device) = &plan.device {
        let name = device.canonicalize().unwrap_or_else(|_| device.clone());
        let in_sys = name
            .file_name()
            .map(|n| Path::new("/sys/class/block").join(n));
        let about = in_sys.map_or(String::new(), |dir| block_device(&dir));
        out.push(format!("{}{about}", device.display()));
    } else {
        let beside = plan.image.as_deref().and_then(Path::parent);
        let beside = match beside {
            Some(dir) if dir.as_os_str().is_empty() => PathBuf::from("."),
            Some(dir) => dir.to_path_buf(),
            None => std::env::temp_dir(),
        };
        out.extend(below(&beside));
    }
    if plan.sides.contains(&Side::Host) {
        out.extend(below(&plan.kernel_dir).filter(|host| !out.contains(host)));
    }
    out
}

/// Describes the device below a directory.
fn below(dir: &Path) -> Option<String> {
    let mount = Mount::of(dir).ok()?;
    let in_sys = Path::new("/sys/dev/block").join(&mount.device);
    let about = block_device(&in_sys);
    Some(format!("{} with {}{about}", mount.source, mount.kind))
}

/// Describes a block device by its directory in sysfs: ` (QEMU HARDDISK, 256 GiB, …)`.
fn block_device(dir: &Path) -> String {
    // A partition has neither queue nor model, but its parent has.
    let read = |name: &str| {
        [dir.join(name), dir.join("..").join(name)]
            .iter()
            .find_map(|p| std::fs::read_to_string(p).ok())
            .map(|text| text.trim().to_owned())
    };
    let mut words = Vec::new();
    words.extend(read("device/model").filter(|model| !model.is_empty()));
    // In sectors of 512 bytes, whatever the device's own are.
    let sectors = std::fs::read_to_string(dir.join("size")).ok();
    if let Some(sectors) = sectors.and_then(|t| t.trim().parse::<u64>().ok()) {
        words.push(format!("{:.1} GiB", sectors as f64 / f64::from(1 << 21)));
    }
    // The kernel's word, which is 1 for many virtual disks.
    words.extend(read("queue/rotational").map(|is| format!("rotational {is}")));
    words.extend(read("queue/write_cache").map(|cache| match cache.as_str() {
        "write back" => "volatile write cache".to_owned(),
        _ => "no volatile write cache".to_owned(),
    }));
    words.extend(read("queue/scheduler").map(|all| format!("scheduler {}", in_use(&all))));
    if words.is_empty() {
        return String::new();
    }
    format!(" ({})", words.join(", "))
}

/// Returns the scheduler in use, which the kernel puts into brackets if there are others.
fn in_use(all: &str) -> &str {
    let in_brackets = all
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    in_brackets.map_or(all, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_quoted_for_a_shell() {
        let words = ["/usr/bin/fscompare", "--size=1G", "a;b", "it's", ""];
        let line = quoted(words.iter().map(|w| (*w).to_owned()));
        assert_eq!(line, r"fscompare --size=1G 'a;b' 'it'\''s' ''");
    }

    #[test]
    fn the_machine_is_read_from_proc() {
        let text =
            "processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(processors(text), ("AMD EPYC".to_owned(), 2));
        assert_eq!(processors("").0, std::env::consts::ARCH);
        assert_eq!(memory("MemTotal:       2048 kB\nMemFree: 1 kB\n"), 2 << 20);
        assert_eq!(memory(""), 0);
    }

    #[test]
    fn a_partition_has_its_own_size_and_the_disks_model() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("vda/size", "8388608\n");
        put("vda/device/model", "Fast Disk  \n");
        put("vda/queue/rotational", "0\n");
        put("vda/queue/write_cache", "write through\n");
        put("vda/queue/scheduler", "none [mq-deadline] bfq\n");
        put("vda/vda1/size", "2097152\n");
        assert_eq!(
            block_device(&dir.path().join("vda/vda1")),
            " (Fast Disk, 1.0 GiB, rotational 0, no volatile write cache, scheduler mq-deadline)"
        );
        assert_eq!(block_device(Path::new("/nowhere/at/all")), "");
    }

    #[test]
    fn a_program_in_no_clone_has_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(commit_around(dir.path()), None);
    }
}
