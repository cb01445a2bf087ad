// A C++ program with the plugin: two file systems in one process, one mount of one device, and a forked
// child that exits. scripts/plugin-test compiles and runs it: mounts IMAGE OTHER_IMAGE

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "rocksdb/convenience.h"
#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "rocksdb/file_system.h"

using rocksdb::FileOptions;
using rocksdb::FileSystem;
using rocksdb::IOOptions;

namespace {

void Check(bool good, const std::string& what) {
  if (!good) {
    std::fprintf(stderr, "mounts: %s\n", what.c_str());
    std::_Exit(1);
  }
}

void Check(const rocksdb::Status& s, const std::string& what) {
  Check(s.ok(), what + ": " + s.ToString());
}

std::shared_ptr<FileSystem> Open(const std::string& uri) {
  std::shared_ptr<FileSystem> fs;
  Check(FileSystem::CreateFromString(rocksdb::ConfigOptions(), uri, &fs), uri);
  return fs;
}

void Write(FileSystem* fs, const std::string& path, const std::string& text) {
  Check(rocksdb::WriteStringToFile(fs, text, path, true), "writing " + path);
}

std::string Read(FileSystem* fs, const std::string& path) {
  std::string text;
  Check(rocksdb::ReadFileToString(fs, path, &text), "reading " + path);
  return text;
}

std::unique_ptr<rocksdb::DB> OpenDatabase(rocksdb::Env* env) {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.env = env;
  rocksdb::DB* db = nullptr;
  Check(rocksdb::DB::Open(options, "/db", &db), "opening a database");
  return std::unique_ptr<rocksdb::DB>(db);
}

// These are destroyed at the end of the process, and of the child.
std::shared_ptr<FileSystem> one, again, below, other;

void OneMountForOneDevice() {
  Write(one.get(), "/name", "one");
  Write(other.get(), "/name", "other");
  Check(Read(again.get(), "/name") == "one", "the same URI has another file system");
  Check(Read(other.get(), "/name") == "other", "two images have one file system");
  Check(one->CreateDir("/dir", IOOptions(), nullptr), "creating /dir");
  Write(below.get(), "/inside", "a root");
  Check(Read(one.get(), "/dir/inside") == "a root", "the root of a URI is not its directory");
}

// RocksDB has no threads yet, which a child would not inherit.
void AnExitingChild() {
  std::unique_ptr<rocksdb::FSWritableFile> file;
  Check(one->NewWritableFile("/shared", FileOptions(), &file, nullptr), "creating /shared");
  Check(file->Append("before ", IOOptions(), nullptr), "appending");
  const pid_t child = fork();
  Check(child >= 0, "fork failed");
  if (child == 0) {
    const bool refused = !file->Append("of the child", IOOptions(), nullptr).ok() &&
                         !one->FileExists("/name", IOOptions(), nullptr).ok();
    // The end of the child runs the handlers and destructors of the process.
    std::exit(refused ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  Check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child used its parent's mount, or did not exit");
  Check(file->Append("after", IOOptions(), nullptr), "appending after the child");
  Check(file->Sync(IOOptions(), nullptr), "syncing after the child");
  Check(file->Close(IOOptions(), nullptr), "closing after the child");
  Check(Read(again.get(), "/shared") == "before after", "the child has changed the file");
}

void TwoDatabases() {
  std::unique_ptr<rocksdb::Env> first = rocksdb::NewCompositeEnv(one);
  std::unique_ptr<rocksdb::Env> second = rocksdb::NewCompositeEnv(other);
  auto a = OpenDatabase(first.get());
  auto b = OpenDatabase(second.get());
  rocksdb::WriteOptions sync;
  sync.sync = true;
  for (int n = 0; n < 5000; n++) {
    const std::string key = "key" + std::to_string(n);
    Check(a->Put(n % 100 == 0 ? sync : rocksdb::WriteOptions(), key, "one"), "put");
    Check(b->Put(rocksdb::WriteOptions(), key, "other"), "put");
  }
  Check(a->Flush(rocksdb::FlushOptions()), "flush");
  Check(b->Flush(rocksdb::FlushOptions()), "flush");
  std::string value;
  Check(a->Get(rocksdb::ReadOptions(), "key77", &value), "get");
  Check(value == "one", "the databases are mixed up");
  Check(b->Get(rocksdb::ReadOptions(), "key77", &value), "get");
  Check(value == "other", "the databases are mixed up");
}

// What is released last unmounts, and the device can be mounted again.
void MountedAgain(const std::string& uri) {
  one.reset();
  Check(Read(again.get(), "/name") == "one", "the first release has unmounted");
  again.reset();
  below.reset();
  one = Open(uri);
  Check(Read(one.get(), "/shared") == "before after", "the file is gone after a mount");
}

}  // namespace

int main(int argc, char** argv) {
  Check(argc == 3, "two images are needed");
  const std::string uri = std::string("blobfs://") + argv[1];
  one = Open(uri);
  again = Open(uri);
  below = Open(uri + "?root:/dir");
  other = Open(std::string("blobfs://") + argv[2]);
  OneMountForOneDevice();
  AnExitingChild();
  TwoDatabases();
  MountedAgain(uri);
  // Unsynced, and still mounted: the end of the process writes it.
  std::unique_ptr<rocksdb::FSWritableFile> file;
  Check(other->NewWritableFile("/last", FileOptions(), &file, nullptr), "creating /last");
  Check(file->Append("at exit", IOOptions(), nullptr), "appending");
  static std::unique_ptr<rocksdb::FSWritableFile> kept = std::move(file);
  std::puts("mounts: two file systems, one mount of one device, an exiting child");
  return 0;
}
