// __half: IEEE binary16, rounded to nearest even.
#pragma once
#include "cuda_shim.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // a multiple of 2^-24
    float x = (float)fraction * 0x1p-24f;
    return sign ? -x : x;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float x) {
  uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t out;
  if (bits > 0x7f800000u) {
    return {0x7fff};  // NaN, as the hardware makes it
  } else if (bits >= 0x477ff000u) {  // 65520 and more
    out = 0x7c00;
  } else if (bits < 0x38800000u) {  // below 2^-14: float addition rounds to a multiple of 2^-24
    out = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
  } else {
    out = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {(unsigned short)(sign | out)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }

inline __half emulated_max_nan(__half a, __half b) {
  float x = __half2float(a), y = __half2float(b);
  if (x != x || y != y) return {0x7fff};
  return x < y || (x == y && a.bits & 0x8000) ? b : a;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {emulated_max_nan(a.x, b.x), emulated_max_nan(a.y, b.y)}; }
