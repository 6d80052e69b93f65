// Context attention on every architecture: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over the paged cache.
//
// A block takes tiles of BM query rows of one head from the queue and walks over the keys that they see from the last
// to the first, BN at a time. A warp owns 16 * MT rows; scores and output stay in registers. Keys of the next tile load
// while values are multiplied, values while scores are made.
//
// LLM_HEAD_DIM: multiple of 16. LLM_KEYS: BN, multiple of 16. LLM_ROW_TILES: MT. LLM_WARPS.
#include "context_attention_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    context_attention(scalar_t* out, const scalar_t* q, int64_t q_stride, const scalar_t* k_cache,
                      const scalar_t* v_cache, const int* block_tables, int table_stride, Queue* queue, int heads,
                      int kv_heads, int block_shift, float scale, int window, float softcap, const float* alibi_slopes,
                      const float* sinks) {
  extern __shared__ uint4 dynamic[];
  __shared__ int next;
  Attention of = {out,      q,           q_stride, k_cache, v_cache, block_tables, table_stride, heads,
                  kv_heads, block_shift, scale,    window,  softcap, alibi_slopes, sinks};
  pdl_wait();
  int total = queue->entries * heads;
  for (int index = blockIdx.x; index < total;) {
    attend_tile(find_item(queue, index, heads, BM), of, dynamic);
    if (threadIdx.x == 0) next = gridDim.x + atomicAdd(&queue->next, 1);
    __syncthreads();
    index = next;
  }
  pdl_launch();
  if (threadIdx.x == 0) leave_queue(queue);
}
