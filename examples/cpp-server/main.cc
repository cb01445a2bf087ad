// A server for clients of Redis, over RocksDB on Pumice. README.md says what it knows and what it promises.

#include <poll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "commands.h"
#include "net.h"

// Pumice's library registers `blobfs://` by this where it was linked statically. The shared library has done so already.
extern "C" void pumice_register_blobfs() __attribute__((weak));

namespace {

using server::Parser;

constexpr char kHelp[] =
    "Serves clients of Redis from RocksDB on Pumice.\n"
    "\n"
    "Usage: cpp-server [--OPTION=VALUE]...\n"
    "  --fs_uri=URI          the file system, such as blobfs:///var/lib/app/kv.img?size:4G&create;\n"
    "                        without it the kernel's\n"
    "  --db=PATH             the database's directory in it [/db]\n"
    "  --bind=ADDRESS        the IPv4 address to listen at [127.0.0.1]; anyone who reaches it may do everything\n"
    "  --port=PORT           the port [6380]; 0: a free one, which the first line of the output names\n"
    "  --sync=always|os      when a write is acknowledged [always]\n"
    "                        always: it is durable, also in a power cut\n"
    "                        os: it outlives the process, however that ends (kill -9 too), but a power cut may\n"
    "                        take the last writes\n"
    "  --follow=HOST:PORT    copy what the server there has and writes from now on; refuse writes of clients\n"
    "  --max-clients=COUNT   connections at a time [1000]; each has a thread\n"
    "  --rate-limit=MIB      what flushes and compactions may write a second [256]; 0: no limit\n"
    "  --log-seconds=S       how long written logs are kept for followers [3600]\n"
    "  --log-mib=MIB         how much of them is kept [1024]\n";

struct Arguments {
  server::Options options;
  std::string bind = "127.0.0.1";
  uint16_t port = 6380;
  std::string follow;
  int max_clients = 1000;
};

// Reads a number in a range.
bool Number(const std::string& text, int64_t least, int64_t most, int64_t* value) {
  return server::ParseInteger(text, value) && *value >= least && *value <= most;
}

// Takes one option; false if it does not exist or its value is wrong.
bool Take(const std::string& name, const std::string& value, Arguments* arguments) {
  int64_t number = 0;
  if (name == "--fs_uri") {
    arguments->options.fs_uri = value;
  } else if (name == "--db") {
    arguments->options.path = value;
  } else if (name == "--bind") {
    arguments->bind = value;
  } else if (name == "--follow") {
    arguments->follow = value;
  } else if (name == "--sync" && (value == "always" || value == "os")) {
    arguments->options.sync = value == "always";
  } else if (name == "--port" && Number(value, 0, 65535, &number)) {
    arguments->port = static_cast<uint16_t>(number);
  } else if (name == "--max-clients" && Number(value, 1, 20000, &number)) {
    arguments->max_clients = static_cast<int>(number);
  } else if (name == "--rate-limit" && Number(value, 0, 1 << 20, &number)) {
    arguments->options.rate = number << 20;
  } else if (name == "--log-seconds" && Number(value, 0, 1 << 30, &number)) {
    arguments->options.log_seconds = static_cast<uint64_t>(number);
  } else if (name == "--log-mib" && Number(value, 0, 1 << 30, &number)) {
    arguments->options.log_mib = static_cast<uint64_t>(number);
  } else {
    return false;
  }
  return true;
}

// The connections and their threads.
class Clients {
 public:
  Clients(server::Context* context, int most) : context_(context), most_(most) {}

  // Serves a connection on a thread of its own.
  void Accept(server::Socket socket) {
    if (context_->clients >= most_) {
      socket.Send("-ERR max number of clients reached\r\n");
      return;
    }
    const uint64_t id = ++last_;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_[id] = socket.fd();
    }
    context_->clients++;
    try {
      std::thread([this, id, owned = std::move(socket)]() mutable { Run(id, std::move(owned)); })
          .detach();
    } catch (const std::system_error& e) {
      std::fprintf(stderr, "a connection was refused: %s\n", e.what());
      Forget(id);
    }
  }

  // Ends all connections and waits for their threads.
  void Stop() {
    stop_ = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (const auto& [id, fd] : open_) {
      shutdown(fd, SHUT_RDWR);
    }
    ended_.wait(lock, [this] { return open_.empty(); });
  }

 private:
  void Forget(uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(id);
    context_->clients--;
    // Under the lock: the object may be gone after it.
    ended_.notify_all();
  }

  void Run(uint64_t id, server::Socket socket) {
    try {
      Serve(id, &socket);
    } catch (const std::exception& e) {
      // A request for which there is no memory ends its connection alone.
      std::fprintf(stderr, "connection %llu: %s\n", static_cast<unsigned long long>(id), e.what());
    }
    // Its number is reused when the socket is closed, so it is forgotten first.
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_[id] = -1;
    }
    socket.Close();
    Forget(id);
  }

  void Serve(uint64_t id, server::Socket* socket) {
    server::Session session;
    session.id = id;
    Parser parser;
    std::string out;
    std::string buffer(64 << 10, '\0');
    while (!session.close && !stop_) {
      const int64_t got = socket->Receive(buffer.data(), buffer.size(), 1000);
      if (got == 0) {
        return;
      }
      if (got < 0) {
        continue;
      }
      parser.Feed(buffer.data(), static_cast<size_t>(got));
      if (!Answer(socket, &session, &parser, &out)) {
        return;
      }
    }
  }

  // Carries out what has arrived completely. False if the connection is over.
  bool Answer(server::Socket* socket, server::Session* session, Parser* parser, std::string* out) {
    server::Arguments request;
    Parser::Found found = Parser::Found::kNothing;
    while (!session->close && (found = parser->Next(&request)) == Parser::Found::kRequest) {
      if (request.empty()) {
        continue;
      }
      server::Execute(context_, session, request, out);
      if (session->follows) {
        server::Lead(socket, context_->store, session->from, &stop_);
        return false;
      }
      // Replies of a long pipeline are sent on the way.
      if (out->size() > (1 << 20) && !Flush(socket, out)) {
        return false;
      }
    }
    if (found == Parser::Found::kError) {
      server::Reply(out).Error(parser->error());
      session->close = true;
    }
    return Flush(socket, out) && !session->close;
  }

  static bool Flush(server::Socket* socket, std::string* out) {
    const bool sent = socket->Send(*out);
    out->clear();
    if (out->capacity() > (4 << 20)) {
      out->shrink_to_fit();
    }
    return sent;
  }

  server::Context* const context_;
  const int most_;
  std::atomic<bool> stop_{false};
  uint64_t last_ = 0;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::map<uint64_t, int> open_;
};

// Accepts connections until a signal says to end.
void AcceptAll(int listener, int signals, Clients* clients) {
  for (;;) {
    pollfd ready[2] = {{listener, POLLIN, 0}, {signals, POLLIN, 0}};
    if (poll(ready, 2, -1) < 0 && errno != EINTR) {
      return;
    }
    if ((ready[1].revents & POLLIN) != 0) {
      return;
    }
    if ((ready[0].revents & POLLIN) == 0) {
      continue;
    }
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) {
      clients->Accept(server::Socket(fd));
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      // It stays in the queue until a descriptor is free.
      std::fprintf(stderr, "accept: %s\n", std::strerror(errno));
      poll(nullptr, 0, 100);
    }
  }
}

int Run(const Arguments& arguments) {
  // Every thread inherits this.
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);
  const int signals = signalfd(-1, &ends, SFD_CLOEXEC);
  if (pumice_register_blobfs != nullptr) {
    pumice_register_blobfs();
  }
  std::unique_ptr<server::Store> store;
  const rocksdb::Status opened = server::Store::Open(arguments.options, &store);
  if (!opened.ok()) {
    std::fprintf(stderr, "cpp-server: %s: %s\n", arguments.options.path.c_str(),
                 opened.ToString().c_str());
    return 1;
  }
  server::Saver saver(store.get());
  std::unique_ptr<server::Follower> follower;
  if (!arguments.follow.empty()) {
    follower = std::make_unique<server::Follower>(store.get(), arguments.follow);
  }
  server::Context context;
  context.store = store.get();
  context.follower = follower.get();
  context.saver = &saver;
  context.options = &arguments.options;
  context.started_ms = server::NowMs();
  std::string error;
  const int listener = server::Listen(arguments.bind, arguments.port, &context.port, &error);
  if (listener < 0) {
    std::fprintf(stderr, "cpp-server: %s\n", error.c_str());
    return 1;
  }
  std::printf("listening at %s:%u\n", arguments.bind.c_str(), context.port);
  std::fflush(stdout);
  Clients clients(&context, arguments.max_clients);
  AcceptAll(listener, signals, &clients);
  close(listener);
  clients.Stop();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; i++) {
    const std::string argument = argv[i];
    if (argument == "--help") {
      std::fputs(kHelp, stdout);
      return 0;
    }
    const size_t equals = argument.find('=');
    if (equals == std::string::npos ||
        !Take(argument.substr(0, equals), argument.substr(equals + 1), &arguments)) {
      std::fprintf(stderr, "cpp-server: %s: no such option or value; --help lists them\n",
                   argument.c_str());
      return 2;
    }
  }
  return Run(arguments);
}
