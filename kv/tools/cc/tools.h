// The functions that Rust calls (src/ffi.rs). An environment is a `rocksdb::Env*`, or null for RocksDB's default. No function throws.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Called for each flag of db_bench. The texts are valid during the call.
typedef void (*pumice_flag_fn)(void* arg, const char* name, const char* type, const char* value,
                               const char* help);
// Called with a piece of what db_bench prints on standard output.
typedef void (*pumice_said_fn)(void* arg, const char* text, size_t len);

void pumice_db_bench_flags(pumice_flag_fn each, void* arg);
// Returns 0, or 1 for an unknown flag or an invalid value.
int pumice_db_bench_set(const char* name, const char* value);
// Runs with the flags that were set. Returns the exit code. A fatal error of db_bench ends the process.
int pumice_db_bench_run(void* env, pumice_said_fn said, void* arg);
// Reads every key of the run's databases. Returns 0, or 1 with a text in `error`.
int pumice_db_bench_verify(uint64_t* keys, char* error, size_t error_len);

// Returns the version of the RocksDB that is linked, a static text.
const char* pumice_rocksdb_version();

// Returns a new environment in memory, which lives as long as the process.
void* pumice_memory_env();

int pumice_ldb(void* env, int argc, char** argv);
int pumice_sst_dump(void* env, int argc, char** argv);

}  // extern "C"
