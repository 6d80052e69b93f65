// The step's list of query tiles for context attention: the sequences with most tokens first, so that the longest work
// starts first. One block; one warp per sequence.
#include "context_attention.cuh"

extern "C" __global__ void __launch_bounds__(1024) context_plan(Queue* queue, const int* seq_lens,
                                                                const int* query_start, const int* counts, int capacity,
                                                                int tile_rows, int kv_heads, int group,
                                                                int bytes_per_token, int cache_bytes) {
  extern __shared__ int2 work[];  // (tokens, tiles) of each sequence in prefill
  __shared__ int total;
  pdl_wait();
  pdl_launch();
  int from = counts[0], sequences = counts[1] - from;
  if (threadIdx.x == 0) total = 0;
  for (int i = threadIdx.x; i < sequences; i += blockDim.x) {
    int length = seq_lens[from + i], count = query_start[from + i + 1] - query_start[from + i];
    work[i] = length > 0 && count > 0 ? make_int2(length, (count + tile_rows - 1) / tile_rows) : make_int2(0, 0);
  }
  __syncthreads();
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = warp; i < sequences; i += blockDim.x >> 5) {
    int2 own = work[i];
    int before = 0;
    for (int j = lane; j < sequences; j += 32) {
      int2 other = work[j];
      if (other.x > own.x || (other.x == own.x && j < i)) before += other.y;
    }
    #pragma unroll
    for (int offset = 16; offset; offset >>= 1) before += __shfl_xor_sync(0xffffffffu, before, offset);
    Entry entry;
    entry.sequence = from + i;
    entry.first = before;
    entry.tiles = own.y;
    // A power of two of key heads whose keys and values take at most cache_bytes.
    int64_t bytes = (int64_t)own.x * bytes_per_token;
    int together = 1;
    while (together < kv_heads && 2 * together * bytes <= cache_bytes) together *= 2;
    entry.section = min(together, kv_heads) * group;
    entry.query_begin = query_start[from + i];
    entry.query_count = query_start[from + i + 1] - entry.query_begin;
    entry.length = own.x;
    entry.unused = 0;
    Entry* to = reinterpret_cast<Entry*>(queue + 1) + before;
    for (int tile = lane; tile < own.y; tile += 32)
      if (before + tile < capacity) to[tile] = entry;
    if (lane == 0) atomicAdd(&total, own.y);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    queue->entries = min(total, capacity);
    queue->next = 0;
    queue->done = 0;
  }
}
