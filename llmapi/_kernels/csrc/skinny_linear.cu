// y[M, N] = x[M, K] w[N, K]^T for at most 64 rows: a stream of weights past a few rows of activations.
//
// The weight is cut into tiles of TILE rows, each tile into units of DEPTH columns. All units, tile after tile, are dealt
// to the blocks in equal runs, so that every multiprocessor reads the same number of bytes whatever N and K are. A tile
// that several blocks share is added up by the one that finishes last, in the order of the blocks: the result depends
// neither on timing nor on M. A unit is TILE rows of weights and ROWS rows of activations, BOXES times 128 bytes of each,
// in the 128-byte swizzle (16-byte chunk c of row r lies at c ^ (r % 8)); a ring of STAGES units keeps memory busy.
//
// In the matrix instructions the weight is the operand with 16 (64) rows and x^T the one with 8 (ROWS) columns, so that
// 8 rows of activations fill them. With LLM_GATE a tile interleaves 8 gate rows with the 8 up rows that belong to them:
// one thread holds both.
//
// LLM_ROWS: M rounded up: 8, 16, 24, 32, 48, 64. LLM_GROUPS: warpgroups, 64 weight rows each. LLM_BOXES, LLM_STAGES: see
// above. LLM_BULK: 1 bulk tensor copies (compute capability 9.0), 0 cp.async. LLM_AHEAD: units prefetched to L2 beyond
// the ring. LLM_GATE: 0 none, 1 silu, 2 gelu, 3 gelu_tanh, 4 relu.
#include "skinny_linear.cuh"

#ifndef LLM_ROWS
#define LLM_ROWS 8
#endif
#ifndef LLM_GROUPS
#define LLM_GROUPS 1
#endif
#ifndef LLM_BOXES
#define LLM_BOXES 1
#endif
#ifndef LLM_STAGES
#define LLM_STAGES 4
#endif
#ifndef LLM_BULK
#define LLM_BULK 0
#endif
#ifndef LLM_AHEAD
#define LLM_AHEAD 0
#endif
#ifndef LLM_GATE
#define LLM_GATE 0
#endif
#ifndef LLM_BLOCKS_PER_SM
#define LLM_BLOCKS_PER_SM 2
#endif

constexpr int ROWS = LLM_ROWS, TILE = 64 * LLM_GROUPS, BOXES = LLM_BOXES, STAGES = LLM_STAGES;
constexpr int BOX = 64, DEPTH = BOX * BOXES;              // columns
constexpr int THREADS = 128 * LLM_GROUPS;                 // that multiply
constexpr int WEIGHT_BOX = TILE * 128, X_BOX = ROWS * 128;  // bytes
constexpr int STAGE = BOXES * (WEIGHT_BOX + X_BOX);
constexpr int ACC = ROWS / 2;                             // float32 accumulators of a thread
constexpr int TILE_OUT = LLM_GATE ? TILE / 2 : TILE;      // columns of y that a tile makes

// What the kernels take besides the weight and x. workspace: [blocks][2][ACC / 4][THREADS][4]. counters: one per tile, zero
// before and after. rows: M. columns: of y. depth: K. bias and residual may be null.
#define PARAMETERS                                                                                                   \
  scalar_t *out, int64_t out_stride, const scalar_t *bias, const scalar_t *residual, int64_t residual_stride,        \
      float *workspace, int *counters, int rows, int columns, int tiles, int depth
#define PACK_PARAMETERS                                                                                              \
  const Args args = {out, bias, residual, workspace, counters, out_stride, residual_stride, rows, columns}

struct Args {
  scalar_t* out;
  const scalar_t *bias, *residual;
  float* workspace;
  int* counters;
  int64_t out_stride, residual_stride;
  int rows, columns;
};

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

DEVICE float activate(float x) {
#if LLM_GATE == 1
  return x / (1.0f + __expf(-x));
#elif LLM_GATE == 2
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
#elif LLM_GATE == 3
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#else
  return fmaxf(x, 0.0f);
#endif
}

DEVICE void group_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// One unit with 16x8x16 instructions: warp `warp` takes rows 16 warp to 16 warp + 15 of the tile.
DEVICE void multiply_warp(float (&acc)[ACC], const uint8_t* stage, int warp, int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int box = 0; box < BOXES; box++) {
    const uint8_t* weights = stage + box * WEIGHT_BOX + row * 128;
    const uint8_t* x = stage + BOXES * WEIGHT_BOX + box * X_BOX + (lane & 7) * 128;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) ldmatrix_x4(a[k], weights + (((half * 4 + k * 2 + (lane >> 4)) ^ (row & 7)) << 4));
#pragma unroll
      for (int n = 0; n < ROWS / 8; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, x + n * 1024 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
        float(&c)[4] = *reinterpret_cast<float(*)[4]>(&acc[n * 4]);
        mma(c, a[0], b[0], b[1], scalar_t());
        mma(c, a[1], b[2], b[3], scalar_t());
      }
    }
  }
}

// Adds up a tile that several blocks share. True in the block that came last: its acc is the sum.
DEVICE bool combine(float (&acc)[ACC], const Deal& deal, int tile, int thread, const Args& args) {
  __shared__ int arrived;
  const int start = tile * deal.depth;
  const int first = deal.block_of(start), last = deal.block_of(start + deal.depth - 1), block = blockIdx.x;
  const bool late = deal.begin(first) < start;  // the first block began with another tile
  auto slot = [&](int of) {
    return reinterpret_cast<float4*>(args.workspace) +
           ((int64_t)of * 2 + (of == first && late)) * (ACC / 4 * THREADS) + thread;
  };
  float4* mine = slot(block);
#pragma unroll
  for (int i = 0; i < ACC / 4; i++)
    __stcg(mine + i * THREADS, make_float4(acc[i * 4], acc[i * 4 + 1], acc[i * 4 + 2], acc[i * 4 + 3]));
  __threadfence();
  group_sync();
  if (thread == 0) {
    int before = atomicAdd(args.counters + tile, 1);
    if (before == last - first) args.counters[tile] = 0;
    arrived = before;
  }
  group_sync();
  if (arrived != last - first) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
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

DEVICE void put(const Args& args, int row, int column, float value) {
  if (args.residual) value += to_float(args.residual[row * args.residual_stride + column]);
  args.out[row * args.out_stride + column] = from_float<scalar_t>(value);
}

// acc[4 n + 2 h + j]: weight row lane / 4 + 8 h of the warp's 16, row 8 n + 2 (lane % 4) + j of x.
DEVICE void finish(const float (&acc)[ACC], int tile, int thread, const Args& args) {
  const int warp = thread >> 5, lane = thread & 31;
#if LLM_GATE
  const int column = tile * TILE_OUT + warp * 8 + (lane >> 2);
  if (column >= args.columns) return;
  float gate_bias = args.bias ? to_float(args.bias[column]) : 0.0f;
  float up_bias = args.bias ? to_float(args.bias[args.columns + column]) : 0.0f;
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int row = n * 8 + (lane & 3) * 2 + j;
      if (row < args.rows)
        put(args, row, column, activate(acc[n * 4 + j] + gate_bias) * (acc[n * 4 + 2 + j] + up_bias));
    }
#else
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int column = tile * TILE_OUT + warp * 16 + h * 8 + (lane >> 2);
    if (column >= args.columns) continue;
    float bias = args.bias ? to_float(args.bias[column]) : 0.0f;
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int row = n * 8 + (lane & 3) * 2 + j;
        if (row < args.rows) put(args, row, column, acc[n * 4 + h * 2 + j] + bias);
      }
  }
#endif
}

#if LLM_BULK && __CUDA_ARCH__ >= 900

// The one thread that fills the ring.
struct Producer {
  const TensorMap &weights, &x;
  int tile_units;
  uint8_t* ring;
  uint64_t* full;
  uint64_t once, often;

  DEVICE void load_weights(int unit, int slot) const {
    const int tile = unit / tile_units, column = (unit - tile * tile_units) * DEPTH;
    barrier_expect(full + slot, STAGE);
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      uint8_t* to = ring + slot * STAGE + box * WEIGHT_BOX;
#if LLM_GATE
      bulk_load_gated(to, &weights, column + box * BOX, tile * (TILE / 16), full + slot, once);
#else
      bulk_load(to, &weights, column + box * BOX, tile * TILE, full + slot, once);
#endif
    }
  }
  DEVICE void load_x(int unit, int slot) const {
    const int column = unit % tile_units * DEPTH;
    uint8_t* to = ring + slot * STAGE + BOXES * WEIGHT_BOX;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
      bulk_load(to + box * X_BOX, &x, column + box * BOX, 0, full + slot, often);
  }
  DEVICE void prefetch(int unit) const {
    const int tile = unit / tile_units, column = (unit - tile * tile_units) * DEPTH;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
#if LLM_GATE
      bulk_prefetch_gated(&weights, column + box * BOX, tile * (TILE / 16), once);
#else
      bulk_prefetch(&weights, column + box * BOX, tile * TILE, once);
#endif
  }
};

DEVICE void multiply(float (&acc)[ACC], const uint8_t* stage, int thread, bool keep) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t a = matrix_descriptor(shared_address(stage) + (thread >> 7) * (64 * 128));
  const uint64_t b = matrix_descriptor(shared_address(stage) + BOXES * WEIGHT_BOX);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < DEPTH / 16; k++) {
    const int box = k / 4, within = k % 4 * 2;  // descriptors count 16 bytes
    wgmma(acc, a + (box * (WEIGHT_BOX >> 4) + within), b + (box * (X_BOX >> 4) + within), keep || k);
  }
  wgmma_commit();
  wgmma_wait<0>();
#else
  if (!keep)
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
  multiply_warp(acc, stage, thread >> 5, thread & 31);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, LLM_BLOCKS_PER_SM)
    skinny_linear_bulk(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, PARAMETERS) {
  PACK_PARAMETERS;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  uint8_t* ring = dynamic + (-shared_address(dynamic) & 1023);
  const Deal deal(tiles, depth);
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, THREADS / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= THREADS) {
    if (threadIdx.x != THREADS) return;
    fetch_map(&weights);
    fetch_map(&x);
    const Producer producer = {weights, x, deal.depth, ring, full, policy_evict_first(), policy_evict_last()};
    // Weights never change: they are on their way before the kernel before has ended.
    const int early = min(end - begin, STAGES);
    for (int i = 0; i < early; i++) producer.load_weights(begin + i, i);
    for (int i = STAGES; i < STAGES + LLM_AHEAD; i++)
      if (begin + i < end) producer.prefetch(begin + i);
    if (begin + STAGES >= end) pdl_launch();
    pdl_wait();
    for (int i = 0; i < early; i++) producer.load_x(begin + i, i);
    int slot = 0, parity = 0;
    for (int unit = begin + STAGES; unit < end; unit++) {
      barrier_wait(empty + slot, parity);
      producer.load_weights(unit, slot);
      producer.load_x(unit, slot);
      if (LLM_AHEAD && unit + LLM_AHEAD < end) producer.prefetch(unit + LLM_AHEAD);
      if (unit == max(end - STAGES, begin + STAGES)) pdl_launch();
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    return;
  }

  pdl_wait();
  const int thread = threadIdx.x;
  int slot = 0, parity = 0;
  for (int unit = begin; unit < end;) {
    const int tile = unit / deal.depth, start = tile * deal.depth, stop = min(end, start + deal.depth);
    const bool whole = unit == start && stop == start + deal.depth;
    float acc[ACC];
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
    for (int u = unit; u < stop; u++) {
      barrier_wait(full + slot, parity);
      multiply(acc, ring + slot * STAGE, thread, u != unit);
      __syncwarp();
      if ((thread & 31) == 0) barrier_arrive(empty + slot);
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    unit = stop;
    if (whole || combine(acc, deal, tile, thread, args)) finish(acc, tile, thread, args);
  }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, LLM_BLOCKS_PER_SM)
    skinny_linear_copy(const scalar_t* __restrict__ weights, const scalar_t* __restrict__ x, int64_t x_stride,
                       PARAMETERS) {
  PACK_PARAMETERS;
  extern __shared__ uint8_t dynamic[];
  uint8_t* ring = dynamic + (-shared_address(dynamic) & 1023);
  const Deal deal(tiles, depth);
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1);
  const int thread = threadIdx.x, chunk = thread & 7;

  auto load_weights = [&](int unit, int slot) {
    const int tile = unit / deal.depth, column = (unit - tile * deal.depth) * DEPTH + chunk * 8;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
#pragma unroll 4
      for (int row = thread >> 3; row < TILE; row += THREADS / 8) {
#if LLM_GATE
        const int of = tile * TILE_OUT + row / 16 * 8 + row % 8;
        const int64_t from = of + (row % 16 < 8 ? 0 : args.columns);
#else
        const int of = tile * TILE + row;
        const int64_t from = of;
#endif
        const bool valid = of < args.columns && column + box * BOX < depth;
        cp_async16(ring + slot * STAGE + box * WEIGHT_BOX + row * 128 + ((chunk ^ (row & 7)) << 4),
                   valid ? weights + from * depth + column + box * BOX : weights, valid);
      }
  };
  auto load_x = [&](int unit, int slot) {
    const int column = unit % deal.depth * DEPTH + chunk * 8;
#pragma unroll
    for (int box = 0; box < BOXES; box++)
      for (int row = thread >> 3; row < ROWS; row += THREADS / 8) {
        const bool valid = row < args.rows && column + box * BOX < depth;
        cp_async16(ring + slot * STAGE + BOXES * WEIGHT_BOX + box * X_BOX + row * 128 + ((chunk ^ (row & 7)) << 4),
                   valid ? x + row * x_stride + column + box * BOX : x, valid);
      }
  };

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
      multiply_warp(acc, ring + slot * STAGE, thread >> 5, thread & 31);
      if (++slot == STAGES) slot = 0;
      if (++next == STAGES) next = 0;
    }
    unit = stop;
    if (whole || combine(acc, deal, tile, thread, args)) finish(acc, tile, thread, args);
  }
}
#endif
