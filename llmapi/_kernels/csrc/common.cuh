// What the kernels share: element types, 16-byte vectors, warp reductions, asynchronous copies, matrix instructions.
//
// LLM_DTYPE: 0 float, 1 half, 2 bfloat16: the type of activations and weights, scalar_t below.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifndef LLM_DTYPE
#define LLM_DTYPE 2
#endif
#if LLM_DTYPE == 0
typedef float scalar_t;
#elif LLM_DTYPE == 1
typedef __half scalar_t;
#else
typedef __nv_bfloat16 scalar_t;
#endif

#define DEVICE __device__ __forceinline__
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

#include "ptx.cuh"

// ---- conversions

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two floats as a packed pair of scalars, the first in the low half.
DEVICE uint32_t pack2(__half, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
DEVICE uint32_t pack2(__nv_bfloat16, float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// And back; the first is `x`.
DEVICE float2 unpack2(__half, uint32_t pair) { return __half22float2(*reinterpret_cast<__half2*>(&pair)); }
DEVICE float2 unpack2(__nv_bfloat16, uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
}

// ---- vectors of N elements, aligned to their size

template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
  T at[N];
};
template <typename T, int N> DEVICE Vec<T, N> load(const T* from) { return *reinterpret_cast<const Vec<T, N>*>(from); }
template <typename T, int N> DEVICE void store(T* to, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// Turns the pair (x, y) by an angle.
DEVICE void rotate_pair(scalar_t& x, scalar_t& y, float cosine, float sine) {
  float p = to_float(x), r = to_float(y);
  x = from_float<scalar_t>(p * cosine - r * sine);
  y = from_float<scalar_t>(r * cosine + p * sine);
}

// ---- reductions

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over a block of at most 1024 threads; every thread gets it. `scratch` holds 33 floats of shared memory.
DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  if (warp == 0) {
    float total = warp_sum(lane < (int)(blockDim.x + 31) / 32 ? scratch[lane] : 0.0f);
    if (lane == 0) scratch[32] = total;
  }
  __syncthreads();
  return scratch[32];
}

// ---- programmatic dependent launch (Hopper and newer; nothing elsewhere)
//
// A kernel that is launched with `overlap` may start before those ahead of it have ended. Every block must call
// pdl_wait() before it ends, and before it touches anything that other kernels of the step write or read. What was
// complete before the step began may be read earlier: weights, lengths, block tables, keys and values of earlier steps.
// pdl_launch() lets the next kernel start; called first, it lets that one fetch such things while this one still waits.

DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  ptx::griddepcontrol_wait();
#endif
}
DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  ptx::griddepcontrol_launch_dependents();
#endif
}

// ---- asynchronous copies of 16 bytes from global to shared memory (plain copies on Turing)

DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Zeros instead of the source where `valid` is false.
DEVICE void cp_async16(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async16(shared_address(to), from, valid ? 16 : 0);
#else
  *reinterpret_cast<uint4*>(to) = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async_commit_group();
#endif
}
template <int PENDING> DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async_wait_group<PENDING>();
#endif
}

// ---- warp matrix instructions: 16x8 += 16x16 * 16x8, float32 accumulators

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ptx::ldmatrix_x4(r, shared_address(row)); }
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ptx::ldmatrix_x4_trans(r, shared_address(row)); }

DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
#if __CUDA_ARCH__ >= 800
  ptx::mma_m16n8k16_f16(c, a, b0, b1);
#else
  ptx::mma_m16n8k8_f16(c, a[0], a[1], b0);
  ptx::mma_m16n8k8_f16(c, a[2], a[3], b1);
#endif
}
#if __CUDA_ARCH__ >= 800
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  ptx::mma_m16n8k16_bf16(c, a, b0, b1);
}
#endif
