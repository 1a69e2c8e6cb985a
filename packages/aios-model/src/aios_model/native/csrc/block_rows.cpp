// C ABI of looking rows up in a table that stays in GGUF's blocks. Formats and their layouts: weights/gguf_blocks.py,
// whose results these are, bit for bit: the products are exact, so an offset costs the one rounding that there is.
#include <cstdint>
#include <cstring>

#include "half.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Files lay blocks down at any address.
float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return aios::half_to_float(bits);
}

struct Q4_0 {
  static constexpr int64_t kElements = 32, kBytes = 18;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>((block[2 + i] & 15) - 8) * scale;
      out[i + 16] = static_cast<float>((block[2 + i] >> 4) - 8) * scale;
    }
  }
};

struct Q4_1 {
  static constexpr int64_t kElements = 32, kBytes = 20;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block), offset = half_at(block + 2);
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>(block[4 + i] & 15) * scale + offset;
      out[i + 16] = static_cast<float>(block[4 + i] >> 4) * scale + offset;
    }
  }
};

struct Q8_0 {
  static constexpr int64_t kElements = 32, kBytes = 34;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * scale;
  }
};

struct Q6_K {
  static constexpr int64_t kElements = 256, kBytes = 210;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block + 208);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, run = i % 128 / 32, at = i % 32;
      const int low = block[64 * half + 32 * (run % 2) + at] >> (4 * (run / 2)) & 15;
      const int high = block[128 + 32 * half + at] >> (2 * run) & 3;
      const float group = static_cast<float>(static_cast<int8_t>(block[192 + i / 16])) * scale;
      out[i] = static_cast<float>((low | high << 4) - 32) * group;
    }
  }
};

template <class Format>
void decode_row(const uint8_t* row, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns / Format::kElements; ++i)
    Format::decode(row + i * Format::kBytes, out + i * Format::kElements);
}

using DecodeRow = void (*)(const uint8_t*, int64_t, float*);

// In the order of `ENCODINGS` in weights/block_rows.py.
constexpr DecodeRow kDecodeRow[] = {decode_row<Q4_0>, decode_row<Q4_1>, decode_row<Q8_0>, decode_row<Q6_K>};

}  // namespace

// Rows `index` of table [rows, row_bytes] as floats, out [num_indices, columns]. Returns the place of the first index
// that names no row, in which case nothing is written; -1 if there is none.
AIOS_EXPORT int64_t aios_gather_rows(int32_t encoding, const uint8_t* table, int64_t num_rows, int64_t row_bytes,
                                     int64_t columns, const int64_t* index, int64_t num_indices, float* out) {
  for (int64_t i = 0; i < num_indices; ++i)
    if (index[i] < 0 || index[i] >= num_rows) return i;
  for (int64_t i = 0; i < num_indices; ++i)
    kDecodeRow[encoding](table + index[i] * row_bytes, columns, out + i * columns);
  return -1;
}
