//! Command-line arguments.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

/// Measure block devices, with the flags of SPDK's bdevperf.
#[derive(Parser, Debug)]
#[command(name = "bdevperf", version)]
pub struct Args {
    /// Operations in flight
    #[arg(short = 'q', value_name = "DEPTH")]
    pub depth: usize,

    /// Bytes per operation, such as 4096 or 128K
    #[arg(short = 'o', value_name = "BYTES")]
    pub io_size: String,

    /// read, write, randread, randwrite, rw, randrw, verify, reset, unmap, flush, write_zeroes, copy
    #[arg(short = 'w', value_name = "TYPE")]
    pub workload: String,

    /// Duration in seconds
    #[arg(short = 't', value_name = "SECONDS")]
    pub time_s: u64,

    /// Percentage of reads, for rw and randrw
    #[arg(short = 'M', value_name = "PERCENT", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(0..=100))]
    pub read_percent: u64,

    /// Device to run on; may be repeated. Default: every device that no other is built on
    #[arg(short = 'b', short_alias = 'T', value_name = "BDEV")]
    pub bdev: Vec<String>,

    /// Configuration file (SPDK's JSON)
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// With a file: configuration, as -c. Without, or before a URI: print results as JSON
    #[arg(long = "json", value_name = "FILE", num_args = 0..=1, require_equals = false)]
    pub json: Option<Option<String>>,

    /// Form of the results: table or json
    #[arg(long = "format", value_name = "FORMAT", default_value = "table",
          value_parser = ["table", "json"])]
    pub format: String,

    /// Cores, as a mask (0x3) or a list (`[0,1]`); threads are then bound to them
    #[arg(short = 'm', value_name = "MASK")]
    pub core_mask: Option<String>,

    /// Run on each device from every core, instead of distributing devices over cores
    #[arg(short = 'C')]
    pub every_core: bool,

    /// Print latency percentiles
    #[arg(short = 'l')]
    pub latency: bool,

    /// Print the current rate at this interval in seconds, on standard error
    #[arg(short = 'S', value_name = "SECONDS")]
    pub period_s: Option<u64>,

    /// Continue after operations that fail
    #[arg(short = 'f')]
    pub go_on: bool,

    /// Warn about operations that take this many seconds
    #[arg(short = 'k', value_name = "SECONDS")]
    pub timeout_s: Option<u64>,

    /// Write even to a device that does not hold only zeroes: its content is lost
    #[arg(long)]
    pub force: bool,

    /// Serve JSON-RPC on this Unix socket during the run
    #[arg(short = 'r', long = "rpc-socket", value_name = "PATH")]
    pub rpc_socket: Option<PathBuf>,

    /// Serve statistics for Prometheus during the run: a socket's path or a loopback address
    #[arg(long = "metrics", value_name = "ADDRESS")]
    pub metrics: Option<String>,

    /// Log everything of a component (bdev, bdev_io, nvme, rpc, …, all); may be repeated
    #[arg(short = 'L', value_name = "COMPONENT")]
    pub log_flags: Vec<String>,

    /// Devices by URI, in addition to those of the configuration
    #[arg(value_name = "URI")]
    pub uris: Vec<String>,
}

/// The workload of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Reads and writes; the number is the percentage of reads.
    ReadWrite(u64),
    /// Writes, reads back and compares.
    Verify,
    /// Resets.
    Reset,
    /// Unmaps.
    Unmap,
    /// Flushes.
    Flush,
    /// Write zeroes.
    WriteZeroes,
    /// Copies to the other half of the device.
    Copy,
}

impl Work {
    /// Whether the workload changes the content of the device.
    pub fn writes(self) -> bool {
        match self {
            Work::ReadWrite(read_percent) => read_percent < 100,
            Work::Verify | Work::Unmap | Work::WriteZeroes | Work::Copy => true,
            Work::Reset | Work::Flush => false,
        }
    }
}

/// Settings that all jobs share.
#[derive(Debug, Clone)]
pub struct Settings {
    pub name: String,
    pub work: Work,
    pub random: bool,
    pub depth: usize,
    pub io_bytes: usize,
    pub time: Duration,
    pub go_on: bool,
}

fn is_uri(text: &str) -> bool {
    text.contains("://")
}

impl Args {
    /// Returns the configuration file, if there is one.
    pub fn config_file(&self) -> Option<&Path> {
        let json = self.json.as_ref().and_then(Option::as_deref);
        let json = json.filter(|text| !is_uri(text)).map(Path::new);
        self.config.as_deref().or(json)
    }

    /// Returns the devices by URI. The first one may have been parsed as the value of `--json`.
    pub fn uris(&self) -> impl Iterator<Item = &str> {
        let json = self.json.as_ref().and_then(Option::as_deref);
        let first = json.filter(|text| is_uri(text));
        first
            .into_iter()
            .chain(self.uris.iter().map(String::as_str))
    }

    /// Whether results are printed as JSON.
    pub fn json_output(&self) -> bool {
        let without_file = match &self.json {
            None => false,
            Some(None) => true,
            Some(Some(text)) => is_uri(text),
        };
        self.format == "json" || without_file
    }

    /// Returns the checked settings.
    pub fn settings(&self) -> Result<Settings, String> {
        let io_bytes = pumice_bdev::parse_size(&self.io_size).map_err(|e| format!("-o {e}"))?;
        let io_bytes = usize::try_from(io_bytes).unwrap_or(usize::MAX);
        if self.depth == 0 || self.depth > 65536 {
            return Err(format!("-q {}: 1 to 65536", self.depth));
        }
        if io_bytes == 0 || io_bytes > 1 << 28 {
            return Err(format!("-o {}: 512 to 256M", self.io_size));
        }
        if self.time_s == 0 {
            return Err("-t 0: at least a second".to_owned());
        }
        let (work, random) = match self.workload.as_str() {
            "read" => (Work::ReadWrite(100), false),
            "write" => (Work::ReadWrite(0), false),
            "randread" => (Work::ReadWrite(100), true),
            "randwrite" => (Work::ReadWrite(0), true),
            "rw" => (Work::ReadWrite(self.read_percent), false),
            "randrw" => (Work::ReadWrite(self.read_percent), true),
            "verify" => (Work::Verify, false),
            "reset" => (Work::Reset, false),
            "unmap" => (Work::Unmap, false),
            "flush" => (Work::Flush, false),
            "write_zeroes" => (Work::WriteZeroes, false),
            "copy" => (Work::Copy, false),
            other => {
                return Err(format!(
                    "-w {other}: use one of read, write, randread, randwrite, rw, randrw, verify, \
                     reset, unmap, flush, write_zeroes, copy"
                ));
            }
        };
        Ok(Settings {
            name: self.workload.clone(),
            work,
            random,
            depth: self.depth,
            io_bytes,
            time: Duration::from_secs(self.time_s),
            go_on: self.go_on,
        })
    }

    /// Returns the cores of the mask in order, or core 0 without a mask.
    pub fn cores(&self) -> Result<Vec<usize>, String> {
        let Some(mask) = &self.core_mask else {
            return Ok(vec![0]);
        };
        let wrong = || format!("-m {mask}: a mask such as 0x3 or a list such as [0,2-3]");
        let list = mask.strip_prefix('[').and_then(|m| m.strip_suffix(']'));
        let mut cores = Vec::new();
        if let Some(list) = list {
            for part in list.split(',') {
                let (from, to) = part.split_once('-').unwrap_or((part, part));
                let number = |s: &str| s.trim().parse::<usize>().map_err(|_| wrong());
                let (from, to) = (number(from)?, number(to)?);
                if from > to || to > 1023 {
                    return Err(wrong());
                }
                cores.extend(from..=to);
            }
        } else {
            let digits = mask.strip_prefix("0x").unwrap_or(mask);
            let bits = u128::from_str_radix(digits, 16).map_err(|_| wrong())?;
            cores.extend((0..128).filter(|i| bits & 1 << i != 0));
        }
        if cores.is_empty() {
            return Err(wrong());
        }
        Ok(cores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(rest: &[&str]) -> Args {
        let plain = [
            "bdevperf", "-q", "1", "-o", "4K", "-w", "randread", "-t", "1",
        ];
        Args::try_parse_from(plain.iter().chain(rest)).unwrap()
    }

    #[test]
    fn json_before_a_uri_is_the_output() {
        let a = args(&["--json", "null://1G", "malloc://1M"]);
        assert!(a.json_output());
        assert_eq!(a.config_file(), None);
        assert_eq!(a.uris().collect::<Vec<_>>(), ["null://1G", "malloc://1M"]);
        let a = args(&["null://1G", "--json"]);
        assert!(a.json_output() && a.config_file().is_none());
        assert_eq!(a.uris().collect::<Vec<_>>(), ["null://1G"]);
    }

    #[test]
    fn json_with_a_file_is_the_configuration() {
        let a = args(&["--json", "bdevs.json", "-b", "Malloc0"]);
        assert!(!a.json_output());
        assert_eq!(a.config_file(), Some(Path::new("bdevs.json")));
        assert_eq!(a.uris().count(), 0);
        let a = args(&["--json", "bdevs.json", "--format", "json"]);
        assert!(a.json_output() && a.config_file().is_some());
    }

    #[test]
    fn workloads_and_cores() {
        for work in [
            "read",
            "write",
            "randread",
            "randwrite",
            "rw",
            "randrw",
            "verify",
            "reset",
            "unmap",
            "flush",
            "write_zeroes",
            "copy",
        ] {
            let line = ["bdevperf", "-q", "8", "-o", "4096", "-w", work, "-t", "1"];
            let a = Args::try_parse_from(line).unwrap();
            assert_eq!(a.settings().unwrap().io_bytes, 4096, "{work}");
        }
        let a = Args::try_parse_from(["x", "-q", "8", "-o", "4096", "-w", "reads", "-t", "1"]);
        assert!(a.unwrap().settings().unwrap_err().contains("one of read"));
        assert_eq!(args(&["-m", "0x5"]).cores(), Ok(vec![0, 2]));
        assert_eq!(args(&["-m", "[1,3-4]"]).cores(), Ok(vec![1, 3, 4]));
        assert!(args(&["-m", "[4-3]"]).cores().is_err());
        assert!(args(&["-m", "0x0"]).cores().is_err());
    }
}
