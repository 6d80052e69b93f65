// __nv_bfloat16: the upper half of a float, rounded to nearest even.
#pragma once
#include "cuda_shim.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((uint32_t)h.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};  // NaN, as the hardware makes it
  return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }
inline float __low2float(__nv_bfloat162 h) { return __bfloat162float(h.x); }
inline float __high2float(__nv_bfloat162 h) { return __bfloat162float(h.y); }

inline __nv_bfloat16 emulated_max_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
  float x = __bfloat162float(a), y = __bfloat162float(b);
  if (x != x || y != y) return {0x7fff};
  return x < y || (x == y && a.bits & 0x8000) ? b : a;
}
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {emulated_max_nan(a.x, b.x), emulated_max_nan(a.y, b.y)};
}
