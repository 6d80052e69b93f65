// y[M, N] = x[M, K] w[N, K]^T for at most 128 rows, with cp.async; plain copies on Turing. See skinny_linear.cu.
//
// Tiles of 64 rows are cut into units of DEPTH columns, and all units, tile after tile, are dealt in equal runs. A tile that
// several blocks share is added up by the last to finish. Every sum has one order, which depends neither on timing nor on M.
//
// LLM_ROWS, LLM_BOXES, LLM_GATE: see skinny_linear_tile.cuh. LLM_STAGES: of the ring.
#include "skinny_linear_tile.cuh"

#ifndef LLM_STAGES
#define LLM_STAGES 4
#endif

constexpr int TILE = 64, TILE_OUT = LLM_GATE ? TILE / 2 : TILE, STAGES = LLM_STAGES;
constexpr int WEIGHT_BOX = TILE * 128, STAGE = BOXES * (WEIGHT_BOX + X_BOX);

// Units dealt to blocks: the first `extra` blocks have one more than `base`.
struct Deal {
  int depth, base, extra;  // units of a tile; see above
  DEVICE Deal(int tiles, int columns) {
    depth = CEIL_DIV(columns, DEPTH);
    int units = tiles * depth;
    base = units / (int)gridDim.x;
    extra = units - base * (int)gridDim.x;
  }
  DEVICE int begin(int block) const { return block * base + min(block, extra); }
  DEVICE int block_of(int unit) const {
    int longer = extra * (base + 1);
    return unit < longer ? unit / (base + 1) : extra + (unit - longer) / base;
  }
};

// Adds up a tile that several blocks share. True in the block that came last: its acc is the sum.
// workspace: [blocks][2][ACC / 4][THREADS][4]. counters: one per tile, zero before and after.
DEVICE bool combine(float (&acc)[ACC], const Deal& deal, int tile, int thread, float* workspace, int* counters) {
  __shared__ int arrived;
  const int start = tile * deal.depth;
  const int first = deal.block_of(start), last = deal.block_of(start + deal.depth - 1);
  const bool late = deal.begin(first) < start;  // the first block began with another tile
  auto slot = [&](int of) {
    return reinterpret_cast<float4*>(workspace) + ((int64_t)of * 2 + (of == first && late)) * (ACC / 4 * THREADS) +
           thread;
  };
  float4* mine = slot(blockIdx.x);
#pragma unroll
  for (int i = 0; i < ACC / 4; i++)
    __stcg(mine + i * THREADS, make_float4(acc[i * 4], acc[i * 4 + 1], acc[i * 4 + 2], acc[i * 4 + 3]));
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    arrived = atomicAdd(counters + tile, 1);
    if (arrived == last - first) counters[tile] = 0;
  }
  __syncthreads();
  if (arrived != last - first) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
#pragma unroll 4
  for (int of = first; of <= last; of++) {
    const float4* theirs = slot(of);
#pragma unroll
    for (int i = 0; i < ACC / 4; i++) {
      float4 part = __ldcg(theirs + i * THREADS);
      acc[i * 4] += part.x, acc[i * 4 + 1] += part.y, acc[i * 4 + 2] += part.z, acc[i * 4 + 3] += part.w;
    }
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    skinny_linear_copy(const scalar_t* __restrict__ weights, const scalar_t* __restrict__ x, int64_t x_stride,
                       scalar_t* out, int64_t out_stride, const scalar_t* bias, const scalar_t* residual,
                       int64_t residual_stride, float* workspace, int* counters, int rows, int columns, int depth,
                       int tiles) {
  extern __shared__ uint8_t dynamic[];
  uint8_t* ring = dynamic + (-shared_address(dynamic) & 1023);
  const Args args = {out, bias, residual, out_stride, residual_stride, rows, columns, TILE_OUT, nullptr};
  const Deal deal(tiles, depth);
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1);
  const int thread = threadIdx.x, chunk = thread & 7;

  auto load_weights = [&](int unit, int slot) {
    const int tile = unit / deal.depth, column = (unit - tile * deal.depth) * DEPTH + chunk * 8;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
#pragma unroll
      for (int row = thread >> 3; row < TILE; row += THREADS / 8) {
#if LLM_GATE
        const int of = tile * TILE_OUT + row / 8 * 4 + row % 4;
        const int64_t from = of + (row % 8 < 4 ? 0 : columns);
#else
        const int of = tile * TILE + row;
        const int64_t from = of;
#endif
        const bool valid = of < columns && column + box * BOX < depth;
        cp_async16(ring + slot * STAGE + box * WEIGHT_BOX + row * 128 + ((chunk ^ (row & 7)) << 4),
                   valid ? weights + from * depth + column + box * BOX : weights, valid);
      }
  };
  auto load_x = [&](int unit, int slot) {
    const int column = unit % deal.depth * DEPTH + chunk * 8;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
#pragma unroll
      for (int row = thread >> 3; row < ROWS; row += THREADS / 8) {
        const bool valid = row < rows && column + box * BOX < depth;
        cp_async16(ring + slot * STAGE + BOXES * WEIGHT_BOX + box * X_BOX + row * 128 + ((chunk ^ (row & 7)) << 4),
                   valid ? x + row * x_stride + column + box * BOX : x, valid);
      }
  };

  // Weights never change: they are on their way before the kernel before has ended.
  for (int i = 0; i < STAGES - 1; i++)
    if (begin + i < end) load_weights(begin + i, i);
  pdl_launch();
  pdl_wait();
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) load_x(begin + i, i);
    cp_async_commit();
  }
  int slot = 0, next = STAGES - 1;
  for (int unit = begin; unit < end;) {
    const int tile = unit / deal.depth, start = tile * deal.depth, stop = min(end, start + deal.depth);
    const bool whole = unit == start && stop == start + deal.depth;
    float acc[ACC];
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
    for (int u = unit; u < stop; u++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      if (u + STAGES - 1 < end) {
        load_weights(u + STAGES - 1, next);
        load_x(u + STAGES - 1, next);
      }
      cp_async_commit();
      const uint8_t* stage = ring + slot * STAGE;
      multiply_warp(acc, stage, WEIGHT_BOX, stage + BOXES * WEIGHT_BOX, thread);
      if (++slot == STAGES) slot = 0;
      if (++next == STAGES) next = 0;
    }
    unit = stop;
    if (!whole && !combine(acc, deal, tile, thread, workspace, counters)) continue;
    Bias bias_of;
    bias_of.load(args, tile, 0, thread);
    uint32_t residual_of[ROWS / 8][HALVES];
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
      for (int h = 0; h < HALVES; h++) residual_of[n][h] = load_residual(args, tile, 0, n, h, thread);
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) {
      const float c[4] = {acc[n * 4], acc[n * 4 + 1], acc[n * 4 + 2], acc[n * 4 + 3]};
      finish(c, bias_of, residual_of[n], Gain(), tile, 0, n, thread, args);
    }
  }
}
