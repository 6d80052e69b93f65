// A tile of query rows of one head against the keys that it sees; the work of a block in context_attention.cu, which
// tells how.
#pragma once
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

// What the tiles of a launch have in common.
struct Attention {
  scalar_t* out;
  const scalar_t* q;
  int64_t q_stride;
  const scalar_t *k_cache, *v_cache;
  const int* block_tables;
  int table_stride, heads, kv_heads, block_shift;
  float scale;
  int window;
  float softcap;
  const float *alibi_slopes, *sinks;
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

// `dynamic`: (BM + 2 * BN) * PITCH elements. Every thread of the block has read `item` when the first one returns.
DEVICE void attend_tile(const Item& item, const Attention& of, uint4* dynamic) {
  scalar_t* sq = reinterpret_cast<scalar_t*>(dynamic);
  scalar_t *sk = sq + BM * PITCH, *sv = sk + BN * PITCH;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = of.heads / of.kv_heads;
  bool adjust = of.softcap > 0.0f || of.alibi_slopes;
  float unit = adjust ? 1.0f : of.scale * LOG2E;
  int kv_head = item.head / group;
  float slope = of.alibi_slopes ? of.alibi_slopes[item.head] : 0.0f;
  float sink = of.sinks ? of.sinks[item.head] * LOG2E : NEGATIVE_INFINITY;
  Pages k, v;
  k.table = v.table = of.block_tables + (int64_t)item.sequence * of.table_stride;
  k.row = v.row = (int64_t)of.kv_heads * D;
  k.shift = v.shift = of.block_shift;
  k.cache = of.k_cache + kv_head * D;
  v.cache = of.v_cache + kv_head * D;
  int end = item.position + item.rows;  // keys that the last row sees
  int lowest = of.window ? max(0, item.position - of.window + 1) / BN : 0;
  int tile = (end + BN - 1) / BN - 1;

  for (int i = threadIdx.x; i < BM * PIECES; i += THREADS) {
    int row = i / PIECES, piece = i % PIECES;
    bool valid = row < item.rows;
    cp_async16(sq + row * PITCH + piece * 8,
               of.q + (item.row + (valid ? row : 0)) * of.q_stride + item.head * D + piece * 8, valid);
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
      if (adjust) adjust_scores<BN / 8>(scores, of.scale, of.softcap, slope, distance);
      if (tile * BN + BN - 1 > position || (of.window && tile * BN <= position + 15 - of.window))
        mask_scores<BN / 8>(scores, distance, of.window);
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
      store(of.out + ((int64_t)(item.row + row) * of.heads + item.head) * D + piece * 8,
            load<scalar_t, 8>(sq + row * PITCH + piece * 8));
  }
}

#else

// float32, for checking: a warp takes a row, a lane a key, 32 keys at a time.
constexpr int WARPS = LLM_WARPS, THREADS = 32 * WARPS, BM = 4 * WARPS, DIMS = (D + 31) / 32;

DEVICE void attend_tile(const Item& item, const Attention& of, uint4*) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int kv_head = item.head / (of.heads / of.kv_heads);
  float slope = of.alibi_slopes ? of.alibi_slopes[item.head] : 0.0f;
  Pages k, v;
  k.table = v.table = of.block_tables + (int64_t)item.sequence * of.table_stride;
  k.row = v.row = (int64_t)of.kv_heads * D;
  k.shift = v.shift = of.block_shift;
  k.cache = of.k_cache + kv_head * D;
  v.cache = of.v_cache + kv_head * D;
  for (int row = warp; row < item.rows; row += WARPS) {
    const scalar_t* query = of.q + (item.row + row) * of.q_stride + item.head * D;
    int position = item.position + row;
    float top = NEGATIVE_INFINITY, sum = 0.0f, o[DIMS] = {};
    for (int first = of.window ? max(0, position - of.window + 1) : 0; first <= position; first += 32) {
      int key = first + lane;
      float s = NEGATIVE_INFINITY;
      if (key <= position) {
        const scalar_t* at = k.at(key);
        s = 0.0f;
        for (int d = 0; d < D; ++d) s += query[d] * at[d];
        s *= of.scale;
        if (of.softcap > 0.0f) s = of.softcap * tanhf(s / of.softcap);
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
    if (of.sinks) sum += expf(of.sinks[item.head] - top);
    for (int i = 0; i < DIMS; ++i)
      if (i * 32 + lane < D) of.out[((int64_t)(item.row + row) * of.heads + item.head) * D + i * 32 + lane] = o[i] / sum;
  }
  __syncthreads();
}

#endif
