// A plugin: a step's queries and keys rotated, keys and values written into the paged cache, queries returned, so that
// what reads the cache waits for the write by reading the queries.
//
// HEADS, KV_HEADS, HEAD_DIM. ROTARY_DIM: leading channels that are rotated; 0: none, and there is no `cos_sin`.
// NEIGHBOURS: pairs of channels lie side by side. Grid: the tokens.
#include "plugin.cuh"
#include "rotary.cuh"

extern "C" __global__ void plugin_rotary_kv_write(const scalar_t* __restrict__ qkv,
#if ROTARY_DIM
                                                  const float* __restrict__ cos_sin,
#endif
                                                  const int* __restrict__ slots, const int64_t* __restrict__ pools,
                                                  int layer, scalar_t* __restrict__ q) {
#if !ROTARY_DIM
  const float* cos_sin = nullptr;
#endif
  scalar_t *keys, *values;
  if (!find_caches(pools, layer, keys, values)) {
    fill(q + (int64_t)blockIdx.x * HEADS * HEAD_DIM, HEADS * HEAD_DIM, NOT_A_NUMBER);
    return;
  }
#if !NEIGHBOURS && ROTARY_DIM == HEAD_DIM
  if (HEAD_DIM % (2 * N) == 0) {
    write_row_wide(qkv, cos_sin, slots, q, keys, values, HEADS, KV_HEADS, HEAD_DIM, HEADS * HEAD_DIM);
    return;
  }
#endif
  write_row<NEIGHBOURS != 0>(qkv, cos_sin, slots, q, keys, values, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM,
                              HEADS * HEAD_DIM);
}
