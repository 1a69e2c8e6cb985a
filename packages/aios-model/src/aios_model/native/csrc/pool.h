// The one thread pool: a few threads that walk through the same phases of a job together and share each phase's items.
//
// A step of the model runs as one job of some hundred phases. Whoever is free takes the next item; a phase is over when
// its items are done. It is not necessary that every thread has been there: cores are shared with other programs, and a
// thread that was put to sleep for a few milliseconds would keep all others waiting at an ordinary barrier. It walks
// through what the others have done meanwhile and joins them. Waiting spins for a moment (being woken costs 50 µs, a
// phase may take 5), then gives way.
//
// Which thread computes an item never matters to the result: an item is computed by one thread, in one order.
//
// The pool is created once, by aios_model's library; the libraries above receive its address.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "simd.h"

namespace aios {

class Pool;

// One thread's view of a running job.
class Team {
 public:
  Team(Pool& pool, int rank, int size) : pool_(pool), rank_(rank), size_(size) {}
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Calls body(i) once for each i in [0, count), on whichever thread is free; returns when all of them are done. Every
  // thread of the job makes the same calls in the same order. Between two calls a thread may touch only what is its own
  // or does not change during the job: others may be some phases ahead.
  template <class Body>
  void for_each(int64_t count, Body&& body);

  // The same for small things of which neighbours share cache lines: a thread takes some in a row, since two cores that
  // take turns at a line wait for it each time.
  template <class Body>
  void for_each_in_runs(int64_t count, Body&& body) {
    const int64_t run = std::clamp<int64_t>(count / (4 * size_), 1, kLongestRun);
    for_each((count + run - 1) / run, [&](int64_t item) {
      const int64_t end = std::min(count, (item + 1) * run);
      for (int64_t i = item * run; i < end; ++i) body(i);
    });
  }

 private:
  friend class Pool;
  static constexpr int64_t kLongestRun = 16;
  Pool& pool_;
  int rank_, size_;
  int phase_ = 0;
};

class Pool {
 public:
  using Job = void (*)(void* context, Team& team);

  // cpus[i] is the core that thread i is bound to, or null to bind none; thread 0 is the caller of run(), never bound.
  Pool(int num_threads, const int32_t* cpus) : size_(num_threads < 1 ? 1 : num_threads), phases_(kMaxPhases) {
    try {
      for (int rank = 1; rank < size_; ++rank)
        workers_.emplace_back([this, rank, cpu = cpus ? cpus[rank] : -1] { work(rank, cpu); });
    } catch (...) {  // the system grants no more threads
      stop();
      throw;
    }
  }

  ~Pool() { stop(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs body(team) on every thread that comes in time, and returns when it is done. One job at a time: callers on
  // several threads of the process (two engines, say) wait for each other.
  template <class Body>
  void run(Body&& body) {
    const std::lock_guard<std::mutex> one_job(running_);
    Team team(*this, 0, size_);
    if (size_ == 1) return body(team);
    job_ = [](void* context, Team& team) { (*static_cast<std::remove_reference_t<Body>*>(context))(team); };
    context_ = const_cast<void*>(static_cast<const void*>(&body));
    inside_.fetch_and(~kClosed, std::memory_order_acq_rel);  // who came late to the last job may still be counted
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) generation_.notify_all();
    body(team);
    // No one may enter from now on, and everyone who did must have left: they look at what lies on our stack.
    int inside = inside_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; (inside & ~kClosed) != 0; inside = inside_.load(std::memory_order_acquire)) wait_a_little(spins++);
    for (int phase = 0; phase < std::min(team.phase_, kMaxPhases); ++phase) phases_[phase].reset();
  }

 private:
  friend class Team;

  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
    void reset() {
      next.store(0, std::memory_order_relaxed);
      done.store(0, std::memory_order_relaxed);
    }
  };

  static constexpr int kMaxPhases = 4096;  // of a job; one of 100 layers has about 1,100
  static constexpr int kClosed = 1 << 30;
  static constexpr int kSpins = 200;         // about 10 µs on recent Intel cores, where a pause takes 140 cycles
  static constexpr int kIdleSpins = 40000;   // about 2 ms: longer than Python takes between two steps

  static void wait_a_little(int spins) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
  }

  void stop() {
    stopping_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void work(int rank, int cpu) {
    bind(cpu);
    for (uint32_t seen = 0;;) {
      seen = wait_for_job(seen);
      if (stopping_.load()) return;
      if ((inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0) {
        Team team(*this, rank, size_);
        job_(context_, team);
      }
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint32_t wait_for_job(uint32_t seen) {
    for (int spins = 0; spins < kIdleSpins; ++spins) {
      const uint32_t now = generation_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
      if (spins % 256 == 255) std::this_thread::yield();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (generation_.load(std::memory_order_seq_cst) == seen) generation_.wait(seen);
    sleepers_.fetch_sub(1);
    return generation_.load(std::memory_order_acquire);
  }

  static void bind([[maybe_unused]] int cpu) {
#if defined(__linux__)
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#endif
  }

  const int size_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::vector<Phase> phases_;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> inside_{kClosed};  // workers that entered the job; kClosed once it is over
  std::mutex running_;
  std::vector<std::thread> workers_;
};

template <class Body>
void Team::for_each(int64_t count, Body&& body) {
  if (size_ == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  if (phase_ >= Pool::kMaxPhases) {  // a longer job than we know of: the caller does the rest alone
    ++phase_;
    if (rank_ == 0)
      for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Pool::Phase& phase = pool_.phases_[phase_++];
  int64_t mine = 0;
  for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) body(i);
  if (mine) phase.done.fetch_add(mine, std::memory_order_acq_rel);
  for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; ++spins) Pool::wait_a_little(spins);
}

}  // namespace aios
