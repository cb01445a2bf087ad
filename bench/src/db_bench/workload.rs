//! The flags of RocksDB's tool on which the choice of the file system depends.

use pumice_rocksdb_tools::db_bench::{self, Flag};

/// The relevant flags of RocksDB's tool, as they are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `--db`.
    pub db: String,
    /// `--use_existing_db` or `--readonly`.
    pub use_existing_db: bool,
    /// `--fs_uri=…` or `--env_uri=…`, if it is given.
    pub uri: Option<String>,
    /// Whether RocksDB puts an environment of its own over the kernel's file system.
    pub simulates_a_disk: bool,
    /// `--sync`.
    pub sync: bool,
    /// `--use_fsync`.
    pub use_fsync: bool,
    /// Number of keys.
    pub num: u64,
    /// Number of writes of each thread.
    pub writes: u64,
    /// Number of threads.
    pub threads: u64,
    /// Duration in seconds, or 0.
    pub duration: u64,
    /// Length of a key in bytes.
    pub key_size: u64,
    /// Greatest length of a value in bytes.
    pub value_size: u64,
    /// `--report_file`, if a report is to be written.
    pub report_file: Option<String>,
}

impl Default for Workload {
    /// Returns RocksDB's defaults.
    fn default() -> Self {
        Workload {
            db: String::new(),
            use_existing_db: false,
            uri: None,
            simulates_a_disk: false,
            sync: false,
            use_fsync: false,
            num: 1_000_000,
            writes: 1_000_000,
            threads: 1,
            duration: 0,
            key_size: 16,
            value_size: 100,
            report_file: None,
        }
    }
}

impl Workload {
    /// Returns the flags as they are set in this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self::of(&db_bench::flags())
    }

    fn of(flags: &[Flag]) -> Self {
        let text = |name: &str| {
            let flag = flags.iter().find(|f| f.name == name);
            flag.map(|f| &f.value[..]).unwrap_or_default()
        };
        let on = |name: &str| text(name) == "true";
        // A number below 0 means that another flag decides.
        let number = |name: &str| text(name).parse::<u64>().ok();
        let num = number("num").unwrap_or(0);
        let value_size = match text("value_size_distribution_type") {
            "fixed" => number("value_size"),
            _ => number("value_size_max"),
        };
        let uri = ["fs_uri", "env_uri"]
            .into_iter()
            .find(|name| !text(name).is_empty())
            .map(|name| format!("--{name}={}", text(name)));
        Workload {
            db: text("db").to_owned(),
            use_existing_db: on("use_existing_db") || on("readonly"),
            uri,
            simulates_a_disk: on("simulate_hdd") || !text("simulate_hybrid_fs_file").is_empty(),
            sync: on("sync"),
            use_fsync: on("use_fsync"),
            num,
            writes: number("writes").unwrap_or(num),
            threads: number("threads").unwrap_or(1),
            duration: number("duration").unwrap_or(0),
            key_size: number("key_size").unwrap_or(0),
            value_size: value_size.unwrap_or(0),
            report_file: number("report_interval_seconds")
                .filter(|seconds| *seconds > 0)
                .map(|_| text("report_file").to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_rocksdbs() {
        assert_eq!(Workload::of_process(), Workload::default());
    }
}
