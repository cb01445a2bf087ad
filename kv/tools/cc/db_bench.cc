// RocksDB's db_bench as functions: its flags one by one, a run on a given environment, and a check of every key afterwards.

// The library has a function of this name too (build_version.cc).
#define RocksDbIOUringEnable DbBenchIOUringEnable
// The source is included so that its file-static environment can be set. The only other way is a URI.
#include "tools/db_bench_tool.cc"

#include "rocksdb/utilities/options_util.h"
#include "tools.h"

#include <algorithm>
#include <cstring>
#include <exception>

DEFINE_uint64(recycle_log_file_num, rocksdb::Options().recycle_log_file_num,
              "Number of retired write-ahead logs that are kept and overwritten by the next ones"
              " (Options::recycle_log_file_num). Applies to databases opened for writing, and also with --options_file.");

namespace {

using rocksdb::ColumnFamilyDescriptor;
using rocksdb::ColumnFamilyHandle;
using rocksdb::DB;
using rocksdb::Status;

// A stdio stream calls this with its output, which goes to the listener of a run.
struct Listener {
  pumice_said_fn said;
  void* arg;
};

ssize_t Say(void* cookie, const char* text, size_t len) {
  auto* listener = static_cast<Listener*>(cookie);
  listener->said(listener->arg, text, len);
  return static_cast<ssize_t>(len);
}

// Sets the options for which the tool has no flag, where a database is opened for writing.
class Hooks final : public rocksdb::DefaultHooks {
 public:
  // The methods for other kinds of databases stay as they are.
  using rocksdb::DefaultHooks::Open;

  Status Open(const rocksdb::Options& options, const std::string& name, std::unique_ptr<DB>* db) override {
    return DefaultHooks::Open(With(options), name, db);
  }
  Status Open(const rocksdb::DBOptions& options, const std::string& name,
              const std::vector<ColumnFamilyDescriptor>& families, std::vector<ColumnFamilyHandle*>* handles,
              std::unique_ptr<DB>* db) override {
    return DefaultHooks::Open(With(options), name, families, handles, db);
  }
  Status OpenTransactionDB(const rocksdb::Options& options, const rocksdb::TransactionDBOptions& how,
                           const std::string& name, rocksdb::TransactionDB** db) override {
    return DefaultHooks::OpenTransactionDB(With(options), how, name, db);
  }
  Status OpenTransactionDB(const rocksdb::DBOptions& options, const rocksdb::TransactionDBOptions& how,
                           const std::string& name, const std::vector<ColumnFamilyDescriptor>& families,
                           std::vector<ColumnFamilyHandle*>* handles, rocksdb::TransactionDB** db) override {
    return DefaultHooks::OpenTransactionDB(With(options), how, name, families, handles, db);
  }
  Status OpenOptimisticTransactionDB(const rocksdb::Options& options, const std::string& name,
                                     rocksdb::OptimisticTransactionDB** db) override {
    return DefaultHooks::OpenOptimisticTransactionDB(With(options), name, db);
  }
  Status OpenOptimisticTransactionDB(const rocksdb::DBOptions& options, const std::string& name,
                                     const std::vector<ColumnFamilyDescriptor>& families,
                                     std::vector<ColumnFamilyHandle*>* handles,
                                     rocksdb::OptimisticTransactionDB** db) override {
    return DefaultHooks::OpenOptimisticTransactionDB(With(options), name, families, handles, db);
  }

 private:
  template <typename O>
  static O With(O options) {
    // An options file may have set it, so that only a given flag changes it.
    if (FLAGS_recycle_log_file_num > 0) {
      options.recycle_log_file_num = FLAGS_recycle_log_file_num;
    }
    return options;
  }
};

// Reads every key of one database by a scan and by Get, and compares the two. Adds their number to `keys`.
Status VerifyDatabase(const std::string& path, const std::string& wal_dir, uint64_t* keys) {
  // The options that it was written with say which tables, comparators and merge operators it has.
  rocksdb::DBOptions options;
  std::vector<ColumnFamilyDescriptor> families;
  rocksdb::ConfigOptions config;
  config.env = FLAGS_env;
  config.ignore_unknown_options = true;
  Status s = rocksdb::LoadLatestOptions(config, path, &options, &families);
  if (!s.ok()) {
    return s;
  }
  options.env = FLAGS_env;
  options.wal_dir = wal_dir;
  std::vector<ColumnFamilyHandle*> handles;
  std::unique_ptr<DB> db;
  s = DB::OpenForReadOnly(options, path, families, &handles, &db);
  if (!s.ok()) {
    return s;
  }
  rocksdb::ReadOptions read;
  read.total_order_seek = true;
  read.fill_cache = false;
  for (ColumnFamilyHandle* handle : handles) {
    // The newest version of each key.
    const std::string newest(handle->GetComparator()->timestamp_size(), '\xff');
    const rocksdb::Slice timestamp(newest);
    read.timestamp = newest.empty() ? nullptr : &timestamp;
    std::unique_ptr<rocksdb::Iterator> scan(db->NewIterator(read, handle));
    rocksdb::PinnableSlice value;
    for (scan->SeekToFirst(); s.ok() && scan->Valid(); scan->Next()) {
      value.Reset();
      s = db->Get(read, handle, scan->key(), &value);
      if (s.IsNotFound()) {
        s = Status::Corruption("a scan finds a key that Get does not", scan->key().ToString(true));
      } else if (s.ok() && value != scan->value()) {
        s = Status::Corruption("a scan and Get give different values", scan->key().ToString(true));
      }
      ++*keys;
    }
    if (s.ok()) {
      s = scan->status();
    }
  }
  for (ColumnFamilyHandle* handle : handles) {
    db->DestroyColumnFamilyHandle(handle).PermitUncheckedError();
  }
  return s;
}

}  // namespace

extern "C" void pumice_db_bench_flags(pumice_flag_fn each, void* arg) {
  for (gflags::Flag* flag = gflags::Flag::first; flag != nullptr; flag = flag->next) {
    const std::string value = flag->Value();
    each(arg, flag->name, flag->type, value.c_str(), flag->help);
  }
}

extern "C" int pumice_db_bench_set(const char* name, const char* value) {
  for (gflags::Flag* flag = gflags::Flag::first; flag != nullptr; flag = flag->next) {
    if (std::strcmp(flag->name, name) == 0) {
      return flag->Set(value) ? 0 : 1;
    }
  }
  return 1;
}

extern "C" int pumice_db_bench_run(void* env, pumice_said_fn said, void* arg) {
  Listener listener{said, arg};
  FILE* lines = fopencookie(&listener, "w", {nullptr, Say, nullptr, nullptr});
  if (lines == nullptr) {
    std::perror("db_bench");
    return 1;
  }
  setvbuf(lines, nullptr, _IOLBF, BUFSIZ);
  if (env != nullptr) {
    FLAGS_env = static_cast<rocksdb::Env*>(env);
  }
  FILE* const terminal = stdout;
  stdout = lines;
  char name[] = "db_bench";
  char* argv[] = {name, nullptr};
  int code = 1;
  try {
    static Hooks hooks;
    code = rocksdb::db_bench_tool(1, argv, hooks);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "db_bench: %s\n", e.what());
  }
  stdout = terminal;
  std::fclose(lines);
  return code;
}

extern "C" int pumice_db_bench_verify(uint64_t* keys, char* error, size_t error_len) {
  *keys = 0;
  std::string failed;
  try {
    Status s;
    if (FLAGS_num_multi_db > 1) {
      for (int i = 0; s.ok() && i < FLAGS_num_multi_db; i++) {
        const std::string number = "/" + std::to_string(i);
        s = VerifyDatabase(FLAGS_db + number, FLAGS_wal_dir.empty() ? "" : FLAGS_wal_dir + number, keys);
      }
    } else {
      s = VerifyDatabase(FLAGS_db, FLAGS_wal_dir, keys);
    }
    if (s.ok()) {
      return 0;
    }
    failed = s.ToString();
  } catch (const std::exception& e) {
    failed = e.what();
  }
  const size_t len = std::min(failed.size(), error_len - 1);
  std::memcpy(error, failed.data(), len);
  error[len] = '\0';
  return 1;
}
