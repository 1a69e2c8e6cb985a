// Functions of vectors beyond those in simd.h.
#pragma once

#include "simd_integer.h"

namespace aios {

// Natural logarithm of positive normal numbers, within 2 ulp, near 1 too; others give nothing meaningful.
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)) and a polynomial of degree 8 in m - 1, as in Cephes' logf.
inline f32x16 log(f32x16 x) {
  const i32x16 bits = to_bits(x);
  const i32x16 exponent = lanes_right_signed<23>(sub(bits, splat(int32_t{0x3f3504f3})));  // bits of sqrt(1/2)
  const f32x16 m = sub(from_bits(sub(bits, lanes_left<23>(exponent))), splat(1.0f));
  const f32x16 e = to_float(exponent);
  const f32x16 square = mul(m, m);
  f32x16 p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  f32x16 rest = fma(mul(p, m), square, mul(e, splat(-2.12194440e-4f)));
  rest = fma(square, splat(-0.5f), rest);
  return fma(e, splat(0.693359375f), add(m, rest));
}

}  // namespace aios
