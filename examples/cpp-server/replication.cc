#include "replication.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>

#include "rocksdb/transaction_log.h"

namespace server {

namespace {

using rocksdb::Slice;
using rocksdb::Status;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A follower takes batches of any size that a client can write.
constexpr size_t kMaxBatch = 2 * kMaxRequest;

void Sleep(int ms) { std::this_thread::sleep_for(milliseconds(ms)); }

// One leader's connection to a follower.
class Feed {
 public:
  Feed(Socket* socket, Store* store, Position from, const std::atomic<bool>* stop)
      : socket_(socket), store_(store), at_(from.sequence), stop_(stop) {
    known_ = from.leader == store->identity() && from.sequence <= store->Sequence();
  }

  void Run() {
    while (alive_ && !*stop_) {
      if (!known_) {
        SendAll();
      } else if (at_ < store_->Sequence()) {
        SendUpdates();
      } else {
        Sleep(2);
      }
      if (alive_ && steady_clock::now() - said_ > milliseconds(500)) {
        Message({"AT", std::to_string(store_->Sequence())});
      }
    }
  }

 private:
  void Message(const Arguments& parts) {
    std::string bytes;
    Reply reply(&bytes);
    reply.Array(parts.size());
    for (const std::string& part : parts) {
      reply.Bulk(part);
    }
    alive_ = alive_ && socket_->Send(bytes);
    said_ = steady_clock::now();
  }

  void Batch(const rocksdb::WriteBatch& batch, const std::string& leader, uint64_t sequence) {
    Message({"BATCH", leader, std::to_string(sequence), batch.Data()});
  }

  // Sends every key, as of one moment.
  void SendAll() {
    Message({"RESET"});
    rocksdb::DB* db = store_->db();
    const auto release = [db](const rocksdb::Snapshot* snapshot) { db->ReleaseSnapshot(snapshot); };
    const std::unique_ptr<const rocksdb::Snapshot, decltype(release)> snapshot(db->GetSnapshot(),
                                                                               release);
    rocksdb::ReadOptions options;
    options.snapshot = snapshot.get();
    const std::unique_ptr<rocksdb::Iterator> key(db->NewIterator(options, store_->data()));
    rocksdb::WriteBatch batch;
    for (key->SeekToFirst(); key->Valid() && alive_ && !*stop_; key->Next()) {
      batch.Put(store_->data(), key->key(), key->value());
      if (batch.GetDataSize() > (1 << 20)) {
        Batch(batch, "", 0);
        batch.Clear();
      }
    }
    if (!key->status().ok()) {
      std::fprintf(stderr, "a follower cannot be served: %s\n", key->status().ToString().c_str());
      alive_ = false;
      return;
    }
    if (alive_ && !*stop_) {
      at_ = snapshot->GetSequenceNumber();
      Batch(batch, store_->identity(), at_);
      known_ = true;
    }
  }

  // Sends what the logs have behind the position. If they do not have it any longer, everything is sent.
  void SendUpdates() {
    std::unique_ptr<rocksdb::TransactionLogIterator> log;
    const uint64_t before = at_;
    Status s = store_->db()->GetUpdatesSince(at_ + 1, &log);
    for (; s.ok() && log->Valid() && alive_ && !*stop_; log->Next()) {
      const rocksdb::BatchResult found = log->GetBatch();
      const uint64_t last = found.sequence + found.writeBatchPtr->Count() - 1;
      if (last <= at_) {
        continue;
      }
      if (found.sequence != at_ + 1) {
        known_ = false;
        return;
      }
      at_ = last;
      Batch(*found.writeBatchPtr, store_->identity(), at_);
    }
    // A log that is being moved to the archive is found a little later.
    vain_ = at_ == before ? vain_ + 1 : 0;
    if (vain_ > 50) {
      vain_ = 0;
      known_ = false;
    } else if (vain_ > 0) {
      Sleep(2);
    }
  }

  Socket* const socket_;
  Store* const store_;
  uint64_t at_;
  const std::atomic<bool>* const stop_;
  bool known_ = false;
  bool alive_ = true;
  int vain_ = 0;
  steady_clock::time_point said_{};
};

// Takes the changes of keys out of a leader's batch. What else it has is the leader's own.
class OnlyKeys final : public rocksdb::WriteBatch::Handler {
 public:
  OnlyKeys(rocksdb::ColumnFamilyHandle* data, rocksdb::WriteBatch* out) : data_(data), out_(out) {}

  Status PutCF(uint32_t family, const Slice& key, const Slice& value) override {
    return family == data_->GetID() ? out_->Put(data_, key, value) : Status::OK();
  }
  Status DeleteCF(uint32_t family, const Slice& key) override {
    return family == data_->GetID() ? out_->Delete(data_, key) : Status::OK();
  }
  Status DeleteRangeCF(uint32_t family, const Slice& from, const Slice& to) override {
    return family == data_->GetID() ? out_->DeleteRange(data_, from, to) : Status::OK();
  }

 private:
  rocksdb::ColumnFamilyHandle* const data_;
  rocksdb::WriteBatch* const out_;
};

}  // namespace

void Lead(Socket* socket, Store* store, Position from, const std::atomic<bool>* stop) {
  Feed(socket, store, std::move(from), stop).Run();
}

Follower::Follower(Store* store, std::string leader)
    : store_(store), leader_(std::move(leader)), thread_([this] { Run(); }) {}

Follower::~Follower() {
  stop_ = true;
  thread_.join();
}

void Follower::Say(const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (text != problem_) {
    std::fprintf(stderr, "%s: %s; trying again\n", leader_.c_str(), text.c_str());
  }
  problem_ = text;
}

void Follower::Run() {
  while (!stop_) {
    std::string problem;
    Socket socket = Socket::Connect(leader_, &problem);
    if (socket.IsOpen()) {
      problem = Session(&socket);
      linked_ = false;
    }
    if (!stop_) {
      Say(problem);
      Sleep(200);
    }
  }
}

std::string Follower::Session(Socket* socket) {
  Position position;
  Status s = store_->Followed(&position);
  if (!s.ok()) {
    return s.ToString();
  }
  applied_ = position.sequence;
  std::string request;
  Reply ask(&request);
  ask.Array(3);
  ask.Bulk("FOLLOW");
  ask.Bulk(position.leader);
  ask.Bulk(std::to_string(position.sequence));
  if (!socket->Send(request)) {
    return "the connection was lost";
  }
  Parser parser(kMaxBatch, kMaxBatch + 1024);
  std::string buffer(256 << 10, '\0');
  auto heard = steady_clock::now();
  while (!stop_) {
    const int64_t got = socket->Receive(buffer.data(), buffer.size(), 100);
    if (got == 0) {
      return "the leader has closed the connection";
    }
    if (got < 0) {
      // The leader says something twice a second.
      if (steady_clock::now() - heard > std::chrono::seconds(10)) {
        return "the leader is silent";
      }
      continue;
    }
    heard = steady_clock::now();
    parser.Feed(buffer.data(), static_cast<size_t>(got));
    Arguments message;
    Parser::Found found = Parser::Found::kNothing;
    while ((found = parser.Next(&message)) == Parser::Found::kRequest) {
      s = Take(message);
      if (!s.ok()) {
        return s.ToString();
      }
      linked_ = true;
    }
    if (found == Parser::Found::kError) {
      return parser.error();
    }
  }
  return "stopped";
}

Status Follower::Take(const Arguments& message) {
  const std::string kind = message.empty() ? "" : message[0];
  int64_t sequence = 0;
  if (kind == "RESET" && message.size() == 1) {
    rocksdb::WriteBatch nothing;
    Status s = store_->Apply(&nothing, Position());
    return s.ok() ? store_->Clear(-1) : s;
  }
  if (kind == "AT" && message.size() == 2 && ParseInteger(message[1], &sequence)) {
    leads_ = static_cast<uint64_t>(sequence);
    return Status::OK();
  }
  if (kind == "BATCH" && message.size() == 4 && ParseInteger(message[2], &sequence)) {
    rocksdb::WriteBatch keys;
    OnlyKeys handler(store_->data(), &keys);
    Status s = rocksdb::WriteBatch(message[3]).Iterate(&handler);
    const Position position{message[1], static_cast<uint64_t>(sequence)};
    s = s.ok() ? store_->Apply(&keys, position) : s;
    if (s.ok()) {
      applied_ = position.sequence;
    }
    return s;
  }
  return Status::InvalidArgument("the leader says what this version does not know",
                                 Slice(kind.data(), std::min<size_t>(kind.size(), 100)));
}

std::string Follower::Info() const {
  std::string problem;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    problem = problem_;
  }
  return "role:slave\r\nleader:" + leader_ + "\r\nmaster_link_status:" + (linked_ ? "up" : "down") +
         "\r\napplied_sequence:" + std::to_string(applied_) +
         "\r\nleader_sequence:" + std::to_string(leads_) +
         "\r\nlast_problem:" + problem + "\r\n";
}

}  // namespace server
