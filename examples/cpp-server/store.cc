#include "store.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <set>

#include "resp.h"
#include "rocksdb/compaction_filter.h"
#include "rocksdb/convenience.h"
#include "rocksdb/rate_limiter.h"
#include "rocksdb/statistics.h"
#include "rocksdb/utilities/checkpoint.h"
#include "rocksdb/version.h"

namespace server {

namespace {

using rocksdb::Slice;
using rocksdb::Status;

// A value in the database: a version, the time at which it expires (big endian), and the bytes.
constexpr char kVersion = 1;
constexpr size_t kHead = 9;

std::string Encode(std::string_view value, uint64_t expire_ms) {
  std::string record(1, kVersion);
  for (int shift = 56; shift >= 0; shift -= 8) {
    record.push_back(static_cast<char>(expire_ms >> shift));
  }
  record.append(value);
  return record;
}

bool Decode(const Slice& record, uint64_t* expire_ms) {
  if (record.size() < kHead || record[0] != kVersion) {
    return false;
  }
  *expire_ms = 0;
  for (size_t i = 1; i < kHead; i++) {
    *expire_ms = *expire_ms << 8 | static_cast<unsigned char>(record[i]);
  }
  return true;
}

bool Expired(uint64_t expire_ms) { return expire_ms != 0 && expire_ms <= NowMs(); }

std::string KeyOf(int database, std::string_view key) {
  std::string full(1, static_cast<char>(database));
  return full.append(key);
}

// Drops what has expired.
class ExpiryFilter final : public rocksdb::CompactionFilter {
 public:
  const char* Name() const override { return "cpp-server.expiry"; }
  bool Filter(int, const Slice&, const Slice& record, std::string*, bool*) const override {
    uint64_t expire_ms = 0;
    return Decode(record, &expire_ms) && Expired(expire_ms);
  }
};

rocksdb::ColumnFamilyOptions DataOptions() {
  static const ExpiryFilter filter;
  rocksdb::ColumnFamilyOptions options;
  options.compaction_filter = &filter;
  options.level_compaction_dynamic_level_bytes = true;
  // Large values are written once, beside the tree.
  options.enable_blob_files = true;
  options.min_blob_size = 4096;
  options.enable_blob_garbage_collection = true;
  return options;
}

rocksdb::DBOptions DatabaseOptions(const Options& options, rocksdb::Env* env) {
  rocksdb::DBOptions database;
  database.env = env;
  database.create_if_missing = true;
  database.create_missing_column_families = true;
  database.max_background_jobs = 4;
  database.max_subcompactions = 2;
  database.statistics = rocksdb::CreateDBStatistics();
  database.statistics->set_stats_level(rocksdb::StatsLevel::kExceptHistogramOrTimers);
  if (options.rate > 0) {
    database.rate_limiter.reset(rocksdb::NewGenericRateLimiter(options.rate));
  }
  // Followers read what is in the logs.
  database.WAL_ttl_seconds = options.log_seconds;
  database.WAL_size_limit_MB = options.log_mib;
  return database;
}

Status OpenDatabase(const rocksdb::DBOptions& options, const std::string& path,
                    const std::vector<rocksdb::ColumnFamilyDescriptor>& families,
                    std::vector<rocksdb::ColumnFamilyHandle*>* handles,
                    std::unique_ptr<rocksdb::DB>* db) {
#if ROCKSDB_MAJOR >= 11
  return rocksdb::DB::Open(options, path, families, handles, db);
#else
  rocksdb::DB* opened = nullptr;
  Status s = rocksdb::DB::Open(options, path, families, handles, &opened);
  db->reset(opened);
  return s;
#endif
}

constexpr char kIdentity[] = "identity";
constexpr char kFollowed[] = "followed";
// Is there while a server runs that does not sync: after a power cut it may have lost what followers have.
constexpr char kUnsynced[] = "unsynced";

}  // namespace

uint64_t NowMs() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
}

Status Store::Open(const Options& options, std::unique_ptr<Store>* store) {
  std::unique_ptr<Store> made(new Store());
  rocksdb::Env* env = rocksdb::Env::Default();
  if (!options.fs_uri.empty()) {
    Status s = rocksdb::Env::CreateFromUri(rocksdb::ConfigOptions(), "", options.fs_uri, &env,
                                           &made->guard_);
    if (!s.ok()) {
      return s;
    }
  }
  const rocksdb::ColumnFamilyOptions data = DataOptions();
  const std::vector<rocksdb::ColumnFamilyDescriptor> families = {
      {rocksdb::kDefaultColumnFamilyName, rocksdb::ColumnFamilyOptions()},
      {"data", data},
      {"metadata", rocksdb::ColumnFamilyOptions()}};
  Status s = OpenDatabase(DatabaseOptions(options, env), options.path, families, &made->families_,
                          &made->db_);
  if (!s.ok()) {
    return s;
  }
  made->write_.sync = options.sync;
  made->path_ = options.path;
  s = made->Identify();
  if (s.ok()) {
    *store = std::move(made);
  }
  return s;
}

Store::~Store() {
  if (db_ != nullptr) {
    if (!write_.sync && db_->SyncWAL().ok()) {
      rocksdb::WriteOptions durably;
      durably.sync = true;
      db_->Delete(durably, families_[2], kUnsynced).PermitUncheckedError();
    }
    for (rocksdb::ColumnFamilyHandle* family : families_) {
      db_->DestroyColumnFamilyHandle(family);
    }
    db_->Close().PermitUncheckedError();
    db_.reset();
  }
}

Status Store::Identify() {
  std::string unsynced;
  Status s = db_->Get({}, families_[2], kUnsynced, &unsynced);
  if (!s.ok() && !s.IsNotFound()) {
    return s;
  }
  const bool certain = s.IsNotFound();
  s = db_->Get({}, families_[2], kIdentity, &identity_);
  if (!s.ok() && !s.IsNotFound()) {
    return s;
  }
  rocksdb::WriteBatch batch;
  if (s.IsNotFound() || !certain) {
    identity_.clear();
    std::random_device random;
    for (int i = 0; i < 5; i++) {
      char word[16];
      std::snprintf(word, sizeof word, "%08x", static_cast<unsigned>(random()));
      identity_ += word;
    }
    batch.Put(families_[2], kIdentity, identity_);
  }
  if (!write_.sync) {
    batch.Put(families_[2], kUnsynced, "1");
  } else if (!certain) {
    batch.Delete(families_[2], kUnsynced);
  }
  rocksdb::WriteOptions durably;
  durably.sync = true;
  return batch.Count() == 0 ? Status::OK() : db_->Write(durably, &batch);
}

Status Store::Write(rocksdb::WriteBatch* batch) { return db_->Write(write_, batch); }

std::vector<std::unique_lock<std::mutex>> Store::Lock(const std::vector<std::string>& keys) {
  std::set<size_t> which;
  for (const std::string& key : keys) {
    which.insert(std::hash<std::string>()(key) % kLocks);
  }
  std::vector<std::unique_lock<std::mutex>> held;
  for (const size_t lock : which) {
    held.emplace_back(locks_[lock]);
  }
  return held;
}

Status Store::Load(const std::string& key, std::string* value, uint64_t* expire_ms, bool* found) {
  *found = false;
  rocksdb::PinnableSlice record;
  Status s = db_->Get({}, families_[1], key, &record);
  if (s.IsNotFound()) {
    return Status::OK();
  }
  if (!s.ok()) {
    return s;
  }
  if (!Decode(record, expire_ms)) {
    return Status::Corruption("a value has a form that this version does not know");
  }
  *found = !Expired(*expire_ms);
  value->assign(record.data() + kHead, record.size() - kHead);
  return s;
}

Status Store::Get(int database, std::string_view key, std::optional<std::string>* value) {
  std::string bytes;
  uint64_t expire_ms = 0;
  bool found = false;
  Status s = Load(KeyOf(database, key), &bytes, &expire_ms, &found);
  value->reset();
  if (s.ok() && found) {
    *value = std::move(bytes);
  }
  return s;
}

Status Store::Set(int database, std::string_view key, std::string_view value, uint64_t expire_ms,
                  When when, bool* done) {
  const std::string full = KeyOf(database, key);
  const auto locks = Lock({full});
  *done = false;
  if (when != When::kAlways) {
    std::string old;
    uint64_t old_expire = 0;
    bool found = false;
    Status s = Load(full, &old, &old_expire, &found);
    if (!s.ok() || found != (when == When::kPresent)) {
      return s;
    }
  }
  rocksdb::WriteBatch batch;
  batch.Put(families_[1], full, Encode(value, expire_ms));
  Status s = Write(&batch);
  *done = s.ok();
  return s;
}

Status Store::SetMany(int database,
                      const std::vector<std::pair<std::string, std::string>>& pairs) {
  std::vector<std::string> keys;
  rocksdb::WriteBatch batch;
  for (const auto& [key, value] : pairs) {
    keys.push_back(KeyOf(database, key));
    batch.Put(families_[1], keys.back(), Encode(value, 0));
  }
  const auto locks = Lock(keys);
  return Write(&batch);
}

Status Store::Delete(int database, const std::vector<std::string>& keys, int64_t* count) {
  std::vector<std::string> full;
  for (const std::string& key : keys) {
    full.push_back(KeyOf(database, key));
  }
  const auto locks = Lock(full);
  // A key that is named twice is deleted once.
  std::sort(full.begin(), full.end());
  full.erase(std::unique(full.begin(), full.end()), full.end());
  rocksdb::WriteBatch batch;
  *count = 0;
  for (const std::string& key : full) {
    std::string value;
    uint64_t expire_ms = 0;
    bool found = false;
    Status s = Load(key, &value, &expire_ms, &found);
    if (!s.ok()) {
      return s;
    }
    if (found) {
      batch.Delete(families_[1], key);
      ++*count;
    }
  }
  return *count == 0 ? Status::OK() : Write(&batch);
}

Status Store::Add(int database, std::string_view key, int64_t by, std::optional<int64_t>* result) {
  const std::string full = KeyOf(database, key);
  const auto locks = Lock({full});
  result->reset();
  std::string value;
  uint64_t expire_ms = 0;
  bool found = false;
  Status s = Load(full, &value, &expire_ms, &found);
  if (!s.ok()) {
    return s;
  }
  int64_t sum = 0;
  if ((found && !ParseInteger(value, &sum)) || __builtin_add_overflow(sum, by, &sum)) {
    return s;
  }
  rocksdb::WriteBatch batch;
  batch.Put(families_[1], full, Encode(std::to_string(sum), found ? expire_ms : 0));
  s = Write(&batch);
  if (s.ok()) {
    *result = sum;
  }
  return s;
}

Status Store::TimeLeft(int database, std::string_view key, int64_t* ms) {
  std::string value;
  uint64_t expire_ms = 0;
  bool found = false;
  Status s = Load(KeyOf(database, key), &value, &expire_ms, &found);
  const uint64_t now = NowMs();
  *ms = !found ? -2 : expire_ms == 0 ? -1 : static_cast<int64_t>(std::max(expire_ms, now) - now);
  return s;
}

Status Store::Scan(int database, std::string_view from,
                   const std::function<bool(std::string_view)>& each,
                   std::optional<std::string>* next) {
  next->reset();
  const std::string end(1, static_cast<char>(database + 1));
  const Slice bound(end);
  rocksdb::ReadOptions options;
  options.iterate_upper_bound = &bound;
  std::unique_ptr<rocksdb::Iterator> at(db_->NewIterator(options, families_[1]));
  for (at->Seek(KeyOf(database, from)); at->Valid(); at->Next()) {
    uint64_t expire_ms = 0;
    if (!Decode(at->value(), &expire_ms)) {
      return Status::Corruption("a value has a form that this version does not know");
    }
    if (Expired(expire_ms)) {
      continue;
    }
    const std::string_view key = at->key().ToStringView().substr(1);
    if (!each(key)) {
      *next = std::string(key);
      break;
    }
  }
  return at->status();
}

Status Store::Count(int database, int64_t* count) {
  *count = 0;
  std::optional<std::string> next;
  return Scan(
      database, "",
      [count](std::string_view) {
        ++*count;
        return true;
      },
      &next);
}

Status Store::Clear(int database) {
  std::vector<std::unique_lock<std::mutex>> held;
  for (std::mutex& lock : locks_) {
    held.emplace_back(lock);
  }
  const int first = database < 0 ? 0 : database;
  const int last = database < 0 ? kDatabases : database + 1;
  rocksdb::WriteBatch batch;
  batch.DeleteRange(families_[1], std::string(1, static_cast<char>(first)),
                    std::string(1, static_cast<char>(last)));
  return Write(&batch);
}

Status Store::Checkpoint(const std::string& name) {
  Status s = db_->GetEnv()->CreateDirIfMissing(path_ + "-checkpoints");
  if (!s.ok()) {
    return s;
  }
  rocksdb::Checkpoint* made = nullptr;
  s = rocksdb::Checkpoint::Create(db_.get(), &made);
  const std::unique_ptr<rocksdb::Checkpoint> checkpoint(made);
  return s.ok() ? checkpoint->CreateCheckpoint(path_ + "-checkpoints/" + name) : s;
}

std::string Store::Property(const std::string& name) const {
  std::string value;
  return db_->GetProperty(families_[1], name, &value) ? value : "0";
}

uint64_t Store::Syncs() const {
  return db_->GetDBOptions().statistics->getTickerCount(rocksdb::WAL_FILE_SYNCED);
}

Status Store::Followed(Position* position) {
  std::string text;
  Status s = db_->Get({}, families_[2], kFollowed, &text);
  if (s.IsNotFound()) {
    *position = Position();
    return Status::OK();
  }
  const size_t space = text.find(' ');
  int64_t sequence = 0;
  if (s.ok() &&
      (space == std::string::npos || !ParseInteger(std::string_view(text).substr(space + 1), &sequence))) {
    return Status::Corruption("the position of this follower has a form that this version does not know");
  }
  if (s.ok()) {
    position->leader = text.substr(0, space);
    position->sequence = static_cast<uint64_t>(sequence);
  }
  return s;
}

Status Store::Apply(rocksdb::WriteBatch* batch, const Position& position) {
  batch->Put(families_[2], kFollowed, position.leader + " " + std::to_string(position.sequence));
  return Write(batch);
}

}  // namespace server
