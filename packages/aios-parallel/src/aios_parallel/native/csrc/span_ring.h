// Where a group records its exchanges while it is traced: the memory is the caller's, as in `tracing/span_ring.py`.
#pragma once

#include <cstdint>

namespace aios {

struct Span {
  int64_t begin, end;  // nanoseconds
  int64_t label, amount;
};

struct SpanRing {
  Span* spans;
  int64_t capacity, count;

  void record(int64_t begin, int64_t end, int64_t label, int64_t amount) {
    spans[count % capacity] = {begin, end, label, amount};
    ++count;
  }
};

}  // namespace aios
