// What every function that can fail returns: a code and a sentence.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>

namespace heed {

enum class StatusCode : int32_t {  // values as in heed/core.h
  kOk = 0,
  kInvalidArgument = 1,
  kNotSupported = 2,
  kNotFound = 3,
  kOutOfMemory = 4,
  kInitializationFailed = 5,
  kOperationFailed = 6,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const = delete;  // ambiguous: say ok()
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status invalid_argument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
inline Status not_supported(std::string message) { return {StatusCode::kNotSupported, std::move(message)}; }
inline Status not_found(std::string message) { return {StatusCode::kNotFound, std::move(message)}; }
inline Status out_of_memory(std::string message) { return {StatusCode::kOutOfMemory, std::move(message)}; }
inline Status operation_failed(std::string message) { return {StatusCode::kOperationFailed, std::move(message)}; }

// A value or why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : state_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return state_.index() == 0; }
  const Status& status() const {
    static const Status success;
    return ok() ? success : std::get<1>(state_);
  }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace heed

#define HEED_RETURN_IF_ERROR(expression)                                      \
  do {                                                                        \
    if (::heed::Status status_ = (expression); !status_.ok()) return status_; \
  } while (0)
