// What lies where in the memory that the ranks of a group share: one file under /dev/shm, mapped by all of them.
//
//     Header            one page: who is there, and whether somebody gave up
//     RankLine [n]      a cache line per rank: how far it is in the group's collectives
//     slots    [n][2]   what a rank shows to the others, double-buffered
//     Channel  [n][n]   a ring of chunks for each ordered pair of ranks
//
// `segment_file.py` creates the file, zero-filled but for the first four fields. It is a few megabytes, whatever the
// tensors: Docker gives a container 64 MB of shared memory, so what is large goes through in pieces.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace aios {

constexpr int kMaxRanks = 64;  // sets of ranks are bits of one word
constexpr int64_t kPage = 4096;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t size;
  uint64_t num_bytes;
  alignas(64) std::atomic<uint64_t> attached;  // a bit for each rank that has mapped the segment
  alignas(64) std::atomic<uint32_t> stopped;   // 0, or why the group is over: reason << 8 | rank
};
static_assert(sizeof(Header) <= kPage && std::atomic<uint64_t>::is_always_lock_free);

struct alignas(64) RankLine {
  std::atomic<uint64_t> published;  // rounds for which this rank's slot is filled
  std::atomic<uint64_t> calls[2];   // what it is doing in the last two of them, for comparison
  std::atomic<uint32_t> closed;
};

constexpr int kRing = 4;

// A ring from one rank to another; each side has a cache line of its own.
struct Channel {
  alignas(64) std::atomic<uint64_t> sent;   // chunks
  alignas(64) std::atomic<uint64_t> taken;
  alignas(64) std::atomic<uint64_t> message_bytes[kRing];  // of the message that a chunk belongs to
};

class Segment {
 public:
  Segment(void* base, int size) : base_(static_cast<char*>(base)), size_(size) {}

  static int64_t slot_bytes(int size) { return rounded(std::min<int64_t>(kLargestSlot, kBudget / (2 * size))); }
  static int64_t chunk_bytes(int size) {
    const int64_t pairs = std::max(1, size * (size - 1));
    return std::max<int64_t>(64, std::min<int64_t>(kLargestChunk, kBudget / pairs / kRing) / 64 * 64);
  }
  static int64_t num_bytes(int size) {
    return slots_at(size) + 2 * size * slot_bytes(size) + size * size * channel_bytes(size);
  }

  Header& header() { return *reinterpret_cast<Header*>(base_); }
  RankLine& line(int rank) { return reinterpret_cast<RankLine*>(base_ + kPage)[rank]; }
  char* slot(int rank, uint64_t round) {
    return base_ + slots_at(size_) + (2 * rank + static_cast<int64_t>(round & 1)) * slot_bytes(size_);
  }
  Channel& channel(int from, int to) { return *reinterpret_cast<Channel*>(channel_at(from, to)); }
  char* chunk(int from, int to, uint64_t index) {
    return channel_at(from, to) + sizeof(Channel) + static_cast<int64_t>(index % kRing) * chunk_bytes(size_);
  }

 private:
  static constexpr int64_t kLargestSlot = 256 << 10;
  static constexpr int64_t kLargestChunk = 128 << 10;
  static constexpr int64_t kBudget = 8 << 20;  // for all slots, and for all channels

  static int64_t rounded(int64_t bytes) { return bytes / kPage * kPage; }
  static int64_t slots_at(int size) {
    const int64_t lines = size * static_cast<int64_t>(sizeof(RankLine));
    return kPage + (lines + kPage - 1) / kPage * kPage;
  }
  static int64_t channel_bytes(int size) { return static_cast<int64_t>(sizeof(Channel)) + kRing * chunk_bytes(size); }
  char* channel_at(int from, int to) {
    const int64_t first = slots_at(size_) + 2 * size_ * slot_bytes(size_);
    return base_ + first + (from * size_ + to) * channel_bytes(size_);
  }

  char* base_;
  int size_;
};

}  // namespace aios
