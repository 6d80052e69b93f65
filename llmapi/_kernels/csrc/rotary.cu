// Rotary embedding, and the write of keys and values into the paged cache.
#include "rotary.cuh"

// cos_sin[t] = (cos(position * inv_freq), sin(...)) * scale. Grid: x over tokens, threads over pairs.
extern "C" __global__ void rotary_cos_sin(const int* __restrict__ positions, const float* __restrict__ inv_freq,
                                          float* __restrict__ out, int pairs, float scale) {
  pdl_launch();
  pdl_wait();
  float position = (float)positions[blockIdx.x];
  out += (int64_t)blockIdx.x * 2 * pairs;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    float sine, cosine;
    sincosf(position * inv_freq[i], &sine, &cosine);
    out[i] = cosine * scale;
    out[pairs + i] = sine * scale;
  }
}

#define ARGUMENTS                                                                                                       \
  const scalar_t *qkv, const float *cos_sin, const int *slots, scalar_t *q, scalar_t *k_cache, scalar_t *v_cache,        \
      int heads, int kv_heads, int head_dim, int rotary_dim, int64_t q_stride

extern "C" __global__ void rotary_kv_write(ARGUMENTS) {
  pdl_launch();
  pdl_wait();
  write_row<false>(qkv, cos_sin, slots, q, k_cache, v_cache, heads, kv_heads, head_dim, rotary_dim, q_stride);
}
extern "C" __global__ void rotary_kv_write_interleaved(ARGUMENTS) {
  pdl_launch();
  pdl_wait();
  write_row<true>(qkv, cos_sin, slots, q, k_cache, v_cache, heads, kv_heads, head_dim, rotary_dim, q_stride);
}
extern "C" __global__ void rotary_kv_write_wide(ARGUMENTS) {
  pdl_launch();
  pdl_wait();
  write_row_wide(qkv, cos_sin, slots, q, k_cache, v_cache, heads, kv_heads, head_dim, q_stride);
}
