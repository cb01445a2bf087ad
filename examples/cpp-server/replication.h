// Replication: a leader sends its writes, and a follower applies them.
//
// A follower sends `FOLLOW LEADER SEQUENCE`, with the position that it keeps in its database. From then on the leader sends
//   RESET                        forget everything: all keys follow
//   BATCH LEADER SEQUENCE BYTES  a write batch, and the position behind it; an empty LEADER: not whole yet
//   AT SEQUENCE                  the last write of the leader, at least once a second
// as arrays of bulk strings. The position is written with the batch, so a follower that is killed goes on where it was.

#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "net.h"
#include "resp.h"
#include "store.h"

namespace server {

// Sends the writes behind `from` until the peer is gone or `*stop` is set.
void Lead(Socket* socket, Store* store, Position from, const std::atomic<bool>* stop);

// The thread that follows a leader.
class Follower {
 public:
  Follower(Store* store, std::string leader);
  ~Follower();
  // Lines for INFO.
  std::string Info() const;

 private:
  void Run();
  // Follows over one connection until it ends; returns why.
  std::string Session(Socket* socket);
  rocksdb::Status Take(const Arguments& message);
  void Say(const std::string& text);

  Store* const store_;
  const std::string leader_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> linked_{false};
  std::atomic<uint64_t> applied_{0};
  std::atomic<uint64_t> leads_{0};
  mutable std::mutex mutex_;
  std::string problem_;
  // Last: it uses the others.
  std::thread thread_;
};

}  // namespace server
