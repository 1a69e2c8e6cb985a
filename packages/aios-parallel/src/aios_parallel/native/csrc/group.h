// A group of processes as one of them sees it: collectives in rounds, and transfers between two ranks.
//
// A round: every rank fills its slot, says so, waits until all have said so, and reads the slots. There are two slots
// per rank, used in turn. Whoever says "round r + 1" has finished reading round r, and before a rank fills its slot for
// round r + 2 it has waited for everybody's r + 1: so no slot is overwritten while it is read, without a second wait.
//
// The first wait that fails ends the group for good, on all ranks: sums that some have and others do not are of no use.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "patience.h"
#include "segment.h"
#include "span_ring.h"
#include "sums.h"

namespace aios {

// Why a call failed, as in `structures.py`.
enum Status : int32_t { kDone = 0, kTimedOut = 1, kAborted = 2, kPeerGaveUp = 3, kPeerClosed = 4, kMismatch = 5 };

// What the rest of the process may read at any time; the memory is the caller's. As in `structures.py`.
struct Counters {
  std::atomic<int64_t> calls, num_bytes, nanoseconds, inside;
  std::atomic<int32_t> status, culprit;  // of the call that failed first
  std::atomic<uint64_t> missing;         // ranks it was waiting for, a bit each
};

class Group {
 public:
  Group(void* base, int rank, int size, int64_t spins, int64_t limit, Counters* counters)
      : segment_(base, size), rank_(rank), size_(size), spins_(spins), limit_(limit), counters_(*counters) {}

  Counters& counters() { return counters_; }
  Header& header() { return segment_.header(); }
  int rank() const { return rank_; }
  int size() const { return size_; }

  template <class Number>
  int32_t all_reduce(typename Number::Stored* values, int64_t count) {
    const int64_t item = sizeof(typename Number::Stored), most = Segment::slot_bytes(size_) / item;
    return call(kAllReduce, count * item, [&](uint64_t what) {
      int32_t status = kDone;
      for (int64_t at = 0; (at == 0 || at < count) && status == kDone; at += most) {
        const int64_t part = std::min(most, count - at);
        status = size_ > 2 && part * item > kSharedOut ? add_my_share<Number>(values + at, part, what)
                                                       : add_everything<Number>(values + at, part, what);
      }
      return status;
    });
  }

  // All ranks' `bytes`, one after the other, into `out` of rank `to`; of all ranks if it is -1.
  int32_t gather(const char* in, char* out, int64_t bytes, int to) {
    return call(kGather + static_cast<uint64_t>(to + 1), bytes, [&](uint64_t what) {
      return in_slots(bytes, [&](int64_t at, int64_t part) {
        std::memcpy(slot(rank_), in + at, part);
        if (const int32_t status = finish_round(what)) return status;
        if (to == rank_ || to == -1)
          for (int rank = 0; rank < size_; ++rank) std::memcpy(out + rank * bytes + at, last_slot(rank), part);
        return static_cast<int32_t>(kDone);
      });
    });
  }

  int32_t broadcast(char* values, int64_t bytes, int source) {
    return call(kBroadcast + static_cast<uint64_t>(source), bytes, [&](uint64_t what) {
      return in_slots(bytes, [&](int64_t at, int64_t part) {
        if (source == rank_) std::memcpy(slot(rank_), values + at, part);
        if (const int32_t status = finish_round(what)) return status;
        if (source != rank_) std::memcpy(values + at, last_slot(source), part);
        return static_cast<int32_t>(kDone);
      });
    }, source == rank_);
  }

  int32_t barrier() {
    return call(kBarrier, 0, [&](uint64_t what) { return finish_round(what); });
  }

  // Waits only while the ring is full: what fits into it need not be awaited by anybody.
  int32_t send(const char* values, int64_t bytes, int to) {
    Channel& channel = segment_.channel(rank_, to);
    return call(kSend + static_cast<uint64_t>(to), bytes, [&](uint64_t) {
      return in_chunks(bytes, [&](int64_t at, int64_t part) {
        const uint64_t index = channel.sent.load(std::memory_order_relaxed);
        const int32_t status =
            wait_for(to, [&] { return index - channel.taken.load(std::memory_order_acquire) < kRing; });
        if (status) return status;
        std::memcpy(segment_.chunk(rank_, to, index), values + at, part);
        channel.message_bytes[index % kRing].store(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
        channel.sent.store(index + 1, std::memory_order_release);
        return static_cast<int32_t>(kDone);
      });
    });
  }

  int32_t receive(char* values, int64_t bytes, int source) {
    Channel& channel = segment_.channel(source, rank_);
    return call(kReceive + static_cast<uint64_t>(source), bytes, [&](uint64_t) {
      return in_chunks(bytes, [&](int64_t at, int64_t part) {
        const uint64_t index = channel.taken.load(std::memory_order_relaxed);
        const int32_t status =
            wait_for(source, [&] { return channel.sent.load(std::memory_order_acquire) > index; });
        if (status) return status;
        if (channel.message_bytes[index % kRing].load(std::memory_order_relaxed) != static_cast<uint64_t>(bytes))
          return fail(kMismatch, source, 0);
        std::memcpy(values + at, segment_.chunk(source, rank_, index), part);
        channel.taken.store(index + 1, std::memory_order_release);
        return static_cast<int32_t>(kDone);
      });
    }, false);
  }

  // Records calls in `ring` from now on; null for none. For the thread that makes the calls.
  void trace(SpanRing* ring) { ring_ = ring; }

  // Ends all waits of all ranks, from whatever thread.
  void abort() { stop_everybody(kAborted); }

  // What follows in this process fails at once; others learn that nothing more will come from here.
  void leave() {
    leaving_.store(true, std::memory_order_release);
    segment_.line(rank_).closed.store(1, std::memory_order_release);
    while (counters_.inside.load() > 0) sched_yield();
  }

 private:
  // A kind as in `span_ring.py`, and below it the rank that a call names.
  enum Operation : uint64_t {
    kAllReduce = 0x100, kBarrier = 0x200, kBroadcast = 0x300, kGather = 0x400, kSend = 0x500, kReceive = 0x600
  };
  static constexpr int64_t kSharedOut = 32 << 10;  // bytes from which on three ranks and more divide the additions

  // Runs one call: refuses if the group is over, counts and times.
  template <class Body>
  int32_t call(uint64_t operation, int64_t bytes, Body&& body, bool gives = true) {
    if (const int32_t status = counters_.status.load(std::memory_order_relaxed)) return status;
    counters_.inside.fetch_add(1);
    const int64_t started = nanoseconds();
    int32_t status = stopped_by(rank_);
    if (status != kDone) fail(status, rank_, 0);
    else status = body(operation << 48 | static_cast<uint64_t>(bytes));
    const int64_t ended = nanoseconds();
    if (status == kDone) {
      if (ring_ != nullptr) ring_->record(started, ended, static_cast<int64_t>(operation), bytes);
      counters_.num_bytes.fetch_add(gives ? bytes : 0, std::memory_order_relaxed);
      counters_.calls.fetch_add(1, std::memory_order_relaxed);
    }
    counters_.nanoseconds.fetch_add(ended - started, std::memory_order_relaxed);
    counters_.inside.fetch_sub(1);
    return status;
  }

  // body(at, part) for pieces of at most a slot, at least once, until one fails.
  template <class Body>
  int32_t in_slots(int64_t bytes, Body&& body) {
    return in_pieces(bytes, Segment::slot_bytes(size_), body);
  }
  template <class Body>
  int32_t in_chunks(int64_t bytes, Body&& body) {
    return in_pieces(bytes, Segment::chunk_bytes(size_), body);
  }
  template <class Body>
  int32_t in_pieces(int64_t bytes, int64_t most, Body& body) {
    int32_t status = kDone;
    for (int64_t at = 0; (at == 0 || at < bytes) && status == kDone; at += most)
      status = body(at, std::min(most, bytes - at));
    return status;
  }

  char* slot(int rank) { return segment_.slot(rank, round_ + 1); }      // of the round to come
  char* last_slot(int rank) { return segment_.slot(rank, round_); }

  // Everybody adds up everything: one round.
  template <class Number, class Stored = typename Number::Stored>
  int32_t add_everything(Stored* values, int64_t count, uint64_t what) {
    std::memcpy(slot(rank_), values, count * sizeof(Stored));
    if (const int32_t status = finish_round(what)) return status;
    const Stored* parts[kMaxRanks];
    for (int rank = 0; rank < size_; ++rank) parts[rank] = reinterpret_cast<const Stored*>(last_slot(rank));
    add_in_order<Number>(parts, size_, count, values);
    return kDone;
  }

  // Each rank adds up its share and shows the sums in a second round: from three ranks on that reads less of others'
  // memory.
  template <class Number, class Stored = typename Number::Stored>
  int32_t add_my_share(Stored* values, int64_t count, uint64_t what) {
    std::memcpy(slot(rank_), values, count * sizeof(Stored));
    if (const int32_t status = finish_round(what)) return status;
    const Stored* parts[kMaxRanks];
    const int64_t mine = share(rank_, count);
    for (int rank = 0; rank < size_; ++rank) parts[rank] = reinterpret_cast<const Stored*>(last_slot(rank)) + mine;
    Stored* sums = reinterpret_cast<Stored*>(slot(rank_)) + mine;
    add_in_order<Number>(parts, size_, share(rank_ + 1, count) - mine, sums);
    if (const int32_t status = finish_round(what)) return status;
    for (int rank = 0; rank < size_; ++rank) {
      const int64_t start = share(rank, count), end = share(rank + 1, count);
      const Stored* sums = reinterpret_cast<const Stored*>(last_slot(rank));
      std::memcpy(values + start, sums + start, (end - start) * sizeof(Stored));
    }
    return kDone;
  }

  // First element of a rank's share, on a cache line's border.
  int64_t share(int rank, int64_t count) const {
    return rank == size_ ? count : count * rank / size_ / 64 * 64;
  }

  // Says that this rank's slot is filled, and waits for everybody else's.
  int32_t finish_round(uint64_t what) {
    ++round_;
    RankLine& own = segment_.line(rank_);
    own.calls[round_ & 1].store(what, std::memory_order_relaxed);
    own.published.store(round_, std::memory_order_release);
    Patience patience(spins_, limit_);
    for (int rank = 0; rank < size_; ++rank) {
      if (rank == rank_) continue;
      RankLine& line = segment_.line(rank);
      const auto there = [&] { return line.published.load(std::memory_order_acquire) >= round_; };
      if (const int32_t status = wait(patience, rank, there)) return fail(status, rank, late());
      if (line.calls[round_ & 1].load(std::memory_order_relaxed) != what) return fail(kMismatch, rank, 0);
    }
    return kDone;
  }

  template <class Ready>
  int32_t wait_for(int peer, Ready&& ready) {
    Patience patience(spins_, limit_);
    const int32_t status = wait(patience, peer, ready);
    return status ? fail(status, peer, uint64_t{1} << peer) : status;
  }

  template <class Ready>
  int32_t wait(Patience& patience, int peer, Ready& ready) {
    while (!ready()) {
      const int32_t status = stopped_by(peer);
      if (status) return status == kPeerClosed && ready() ? kDone : status;
      if (!patience.wait()) return ready() ? kDone : kTimedOut;
    }
    return kDone;
  }

  int32_t stopped_by(int peer) {
    if (leaving_.load(std::memory_order_acquire)) return kAborted;
    const uint32_t stopped = header().stopped.load(std::memory_order_acquire);
    if (stopped) return (stopped >> 8) == kAborted ? kAborted : kPeerGaveUp;
    return segment_.line(peer).closed.load(std::memory_order_acquire) ? kPeerClosed : kDone;
  }

  // Ranks that have not come to the present round.
  uint64_t late() {
    uint64_t ranks = 0;
    for (int rank = 0; rank < size_; ++rank)
      if (segment_.line(rank).published.load(std::memory_order_acquire) < round_) ranks |= uint64_t{1} << rank;
    return ranks;
  }

  int32_t fail(int32_t status, int peer, uint64_t missing) {
    const uint32_t stopped = header().stopped.load();
    const bool told = status == kAborted || status == kPeerGaveUp;
    counters_.culprit.store(told ? static_cast<int32_t>(stopped & 0xff) : peer);
    counters_.missing.store(missing);
    counters_.status.store(status);
    stop_everybody(status);
    return status;
  }

  void stop_everybody(int32_t reason) {
    uint32_t none = 0;
    header().stopped.compare_exchange_strong(none, static_cast<uint32_t>(reason) << 8 | static_cast<uint32_t>(rank_));
  }

  Segment segment_;
  const int rank_, size_;
  const int64_t spins_, limit_;
  Counters& counters_;
  uint64_t round_ = 0;
  SpanRing* ring_ = nullptr;
  std::atomic<bool> leaving_{false};
};

}  // namespace aios
