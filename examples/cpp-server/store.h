// The database: keys with a value and a time to live, in RocksDB.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "rocksdb/write_batch.h"

namespace server {

// Databases that SELECT knows.
constexpr int kDatabases = 16;

struct Options {
  // Of the file system: `blobfs://…`. Empty: the kernel's.
  std::string fs_uri;
  // The database's directory in it.
  std::string path = "/db";
  // Whether a write is durable before it is acknowledged.
  bool sync = true;
  // Bytes a second that flushes and compactions write at most; 0: no limit.
  int64_t rate = 256 << 20;
  // Old logs that followers may need: how long, and how many MiB.
  uint64_t log_seconds = 3600;
  uint64_t log_mib = 1024;
};

// How far a follower has come: a leader's identity, and the sequence number of the last write of it.
struct Position {
  std::string leader;
  uint64_t sequence = 0;
};

// Conditions of SET.
enum class When { kAlways, kMissing, kPresent };

class Store {
 public:
  // Opens the database, which is made if it is missing.
  static rocksdb::Status Open(const Options& options, std::unique_ptr<Store>* store);
  ~Store();

  rocksdb::Status Get(int database, std::string_view key, std::optional<std::string>* value);
  // `expire_ms`: time since 1970, 0 for never. `*done`: whether the condition held.
  rocksdb::Status Set(int database, std::string_view key, std::string_view value,
                      uint64_t expire_ms, When when, bool* done);
  // All of them or none.
  rocksdb::Status SetMany(int database,
                          const std::vector<std::pair<std::string, std::string>>& pairs);
  rocksdb::Status Delete(int database, const std::vector<std::string>& keys, int64_t* count);
  // Adds to a number. `*result` is empty if the value is not one, or the sum does not fit.
  rocksdb::Status Add(int database, std::string_view key, int64_t by,
                      std::optional<int64_t>* result);
  // Milliseconds until the key expires; -1: never, -2: there is no such key.
  rocksdb::Status TimeLeft(int database, std::string_view key, int64_t* ms);
  // Calls `each` for keys from `from` on, in their order, until it returns false. `*next` is then that key.
  rocksdb::Status Scan(int database, std::string_view from,
                       const std::function<bool(std::string_view)>& each,
                       std::optional<std::string>* next);
  rocksdb::Status Count(int database, int64_t* count);
  // Removes every key of a database, or of all with -1.
  rocksdb::Status Clear(int database);

  // Makes a checkpoint at PATH-checkpoints/NAME, where PATH is the database's.
  rocksdb::Status Checkpoint(const std::string& name);

  // The identity of this database as a leader.
  const std::string& identity() const { return identity_; }
  rocksdb::DB* db() { return db_.get(); }
  // The family with the keys and values.
  rocksdb::ColumnFamilyHandle* data() { return families_[1]; }
  uint64_t Sequence() const { return db_->GetLatestSequenceNumber(); }
  // How often the log was made durable since the start.
  uint64_t Syncs() const;
  std::string Property(const std::string& name) const;

  rocksdb::Status Followed(Position* position);
  // Applies what a leader has written, and where that leaves this follower, in one step.
  rocksdb::Status Apply(rocksdb::WriteBatch* batch, const Position& position);

 private:
  Store() = default;
  // Reads who it is. It becomes another one if it may have lost what a follower has.
  rocksdb::Status Identify();
  rocksdb::Status Load(const std::string& key, std::string* value, uint64_t* expire_ms,
                       bool* found);
  rocksdb::Status Write(rocksdb::WriteBatch* batch);
  // Locks keys against other changes of them, in the order of the locks.
  std::vector<std::unique_lock<std::mutex>> Lock(const std::vector<std::string>& keys);

  static constexpr size_t kLocks = 256;
  std::mutex locks_[kLocks];
  std::shared_ptr<rocksdb::Env> guard_;
  std::unique_ptr<rocksdb::DB> db_;
  // Default, data, metadata.
  std::vector<rocksdb::ColumnFamilyHandle*> families_;
  rocksdb::WriteOptions write_;
  std::string identity_;
  std::string path_;
};

// Milliseconds since 1970.
uint64_t NowMs();

}  // namespace server
