// A connected socket.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace server {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd);
  Socket(Socket&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Socket& operator=(Socket&& other) noexcept;
  Socket(const Socket&) = delete;
  ~Socket() { Close(); }

  // Connects to HOST:PORT. On failure the socket is not open, and `*error` says why.
  static Socket Connect(const std::string& address, std::string* error);

  bool IsOpen() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  void Close();
  // Sends all bytes; false if the peer is gone or takes nothing for half a minute.
  bool Send(std::string_view bytes);
  // Receives some bytes: their number, 0 at the end of the stream or on an error, -1 if nothing came for `wait_ms`.
  int64_t Receive(char* buffer, size_t len, int wait_ms);

 private:
  int fd_ = -1;
};

// Opens a socket that listens at ADDRESS:PORT (0: any). Returns -1 and says why in `*error`; `*bound` is the port.
int Listen(const std::string& address, uint16_t port, uint16_t* bound, std::string* error);

}  // namespace server
