//! The flags of `db_bench`: names, meanings and defaults of RocksDB's tool (version 11.8,
//! `tools/db_bench_tool.cc`), and those that choose the file system below.

use super::gflags::{self, FlagError, Parsed};

/// The benchmarks that run when none are named.
pub const DEFAULT_BENCHMARKS: &str = "fillseq,fillsync,fillrandom,overwrite,readrandom,multireadrandom,seekrandom,readseq,readreverse,compact,readrandom,readwhilewriting,updaterandom,deleterandom,stats,levelstats";

crate::flags! {
    /// Everything that a run can be told.
    Flags {
        benchmarks: String = DEFAULT_BENCHMARKS, "comma-separated benchmarks, run in this order; `name[X3]` repeats one three times, `name[W1-X3]` after one warm-up; see the list above";
        // The file system below.
        env: String = "pumice", "file system below RocksDB: pumice (ours, on --device), kernel (the directory --db of the kernel's file system), mem (RocksDB's own memory env)";
        device: String = "", "block device for --env=pumice as a URI, for example file:///path/disk.img?size=8G or malloc://2G; empty: an image file, made, formatted and removed";
        image_dir: String = "", "directory for the image file made when --device is empty; empty: the system's temporary directory";
        image_size: u64 = 0_u64, "bytes of that image file; 0: what --num, --key_size and --value_size may need";
        fs_cache_size: u64 = 1_u64 << 30, "bytes of the page cache of --env=pumice (the kernel's own cache is not bounded by this)";
        format: bool = true, "format the device of --env=pumice when it holds no file system of ours; a device that holds something else is refused";
        force_format: bool = false, "format the device of --env=pumice whatever it holds; everything on it is lost";
        cluster_size: u64 = 0_u64, "cluster size in bytes when formatting; 0: the file system's default";
        spdk: String = "", "SPDK JSON configuration file that defines the block device --spdk_bdev";
        spdk_bdev: String = "", "name of the block device in the configuration of --spdk";
        spdk_cache_size: u64 = 0_u64, "page cache of --env=pumice in MiB, as SPDK's db_bench took it; 0: --fs_cache_size";
        json: String = "", "write results for machines to this file ('-': standard output, the text then goes to standard error)";
        // What to run.
        db: String = "", "directory of the database; empty: /dbbench in the file system below, for --env=kernel dbbench-UID in the temporary directory, which only its user may enter";
        wal_dir: String = "", "directory of the write-ahead log; empty: --db";
        num: i64 = 1_000_000, "number of key/values to place in the database";
        reads: i64 = -1, "number of read operations; negative: --num";
        writes: i64 = -1, "number of write operations; negative: --num";
        deletes: i64 = -1, "number of delete operations; negative: --num";
        threads: i32 = 1, "number of concurrent threads";
        duration: i32 = 0, "seconds for benchmarks with random operations; 0: --num and --reads decide";
        ops_between_duration_checks: i32 = 1000, "check the duration limit every so many operations";
        seed: i64 = 0, "seed of the random generators; 0: from the clock";
        key_size: i32 = 16, "size of each key in bytes";
        value_size: i32 = 100, "size of each value in bytes";
        value_size_distribution_type: String = "fixed", "fixed, uniform or normal (between --value_size_min and --value_size_max)";
        value_size_min: i32 = 100, "least size of a random value";
        value_size_max: i32 = 102_400, "greatest size of a random value";
        compression_ratio: f64 = 0.5, "make values that compress to this fraction of their size";
        batch_size: i64 = 1, "keys per write batch and per MultiGet";
        keys_per_prefix: i64 = 0, "average number of keys per prefix; 0: no special prefixes";
        prefix_size: i32 = 0, "bytes of the key's prefix, also set as fixed prefix extractor when not 0";
        use_existing_db: bool = false, "keep the database that is there; benchmarks that want a fresh one are skipped";
        readonly: bool = false, "open the database for reading only";
        read_random_exp_range: f64 = 0.0, "read keys by num * exp(-r), r uniform in 0..this; 0: uniform";
        multiread_stride: i64 = 0, "distance between the keys of one MultiGet; 0: random keys";
        multiread_batched: bool = false, "use the batched MultiGet";
        seek_nexts: i32 = 0, "calls of Next() after each Seek()";
        reverse_iterator: bool = false, "Prev() instead of Next() after Seek()";
        max_scan_distance: i64 = 0, "bound iterators to this many keys from the seek position; 0: no bound";
        use_tailing_iterator: bool = false, "seekrandom on one tailing iterator per thread";
        readwritepercent: i32 = 90, "reads in a hundred operations of readrandomwriterandom";
        finish_after_writes: bool = false, "the writer of readwhilewriting goes on until its writes are done";
        bgwriter_num: i64 = 0, "keys that the background writer writes over; 0: --num";
        same_value_percentage: i32 = 0, "percentage of writes whose value is always the same";
        benchmark_write_rate_limit: u64 = 0_u64, "bytes a second that writers may write; 0: no limit";
        benchmark_read_rate_limit: u64 = 0_u64, "operations a second that readers may do; 0: no limit";
        verify_checksum: bool = true, "verify checksums of every block read";
        // What to say.
        histogram: bool = false, "print a histogram of operation times";
        statistics: bool = false, "print RocksDB's statistics at the end";
        stats_interval: i64 = 0, "print a line every so many operations; 0: progress only";
        stats_interval_seconds: i64 = 0, "print that line at most every so many seconds";
        progress_reports: bool = true, "show progress on standard error";
        confidence_interval_only: bool = false, "for repeated runs print the 95% confidence interval only";
        report_interval_seconds: i64 = 0, "write operations per second as CSV to --report_file every so many seconds";
        report_file: String = "report.csv", "file for --report_interval_seconds";
        // How to write.
        sync: bool = false, "sync every write";
        disable_wal: bool = false, "write no write-ahead log";
        use_fsync: bool = false, "fsync instead of fdatasync";
        manual_wal_flush: bool = false, "buffer the write-ahead log until it is flushed by hand";
        wal_compression: String = "none", "compression of the write-ahead log: none or zstd";
        bytes_per_sync: u64 = 0_u64, "sync files in the background every so many bytes; 0: off";
        wal_bytes_per_sync: u64 = 0_u64, "the same for the write-ahead log";
        max_total_wal_size: u64 = 0_u64, "bytes of logs that force a flush; 0: RocksDB chooses";
        recycle_log_file_num: u64 = 0_u64, "old logs to keep for reuse";
        allow_concurrent_memtable_write: bool = true, "several writers update the memtable in parallel";
        enable_pipelined_write: bool = true, "pipeline log and memtable writes";
        unordered_write: bool = false, "unordered writes";
        enable_write_thread_adaptive_yield: bool = true, "writers spin briefly before they sleep";
        inplace_update_support: bool = false, "update values in the memtable in place";
        inplace_update_num_locks: u64 = 10_000_u64, "locks for in-place updates";
        // Memtables, levels, compaction.
        write_buffer_size: i64 = 64 << 20, "bytes of one memtable";
        db_write_buffer_size: i64 = 0, "bytes of all memtables; 0: no limit";
        max_write_buffer_number: i32 = 2, "memtables in memory";
        min_write_buffer_number_to_merge: i32 = 1, "memtables merged before a flush";
        max_write_buffer_size_to_maintain: i64 = 0, "bytes of flushed memtables kept in memory";
        arena_block_size: i64 = 0, "bytes of one memtable arena block; 0: RocksDB chooses";
        memtable_bloom_size_ratio: f64 = 0.0, "part of the memtable for a bloom filter";
        memtable_whole_key_filtering: bool = false, "whole keys in that filter";
        memtablerep: String = "skip_list", "skip_list, vector, prefix_hash or hash_linkedlist";
        hash_bucket_count: i64 = 1 << 20, "buckets of the hash memtables";
        max_background_jobs: i32 = 2, "concurrent flushes and compactions";
        max_background_compactions: i32 = -1, "concurrent compactions; -1: from --max_background_jobs";
        max_background_flushes: i32 = -1, "concurrent flushes; -1: from --max_background_jobs";
        num_high_pri_threads: i32 = 0, "threads of the flush pool; 0: RocksDB chooses";
        num_low_pri_threads: i32 = 0, "threads of the compaction pool; 0: RocksDB chooses";
        num_bottom_pri_threads: i32 = 0, "threads of the bottom compaction pool";
        subcompactions: u64 = 1_u64, "parts that one compaction may be split into";
        compaction_style: i32 = 0, "0 level, 1 universal, 2 FIFO";
        compaction_pri: i32 = 3, "which file to compact first (0 to 4, as RocksDB numbers them)";
        num_levels: i32 = 7, "number of levels";
        target_file_size_base: i64 = 64 << 20, "bytes of a file in level 1";
        target_file_size_multiplier: i32 = 1, "factor per level";
        max_bytes_for_level_base: u64 = 256_u64 << 20, "bytes of level 1";
        max_bytes_for_level_multiplier: f64 = 10.0, "factor per level";
        level_compaction_dynamic_level_bytes: bool = false, "dynamic level sizes";
        level0_file_num_compaction_trigger: i32 = 4, "level-0 files that start a compaction";
        level0_slowdown_writes_trigger: i32 = 20, "level-0 files that slow writes";
        level0_stop_writes_trigger: i32 = 36, "level-0 files that stop writes";
        soft_pending_compaction_bytes_limit: u64 = 64_u64 << 30, "bytes of pending compaction that slow writes";
        hard_pending_compaction_bytes_limit: u64 = 128_u64 << 30, "bytes of pending compaction that stop writes";
        delayed_write_rate: u64 = 8_388_608_u64, "bytes a second while writes are slowed";
        disable_auto_compactions: bool = false, "no automatic compactions";
        max_compaction_bytes: u64 = 0_u64, "bytes of one compaction; 0: RocksDB chooses";
        periodic_compaction_seconds: u64 = 0xffff_ffff_ffff_fffe_u64, "age that rewrites a file; the default lets RocksDB choose";
        ttl_seconds: u64 = 0xffff_ffff_ffff_fffe_u64, "options.ttl; the default lets RocksDB choose";
        optimize_filters_for_hits: bool = false, "no filters at the last level";
        rate_limiter_bytes_per_sec: u64 = 0_u64, "bytes a second of background I/O; 0: no limit";
        rate_limiter_auto_tuned: bool = false, "tune that limit";
        // Tables and caches.
        cache_size: i64 = 32 << 20, "bytes of the block cache; negative: none";
        cache_type: String = "hyper_clock_cache", "hyper_clock_cache or lru_cache";
        cache_numshardbits: i32 = -1, "shards of the cache as a power of two; negative: RocksDB chooses";
        row_cache_size: i64 = 0, "bytes of the row cache; 0: none";
        cache_index_and_filter_blocks: bool = false, "index and filter blocks in the block cache";
        pin_l0_filter_and_index_blocks_in_cache: bool = false, "pin those of level 0";
        partition_index_and_filters: bool = false, "partition index and filter blocks";
        metadata_block_size: i64 = 4096, "bytes of one partition";
        block_size: i32 = 4096, "bytes of a block";
        format_version: i32 = 7, "format version of the table files";
        block_restart_interval: i32 = 16, "keys between restart points";
        index_block_restart_interval: i32 = 1, "the same in index blocks";
        checksum_type: i32 = 4, "0 none, 1 crc32c, 2 xxhash, 3 xxhash64, 4 xxh3";
        use_data_block_hash_index: bool = false, "hash index in data blocks";
        data_block_hash_table_util_ratio: f64 = 0.75, "its utilisation";
        bloom_bits: i32 = -1, "bits per key of the filter; negative or 0: no filter";
        use_ribbon_filter: bool = false, "ribbon instead of bloom filter";
        bloom_locality: i32 = 0, "locality of bloom filter probes";
        whole_key_filtering: bool = true, "whole keys in the filter";
        open_files: i32 = -1, "files to keep open; -1: all";
        file_opening_threads: i32 = 16, "threads that open files at start";
        table_cache_numshardbits: i32 = 4, "shards of the table cache as a power of two";
        skip_stats_update_on_db_open: bool = false, "do not load table properties at open";
        compression_type: String = "snappy", "none, snappy, zlib, bzip2, lz4, lz4hc or zstd";
        compression_level: i32 = 32_767, "level; the default lets the library choose";
        compression_max_dict_bytes: i32 = 0, "bytes of a compression dictionary";
        compression_zstd_max_train_bytes: i32 = 0, "bytes of samples for a zstd dictionary";
        compression_parallel_threads: i32 = 1, "threads that compress one file";
        min_level_to_compress: i32 = -1, "first level that is compressed; negative: all";
        // Files.
        use_direct_reads: bool = false, "direct I/O for reads";
        use_direct_io_for_flush_and_compaction: bool = false, "direct I/O for flush and compaction";
        mmap_read: bool = false, "map files for reading (kernel only)";
        mmap_write: bool = false, "map files for writing (kernel only)";
        advise_random_on_open: bool = true, "advise random access when a table file is opened";
        compaction_readahead_size: u64 = 2_u64 << 20, "bytes of read-ahead in compactions";
        writable_file_max_buffer_size: i32 = 1 << 20, "bytes of RocksDB's buffer of a file that it writes";
        readahead_size: i32 = 0, "bytes of read-ahead of iterators; 0: automatic";
        async_io: bool = false, "asynchronous reads in iterators and MultiGet";
        use_adaptive_mutex: bool = false, "adaptive mutexes";
        paranoid_checks: bool = true, "paranoid checks";
        dump_malloc_stats: bool = true, "allocator statistics in LOG";
        stats_dump_period_sec: u64 = 600_u64, "seconds between statistics in LOG";
        report_bg_io_stats: bool = false, "measure I/O of flushes and compactions";
        enable_blob_files: bool = false, "values in blob files (BlobDB)";
        min_blob_size: u64 = 0_u64, "least value that goes into a blob file";
        blob_file_size: u64 = 256_u64 << 20, "bytes of a blob file";
        blob_compression_type: String = "none", "compression of blob files";
        enable_blob_garbage_collection: bool = false, "collect garbage in blob files";
        blob_garbage_collection_age_cutoff: f64 = 0.25, "part of the oldest blob files to collect";
    }
}

/// Flags of RocksDB's tool that are not here, with what to do instead.
const REFUSED: &[(&str, &str)] = &[
    (
        "env_uri",
        "the file system is chosen by --env and --device here",
    ),
    (
        "fs_uri",
        "the file system is chosen by --env and --device here",
    ),
    (
        "truth_db",
        "the benchmark verify checks what this run wrote by its seed and needs no second database",
    ),
    (
        "num_column_families",
        "db_bench of Pumice measures one column family",
    ),
    ("num_multi_db", "db_bench of Pumice measures one database"),
    (
        "merge_operator",
        "the merge benchmarks are not part of this db_bench",
    ),
    (
        "options_file",
        "give the options as flags; --flagfile=FILE reads them from a file",
    ),
];

/// Parses and checks a command line (without the program's name).
///
/// # Errors
/// The first thing that is wrong with it.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Parsed<Flags>, FlagError> {
    // A lone --json means standard output; gflags would take the next word for its value.
    let args = args.into_iter().map(|a| match a.as_str() {
        "--json" | "-json" => "--json=-".to_owned(),
        _ => a,
    });
    let parsed = gflags::parse::<Flags>(args, REFUSED)?;
    if let Parsed::Run(flags, _) = &parsed {
        flags.check()?;
    }
    Ok(parsed)
}

impl Flags {
    /// Operations of a reading benchmark.
    #[must_use]
    pub fn reads_or_num(&self) -> u64 {
        or_num(self.reads, self.num)
    }

    /// Operations of a writing benchmark. RocksDB's tool takes 0 for --num too.
    #[must_use]
    pub fn writes_or_num(&self) -> u64 {
        let writes = if self.writes == 0 { -1 } else { self.writes };
        or_num(writes, self.num)
    }

    /// Operations of a deleting benchmark.
    #[must_use]
    pub fn deletes_or_num(&self) -> u64 {
        or_num(self.deletes, self.num)
    }

    /// Operations of a benchmark that both reads and writes: the larger of the two given.
    #[must_use]
    pub fn readwrites_or_num(&self) -> u64 {
        or_num(self.reads.max(self.writes), self.num)
    }

    /// Bytes of the page cache of our file system.
    #[must_use]
    pub fn page_cache_bytes(&self) -> u64 {
        match self.spdk_cache_size {
            0 => self.fs_cache_size,
            mib => mib.saturating_mul(1 << 20),
        }
    }

    fn check(&self) -> Result<(), FlagError> {
        let fail = |name: &str, value: String, expected: &str| FlagError::Value {
            name: name.to_owned(),
            value,
            expected: expected.to_owned(),
        };
        let positive = [
            ("num", self.num),
            ("threads", i64::from(self.threads)),
            ("key_size", i64::from(self.key_size)),
            ("batch_size", self.batch_size),
            ("block_size", i64::from(self.block_size)),
            (
                "ops_between_duration_checks",
                i64::from(self.ops_between_duration_checks),
            ),
            ("num_levels", i64::from(self.num_levels)),
            ("write_buffer_size", self.write_buffer_size),
        ];
        for (name, v) in positive {
            if v <= 0 {
                return Err(fail(name, v.to_string(), "a number above 0"));
            }
        }
        if self.key_size > 1 << 20 {
            return Err(fail("key_size", self.key_size.to_string(), "at most 1 MiB"));
        }
        if !(0..=1 << 30).contains(&self.value_size) {
            return Err(fail(
                "value_size",
                self.value_size.to_string(),
                "0 to 1 GiB",
            ));
        }
        if self.value_size_min < 0 || self.value_size_max < self.value_size_min {
            return Err(fail(
                "value_size_min",
                self.value_size_min.to_string(),
                "0 to --value_size_max",
            ));
        }
        if !(0.0..=1.0).contains(&self.compression_ratio) {
            return Err(fail(
                "compression_ratio",
                self.compression_ratio.to_string(),
                "0.0 to 1.0",
            ));
        }
        if self.prefix_size < 0 || self.prefix_size > self.key_size {
            return Err(fail(
                "prefix_size",
                self.prefix_size.to_string(),
                "0 to --key_size",
            ));
        }
        if !(0..=100).contains(&self.readwritepercent) {
            return Err(fail(
                "readwritepercent",
                self.readwritepercent.to_string(),
                "0 to 100",
            ));
        }
        for (name, value, known) in [
            ("env", &self.env, &["pumice", "kernel", "mem"][..]),
            (
                "value_size_distribution_type",
                &self.value_size_distribution_type,
                &["fixed", "uniform", "normal"],
            ),
            (
                "cache_type",
                &self.cache_type,
                &["hyper_clock_cache", "lru_cache"],
            ),
            (
                "memtablerep",
                &self.memtablerep,
                &["skip_list", "vector", "prefix_hash", "hash_linkedlist"],
            ),
        ] {
            if !known.contains(&value.as_str()) {
                return Err(fail(name, value.clone(), &one_of(known)));
            }
        }
        if self.env != "pumice" && !(self.device.is_empty() && self.spdk.is_empty()) {
            let what = "no device with --env=kernel or --env=mem; leave out --env";
            return Err(fail("env", self.env.clone(), what));
        }
        if self.spdk.is_empty() != self.spdk_bdev.is_empty() {
            let what = "--spdk=config.json and --spdk_bdev=name together";
            return Err(fail("spdk", self.spdk.clone(), what));
        }
        if !self.spdk.is_empty() && !self.device.is_empty() {
            let what = "either --device or --spdk with --spdk_bdev";
            return Err(fail("device", self.device.clone(), what));
        }
        if self.disable_wal && self.sync {
            let what = "no --disable_wal with --sync: there would be no log to sync";
            return Err(fail("sync", "true".to_owned(), what));
        }
        Ok(())
    }
}

/// `a, b or c`.
#[must_use]
pub fn one_of(known: &[&str]) -> String {
    match known {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

fn or_num(given: i64, num: i64) -> u64 {
    u64::try_from(given).unwrap_or_else(|_| u64::try_from(num).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Flags, FlagError> {
        match parse(args.iter().map(|s| (*s).to_owned()))? {
            Parsed::Run(f, _) => Ok(f),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_rocksdbs_tool() {
        let f = run(&[]).unwrap();
        assert_eq!((f.num, f.key_size, f.value_size), (1_000_000, 16, 100));
        assert_eq!(f.cache_size, 33_554_432);
        assert_eq!(f.compression_type, "snappy");
        assert!(f.enable_pipelined_write && !f.level_compaction_dynamic_level_bytes);
        assert_eq!(
            (f.reads_or_num(), f.writes_or_num()),
            (1_000_000, 1_000_000)
        );
    }

    #[test]
    fn counts_fall_back_to_num() {
        let f = run(&["--num=10", "--reads=3", "--writes=0", "--deletes=5"]).unwrap();
        assert_eq!(
            (f.reads_or_num(), f.writes_or_num(), f.deletes_or_num()),
            (3, 10, 5)
        );
        assert_eq!(f.readwrites_or_num(), 3);
        assert_eq!(run(&["--num=10"]).unwrap().readwrites_or_num(), 10);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for bad in [
            "--num=0",
            "--threads=0",
            "--key_size=0",
            "--batch_size=-1",
            "--value_size=-1",
            "--compression_ratio=1.5",
            "--prefix_size=17",
            "--env=floppy",
            "--cache_type=magic",
            "--spdk=c.json",
            "--readwritepercent=101",
        ] {
            let e = run(&[bad]).unwrap_err().to_string();
            assert!(e.contains("expected"), "{bad}: {e}");
        }
        assert!(run(&["--env=mem", "--device=malloc://1G"]).is_err());
        assert!(run(&["--sync", "--disable_wal"]).is_err());
        assert!(run(&["--device=malloc://1G", "--spdk=a", "--spdk_bdev=b"]).is_err());
    }

    #[test]
    fn the_nearest_flag_is_named_and_absent_ones_explained() {
        let say = |a: &str| run(&[a]).unwrap_err().to_string();
        assert!(say("--thraeds=2").contains("did you mean --threads?"));
        assert!(say("--bloombits=10").contains("did you mean --bloom_bits?"));
        assert!(say("--fs_uri=x").contains("--device"));
    }

    #[test]
    fn json_without_a_value_is_standard_output() {
        assert_eq!(run(&["--json", "--num=2"]).unwrap().json, "-");
        assert_eq!(run(&["--json=x.json"]).unwrap().json, "x.json");
    }

    #[test]
    fn the_cache_in_spdks_unit() {
        let f = run(&["--spdk_cache_size=64"]).unwrap();
        assert_eq!(f.page_cache_bytes(), 64 << 20);
        assert_eq!(run(&[]).unwrap().page_cache_bytes(), 1 << 30);
    }
}
