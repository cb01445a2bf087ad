// The commands of Redis that this server knows.

#pragma once

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "replication.h"
#include "resp.h"
#include "store.h"

namespace server {

// What belongs to one connection.
struct Session {
  uint64_t id = 0;
  int database = 0;
  std::string name;
  // The connection ends after the replies.
  bool close = false;
  // The peer becomes a follower after the replies.
  bool follows = false;
  Position from;
};

// Where SCAN goes on. A cursor is a number for the client; what it stands for is kept for the latest ones.
class Cursors {
 public:
  uint64_t Keep(int database, std::string next);
  bool Find(uint64_t cursor, int database, std::string* next);

 private:
  struct Place {
    uint64_t cursor = 0;
    int database = 0;
    std::string next;
  };
  std::mutex mutex_;
  uint64_t last_ = 0;
  std::array<Place, 4096> places_;
};

// The thread that makes checkpoints.
class Saver {
 public:
  explicit Saver(Store* store) : store_(store) {}
  ~Saver();
  // False if one is being made.
  bool Start(const std::string& name);
  std::string Info() const;
  int64_t last_s() const { return last_s_; }

 private:
  Store* const store_;
  std::mutex mutex_;
  std::thread thread_;
  std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> last_s_{0};
};

// The server as its commands see it.
struct Context {
  Store* store = nullptr;
  // Null for a leader.
  Follower* follower = nullptr;
  Saver* saver = nullptr;
  const Options* options = nullptr;
  uint16_t port = 0;
  uint64_t started_ms = 0;
  std::atomic<uint64_t> commands{0};
  std::atomic<int> clients{0};
  Cursors cursors;
};

// Carries out a request, which is not empty, and appends the reply.
void Execute(Context* context, Session* session, const Arguments& request, std::string* out);

}  // namespace server
