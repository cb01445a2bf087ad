//! What is measured: the phases that every store goes through, in a directory of its own.

use std::path::Path;
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};

use crate::kind::StoreKind;
use crate::store::{KEY_LEN, Outcome, Store, StoreSizes, SyncMode};

/// Entries of a batch of the filling.
const FILL_BATCH: usize = 1000;
/// Entries of a durable batch.
const BATCH: u64 = 100;
/// Entries of a scan.
const SCAN: usize = 100;

/// The numbers of operations.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    /// Entries of the store.
    pub entries: u64,
    /// Bytes of a value.
    pub value_len: usize,
    /// Durable puts, and durable batches.
    pub durable: u64,
    /// Reads of one key, in each of its phases.
    pub reads: u64,
}

/// A phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ComparedPhase {
    /// Entries in random order, 1000 in a batch, durable at the end; by entry.
    Fill,
    /// Puts of one entry, each durable; by put.
    DurablePut,
    /// Batches of 100 entries, each durable; by batch.
    DurableBatch,
    /// Reads of random keys after as many that warmed the caches; by read.
    WarmGet,
    /// Reads of 100 entries from a random key on; by scan.
    WarmScan,
    /// Reads of random keys after the store was opened and the kernel's page cache was emptied; by read.
    ColdGet,
}

impl ComparedPhase {
    /// The name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ComparedPhase::Fill => "fill",
            ComparedPhase::DurablePut => "durable put",
            ComparedPhase::DurableBatch => "durable batch",
            ComparedPhase::WarmGet => "warm get",
            ComparedPhase::WarmScan => "warm scan",
            ComparedPhase::ColdGet => "cold get",
        }
    }
}

/// The result of a store in one round.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Measured {
    /// The store.
    pub kind: StoreKind,
    /// Microseconds of an operation, by phase.
    pub micros: Vec<(ComparedPhase, f64)>,
    /// Bytes that the directory takes at the end.
    pub disk_bytes: u64,
}

/// Takes a store through all phases. `note` says what comes. Without the right to empty the kernel's page cache, the cold phase
/// is left out.
///
/// # Errors
/// Fails as the store does, and when a key is missing.
pub fn run(
    kind: StoreKind,
    dir: &Path,
    sizes: StoreSizes,
    amount: Amount,
    note: impl FnMut(ComparedPhase),
) -> Outcome<Measured> {
    let mut watch = Stopwatch {
        note,
        micros: Vec::new(),
    };
    let mut rng = SmallRng::seed_from_u64(7);

    let mut numbers: Vec<u64> = (0..amount.entries).collect();
    numbers.shuffle(&mut rng);
    let store = kind.open(dir, sizes)?;
    watch.time(ComparedPhase::Fill, amount.entries, || {
        fill(&*store, amount, &numbers, &mut rng)
    })?;
    for (phase, times, len) in [
        (ComparedPhase::DurablePut, amount.durable, 1),
        (ComparedPhase::DurableBatch, amount.durable / 10, BATCH),
    ] {
        watch.time(phase, times, || {
            (0..times).try_for_each(|_| {
                let numbers: Vec<u64> = (0..len)
                    .map(|_| rng.random_range(0..amount.entries))
                    .collect();
                put(&*store, amount, &numbers, SyncMode::AtReturn, &mut rng)
            })
        })?;
    }
    store.close()?;

    let store = kind.open(dir, sizes)?;
    read(&*store, amount, &mut rng)?;
    watch.time(ComparedPhase::WarmGet, amount.reads, || {
        read(&*store, amount, &mut rng)
    })?;
    let scans = amount.reads / 10;
    watch.time(ComparedPhase::WarmScan, scans, || {
        (0..scans).try_for_each(|_| {
            let first = key(rng.random_range(0..amount.entries));
            store.scan(&first, SCAN).map(drop)
        })
    })?;
    let all = store.scan(&[0; KEY_LEN], usize::MAX)?;
    if all as u64 != amount.entries {
        return Err(format!("{all} entries were read of {}", amount.entries).into());
    }
    store.close()?;

    if empty_page_cache() {
        let store = kind.open(dir, sizes)?;
        let cold = Amount {
            reads: amount.reads / 10,
            ..amount
        };
        watch.time(ComparedPhase::ColdGet, cold.reads, || {
            read(&*store, cold, &mut rng)
        })?;
        store.close()?;
    }
    Ok(Measured {
        kind,
        micros: watch.micros,
        disk_bytes: allocated(dir)?,
    })
}

/// Measures phases one after the other.
struct Stopwatch<N> {
    note: N,
    micros: Vec<(ComparedPhase, f64)>,
}

impl<N: FnMut(ComparedPhase)> Stopwatch<N> {
    fn time(
        &mut self,
        phase: ComparedPhase,
        operations: u64,
        work: impl FnOnce() -> Outcome<()>,
    ) -> Outcome<()> {
        (self.note)(phase);
        let begun = Instant::now();
        work()?;
        let each = begun.elapsed().as_secs_f64() * 1e6 / operations.max(1) as f64;
        self.micros.push((phase, each));
        Ok(())
    }
}

/// Writes entries of these numbers, and makes them durable.
fn fill(store: &dyn Store, amount: Amount, numbers: &[u64], rng: &mut SmallRng) -> Outcome<()> {
    for batch in numbers.chunks(FILL_BATCH) {
        put(store, amount, batch, SyncMode::Later, rng)?;
    }
    store.sync()
}

/// Writes entries of these numbers, with new values, in one batch.
fn put(
    store: &dyn Store,
    amount: Amount,
    numbers: &[u64],
    mode: SyncMode,
    rng: &mut SmallRng,
) -> Outcome<()> {
    let entry = |number: &u64| {
        let mut value = vec![0; amount.value_len];
        rng.fill_bytes(&mut value);
        (key(*number), value)
    };
    let batch: Vec<_> = numbers.iter().map(entry).collect();
    store.put(&batch, mode)
}

/// Reads random keys.
fn read(store: &dyn Store, amount: Amount, rng: &mut SmallRng) -> Outcome<()> {
    for _ in 0..amount.reads {
        let number = rng.random_range(0..amount.entries);
        if store.get(&key(number))? != Some(amount.value_len) {
            return Err(
                format!("the value of entry {number} is missing or has another length").into(),
            );
        }
    }
    Ok(())
}

/// Returns the key of an entry: spread evenly, so that neighbours in time are none in order.
fn key(number: u64) -> [u8; KEY_LEN] {
    let spread = number.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    let mut key = [0; KEY_LEN];
    key[..8].copy_from_slice(&spread.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// Empties the kernel's page cache. Returns whether this process may.
fn empty_page_cache() -> bool {
    std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Returns the bytes that the files of a directory take on the disk.
fn allocated(dir: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += match metadata.is_dir() {
            true => allocated(&entry.path())?,
            false => metadata.blocks() * 512,
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_are_not_in_the_order_of_their_numbers() {
        let keys: std::collections::BTreeSet<_> = (0..1000).map(key).collect();
        assert_eq!(keys.len(), 1000);
        assert!(!(0..1000).map(key).is_sorted());
    }
}
