#include "resp.h"

#include <charconv>

namespace server {

Parser::Found Parser::Fail(const std::string& why) {
  error_ = "ERR Protocol error: " + why;
  return Found::kError;
}

bool Parser::Line(std::string_view* line) {
  const size_t end = buffer_.find('\n', looked_ > at_ ? looked_ : at_);
  if (end == std::string::npos) {
    looked_ = buffer_.size();
    return false;
  }
  size_t len = end - at_;
  if (len > 0 && buffer_[end - 1] == '\r') {
    len--;
  }
  *line = std::string_view(buffer_).substr(at_, len);
  at_ = end + 1;
  return true;
}

bool Parser::Number(std::string_view line, size_t most, int64_t* value) const {
  return ParseInteger(line.substr(1), value) && *value <= static_cast<int64_t>(most);
}

void Parser::Compact() {
  // Each byte is moved a bounded number of times.
  if (at_ == buffer_.size()) {
    buffer_.clear();
  } else if (at_ > buffer_.size() / 2) {
    buffer_.erase(0, at_);
  } else {
    return;
  }
  at_ = 0;
  looked_ = 0;
  if (buffer_.empty() && buffer_.capacity() > (1 << 20)) {
    buffer_.shrink_to_fit();
  }
}

Parser::Found Parser::Inline(std::string_view line, Arguments* request) {
  request->clear();
  size_t at = 0;
  while (at < line.size()) {
    const size_t from = line.find_first_not_of(" \t", at);
    if (from == std::string_view::npos) {
      break;
    }
    if (line[from] == '"' || line[from] == '\'') {
      const size_t to = line.find(line[from], from + 1);
      if (to == std::string_view::npos) {
        return Fail("unbalanced quotes in request");
      }
      request->emplace_back(line.substr(from + 1, to - from - 1));
      at = to + 1;
    } else {
      const size_t to = line.find_first_of(" \t", from);
      request->emplace_back(line.substr(from, to - from));
      at = to == std::string_view::npos ? line.size() : to;
    }
  }
  return Found::kRequest;
}

// Takes one argument of an array. `*more` says whether it was complete.
Parser::Found Parser::Argument(bool* more) {
  *more = false;
  if (length_ < 0) {
    std::string_view line;
    if (!Line(&line)) {
      return buffer_.size() - at_ > kMaxInline ? Fail("too big bulk count string")
                                               : Found::kNothing;
    }
    if (line.empty() || line[0] != '$') {
      return Fail("expected '$', got something else");
    }
    if (!Number(line, max_argument_, &length_) || length_ < 0) {
      return Fail("invalid bulk length");
    }
    bytes_ += static_cast<size_t>(length_);
    if (bytes_ > max_request_) {
      return Fail("too big request");
    }
  }
  const size_t length = static_cast<size_t>(length_);
  if (buffer_.size() - at_ < length + 2) {
    return Found::kNothing;
  }
  if (buffer_[at_ + length] != '\r' || buffer_[at_ + length + 1] != '\n') {
    return Fail("a bulk is longer than its length");
  }
  array_.emplace_back(buffer_, at_, length);
  at_ += length + 2;
  length_ = -1;
  missing_--;
  *more = true;
  return Found::kNothing;
}

Parser::Found Parser::Next(Arguments* request) {
  if (!error_.empty()) {
    return Found::kError;
  }
  if (missing_ == 0) {
    Compact();
    std::string_view line;
    if (!Line(&line)) {
      return buffer_.size() - at_ > kMaxInline ? Fail("too big inline request") : Found::kNothing;
    }
    if (line.size() > kMaxInline) {
      return Fail("too big inline request");
    }
    if (line.empty() || line[0] != '*') {
      return Inline(line, request);
    }
    if (!Number(line, kMaxArguments, &missing_)) {
      missing_ = 0;
      return Fail("invalid multibulk length");
    }
    array_.clear();
    bytes_ = 0;
    if (missing_ <= 0) {
      missing_ = 0;
      request->clear();
      return Found::kRequest;
    }
  }
  while (missing_ > 0) {
    bool more = false;
    const Found found = Argument(&more);
    if (!more) {
      Compact();
      return found;
    }
  }
  *request = std::move(array_);
  array_ = Arguments();
  return Found::kRequest;
}

void Reply::Put(char kind, std::string_view text) {
  out_->push_back(kind);
  out_->append(text);
  out_->append("\r\n");
}

void Reply::Error(std::string_view text) {
  // What a client has sent may be part of it.
  std::string line(text.substr(0, 512));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ') {
      c = ' ';
    }
  }
  Put('-', line);
}

void Reply::Bulk(std::string_view bytes) {
  Put('$', std::to_string(bytes.size()));
  out_->append(bytes);
  out_->append("\r\n");
}

bool ParseInteger(std::string_view text, int64_t* value) {
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, *value);
  return !text.empty() && parsed.ec == std::errc() && parsed.ptr == end;
}

namespace {

// Whether the character is in the class that begins behind `[` at `*at`, which is moved behind it.
bool InClass(std::string_view pattern, size_t* at, char c) {
  bool found = false;
  const bool negated = *at < pattern.size() && pattern[*at] == '^';
  if (negated) {
    ++*at;
  }
  for (; *at < pattern.size() && pattern[*at] != ']'; ++*at) {
    if (pattern[*at] == '\\' && *at + 1 < pattern.size()) {
      ++*at;
      found |= pattern[*at] == c;
    } else if (*at + 2 < pattern.size() && pattern[*at + 1] == '-' && pattern[*at + 2] != ']') {
      const auto low = static_cast<unsigned char>(pattern[*at]);
      const auto high = static_cast<unsigned char>(pattern[*at + 2]);
      const auto asked = static_cast<unsigned char>(c);
      found |= (low <= asked && asked <= high) || (high <= asked && asked <= low);
      *at += 2;
    } else {
      found |= pattern[*at] == c;
    }
  }
  if (*at < pattern.size()) {
    ++*at;
  }
  return found != negated;
}

// Whether the element of the pattern at `*at` stands for the character; moves `*at` behind it.
bool Stands(std::string_view pattern, size_t* at, char c) {
  const char element = pattern[(*at)++];
  switch (element) {
    case '?':
      return true;
    case '[':
      return InClass(pattern, at, c);
    case '\\':
      if (*at < pattern.size()) {
        return pattern[(*at)++] == c;
      }
      return c == '\\';
    default:
      return element == c;
  }
}

}  // namespace

bool Matches(std::string_view pattern, std::string_view text) {
  size_t in_pattern = 0;
  size_t in_text = 0;
  // The last star, and where the text goes on if it stands for one character more. Going back to the last one is enough.
  size_t star = std::string_view::npos;
  size_t resume = 0;
  while (in_text < text.size()) {
    if (in_pattern < pattern.size() && pattern[in_pattern] == '*') {
      star = ++in_pattern;
      resume = in_text;
      continue;
    }
    if (in_pattern < pattern.size() && Stands(pattern, &in_pattern, text[in_text])) {
      in_text++;
      continue;
    }
    if (star == std::string_view::npos) {
      return false;
    }
    in_pattern = star;
    in_text = ++resume;
  }
  while (in_pattern < pattern.size() && pattern[in_pattern] == '*') {
    in_pattern++;
  }
  return in_pattern == pattern.size();
}

}  // namespace server
