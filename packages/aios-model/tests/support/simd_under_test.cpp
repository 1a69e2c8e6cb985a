// What tests call of simd.h and its companions: each function works on `count` vectors and writes to `out`.
#include "noise.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace aios;

#define FOR_VECTORS for (int64_t i = 0; i < count * kLanes; i += kLanes)
#define MAP(name, type, expression) \
  AIOS_EXPORT void name(int64_t count, const type* x, float* out) { FOR_VECTORS store(out + i, expression); }
#define MAP_TWO(name, type, expression)                                            \
  AIOS_EXPORT void name(int64_t count, const type* x, const type* y, type* out) {  \
    FOR_VECTORS {                                                                  \
      const auto a = load(x + i), b = load(y + i);                                 \
      store(out + i, expression);                                                  \
      static_cast<void>(b);                                                        \
    }                                                                              \
  }
#define REDUCE(name, type, expression) \
  AIOS_EXPORT void name(int64_t count, const type* x, type* out) { FOR_VECTORS out[i / kLanes] = expression; }

MAP(exps, float, exp(load(x + i)))
MAP(logs, float, aios::log(load(x + i)))
MAP(silus, float, silu(load(x + i)))
MAP(rounds, float, round(load(x + i)))
MAP(widen_bf16s, uint16_t, load_bf16(x + i))
MAP(widen_f16s, uint16_t, load_f16(x + i))
MAP(widen_e4m3s, uint8_t, load_e4m3(x + i))
MAP(widen_u8s, uint8_t, load_u8(x + i))
MAP(widen_i8s, int8_t, load_i8(x + i))

MAP_TWO(maxima, float, max(a, b))
MAP_TWO(minima, float, min(a, b))
MAP_TWO(larger_magnitudes, float, max_magnitude(a, b))
MAP_TWO(integer_products, int32_t, mul(a, b))
MAP_TWO(integer_additions, int32_t, add(a, b))
MAP_TWO(integer_differences, int32_t, sub(a, b))
MAP_TWO(exclusive, int32_t, bits_xor(a, b))
MAP_TWO(common, int32_t, lanes_and(a, b))
MAP_TWO(shifted_left, int32_t, lanes_left<23>(a))
MAP_TWO(shifted_right, int32_t, lanes_right<15>(a))
MAP_TWO(shifted_right_signed, int32_t, lanes_right_signed<23>(a))

REDUCE(sums, float, sum(load(x + i)))
REDUCE(largests, float, largest(load(x + i)))
REDUCE(magnitudes, float, largest_magnitude(load(x + i)))
REDUCE(integer_sums, int32_t, sum(load(x + i)))

AIOS_EXPORT void fmas(int64_t count, const float* x, const float* y, const float* z, float* out) {
  FOR_VECTORS store(out + i, fma(load(x + i), load(y + i), load(z + i)));
}
AIOS_EXPORT void integers(int64_t count, const float* x, int32_t* out) {
  FOR_VECTORS store(out + i, round_to_int(load(x + i)));
}
AIOS_EXPORT void low_bytes(int64_t count, const float* x, int8_t* out) {
  FOR_VECTORS store_low_bytes(out + i, round_to_int(load(x + i)));
}
AIOS_EXPORT void narrow_bf16s(int64_t count, const float* x, uint16_t* out) {
  FOR_VECTORS store_bf16(out + i, load(x + i));
}
AIOS_EXPORT void narrow_bf16_one_by_one(int64_t count, const float* x, uint16_t* out) {
  for (int64_t i = 0; i < count * kLanes; ++i) out[i] = float_to_bf16(x[i]);
}
// `count` counts sixteen bytes: four of them are a vector, of which come sixteen floats for each byte of a lane.
AIOS_EXPORT void bytes_to_floats(int64_t count, const uint8_t* x, float* out) {
  for (int64_t i = 0; i < count / 4; ++i) {
    const bytes64 bytes = load_bytes(x + 64 * i);
    store(out + 64 * i, byte_to_float<0>(bytes));
    store(out + 64 * i + 16, byte_to_float<1>(bytes));
    store(out + 64 * i + 32, byte_to_float<2>(bytes));
    store(out + 64 * i + 48, byte_to_float<3>(bytes));
  }
}
AIOS_EXPORT void dots(int64_t count, const int32_t* start, const uint8_t* u, const int8_t* s, int32_t* out) {
  FOR_VECTORS store(out + i, dot4(load(start + i), load_bytes(u + 4 * i), load_bytes(s + 4 * i)));
}

AIOS_EXPORT void load_part(int64_t, const float* x, const int32_t* number, float* out) {
  store(out, load_first(x, number[0]));
}
AIOS_EXPORT void store_part(int64_t, const float* x, const int32_t* number, const float* before, float* out) {
  store(out, load(before));
  store_first(out, number[0], load(x));
}
AIOS_EXPORT void select_part(int64_t, const float* x, const int32_t* number, const float* y, float* out) {
  store(out, first_lanes(number[0], load(x), load(y)));
}

AIOS_EXPORT void noise(int64_t count, const int32_t* tokens, const int64_t* row, int32_t* out) {
  FOR_VECTORS store(out + i, noise_bits(noise_keys(row[0], row[1]), load(tokens + i)));
}
AIOS_EXPORT void exponentials(int64_t count, const int32_t* tokens, const int64_t* row, float* out) {
  FOR_VECTORS store(out + i, exponential_noise(noise_bits(noise_keys(row[0], row[1]), load(tokens + i))));
}
MAP(exponentials_of_bits, int32_t, exponential_noise(load(x + i)))

AIOS_EXPORT void at_least(int64_t count, const float* x, const float* y, int32_t* out) {
  FOR_VECTORS out[i / kLanes] = static_cast<int32_t>(lanes_at_least(load(x + i), load(y + i)));
}
AIOS_EXPORT void nans(int64_t count, const float* x, const float* y, int32_t* out) {
  FOR_VECTORS out[i / kLanes] = any_nan(load(x + i), load(y + i));
}
AIOS_EXPORT void packed(int64_t count, const float* x, const int32_t* lanes, float* out) {
  FOR_VECTORS pack_lanes(out + i, load(x + i), static_cast<uint32_t>(lanes[i / kLanes]));
}
AIOS_EXPORT void packed_integers(int64_t count, const int32_t* x, const int32_t* lanes, int32_t* out) {
  FOR_VECTORS pack_lanes(out + i, load(x + i), static_cast<uint32_t>(lanes[i / kLanes]));
}
