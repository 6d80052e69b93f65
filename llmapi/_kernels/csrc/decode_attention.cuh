// What decode_attention.cu is made of: its shapes, how work is shared out, and a tile's arithmetic.
#pragma once
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef KV_HEADS
#define KV_HEADS 32
#endif
#ifndef BLOCK_SHIFT
#define BLOCK_SHIFT 4
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef ACROSS
#define ACROSS 1
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef CTAS
#define CTAS 2
#endif
#define ALONG (WARPS / ACROSS)
#ifndef LEAST
#define LEAST (2 * ALONG)
#endif
#ifndef WHOLE
#define WHOLE (4 * ALONG)
#endif
#ifndef PIECE_COST
#define PIECE_COST 1
#endif
#ifndef FUSED
#define FUSED 0
#endif
#ifndef ROTATED
#define ROTATED 0
#endif
#ifndef INTERLEAVED
#define INTERLEAVED 0
#endif

#define TILE 16
#define CHUNKS (HEAD_DIM * (int)sizeof(scalar_t) / 16)  // 16-byte chunks of a token's head
#define PITCH ((CHUNKS | 1) * 16)                       // odd, so that 8 rows lie in different banks
#define STAGE_BYTES (2 * TILE * PITCH)
#define TOKEN_BYTES (KV_HEADS * CHUNKS * 16)
#define LOG2E 1.4426950408889634f
#define NO_LOGIT __int_as_float(0xff800000)  // minus infinity

// Queries that one pass holds; a larger group takes several passes over the keys.
#if LLM_DTYPE != 0 && GROUP > 16 && HEAD_DIM <= 128
#define PASS 32
#else
#define PASS 16
#endif
#define PASSES ((GROUP + PASS - 1) / PASS)
#define ROWS (GROUP < PASS ? GROUP : PASS)
#define SETS (KV_HEADS * PASSES / ACROSS)

// What a thread holds of a pass: OUTS accumulators in SLOTS rows.
#if LLM_DTYPE == 0
#define COLUMNS ((HEAD_DIM + 31) / 32)
#define SLOTS ROWS
#define OUTS (ROWS * COLUMNS)
DEVICE constexpr int slot_of(int i) { return i / COLUMNS; }
#else
#define NTILES ((ROWS + 7) / 8)  // of 8 queries
#define DTILES (HEAD_DIM / 16)   // of 16 elements of the head
#define SLOTS (NTILES * 2)
#define OUTS (NTILES * DTILES * 4)
DEVICE constexpr int slot_of(int i) { return i / (DTILES * 4) * 2 + (i & 1); }
#endif
#define REGION ((OUTS + 2 * SLOTS) * 32)  // floats through which one warp hands its state to another
static_assert(HEAD_DIM % 16 == 0 && WARPS % ACROSS == 0 && KV_HEADS * PASSES % ACROSS == 0, "shapes");

struct State {
  float out[OUTS];
  float most[SLOTS];  // largest logit, in units of log2
  float sum[SLOTS];
};

struct Piece {
  int sequence, set;
  int at, cost;  // where it lies on the line, and its length there
  int tiles, first_tile;
  int low, length;  // tokens low .. length - 1 are seen
};

struct Work {
  const int* seq_lens;
  const int* query_start;
  int count, window;
  int share;  // length of a block's stretch
  bool aligned;  // stretches end where pieces do
};

DEVICE void measure(const Work& work, int sequence, Piece& piece) {
  int length = sequence < work.count ? work.seq_lens[sequence] : 0;
  if (length > 0 && work.query_start && work.query_start[sequence + 1] - work.query_start[sequence] != 1) length = 0;
  piece.sequence = sequence;
  piece.length = length;
  piece.low = work.window > 0 && length > work.window ? length - work.window : 0;
  piece.first_tile = piece.low / TILE;
  piece.tiles = CEIL_DIV(length, TILE) - piece.first_tile;
  if (length <= 0) piece.tiles = 0;
  piece.cost = piece.tiles == 0 ? 0
               : work.aligned   ? CEIL_DIV(piece.tiles, work.share) * work.share
                                : piece.tiles + PIECE_COST;
}

DEVICE int warp_total(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
#endif
}
DEVICE int warp_largest(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
#endif
}
DEVICE int warp_running(int x) {  // sum of the lanes up to this one
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    int below = __shfl_up_sync(0xffffffffu, x, offset);
    if ((threadIdx.x & 31) >= offset) x += below;
  }
  return x;
}

// Cost of the sequences: lane c gets that of the c-th `rounds * 32` of them. Also the longest, and how many there are.
DEVICE int tally(const Work& work, int rounds, int& longest, int& live) {
  int lane = threadIdx.x & 31, mine = 0;
  longest = live = 0;
#pragma unroll 1
  for (int c = 0; c * rounds * 32 < work.count; c++) {
    int cost = 0;
#pragma unroll 1
    for (int u = 0; u < rounds; u++) {
      Piece piece;
      measure(work, (c * rounds + u) * 32 + lane, piece);
      cost += piece.cost;
      longest = max(longest, piece.tiles);
      live += piece.tiles > 0;
    }
    cost = warp_total(cost);
    if (lane == c) mine = cost;
  }
  longest = warp_largest(longest);
  live = warp_total(live);
  return mine;
}

// The next piece of the line; false behind the last one that starts before `stop`.
DEVICE bool next(const Work& work, int stop, Piece& piece) {
  piece.at += piece.cost;
  if (piece.at >= stop) return false;
  if (++piece.set < SETS) return true;
  piece.set = 0;
  int sequence = piece.sequence;
#pragma unroll 1
  do {
    if (++sequence >= work.count) return false;
    measure(work, sequence, piece);
  } while (piece.tiles == 0);
  return true;
}

DEVICE float exp2_fast(float x) { return ptx::ex2(x); }

// limit * tanh(x / limit)
DEVICE float cap(float x, float limit) {
  return limit - 2.0f * limit / (1.0f + exp2_fast(2.0f * LOG2E / limit * x));
}

DEVICE void group_sync(int across) {
  if (ALONG == 1) {
    __syncwarp();
  } else if (ALONG == WARPS) {
    __syncthreads();
  } else {
    ptx::bar_sync<ALONG * 32>(1 + across);
  }
}

// Joins another part of the same softmax to a state.
DEVICE void join(State& state, const float* region) {
  int lane = threadIdx.x & 31;
  float keep[SLOTS], take[SLOTS];
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    float other = region[(OUTS + s) * 32 + lane], sum = region[(OUTS + SLOTS + s) * 32 + lane];
    float most = fmaxf(state.most[s], other);
    // Both are -inf for warps that saw no tile.
    keep[s] = most == NO_LOGIT ? 0.0f : exp2_fast(state.most[s] - most);
    take[s] = most == NO_LOGIT ? 0.0f : exp2_fast(other - most);
    state.most[s] = most;
    state.sum[s] = state.sum[s] * keep[s] + sum * take[s];
  }
#pragma unroll
  for (int i = 0; i < OUTS; i++) {
    state.out[i] = state.out[i] * keep[slot_of(i)] + region[i * 32 + lane] * take[slot_of(i)];
  }
}
DEVICE void hand_over(const State& state, float* region) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < OUTS; i++) {
    region[i * 32 + lane] = state.out[i];
  }
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    region[(OUTS + s) * 32 + lane] = state.most[s];
    region[(OUTS + SLOTS + s) * 32 + lane] = state.sum[s];
  }
}

#if LLM_DTYPE == 0
// Row of a slot of this thread.
DEVICE int row_of(int slot) { return slot; }

struct Queries {
  const float* rows[ROWS];
};
DEVICE void load_queries(Queries& queries, const float* q, int rows) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) queries.rows[r] = q + (r < rows ? r : 0) * HEAD_DIM;
}

// One tile of 16 tokens: lanes t and t + 16 score token t, then each lane sums values of its columns.
DEVICE void attend(State& state, const Queries& queries, const char* keys, const char* values, int token,
                   const Piece& piece, float scale, float softcap, const float (&slopes)[SLOTS]) {
  int lane = threadIdx.x & 31, t = lane & 15;
  float score[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
  const float4* key = reinterpret_cast<const float4*>(keys + t * PITCH) + (lane >> 4) * (HEAD_DIM / 8);
#pragma unroll 2
  for (int d = 0; d < HEAD_DIM / 8; d++) {
    float4 k = key[d];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float4 x = reinterpret_cast<const float4*>(queries.rows[r])[(lane >> 4) * (HEAD_DIM / 8) + d];
      score[r] += x.x * k.x + x.y * k.y + x.z * k.z + x.w * k.w;
    }
  }
  int position = token + t;
  bool seen = position >= piece.low && position < piece.length;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float x = score[r] + __shfl_xor_sync(0xffffffffu, score[r], 16);
    x *= scale;
    if (softcap > 0.0f) x = cap(x, softcap);
    x = seen ? (x + slopes[r] * (position - (piece.length - 1))) * LOG2E : NO_LOGIT;
    float most = fmaxf(state.most[r], warp_max(x));
    float keep = exp2f(state.most[r] - most);
    score[r] = exp2f(x - most);
    state.most[r] = most;
    state.sum[r] = state.sum[r] * keep + warp_sum(lane < 16 ? score[r] : 0.0f);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) state.out[r * COLUMNS + j] *= keep;
  }
  for (int i = 0; i < TILE; i++) {
    float value[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      bool inside = HEAD_DIM % 32 == 0 || lane + 32 * j < HEAD_DIM;
      value[j] = inside ? reinterpret_cast<const float*>(values + i * PITCH)[lane + 32 * j] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float p = __shfl_sync(0xffffffffu, score[r], i);
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) state.out[r * COLUMNS + j] += p * value[j];
    }
  }
}
DEVICE void close_sums(State& state) {}

// Rows times factors to where `place(row)` says.
template <typename T, typename Place>
DEVICE void write_rows(const State& state, const float (&factor)[SLOTS], int rows, Place place) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r >= rows) continue;
    T* to = place(r);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      if (HEAD_DIM % 32 == 0 || lane + 32 * j < HEAD_DIM) {
        to[lane + 32 * j] = from_float<T>(state.out[r * COLUMNS + j] * factor[r]);
      }
    }
  }
}
#else
DEVICE int row_of(int slot) { return slot / 2 * 8 + (threadIdx.x & 3) * 2 + (slot & 1); }

struct Queries {
  uint32_t part[NTILES][DTILES][2];
};
DEVICE void load_queries(Queries& queries, const scalar_t* q, int rows) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    int row = n * 8 + lane / 4;
#pragma unroll
    for (int d = 0; d < DTILES; d++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t pair = 0;
        if (row < rows) pair = *reinterpret_cast<const uint32_t*>(q + row * HEAD_DIM + d * 16 + i * 8 + (lane & 3) * 2);
        queries.part[n][d][i] = pair;
      }
    }
  }
}

// Matrices are loaded FETCH at a time, so that their latencies overlap; values before the softmax where registers allow.
#define EAGER (NTILES * DTILES <= 16)
#define FETCH (EAGER ? (DTILES <= 8 ? DTILES : DTILES / 2) : DTILES % 4 == 0 ? 4 : DTILES % 2 == 0 ? 2 : 1)
#define CHAINS (EAGER ? 2 : 1)  // of dependent matrix instructions for a score

// One tile of 16 tokens: scores as 16 tokens by 8 queries, then values (16 elements by 16 tokens) times their weights.
DEVICE void attend(State& state, const Queries& queries, const char* keys, const char* values, int token,
                   const Piece& piece, float scale, float softcap, const float (&slopes)[SLOTS]) {
  int lane = threadIdx.x & 31;
  float score[NTILES][CHAINS][4];
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
#pragma unroll
    for (int i = 0; i < 4 * CHAINS; i++) score[n][i >> 2][i & 3] = 0.0f;
  }
  const char* key = keys + (lane & 15) * PITCH + (lane >> 4) * 16;
  const char* value = values + ((lane >> 4) * 8 + (lane & 7)) * PITCH + ((lane >> 3) & 1) * 16;
  uint32_t a[FETCH][4], v[FETCH][4];
#pragma unroll
  for (int start = 0; start < DTILES; start += FETCH) {
#pragma unroll
    for (int d = 0; d < FETCH; d++) ldmatrix_x4(a[d], key + (start + d) * 32);
#pragma unroll
    for (int d = 0; d < FETCH; d++) {
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        const uint32_t(&b)[2] = queries.part[n][start + d];
        mma(score[n][d % CHAINS], a[d], b[0], b[1], scalar_t());
      }
    }
  }
  if (EAGER) {
#pragma unroll
    for (int d = 0; d < FETCH; d++) ldmatrix_x4_trans(v[d], value + d * 32);
  }
  bool whole = token >= piece.low && token + TILE <= piece.length;
  int position = token + lane / 4;
  uint32_t weight[NTILES][2];
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int at = position + (i >> 1) * 8;
      x[i] = (CHAINS == 2 ? score[n][0][i] + score[n][CHAINS - 1][i] : score[n][0][i]) * scale;
      if (softcap > 0.0f) x[i] = cap(x[i], softcap);
      x[i] = (x[i] + slopes[n * 2 + (i & 1)] * (at - (piece.length - 1))) * LOG2E;
      if (!whole && (at < piece.low || at >= piece.length)) x[i] = NO_LOGIT;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int slot = n * 2 + h;
      float most = fmaxf(x[h], x[h + 2]);
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 4));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 8));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 16));
      most = fmaxf(most, state.most[slot]);
      float keep = exp2_fast(state.most[slot] - most);
      state.most[slot] = most;
      x[h] = exp2_fast(x[h] - most);
      x[h + 2] = exp2_fast(x[h + 2] - most);
      state.sum[slot] = state.sum[slot] * keep + (x[h] + x[h + 2]);
#pragma unroll
      for (int d = 0; d < DTILES; d++) {
        state.out[(n * DTILES + d) * 4 + h] *= keep;
        state.out[(n * DTILES + d) * 4 + h + 2] *= keep;
      }
    }
    weight[n][0] = ptx::movmatrix_trans(pack2(scalar_t(), x[0], x[1]));
    weight[n][1] = ptx::movmatrix_trans(pack2(scalar_t(), x[2], x[3]));
  }
#pragma unroll
  for (int start = 0; start < DTILES; start += FETCH) {
    if (!EAGER || start) {
#pragma unroll
      for (int d = 0; d < FETCH; d++) ldmatrix_x4_trans(v[d], value + (start + d) * 32);
    }
#pragma unroll
    for (int d = 0; d < FETCH; d++) {
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        float(&sum)[4] = *reinterpret_cast<float(*)[4]>(&state.out[(n * DTILES + start + d) * 4]);
        mma(sum, v[d], weight[n][0], weight[n][1], scalar_t());
      }
    }
  }
}

// The eight lanes of a row have each summed the weights of their own tokens.
DEVICE void close_sums(State& state) {
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) {
      state.sum[s] += __shfl_xor_sync(0xffffffffu, state.sum[s], offset);
    }
  }
}

// Rows times factors to where `place(row)` says.
template <typename T, typename Place>
DEVICE void write_rows(const State& state, const float (&factor)[SLOTS], int rows, Place place) {
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    int row = row_of(s);
    if (row >= rows) continue;
    T* to = place(row) + (threadIdx.x & 31) / 4;
#pragma unroll
    for (int i = 0; i < DTILES * 2; i++) {
      to[i * 8] = from_float<T>(state.out[(s / 2 * DTILES + i / 2) * 4 + (i & 1) * 2 + (s & 1)] * factor[s]);
    }
  }
}
#endif

// The warps of a piece hand their states down to the first. A warp writes where it alone has read.
DEVICE void gather(State& state, float* regions, int along, int across) {
#pragma unroll
  for (int half = ALONG / 2; half; half /= 2) {
    if (along >= half && along < 2 * half) {
      hand_over(state, regions + (half == ALONG / 2 ? along - half : along) * REGION);
    }
    group_sync(across);
    if (along < half) join(state, regions + (half == ALONG / 2 ? along : along + half) * REGION);
    if (half == 1) group_sync(across);
  }
}

// What each row is to be multiplied with at the end: 1 / the sum over its keys and its sink. `sinks`: of the first row.
DEVICE void finish(const State& state, const float* sinks, int rows, float (&factor)[SLOTS]) {
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    float sum = state.sum[s], most = state.most[s], shrink = 1.0f;
    if (sinks && row_of(s) < rows) {
      float sink = sinks[row_of(s)] * LOG2E, top = fmaxf(most, sink);
      shrink = exp2_fast(most - top);
      sum = sum * shrink + exp2_fast(sink - top);
    }
    factor[s] = shrink / sum;
  }
}

// 16 bytes from global to shared memory; zeros where not valid.
DEVICE void fetch16(uint32_t to, const char* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async16(to, from, valid ? 16 : 0);
#else
  ptx::st_shared16(to, valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0));
#endif
}
DEVICE void fetch16(uint32_t to, const char* from) {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async16_line(to, from);
#else
  fetch16(to, from, true);
#endif
}

// Where a tile lies in the caches.
struct Place {
  uint32_t at[BLOCK_SHIFT < 4 ? 2 : 1];  // first token, in 16-byte chunks; blocks of 8 have the last 8 tokens elsewhere
  int low, high;                          // rows of the tile that are seen
};

// Where a tile of a piece lies for a key head.
DEVICE void locate_tile(Place& place, const Piece& piece, int tile, const int* table, int key_head) {
  int token = tile * TILE;
  place.low = piece.low - token;
  place.high = piece.length - FUSED - token;  // a new token is not in the cache yet
#pragma unroll
  for (int i = 0; i < (BLOCK_SHIFT < 4 ? 2 : 1); i++) {
    int at = min(token + i * 8, piece.length - 1);
    uint32_t slot = ((uint32_t)table[at >> BLOCK_SHIFT] << BLOCK_SHIFT) + ((token + i * 8) & ((1 << BLOCK_SHIFT) - 1));
    place.at[i] = (slot * KV_HEADS + key_head) * CHUNKS;
  }
}

// A warp starts the copy of a tile's keys and values to shared memory.
DEVICE void copy_tile(uint32_t to, const char* k_cache, const char* v_cache, const Place& place) {
  int lane = threadIdx.x & 31;
  const char* k = k_cache + (int64_t)place.at[0] * 16;
  const char* v = v_cache + (int64_t)place.at[0] * 16;
  int64_t turn = BLOCK_SHIFT < 4 ? ((int64_t)place.at[BLOCK_SHIFT < 4] - place.at[0]) * 16 - 8 * TOKEN_BYTES : 0;
  bool whole = place.low <= 0 && place.high >= TILE;
  if (whole && BLOCK_SHIFT >= 4) {
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
      int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
      fetch16(to + row * PITCH + chunk * 16, k + row * TOKEN_BYTES + chunk * 16);
      fetch16(to + (TILE + row) * PITCH + chunk * 16, v + row * TOKEN_BYTES + chunk * 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
      int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
      bool valid = row >= place.low && row < place.high;
      int64_t offset = valid ? row * TOKEN_BYTES + chunk * 16 + (row >= 8 ? turn : 0) : 0;
      fetch16(to + row * PITCH + chunk * 16, k + offset, valid);
      fetch16(to + (TILE + row) * PITCH + chunk * 16, v + offset, valid);
    }
  }
}
