// Redis' protocol, version 2: requests as bytes arrive, and replies.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace server {

// Bounds of what a client may send. Memory is taken as bytes arrive, never for a length that was only announced.
constexpr size_t kMaxInline = 64 << 10;
constexpr size_t kMaxArguments = 64 << 10;
constexpr size_t kMaxArgument = 16 << 20;
constexpr size_t kMaxRequest = 64 << 20;

using Arguments = std::vector<std::string>;

// Takes requests out of a stream of bytes.
class Parser {
 public:
  enum class Found {
    kRequest,
    // More bytes have to arrive.
    kNothing,
    // The stream is not the protocol; error() says why. Nothing after it can be understood.
    kError,
  };

  explicit Parser(size_t max_argument = kMaxArgument, size_t max_request = kMaxRequest)
      : max_argument_(max_argument), max_request_(max_request) {}
  void Feed(const char* bytes, size_t len) { buffer_.append(bytes, len); }
  // Takes the next request, which may be empty (an empty line).
  Found Next(Arguments* request);
  const std::string& error() const { return error_; }

 private:
  Found Fail(const std::string& why);
  // Takes a line without its end; false if it is not complete.
  bool Line(std::string_view* line);
  Found Inline(std::string_view line, Arguments* request);
  // Reads the number behind the first character of a line.
  bool Number(std::string_view line, size_t most, int64_t* value) const;
  Found Argument(bool* more);
  void Compact();

  const size_t max_argument_;
  const size_t max_request_;
  std::string buffer_;
  // The first byte that was not taken.
  size_t at_ = 0;
  // Where to look for the end of a line: what is before has none.
  size_t looked_ = 0;
  // Arguments of the array that is being read, and how many are missing.
  Arguments array_;
  int64_t missing_ = 0;
  size_t bytes_ = 0;
  // Length of the argument whose bytes are awaited, or -1.
  int64_t length_ = -1;
  std::string error_;
};

// Replies of the server, as bytes.
class Reply {
 public:
  explicit Reply(std::string* out) : out_(out) {}
  void Simple(std::string_view text) { Put('+', text); }
  // `text` begins with the kind of the error, such as ERR.
  void Error(std::string_view text);
  void Integer(int64_t value) { Put(':', std::to_string(value)); }
  void Bulk(std::string_view bytes);
  void Null() { out_->append("$-1\r\n"); }
  void Array(size_t len) { Put('*', std::to_string(len)); }

 private:
  void Put(char kind, std::string_view text);
  std::string* out_;
};

// Reads a whole decimal number; false for anything else.
bool ParseInteger(std::string_view text, int64_t* value);

// Whether a text has the form of a glob pattern of Redis.
bool Matches(std::string_view pattern, std::string_view text);

}  // namespace server
