// RocksDB's calls of a file system, one by one, and what each answers. kv/embed/tests/c.rs compiles and runs it.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "rocksdb/convenience.h"
#include "rocksdb/file_system.h"
#include "rocksdb/options.h"

extern "C" void pumice_register_blobfs();

using rocksdb::FileOptions;
using rocksdb::FileSystem;
using rocksdb::FSReadRequest;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

namespace {

int problems = 0;
const IOOptions kAny;
std::shared_ptr<FileSystem> fs;

#define CHECK(condition) Check((condition), #condition, __LINE__)
#define GOOD(call) Good((call), #call, __LINE__)
#define FAILS(call) Check(!(call).ok(), #call " fails", __LINE__)

void Check(bool good, const char* what, int line) {
  if (!good) {
    std::fprintf(stderr, "calls.cc:%d: %s\n", line, what);
    problems++;
  }
}

void Good(const rocksdb::Status& s, const char* what, int line) {
  Check(s.ok(), (std::string(what) + ": " + s.ToString()).c_str(), line);
}

std::unique_ptr<rocksdb::FSWritableFile> Made(const std::string& path, const std::string& content) {
  std::unique_ptr<rocksdb::FSWritableFile> file;
  GOOD(fs->NewWritableFile(path, FileOptions(), &file, nullptr));
  GOOD(file->Append(content, kAny, nullptr));
  return file;
}

std::unique_ptr<rocksdb::FSRandomAccessFile> Reader(const std::string& path) {
  std::unique_ptr<rocksdb::FSRandomAccessFile> file;
  GOOD(fs->NewRandomAccessFile(path, FileOptions(), &file, nullptr));
  return file;
}

uint64_t Size(const std::string& path) {
  uint64_t size = 0;
  GOOD(fs->GetFileSize(path, kAny, &size, nullptr));
  return size;
}

uint64_t Free() {
  uint64_t bytes = 0;
  GOOD(fs->GetFreeSpace("/", kAny, &bytes, nullptr));
  return bytes;
}

void WhatIsNotThere() {
  Made("/file", "text");
  std::unique_ptr<rocksdb::FSSequentialFile> file;
  const IOStatus s = fs->NewSequentialFile("/missing", FileOptions(), &file, nullptr);
  CHECK(s.IsPathNotFound() && s.ToString().find("pumice cp") != std::string::npos && file == nullptr);
  // These two answer NotFound, which RocksDB looks for, however the path cannot be there.
  std::vector<std::string> names;
  for (const std::string& path : {std::string("/missing"), std::string("/file/below"), "/" + std::string(5000, 'x')}) {
    CHECK(fs->FileExists(path, kAny, nullptr).IsNotFound());
    CHECK(fs->GetChildren(path, kAny, &names, nullptr).IsNotFound() || path == "/file");
  }
  std::unique_ptr<rocksdb::FSDirectory> directory;
  CHECK(fs->NewDirectory("/missing", kAny, &directory, nullptr).IsPathNotFound());
  FAILS(fs->NewDirectory("/file", kAny, &directory, nullptr));
  CHECK(directory == nullptr);
  FAILS(fs->Truncate("/missing", 0, kAny, nullptr));
  FAILS(fs->SyncFile("/missing", FileOptions(), kAny, false, nullptr));
  FAILS(fs->DeleteFile("/missing", kAny, nullptr));
  FAILS(fs->RenameFile("/missing", "/other", kAny, nullptr));
  FAILS(fs->LinkFile("/missing", "/other", kAny, nullptr));
  FAILS(fs->DeleteDir("/missing", kAny, nullptr));
  CHECK(fs->CreateDir("/two\nlines", kAny, nullptr).IsInvalidArgument());
  std::shared_ptr<FileSystem> nowhere;
  const rocksdb::Status opened =
      FileSystem::CreateFromString(rocksdb::ConfigOptions(), "blobfs:///nowhere/at/all.img", &nowhere);
  CHECK(!opened.ok() && opened.ToString().find("could not be opened") != std::string::npos && nowhere == nullptr);
  GOOD(fs->DeleteFile("/file", kAny, nullptr));
}

void MemoryMapsAreRefused() {
  Made("/mapped", "text");
  FileOptions reads, writes;
  reads.use_mmap_reads = true;
  writes.use_mmap_writes = true;
  std::unique_ptr<rocksdb::FSRandomAccessFile> reader;
  std::unique_ptr<rocksdb::FSWritableFile> writer;
  std::unique_ptr<rocksdb::FSRandomRWFile> patcher;
  std::unique_ptr<rocksdb::MemoryMappedFileBuffer> buffer;
  CHECK(fs->NewRandomAccessFile("/mapped", reads, &reader, nullptr).IsNotSupported());
  CHECK(fs->NewWritableFile("/mapped", writes, &writer, nullptr).IsNotSupported());
  CHECK(fs->ReopenWritableFile("/mapped", writes, &writer, nullptr).IsNotSupported());
  CHECK(fs->NewRandomRWFile("/mapped", reads, &patcher, nullptr).IsNotSupported());
  CHECK(fs->NewRandomRWFile("/mapped", writes, &patcher, nullptr).IsNotSupported());
  CHECK(fs->NewMemoryMappedFileBuffer("/mapped", &buffer).IsNotSupported());
  CHECK(Size("/mapped") == 4);
  GOOD(fs->DeleteFile("/mapped", kAny, nullptr));
}

void AWriterKnowsItsSize() {
  auto file = Made("/w", "0123456789");
  CHECK(file->GetFileSize(kAny, nullptr) == 10);
  GOOD(file->PositionedAppend("ab", 8, kAny, nullptr));
  CHECK(file->GetFileSize(kAny, nullptr) == 10);
  GOOD(file->Truncate(5, kAny, nullptr));
  CHECK(file->GetFileSize(kAny, nullptr) == 5 && Size("/w") == 5);
  GOOD(file->Close(kAny, nullptr));
  GOOD(fs->ReopenWritableFile("/w", FileOptions(), &file, nullptr));
  CHECK(file->GetFileSize(kAny, nullptr) == 5);
  GOOD(file->Append("end", kAny, nullptr));
  CHECK(file->GetFileSize(kAny, nullptr) == 8 && Size("/w") == 8);
  GOOD(file->Close(kAny, nullptr));
  GOOD(fs->Truncate("/w", 3, kAny, nullptr));
  GOOD(fs->SyncFile("/w", FileOptions(), kAny, true, nullptr));
  CHECK(Size("/w") == 3);
  // A new file takes the place of an old one, which those who have it open keep.
  auto reader = Reader("/w");
  Made("/w", "");
  char scratch[8];
  Slice got;
  CHECK(Size("/w") == 0);
  GOOD(reader->Read(0, 8, kAny, &got, scratch, nullptr));
  CHECK(got == "012");
  GOOD(fs->DeleteFile("/w", kAny, nullptr));
}

void SpaceIsAllocatedAhead() {
  constexpr size_t kBlock = 8 << 20;
  auto file = Made("/ahead", "");
  const uint64_t before = Free();
  CHECK(before > 0 && before <= 64 << 20);
  file->SetPreallocationBlockSize(kBlock);
  for (size_t n : {0, 100, 200}) {
    file->PrepareWrite(n, 100, kAny, nullptr);
    size_t block = 0, blocks = 0;
    file->GetPreallocationStatus(&block, &blocks);
    CHECK(block == kBlock && blocks == 1);
  }
  const uint64_t with_one = Free();
  CHECK(before - with_one >= kBlock && before - with_one < 2 * kBlock);
  file->PrepareWrite(kBlock, 1, kAny, nullptr);
  CHECK(with_one - Free() >= kBlock && before - Free() < 3 * kBlock);
  GOOD(file->Close(kAny, nullptr));
  file.reset();
  CHECK(before - Free() < kBlock);
  // As many blocks as are needed, and no more.
  file = Made("/ahead", "");
  file->SetPreallocationBlockSize(4096);
  size_t block = 0, blocks = 0;
  file->PrepareWrite(0, 8192, kAny, nullptr);
  file->GetPreallocationStatus(&block, &blocks);
  CHECK(block == 4096 && blocks == 2);
  // RocksDB is told that there is no room, and may try again. A write for which nothing could be allocated does not fail for that.
  file = Made("/ahead", "");
  const IOStatus s = file->Allocate(0, uint64_t{1} << 40, kAny, nullptr);
  CHECK(s.IsNoSpace() && s.GetRetryable() && !s.GetDataLoss());
  CHECK(s.GetScope() == IOStatus::kIOErrorScopeFileSystem);
  file->SetPreallocationBlockSize(size_t{1} << 40);
  file->PrepareWrite(0, 1, kAny, nullptr);
  GOOD(file->Append("1", kAny, nullptr));
  GOOD(fs->DeleteFile("/ahead", kAny, nullptr));
}

void AReaderInOrder() {
  auto writer = Made("/seq", "0123456789");
  std::unique_ptr<rocksdb::FSSequentialFile> file;
  GOOD(fs->NewSequentialFile("/seq", FileOptions(), &file, nullptr));
  char scratch[16];
  Slice got;
  GOOD(file->Read(3, kAny, &got, scratch, nullptr));
  CHECK(got == "012");
  GOOD(file->Skip(2));
  GOOD(file->Read(2, kAny, &got, scratch, nullptr));
  CHECK(got == "56");
  GOOD(file->PositionedRead(1, 2, kAny, &got, scratch, nullptr));
  CHECK(got == "12");
  // It stops at the end, where a follower of a log finds what comes later.
  GOOD(file->Skip(1000));
  GOOD(file->Read(16, kAny, &got, scratch, nullptr));
  CHECK(got.empty());
  GOOD(writer->Append("later", kAny, nullptr));
  GOOD(file->Read(16, kAny, &got, scratch, nullptr));
  CHECK(got == "later");
  GOOD(fs->DeleteFile("/seq", kAny, nullptr));
}

void ManyReadsTogether() {
  std::string content;
  for (int n = 0; n < 20000; n++) content += std::to_string(n) + ' ';
  auto writer = Made("/many", content);
  GOOD(writer->Sync(kAny, nullptr));
  auto file = Reader("/many");
  for (bool lent : {false, true}) {
    for (size_t count : {1, 32, 33, 100}) {
      std::vector<FSReadRequest> reads(count);
      std::vector<std::string> scratch(count, std::string(100, '-'));
      for (size_t n = 0; n < count; n++) {
        reads[n].offset = content.size() - 50 - 900 * n;
        reads[n].len = 100;
        reads[n].scratch = lent ? nullptr : scratch[n].data();
      }
      GOOD(file->MultiRead(reads.data(), count, kAny, nullptr));
      for (const auto& read : reads) {
        GOOD(read.status);
        CHECK(read.result == Slice(content).ToString().substr(read.offset, 100));
        CHECK(lent == (read.fs_scratch != nullptr));
      }
    }
  }
  uint64_t size = 0;
  GOOD(file->GetFileSize(&size));
  CHECK(size == content.size());
  // RocksDB asks for what was damaged once more, past the cache.
  IOOptions again;
  again.verify_and_reconstruct_read = true;
  std::string scratch(100, '-');
  Slice got;
  GOOD(file->InvalidateCache(0, 0));
  GOOD(file->Read(0, 100, again, &got, scratch.data(), nullptr));
  CHECK(got == content.substr(0, 100));
}

void AsynchronousReads() {
  const auto content = std::string(200000, 'a') + "end";
  auto writer = Made("/async", content);
  GOOD(writer->Sync(kAny, nullptr));
  GOOD(writer->InvalidateCache(0, 0));
  auto file = Reader("/async");
  struct Seen {
    int calls = 0;
    IOStatus status;
    std::string data;
  };
  const auto call = [](FSReadRequest& req, void* arg) {
    auto* seen = static_cast<Seen*>(arg);
    seen->calls++;
    seen->status = req.status;
    seen->data = req.result.ToString();
  };
  for (bool abort : {false, true}) {
    std::vector<char> scratch(4096);
    Seen seen;
    FSReadRequest req;
    req.offset = content.size() - 10;
    req.len = scratch.size();
    req.scratch = scratch.data();
    std::vector<void*> handles(1, nullptr);
    rocksdb::IOHandleDeleter del;
    GOOD(file->ReadAsync(req, kAny, call, &seen, &handles[0], &del, nullptr));
    CHECK(handles[0] != nullptr);
    GOOD(abort ? fs->AbortIO(handles) : fs->Poll(handles, 1));
    // Either has an answer for each read, once. What is there already is not taken back.
    CHECK(seen.calls == 1);
    CHECK(seen.status.ok() ? seen.data == "aaaaaaaend" : abort && seen.status.IsAborted() && seen.data.empty());
    GOOD(fs->Poll(handles, 1));
    CHECK(seen.calls == 1);
    del(handles[0]);
  }
  GOOD(fs->DeleteFile("/async", kAny, nullptr));
}

void Identities() {
  auto one = Made("/one", "1"), two = Made("/two", "2");
  GOOD(fs->LinkFile("/one", "/again", kAny, nullptr));
  std::set<std::string> ids;
  for (const char* path : {"/one", "/two", "/again"}) {
    char id[64];
    auto file = Reader(path);
    const size_t len = file->GetUniqueId(id, sizeof(id));
    CHECK(len > 0 && file->GetUniqueId(id, 3) == 0);
    ids.insert(std::string(id, len));
  }
  char id[64];
  CHECK(ids.size() == 2 && ids.count(std::string(id, one->GetUniqueId(id, sizeof(id)))) == 1);
  bool same = false;
  GOOD(fs->AreFilesSame("/one", "/again", kAny, &same, nullptr));
  CHECK(same);
  GOOD(fs->AreFilesSame("/one", "/two", kAny, &same, nullptr));
  CHECK(!same);
  FAILS(fs->AreFilesSame("/one", "/missing", kAny, &same, nullptr));
  uint64_t links = 0;
  GOOD(fs->NumFileLinks("/one", kAny, &links, nullptr));
  CHECK(links == 2);
  // RocksDB copies what cannot be linked, if the status says so.
  IOStatus s;
  int made = 0;
  while (s.ok() && made < 10000) s = fs->LinkFile("/two", "/two" + std::to_string(made++), kAny, nullptr);
  CHECK(s.IsNotSupported());
  for (int n = 0; n + 1 < made; n++) GOOD(fs->DeleteFile("/two" + std::to_string(n), kAny, nullptr));
  uint64_t mtime = 0;
  GOOD(fs->GetFileModificationTime("/one", kAny, &mtime, nullptr));
  CHECK(mtime + 3600 > static_cast<uint64_t>(time(nullptr)) && mtime < static_cast<uint64_t>(time(nullptr)) + 3600);
  for (const char* path : {"/one", "/two", "/again"}) GOOD(fs->DeleteFile(path, kAny, nullptr));
}

void Directories() {
  GOOD(fs->CreateDirIfMissing("/dir/with/parents", kAny, nullptr));
  GOOD(fs->CreateDirIfMissing("/dir/with/parents", kAny, nullptr));
  FAILS(fs->CreateDir("/dir", kAny, nullptr));
  Made("/dir/file", "text");
  FAILS(fs->CreateDirIfMissing("/dir/file", kAny, nullptr));
  FAILS(fs->DeleteDir("/dir", kAny, nullptr));
  std::vector<std::string> names;
  GOOD(fs->GetChildren("/dir", kAny, &names, nullptr));
  CHECK(std::set<std::string>(names.begin(), names.end()) == (std::set<std::string>{"file", "with"}));
  IOOptions files;
  files.do_not_recurse = true;
  GOOD(fs->GetChildren("/dir", files, &names, nullptr));
  CHECK(names == std::vector<std::string>{"file"});
  std::vector<rocksdb::FileAttributes> attributes;
  GOOD(fs->GetChildrenFileAttributes("/dir", files, &attributes, nullptr));
  CHECK(attributes.size() == 1 && attributes[0].name == "file" && attributes[0].size_bytes == 4);
  bool is_dir = false;
  GOOD(fs->IsDirectory("/dir", kAny, &is_dir, nullptr));
  CHECK(is_dir);
  GOOD(fs->IsDirectory("/dir/file", kAny, &is_dir, nullptr));
  CHECK(!is_dir);
  std::unique_ptr<rocksdb::FSDirectory> directory;
  GOOD(fs->NewDirectory("/dir", kAny, &directory, nullptr));
  GOOD(directory->Fsync(kAny, nullptr));
  GOOD(directory->Close(kAny, nullptr));
  std::string path;
  GOOD(fs->GetAbsolutePath("dir", kAny, &path, nullptr));
  CHECK(path == "/dir");
  GOOD(fs->GetAbsolutePath("/dir", kAny, &path, nullptr));
  CHECK(path == "/dir");
  setenv("TEST_TMPDIR", "/chosen", 1);
  GOOD(fs->GetTestDirectory(kAny, &path, nullptr));
  CHECK(path == "/chosen");
  GOOD(fs->FileExists("/chosen", kAny, nullptr));
}

void Locks() {
  rocksdb::FileLock *lock = nullptr, *other = nullptr;
  GOOD(fs->LockFile("/LOCK", kAny, &lock, nullptr));
  FAILS(fs->LockFile("/LOCK", kAny, &other, nullptr));
  CHECK(other == nullptr);
  GOOD(fs->UnlockFile(lock, kAny, nullptr));
  GOOD(fs->LockFile("/LOCK", kAny, &lock, nullptr));
  GOOD(fs->UnlockFile(lock, kAny, nullptr));
}

void Options() {
  FileOptions direct;
  direct.use_direct_writes = direct.use_direct_reads = true;
  CHECK(!fs->OptimizeForLogWrite(direct, rocksdb::DBOptions()).use_direct_writes);
  CHECK(!fs->OptimizeForManifestWrite(direct).use_direct_writes);
  int64_t supported = 0;
  fs->SupportedOps(supported);
  const auto offers = [&](rocksdb::FSSupportedOps op) { return (supported & int64_t{1} << op) != 0; };
  for (auto op : {rocksdb::FSSupportedOps::kAsyncIO, rocksdb::FSSupportedOps::kFSPrefetch,
                  rocksdb::FSSupportedOps::kVerifyAndReconstructRead}) {
    CHECK(offers(op));
  }
  // A copy into RocksDB's own memory is faster than what it copies itself.
  CHECK(!offers(rocksdb::FSSupportedOps::kFSBuffer));
  // The cache is not used, so that there is nothing to prefetch to: RocksDB does it by itself.
  std::unique_ptr<rocksdb::FSRandomAccessFile> file;
  Made("/direct", "text");
  GOOD(fs->NewRandomAccessFile("/direct", direct, &file, nullptr));
  CHECK(file->use_direct_io() && file->Prefetch(0, 4, kAny, nullptr).IsNotSupported());
  GOOD(Reader("/direct")->Prefetch(0, 4, kAny, nullptr));
}

// In a forked child, which must not use its parent's mount, every call fails, and says so.
void EveryFailureArrives() {
  auto writer = Made("/fails", std::string(100000, 'x'));
  auto reader = Reader("/fails");
  std::unique_ptr<rocksdb::FSSequentialFile> sequential;
  GOOD(fs->NewSequentialFile("/fails", FileOptions(), &sequential, nullptr));
  std::unique_ptr<rocksdb::FSRandomRWFile> patcher;
  GOOD(fs->NewRandomRWFile("/fails", FileOptions(), &patcher, nullptr));
  GOOD(patcher->Write(7, "seven", kAny, nullptr));
  char scratch[16];
  Slice got;
  GOOD(patcher->Read(6, 6, kAny, &got, scratch, nullptr));
  CHECK(got == "xseven");
  GOOD(patcher->Sync(kAny, nullptr));
  std::unique_ptr<rocksdb::FSDirectory> directory;
  GOOD(fs->NewDirectory("/", kAny, &directory, nullptr));
  const pid_t child = fork();
  if (child != 0) {
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    GOOD(writer->Append("after", kAny, nullptr));
    CHECK(Size("/fails") == 100005);
    return;
  }
  problems = 0;
  FAILS(writer->Append("child", kAny, nullptr));
  FAILS(writer->PositionedAppend("child", 0, kAny, nullptr));
  CHECK(writer->GetFileSize(kAny, nullptr) == 100000);
  FAILS(writer->Truncate(0, kAny, nullptr));
  FAILS(writer->Sync(kAny, nullptr));
  FAILS(writer->Fsync(kAny, nullptr));
  FAILS(writer->RangeSync(0, 100000, kAny, nullptr));
  FAILS(writer->Allocate(0, 1 << 20, kAny, nullptr));
  FAILS(writer->Close(kAny, nullptr));
  FAILS(patcher->Write(0, "child", kAny, nullptr));
  FAILS(patcher->Read(0, 16, kAny, &got, scratch, nullptr));
  FAILS(patcher->Sync(kAny, nullptr));
  FAILS(patcher->Close(kAny, nullptr));
  FAILS(sequential->Read(16, kAny, &got, scratch, nullptr));
  FAILS(reader->Read(0, 16, kAny, &got, scratch, nullptr));
  CHECK(got.empty());
  FAILS(reader->Prefetch(0, 16, kAny, nullptr));
  std::vector<FSReadRequest> reads(2);
  for (auto& read : reads) {
    read.offset = 0;
    read.len = 8;
    read.scratch = scratch;
  }
  // Each read has its own failure, not the last one of the thread.
  CHECK(fs->FileExists("/\xff", kAny, nullptr).ToString().find("UTF-8") != std::string::npos);
  GOOD(reader->MultiRead(reads.data(), reads.size(), kAny, nullptr));
  for (const auto& read : reads) {
    CHECK(!read.status.ok() && read.result.empty());
    CHECK(read.status.ToString().find("fork") != std::string::npos);
  }
  void* handle = nullptr;
  rocksdb::IOHandleDeleter del;
  FAILS(reader->ReadAsync(reads[0], kAny, [](FSReadRequest&, void*) {}, nullptr, &handle, &del, nullptr));
  CHECK(handle == nullptr);
  FAILS(directory->Fsync(kAny, nullptr));
  FAILS(fs->SyncFile("/fails", FileOptions(), kAny, false, nullptr));
  FAILS(fs->Truncate("/fails", 0, kAny, nullptr));
  uint64_t answer = 0;
  FAILS(fs->GetFileSize("/fails", kAny, &answer, nullptr));
  FAILS(fs->GetFileModificationTime("/fails", kAny, &answer, nullptr));
  FAILS(fs->NumFileLinks("/fails", kAny, &answer, nullptr));
  rocksdb::FileLock* lock = nullptr;
  FAILS(fs->LockFile("/LOCK", kAny, &lock, nullptr));
  const IOStatus s = fs->FileExists("/fails", kAny, nullptr);
  CHECK(s.IsIOError() && s.ToString().find("fork") != std::string::npos);
  std::_Exit(problems != 0);
}

}  // namespace

int main() {
  pumice_register_blobfs();
  GOOD(FileSystem::CreateFromString(rocksdb::ConfigOptions(), "blobfs://malloc://64M", &fs));
  if (fs == nullptr) return 1;
  WhatIsNotThere();
  MemoryMapsAreRefused();
  AWriterKnowsItsSize();
  SpaceIsAllocatedAhead();
  AReaderInOrder();
  ManyReadsTogether();
  AsynchronousReads();
  Identities();
  Directories();
  Locks();
  Options();
  EveryFailureArrives();
  if (problems == 0) std::puts("every call is answered as RocksDB expects");
  return problems != 0;
}
