//! Benchmarks that write.

use std::sync::atomic::Ordering;

use rocksdb::{BottommostLevelCompaction, CompactOptions, WriteBatch};

use super::super::meter::{Budget, Meter, OpKind, Pace};
use super::super::plan::Job;
use super::super::script::{Script, Step};
use super::{Context, read_options, write_options};

/// Batches of puts or deletes. Returns the steps taken.
pub fn batches(c: &Context<'_>, m: &mut Meter<'_>, mut script: Script) -> Result<u64, String> {
    if c.timed.num == 0 {
        return Ok(0);
    }
    let options = write_options(c);
    let max = c.timed.ops_per_thread(c.f);
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), max);
    let mut pace = Pace::new(c.f.benchmark_write_rate_limit);
    let mut key = c.keys.buffer();
    let per_batch = c.timed.batch;
    let kind = match c.timed.job {
        Job::Delete(_) => OpKind::Delete,
        _ => OpKind::Write,
    };
    let mut steps = 0;
    while !budget.over(per_batch) {
        let mut bytes = 0;
        let done = if per_batch == 1 {
            match script.step() {
                Step::Put(k, span) => {
                    c.keys.fill(k, &mut key);
                    bytes += key.len() + span.len as usize;
                    c.db.put_opt(&key, c.pool.get(span), &options)
                }
                Step::Delete(k) => {
                    c.keys.fill(k, &mut key);
                    c.db.delete_opt(&key, &options)
                }
                Step::Get(_) => Ok(()),
            }
        } else {
            let mut batch = WriteBatch::default();
            for _ in 0..per_batch {
                match script.step() {
                    Step::Put(k, span) => {
                        c.keys.fill(k, &mut key);
                        bytes += key.len() + span.len as usize;
                        batch.put(&key, c.pool.get(span));
                    }
                    Step::Delete(k) => {
                        c.keys.fill(k, &mut key);
                        batch.delete(&key);
                    }
                    Step::Get(_) => {}
                }
            }
            c.db.write_opt(batch, &options)
        };
        done.map_err(|e| format!("{} error: {e}", kind.word()))?;
        steps += per_batch;
        m.add_bytes(bytes);
        m.finished(per_batch, kind);
        if let Some(p) = &mut pace {
            p.take(bytes as u64);
            m.skip_time();
        }
    }
    Ok(steps)
}

/// Gets and puts of random keys: `updaterandom`, `readrandomwriterandom`. Returns the steps taken.
pub fn read_and_write(
    c: &Context<'_>,
    m: &mut Meter<'_>,
    mut script: Script,
) -> Result<u64, String> {
    let (reading, writing) = (read_options(c.f), write_options(c));
    let max = c.timed.ops_per_thread(c.f);
    let mut budget = Budget::new(c.f, m.shared(), c.timed.seconds(c.f), max);
    let mut pace = Pace::new(c.f.benchmark_write_rate_limit);
    let mut key = c.keys.buffer();
    let update = c.timed.job == Job::Update;
    let (mut steps, mut reads, mut writes, mut found) = (0_u64, 0_u64, 0_u64, 0_u64);
    while !budget.over(1) {
        steps += 1;
        let step = script.step();
        let (Step::Get(k) | Step::Put(k, _) | Step::Delete(k)) = step;
        c.keys.fill(k, &mut key);
        if update || matches!(step, Step::Get(_)) {
            reads += 1;
            let value = c.db.get_pinned_opt(&key, &reading);
            if let Some(v) = value.map_err(|e| format!("get error: {e}"))? {
                found += 1;
                m.add_bytes(key.len() + v.len());
            }
        }
        if let Step::Put(_, span) = step {
            writes += 1;
            let put = c.db.put_opt(&key, c.pool.get(span), &writing);
            put.map_err(|e| format!("put error: {e}"))?;
            let bytes = key.len() + span.len as usize;
            m.add_bytes(bytes);
            if let Some(p) = &mut pace {
                p.take(bytes as u64);
                m.skip_time();
            }
        }
        let kind = match step {
            _ if update => OpKind::Update,
            Step::Get(_) => OpKind::Read,
            _ => OpKind::Write,
        };
        m.finished(1, kind);
    }
    if update {
        m.say(&format!("( updates:{writes} found:{found})"));
    } else {
        m.say(&format!(
            "( reads:{reads} writes:{writes} total:{steps} found:{found})"
        ));
    }
    Ok(steps)
}

/// Writes random keys until the other threads are done. Returns the steps taken.
pub fn beside(c: &Context<'_>, m: &mut Meter<'_>, mut script: Script) -> Result<u64, String> {
    m.exclude();
    let options = write_options(c);
    let mut pace = Pace::new(c.f.benchmark_write_rate_limit);
    let mut key = c.keys.buffer();
    let others = c.threads as u64 - 1;
    let writes = c.f.writes_or_num();
    let mut steps = 0;
    loop {
        let shared = m.shared();
        let enough = c.f.finish_after_writes && steps >= writes;
        let alone = shared.threads_done.load(Ordering::Acquire) >= others;
        if enough || (alone && !c.f.finish_after_writes) || shared.failed.load(Ordering::Relaxed) {
            return Ok(steps);
        }
        let Step::Put(k, span) = script.step() else {
            unreachable!("a background writer's script only puts")
        };
        c.keys.fill(k, &mut key);
        let put = c.db.put_opt(&key, c.pool.get(span), &options);
        put.map_err(|e| format!("put error: {e}"))?;
        steps += 1;
        let bytes = key.len() + span.len as usize;
        m.add_bytes(bytes);
        m.finished(1, OpKind::Write);
        if let Some(p) = &mut pace {
            p.take(bytes as u64);
        }
    }
}

/// Compacts everything.
pub fn compact(c: &Context<'_>, m: &mut Meter<'_>) {
    let mut how = CompactOptions::default();
    how.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
    c.db.compact_range_opt(None::<&[u8]>, None::<&[u8]>, &how);
    m.finished(1, OpKind::Other);
}
