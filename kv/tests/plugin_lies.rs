//! A file system in safe Rust that says what is not so: RocksDB gets errors, never bytes from outside of
//! its buffers.
#![forbid(unsafe_code)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::watchdog;
use pumice::EnvOptions;
use pumice::plugin::{
    Abilities, Access, Entry, How, MemoryFile, MemoryFs, PendingRead, PluginFile, PluginFs, Read,
    Result, Started, Stat,
};
use pumice::rocksdb::{BlockBasedOptions, DB, IteratorMode, Options, ReadOptions};

/// How many bytes too many the answers name.
#[derive(Clone, Default)]
struct Excess(Arc<AtomicUsize>);

impl Excess {
    fn add(&self, got: usize) -> usize {
        match got {
            0 => 0,
            got => got + self.0.load(Ordering::Relaxed),
        }
    }
}

struct Liar {
    fs: MemoryFs,
    excess: Excess,
    alignment: usize,
}

struct LyingFile {
    file: MemoryFile,
    excess: Excess,
}

struct LyingRead {
    read: <MemoryFile as PluginFile>::Pending,
    excess: Excess,
}

impl PendingRead for LyingRead {
    fn finish(self, buf: &mut [u8]) -> Result<usize> {
        Ok(self.excess.add(self.read.finish(buf)?))
    }
}

/// More bytes than were asked for, if there are.
struct LongPin(Vec<u8>);

impl AsRef<[u8]> for LongPin {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl PluginFs for Liar {
    type File = LyingFile;
    type Lock = <MemoryFs as PluginFs>::Lock;

    fn abilities(&self) -> Abilities {
        Abilities {
            async_reads: true,
            pins: true,
            ..Abilities::default()
        }
    }
    fn alignment(&self) -> usize {
        self.alignment
    }
    fn open(&self, path: &str, how: How) -> Result<LyingFile> {
        Ok(LyingFile {
            file: self.fs.open(path, how)?,
            excess: self.excess.clone(),
        })
    }
    fn remove(&self, path: &str) -> Result<()> {
        self.fs.remove(path)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.fs.rename(from, to)
    }
    fn link(&self, from: &str, to: &str) -> Result<()> {
        self.fs.link(from, to)
    }
    fn stat(&self, path: &str) -> Result<Stat> {
        self.fs.stat(path)
    }
    fn mkdir(&self, path: &str) -> Result<()> {
        self.fs.mkdir(path)
    }
    fn rmdir(&self, path: &str) -> Result<()> {
        self.fs.rmdir(path)
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.fs.list(dir)
    }
    fn sync_dir(&self, dir: &str) -> Result<()> {
        self.fs.sync_dir(dir)
    }
    fn lock(&self, path: &str) -> Result<Self::Lock> {
        self.fs.lock(path)
    }
    fn free_bytes(&self) -> Result<u64> {
        self.fs.free_bytes()
    }
}

impl PluginFile for LyingFile {
    type Pin = LongPin;
    type Pending = LyingRead;

    fn size(&self) -> u64 {
        self.file.size()
    }
    fn file_id(&self) -> u64 {
        self.file.file_id()
    }
    fn append(&self, data: &[u8]) -> Result<()> {
        self.file.append(data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_at(offset, data)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        Ok(self.excess.add(self.file.read_at(offset, buf)?))
    }
    fn read_many(&self, reads: &mut [Read<'_>]) {
        self.file.read_many(reads);
        for read in reads {
            if let Ok(got) = &mut read.result {
                *got = self.excess.add(*got);
            }
        }
    }
    fn pin(&self, offset: u64, len: usize) -> Option<LongPin> {
        let mut bytes = vec![0; len + 4096];
        let got = self.file.read_at(offset, &mut bytes).ok()?;
        bytes.truncate(got);
        Some(LongPin(bytes))
    }
    fn read_start(&self, offset: u64, len: usize) -> Result<Started<LyingRead>> {
        let lying = |read| LyingRead {
            read,
            excess: self.excess.clone(),
        };
        Ok(match self.file.read_start(offset, len)? {
            Started::Ready(read) => Started::Ready(lying(read)),
            Started::Pending(read) => Started::Pending(lying(read)),
        })
    }
    fn truncate(&self, len: u64) -> Result<()> {
        self.file.truncate(len)
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.file.allocate(offset, len)
    }
    fn finish(&self) -> Result<()> {
        PluginFile::finish(&self.file)
    }
    fn sync(&self) -> Result<()> {
        self.file.sync()
    }
    fn range_sync(&self, offset: u64, len: u64) -> Result<()> {
        self.file.range_sync(offset, len)
    }
    fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.file.prefetch(offset, len)
    }
    fn invalidate(&self, offset: u64, len: u64) -> Result<()> {
        self.file.invalidate(offset, len)
    }
    fn advise(&self, access: Access) {
        self.file.advise(access);
    }
}

fn liar(excess: &Excess, lend: bool, alignment: usize) -> Options {
    let fs = Liar {
        fs: MemoryFs::new(64 << 20),
        excess: excess.clone(),
        alignment,
    };
    let env = EnvOptions::new().lend_cached(lend).build(fs).unwrap();
    let mut options = Options::default();
    options.set_env(&env);
    options.create_if_missing(true);
    let mut table = BlockBasedOptions::default();
    table.disable_cache();
    options.set_block_based_table_factory(&table);
    options
}

fn fill(db: &DB) {
    for n in 0..2_000_u32 {
        db.put(n.to_be_bytes(), [b'v'; 100]).unwrap();
    }
    db.flush().unwrap();
}

#[test]
fn a_read_that_answers_too_much_is_an_error() {
    let _limit = watchdog();
    for (lend, by) in [(true, 1 << 30), (false, 3000), (false, 1 << 30)] {
        let excess = Excess::default();
        let options = liar(&excess, lend, 4096);
        let db = DB::open(&options, "/").unwrap();
        fill(&db);
        excess.0.store(by, Ordering::Relaxed);
        let errors = [
            db.get(7_u32.to_be_bytes()).err(),
            db.iterator(IteratorMode::Start)
                .find_map(std::result::Result::err),
            {
                let mut reads = ReadOptions::default();
                reads.set_async_io(true);
                reads.set_readahead_size(16 << 10);
                db.iterator_opt(IteratorMode::Start, reads)
                    .find_map(std::result::Result::err)
            },
            db.multi_get((0..64_u32).map(u32::to_be_bytes))
                .into_iter()
                .find_map(std::result::Result::err),
        ];
        for (n, error) in errors.into_iter().enumerate() {
            // What is lent is not read, and cut to what was asked for.
            if let Some(error) = error {
                assert!(
                    by < 1 << 30 || error.to_string().contains("a bug"),
                    "{error}"
                );
            } else {
                assert!(lend, "read {n} with {by} bytes too many was believed");
            }
        }
        drop(db);
        // A number that fits into RocksDB's buffer is only wrong.
        let error = DB::open(&options, "/").expect_err("opened");
        assert!(
            by < 1 << 30 || error.to_string().contains("a bug"),
            "{error}"
        );
        excess.0.store(0, Ordering::Relaxed);
        assert!(
            DB::open(&options, "/")
                .unwrap()
                .get(7_u32.to_be_bytes())
                .unwrap()
                .is_some()
        );
    }
}

#[test]
fn an_alignment_that_cannot_be_is_not_believed() {
    let _limit = watchdog();
    for alignment in [0, 3, usize::MAX] {
        let mut options = liar(&Excess::default(), true, alignment);
        options.set_use_direct_reads(true);
        options.set_use_direct_io_for_flush_and_compaction(true);
        let db = DB::open(&options, "/").unwrap();
        fill(&db);
        assert!(db.get(7_u32.to_be_bytes()).unwrap().is_some());
    }
}
