// The part of the gflags interface that RocksDB's db_bench_tool.cc uses, so that the gflags library is not needed. Every flag
// is in one list, which the program's own command line reads and sets (db_bench.cc).

#pragma once

#include <strings.h>

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#define GFLAGS_NAMESPACE gflags

namespace gflags {

class Flag {
 public:
  Flag(const char* name_in, const char* type_in, const char* help_in)
      : name(name_in), type(type_in), help(help_in), next(first) {
    first = this;
  }
  virtual ~Flag() = default;
  // Sets the flag, unless `text` is not a value of its type or its validator refuses it.
  virtual bool Set(const char* text) = 0;
  virtual std::string Value() const = 0;
  virtual bool Valid() const = 0;

  const char* const name;
  const char* const type;
  const char* const help;
  Flag* const next;
  static inline Flag* first = nullptr;
};

inline bool Parse(const char* text, std::string* out) {
  *out = text;
  return true;
}

inline bool Parse(const char* text, bool* out) {
  for (const char* yes : {"1", "t", "true", "y", "yes"}) {
    if (strcasecmp(text, yes) == 0) {
      *out = true;
      return true;
    }
  }
  for (const char* no : {"0", "f", "false", "n", "no"}) {
    if (strcasecmp(text, no) == 0) {
      *out = false;
      return true;
    }
  }
  return false;
}

inline bool Parse(const char* text, double* out) {
  char* end = nullptr;
  errno = 0;
  *out = std::strtod(text, &end);
  return errno == 0 && end != text && *end == '\0';
}

template <typename T>
bool Parse(const char* text, T* out) {
  static_assert(std::is_integral_v<T>, "a flag is a number, a switch or a text");
  const std::string digits = text;
  const bool negative = digits.find('-') != std::string::npos;
  const int base = digits.find("0x") == 0 || digits.find("0X") == 0 ? 16 : 10;
  char* end = nullptr;
  errno = 0;
  if constexpr (std::is_signed_v<T>) {
    const long long value = std::strtoll(text, &end, base);
    if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
      return false;
    }
    *out = static_cast<T>(value);
  } else {
    const unsigned long long value = std::strtoull(text, &end, base);
    if (negative || value > std::numeric_limits<T>::max()) {
      return false;
    }
    *out = static_cast<T>(value);
  }
  return errno == 0 && end != text && *end == '\0';
}

inline std::string Show(const std::string& value) { return value; }
inline std::string Show(bool value) { return value ? "true" : "false"; }
template <typename T>
std::string Show(T value) {
  char text[64];
  const auto end = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, end.ptr);
}

template <typename T>
class TypedFlag final : public Flag {
 public:
  TypedFlag(const char* name_in, const char* type_in, const char* help_in, T* value_in)
      : Flag(name_in, type_in, help_in), value(value_in) {}

  bool Set(const char* text) override {
    T parsed{};
    if (!Parse(text, &parsed) || (validate != nullptr && !validate(name, parsed))) {
      return false;
    }
    *value = std::move(parsed);
    return true;
  }
  std::string Value() const override { return Show(*value); }
  bool Valid() const override { return validate == nullptr || validate(name, *value); }

  T* const value;
  bool (*validate)(const char* name, T value) = nullptr;
};

template <typename T>
bool RegisterFlagValidator(const T* value, bool (*validate)(const char* name, T value)) {
  for (Flag* flag = Flag::first; flag != nullptr; flag = flag->next) {
    auto* typed = dynamic_cast<TypedFlag<T>*>(flag);
    if (typed != nullptr && typed->value == value) {
      typed->validate = validate;
      return true;
    }
  }
  return false;
}

inline void SetUsageMessage(const std::string& /*usage*/) {}
inline void SetVersionString(const std::string& /*version*/) {}

// The command line has been read already. As in gflags, every validator is called once more, also for defaults.
inline uint32_t ParseCommandLineFlags(int* /*argc*/, char*** /*argv*/, bool /*remove_flags*/) {
  for (Flag* flag = Flag::first; flag != nullptr; flag = flag->next) {
    if (!flag->Valid()) {
      std::exit(1);
    }
  }
  return 1;
}

}  // namespace gflags

#define PUMICE_FLAG(cpp_type, type, name, value, help) \
  cpp_type FLAGS_##name = value;                       \
  static gflags::TypedFlag<cpp_type> pumice_flag_##name(#name, type, help, &FLAGS_##name)

#define DEFINE_bool(name, value, help) PUMICE_FLAG(bool, "bool", name, value, help)
#define DEFINE_int32(name, value, help) PUMICE_FLAG(int32_t, "int32", name, value, help)
#define DEFINE_uint32(name, value, help) PUMICE_FLAG(uint32_t, "uint32", name, value, help)
#define DEFINE_int64(name, value, help) PUMICE_FLAG(int64_t, "int64", name, value, help)
#define DEFINE_uint64(name, value, help) PUMICE_FLAG(uint64_t, "uint64", name, value, help)
#define DEFINE_double(name, value, help) PUMICE_FLAG(double, "double", name, value, help)
#define DEFINE_string(name, value, help) PUMICE_FLAG(std::string, "string", name, value, help)
