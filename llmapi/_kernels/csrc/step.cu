// Small kernels of a step: the ids that the last step sampled, and the copy of whole KV blocks.
#include "common.cuh"

// ids[t] = source[t], or, where that is negative, what row ~source[t] sampled in the step before.
extern "C" __global__ void resolve_ids(const int* __restrict__ source, const int* __restrict__ sampled,
                                       int* __restrict__ ids, int count) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= count) return;
  int id = source[t];
  if (id < 0) id = max(0, sampled[~id]);  // a failed row's -1 must not index the embedding; its result is dropped
  ids[t] = id;
}

// Copies blocks in every cache: grid x over the pairs, y over the caches. `bytes` is a multiple of 16.
extern "C" __global__ void copy_blocks(const uint64_t* __restrict__ caches, const int* __restrict__ pairs,
                                       int64_t bytes) {
  char* base = reinterpret_cast<char*>(caches[blockIdx.y]);
  const uint4* from = reinterpret_cast<const uint4*>(base + (int64_t)pairs[2 * blockIdx.x] * bytes);
  uint4* to = reinterpret_cast<uint4*>(base + (int64_t)pairs[2 * blockIdx.x + 1] * bytes);
  for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) to[i] = from[i];
}
