//! Flags.

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

    /// Bytes per operation (K and M are understood)
    #[arg(short = 'o', value_name = "BYTES")]
    pub io_size: String,

    /// read, write, randread, randwrite, rw, randrw, verify, reset, unmap, flush, write_zeroes, copy
    #[arg(short = 'w', value_name = "TYPE")]
    pub workload: String,

    /// Seconds
    #[arg(short = 't', value_name = "SECONDS")]
    pub time_s: u64,

    /// Percentage of reads, for rw and randrw
    #[arg(short = 'M', value_name = "PERCENT", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(0..=100))]
    pub read_percent: u64,

    /// Device to run on; may be repeated. Default: every device that nothing stands on
    #[arg(short = 'b', short_alias = 'T', value_name = "BDEV")]
    pub bdev: Vec<String>,

    /// Configuration file (SPDK's JSON)
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// With a file: configuration, as -c. Without: results as JSON
    #[arg(long = "json", value_name = "FILE", num_args = 0..=1, require_equals = false)]
    pub json: Option<Option<PathBuf>>,

    /// Results: table or json
    #[arg(long = "format", value_name = "FORMAT", default_value = "table",
          value_parser = ["table", "json"])]
    pub format: String,

    /// Cores, as a mask (0x3) or a list (`[0,1]`); threads are then bound to them
    #[arg(short = 'm', value_name = "MASK")]
    pub core_mask: Option<String>,

    /// Every core runs on each device, instead of devices spread over cores
    #[arg(short = 'C')]
    pub every_core: bool,

    /// Latency percentiles
    #[arg(short = 'l')]
    pub latency: bool,

    /// Go on after operations that fail
    #[arg(short = 'f')]
    pub go_on: bool,

    /// Warn of operations that take so many seconds
    #[arg(short = 'k', value_name = "SECONDS")]
    pub timeout_s: Option<u64>,

    /// Serve JSON-RPC on this Unix socket meanwhile
    #[arg(short = 'r', long = "rpc-socket", value_name = "PATH")]
    pub rpc_socket: Option<PathBuf>,

    /// Serve statistics for Prometheus meanwhile: a socket's path or a loopback address
    #[arg(long = "metrics", value_name = "ADDRESS")]
    pub metrics: Option<String>,

    /// Log everything of a component (bdev, bdev_io, nvme, rpc, …, all); may be repeated
    #[arg(short = 'L', value_name = "COMPONENT")]
    pub log_flags: Vec<String>,

    /// Devices by URI, beside those of the configuration
    #[arg(value_name = "URI")]
    pub uris: Vec<String>,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Reads and writes, so many percent reads.
    ReadWrite(u64),
    /// Write, read back, compare.
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

/// What every job shares.
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

impl Args {
    /// The configuration file, if there is one.
    pub fn config_file(&self) -> Option<&Path> {
        self.config
            .as_deref()
            .or(self.json.as_ref().and_then(Option::as_deref))
    }

    /// Whether results are to be JSON.
    pub fn json_output(&self) -> bool {
        self.format == "json" || matches!(self.json, Some(None))
    }

    /// Checked.
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
                    "-w {other}: one of read, write, randread, randwrite, rw, randrw, verify, \
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

    /// Cores of the mask, in order; core 0 without one.
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
