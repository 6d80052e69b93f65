// Context attention on every architecture: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over the paged cache.
//
// A block takes tiles of BM query rows of one head from the queue and walks over the keys that they see from the last
// to the first, BN at a time. A warp owns 16 * MT rows; scores and output stay in registers. Keys of the next tile load
// while values are multiplied, values while scores are made.
//
// LLM_HEAD_DIM: multiple of 16. LLM_KEYS: BN, multiple of 16. LLM_ROW_TILES: MT. LLM_WARPS.
#include "context_attention.cuh"

constexpr int D = LLM_HEAD_DIM;

// Where a sequence's keys or values of one head are.
struct Pages {
  const scalar_t* cache;  // at the head
  const int* table;
  int64_t row;  // elements of a token
  int shift;    // log2 of the block size

  DEVICE const scalar_t* at(int position) const {
    int64_t block = table[position >> shift];
    return cache + ((block << shift) + (position & ((1 << shift) - 1))) * row;
  }
};

#if LLM_DTYPE != 0

constexpr int BN = LLM_KEYS, MT = LLM_ROW_TILES, WARPS = LLM_WARPS, THREADS = 32 * WARPS, BM = 16 * MT * WARPS;
constexpr int PITCH = D + 8;  // an odd number of 16-byte pieces: eight rows of a matrix lie in different banks
constexpr int PIECES = D / 8;

// BN rows from `first` on; rows from `end` on become zeros.
DEVICE void load_tile(scalar_t* to, const Pages& from, int first, int end) {
#pragma unroll
  for (int i = threadIdx.x; i < BN * PIECES; i += THREADS) {
    int row = i / PIECES, piece = i % PIECES;
    bool valid = first + row < end;
    cp_async16(to + row * PITCH + piece * 8, from.at(valid ? first + row : first) + piece * 8, valid);
  }
  cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    context_attention(scalar_t* out, const scalar_t* q, int64_t q_stride, const scalar_t* k_cache,
                      const scalar_t* v_cache, const int* block_tables, int table_stride, Queue* queue, int heads,
                      int kv_heads, int block_shift, float scale, int window, float softcap, const float* alibi_slopes,
                      const float* sinks) {
  extern __shared__ uint4 dynamic[];
  scalar_t* sq = reinterpret_cast<scalar_t*>(dynamic);
  scalar_t *sk = sq + BM * PITCH, *sv = sk + BN * PITCH;
  __shared__ int next;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = heads / kv_heads;
  bool adjust = softcap > 0.0f || alibi_slopes;
  float unit = adjust ? 1.0f : scale * LOG2E;

  pdl_wait();
  int total = queue->entries * heads;
  for (int index = blockIdx.x; index < total;) {
    Item item = find_item(queue, index, heads, BM);
    int kv_head = item.head / group;
    float slope = alibi_slopes ? alibi_slopes[item.head] : 0.0f;
    float sink = sinks ? sinks[item.head] * LOG2E : NEGATIVE_INFINITY;
    Pages k, v;
    k.table = v.table = block_tables + (int64_t)item.sequence * table_stride;
    k.row = v.row = (int64_t)kv_heads * D;
    k.shift = v.shift = block_shift;
    k.cache = k_cache + kv_head * D;
    v.cache = v_cache + kv_head * D;
    int end = item.position + item.rows;  // keys that the last row sees
    int lowest = window ? max(0, item.position - window + 1) / BN : 0;
    int tile = (end + BN - 1) / BN - 1;

    for (int i = threadIdx.x; i < BM * PIECES; i += THREADS) {
      int row = i / PIECES, piece = i % PIECES;
      bool valid = row < item.rows;
      cp_async16(sq + row * PITCH + piece * 8,
                 q + (item.row + (valid ? row : 0)) * q_stride + item.head * D + piece * 8, valid);
    }
    load_tile(sk, k, tile * BN, end);

    float o[MT][D / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; ++m) top[m][0] = top[m][1] = NEGATIVE_INFINITY;
    int first_row = warp * 16 * MT;
    for (; tile >= lowest; --tile) {
      cp_async_wait<0>();
      __syncthreads();
      load_tile(sv, v, tile * BN, end);
      float s[MT][BN / 8][4] = {};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
          ldmatrix_x4(a[m], sq + (first_row + m * 16 + (lane & 15)) * PITCH + d + (lane >> 4) * 8);
#pragma unroll
        for (int j = 0; j < BN / 16; ++j) {
          uint32_t b[4];
          ldmatrix_x4(b, sk + (j * 16 + (lane & 7) + (lane >> 4) * 8) * PITCH + d + ((lane >> 3) & 1) * 8);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            mma(s[m][2 * j], a[m], b[0], b[1], scalar_t());
            mma(s[m][2 * j + 1], a[m], b[2], b[3], scalar_t());
          }
        }
      }
      cp_async_wait<0>();
      __syncthreads();
      if (tile > lowest) load_tile(sk, k, (tile - 1) * BN, end);

#pragma unroll
      for (int m = 0; m < MT; ++m) {
        float* scores = &s[m][0][0];
        int position = item.position + first_row + m * 16;
        int distance = tile * BN - position - (lane >> 2);
        if (adjust) adjust_scores<BN / 8>(scores, scale, softcap, slope, distance);
        if (tile * BN + BN - 1 > position || (window && tile * BN <= position + 15 - window))
          mask_scores<BN / 8>(scores, distance, window);
        float old[2];
        softmax_step<BN / 8>(scores, unit, top[m], sum[m], old);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          o[m][j][0] *= old[0];
          o[m][j][1] *= old[0];
          o[m][j][2] *= old[1];
          o[m][j][3] *= old[1];
        }
      }
#pragma unroll
      for (int i = 0; i < BN / 16; ++i) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r)
            a[m][r] = pack2(scalar_t(), s[m][2 * i + (r >> 1)][2 * (r & 1)], s[m][2 * i + (r >> 1)][2 * (r & 1) + 1]);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, sv + (i * 16 + (lane & 15)) * PITCH + j * 16 + (lane >> 4) * 8);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            mma(o[m][2 * j], a[m], b[0], b[1], scalar_t());
            mma(o[m][2 * j + 1], a[m], b[2], b[3], scalar_t());
          }
        }
      }
    }

    // Through the warp's own rows of sq, so that whole rows are written.
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      float by[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) by[r] = inverse_sum(top[m][r], unit, sum[m][r], sink);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          *reinterpret_cast<uint32_t*>(sq + (first_row + m * 16 + r * 8 + (lane >> 2)) * PITCH + j * 8 +
                                       2 * (lane & 3)) =
              pack2(scalar_t(), o[m][j][2 * r] * by[r], o[m][j][2 * r + 1] * by[r]);
    }
    __syncwarp();
    for (int i = lane; i < 16 * MT * PIECES; i += 32) {
      int row = first_row + i / PIECES, piece = i % PIECES;
      if (row < item.rows)
        store(out + ((int64_t)(item.row + row) * heads + item.head) * D + piece * 8,
              load<scalar_t, 8>(sq + row * PITCH + piece * 8));
    }
    if (threadIdx.x == 0) next = gridDim.x + atomicAdd(&queue->next, 1);
    __syncthreads();
    index = next;
  }
  pdl_launch();
  if (threadIdx.x == 0) leave_queue(queue);
}

#else

// float32, for checking: a warp takes a row, a lane a key, 32 keys at a time.
constexpr int WARPS = LLM_WARPS, BM = 4 * WARPS, DIMS = (D + 31) / 32;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    context_attention(scalar_t* out, const scalar_t* q, int64_t q_stride, const scalar_t* k_cache,
                      const scalar_t* v_cache, const int* block_tables, int table_stride, Queue* queue, int heads,
                      int kv_heads, int block_shift, float scale, int window, float softcap, const float* alibi_slopes,
                      const float* sinks) {
  __shared__ int next;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  pdl_wait();
  int total = queue->entries * heads;
  for (int index = blockIdx.x; index < total;) {
    Item item = find_item(queue, index, heads, BM);
    int kv_head = item.head / (heads / kv_heads);
    float slope = alibi_slopes ? alibi_slopes[item.head] : 0.0f;
    Pages k, v;
    k.table = v.table = block_tables + (int64_t)item.sequence * table_stride;
    k.row = v.row = (int64_t)kv_heads * D;
    k.shift = v.shift = block_shift;
    k.cache = k_cache + kv_head * D;
    v.cache = v_cache + kv_head * D;
    for (int row = warp; row < item.rows; row += WARPS) {
      const scalar_t* query = q + (item.row + row) * q_stride + item.head * D;
      int position = item.position + row;
      float top = NEGATIVE_INFINITY, sum = 0.0f, o[DIMS] = {};
      for (int first = window ? max(0, position - window + 1) : 0; first <= position; first += 32) {
        int key = first + lane;
        float s = NEGATIVE_INFINITY;
        if (key <= position) {
          const scalar_t* at = k.at(key);
          s = 0.0f;
          for (int d = 0; d < D; ++d) s += query[d] * at[d];
          s *= scale;
          if (softcap > 0.0f) s = softcap * tanhf(s / softcap);
          s += slope * (float)(key - position);
        }
        float highest = fmaxf(top, warp_max(s)), old = expf(top - highest), p = expf(s - highest);
        top = highest;
        sum = sum * old + warp_sum(p);
        for (int i = 0; i < DIMS; ++i) o[i] *= old;
        for (int j = 0; j < min(32, position + 1 - first); ++j) {
          float weight = __shfl_sync(0xffffffffu, p, j);
          const scalar_t* at = v.at(first + j);
          for (int i = 0; i < DIMS; ++i)
            if (i * 32 + lane < D) o[i] += weight * at[i * 32 + lane];
        }
      }
      if (sinks) sum += expf(sinks[item.head] - top);
      for (int i = 0; i < DIMS; ++i)
        if (i * 32 + lane < D) out[((int64_t)(item.row + row) * heads + item.head) * D + i * 32 + lane] = o[i] / sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) next = gridDim.x + atomicAdd(&queue->next, 1);
    __syncthreads();
    index = next;
  }
  pdl_launch();
  if (threadIdx.x == 0) leave_queue(queue);
}

#endif
