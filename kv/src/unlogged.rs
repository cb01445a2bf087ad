//! What was put without a log: RocksDB has it in memtables alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};
use rocksdb::{AsColumnFamilyRef, BoundColumnFamily, Error, ReadOptions, ReadTier};

use crate::handle::DbHandle;

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
    db: &impl DbHandle,
    families: &[(String, C)],
    refused: &mut Refused,
) -> Result<(), Error> {
    let held = || {
        families
            .iter()
            .filter(|(_, family)| db.may_hold_entries(family))
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
    let written = db.flush_families(&held);
    *refused = written.clone().err().map(|error| (Instant::now(), error));
    written
}

/// Whether it is certain that this database was never written to without a log.
///
/// RocksDB knows and has no property for it, but a read of what is persisted passes the memtables
/// once there was such a write, and RocksDB counts the memtables that a read looks into. The key is
/// one of the family's, in a memtable or in a table, because its comparator may not take every key.
pub(crate) fn all_logged(
    db: &impl DbHandle,
    name: &str,
    family: &(impl AsColumnFamilyRef + Sync),
) -> bool {
    let look = || {
        let mut newest = ReadOptions::default();
        newest.set_read_tier(ReadTier::Memtable);
        let in_memory = db.first_key(family, newest).map(<[u8]>::into_vec);
        // An iterator passes over deletions, so that there may be none.
        let Some(key) = in_memory.or_else(|| db.key_of_a_table(name)) else {
            return false;
        };
        let mut persisted = ReadOptions::default();
        persisted.set_read_tier(ReadTier::Persisted);
        set_perf_stats(PerfStatsLevel::EnableCount);
        let mut context = PerfContext::default();
        context.reset();
        db.look_up(family, &key, &persisted);
        context.metric(PerfMetric::GetFromMemtableCount) > 0
    };
    // The level and the counters belong to a thread, and the caller's are the caller's.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, look);
        thread.is_ok_and(|thread| thread.join().unwrap_or(false))
    })
}
