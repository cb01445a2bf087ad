#include "commands.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <optional>
#include <unordered_map>

namespace server {

namespace {

using rocksdb::Status;

// One command with what it works on.
struct Call {
  Context* context;
  Session* session;
  const Arguments& arguments;
  Reply reply;

  Store& store() { return *context->store; }
  int database() const { return session->database; }
  const std::string& operator[](size_t i) const { return arguments[i]; }
  size_t size() const { return arguments.size(); }
  void Ok() { reply.Simple("OK"); }
  void Syntax() { reply.Error("ERR syntax error"); }
  void NoInteger() { reply.Error("ERR value is not an integer or out of range"); }
  // Whether the database has done it; otherwise the client is told.
  bool Done(const Status& s) {
    if (!s.ok()) {
      std::fprintf(stderr, "%s: %s\n", arguments[0].c_str(), s.ToString().c_str());
      reply.Error("ERR the database has failed: " + s.ToString());
    }
    return s.ok();
  }
};

std::string Upper(std::string text) {
  for (char& c : text) {
    c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  }
  return text;
}

void Ping(Call& call) {
  if (call.size() > 1) {
    call.reply.Bulk(call[1]);
  } else {
    call.reply.Simple("PONG");
  }
}

void Echo(Call& call) { call.reply.Bulk(call[1]); }

void Put(Call& call, const std::optional<std::string>& value) {
  if (value) {
    call.reply.Bulk(*value);
  } else {
    call.reply.Null();
  }
}

void Get(Call& call) {
  std::optional<std::string> value;
  if (call.Done(call.store().Get(call.database(), call[1], &value))) {
    Put(call, value);
  }
}

// Reads a time to live of SET; answers and returns false if it is wrong.
bool Expiry(Call& call, const std::string& text, int64_t unit_ms, uint64_t* expire_ms) {
  int64_t count = 0;
  if (!ParseInteger(text, &count)) {
    call.NoInteger();
    return false;
  }
  // Two thousand years are enough.
  if (count <= 0 || count > (int64_t{1} << 46) / unit_ms) {
    call.reply.Error("ERR invalid expire time in 'set' command");
    return false;
  }
  *expire_ms = NowMs() + static_cast<uint64_t>(count * unit_ms);
  return true;
}

void Set(Call& call) {
  uint64_t expire_ms = 0;
  When when = When::kAlways;
  for (size_t i = 3; i < call.size(); i++) {
    const std::string option = Upper(call[i]);
    if ((option == "EX" || option == "PX") && i + 1 < call.size() && expire_ms == 0) {
      if (!Expiry(call, call[++i], option == "EX" ? 1000 : 1, &expire_ms)) {
        return;
      }
    } else if (option == "NX" && when == When::kAlways) {
      when = When::kMissing;
    } else if (option == "XX" && when == When::kAlways) {
      when = When::kPresent;
    } else {
      return call.Syntax();
    }
  }
  bool done = false;
  if (!call.Done(call.store().Set(call.database(), call[1], call[2], expire_ms, when, &done))) {
    return;
  }
  if (done) {
    call.Ok();
  } else {
    call.reply.Null();
  }
}

void SetMany(Call& call) {
  if (call.size() % 2 == 0) {
    return call.reply.Error("ERR wrong number of arguments for 'mset' command");
  }
  std::vector<std::pair<std::string, std::string>> pairs;
  for (size_t i = 1; i < call.size(); i += 2) {
    pairs.emplace_back(call[i], call[i + 1]);
  }
  if (call.Done(call.store().SetMany(call.database(), pairs))) {
    call.Ok();
  }
}

void GetMany(Call& call) {
  std::vector<std::optional<std::string>> values(call.size() - 1);
  size_t bytes = 0;
  for (size_t i = 1; i < call.size(); i++) {
    if (!call.Done(call.store().Get(call.database(), call[i], &values[i - 1]))) {
      return;
    }
    // A key can be named as often as the request is long.
    bytes += values[i - 1] ? values[i - 1]->size() : 0;
    if (bytes > 4 * kMaxRequest) {
      return call.reply.Error("ERR the values are too large for one reply: ask for fewer keys");
    }
  }
  call.reply.Array(values.size());
  for (const auto& value : values) {
    Put(call, value);
  }
}

void Delete(Call& call) {
  int64_t count = 0;
  const std::vector<std::string> keys(call.arguments.begin() + 1, call.arguments.end());
  if (call.Done(call.store().Delete(call.database(), keys, &count))) {
    call.reply.Integer(count);
  }
}

void Exists(Call& call) {
  int64_t count = 0;
  for (size_t i = 1; i < call.size(); i++) {
    int64_t left = 0;
    if (!call.Done(call.store().TimeLeft(call.database(), call[i], &left))) {
      return;
    }
    count += left != -2;
  }
  call.reply.Integer(count);
}

void AddTo(Call& call, int64_t by) {
  std::optional<int64_t> sum;
  if (!call.Done(call.store().Add(call.database(), call[1], by, &sum))) {
    return;
  }
  if (sum) {
    call.reply.Integer(*sum);
  } else {
    call.NoInteger();
  }
}

void Increment(Call& call) { AddTo(call, 1); }

void IncrementBy(Call& call) {
  int64_t by = 0;
  if (ParseInteger(call[2], &by)) {
    AddTo(call, by);
  } else {
    call.NoInteger();
  }
}

void TimeLeft(Call& call, int64_t unit_ms) {
  int64_t ms = 0;
  if (call.Done(call.store().TimeLeft(call.database(), call[1], &ms))) {
    call.reply.Integer(ms < 0 ? ms : (ms + unit_ms - 1) / unit_ms);
  }
}

void TimeLeftSeconds(Call& call) { TimeLeft(call, 1000); }
void TimeLeftMs(Call& call) { TimeLeft(call, 1); }

void Scan(Call& call) {
  int64_t cursor = 0;
  int64_t count = 10;
  std::string pattern = "*";
  if (!ParseInteger(call[1], &cursor) || cursor < 0) {
    return call.reply.Error("ERR invalid cursor");
  }
  for (size_t i = 2; i < call.size(); i += 2) {
    const std::string option = Upper(call[i]);
    if (i + 1 == call.size()) {
      return call.Syntax();
    }
    if (option == "MATCH") {
      pattern = call[i + 1];
    } else if (option != "COUNT") {
      return call.Syntax();
    } else if (!ParseInteger(call[i + 1], &count)) {
      return call.NoInteger();
    } else if (count < 1) {
      return call.Syntax();
    }
  }
  std::string from;
  Cursors& cursors = call.context->cursors;
  if (cursor != 0 && !cursors.Find(static_cast<uint64_t>(cursor), call.database(), &from)) {
    return call.reply.Error("ERR the cursor is too old: begin with 0");
  }
  // A reply is bounded, whatever is asked for.
  int64_t left = std::min<int64_t>(count, 100000);
  size_t room = 8 << 20;
  std::vector<std::string> keys;
  const auto each = [&](std::string_view key) {
    if (left == 0 || room == 0) {
      return false;
    }
    left--;
    if (Matches(pattern, key)) {
      room -= std::min(room, key.size());
      keys.emplace_back(key);
    }
    return true;
  };
  std::optional<std::string> next;
  if (!call.Done(call.store().Scan(call.database(), from, each, &next))) {
    return;
  }
  call.reply.Array(2);
  call.reply.Bulk(next ? std::to_string(cursors.Keep(call.database(), *next)) : "0");
  call.reply.Array(keys.size());
  for (const std::string& key : keys) {
    call.reply.Bulk(key);
  }
}

void CountKeys(Call& call) {
  int64_t count = 0;
  if (call.Done(call.store().Count(call.database(), &count))) {
    call.reply.Integer(count);
  }
}

void ClearOne(Call& call) {
  if (call.Done(call.store().Clear(call.database()))) {
    call.Ok();
  }
}

void ClearAll(Call& call) {
  if (call.Done(call.store().Clear(-1))) {
    call.Ok();
  }
}

// Returns the sections of a text of INFO that a request names, or all of them.
std::string Sections(const std::string& text, const Arguments& request) {
  std::string kept;
  for (size_t from = 0; from < text.size();) {
    const size_t to = std::min(text.find("# ", from + 2), text.size());
    const std::string name = Upper(text.substr(from + 2, text.find('\r', from) - from - 2));
    const auto asks = [&name](const std::string& word) { return Upper(word) == name; };
    if (request.size() == 1 || std::any_of(request.begin() + 1, request.end(), asks)) {
      kept += text.substr(from, to - from);
    }
    from = to;
  }
  return kept;
}

void Info(Call& call) {
  Context& context = *call.context;
  std::string text = "# Server\r\nserver:pumice-cpp-server\r\nredis_version:7.0.0\r\ntcp_port:";
  text += std::to_string(context.port) + "\r\nuptime_in_seconds:";
  text += std::to_string((NowMs() - context.started_ms) / 1000) + "\r\n";
  text += "# Clients\r\nconnected_clients:" + std::to_string(context.clients) + "\r\n";
  text += "# Persistence\r\nsync:" + std::string(context.options->sync ? "always" : "os") + "\r\n";
  text += "log_syncs:" + std::to_string(call.store().Syncs()) + "\r\n" + context.saver->Info();
  text += "# Stats\r\ntotal_commands_processed:" + std::to_string(context.commands) + "\r\n";
  text += "# Replication\r\n";
  text += context.follower != nullptr ? context.follower->Info() : "role:master\r\n";
  text += "master_replid:" + call.store().identity() + "\r\n";
  text += "sequence:" + std::to_string(call.store().Sequence()) + "\r\n";
  text += "# RocksDB\r\n";
  for (const char* name : {"estimate-num-keys", "live-sst-files-size", "total-blob-file-size",
                           "num-running-compactions", "background-errors"}) {
    text += std::string(name) + ":" + call.store().Property(std::string("rocksdb.") + name) + "\r\n";
  }
  call.reply.Bulk(Sections(text, call.arguments));
}

void Config(Call& call) {
  if (Upper(call[1]) != "GET" || call.size() != 3) {
    return call.reply.Error("ERR only CONFIG GET NAME is known: options are set on the command line");
  }
  const std::pair<const char*, std::string> known[] = {
      {"appendonly", "yes"},
      {"appendfsync", call.context->options->sync ? "always" : "no"},
      {"databases", std::to_string(kDatabases)},
      {"port", std::to_string(call.context->port)},
      {"save", ""}};
  std::vector<std::string> found;
  for (const auto& [name, value] : known) {
    if (Matches(call[2], name)) {
      found.emplace_back(name);
      found.push_back(value);
    }
  }
  call.reply.Array(found.size());
  for (const std::string& text : found) {
    call.reply.Bulk(text);
  }
}

void Select(Call& call) {
  int64_t database = 0;
  if (!ParseInteger(call[1], &database)) {
    return call.NoInteger();
  }
  if (database < 0 || database >= kDatabases) {
    return call.reply.Error("ERR DB index is out of range");
  }
  call.session->database = static_cast<int>(database);
  call.Ok();
}

void Save(Call& call) {
  std::string name = call.size() > 1 ? call[1] : std::to_string(NowMs());
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
  };
  if (name.empty() || name.size() > 64 || !std::all_of(name.begin(), name.end(), plain)) {
    return call.reply.Error("ERR a checkpoint's name has up to 64 letters, digits and hyphens");
  }
  if (call.context->saver->Start(name)) {
    call.reply.Simple("Background saving started");
  } else {
    call.reply.Error("ERR Background save already in progress");
  }
}

void LastSave(Call& call) { call.reply.Integer(call.context->saver->last_s()); }

void Client(Call& call) {
  const std::string what = Upper(call[1]);
  if (what == "SETNAME" && call.size() == 3) {
    call.session->name = call[2].substr(0, 256);
    call.Ok();
  } else if (what == "GETNAME" && call.size() == 2) {
    call.reply.Bulk(call.session->name);
  } else if (what == "ID" && call.size() == 2) {
    call.reply.Integer(static_cast<int64_t>(call.session->id));
  } else if (what == "SETINFO" && call.size() == 4) {
    call.Ok();
  } else {
    call.reply.Error("ERR only CLIENT SETNAME, GETNAME, ID and SETINFO are known");
  }
}

void Quit(Call& call) {
  call.session->close = true;
  call.Ok();
}

void Follow(Call& call) {
  int64_t sequence = 0;
  if (!ParseInteger(call[2], &sequence) || sequence < 0) {
    return call.NoInteger();
  }
  call.session->follows = true;
  call.session->from = {call[1], static_cast<uint64_t>(sequence)};
}

void List(Call& call);

struct Command {
  void (*run)(Call&);
  // Arguments with the name.
  size_t least;
  size_t most;
  bool writes;
};

constexpr size_t kAny = kMaxArguments;

const std::unordered_map<std::string, Command>& Commands() {
  static const std::unordered_map<std::string, Command> commands = {
      {"PING", {Ping, 1, 2, false}},
      {"ECHO", {Echo, 2, 2, false}},
      {"GET", {Get, 2, 2, false}},
      {"SET", {Set, 3, kAny, true}},
      {"MSET", {SetMany, 3, kAny, true}},
      {"MGET", {GetMany, 2, kAny, false}},
      {"DEL", {Delete, 2, kAny, true}},
      {"EXISTS", {Exists, 2, kAny, false}},
      {"INCR", {Increment, 2, 2, true}},
      {"INCRBY", {IncrementBy, 3, 3, true}},
      {"TTL", {TimeLeftSeconds, 2, 2, false}},
      {"PTTL", {TimeLeftMs, 2, 2, false}},
      {"SCAN", {Scan, 2, kAny, false}},
      {"DBSIZE", {CountKeys, 1, 1, false}},
      {"FLUSHDB", {ClearOne, 1, 2, true}},
      {"FLUSHALL", {ClearAll, 1, 2, true}},
      {"INFO", {Info, 1, kAny, false}},
      {"CONFIG", {Config, 2, kAny, false}},
      {"COMMAND", {List, 1, kAny, false}},
      {"SELECT", {Select, 2, 2, false}},
      {"BGSAVE", {Save, 1, 2, false}},
      {"LASTSAVE", {LastSave, 1, 1, false}},
      {"CLIENT", {Client, 2, kAny, false}},
      {"QUIT", {Quit, 1, 1, false}},
      {"FOLLOW", {Follow, 3, 3, false}},
  };
  return commands;
}

void List(Call& call) {
  const std::string what = call.size() > 1 ? Upper(call[1]) : "";
  if (what == "COUNT") {
    call.reply.Integer(static_cast<int64_t>(Commands().size()));
  } else if (what == "DOCS" || what == "INFO") {
    // Clients do without.
    call.reply.Array(0);
  } else if (what.empty() || what == "LIST") {
    call.reply.Array(Commands().size());
    for (const auto& command : Commands()) {
      call.reply.Bulk(command.first);
    }
  } else {
    call.reply.Error("ERR only COMMAND, COMMAND COUNT, DOCS, INFO and LIST are known");
  }
}

}  // namespace

uint64_t Cursors::Keep(int database, std::string next) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t cursor = ++last_;
  places_[cursor % places_.size()] = {cursor, database, std::move(next)};
  return cursor;
}

bool Cursors::Find(uint64_t cursor, int database, std::string* next) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Place& place = places_[cursor % places_.size()];
  *next = place.next;
  return place.cursor == cursor && place.database == database;
}

Saver::~Saver() {
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool Saver::Start(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (busy_) {
    return false;
  }
  if (thread_.joinable()) {
    thread_.join();
  }
  busy_ = true;
  thread_ = std::thread([this, name] {
    const Status s = store_->Checkpoint(name);
    if (!s.ok()) {
      std::fprintf(stderr, "BGSAVE %s: %s\n", name.c_str(), s.ToString().c_str());
    }
    failed_ = !s.ok();
    if (s.ok()) {
      last_s_ = static_cast<int64_t>(std::time(nullptr));
    }
    busy_ = false;
  });
  return true;
}

std::string Saver::Info() const {
  return std::string("rdb_bgsave_in_progress:") + (busy_ ? "1" : "0") +
         "\r\nrdb_last_bgsave_status:" + (failed_ ? "err" : "ok") + "\r\n";
}

void Execute(Context* context, Session* session, const Arguments& request, std::string* out) {
  context->commands++;
  Call call{context, session, request, Reply(out)};
  const auto found = Commands().find(request[0].size() > 32 ? "" : Upper(request[0]));
  if (found == Commands().end()) {
    return call.reply.Error("ERR unknown command '" + request[0].substr(0, 128) + "'");
  }
  const Command& command = found->second;
  if (request.size() < command.least || request.size() > command.most) {
    return call.reply.Error("ERR wrong number of arguments for '" + request[0] + "' command");
  }
  if (command.writes && context->follower != nullptr) {
    return call.reply.Error("READONLY You can't write against a read only replica.");
  }
  command.run(call);
}

}  // namespace server
