//! `pumice-others`: takes every store through the same phases, and prints a table.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pumice_others::kind::{ALL, StoreKind};
use pumice_others::report;
use pumice_others::store::{Outcome, StoreSizes};
use pumice_others::workloads::{self, Amount, Measured};

/// Compares Pumice with RocksDB on the kernel's file system, redb, fjall and LMDB. Each store has one thread of the program, a
/// directory of its own, the same keys and values, and the same durability. The table has microseconds per operation, and what
/// the baseline took by what the store took in the same round: above 1 is faster than the baseline.
#[derive(Parser)]
struct Arguments {
    /// The directory in which each store gets one of its own, which is removed at the end.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// The stores, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = ALL.map(|kind| kind.name().to_owned()))]
    stores: Vec<String>,
    /// The store that the others are compared with.
    #[arg(long, value_enum, default_value_t = StoreKind::Rocksdb)]
    baseline: StoreKind,
    /// Rounds, in each of which every store is measured once.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Entries of a store.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    entries: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 100)]
    value_len: usize,
    /// Durable puts. There are a tenth as many durable batches.
    #[arg(long, default_value_t = 10_000)]
    durable: u64,
    /// Reads of one key. There are a tenth as many scans and cold reads.
    #[arg(long, default_value_t = 300_000)]
    reads: u64,
    /// Bytes of the cache of each store that has one of its own: of RocksDB's blocks, redb's and fjall's.
    #[arg(long, default_value_t = 64 << 20)]
    cache_bytes: u64,
    /// Most bytes of data: the size of Pumice's image file, and of the address range that LMDB maps.
    #[arg(long, default_value_t = 8 << 30)]
    data_bytes: u64,
    /// Writes the figures of every round to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pumice-others: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let mut kinds = Vec::new();
    for name in &arguments.stores {
        let kind = ALL.into_iter().find(|kind| kind.name() == name);
        kinds.push(kind.ok_or_else(|| {
            format!(
                "there is no store `{name}`; use {}",
                ALL.map(StoreKind::name).join(", ")
            )
        })?);
    }
    let sizes = StoreSizes {
        cache_bytes: arguments.cache_bytes,
        data_bytes: arguments.data_bytes,
    };
    let amount = Amount {
        entries: arguments.entries,
        value_len: arguments.value_len,
        durable: arguments.durable,
        reads: arguments.reads,
    };
    let mut rounds: Vec<Vec<Measured>> = Vec::new();
    for round in 0..arguments.rounds as usize {
        let mut measured = Vec::new();
        for at in 0..kinds.len() {
            // Each round begins with another store.
            let kind = kinds[(round + at) % kinds.len()];
            let dir = arguments.dir.join(format!("pumice-others-{}", kind.name()));
            std::fs::create_dir(&dir).map_err(|error| {
                format!("{}: it cannot be made: {error}; give --dir a directory in which it is not there yet", dir.display())
            })?;
            let done = workloads::run(kind, &dir, sizes, amount, |phase| {
                eprintln!("round {}: {}: {}", round + 1, kind.name(), phase.name());
            });
            std::fs::remove_dir_all(&dir)?;
            measured.push(done.map_err(|error| format!("{}: {error}", kind.name()))?);
        }
        rounds.push(measured);
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rounds)?)?;
    }
    print!("{}", report::table(&rounds, &kinds, arguments.baseline));
    Ok(())
}
