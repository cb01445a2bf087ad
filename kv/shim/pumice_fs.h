// The boundary between the C++ shim and the Rust file system: one table of plain C functions over
// opaque handles. Rust fills the table (kv/src/plugin/ffi.rs) and mirrors these structs field for
// field; a change here is a change there.
//
// Conventions. A function that can fail answers a count or zero when it succeeded, and a negative
// errno when it did not; `last_fault` then tells the rest, on the same thread, until the next call
// there. No function throws or unwinds. Paths and data are (pointer, length) pairs, not
// NUL-terminated, and are only borrowed for the call, except where a handle says it keeps them.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// What is known of a failure beyond its errno.
struct pumice_fault {
  int32_t err;        // positive errno
  uint32_t flags;     // PUMICE_RETRYABLE, PUMICE_DATA_LOSS
  const char* text;   // UTF-8, for people
  size_t text_len;
};
constexpr uint32_t PUMICE_RETRYABLE = 1;
constexpr uint32_t PUMICE_DATA_LOSS = 2;

// One read of a batch. `buf` null: the file system gives memory of its own (`data`, kept alive by
// `pin` until `pin_release`). `got`: bytes read, or a negative errno with `fault` to be released.
struct pumice_read {
  uint64_t offset;
  size_t len;
  uint8_t* buf;
  const uint8_t* data;
  int64_t got;
  void* pin;
  void* fault;
};

struct pumice_stat {
  uint64_t len;
  uint64_t mtime_s;  // seconds since 1970
  uint64_t file_id;  // the same for all names of one file, on one mount
  uint32_t links;
  uint32_t is_dir;
};

// How `open` opens.
constexpr uint32_t PUMICE_OPEN_CREATE = 1;    // make it if there is none
constexpr uint32_t PUMICE_OPEN_FRESH = 2;     // a new, empty inode under this name
constexpr uint32_t PUMICE_OPEN_DIRECT = 4;    // past the page cache

// Access patterns for `advise`.
constexpr uint32_t PUMICE_ACCESS_NORMAL = 0;
constexpr uint32_t PUMICE_ACCESS_RANDOM = 1;
constexpr uint32_t PUMICE_ACCESS_SEQUENTIAL = 2;
constexpr uint32_t PUMICE_ACCESS_WILL_NEED = 3;
constexpr uint32_t PUMICE_ACCESS_WONT_NEED = 4;

// What the file system can do; the shim turns these into RocksDB's FSSupportedOps.
constexpr uint32_t PUMICE_CAN_ASYNC = 1;
constexpr uint32_t PUMICE_CAN_PIN = 2;
constexpr uint32_t PUMICE_CAN_PREFETCH = 4;
constexpr uint32_t PUMICE_CAN_REREAD = 8;

typedef void (*pumice_name_fn)(void* arg, const char* name, size_t len, uint64_t file_len,
                               uint32_t is_dir);

struct pumice_fs_ops {
  // The file system. Every function may be called from any thread.
  void (*fs_release)(const void* fs);
  void (*last_fault)(struct pumice_fault* out);
  uint32_t (*abilities)(const void* fs);
  size_t (*alignment)(const void* fs);
  int64_t (*open)(const void* fs, const char* path, size_t len, uint32_t how, const void** file);
  int64_t (*remove)(const void* fs, const char* path, size_t len);
  int64_t (*rename)(const void* fs, const char* from, size_t from_len, const char* to,
                    size_t to_len);
  int64_t (*link)(const void* fs, const char* from, size_t from_len, const char* to,
                  size_t to_len);
  int64_t (*stat)(const void* fs, const char* path, size_t len, struct pumice_stat* out);
  int64_t (*mkdir)(const void* fs, const char* path, size_t len);
  int64_t (*make_dirs)(const void* fs, const char* path, size_t len);  // and those above; may exist
  int64_t (*rmdir)(const void* fs, const char* path, size_t len);
  int64_t (*list)(const void* fs, const char* path, size_t len, pumice_name_fn each, void* arg);
  int64_t (*sync_dir)(const void* fs, const char* path, size_t len);
  int64_t (*lock)(const void* fs, const char* path, size_t len, void** lock);
  void (*unlock)(void* lock);
  int64_t (*free_bytes)(const void* fs, uint64_t* out);

  // A file. Any thread, also at once; the handle keeps the inode alive.
  void (*file_release)(const void* file);
  uint64_t (*file_len)(const void* file);
  uint64_t (*file_id)(const void* file);
  int64_t (*append)(const void* file, const char* data, size_t len);
  int64_t (*write_at)(const void* file, uint64_t offset, const char* data, size_t len);
  int64_t (*read_at)(const void* file, uint64_t offset, char* buf, size_t len);
  int64_t (*read_many)(const void* file, struct pumice_read* reads, size_t count);
  int64_t (*truncate)(const void* file, uint64_t len);
  int64_t (*allocate)(const void* file, uint64_t offset, uint64_t len);
  int64_t (*finish)(const void* file);  // the writer closes: nobody is going to append
  int64_t (*sync)(const void* file);
  int64_t (*range_sync)(const void* file, uint64_t offset, uint64_t len);
  int64_t (*prefetch)(const void* file, uint64_t offset, uint64_t len);
  int64_t (*invalidate)(const void* file, uint64_t offset, uint64_t len);
  void (*advise)(const void* file, uint32_t access);

  // Memory handed out by `read_many`, and faults inside its answers.
  void (*pin_release)(void* pin);
  void (*fault_take)(void* fault);  // becomes this thread's last fault

  // Reads under way. `read_start` answers 1 when the data is there already.
  int64_t (*read_start)(const void* file, uint64_t offset, size_t len, void** pending);
  int64_t (*read_finish)(void* pending, char* buf, size_t len);  // waits; releases
  void (*read_cancel)(void* pending);                            // waits if it must; releases
};

// Given by C++ to Rust.

// A `rocksdb::Env*` over the file system; takes ownership of `fs`. Null: out of memory.
void* pumice_env_new(const struct pumice_fs_ops* ops, const void* fs, uint32_t forbid);

// That environment as an rocksdb_env_t, which owns it from then on. Null: out of memory.
void* pumice_env_wrap(void* env);

// Mounts what a URI names: answers 0 and a table and handle, or a negative errno with a last fault.
typedef int64_t (*pumice_mount_fn)(const char* uri, size_t len,
                                   const struct pumice_fs_ops** ops, const void** fs,
                                   void (**last_fault)(struct pumice_fault*));

// Makes `blobfs://…` known to RocksDB's object registry, for `--fs_uri` of its tools. Once.
void pumice_register_uri(pumice_mount_fn mount);

// RocksDB's own answer to opening `uri` through the registry, for tests: null, or an rocksdb_env_t.
void* pumice_env_from_uri(const char* uri, size_t len, char* error, size_t error_len);

}  // extern "C"
