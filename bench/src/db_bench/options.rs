//! RocksDB's options from the flags: the same for every file system below.

use std::fmt::{Display, Write as _};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ChecksumType, DBCompressionType,
    DataBlockIndexType, Env, LruCacheOptions, MemtableFactory, Options, SliceTransform,
};

use super::flags::{Flags, one_of};

/// Options that RocksDB refused, or a flag that no option fits.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// A flag's value has no meaning.
    #[error("--{flag}={value}: expected {expected}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// As given.
        value: String,
        /// What would have been right.
        expected: String,
    },
    /// RocksDB's own words.
    #[error("RocksDB refuses the options: {0}")]
    RocksDb(#[from] rocksdb::Error),
}

/// The options of the database in `env`. The caches in them live as long as the value, so that a
/// database that is opened again finds them warm, as with RocksDB's tool.
///
/// # Errors
/// A flag without meaning, or what RocksDB refuses.
pub fn build(f: &Flags, env: &Env) -> Result<Options, OptionsError> {
    let mut opts = Options::default().get_options_from_string(option_string(f)?)?;
    opts.create_if_missing(!f.use_existing_db && !f.readonly);
    opts.set_env(env);
    let none = compression("compression_type", "none")?;
    let chosen = compression("compression_type", &f.compression_type)?;
    opts.set_compression_type(chosen);
    opts.set_compression_options(-14, f.compression_level, 0, f.compression_max_dict_bytes);
    opts.set_compression_options_parallel_threads(f.compression_parallel_threads);
    opts.set_zstd_max_train_bytes(f.compression_zstd_max_train_bytes);
    opts.set_wal_compression_type(compression("wal_compression", &f.wal_compression)?);
    opts.set_blob_compression_type(compression(
        "blob_compression_type",
        &f.blob_compression_type,
    )?);
    if let Ok(first) = usize::try_from(f.min_level_to_compress) {
        let levels = usize::try_from(f.num_levels).unwrap_or(0);
        let per_level: Vec<_> = (0..levels)
            .map(|l| if l < first { none } else { chosen })
            .collect();
        opts.set_compression_per_level(&per_level);
    }
    if !f.wal_dir.is_empty() {
        opts.set_wal_dir(&f.wal_dir);
    }
    if let Some(prefix) = at_least_one(i64::from(f.prefix_size)) {
        opts.set_prefix_extractor(SliceTransform::create_fixed_prefix(prefix));
    }
    memtables(f, &mut opts)?;
    opts.set_block_based_table_factory(&tables(f)?);
    if let Some(bytes) = at_least_one(f.row_cache_size) {
        opts.set_row_cache(&Cache::new_lru_cache(bytes));
    }
    if f.rate_limiter_bytes_per_sec > 0 {
        let rate = i64::try_from(f.rate_limiter_bytes_per_sec).unwrap_or(i64::MAX);
        if f.rate_limiter_auto_tuned {
            opts.set_auto_tuned_ratelimiter(rate, 100_000, 10);
        } else {
            opts.set_ratelimiter(rate, 100_000, 10);
        }
    }
    if f.statistics {
        opts.enable_statistics();
    }
    Ok(opts)
}

/// What RocksDB reads from `name=value;` text: the plain numbers and switches.
fn option_string(f: &Flags) -> Result<String, OptionsError> {
    let mut text = String::new();
    let mut put = |name: &str, value: &dyn Display| {
        let _ = write!(text, "{name}={value};");
    };
    put("max_open_files", &f.open_files);
    put("max_file_opening_threads", &f.file_opening_threads);
    put("db_write_buffer_size", &f.db_write_buffer_size);
    put("write_buffer_size", &f.write_buffer_size);
    put("max_write_buffer_number", &f.max_write_buffer_number);
    put(
        "min_write_buffer_number_to_merge",
        &f.min_write_buffer_number_to_merge,
    );
    put(
        "max_write_buffer_size_to_maintain",
        &f.max_write_buffer_size_to_maintain,
    );
    put("arena_block_size", &f.arena_block_size);
    put(
        "memtable_prefix_bloom_size_ratio",
        &f.memtable_bloom_size_ratio,
    );
    put(
        "memtable_whole_key_filtering",
        &f.memtable_whole_key_filtering,
    );
    put("bloom_locality", &f.bloom_locality);
    put("max_background_jobs", &f.max_background_jobs);
    put("max_background_compactions", &f.max_background_compactions);
    put("max_background_flushes", &f.max_background_flushes);
    put("max_subcompactions", &f.subcompactions);
    let style = ["level", "universal", "FIFO"];
    let names = [
        "kCompactionStyleLevel",
        "kCompactionStyleUniversal",
        "kCompactionStyleFIFO",
    ];
    put(
        "compaction_style",
        &pick("compaction_style", f.compaction_style, &names, &style)?,
    );
    let pri = [
        "kByCompensatedSize",
        "kOldestLargestSeqFirst",
        "kOldestSmallestSeqFirst",
        "kMinOverlappingRatio",
        "kRoundRobin",
    ];
    put(
        "compaction_pri",
        &pick("compaction_pri", f.compaction_pri, &pri, &pri)?,
    );
    put("num_levels", &f.num_levels);
    put("target_file_size_base", &f.target_file_size_base);
    put(
        "target_file_size_multiplier",
        &f.target_file_size_multiplier,
    );
    put("max_bytes_for_level_base", &f.max_bytes_for_level_base);
    put(
        "max_bytes_for_level_multiplier",
        &f.max_bytes_for_level_multiplier,
    );
    put(
        "level_compaction_dynamic_level_bytes",
        &f.level_compaction_dynamic_level_bytes,
    );
    put(
        "level0_file_num_compaction_trigger",
        &f.level0_file_num_compaction_trigger,
    );
    put(
        "level0_slowdown_writes_trigger",
        &f.level0_slowdown_writes_trigger,
    );
    put("level0_stop_writes_trigger", &f.level0_stop_writes_trigger);
    put(
        "soft_pending_compaction_bytes_limit",
        &f.soft_pending_compaction_bytes_limit,
    );
    put(
        "hard_pending_compaction_bytes_limit",
        &f.hard_pending_compaction_bytes_limit,
    );
    put("delayed_write_rate", &f.delayed_write_rate);
    put("disable_auto_compactions", &f.disable_auto_compactions);
    put("max_compaction_bytes", &f.max_compaction_bytes);
    put(
        "periodic_compaction_seconds",
        &f.periodic_compaction_seconds,
    );
    put("ttl", &f.ttl_seconds);
    put("optimize_filters_for_hits", &f.optimize_filters_for_hits);
    put(
        "allow_concurrent_memtable_write",
        &f.allow_concurrent_memtable_write,
    );
    put("enable_pipelined_write", &f.enable_pipelined_write);
    put("unordered_write", &f.unordered_write);
    put(
        "enable_write_thread_adaptive_yield",
        &f.enable_write_thread_adaptive_yield,
    );
    put("inplace_update_support", &f.inplace_update_support);
    put("inplace_update_num_locks", &f.inplace_update_num_locks);
    put("use_fsync", &f.use_fsync);
    put("manual_wal_flush", &f.manual_wal_flush);
    put("bytes_per_sync", &f.bytes_per_sync);
    put("wal_bytes_per_sync", &f.wal_bytes_per_sync);
    put("max_total_wal_size", &f.max_total_wal_size);
    put("recycle_log_file_num", &f.recycle_log_file_num);
    put("use_direct_reads", &f.use_direct_reads);
    put(
        "use_direct_io_for_flush_and_compaction",
        &f.use_direct_io_for_flush_and_compaction,
    );
    put("allow_mmap_reads", &f.mmap_read);
    put("allow_mmap_writes", &f.mmap_write);
    put("advise_random_on_open", &f.advise_random_on_open);
    put("compaction_readahead_size", &f.compaction_readahead_size);
    put(
        "writable_file_max_buffer_size",
        &f.writable_file_max_buffer_size,
    );
    put("use_adaptive_mutex", &f.use_adaptive_mutex);
    put("paranoid_checks", &f.paranoid_checks);
    put("dump_malloc_stats", &f.dump_malloc_stats);
    put("stats_dump_period_sec", &f.stats_dump_period_sec);
    put("report_bg_io_stats", &f.report_bg_io_stats);
    put("table_cache_numshardbits", &f.table_cache_numshardbits);
    put(
        "skip_stats_update_on_db_open",
        &f.skip_stats_update_on_db_open,
    );
    put("enable_blob_files", &f.enable_blob_files);
    put("min_blob_size", &f.min_blob_size);
    put("blob_file_size", &f.blob_file_size);
    put(
        "enable_blob_garbage_collection",
        &f.enable_blob_garbage_collection,
    );
    put(
        "blob_garbage_collection_age_cutoff",
        &f.blob_garbage_collection_age_cutoff,
    );
    Ok(text)
}

fn memtables(f: &Flags, opts: &mut Options) -> Result<(), OptionsError> {
    let bucket_count = at_least_one(f.hash_bucket_count).unwrap_or(1);
    let factory = match f.memtablerep.as_str() {
        "vector" => MemtableFactory::Vector,
        "prefix_hash" => MemtableFactory::HashSkipList {
            bucket_count,
            height: 4,
            branching_factor: 4,
        },
        "hash_linkedlist" => MemtableFactory::HashLinkList { bucket_count },
        _ => return Ok(()),
    };
    let hashed = !matches!(factory, MemtableFactory::Vector);
    if hashed && f.prefix_size == 0 {
        return Err(OptionsError::Value {
            flag: "memtablerep",
            value: f.memtablerep.clone(),
            expected: "a --prefix_size with it".to_owned(),
        });
    }
    opts.set_memtable_factory(factory);
    // Only the skip list takes concurrent inserts.
    opts.set_allow_concurrent_memtable_write(false);
    Ok(())
}

fn tables(f: &Flags) -> Result<BlockBasedOptions, OptionsError> {
    let mut t = BlockBasedOptions::default();
    match block_cache(f) {
        Some(cache) => t.set_block_cache(&cache),
        None => t.disable_cache(),
    }
    t.set_block_size(at_least_one(i64::from(f.block_size)).unwrap_or(4096));
    t.set_format_version(f.format_version);
    t.set_block_restart_interval(f.block_restart_interval);
    t.set_index_block_restart_interval(f.index_block_restart_interval);
    t.set_cache_index_and_filter_blocks(f.cache_index_and_filter_blocks);
    t.set_pin_l0_filter_and_index_blocks_in_cache(f.pin_l0_filter_and_index_blocks_in_cache);
    if f.partition_index_and_filters {
        t.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
        t.set_partition_filters(true);
    }
    t.set_metadata_block_size(at_least_one(f.metadata_block_size).unwrap_or(4096));
    t.set_whole_key_filtering(f.whole_key_filtering);
    t.set_checksum_type(match f.checksum_type {
        0 => ChecksumType::NoChecksum,
        1 => ChecksumType::CRC32c,
        2 => ChecksumType::XXHash,
        3 => ChecksumType::XXHash64,
        4 => ChecksumType::XXH3,
        other => {
            return Err(OptionsError::Value {
                flag: "checksum_type",
                value: other.to_string(),
                expected: "0 to 4".to_owned(),
            });
        }
    });
    if f.use_data_block_hash_index {
        t.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
        t.set_data_block_hash_ratio(f.data_block_hash_table_util_ratio);
    }
    if f.bloom_bits > 0 {
        if f.use_ribbon_filter {
            t.set_ribbon_filter(f64::from(f.bloom_bits));
        } else {
            t.set_bloom_filter(f64::from(f.bloom_bits), false);
        }
    }
    Ok(t)
}

fn block_cache(f: &Flags) -> Option<Cache> {
    let bytes = usize::try_from(f.cache_size).ok()?;
    if f.cache_type == "lru_cache" || bytes == 0 {
        let mut lru = LruCacheOptions::default();
        lru.set_capacity(bytes);
        if f.cache_numshardbits >= 0 {
            lru.set_num_shard_bits(f.cache_numshardbits);
        }
        return Some(Cache::new_lru_cache_opts(&lru));
    }
    Some(Cache::new_hyper_clock_cache(bytes, 0))
}

/// The compression that a flag names.
///
/// # Errors
/// Names those that there are.
pub fn compression(flag: &'static str, name: &str) -> Result<DBCompressionType, OptionsError> {
    use DBCompressionType as C;
    let known = [
        ("none", C::None),
        ("snappy", C::Snappy),
        ("zlib", C::Zlib),
        ("bzip2", C::Bz2),
        ("lz4", C::Lz4),
        ("lz4hc", C::Lz4hc),
        ("zstd", C::Zstd),
    ];
    let lower = name.to_ascii_lowercase();
    known
        .iter()
        .find(|(n, _)| *n == lower)
        .map(|(_, c)| *c)
        .ok_or_else(|| OptionsError::Value {
            flag,
            value: name.to_owned(),
            expected: one_of(&known.map(|(n, _)| n)),
        })
}

fn pick(
    flag: &'static str,
    index: i32,
    names: &[&'static str],
    words: &[&str],
) -> Result<&'static str, OptionsError> {
    usize::try_from(index)
        .ok()
        .and_then(|i| names.get(i))
        .copied()
        .ok_or_else(|| OptionsError::Value {
            flag,
            value: index.to_string(),
            expected: format!("0 to {} ({})", names.len() - 1, words.join(", ")),
        })
}

fn at_least_one(n: i64) -> Option<usize> {
    usize::try_from(n).ok().filter(|n| *n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_name_is_one_that_rocksdb_knows() {
        let env = Env::mem_env().unwrap();
        build(&Flags::default(), &env).unwrap();
    }

    #[test]
    fn flags_without_meaning_are_named() {
        let env = Env::mem_env().unwrap();
        let say = |f: Flags| build(&f, &env).err().expect("refused").to_string();
        let d = Flags::default;
        let bad = Flags {
            compression_type: "rar".into(),
            ..d()
        };
        assert!(say(bad).contains("none, snappy, zlib, bzip2, lz4, lz4hc or zstd"));
        assert!(
            say(Flags {
                compaction_style: 9,
                ..d()
            })
            .contains("--compaction_style=9")
        );
        assert!(
            say(Flags {
                checksum_type: 7,
                ..d()
            })
            .contains("0 to 4")
        );
        let bad = Flags {
            memtablerep: "prefix_hash".into(),
            ..d()
        };
        assert!(say(bad).contains("--prefix_size"));
    }

    #[test]
    fn unusual_choices_are_taken() {
        let env = Env::mem_env().unwrap();
        let f = Flags {
            cache_size: -1,
            bloom_bits: 10,
            use_ribbon_filter: true,
            partition_index_and_filters: true,
            min_level_to_compress: 2,
            compression_type: "zstd".into(),
            compaction_style: 1,
            statistics: true,
            row_cache_size: 1 << 20,
            rate_limiter_bytes_per_sec: 1 << 20,
            prefix_size: 8,
            memtablerep: "hash_linkedlist".into(),
            use_data_block_hash_index: true,
            ..Flags::default()
        };
        assert!(build(&f, &env).unwrap().get_statistics().is_some());
    }
}
