// A plugin: attention of a ragged step over the paged cache, in one kernel without a workspace.
//
// A sequence with one new token is served by one block for each key head (and pass over its queries): its warps take
// tiles of 16 tokens in turn, with the arithmetic of decode_attention.cu, and meet at the end. One with more new tokens
// is cut into tiles of query rows, a block for each tile and head, as context_attention.cu does it.
//
// LLM_HEAD_DIM, LLM_WARPS, LLM_KEYS, LLM_ROW_TILES: see context_attention.cu; GROUP, KV_HEADS, BLOCK_SHIFT, STAGES: see
// decode_attention.cu. ALIBI, SINKS: whether the model has them; with either of them there are both parameters.
// SHARED: bytes of dynamic shared memory. Grid: x, query tiles, at least as many as there are; y, query heads.
//
// PARTS: the keys of a sequence with one new token are divided over the grid's z. Each part's sum of values goes to
// `parts` [z, tokens, heads, D], its largest logit (in units of log2) and sum of weights to `sums` [z, tokens, heads, 2],
// for plugin_join_parts.cu. Other rows go to `out` as without, and their first sum of weights is -1.
#include "plugin.cuh"
#include "context_attention_tile.cuh"

#define HEAD_DIM LLM_HEAD_DIM
#define WARPS LLM_WARPS
#define ACROSS 1
#include "decode_attention.cuh"

static_assert(SHARED >= WARPS * STAGES * STAGE_BYTES && SHARED >= ALONG / 2 * REGION * 4, "shared memory of decoding");
#if LLM_DTYPE != 0
static_assert(SHARED >= (BM + 2 * BN) * (D + 8) * sizeof(scalar_t), "shared memory of a tile");
#endif
static_assert(SHARED + 64 <= 48 << 10, "a plugin has 48 KiB of shared memory");

DEVICE int tiles_of(const int* query_start, int sequence) {
  return (max(query_start[sequence + 1] - query_start[sequence], 0) + BM - 1) / BM;
}

struct Spot {
  int sequence;
  int tile;  // of the sequence
};

// Where the step's query tile of this index is; false behind the last one. Each warp works it out for itself.
DEVICE bool find_tile(const int* query_start, int batch, int index, Spot& spot) {
  int lane = threadIdx.x & 31, each = CEIL_DIV(batch, 32), mine = 0;
  for (int i = lane * each; i < min((lane + 1) * each, batch); i++) mine += tiles_of(query_start, i);
  int behind = warp_running(mine), before = behind - mine;
  unsigned found = __ballot_sync(0xffffffffu, before <= index && index < behind);
  if (!found) return false;
  int at = __ffs(found) - 1, first = at * each, base = __shfl_sync(0xffffffffu, before, at);
  while (true) {
    int own = first + lane < batch ? tiles_of(query_start, first + lane) : 0;
    behind = base + warp_running(own), before = behind - own;
    found = __ballot_sync(0xffffffffu, before <= index && index < behind);
    if (found) break;
    base = __shfl_sync(0xffffffffu, behind, 31);
    first += 32;
  }
  at = __ffs(found) - 1;
  spot.sequence = first + at;
  spot.tile = index - __shfl_sync(0xffffffffu, before, at);
  return true;
}

// The one new token of a sequence, in row `row`: the queries of pass `unit` % PASSES of key head `unit` / PASSES.
// `parts` and `sums` are this part's.
DEVICE void attend_token(const Attention& of, const int* seq_lens, int sequence, int row, int unit, char* shared,
                         float* parts, float2* sums) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int pass = unit % PASSES, key_head = unit / PASSES;
  int head = key_head * GROUP + pass * PASS, rows = PASSES == 1 ? GROUP : min(PASS, GROUP - pass * PASS);
  Work work = {seq_lens, nullptr, sequence + 1, of.window, 1, false};
  Piece piece;
  measure(work, sequence, piece);
#if PARTS
  int each = CEIL_DIV(piece.tiles, (int)gridDim.z), from = blockIdx.z * each;
  piece.first_tile += from;
  piece.tiles = min(each, piece.tiles - from);
#endif
  State state;
  Queries queries;
  float slopes[SLOTS];
  load_queries(queries, of.q + row * of.q_stride + head * HEAD_DIM, rows);
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    slopes[s] = ALIBI && row_of(s) < rows ? of.alibi_slopes[head + row_of(s)] : 0.0f;
    state.most[s] = NO_LOGIT;
    state.sum[s] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < OUTS; i++) state.out[i] = 0.0f;

  const int* table = of.block_tables + (int64_t)sequence * of.table_stride;
  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  auto fetch = [&](int tile, int stage) {
    if (tile < piece.tiles) {
      Place place;
      locate_tile(place, piece, piece.first_tile + tile, table, key_head);
      copy_tile(shared_address(ring + stage * STAGE_BYTES), reinterpret_cast<const char*>(of.k_cache),
                reinterpret_cast<const char*>(of.v_cache), place);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES; i++) fetch(warp + i * WARPS, i);
  int stage = 0;
#pragma unroll 1
  for (int tile = warp; tile < piece.tiles; tile += WARPS) {
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    const char* keys = ring + stage * STAGE_BYTES;
    attend(state, queries, keys, keys + TILE * PITCH, (piece.first_tile + tile) * TILE, piece, of.scale, of.softcap,
           slopes);
    __syncwarp();
    fetch(tile + STAGES * WARPS, stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  close_sums(state);
  if (WARPS > 1) __syncthreads();  // the rings make room for what the warps hand over
  gather(state, reinterpret_cast<float*>(shared), warp, 0);
  if (warp == 0) {
    float factor[SLOTS];
    int64_t at = (int64_t)row * (KV_HEADS * GROUP) + head;
#if PARTS
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
      factor[s] = 1.0f;
      if (row_of(s) < rows) sums[at + row_of(s)] = make_float2(state.most[s], state.sum[s]);
    }
    write_rows<float>(state, factor, rows, [&](int r) { return parts + (at + r) * HEAD_DIM; });
#else
    finish(state, SINKS ? of.sinks + head : nullptr, rows, factor);
    write_rows<scalar_t>(state, factor, rows, [&](int r) { return of.out + (at + r) * HEAD_DIM; });
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    plugin_paged_attention(const scalar_t* __restrict__ q, const int64_t* __restrict__ pools,
                           const int* __restrict__ block_tables, const int* __restrict__ seq_lens,
                           const int* __restrict__ query_start,
#if ALIBI || SINKS
                           const float* __restrict__ alibi_slopes, const float* __restrict__ sinks,
#endif
                           int layer, int scale, int window, int softcap, int tokens, int batch, int table_stride,
                           scalar_t* __restrict__ out
#if PARTS
                           , float* __restrict__ parts, float* __restrict__ part_sums
#endif
    ) {
  extern __shared__ uint4 dynamic[];
  constexpr int HEADS = KV_HEADS * GROUP;
  int head = blockIdx.y;
#if PARTS
  float2* sums = reinterpret_cast<float2*>(part_sums);
  bool first_part = blockIdx.z == 0;
  auto whole = [&](int row) {  // this head of the row is in `out`
    if (threadIdx.x == 0) sums[(int64_t)row * HEADS + head] = make_float2(0.0f, -1.0f);
  };
#else
  float *parts = nullptr;
  float2* sums = nullptr;
  constexpr bool first_part = true;
  auto whole = [](int) {};
#endif
  auto fill_row = [&](int row, float value) {
    if (!first_part) return;
    fill(out + ((int64_t)row * HEADS + head) * D, D, value);
    whole(row);
  };
  scalar_t *keys, *values;
  if (!find_caches(pools, layer, keys, values)) {
    for (int row = blockIdx.x; row < tokens; row += gridDim.x) fill_row(row, NOT_A_NUMBER);
    return;
  }
  // Rows that belong to no sequence.
  for (int row = query_start[batch] + blockIdx.x; row < tokens; row += gridDim.x) fill_row(row, 0.0f);

  Spot spot;
  if (!find_tile(query_start, batch, blockIdx.x, spot)) return;
  Attention of = {out, q, HEADS * D, keys, values, block_tables, table_stride, HEADS, KV_HEADS, BLOCK_SHIFT,
                  __int_as_float(scale), window, __int_as_float(softcap), nullptr, nullptr};
#if ALIBI
  of.alibi_slopes = alibi_slopes;
#endif
#if SINKS
  of.sinks = sinks;
#endif
  int begin = query_start[spot.sequence], count = query_start[spot.sequence + 1] - begin;
  int length = seq_lens[spot.sequence], first = spot.tile * BM;
  if (length < count) {  // of no meaning: a sequence's new tokens are among its tokens
    for (int row = begin + first; row < begin + min(first + BM, count); row++) fill_row(row, 0.0f);
  } else if (count == 1) {
    int64_t part = (int64_t)blockIdx.z * tokens * HEADS;
    if (head < KV_HEADS * PASSES)
      attend_token(of, seq_lens, spot.sequence, begin, head, reinterpret_cast<char*>(dynamic), parts + part * D,
                   sums + part);
  } else if (first_part) {
    Item item = {spot.sequence, head, begin + first, min(BM, count - first), length - count + first, 0, 1, 1};
    attend_tile(item, of, dynamic);
    for (int row = 0; row < item.rows; row++) whole(item.row + row);
  }
}
