// A token's queries, keys and values: rotated, and written to where they go.
#pragma once
#include "common.cuh"

// One block a token; its threads walk over the pairs of all heads. Rotated channels are `rotary_dim` leading ones.
// Queries go to `q` (row stride `q_stride`; may be the queries' own place in `qkv`), keys and values to slot
// `slots[t]`, or nowhere where that is negative. `cos_sin` null: no rotation.
template <bool INTERLEAVED>
DEVICE void write_row(const scalar_t* qkv, const float* cos_sin, const int* slots, scalar_t* q, scalar_t* k_cache,
                      scalar_t* v_cache, int heads, int kv_heads, int head_dim, int rotary_dim, int64_t q_stride) {
  int64_t token = blockIdx.x;
  const scalar_t* row = qkv + token * (heads + 2 * kv_heads) * head_dim;
  const float* factors = cos_sin + token * rotary_dim;
  int64_t slot = slots[token];
  int half = head_dim / 2, pairs = rotary_dim / 2;
  int total = (heads + 2 * kv_heads) * half;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int head = i / half, pair = i - head * half;
    bool rotated = pair < pairs && head < heads + kv_heads;
    int a, b;  // channels of the pair
    if (pair < pairs) {
      a = INTERLEAVED ? 2 * pair : pair;
      b = INTERLEAVED ? 2 * pair + 1 : pair + pairs;
    } else {
      a = rotary_dim + 2 * (pair - pairs);
      b = a + 1;
    }
    const scalar_t* from = row + (int64_t)head * head_dim;
    scalar_t x = from[a], y = from[b];
    if (rotated) rotate_pair(x, y, factors[pair], factors[pairs + pair]);
    scalar_t* to;
    if (head < heads) {
      to = q + token * q_stride + (int64_t)head * head_dim;
    } else {
      if (slot < 0) continue;
      bool key = head < heads + kv_heads;
      int own = head - heads - (key ? 0 : kv_heads);
      to = (key ? k_cache : v_cache) + (slot * kv_heads + own) * head_dim;
    }
    to[a] = x;
    to[b] = y;
  }
}

// 16-byte accesses: rotary_dim == head_dim, halves of a head a multiple of a vector, pairs half a head apart.
static constexpr int N = 16 / sizeof(scalar_t);
DEVICE void write_row_wide(const scalar_t* qkv, const float* cos_sin, const int* slots, scalar_t* q, scalar_t* k_cache,
                           scalar_t* v_cache, int heads, int kv_heads, int head_dim, int64_t q_stride) {
  int64_t token = blockIdx.x;
  const scalar_t* row = qkv + token * (heads + 2 * kv_heads) * head_dim;
  const float* factors = cos_sin + token * head_dim;
  int64_t slot = slots[token];
  int half = head_dim / 2, each = half / N, total = (heads + 2 * kv_heads) * each;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < total; i += gridDim.y * blockDim.x) {
    int head = i / each, at = (i - head * each) * N;
    const scalar_t* from = row + (int64_t)head * head_dim + at;
    Vec<scalar_t, N> x = load<scalar_t, N>(from), y = load<scalar_t, N>(from + half);
    if (head < heads + kv_heads) {
#pragma unroll
      for (int k = 0; k < N; k++) rotate_pair(x.at[k], y.at[k], factors[at + k], factors[half + at + k]);
    }
    scalar_t* to;
    if (head < heads) {
      to = q + token * q_stride + (int64_t)head * head_dim + at;
    } else {
      if (slot < 0) continue;
      bool key = head < heads + kv_heads;
      int own = head - heads - (key ? 0 : kv_heads);
      to = (key ? k_cache : v_cache) + (slot * kv_heads + own) * head_dim + at;
    }
    store<scalar_t, N>(to, x);
    store<scalar_t, N>(to + half, y);
  }
}
