//! What was put without a log: RocksDB has it in memtables alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};
use rocksdb::{
    AsColumnFamilyRef, BoundColumnFamily, DBWithThreadMode, Error, FlushOptions, IteratorMode,
    MultiThreaded, ReadOptions, ReadTier,
};

type Rocks = DBWithThreadMode<MultiThreaded>;

/// Time without a flush in which RocksDB recovers from an error by itself, if it can: it looks every
/// five seconds whether there is room again, and flushes then. A flush that fails meanwhile holds
/// it up.
const QUIET: Duration = Duration::from_secs(10);

/// A column family with its name.
pub(crate) type Family<'a> = (String, Arc<BoundColumnFamily<'a>>);

/// The last flush that failed.
pub(crate) type Refused = Option<(Instant, Error)>;

/// Writes what was put without a log into tables. Nothing is written if every put was logged.
///
/// RocksDB does this when it closes a database, but tells nobody when it fails.
pub(crate) fn write<C: AsColumnFamilyRef + Sync>(
    db: &Rocks,
    families: &[(String, C)],
    refused: &mut Refused,
) -> Result<(), Error> {
    let held = || {
        families
            .iter()
            .filter(|(_, family)| holds_entries(db, family))
    };
    if held().all(|_| false) || held().any(|(name, family)| all_logged(db, name, family)) {
        return Ok(());
    }
    if let Some((when, error)) = refused
        && when.elapsed() < QUIET
    {
        return Err(error.clone());
    }
    let held: Vec<&C> = held().map(|(_, family)| family).collect();
    let written = db.flush_cfs_opt(&held, &FlushOptions::default());
    *refused = written.clone().err().map(|error| (Instant::now(), error));
    written
}

/// Whether a family has something that no table has.
fn holds_entries(db: &Rocks, family: &impl AsColumnFamilyRef) -> bool {
    ["active-mem-table", "imm-mem-tables"].iter().any(|which| {
        let entries = db.property_int_value_cf(family, &format!("rocksdb.num-entries-{which}"));
        !matches!(entries, Ok(Some(0)))
    })
}

/// Whether it is certain that this database was never written to without a log.
///
/// RocksDB knows and has no property for it, but a read of what is persisted passes the memtables
/// once there was such a write, and RocksDB counts the memtables that a read looks into. The key is
/// one of the family's, in a memtable or in a table, because its comparator may not take every key.
pub(crate) fn all_logged(db: &Rocks, name: &str, family: &(impl AsColumnFamilyRef + Sync)) -> bool {
    let look = || {
        let mut newest = ReadOptions::default();
        newest.set_read_tier(ReadTier::Memtable);
        let mut keys = db.iterator_cf_opt(family, newest, IteratorMode::Start);
        let in_memory = keys
            .next()
            .and_then(Result::ok)
            .map(|(key, _)| key.into_vec());
        // An iterator passes over deletions, so that there may be none.
        let in_a_table = || {
            let mut files = db.live_files().ok()?.into_iter();
            files
                .find(|file| file.column_family_name == name)?
                .start_key
        };
        let Some(key) = in_memory.or_else(in_a_table) else {
            return false;
        };
        let mut persisted = ReadOptions::default();
        persisted.set_read_tier(ReadTier::Persisted);
        set_perf_stats(PerfStatsLevel::EnableCount);
        let mut context = PerfContext::default();
        context.reset();
        // Whether it is found, and can be read, does not matter.
        drop(db.get_pinned_cf_opt(family, key, &persisted));
        context.metric(PerfMetric::GetFromMemtableCount) > 0
    };
    // The level and the counters belong to a thread, and the caller's are the caller's.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, look);
        thread.is_ok_and(|thread| thread.join().unwrap_or(false))
    })
}
