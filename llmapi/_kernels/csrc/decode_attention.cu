// Attention of one query token per sequence over the paged KV cache (decoding), split over the sequences' tokens.
//
// The work is a line of pieces: sequence by sequence and, in each, one piece per set of ACROSS key heads. A piece is as
// long as its tiles of 16 tokens. Every block of the grid takes an equal stretch of that line, so that any mix of
// lengths loads all multiprocessors alike ("stream-K": Osama et al. 2023, arXiv:2301.03598; split attention: Dao et
// al. 2023, Flash-Decoding). A piece that lies in several stretches is combined by whichever block arrives last.
//
// A warp owns tiles of its own (every ALONG-th of the piece) and a ring of STAGES tiles in shared memory that it fills
// with asynchronous copies, across the ends of pieces; warps meet only when a piece ends. Scores and outputs are
// matrix instructions with the queries of a key head padded to 16 rows; float32 uses plain arithmetic.
//
// HEAD_DIM: elements of a head, a multiple of 16. GROUP: query heads of a key head. KV_HEADS. BLOCK_SHIFT: log2 of the
// tokens of a block. WARPS: of a block; ACROSS: key heads that they serve side by side, a divisor of WARPS.
// STAGES: tiles in flight of a warp. CTAS: blocks resident on a multiprocessor. LEAST: fewest tiles of a stretch;
// WHOLE: pieces up to this many tiles are not split while each has a block of its own. PIECE_COST: what starting and
// ending a piece costs, in tiles.
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

#define TILE 16
#define CHUNKS (HEAD_DIM * (int)sizeof(scalar_t) / 16)  // 16-byte chunks of a token's head
#define PITCH ((CHUNKS | 1) * 16)                       // odd, so that 8 rows lie in different banks
#define STAGE_BYTES (2 * TILE * PITCH)
#define TOKEN_BYTES (KV_HEADS * CHUNKS * 16)
#ifndef CACHE_HINT
#define CACHE_HINT ""
#endif
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

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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
    asm volatile("bar.sync %0, %1;" ::"r"(1 + across), "n"(ALONG * 32) : "memory");
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

DEVICE uint32_t transpose8(uint32_t pair) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

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
    weight[n][0] = transpose8(pack2(scalar_t(), x[0], x[1]));
    weight[n][1] = transpose8(pack2(scalar_t(), x[2], x[3]));
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

// 16 bytes from global to shared memory; zeros where not valid.
DEVICE void fetch16(uint32_t to, const char* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
#else
  uint4 x = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}
DEVICE void fetch16(uint32_t to, const char* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global" CACHE_HINT " [%0], [%1], 16;" ::"r"(to), "l"(from));
#else
  fetch16(to, from, true);
#endif
}

// Where a tile lies in the caches.
struct Place {
  uint32_t at[BLOCK_SHIFT < 4 ? 2 : 1];  // first token, in 16-byte chunks; blocks of 8 have the last 8 tokens elsewhere
  int low, high;                          // rows of the tile that are seen
};

// Grid: any number of blocks. partials: [blocks, 2, ACROSS, ROWS, HEAD_DIM] floats, then as many rows of (largest
// logit, sum). counters: [batch, KV_HEADS * PASSES], zero before and after. counts: null, or [>= 1]: how many sequences
// of the batch decode. query_start: null, or where sequences start in q; those with more than one row are left out.
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
    decode_attention(scalar_t* __restrict__ out, const scalar_t* __restrict__ q, const char* __restrict__ k_cache,
                     const char* __restrict__ v_cache, const int* __restrict__ tables, const int* __restrict__ seq_lens,
                     const int* __restrict__ query_start, const int* __restrict__ counts,
                     const float* __restrict__ alibi, const float* __restrict__ sinks, float* partials, int* counters,
                     int table_stride, int64_t q_stride, int64_t out_stride, int batch, float scale, float softcap,
                     int window) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int arrived[ACROSS];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int across = warp % ACROSS, along = warp / ACROSS;
  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  float* regions = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES) + across * (ALONG / 2) * REGION;

  pdl_wait();
  pdl_launch();

  // How the line is shared out: every warp works it out for itself.
  Work work = {seq_lens, query_start, batch, window, 1, false};
  if (batch > 32) {  // one round trip brings the lengths near
    int touched = seq_lens[(int)((int64_t)lane * batch / 32)];
    asm volatile("" ::"r"(touched));
  }
  if (counts) work.count = min(batch, counts[0]);
  int rounds = CEIL_DIV(batch, 1024), blocks = gridDim.x, longest, live;
  int mine = tally(work, rounds, longest, live);
  int total = warp_total(mine) * SETS;
  if (total == 0) return;
  work.share = max(CEIL_DIV(total, blocks), LEAST);
  if (live * SETS <= blocks) {
    Work even = work;
    even.aligned = true;
    even.share = longest <= WHOLE ? longest : work.share;
    int ignored;
    int other = tally(even, rounds, ignored, ignored);
    int all = warp_total(other) * SETS;
    if (all <= blocks * even.share) {
      work = even;
      mine = other;
      total = all;
    }
  }
  int start = blockIdx.x * work.share, stop = min(start + work.share, total);
  if (start >= total) return;

  // The piece where this block's stretch starts.
  Piece first;
  {
    int c = 0, base = 0, sequence = 0;
    if (batch > 32) {
      int behind = warp_running(mine), before = behind - mine;
      c = __ffs(__ballot_sync(0xffffffffu, before * SETS <= start && start < behind * SETS)) - 1;
      base = __shfl_sync(0xffffffffu, before, c);
    }
#pragma unroll 1
    for (int u = 0; u < rounds && batch > 1; u++) {
      Piece piece;
      measure(work, (c * rounds + u) * 32 + lane, piece);
      int behind = base + warp_running(piece.cost), before = behind - piece.cost;
      unsigned found = __ballot_sync(0xffffffffu, before * SETS <= start && start < behind * SETS);
      if (found) {
        int at = __ffs(found) - 1;
        sequence = (c * rounds + u) * 32 + at;
        base = __shfl_sync(0xffffffffu, before, at);
        break;
      }
      base = __shfl_sync(0xffffffffu, behind, 31);
    }
    measure(work, sequence, first);
    first.set = (start - base * SETS) / first.cost;
    first.at = base * SETS + first.set * first.cost;
  }

  // A warp's first tile of a piece: turns go round along the line, so that short ends of pieces even out.
  auto first_turn = [&](const Piece& of) {
    int from = max(start - of.at, 0);
    return from + ((along - of.at - from) & (ALONG - 1));
  };

  // The loading side: runs ahead of the computing side by STAGES tiles.
  Piece ahead = first;
  int ahead_tile = first_turn(ahead), ahead_end = min(ahead.tiles, stop - ahead.at);
  bool more = true;
  auto settle = [&]() {
#pragma unroll 1
    while (more && ahead_tile >= ahead_end) {
      more = next(work, stop, ahead);
      ahead_tile = first_turn(ahead);
      ahead_end = min(ahead.tiles, stop - ahead.at);
    }
  };
  auto locate = [&](Place& place) {
    if (!more) return;
    int token = (ahead.first_tile + ahead_tile) * TILE;
    place.low = ahead.low - token;
    place.high = ahead.length - token;
    const int* table = tables + (int64_t)ahead.sequence * table_stride;
#pragma unroll
    for (int i = 0; i < (BLOCK_SHIFT < 4 ? 2 : 1); i++) {
      int at = min(token + i * 8, ahead.length - 1);
      uint32_t slot = ((uint32_t)table[at >> BLOCK_SHIFT] << BLOCK_SHIFT) + ((token + i * 8) & ((1 << BLOCK_SHIFT) - 1));
      place.at[i] = (slot * KV_HEADS + (ahead.set * ACROSS + across) / PASSES) * CHUNKS;
    }
  };
  uint32_t ring_at = shared_address(ring);
  auto copy = [&](int stage, const Place& place) {
    uint32_t to = ring_at + stage * STAGE_BYTES;
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
  };
  Place place;
  bool pending;
  auto look_ahead = [&]() {
    settle();
    pending = more;
    locate(place);
    ahead_tile += ALONG;
  };
  // Starts the copy of the tile that was looked up before, and looks up the next one meanwhile.
  auto refill = [&](int stage) {
    Place now = place;
    bool any = pending;
    look_ahead();
    if (any) copy(stage, now);
    cp_async_commit();
  };
  look_ahead();
#pragma unroll 1
  for (int i = 0; i < STAGES; i++) refill(i);
  int stage = 0;

  // The computing side.
  Piece piece = first;
#pragma unroll 1
  do {
    int from = max(start - piece.at, 0), to = min(piece.tiles, stop - piece.at);
    if (from >= to) continue;
    int pass = (piece.set * ACROSS + across) % PASSES, key_head = (piece.set * ACROSS + across) / PASSES;
    int head = key_head * GROUP + pass * PASS, rows = PASSES == 1 ? GROUP : min(PASS, GROUP - pass * PASS);
    int query = query_start ? query_start[piece.sequence] : piece.sequence;
    State state;
    Queries queries;
    float slopes[SLOTS];
    load_queries(queries, q + query * q_stride + head * HEAD_DIM, rows);
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
      slopes[s] = alibi && row_of(s) < rows ? alibi[head + row_of(s)] : 0.0f;
      state.most[s] = NO_LOGIT;
      state.sum[s] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < OUTS; i++) state.out[i] = 0.0f;

#pragma unroll 1
    for (int tile = first_turn(piece); tile < to; tile += ALONG) {
      cp_async_wait<STAGES - 1>();
      __syncwarp();
      const char* keys = ring + stage * STAGE_BYTES;
      attend(state, queries, keys, keys + TILE * PITCH, (piece.first_tile + tile) * TILE, piece, scale, softcap,
             slopes);
      __syncwarp();
      refill(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    close_sums(state);

    // The warps of a piece hand their states down to the first. A warp writes where it alone has read.
#pragma unroll
    for (int half = ALONG / 2; half; half /= 2) {
      if (along >= half && along < 2 * half) {
        hand_over(state, regions + (half == ALONG / 2 ? along - half : along) * REGION);
      }
      group_sync(across);
      if (along < half) join(state, regions + (half == ALONG / 2 ? along : along + half) * REGION);
      if (half == 1) group_sync(across);
    }

    scalar_t* result = out + query * out_stride + head * HEAD_DIM;
    int low_block = piece.at / work.share, high_block = (piece.at + piece.tiles - 1) / work.share;
    if (low_block == high_block) {
      if (along == 0) {
        float factor[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
          float sum = state.sum[s], most = state.most[s], shrink = 1.0f;
          if (sinks && row_of(s) < rows) {
            float sink = sinks[head + row_of(s)] * LOG2E, top = fmaxf(most, sink);
            shrink = exp2_fast(most - top);
            sum = sum * shrink + exp2_fast(sink - top);
          }
          factor[s] = shrink / sum;
        }
        write_rows<scalar_t>(state, factor, rows, [&](int row) { return result + row * HEAD_DIM; });
      }
      continue;
    }

    // Part of a piece: leave it in global memory, and combine all parts if it was the last to come.
    float* sums = partials + (int64_t)blocks * 2 * ACROSS * ROWS * HEAD_DIM;
    if (along == 0) {
      int64_t row = (((int64_t)blockIdx.x * 2 + (blockIdx.x == low_block)) * ACROSS + across) * ROWS;
      float factor[SLOTS];
#pragma unroll
      for (int s = 0; s < SLOTS; s++) factor[s] = 1.0f;
      write_rows<float>(state, factor, rows, [&](int r) { return partials + (row + r) * HEAD_DIM; });
#pragma unroll
      for (int s = 0; s < SLOTS; s++) {
        if (row_of(s) < rows) {
          reinterpret_cast<float2*>(sums)[row + row_of(s)] = make_float2(state.most[s], state.sum[s]);
        }
      }
      __threadfence();
      __syncwarp();
      if (lane == 0) {
        int* counter = counters + (int64_t)piece.sequence * (KV_HEADS * PASSES) + piece.set * ACROSS + across;
        bool last = atomicAdd(counter, 1) == high_block - low_block;
        if (last) *counter = 0;
        arrived[across] = last;
        __threadfence();
      }
    }
    group_sync(across);
    if (!arrived[across]) continue;
#pragma unroll 1
    for (int item = along * 32 + lane; item < rows * (HEAD_DIM / 4); item += ALONG * 32) {
      int row = item / (HEAD_DIM / 4), column = item % (HEAD_DIM / 4) * 4;
      float most = NO_LOGIT, sum = 0.0f;
      float4 total4 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (sinks) {
        most = sinks[head + row] * LOG2E;
        sum = 1.0f;
      }
      constexpr int BATCH = 8;
#pragma unroll 1
      for (int b = low_block; b <= high_block; b += BATCH) {
        float2 part[BATCH];
        float4 value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          part[i] = make_float2(NO_LOGIT, 0.0f);
          value[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (b + i <= high_block) {
            int64_t at = (((int64_t)(b + i) * 2 + (b + i == low_block)) * ACROSS + across) * ROWS + row;
            part[i] = __ldcg(reinterpret_cast<const float2*>(sums) + at);
            value[i] = __ldcg(reinterpret_cast<const float4*>(partials + at * HEAD_DIM + column));
          }
        }
        float top = most;
#pragma unroll
        for (int i = 0; i < BATCH; i++) top = fmaxf(top, part[i].x);
        float keep = exp2_fast(most - top);
        sum *= keep;
        total4.x *= keep, total4.y *= keep, total4.z *= keep, total4.w *= keep;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          float take = exp2_fast(part[i].x - top);
          sum += part[i].y * take;
          total4.x += value[i].x * take, total4.y += value[i].y * take;
          total4.z += value[i].z * take, total4.w += value[i].w * take;
        }
        most = top;
      }
      float inverse = 1.0f / sum;
      Vec<scalar_t, 4> four;
      four.at[0] = from_float<scalar_t>(total4.x * inverse);
      four.at[1] = from_float<scalar_t>(total4.y * inverse);
      four.at[2] = from_float<scalar_t>(total4.z * inverse);
      four.at[3] = from_float<scalar_t>(total4.w * inverse);
      store(result + row * HEAD_DIM + column, four);
    }
  } while (next(work, stop, piece));
}
