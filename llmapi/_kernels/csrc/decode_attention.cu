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
// ending a piece costs, in tiles. FUSED: queries are not rotated, and each sequence's newest key and value are not in the
// cache yet: all three come from the rows at `q`, see new_token.cuh.
#include "decode_attention.cuh"
#if FUSED
#include "new_token.cuh"
#endif

// Grid: any number of blocks. partials: [blocks, 2, ACROSS, ROWS, HEAD_DIM] floats, then as many rows of (largest
// logit, sum). counters: [batch, KV_HEADS * PASSES], zero before and after. counts: null, or [>= 1]: how many sequences
// of the batch decode. query_start: null, or where sequences start in q; those with more than one row are left out.
// cos_sin: [rows, ROTATED] if that is not 0, with FUSED.
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
    decode_attention(scalar_t* __restrict__ out, const scalar_t* __restrict__ q, char* k_cache, char* v_cache,
                     const int* __restrict__ tables, const int* __restrict__ seq_lens,
                     const int* __restrict__ query_start, const int* __restrict__ counts,
                     const float* __restrict__ alibi, const float* __restrict__ sinks, float* partials, int* counters,
                     int table_stride, int64_t q_stride, int64_t out_stride, int batch, float scale, float softcap,
                     int window, const float* __restrict__ cos_sin) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int arrived[ACROSS];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int across = warp % ACROSS, along = warp / ACROSS;
  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  float* regions = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES) + across * (ALONG / 2) * REGION;

  pdl_launch();

  // How the line is shared out: every warp works it out for itself.
  Work work = {seq_lens, query_start, batch, window, 1, false};
  if (batch > 32) {  // one round trip brings the lengths near
    int touched = seq_lens[(int)((int64_t)lane * batch / 32)];
    ptx::used(touched);
  }
  if (counts) work.count = min(batch, counts[0]);
  int rounds = CEIL_DIV(batch, 1024), blocks = gridDim.x, longest, live;
  int mine = tally(work, rounds, longest, live);
  int total = warp_total(mine) * SETS;
  if (total == 0) {
    pdl_wait();
    return;
  }
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
  if (start >= total) {
    pdl_wait();
    return;
  }

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
    const int* table = tables + (int64_t)ahead.sequence * table_stride;
    locate_tile(place, ahead, ahead.first_tile + ahead_tile, table, (ahead.set * ACROSS + across) / PASSES);
  };
  uint32_t ring_at = shared_address(ring);
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
    if (any) copy_tile(ring_at + stage * STAGE_BYTES, k_cache, v_cache, now);
    cp_async_commit();
  };
  look_ahead();
  // Keys of earlier steps are on their way before this step's are there; a piece's last tile holds the new token.
  int filled = 0;
#pragma unroll 1
  for (; filled < STAGES && (FUSED || !(pending && place.high <= TILE)); filled++) refill(filled);
  pdl_wait();
#pragma unroll 1
  for (; filled < STAGES; filled++) refill(filled);
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
#if FUSED
    rotate_queries(queries, cos_sin + (int64_t)query * ROTATED);
    NewToken token;
    int last = piece.tiles - 1, turns = last - first_turn(piece);
    bool brings = to == piece.tiles && turns >= 0 && (turns & (ALONG - 1)) == 0;  // this warp has the last tile
    if (brings) {
      const scalar_t* key = q + query * q_stride + (KV_HEADS * GROUP + key_head) * HEAD_DIM;
      take(token, key, key + KV_HEADS * HEAD_DIM, cos_sin + (int64_t)query * ROTATED);
      if (pass == 0) {
        int at = piece.length - 1, block = tables[(int64_t)piece.sequence * table_stride + (at >> BLOCK_SHIFT)];
        int64_t slot = ((int64_t)block << BLOCK_SHIFT) + (at & ((1 << BLOCK_SHIFT) - 1));
        int64_t offset = slot * TOKEN_BYTES + key_head * (CHUNKS * 16);
        put(token, reinterpret_cast<scalar_t*>(k_cache + offset), reinterpret_cast<scalar_t*>(v_cache + offset));
      }
    }
#endif

#pragma unroll 1
    for (int tile = first_turn(piece); tile < to; tile += ALONG) {
      cp_async_wait<STAGES - 1>();
      __syncwarp();
      char* keys = ring + stage * STAGE_BYTES;
#if FUSED
      if (brings && tile == last) {
        char* row = keys + (piece.length - 1) % TILE * PITCH;
        put(token, reinterpret_cast<scalar_t*>(row), reinterpret_cast<scalar_t*>(row + TILE * PITCH));
        __syncwarp();
      }
#endif
      attend(state, queries, keys, keys + TILE * PITCH, (piece.first_tile + tile) * TILE, piece, scale, softcap,
             slopes);
      __syncwarp();
      refill(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    close_sums(state);

    gather(state, regions, along, across);

    scalar_t* result = out + query * out_stride + head * HEAD_DIM;
    int low_block = piece.at / work.share, high_block = (piece.at + piece.tiles - 1) / work.share;
    if (low_block == high_block) {
      if (along == 0) {
        float factor[SLOTS];
        finish(state, sinks ? sinks + head : nullptr, rows, factor);
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
