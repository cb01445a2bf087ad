//! The benchmarks by name, and what each asks for.

use super::flags::Flags;
use super::gflags::nearest;
use super::script::Pattern;
use super::values::ValueSize;

/// What the threads of a benchmark do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Write batches of puts.
    Fill(Pattern),
    /// Write batches of deletes.
    Delete(Pattern),
    /// Get and put the same random key.
    Update,
    /// Gets and puts of random keys.
    Mixed,
    /// Iterate from one end.
    Scan {
        /// From the last key.
        reverse: bool,
    },
    /// Get random keys.
    ReadRandom,
    /// Get keys that are not there.
    ReadMissing,
    /// `MultiGet` of random keys.
    MultiRead,
    /// Seek to random keys.
    Seek,
    /// Make iterators.
    NewIterator,
    /// Compact everything, timed.
    Compact,
    /// Read back every key and compare it with what was written.
    Verify,
}

/// What happens without a result line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meta {
    /// Print a property of the database.
    Property(&'static str),
    /// Print those of the memtables.
    MemStats,
    /// Flush the memtable.
    Flush,
    /// Compact everything.
    CompactAll,
    /// Wait until nothing is left to compact.
    WaitForCompaction,
}

/// Who writes beside the readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Nobody.
    Nobody,
    /// One more thread that writes random keys until the others are done.
    Writer,
    /// One more thread that scans until the others are done.
    Scanner,
}

/// One entry of `--benchmarks`.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The name in results.
    pub name: String,
    /// What to do.
    pub action: Action,
    /// Timed runs.
    pub repeat: u32,
    /// Runs before, which do not count.
    pub warmup: u32,
}

/// Timed, or not.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// With a result line.
    Timed(Timed),
    /// Without.
    Meta(Meta),
}

/// A timed benchmark with what it changes of the flags.
#[derive(Debug, Clone, PartialEq)]
pub struct Timed {
    /// What the threads do.
    pub job: Job,
    /// What one more thread does.
    pub beside: Beside,
    /// Wants an empty database.
    pub fresh: bool,
    /// Keys are below this when writing.
    pub num: u64,
    /// Operations of a thread that reads.
    pub reads: u64,
    /// Keys per batch.
    pub batch: u64,
    /// Every write synced.
    pub sync: bool,
    /// Lengths of values.
    pub value_size: ValueSize,
    /// Threads, without the one beside.
    pub threads: usize,
    /// One byte more in the keys looked for, so that none is there.
    pub longer_keys: bool,
}

/// Names with one line of help each.
pub const BENCHMARKS: &[(&str, &str)] = &[
    (
        "fillseq",
        "write --num values in sequential key order, fresh database",
    ),
    ("fillbatch", "fillseq in batches of 1000"),
    (
        "fillrandom",
        "write --num values in random key order, fresh database",
    ),
    (
        "filluniquerandom",
        "write every key once in random order, fresh database, one thread",
    ),
    (
        "fillsync",
        "write random keys below num/1000, each synced, fresh database",
    ),
    (
        "fill100K",
        "write num/1000 values of 100 000 bytes in random order, fresh database",
    ),
    ("overwrite", "write --num values in random key order"),
    ("readseq", "read --reads values in key order"),
    (
        "readtocache",
        "read everything in key order with one thread",
    ),
    ("readreverse", "read --reads values in reverse key order"),
    ("readrandom", "get --reads random keys"),
    ("readmissing", "get --reads keys that are not there"),
    (
        "multireadrandom",
        "MultiGet of --batch_size random keys at a time",
    ),
    (
        "seekrandom",
        "seek to --reads random keys, with --seek_nexts nexts each",
    ),
    ("newiterator", "make --reads iterators"),
    (
        "readwhilewriting",
        "readrandom with one more thread that writes",
    ),
    (
        "multireadwhilewriting",
        "multireadrandom with one more thread that writes",
    ),
    (
        "seekrandomwhilewriting",
        "seekrandom with one more thread that writes",
    ),
    (
        "readwhilescanning",
        "readrandom with one more thread that scans",
    ),
    (
        "readrandomwriterandom",
        "gets and puts of random keys, --readwritepercent gets",
    ),
    (
        "updaterandom",
        "get a random key, then put it with a new value",
    ),
    ("deleteseq", "delete --deletes keys in sequential order"),
    ("deleterandom", "delete --deletes random keys"),
    ("compact", "compact the whole database"),
    ("compactall", "the same without a result line"),
    ("flush", "flush the memtable"),
    (
        "waitforcompaction",
        "wait until no compaction is left to do",
    ),
    (
        "verify",
        "read back every key and compare it with what this run wrote; an error ends the run",
    ),
    ("stats", "print RocksDB's stats"),
    ("levelstats", "print files and bytes per level"),
    ("memstats", "print sizes of memtables"),
    ("sstables", "print the table files"),
];

/// Reads `--benchmarks`.
///
/// # Errors
/// An unknown name, with the nearest, or arguments in brackets that are none.
pub fn parse(f: &Flags) -> Result<Vec<Plan>, String> {
    let names = f.benchmarks.split(',').map(str::trim);
    names.filter(|n| !n.is_empty()).map(|n| one(f, n)).collect()
}

fn one(f: &Flags, text: &str) -> Result<Plan, String> {
    let (name, args) = match text.split_once('[') {
        None => (text, ""),
        Some((name, rest)) => {
            let args = rest
                .strip_suffix(']')
                .ok_or_else(|| format!("benchmark '{text}': the bracket is not closed"))?;
            (name, args)
        }
    };
    let (mut repeat, mut warmup) = (1, 0);
    for arg in args.split('-').filter(|a| !a.is_empty()) {
        let number = |n: &str| {
            n.parse::<u32>()
                .map_err(|_| format!("benchmark '{text}': '{arg}' is no argument; expected X3 (three runs) or W1 (one warm-up)"))
        };
        match arg.split_at_checked(1) {
            Some(("X", n)) => repeat = number(n)?.max(1),
            Some(("W", n)) => warmup = number(n)?,
            _ => {
                number("")?;
            }
        }
    }
    let action = action(f, name).ok_or_else(|| {
        let hint = nearest(name, BENCHMARKS.iter().map(|(n, _)| *n))
            .map_or("see --help for all of them".to_owned(), |n| {
                format!("did you mean {n}?")
            });
        format!("unknown benchmark '{name}'; {hint}")
    })?;
    Ok(Plan {
        name: name.to_owned(),
        action,
        repeat,
        warmup,
    })
}

fn action(f: &Flags, name: &str) -> Option<Action> {
    let num = u64::try_from(f.num).unwrap_or(0);
    let base = Timed {
        job: Job::ReadRandom,
        beside: Beside::Nobody,
        fresh: false,
        num,
        reads: f.reads_or_num(),
        batch: u64::try_from(f.batch_size).unwrap_or(1).max(1),
        sync: f.sync,
        value_size: super::runner::value_size(f),
        threads: usize::try_from(f.threads).unwrap_or(1).max(1),
        longer_keys: false,
    };
    let fill = |pattern| Timed {
        job: Job::Fill(pattern),
        fresh: true,
        ..base.clone()
    };
    let job = |job| Timed {
        job,
        ..base.clone()
    };
    let timed = match name {
        "fillseq" => fill(Pattern::PutSequential),
        "fillbatch" => Timed {
            batch: 1000,
            ..fill(Pattern::PutSequential)
        },
        "fillrandom" => fill(Pattern::PutRandom),
        "filluniquerandom" => Timed {
            threads: 1,
            ..fill(Pattern::PutUnique)
        },
        "fillsync" => Timed {
            num: num / 1000,
            sync: true,
            ..fill(Pattern::PutRandom)
        },
        "fill100K" => Timed {
            num: num / 1000,
            value_size: ValueSize::Fixed(100_000),
            ..fill(Pattern::PutRandom)
        },
        "overwrite" => job(Job::Fill(Pattern::PutRandom)),
        "readseq" => job(Job::Scan { reverse: false }),
        "readtocache" => Timed {
            threads: 1,
            reads: num,
            ..job(Job::Scan { reverse: false })
        },
        "readreverse" => job(Job::Scan { reverse: true }),
        "readrandom" => base,
        "readmissing" => Timed {
            longer_keys: true,
            ..job(Job::ReadMissing)
        },
        "multireadrandom" => job(Job::MultiRead),
        "seekrandom" => job(Job::Seek),
        "newiterator" => job(Job::NewIterator),
        "readwhilewriting" => Timed {
            beside: Beside::Writer,
            ..base
        },
        "multireadwhilewriting" => Timed {
            beside: Beside::Writer,
            ..job(Job::MultiRead)
        },
        "seekrandomwhilewriting" => Timed {
            beside: Beside::Writer,
            ..job(Job::Seek)
        },
        "readwhilescanning" => Timed {
            beside: Beside::Scanner,
            ..base
        },
        "readrandomwriterandom" => job(Job::Mixed),
        "updaterandom" => job(Job::Update),
        "deleteseq" => job(Job::Delete(Pattern::DeleteSequential)),
        "deleterandom" => job(Job::Delete(Pattern::DeleteRandom)),
        "compact" => job(Job::Compact),
        "verify" => job(Job::Verify),
        _ => return meta(name).map(Action::Meta),
    };
    Some(Action::Timed(timed))
}

fn meta(name: &str) -> Option<Meta> {
    Some(match name {
        "compactall" => Meta::CompactAll,
        "flush" => Meta::Flush,
        "waitforcompaction" => Meta::WaitForCompaction,
        "stats" => Meta::Property("rocksdb.stats"),
        "levelstats" => Meta::Property("rocksdb.levelstats"),
        "memstats" => Meta::MemStats,
        "sstables" => Meta::Property("rocksdb.sstables"),
        _ => return None,
    })
}

impl Timed {
    /// Operations that one thread of the job does when no duration is given; 0 when not known.
    #[must_use]
    pub fn ops_per_thread(&self, f: &Flags) -> u64 {
        match self.job {
            Job::Fill(_) => match f.writes {
                ..=0 => self.num,
                n => u64::try_from(n).unwrap_or(self.num),
            },
            Job::Delete(_) => f.deletes_or_num(),
            Job::Update | Job::Mixed => f.readwrites_or_num(),
            Job::Compact => 1,
            Job::Verify => 0,
            _ => self.reads,
        }
    }

    /// Seconds that decide how long it runs; 0 when operations do.
    #[must_use]
    pub fn seconds(&self, f: &Flags) -> i32 {
        match self.job {
            Job::Fill(Pattern::PutRandom) | Job::Delete(Pattern::DeleteRandom) => f.duration,
            Job::Update | Job::Mixed | Job::ReadRandom | Job::ReadMissing => f.duration,
            Job::MultiRead | Job::Seek | Job::NewIterator => f.duration,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(list: &str) -> Result<Vec<Plan>, String> {
        parse(&Flags {
            benchmarks: list.into(),
            num: 5000,
            ..Flags::default()
        })
    }

    fn timed(name: &str) -> Timed {
        match plans(name).unwrap().remove(0).action {
            Action::Timed(t) => t,
            Action::Meta(m) => panic!("{m:?}"),
        }
    }

    #[test]
    fn every_listed_name_is_known() {
        for (name, _) in BENCHMARKS {
            plans(name).unwrap();
        }
        plans(super::super::flags::DEFAULT_BENCHMARKS).unwrap();
        assert!(plans("").unwrap().is_empty());
    }

    #[test]
    fn variants_change_what_they_should() {
        let sync = timed("fillsync");
        assert!(sync.sync && sync.fresh && sync.num == 5);
        assert_eq!(timed("fillbatch").batch, 1000);
        assert_eq!(timed("fill100K").value_size, ValueSize::Fixed(100_000));
        assert!(!timed("overwrite").fresh);
        assert_eq!(timed("readwhilewriting").beside, Beside::Writer);
        assert!(timed("readmissing").longer_keys);
        // As its help says; RocksDB's tool itself writes --num times over num/1000 keys.
        assert_eq!(sync.ops_per_thread(&Flags::default()), 5);
        let given = Flags {
            writes: 70,
            ..Flags::default()
        };
        assert_eq!(sync.ops_per_thread(&given), 70);
    }

    #[test]
    fn brackets_repeat_and_warm_up() {
        let p = plans("readrandom[W2-X3],stats").unwrap();
        assert_eq!((p[0].repeat, p[0].warmup), (3, 2));
        assert_eq!(p[0].name, "readrandom");
        assert_eq!(p[1].action, Action::Meta(Meta::Property("rocksdb.stats")));
        assert!(plans("readrandom[X3").unwrap_err().contains("not closed"));
        assert!(plans("readrandom[Q3]").unwrap_err().contains("X3"));
    }

    #[test]
    fn an_unknown_benchmark_names_the_nearest() {
        assert_eq!(
            plans("filrandom").unwrap_err(),
            "unknown benchmark 'filrandom'; did you mean fillrandom?"
        );
    }
}
