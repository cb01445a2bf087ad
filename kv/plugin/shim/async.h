// Reads under way: ReadAsync, Poll and AbortIO.

#pragma once

#include <vector>

#include "readers.h"
#include "rocksdb/file_system.h"
#include "version.h"

namespace pumice {

// Starts `req`. On success `*io_handle` is a read that Poll or AbortIO settles. When the data was
// in memory the read is settled already and its callback has run. On failure there is no handle
// and the callback does not run.
rocksdb::IOStatus StartRead(const Opened& at, rocksdb::FSReadRequest& req,
                            ReadCallback cb, void* cb_arg, void** io_handle, rocksdb::IOHandleDeleter* del_fn,
                            rocksdb::IODebugContext* dbg);

// Waits for each read that is not settled and runs its callback.
void PollReads(std::vector<void*>& io_handles);

// Gives up each read that is not settled. Its callback runs with Aborted.
void AbortReads(std::vector<void*>& io_handles);

}  // namespace pumice
