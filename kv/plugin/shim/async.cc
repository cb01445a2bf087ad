#include "async.h"

#include <memory>
#include <new>
#include <string>

#include "status.h"

namespace pumice {

using rocksdb::FSReadRequest;
using rocksdb::IODebugContext;
using rocksdb::IOStatus;
using rocksdb::Slice;

namespace {

// One read and a copy of its request, because RocksDB may free its own before the data arrives.
struct PendingRead {
  std::string name;
  void* pending = nullptr;  // null once settled
  ReadCallback cb;
  void* cb_arg = nullptr;
  FSReadRequest req;
#if PUMICE_HAS_SUPPORTED_OPS
  std::unique_ptr<char[]> own_scratch;  // when RocksDB brought none
#endif

  ~PendingRead() {
    if (pending != nullptr) {
      pumice_read_cancel(pending);
    }
  }

  void Call() {
#if PUMICE_HAS_SUPPORTED_OPS
    if (own_scratch) {
      req.fs_scratch = decltype(req.fs_scratch)(
          own_scratch.release(), [](void* p) { delete[] static_cast<char*>(p); });
    }
#endif
    cb(req, cb_arg);
  }

  void Finish() {
    const int64_t got = pumice_read_finish(pending, req.scratch, req.len);
    pending = nullptr;
    if (got >= 0) {
      req.result = Slice(req.scratch, static_cast<size_t>(got));
      req.status = IOStatus::OK();
    } else {
      req.result = Slice(req.scratch, 0);
      req.status = LastFault({"reading", name}, nullptr);
    }
    Call();
  }

  void Abort() {
    pumice_read_cancel(pending);
    pending = nullptr;
    req.result = Slice(req.scratch, 0);
    req.status = IOStatus::Aborted();
    Call();
  }
};

void Delete(void* handle) { delete static_cast<PendingRead*>(handle); }

}  // namespace

IOStatus StartRead(const Opened& at, FSReadRequest& req,
                   ReadCallback cb, void* cb_arg, void** io_handle,
                   rocksdb::IOHandleDeleter* del_fn, IODebugContext* dbg) {
  *io_handle = nullptr;
  std::unique_ptr<PendingRead> read;
  try {
    read.reset(new PendingRead());
    read->name = at.name;
    read->cb = std::move(cb);
    read->cb_arg = cb_arg;
    read->req.offset = req.offset;
    read->req.len = req.len;
    read->req.scratch = req.scratch;
#if PUMICE_HAS_SUPPORTED_OPS
    if (req.scratch == nullptr) {
      read->own_scratch.reset(new char[req.len]);
      read->req.scratch = read->own_scratch.get();
    }
#endif
    *del_fn = Delete;
  } catch (const std::bad_alloc&) {
    return IOStatus::IOError(IOStatus::kMemoryLimit);
  }
  const int64_t started = pumice_read_start(at.file.get(), req.offset, req.len, &read->pending);
  if (started < 0) {
    *del_fn = nullptr;
    return LastFault({"reading", at.name}, dbg);
  }
  PendingRead* handle = read.release();
  *io_handle = handle;
  if (started > 0) {
    handle->Finish();
  }
  return IOStatus::OK();
}

void PollReads(std::vector<void*>& io_handles) {
  for (void* handle : io_handles) {
    auto* read = static_cast<PendingRead*>(handle);
    if (read != nullptr && read->pending != nullptr) {
      read->Finish();
    }
  }
}

void AbortReads(std::vector<void*>& io_handles) {
  for (void* handle : io_handles) {
    auto* read = static_cast<PendingRead*>(handle);
    if (read != nullptr && read->pending != nullptr) {
      read->Abort();
    }
  }
}

}  // namespace pumice
