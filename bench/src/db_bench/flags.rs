//! The flags of `db_bench` that RocksDB's tool does not have.

use pumice_rocksdb_tools::db_bench::Flag;

use super::gflags::{self, FlagError, Parsed};

crate::flags! {
    /// Flags of a run beside RocksDB's own.
    Flags {
        env: String = "pumice", "file system below RocksDB: pumice (on --device), kernel (the directory --db of the kernel's file system), mem (RocksDB's own memory env); --fs_uri and --env_uri choose among RocksDB's";
        device: String = "", "block device for --env=pumice as a URI, for example file:///path/disk.img?size=8G or malloc://2G; empty: an image file, made, formatted and removed";
        image_dir: String = "", "directory for the image file made when --device is empty; empty: the system's temporary directory";
        image_size: u64 = 0_u64, "bytes of that image file; 0: what --num, --key_size and --value_size may need";
        fs_cache_size: u64 = 1_u64 << 30, "bytes of the page cache of --env=pumice (the kernel's own cache is not bounded by this)";
        fs_cache_most: u64 = 0_u64, "bytes up to which that page cache grows while memory is free; 0: it does not";
        fs_huge_pages: bool = true, "make huge pages of that page cache's memory while it is in use";
        format: bool = true, "format the device of --env=pumice if that is empty; a device that holds something else is refused";
        force_format: bool = false, "format the device of --env=pumice whatever it holds; everything on it is lost";
        cluster_size: u64 = 0_u64, "cluster size in bytes when formatting; 0: the file system's default";
        spdk: String = "", "SPDK JSON configuration file that defines the block device --spdk_bdev";
        spdk_bdev: String = "", "name of the block device in the configuration of --spdk";
        spdk_cache_size: u64 = 0_u64, "page cache of --env=pumice in MiB, as SPDK's db_bench took it; 0: --fs_cache_size";
        json: String = "", "write results for machines to this file ('-': standard output; the text then goes to standard error, except the few lines that backup, restore and timing flags print themselves)";
        metrics: String = "", "serve the figures of --env=pumice for Prometheus: path of a Unix socket, or 127.0.0.1:PORT";
        rpc_socket: String = "", "answer 'pumice top', 'df', 'ls' and 'stat' on this socket while --env=pumice runs";
        volatile: bool = false, "a kill of the process may lose unsynced writes of --env=pumice: no log in shared memory";
        verify: bool = false, "after the benchmarks read every key of the database back by a scan and by Get, and compare; on without --benchmarks";
    }
}

/// Parses the command line, without the program's name.
///
/// # Errors
/// Returns the first error, as text for the user.
pub fn parse(
    args: impl IntoIterator<Item = String>,
    rocksdb: &[Flag],
) -> Result<Parsed<Flags>, FlagError> {
    let mut args: Vec<String> = args.into_iter().collect();
    for arg in &mut args {
        // Alone, the flag means standard output.
        if matches!(&arg[..], "--json" | "-json") {
            arg.push_str("=-");
        }
    }
    let is_verify = |arg: &String| {
        let name = arg.trim_start_matches('-').split('=').next();
        matches!(name, Some("verify" | "noverify"))
    };
    let says_verify = args.iter().any(is_verify);
    let mut parsed: Parsed<Flags> = gflags::parse(args, rocksdb)?;
    if let Parsed::Run { own, others, .. } = &mut parsed {
        own.verify |= !says_verify && others.iter().all(|(name, _)| name != "benchmarks");
    }
    Ok(parsed)
}

impl Flags {
    /// Returns the size of our page cache in bytes.
    #[must_use]
    pub fn page_cache_bytes(&self) -> u64 {
        match self.spdk_cache_size {
            0 => self.fs_cache_size,
            mib => mib.saturating_mul(1 << 20),
        }
    }
}

/// Checks flags against each other.
///
/// # Errors
/// Returns a text for the user.
pub fn check(f: &Flags) -> Result<(), String> {
    if !["pumice", "kernel", "mem"].contains(&&f.env[..]) {
        return Err(format!("--env={}: one of pumice, kernel, mem", f.env));
    }
    if f.spdk.is_empty() != f.spdk_bdev.is_empty() {
        return Err("--spdk and --spdk_bdev go together".to_owned());
    }
    if !f.spdk.is_empty() && !f.device.is_empty() {
        return Err("--device and --spdk both name a device; give one of them".to_owned());
    }
    if f.env != "pumice" && !(f.device.is_empty() && f.spdk.is_empty()) {
        return Err(format!("--env={} uses no device", f.env));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_verified_without_benchmarks_unless_told_not_to() {
        let others = pumice_rocksdb_tools::db_bench::flags();
        let verify = |line: &str| {
            let args = line.split_whitespace().map(String::from);
            match parse(args, &others) {
                Ok(Parsed::Run { own, .. }) => own.verify,
                other => panic!("{other:?}"),
            }
        };
        assert!(verify("") && verify("--verify --benchmarks=fillseq"));
        for line in ["--benchmarks=fillseq", "--noverify", "--verify=false"] {
            assert!(!verify(line), "{line}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let base = Flags::default();
        assert_eq!(check(&base), Ok(()));
        for (f, word) in [
            (
                Flags {
                    env: "floppy".into(),
                    ..base.clone()
                },
                "one of pumice",
            ),
            (
                Flags {
                    spdk: "c.json".into(),
                    ..base.clone()
                },
                "go together",
            ),
            (
                Flags {
                    spdk: "c.json".into(),
                    spdk_bdev: "Malloc0".into(),
                    device: "malloc://1G".into(),
                    ..base.clone()
                },
                "give one",
            ),
            (
                Flags {
                    env: "mem".into(),
                    device: "malloc://1G".into(),
                    ..base.clone()
                },
                "uses no device",
            ),
        ] {
            let e = check(&f).unwrap_err();
            assert!(e.contains(word), "{f:?}: {e}");
        }
    }

    #[test]
    fn spdks_cache_size_is_in_mebibytes() {
        let f = Flags {
            spdk_cache_size: 16,
            ..Flags::default()
        };
        assert_eq!(f.page_cache_bytes(), 16 << 20);
        assert_eq!(Flags::default().page_cache_bytes(), 1 << 30);
    }
}
