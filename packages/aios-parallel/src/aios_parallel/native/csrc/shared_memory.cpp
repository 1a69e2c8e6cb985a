// C ABI of the shared-memory communicator.
#include <cerrno>
#include <sys/mman.h>

#include "group.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using aios::Group;
using aios::Segment;

namespace {

struct Mapped {
  void* base;
  int64_t num_bytes;
  Group group;
};

Group& group_of(void* mapped) { return static_cast<Mapped*>(mapped)->group; }

}  // namespace

AIOS_EXPORT int64_t aios_segment_bytes(int32_t size) { return Segment::num_bytes(size); }
AIOS_EXPORT int64_t aios_segment_slot_bytes(int32_t size) { return Segment::slot_bytes(size); }
AIOS_EXPORT int64_t aios_segment_channel_bytes(int32_t size) { return Segment::chunk_bytes(size) * aios::kRing; }

// Maps the file; null if the system refuses.
AIOS_EXPORT void* aios_group_attach(int32_t file, int32_t rank, int32_t size, int64_t spins, int64_t limit,
                                    aios::Counters* counters) {
  const int64_t num_bytes = Segment::num_bytes(size);
  void* base = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED) return nullptr;
  return new Mapped{base, num_bytes, {base, rank, size, spins, limit, counters}};
}

// Marks this rank as present; the ranks that were there before, a bit each.
AIOS_EXPORT uint64_t aios_group_arrive(void* group) {
  return group_of(group).header().attached.fetch_or(uint64_t{1} << group_of(group).rank());
}

AIOS_EXPORT uint64_t aios_group_attached(void* group) { return group_of(group).header().attached.load(); }

AIOS_EXPORT void aios_group_detach(void* group) {
  Mapped* mapped = static_cast<Mapped*>(group);
  mapped->group.leave();
  munmap(mapped->base, static_cast<size_t>(mapped->num_bytes));
  delete mapped;
}

AIOS_EXPORT void aios_group_abort(void* group) { group_of(group).abort(); }

AIOS_EXPORT void aios_group_trace(void* group, aios::SpanRing* ring) { group_of(group).trace(ring); }

// `type` as in `structures.py`.
AIOS_EXPORT int32_t aios_all_reduce(void* group, void* values, int64_t count, int32_t type) {
  Group& all = group_of(group);
  switch (type) {
    case 0: return all.all_reduce<aios::Plain<float>>(static_cast<float*>(values), count);
    case 1: return all.all_reduce<aios::Plain<double>>(static_cast<double*>(values), count);
    case 2: return all.all_reduce<aios::Bfloat16>(static_cast<uint16_t*>(values), count);
    case 3: return all.all_reduce<aios::Float16>(static_cast<uint16_t*>(values), count);
    case 4: return all.all_reduce<aios::Plain<uint32_t>>(static_cast<uint32_t*>(values), count);
    default: return all.all_reduce<aios::Plain<uint64_t>>(static_cast<uint64_t*>(values), count);
  }
}

// A `NativeReduce`. It has nobody to tell of a failure, so that is kept: later calls return at once.
AIOS_EXPORT void aios_reduce(void* group, float* values, int64_t count) {
  group_of(group).all_reduce<aios::Plain<float>>(values, count);
}

AIOS_EXPORT int32_t aios_gather(void* group, const void* in, void* out, int64_t bytes, int32_t to) {
  return group_of(group).gather(static_cast<const char*>(in), static_cast<char*>(out), bytes, to);
}

AIOS_EXPORT int32_t aios_broadcast(void* group, void* values, int64_t bytes, int32_t source) {
  return group_of(group).broadcast(static_cast<char*>(values), bytes, source);
}

AIOS_EXPORT int32_t aios_send(void* group, const void* values, int64_t bytes, int32_t to) {
  return group_of(group).send(static_cast<const char*>(values), bytes, to);
}

AIOS_EXPORT int32_t aios_receive(void* group, void* values, int64_t bytes, int32_t source) {
  return group_of(group).receive(static_cast<char*>(values), bytes, source);
}

AIOS_EXPORT int32_t aios_barrier(void* group) { return group_of(group).barrier(); }
