#include "readers.h"

#include <algorithm>
#include <new>
#include <vector>

#include "async.h"
#include "status.h"

namespace pumice {

using rocksdb::FSReadRequest;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

namespace {

inline IOStatus ReadAt(const Opened& at, uint64_t offset, size_t n, Slice* result, char* scratch,
                       IODebugContext* dbg) {
  const int64_t got = pumice_read_at(at.file.get(), offset, scratch, n);
  if (PUMICE_LIKELY(got >= 0)) {
    *result = Slice(scratch, static_cast<size_t>(got));
    return IOStatus::OK();
  }
  *result = Slice(scratch, 0);
  return LastFault({"reading", at.name}, dbg);
}

IOStatus Drop(const Opened& at, uint64_t offset, uint64_t length) {
  if (length == 0) {
    length = UINT64_MAX - offset;
  }
  if (pumice_invalidate(at.file.get(), offset, length) < 0) {
    return LastFault({"dropping the cache of", at.name}, nullptr);
  }
  return IOStatus::OK();
}

#if PUMICE_HAS_SUPPORTED_OPS
// Releases what `read_many` lent. It is small enough for std::function to store it without an
// allocation.
struct Unpin {
  void operator()(void* pin) const { pumice_pin_release(pin); }
};
#endif

}  // namespace

IOStatus SequentialFile::Read(size_t n, const IOOptions& /*options*/, Slice* result,
                              char* scratch, IODebugContext* dbg) {
  IOStatus s = ReadAt(at_, position_, n, result, scratch, dbg);
  position_ += result->size();
  return s;
}

IOStatus SequentialFile::Skip(uint64_t n) {
  const uint64_t len = pumice_file_len(at_.file.get());
  const uint64_t left = len > position_ ? len - position_ : 0;
  position_ += std::min(n, left);
  return IOStatus::OK();
}

IOStatus SequentialFile::PositionedRead(uint64_t offset, size_t n, const IOOptions& /*options*/,
                                        Slice* result, char* scratch, IODebugContext* dbg) {
  return ReadAt(at_, offset, n, result, scratch, dbg);
}

IOStatus SequentialFile::InvalidateCache(size_t offset, size_t length) {
  return Drop(at_, offset, length);
}

void RandomAccessFile::DropIfAsked(const IOOptions& options, uint64_t offset, size_t n) const {
#if PUMICE_HAS_REREADING
  if (__builtin_expect(options.verify_and_reconstruct_read, false)) {
    Drop(at_, offset, n).PermitUncheckedError();
  }
#else
  (void)options, (void)offset, (void)n;
#endif
}

IOStatus RandomAccessFile::Read(uint64_t offset, size_t n, const IOOptions& options, Slice* result,
                                char* scratch, IODebugContext* dbg) const {
  DropIfAsked(options, offset, n);
  return ReadAt(at_, offset, n, result, scratch, dbg);
}

IOStatus RandomAccessFile::Prefetch(uint64_t offset, size_t n, const IOOptions& /*options*/,
                                    IODebugContext* dbg) {
  if (at_.direct) {
    return IOStatus::NotSupported("Prefetch: the file is read past the cache");
  }
  if (pumice_prefetch(at_.file.get(), offset, n) < 0) {
    return LastFault({"prefetching", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus RandomAccessFile::MultiRead(FSReadRequest* reqs, size_t count, const IOOptions& options,
                                     IODebugContext* dbg) {
  constexpr size_t kInline = 32;
  pumice_read on_stack[kInline];
  std::vector<pumice_read> on_heap;
  pumice_read* reads = on_stack;
  if (count > kInline) {
    try {
      on_heap.resize(count);
    } catch (const std::bad_alloc&) {
      return IOStatus::IOError(IOStatus::kMemoryLimit);
    }
    reads = on_heap.data();
  }
  for (size_t i = 0; i < count; i++) {
    DropIfAsked(options, reqs[i].offset, reqs[i].len);
    reads[i] = {reqs[i].offset, reqs[i].len, reinterpret_cast<uint8_t*>(reqs[i].scratch),
                nullptr,        0,           nullptr,
                nullptr};
  }
  if (pumice_read_many(at_.file.get(), reads, count) < 0) {
    return LastFault({"reading", at_.name}, dbg);
  }
  for (size_t i = 0; i < count; i++) {
    FSReadRequest& req = reqs[i];
    const pumice_read& read = reads[i];
    if (PUMICE_LIKELY(read.got >= 0)) {
      const char* data = req.scratch != nullptr ? req.scratch
                                                : reinterpret_cast<const char*>(read.data);
      req.result = Slice(data, static_cast<size_t>(read.got));
#if PUMICE_HAS_SUPPORTED_OPS
      if (read.pin != nullptr) {
        req.fs_scratch = decltype(req.fs_scratch)(read.pin, Unpin{});
      }
#endif
      req.status = IOStatus::OK();
    } else {
      pumice_fault_take(read.fault);
      req.result = Slice(req.scratch, 0);
      req.status = LastFault({"reading", at_.name}, dbg);
    }
  }
  return IOStatus::OK();
}

IOStatus RandomAccessFile::ReadAsync(FSReadRequest& req, const IOOptions& options,
                                     ReadCallback cb, void* cb_arg, void** io_handle,
                                     rocksdb::IOHandleDeleter* del_fn, IODebugContext* dbg) {
  DropIfAsked(options, req.offset, req.len);
  return StartRead(at_, req, std::move(cb), cb_arg, io_handle, del_fn, dbg);
}

#if PUMICE_HAS_SIZE_OF_OPEN_FILE
IOStatus RandomAccessFile::GetFileSize(uint64_t* result) {
  *result = pumice_file_len(at_.file.get());
  return IOStatus::OK();
}
#endif

IOStatus RandomAccessFile::InvalidateCache(size_t offset, size_t length) {
  return Drop(at_, offset, length);
}

size_t RandomAccessFile::GetUniqueId(char* id, size_t max_size) const {
  return UniqueId(pumice_file_id(at_.file.get()), at_.mount, id, max_size);
}

void RandomAccessFile::Hint(AccessPattern pattern) {
  uint32_t access = PUMICE_ACCESS_NORMAL;
  switch (pattern) {
    case kNormal:
      access = PUMICE_ACCESS_NORMAL;
      break;
    case kRandom:
      access = PUMICE_ACCESS_RANDOM;
      break;
    case kSequential:
      access = PUMICE_ACCESS_SEQUENTIAL;
      break;
    case kWillNeed:
      access = PUMICE_ACCESS_WILL_NEED;
      break;
    case kWontNeed:
      access = PUMICE_ACCESS_WONT_NEED;
      break;
  }
  pumice_advise(at_.file.get(), access);
}

size_t UniqueId(uint64_t file_id, const void* mount, char* id, size_t max_size) {
  // Three varints, as in RocksDB's own file systems. So no identifier is the prefix of another, and
  // none is a single varint.
  const uint64_t parts[] = {reinterpret_cast<uintptr_t>(mount), file_id, 0};
  constexpr size_t kMost = 3 * 10;
  if (max_size < kMost) {
    return 0;
  }
  char* end = id;
  for (uint64_t part : parts) {
    while (part >= 0x80) {
      *end++ = static_cast<char>(part | 0x80);
      part >>= 7;
    }
    *end++ = static_cast<char>(part);
  }
  return static_cast<size_t>(end - id);
}

}  // namespace pumice
