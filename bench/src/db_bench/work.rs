//! What the threads of a benchmark do.

mod read;
mod verify;
mod write;

use rocksdb::{DB, ReadOptions, WriteOptions};

use super::flags::Flags;
use super::keys::KeyFormat;
use super::ledger::Holdings;
use super::meter::{Count, Meter};
use super::plan::{Beside, Job, Timed};
use super::random::Mt64;
use super::script::{Pattern, Script, ScriptSpec};
use super::values::ValuePool;

/// What all threads of a benchmark see.
pub struct Context<'a> {
    /// The flags.
    pub f: &'a Flags,
    /// The database.
    pub db: &'a DB,
    /// The benchmark.
    pub timed: &'a Timed,
    /// Where values come from.
    pub pool: &'a ValuePool,
    /// What must be in the database, for `verify`.
    pub holdings: Option<&'a Holdings>,
    /// How keys are made.
    pub keys: KeyFormat,
    /// All threads, with the one beside.
    pub threads: usize,
}

/// What came of one thread.
#[derive(Debug)]
pub struct Outcome {
    /// Operations and times.
    pub count: Count,
    /// What it wrote: the script and how many of its steps.
    pub wrote: Option<(ScriptSpec, u64)>,
}

/// A thread that is ready to start.
#[derive(Debug)]
pub struct Prepared {
    thread: usize,
    rng: Mt64,
    role: Role,
}

#[derive(Debug)]
enum Role {
    Job(Option<(ScriptSpec, Script)>),
    Writer(ScriptSpec, Script),
    Scanner,
}

/// Everything that takes time and does not belong to the benchmark.
#[must_use]
pub fn prepare(c: &Context<'_>, thread: usize, seed: u64) -> Prepared {
    let script = |pattern| {
        let spec = ScriptSpec {
            pattern,
            seed,
            num: match pattern {
                Pattern::PutBackground if c.f.bgwriter_num > 0 => {
                    u64::try_from(c.f.bgwriter_num).unwrap_or(c.timed.num)
                }
                _ => c.timed.num,
            },
            batch: c.timed.batch,
            value_size: c.timed.value_size,
            same_percent: u64::try_from(c.f.same_value_percentage).unwrap_or(0),
        };
        (spec, Script::new(spec, c.pool))
    };
    let role = match (c.timed.beside, thread) {
        (Beside::Writer, 0) => {
            let (spec, running) = script(Pattern::PutBackground);
            Role::Writer(spec, running)
        }
        (Beside::Scanner, 0) => Role::Scanner,
        _ => Role::Job(match c.timed.job {
            Job::Fill(p) | Job::Delete(p) => Some(script(p)),
            Job::Update => Some(script(Pattern::Update)),
            Job::Mixed => {
                let gets = u32::try_from(c.f.readwritepercent).unwrap_or(100);
                Some(script(Pattern::Mixed(gets)))
            }
            _ => None,
        }),
    };
    Prepared {
        thread,
        rng: Mt64::new(seed),
        role,
    }
}

impl Prepared {
    /// Does it.
    ///
    /// # Errors
    /// What RocksDB said, or what `verify` found, in words.
    pub fn run(self, c: &Context<'_>, mut meter: Meter<'_>) -> Result<Outcome, String> {
        let mut rng = self.rng;
        let mut wrote = None;
        let m = &mut meter;
        match self.role {
            Role::Writer(spec, script) => {
                let steps = write::beside(c, m, script)?;
                wrote = Some((spec, steps));
            }
            Role::Scanner => read::scan_beside(c, m)?,
            Role::Job(script) => match (c.timed.job, script) {
                (Job::Fill(_) | Job::Delete(_), Some((spec, script))) => {
                    wrote = Some((spec, write::batches(c, m, script)?));
                }
                (Job::Update | Job::Mixed, Some((spec, script))) => {
                    wrote = Some((spec, write::read_and_write(c, m, script)?));
                }
                (Job::Scan { reverse }, _) => read::scan(c, m, reverse)?,
                (Job::ReadRandom | Job::ReadMissing, _) => read::random(c, m, &mut rng)?,
                (Job::MultiRead, _) => read::multi(c, m, &mut rng)?,
                (Job::Seek, _) => read::seek(c, m, &mut rng)?,
                (Job::NewIterator, _) => read::new_iterators(c, m)?,
                (Job::Compact, _) => write::compact(c, m),
                (Job::Verify, _) => verify::verify(c, m, self.thread)?,
                (Job::Fill(_) | Job::Delete(_) | Job::Update | Job::Mixed, None) => {
                    unreachable!("prepare gives these a script")
                }
            },
        }
        let count = meter.stop();
        Ok(Outcome { count, wrote })
    }
}

fn write_options(c: &Context<'_>) -> WriteOptions {
    let mut o = WriteOptions::default();
    o.set_sync(c.timed.sync);
    o.disable_wal(c.f.disable_wal);
    o
}

fn read_options(f: &Flags) -> ReadOptions {
    let mut o = ReadOptions::default();
    o.set_verify_checksums(f.verify_checksum);
    o.set_async_io(f.async_io);
    if let Ok(bytes) = usize::try_from(f.readahead_size) {
        o.set_readahead_size(bytes);
    }
    o
}
