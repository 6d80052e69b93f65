// CUDA C++ for g++: the keywords, built-in variables and functions that kernels use. Included before every source.
#pragma once
#include <math.h>
#include <stdint.h>

#include "runtime.h"

#undef __restrict__
#define __restrict__  // loads stay in the order of the source
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// All __shared__ variables of a unit lie in one section, which is poisoned before each block. Those that are `extern`
// are the dynamic shared memory: build.py turns them into pointers to it.
#define __shared__ static __attribute__((section("emulated_shared")))
// The size of a kernel's clusters is told by the section that its code is in.
#define EMULATED_CLUSTER(x) __attribute__((section("emulated_cluster_" #x)))
#define __cluster_dims__(x, ...) EMULATED_CLUSTER(x)

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block)
#define blockDim (emulated::self->block_dim)
#define gridDim (emulated::self->grid_dim)

// ---- vectors

#define VECTORS(T, name, bytes)                                                                          \
  struct alignas(2 * bytes) name##2 {                                                                    \
    T x, y;                                                                                              \
  };                                                                                                     \
  struct name##3 {                                                                                       \
    T x, y, z;                                                                                           \
  };                                                                                                     \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 {                                              \
    T x, y, z, w;                                                                                        \
  };                                                                                                     \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                             \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float, 4)
VECTORS(int, int, 4)
VECTORS(unsigned, uint, 4)
VECTORS(unsigned short, ushort, 2)
#undef VECTORS

// ---- numbers

template <typename To, typename From> To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// Fast ones are a little less exact on a GPU.
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }

// ---- memory

template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T> T __ldcs(const T* from) { return *from; }
template <typename T> void __stcg(T* to, T x) { *to = x; }
template <typename T> void __stcs(T* to, T x) { *to = x; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline size_t __cvta_generic_to_shared(const void* pointer) { return emulated::shared_offset(pointer); }

// Threads change places at barriers and exchanges only.
template <typename T, typename F> T emulated_atomic(T* at, F change) {
  T old = *at;
  *at = change(old);
  return old;
}
template <typename T, typename U> T atomicAdd(T* at, U x) {
  return emulated_atomic(at, [=](T old) { return (T)(old + (T)x); });
}
template <typename T, typename U> T atomicMax(T* at, U x) {
  return emulated_atomic(at, [=](T old) { return max(old, (T)x); });
}
template <typename T, typename U> T atomicMin(T* at, U x) {
  return emulated_atomic(at, [=](T old) { return min(old, (T)x); });
}
template <typename T, typename U> T atomicOr(T* at, U x) {
  return emulated_atomic(at, [=](T old) { return (T)(old | (T)x); });
}
template <typename T, typename U> T atomicExch(T* at, U x) {
  return emulated_atomic(at, [=](T) { return (T)x; });
}
template <typename T, typename U, typename V> T atomicCAS(T* at, U expected, V x) {
  return emulated_atomic(at, [=](T old) { return old == (T)expected ? (T)x : old; });
}

// ---- barriers and warps

inline void __syncthreads() { emulated::block_barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulated::together<char>("__syncwarp", mask, '\0', [](const char*, char*) {});
}

template <typename T> struct EmulatedShuffle {
  T value;
  int from;
};
template <typename T> T emulated_shuffle(const char* name, unsigned mask, T value, int from) {
  return emulated::together<T>(name, mask, EmulatedShuffle<T>{value, from}, [=](const EmulatedShuffle<T>* in, T* out) {
    for (int lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) out[lane] = in[in[lane].from & 31].value;
  });
}
// Which lane of its part (of `width` lanes) a lane reads; itself where that would be outside.
template <typename T> T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  int lane = emulated::self->lane;
  return emulated_shuffle("__shfl_sync", mask, x, (lane & -width) | (from & (width - 1)));
}
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
  int lane = emulated::self->lane, from = lane ^ with;
  return emulated_shuffle("__shfl_xor_sync", mask, x, (from & -width) <= (lane & -width) ? from : lane);
}
template <typename T> T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  int lane = emulated::self->lane;
  return emulated_shuffle("__shfl_up_sync", mask, x, (lane & (width - 1)) >= (int)by ? lane - (int)by : lane);
}
template <typename T> T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  int lane = emulated::self->lane;
  return emulated_shuffle("__shfl_down_sync", mask, x, (lane & (width - 1)) + (int)by < width ? lane + (int)by : lane);
}

// All lanes get fold(...fold(start, first lane's)..., last lane's).
template <typename Out, typename T, typename F> Out emulated_fold(const char* name, unsigned mask, T x, Out start, F fold) {
  return emulated::together<Out>(name, mask, x, [=](const T* in, Out* out) {
    Out all = start;
    for (int lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) all = fold(all, in[lane], lane);
    for (int lane = 0; lane < 32; lane++) out[lane] = all;
  });
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return emulated_fold("__ballot_sync", mask, x, 0u, [](unsigned all, int x, int lane) { return all | (unsigned)!!x << lane; });
}
inline int __any_sync(unsigned mask, int x) {
  return emulated_fold("__any_sync", mask, x, 0, [](int all, int x, int) { return all | !!x; });
}
inline int __all_sync(unsigned mask, int x) {
  return emulated_fold("__all_sync", mask, x, 1, [](int all, int x, int) { return all & !!x; });
}
template <typename T> T __reduce_add_sync(unsigned mask, T x) {
  return emulated_fold("__reduce_add_sync", mask, x, T(0), [](T all, T x, int) { return all + x; });
}
template <typename T> T __reduce_max_sync(unsigned mask, T x) {
  return emulated_fold("__reduce_max_sync", mask, x, x, [](T all, T x, int) { return max(all, x); });
}
template <typename T> T __reduce_min_sync(unsigned mask, T x) {
  return emulated_fold("__reduce_min_sync", mask, x, x, [](T all, T x, int) { return min(all, x); });
}

// ---- what build.py writes at the end of a unit

extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
#define EMULATED_SECTION(n)                                                                       \
  extern char __start_emulated_cluster_##n[] __attribute__((weak, visibility("hidden")));         \
  extern char __stop_emulated_cluster_##n[] __attribute__((weak, visibility("hidden")));
EMULATED_SECTION(1) EMULATED_SECTION(2) EMULATED_SECTION(4) EMULATED_SECTION(8)
#undef EMULATED_SECTION
}
inline int emulated_cluster(const void* entry) {
#define EMULATED_SECTION(n)                                                                       \
  if (entry >= (void*)__start_emulated_cluster_##n && entry < (void*)__stop_emulated_cluster_##n) return n;
  EMULATED_SECTION(2) EMULATED_SECTION(4) EMULATED_SECTION(8)
#undef EMULATED_SECTION
  return 1;
}
#define EMULATED_ENTRY(f) \
  {#f, emulated::Caller<&f>::signature(), &emulated::Caller<&f>::call, emulated_cluster((const void*)&f)}
#define EMULATED_UNIT(...)                                                                          \
  extern "C" EXPORTED const emulated::Unit* emulated_unit() {                                       \
    static const emulated::Entry entries[] = {__VA_ARGS__};                                         \
    static const emulated::Unit unit = {entries, (int)(sizeof entries / sizeof *entries),           \
                                        __start_emulated_shared, __stop_emulated_shared};           \
    return &unit;                                                                                   \
  }
