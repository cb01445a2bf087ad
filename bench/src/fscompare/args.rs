//! The command line of `fscompare`.

use std::path::{Path, PathBuf};

use clap::Parser;
use pumice_bdev_control::complain;

use super::side::Side;

/// Compares file systems under RocksDB on the same disk: they take turns in several rounds with the
/// same options and memory. Prints medians, spread, ratios with their confidence intervals, the
/// processor time and waits, and each file system's own cost, which is its time less that of
/// RocksDB's memory env in the same round.
#[derive(Debug, Parser)]
#[command(name = "fscompare", version, max_term_width = 100)]
pub struct Args {
    /// Image file on the disk to compare on. It is created and removed. An existing one needs
    /// --force, is overwritten and kept. Default: a file in a temporary directory.
    #[arg(long, conflicts_with = "device")]
    pub image: Option<PathBuf>,

    /// Block or loop device to compare on. Everything on it is lost, so --force is needed.
    #[arg(long, requires = "force")]
    pub device: Option<PathBuf>,

    /// Bytes of the image file, for example 4G.
    #[arg(long, default_value = "4G", value_parser = bytes)]
    pub size: u64,

    /// Existing directory of the kernel's file system for the side "host". Default: beside the image
    /// file. Needs no root.
    #[arg(long)]
    pub kernel_dir: Option<PathBuf>,

    /// Overwrite the content of the device or the image file.
    #[arg(long)]
    pub force: bool,

    /// Sides, in order. host: an existing kernel file system, in --kernel-dir. ext4, xfs: made by
    /// mkfs's and mounted by mount's defaults on a loop device on the image file, or on --device
    /// (root). ext4-tuned, xfs-tuned: the same as experts set them up, with noatime, lazytime, ext4's
    /// fast_commit or a larger log of XFS where the machine takes them, and with
    /// --recycle_log_file_num=4 and --use_direct_io_for_flush_and_compaction for db_bench, which win
    /// over the flags after --; the notes tell what was set. pumice: Pumice on the image file.
    /// pumice-dev: Pumice on the same loop device or --device (root). mem: RocksDB's memory env, the
    /// file system that costs nothing. Default: all that this user can run with the installed
    /// programs.
    #[arg(long, value_delimiter = ',')]
    pub sides: Vec<Side>,

    /// Side that the others are compared with. Default: ext4, else host, else the first.
    #[arg(long)]
    pub baseline: Option<Side>,

    /// Benchmarks of db_bench, separated by commas. A semicolon ends a process: caches are dropped,
    /// the file system is mounted again and the next benchmarks use the same database, with cold
    /// caches.
    #[arg(long, default_value = "fillseq,fillrandom,readrandom")]
    pub benchmarks: String,

    /// Rounds. Each side runs once in each. From 6 on, intervals of the ratios have a confidence of
    /// at least 95 %; 5 and 4 have 93.8 and 87.5 %, and fewer have none.
    #[arg(long, default_value_t = 6)]
    pub rounds: u64,

    /// Bound the memory of each run, page cache included, by a control group of this size (root).
    /// Pumice's page cache follows what is free in it, up to three quarters. The memory env is not
    /// bounded, since its files are memory.
    #[arg(long, value_parser = bytes)]
    pub memory: Option<u64>,

    /// Size of Pumice's page cache in bytes without --memory.
    #[arg(long, default_value = "1G", value_parser = bytes)]
    pub fs_cache_size: u64,

    /// db_bench to run. Default: the one beside this program.
    #[arg(long)]
    pub db_bench: Option<PathBuf>,

    /// Write the results as JSON to this file ('-': standard output; the table then goes to
    /// standard error).
    #[arg(long)]
    pub json: Option<String>,

    /// Write the results as a page to this file: charts, the table, the command line, the machine
    /// and how each side was made. It needs no other file and no network.
    #[arg(long)]
    pub html: Option<PathBuf>,

    /// Flags for db_bench on every side, after --.
    #[arg(last = true)]
    pub flags: Vec<String>,
}

/// The checked plan of a comparison.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The sides in order.
    pub sides: Vec<Side>,
    /// The side to compare with.
    pub baseline: Side,
    /// The benchmarks, one list for each process.
    pub stages: Vec<String>,
    /// Number of rounds.
    pub rounds: u64,
    /// The named image file. Without it and a device one is made.
    pub image: Option<PathBuf>,
    /// The device, if one is given.
    pub device: Option<PathBuf>,
    /// Bytes of the image file.
    pub size: u64,
    /// Directory of the side "host".
    pub kernel_dir: PathBuf,
    /// Whether to overwrite existing content.
    pub force: bool,
    /// Bytes of the control group.
    pub memory: Option<u64>,
    /// Bytes of our page cache.
    pub fs_cache_size: u64,
    /// Path of db_bench.
    pub db_bench: PathBuf,
    /// Flags of db_bench on every side.
    pub flags: Vec<String>,
}

/// Bytes that RocksDB itself may use of a bounded memory: two memtables, the block cache, tables.
const ROCKSDB_BYTES: u64 = 2 * (64 << 20) + (32 << 20) + (96 << 20);

impl Plan {
    /// Checks the command line against itself and this machine.
    ///
    /// # Errors
    /// Returns a message for the user.
    pub fn new(a: &Args) -> Result<Self, String> {
        let sides = chosen_sides(a)?;
        check_html(a)?;
        let find = |s: Side| sides.contains(&s).then_some(s);
        let baseline = a
            .baseline
            .or_else(|| find(Side::Ext4))
            .or_else(|| find(Side::Host))
            .or_else(|| sides.first().copied())
            .ok_or("--sides: nothing to run")?;
        if !sides.contains(&baseline) {
            return Err(format!("--baseline={baseline} is not among --sides"));
        }
        let stages: Vec<String> = a
            .benchmarks
            .split(';')
            .map(|s| s.trim().to_owned())
            .filter(|s| !s.is_empty())
            .collect();
        if stages.is_empty() || a.rounds == 0 {
            return Err("--benchmarks and --rounds must leave something to run".to_owned());
        }
        let image = a.image.clone();
        let beside = image
            .as_deref()
            .and_then(|i| i.parent())
            .map_or_else(std::env::temp_dir, Path::to_path_buf);
        let fs_cache_size = first_cache_size(a)?;
        Ok(Self {
            baseline,
            stages,
            rounds: a.rounds,
            image,
            device: a.device.clone(),
            size: a.size,
            kernel_dir: a.kernel_dir.clone().unwrap_or(beside),
            force: a.force,
            memory: a.memory,
            fs_cache_size,
            db_bench: match &a.db_bench {
                Some(p) => p.clone(),
                None => std::env::current_exe()
                    .map_err(|e| format!("this program's own path: {e}"))?
                    .with_file_name("db_bench"),
            },
            flags: a.flags.clone(),
            sides,
        })
    }
}

/// Returns the sides of `--sides`, or without it all that can run here.
fn chosen_sides(a: &Args) -> Result<Vec<Side>, String> {
    let root = is_root();
    if a.sides.is_empty() {
        return Ok(Side::ALL
            .into_iter()
            .filter(|s| (root || !s.needs_root()) && s.fits(a.device.is_some()))
            .filter(|s| a.device.is_none() || a.kernel_dir.is_some() || *s != Side::Host)
            .filter(|s| {
                let missing = s.missing_program();
                if let Some(words) = &missing {
                    complain!("fscompare: {s} is left out: {words}");
                }
                missing.is_none()
            })
            .collect());
    }
    let mut seen = Vec::new();
    for s in &a.sides {
        if seen.contains(s) {
            return Err(format!("--sides: {s} is there twice"));
        }
        seen.push(*s);
        if s.needs_root() && !root {
            return Err(format!(
                "--sides: {s} needs root, to make and mount a file system; without it compare host, pumice and mem"
            ));
        }
        if let Some(words) = s.missing_program() {
            return Err(format!("--sides: {s} cannot run: {words}"));
        }
        if !s.fits(a.device.is_some()) {
            return Err(format!(
                "--sides: {s} is for an image file; with --device use pumice-dev"
            ));
        }
    }
    Ok(seen)
}

/// Refuses a page in a directory that does not exist before hours of measuring, not after.
fn check_html(a: &Args) -> Result<(), String> {
    let Some(page) = &a.html else { return Ok(()) };
    let dir = match page.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    if page.is_dir() || !dir.is_dir() {
        return Err(format!(
            "--html={}: a file in an existing directory is needed",
            page.display()
        ));
    }
    Ok(())
}

/// Returns the size with which our page cache begins.
fn first_cache_size(a: &Args) -> Result<u64, String> {
    match a.memory {
        None => Ok(a.fs_cache_size),
        Some(m) if m >= ROCKSDB_BYTES + (32 << 20) => Ok(m / 8),
        Some(_) => {
            let least = (ROCKSDB_BYTES >> 20) + 32;
            Err(format!(
                "--memory: RocksDB's memtables and block cache alone need more; give at least {least}M"
            ))
        }
    }
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    // "Uid: real effective saved filesystem" (proc(5)).
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))
        .and_then(|l| l.split_whitespace().nth(1))
        == Some("0")
}

/// Parses a size such as `512M`, `4G` or `1048576`, which must not be 0.
fn bytes(text: &str) -> Result<u64, String> {
    match pumice_bdev::parse_size(text)? {
        0 => Err("a size must not be 0".to_owned()),
        n => Ok(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(args: &[&str]) -> Result<Plan, String> {
        let all = std::iter::once("fscompare").chain(args.iter().copied());
        Plan::new(&Args::try_parse_from(all).map_err(|e| e.to_string())?)
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("4G"), Ok(4 << 30));
        assert_eq!(bytes("512k"), Ok(512 << 10));
        assert_eq!(bytes("10"), Ok(10));
        for bad in ["", "G", "0", "4X", "-1", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn stages_and_baseline() {
        let p = plan(&[
            "--sides=mem,host",
            "--benchmarks=fillseq,compact; readrandom;",
        ])
        .unwrap();
        assert_eq!(p.stages, ["fillseq,compact", "readrandom"]);
        assert_eq!(p.baseline, Side::Host);
        assert_eq!(plan(&["--sides=mem"]).unwrap().baseline, Side::Mem);
        if is_root() && Side::Ext4Tuned.missing_program().is_none() {
            let p = plan(&["--sides=ext4-tuned,ext4,mem"]).unwrap();
            assert_eq!(p.baseline, Side::Ext4);
            let p = plan(&["--sides=ext4,ext4-tuned", "--baseline=ext4-tuned"]).unwrap();
            assert_eq!(p.baseline, Side::Ext4Tuned);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (args, word) in [
            (&["--sides=mem,mem"][..], "twice"),
            (&["--sides=mem", "--baseline=host"], "not among"),
            (&["--sides=mem", "--rounds=0"], "something to run"),
            (&["--sides=mem", "--memory=100M"], "at least"),
            (&["--device=/dev/loop7"], "--force"),
            (&["--sides=floppy"], "possible values"),
            (
                &["--sides=mem", "--html=/nowhere/at/all/r.html"],
                "existing directory",
            ),
            (
                &["--device=/dev/loop7", "--force", "--sides=pumice"],
                "pumice-dev",
            ),
        ] {
            let e = plan(args).unwrap_err();
            assert!(e.contains(word), "{args:?}: {e}");
        }
    }

    #[test]
    fn our_cache_begins_with_an_eighth_of_a_bounded_memory() {
        let p = plan(&["--sides=mem", "--memory=1G"]).unwrap();
        assert_eq!(p.fs_cache_size, 128 << 20);
    }
}
