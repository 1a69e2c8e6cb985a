// Waiting for another process: spinning first, since a sum of some thousand floats takes 4 µs and being woken 50; then
// giving way, for there may be more ranks than cores; then sleeping, so that a rank that waits idly leaves its core.
#pragma once

#include <cerrno>
#include <cstdint>
#include <ctime>
#include <sched.h>

#include "simd.h"

namespace aios {

inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

class Patience {
 public:
  // `spins`: pauses before giving way, some 50 ns each on recent Intel cores; `limit`: nanoseconds.
  Patience(int64_t spins, int64_t limit) : spins_(spins), limit_(limit) {}

  // Lets a moment pass. False once the time is over: look a last time then, for who was stopped itself sees its time
  // run out although nobody else was late.
  bool wait() {
    if (turns_++ < spins_) {
      pause();
      return true;
    }
    const int64_t now = nanoseconds();
    if (started_ == 0) started_ = now;
    const int64_t waited = now - started_;
    if (waited > limit_) return false;
    if (waited < kYielding) sched_yield();
    else sleep(waited < kDrowsy ? kNap : kSleep);
    return true;
  }

 private:
  static constexpr int64_t kYielding = 3'000'000;
  static constexpr int64_t kDrowsy = 100'000'000;
  static constexpr int64_t kNap = 50'000;
  static constexpr int64_t kSleep = 500'000;

  static void sleep(int64_t duration) {
    const timespec time{0, static_cast<long>(duration)};
    nanosleep(&time, nullptr);
  }

  const int64_t spins_, limit_;
  int64_t turns_ = 0, started_ = 0;
};

}  // namespace aios
