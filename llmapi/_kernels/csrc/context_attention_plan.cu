// The step's list of query tiles for context attention: the sequences with most tokens first, so that the longest work
// starts first. Where there are fewer items than blocks, the keys of a tile are split among several items, `parts` of
// them at most in all. One block; one warp per sequence.
#include "context_attention.cuh"

extern "C" __global__ void __launch_bounds__(1024) context_plan(Queue* queue, const int* seq_lens,
                                                                const int* query_start, const int* counts, int capacity,
                                                                int tile_rows, int kv_heads, int group,
                                                                int bytes_per_token, int cache_bytes, int parts,
                                                                int keys_per_part) {
  extern __shared__ int2 work[];  // (tokens, tiles) of each sequence in prefill
  __shared__ int total, all;
  pdl_launch();
  pdl_wait();
  int from = counts[0], sequences = counts[1] - from;
  if (threadIdx.x == 0) total = all = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < sequences; i += blockDim.x) {
    int length = seq_lens[from + i], count = query_start[from + i + 1] - query_start[from + i];
    int2 own = length > 0 && count > 0 ? make_int2(length, (count + tile_rows - 1) / tile_rows) : make_int2(0, 0);
    work[i] = own;
    atomicAdd(&total, own.y);
  }
  __syncthreads();
  int most = max(1, parts / max(1, total * kv_heads * group));
  auto splits = [&](int tokens) { return most == 1 ? 1 : max(1, min(most, tokens / keys_per_part)); };
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = warp; i < sequences; i += blockDim.x >> 5) {
    int2 own = work[i];
    int split = splits(own.x);
    own.y *= split;
    int before = 0;
    for (int j = lane; j < sequences; j += 32) {
      int2 other = work[j];
      if (other.x > own.x || (other.x == own.x && j < i)) before += other.y * splits(other.x);
    }
    #pragma unroll
    for (int offset = 16; offset; offset >>= 1) before += __shfl_xor_sync(0xffffffffu, before, offset);
    Entry entry;
    entry.sequence = from + i;
    entry.first = before;
    entry.entries = own.y;
    // A power of two of key heads whose keys and values take at most cache_bytes.
    int64_t bytes = (int64_t)own.x * bytes_per_token;
    int together = 1;
    while (together < kv_heads && 2 * together * bytes <= cache_bytes) together *= 2;
    entry.section = min(together, kv_heads) * group;
    entry.query_begin = query_start[from + i];
    entry.query_count = query_start[from + i + 1] - entry.query_begin;
    entry.length = own.x;
    entry.splits = split;
    Entry* to = reinterpret_cast<Entry*>(queue + 1) + before;
    for (int tile = lane; tile < own.y; tile += 32)
      if (before + tile < capacity) to[tile] = entry;
    if (lane == 0) atomicAdd(&all, own.y);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    queue->entries = min(all, capacity);
    queue->next = 0;
    queue->done = 0;
  }
}
