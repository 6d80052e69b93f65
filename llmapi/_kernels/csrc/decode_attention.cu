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
#define LOG2E 1.4426950408889634f
#define NOWHERE 0xffffffffu
#define NO_LOGIT __int_as_float(0xff800000)  // minus infinity

// Queries that one pass holds; a larger group takes several passes over the keys.
#if LLM_DTYPE != 0 && GROUP > 16 && HEAD_DIM <= 128
#define MTILES 2
#else
#define MTILES 1
#endif
#define PASS (16 * MTILES)
#define PASSES ((GROUP + PASS - 1) / PASS)
#define ROWS (GROUP < PASS ? GROUP : PASS)
#define SETS (KV_HEADS * PASSES / ACROSS)

// What a thread holds of a pass: OUTS accumulators in SLOTS rows; KEPT of them are of rows that can exist.
#if LLM_DTYPE == 0
#define COLUMNS ((HEAD_DIM + 31) / 32)
#define SLOTS ROWS
#define OUTS (ROWS * COLUMNS)
DEVICE constexpr int slot_of(int i) { return i / COLUMNS; }
#define KEPT OUTS
DEVICE constexpr bool held(int i) { return true; }
DEVICE constexpr int kept(int i) { return i; }
#else
#define NTILES (HEAD_DIM / 8)
#define HALVES (ROWS > 8 ? 2 : 1)
#define SLOTS (MTILES * 2)
#define OUTS (MTILES * NTILES * 4)
DEVICE constexpr int slot_of(int i) { return i / (NTILES * 4) * 2 + (i & 3) / 2; }
#define KEPT (MTILES * NTILES * 2 * HALVES)
DEVICE constexpr bool held(int i) { return HALVES == 2 || (i & 2) == 0; }
DEVICE constexpr int kept(int i) { return HALVES == 2 ? i : i / 4 * 2 + (i & 1); }
#endif
#define REGION ((KEPT + 2 * SLOTS) * 32)  // floats through which one warp hands its state to another
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
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
DEVICE int warp_largest(int x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
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
#pragma unroll 4
  for (int c = 0; c < 32; c++) {
    if (c * rounds * 32 >= work.count) break;
    int cost = 0;
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

// A raw score to a logit in units of log2.
DEVICE float logit(float raw, float scale, float softcap, float slope, int distance) {
  float x = raw * scale;
  if (softcap > 0.0f) x = softcap - 2.0f * softcap / (1.0f + exp2_fast(2.0f * LOG2E / softcap * x));
  return (x + slope * distance) * LOG2E;
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
    float other = region[(KEPT + s) * 32 + lane], sum = region[(KEPT + SLOTS + s) * 32 + lane];
    float most = fmaxf(state.most[s], other);
    // Both are -inf for warps that saw no tile.
    keep[s] = most == NO_LOGIT ? 0.0f : exp2_fast(state.most[s] - most);
    take[s] = most == NO_LOGIT ? 0.0f : exp2_fast(other - most);
    state.most[s] = most;
    state.sum[s] = state.sum[s] * keep[s] + sum * take[s];
  }
#pragma unroll
  for (int i = 0; i < OUTS; i++) {
    if (held(i)) state.out[i] = state.out[i] * keep[slot_of(i)] + region[kept(i) * 32 + lane] * take[slot_of(i)];
  }
}
DEVICE void hand_over(const State& state, float* region) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < OUTS; i++) {
    if (held(i)) region[kept(i) * 32 + lane] = state.out[i];
  }
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    region[(KEPT + s) * 32 + lane] = state.most[s];
    region[(KEPT + SLOTS + s) * 32 + lane] = state.sum[s];
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
    x = seen ? logit(x, scale, softcap, slopes[r], position - (piece.length - 1)) : NO_LOGIT;
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
DEVICE int row_of(int slot) { return slot / 2 * 16 + (slot & 1) * 8 + (threadIdx.x & 31) / 4; }

struct Queries {
  uint32_t part[MTILES][HEAD_DIM / 16][4];
};
DEVICE void load_queries(Queries& queries, const scalar_t* q, int rows) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < MTILES; m++) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = m * 16 + (i & 1) * 8 + lane / 4, column = k * 16 + (i >> 1) * 8 + (lane & 3) * 2;
        uint32_t pair = 0;
        if (row < rows) pair = *reinterpret_cast<const uint32_t*>(q + row * HEAD_DIM + column);
        queries.part[m][k][i] = pair;
      }
    }
  }
}

// One tile of 16 tokens: scores as 16 queries by 16 tokens, then their weights times the values.
DEVICE void attend(State& state, const Queries& queries, const char* keys, const char* values, int token,
                   const Piece& piece, float scale, float softcap, const float (&slopes)[SLOTS]) {
  int lane = threadIdx.x & 31;
  float score[MTILES][2][4];
#pragma unroll
  for (int m = 0; m < MTILES; m++) {
#pragma unroll
    for (int i = 0; i < 8; i++) score[m][i >> 2][i & 3] = 0.0f;
  }
  const char* key = keys + ((lane >> 4) * 8 + (lane & 7)) * PITCH + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) {
    uint32_t b[4];
    ldmatrix_x4(b, key + k * 32);
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
      mma(score[m][0], queries.part[m][k], b[0], b[1], scalar_t());
      mma(score[m][1], queries.part[m][k], b[2], b[3], scalar_t());
    }
  }
  bool whole = token >= piece.low && token + TILE <= piece.length;
  bool plain = softcap <= 0.0f;
  uint32_t weight[MTILES][4];
#pragma unroll
  for (int m = 0; m < MTILES; m++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int slot = m * 2 + h;
      if (h == 1 && HALVES == 1) {
        weight[m][1] = weight[m][3] = 0;
        continue;
      }
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int position = token + (i >> 1) * 8 + (lane & 3) * 2 + (i & 1);
        float raw = score[m][i >> 1][h * 2 + (i & 1)];
        x[i] = plain ? (raw * scale + slopes[slot] * (position - (piece.length - 1))) * LOG2E
                     : logit(raw, scale, softcap, slopes[slot], position - (piece.length - 1));
        if (!whole && (position < piece.low || position >= piece.length)) x[i] = NO_LOGIT;
      }
      float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      most = fmaxf(most, state.most[slot]);
      float keep = exp2_fast(state.most[slot] - most);
      state.most[slot] = most;
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = exp2_fast(x[i] - most);
      state.sum[slot] = state.sum[slot] * keep + ((x[0] + x[1]) + (x[2] + x[3]));
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        state.out[(m * NTILES + n) * 4 + h * 2] *= keep;
        state.out[(m * NTILES + n) * 4 + h * 2 + 1] *= keep;
      }
      weight[m][h] = pack2(scalar_t(), x[0], x[1]);
      weight[m][h + 2] = pack2(scalar_t(), x[2], x[3]);
    }
  }
  const char* value = values + (((lane >> 3) & 1) * 8 + (lane & 7)) * PITCH + (lane >> 4) * 16;
#pragma unroll
  for (int n = 0; n < NTILES; n += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, value + n * 16);
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
      float(&left)[4] = *reinterpret_cast<float(*)[4]>(&state.out[(m * NTILES + n) * 4]);
      float(&right)[4] = *reinterpret_cast<float(*)[4]>(&state.out[(m * NTILES + n + 1) * 4]);
      mma(left, weight[m], b[0], b[1], scalar_t());
      mma(right, weight[m], b[2], b[3], scalar_t());
    }
  }
}

// The four lanes of a row have each summed the weights of their own tokens.
DEVICE void close_sums(State& state) {
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    state.sum[s] += __shfl_xor_sync(0xffffffffu, state.sum[s], 1);
    state.sum[s] += __shfl_xor_sync(0xffffffffu, state.sum[s], 2);
  }
}

DEVICE void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
DEVICE void store_pair(scalar_t* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack2(scalar_t(), x, y);
}
template <typename T, typename Place>
DEVICE void write_rows(const State& state, const float (&factor)[SLOTS], int rows, Place place) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    int row = row_of(s);
    if (row >= rows) continue;
    T* to = place(row) + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
      const float* pair = &state.out[(s / 2 * NTILES + n) * 4 + (s & 1) * 2];
      store_pair(to + n * 8, pair[0] * factor[s], pair[1] * factor[s]);
    }
  }
}
#endif

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
    int behind = warp_running(mine), before = behind - mine;
    int c = __ffs(__ballot_sync(0xffffffffu, before * SETS <= start && start < behind * SETS)) - 1;
    int base = __shfl_sync(0xffffffffu, before, c), sequence = 0;
    for (int u = 0; u < rounds; u++) {
      Piece piece;
      measure(work, (c * rounds + u) * 32 + lane, piece);
      behind = base + warp_running(piece.cost), before = behind - piece.cost;
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

  // The loading side: runs ahead of the computing side by STAGES tiles.
  Piece ahead = first;
  int ahead_tile = max(start - ahead.at, 0) + along, ahead_end = min(ahead.tiles, stop - ahead.at);
  bool more = true;
  auto settle = [&]() {
    while (more && ahead_tile >= ahead_end) {
      more = next(work, stop, ahead);
      ahead_tile = along;
      ahead_end = min(ahead.tiles, stop - ahead.at);
    }
  };
  // Where lane % 16's token of the tile lies in the caches, in chunks of 16 bytes.
  auto locate = [&]() -> uint32_t {
    int token = (ahead.first_tile + ahead_tile) * TILE + (lane & 15);
    if (!more || token < ahead.low || token >= ahead.length) return NOWHERE;
    int block = tables[(int64_t)ahead.sequence * table_stride + (token >> BLOCK_SHIFT)];
    uint32_t slot = ((uint32_t)block << BLOCK_SHIFT) + (token & ((1 << BLOCK_SHIFT) - 1));
    return (slot * KV_HEADS + (ahead.set * ACROSS + across) / PASSES) * CHUNKS;
  };
  auto copy = [&](int stage, uint32_t place) {
    char* to = ring + stage * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
      int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
      uint32_t from = __shfl_sync(0xffffffffu, place, row);
      bool valid = from != NOWHERE;
      int64_t offset = valid ? (int64_t)(from + chunk) * 16 : 0;
      cp_async16(to + row * PITCH + chunk * 16, k_cache + offset, valid);
      cp_async16(to + (TILE + row) * PITCH + chunk * 16, v_cache + offset, valid);
    }
  };
  uint32_t places[STAGES + 1];
  bool full[STAGES + 1];
#pragma unroll
  for (int i = 0; i <= STAGES; i++) {
    settle();
    full[i] = more;
    places[i] = locate();
    ahead_tile += ALONG;
  }
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (full[i]) copy(i, places[i]);
    cp_async_commit();
  }
  uint32_t place = places[STAGES];
  bool pending = full[STAGES];
  int stage = 0;

  // The computing side.
  Piece piece = first;
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

    for (int tile = from + along; tile < to; tile += ALONG) {
      cp_async_wait<STAGES - 1>();
      __syncwarp();
      const char* keys = ring + stage * STAGE_BYTES;
      attend(state, queries, keys, keys + TILE * PITCH, (piece.first_tile + tile) * TILE, piece, scale, softcap,
             slopes);
      __syncwarp();
      if (pending) copy(stage, place);
      cp_async_commit();
      settle();
      pending = more;
      place = locate();
      ahead_tile += ALONG;
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
    for (int item = along * 32 + lane; item < rows * (HEAD_DIM / 4); item += ALONG * 32) {
      int row = item / (HEAD_DIM / 4), column = item % (HEAD_DIM / 4) * 4;
      float most = NO_LOGIT, sum = 0.0f;
      float4 total4 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (sinks) {
        most = sinks[head + row] * LOG2E;
        sum = 1.0f;
      }
      constexpr int BATCH = 8;
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
