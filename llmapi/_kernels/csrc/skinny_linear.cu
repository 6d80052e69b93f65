// y[M, N] = x[M, K] w[N, K]^T for at most 128 rows: a stream of weights past a few rows of activations.
//
// In the matrix instructions the weight is the operand with 16 (64) rows and x^T the one with 8 (ROWS) columns, so that
// 8 rows of activations fill them. Both come through a ring of stages in shared memory, 128-byte rows in the 128-byte
// swizzle (16-byte chunk c of row r lies at c ^ (r % 8)). Two kernels differ in how the weight is dealt to blocks:
//
// skinny_linear_bulk (bulk tensor copies, compute capability 9.0): one block a multiprocessor, with all of the shared
// memory in flight. A block owns tiles of `tile_rows` rows, any multiple of 8 up to 256, chosen so that every block owns
// as many; the matrix instruction reads beyond a tile that is no multiple of 64, and what comes of that is dropped. A
// cluster of LLM_CLUSTER blocks shares a tile: each takes a part of K, and they add up through their shared memory.
//
// skinny_linear_copy (cp.async, plain copies on Turing): tiles of 64 rows are cut into units of DEPTH columns, and all
// units, tile after tile, are dealt in equal runs. A tile that several blocks share is added up by the last to finish.
//
// Every sum has one order, which depends neither on timing nor on M.
//
// With LLM_GATE a tile interleaves 4 gate rows with the 4 up rows that belong to them.
//
// An RMSNorm between two products of the bulk kernel costs no launch. norm(h) w^T is (h g) w^T times one number a row,
// 1 / rms(h), h the sum with the residual and g the norm's weight. The first product (LLM_NORM 2) writes h, h g, and of
// each block its share of h's squares; the second (LLM_NORM 1) reads h g as its x, adds the shares up beside its
// products, and scales its sums.
//
// LLM_ROWS: M rounded up: 8, 16, 24, 32, 48, 64, 96, 128. LLM_BOXES: depth of a stage in 64 columns. LLM_GATE: 0 none, 1 silu,
// 2 gelu, 3 gelu_tanh, 4 relu. LLM_BULK: which kernel. LLM_SUBTILES: a bulk tile's rows over 64, rounded up.
// LLM_STAGES: of the ring of the other. LLM_NORM: 0 none, 1 scales, 2 writes what a norm needs.
#include "skinny_linear.cuh"

#ifndef LLM_ROWS
#define LLM_ROWS 8
#endif
#ifndef LLM_BOXES
#define LLM_BOXES 1
#endif
#ifndef LLM_GATE
#define LLM_GATE 0
#endif
#ifndef LLM_BULK
#define LLM_BULK 0
#endif
#ifndef LLM_SUBTILES
#define LLM_SUBTILES 1
#endif
#ifndef LLM_CLUSTER
#define LLM_CLUSTER 1
#endif
#ifndef LLM_NORM
#define LLM_NORM 0
#endif
#ifndef LLM_STAGES
#define LLM_STAGES 4
#endif

constexpr int ROWS = LLM_ROWS, BOXES = LLM_BOXES;
constexpr int BOX = 64, DEPTH = BOX * BOXES;  // columns
constexpr int X_BOX = ROWS * 128;             // bytes
constexpr int THREADS = 128;                  // that multiply
constexpr int ACC = ROWS / 2;                 // float32 accumulators of a thread for 64 weight rows

struct Args {
  scalar_t* out;
  const scalar_t *bias, *residual;
  int64_t out_stride, residual_stride;
  int rows, columns, tile_columns;  // M; columns of y, and of y in a tile
  scalar_t* scaled;                 // with LLM_NORM 2: y times the gain, rows next to each other
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

// 64 weight rows of a stage with 16x8x16 instructions: a warp takes 16 of them. Bytes from box to box: `weight_box`.
DEVICE void multiply_warp(float (&acc)[ACC], const uint8_t* weights, int weight_box, const uint8_t* x, int thread) {
  const int lane = thread & 31, row = (thread >> 5) * 16 + (lane & 15);
#pragma unroll
  for (int box = 0; box < BOXES; box++) {
    const uint8_t* from = weights + box * weight_box + row * 128;
    const uint8_t* x_from = x + box * X_BOX + (lane & 7) * 128;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) ldmatrix_x4(a[k], from + (((half * 4 + k * 2 + (lane >> 4)) ^ (row & 7)) << 4));
#pragma unroll
      for (int n = 0; n < ROWS / 8; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, x_from + n * 1024 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
        float(&c)[4] = *reinterpret_cast<float(*)[4]>(&acc[n * 4]);
        mma(c, a[0], b[0], b[1], scalar_t());
        mma(c, a[1], b[2], b[3], scalar_t());
      }
    }
  }
}

// ---- from accumulators to y
//
// A block is 16 weight rows by 8 rows of x: c[2 h + j] of a lane is weight row lane / 4 + 8 h, row 2 (lane % 4) + j of
// x.
// With a gate, lanes below 16 hold gate rows and those above the up rows that belong to them; each half takes one h, so
// that a lane makes column lane / 4 of y. Neighbours then swap, and each writes two columns of one row.

constexpr int HALVES = LLM_GATE ? 1 : 2;

// Column of y in the tile, of the first lane's.
DEVICE int half_column(int subtile, int thread, int h) {
  return LLM_GATE ? subtile * 32 + (thread >> 5) * 8 : subtile * 64 + (thread >> 5) * 16 + h * 8;
}

struct Bias {
  float gate[HALVES], up[HALVES];
  DEVICE void load(const Args& args, int tile, int subtile, int thread) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int within = half_column(subtile, thread, h) + (thread >> 2 & 7);
      const int column = tile * args.tile_columns + within;
      const bool valid = args.bias && within < args.tile_columns && column < args.columns;
      gate[h] = valid ? to_float(args.bias[column]) : 0.0f;
      up[h] = valid && LLM_GATE ? to_float(args.bias[args.columns + column]) : 0.0f;
    }
  }
};

// Where a lane's two columns begin in y, as an index of a matrix with rows `stride` apart; negative: nowhere.
DEVICE int64_t pair_index(const Args& args, int64_t stride, int tile, int subtile, int n, int h, int thread) {
  const int row = n * 8 + (thread & 3) * 2 + (thread >> 2 & 1);
  const int within = half_column(subtile, thread, h) + (thread >> 2 & 6), column = tile * args.tile_columns + within;
  return row < args.rows && within < args.tile_columns && column < args.columns ? row * stride + column : -1;
}

// Two columns of the residual.
DEVICE uint32_t load_residual(const Args& args, int tile, int subtile, int n, int h, int thread) {
  const int64_t at = pair_index(args, args.residual_stride, tile, subtile, n, h, thread);
  return args.residual && at >= 0 ? __ldcg(reinterpret_cast<const unsigned*>(args.residual + at)) : 0;
}

// Two columns of a vector that y is to be multiplied by.
struct Gain {
  Vec<scalar_t, 2> of[HALVES];
  DEVICE void load(const Args& args, const scalar_t* gain, int tile, int subtile, int thread) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int within = half_column(subtile, thread, h) + (thread >> 2 & 6);
      const int column = tile * args.tile_columns + within;
      if (within < args.tile_columns && column < args.columns)
        of[h] = *reinterpret_cast<const Vec<scalar_t, 2>*>(gain + column);
    }
  }
};

// Returns the sum of squares of what this lane wrote, in LLM_NORM 2.
DEVICE float finish(const float (&c)[4], const Bias& bias, const uint32_t (&residual)[HALVES], const Gain& gain,
                    int tile, int subtile, int n, int thread, const Args& args) {
  float y[HALVES][2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
#if LLM_GATE
    const bool low = (thread & 16) == 0;
    const float other = __shfl_xor_sync(0xffffffffu, low ? c[2 + j] : c[j], 16);
    y[0][j] = activate((low ? c[j] : other) + bias.gate[0]) * ((low ? other : c[2 + j]) + bias.up[0]);
#else
    y[0][j] = c[j] + bias.gate[0];
    y[HALVES - 1][j] = c[2 + j] + bias.gate[HALVES - 1];
#endif
  }
  const bool odd = thread & 4;
  float squares = 0.0f;
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    const float other = __shfl_xor_sync(0xffffffffu, odd ? y[h][0] : y[h][1], 4);
    Vec<scalar_t, 2> add = *reinterpret_cast<const Vec<scalar_t, 2>*>(&residual[h]);
    const uint32_t pair = pack2(scalar_t(), (odd ? other : y[h][0]) + to_float(add.at[0]),
                                (odd ? y[h][1] : other) + to_float(add.at[1]));
    const int64_t at = pair_index(args, args.out_stride, tile, subtile, n, h, thread);
    if (at < 0) continue;
    *reinterpret_cast<uint32_t*>(args.out + at) = pair;
#if LLM_NORM == 2
    const Vec<scalar_t, 2> written = *reinterpret_cast<const Vec<scalar_t, 2>*>(&pair);
    const float low = to_float(written.at[0]), high = to_float(written.at[1]);
    squares += low * low + high * high;
    *reinterpret_cast<uint32_t*>(args.scaled + pair_index(args, args.columns, tile, subtile, n, h, thread)) =
        pack2(scalar_t(), low * to_float(gain.of[h].at[0]), high * to_float(gain.of[h].at[1]));
#endif
  }
  return squares;
}

#if LLM_BULK && __CUDA_ARCH__ >= 900

constexpr int SUBTILES = LLM_SUBTILES, CLUSTER = LLM_CLUSTER, MOST_STAGES = 32;
constexpr int TOKENS = ROWS / 8, BLOCKS = SUBTILES * TOKENS;  // of four accumulators, of a thread
// Floats of sums that a block gets from others of its cluster.
constexpr int PARTS = CLUSTER > 1 ? CEIL_DIV(BLOCKS, CLUSTER) * CLUSTER * THREADS * 4 : 0;
constexpr int HELPERS = LLM_NORM == 1 ? 2 : 1;  // warps that do not multiply

// Tile after tile of a block, and the units of each that are its own.
struct Cursor {
  int tile, unit;
  DEVICE void next(int begin, int end, int step) {
    if (++unit == end) unit = begin, tile += step;
  }
};

// acc (+)= 64 rows of a stage; without `keep` the old sums are dropped.
DEVICE void multiply(float (&acc)[ACC], const uint8_t* stage, int subtile, int weight_box, int thread, bool keep) {
  const uint8_t *weights = stage + subtile * (64 * 128), *x = stage + BOXES * weight_box;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t a = matrix_descriptor(shared_address(weights)), b = matrix_descriptor(shared_address(x));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < DEPTH / 16; k++) {
    const int box = k / 4, within = k % 4 * 2;  // descriptors count 16 bytes
    wgmma(acc, a + (box * (weight_box >> 4) + within), b + (box * (X_BOX / 16) + within), keep || k);
  }
  wgmma_commit();
  wgmma_wait<0>();
#else
  if (!keep)
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.0f;
  multiply_warp(acc, weights, weight_box, x, thread);
#endif
}

// 1 / rms of every row, by one warp. squares: [parts][ROWS], what blocks found in their columns. Four lanes share four
// rows, and each adds up every fourth part.
DEVICE void row_scales(float* scales, const float* squares, int parts, int width, float eps) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = lane; i < CEIL_DIV(ROWS, 32) * 32; i += 32) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i < ROWS) {
      const float4* from = reinterpret_cast<const float4*>(squares) + i / 4;
#pragma unroll 8
      for (int part = i % 4; part < parts; part += 4) {
        const float4 share = __ldcg(from + part * (ROWS / 4));
        sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step), sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
      sum.z += __shfl_xor_sync(0xffffffffu, sum.z, step), sum.w += __shfl_xor_sync(0xffffffffu, sum.w, step);
    }
    if (i < ROWS && i % 4 == 0) {
      scales[i] = rsqrtf(sum.x / width + eps), scales[i + 1] = rsqrtf(sum.y / width + eps);
      scales[i + 2] = rsqrtf(sum.z / width + eps), scales[i + 3] = rsqrtf(sum.w / width + eps);
    }
  }
}

// A warpgroup for every 64 rows of the tile, one warp that copies, and with LLM_NORM 1 one that works out the scales.
extern "C" __global__ void __launch_bounds__(SUBTILES * THREADS + HELPERS * 32, 1)
#if LLM_CLUSTER > 1
    __cluster_dims__(LLM_CLUSTER, 1, 1)
#endif
        skinny_linear_bulk(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x,
                           scalar_t* out, int64_t out_stride, const scalar_t* bias, const scalar_t* residual,
                           int64_t residual_stride, int rows, int columns, int depth, int tiles, int tile_rows,
                           int stages, const scalar_t* gain, scalar_t* scaled, float* squares, int parts, float eps) {
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[MOST_STAGES], empty[MOST_STAGES], received;
#if LLM_NORM == 1
  __shared__ uint64_t scales_ready;
#endif
  uint8_t* ring = dynamic + (-shared_address(dynamic) & 1023);
  const int weight_box = tile_rows * 128, stage_bytes = BOXES * (weight_box + X_BOX);
  const int rank = blockIdx.x % CLUSTER, team = blockIdx.x / CLUSTER, teams = gridDim.x / CLUSTER;
  const int units = CEIL_DIV(depth, DEPTH), begin = units * rank / CLUSTER, end = units * (rank + 1) / CLUSTER;
  // Behind the ring: [BLOCKS / CLUSTER][CLUSTER][THREADS], what the ranks have for the blocks that this one adds up; then
  // [ROWS] scales, or [warps][ROWS] shares of squares.
  float4* sums = reinterpret_cast<float4*>(ring + stages * stage_bytes + (SUBTILES * 64 - tile_rows) * 128);
  [[maybe_unused]] float* of_rows = reinterpret_cast<float*>(sums) + PARTS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, SUBTILES * THREADS / 32);
    }
    barrier_init(&received, 1);
#if LLM_NORM == 1
    barrier_init(&scales_ready, 1);
#endif
    barrier_init_fence();
    barrier_expect(&received, CEIL_DIV(BLOCKS - rank, CLUSTER) * (CLUSTER - 1) * THREADS * 16);
  }
  if (CLUSTER > 1) cluster_arrive();  // barriers are ready for what the others send
  __syncthreads();

#if LLM_NORM == 1
  if (threadIdx.x >= SUBTILES * THREADS + 32) {
    pdl_wait();
    row_scales(of_rows, squares, parts, depth, eps);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(&scales_ready);
    __syncwarp();
    if (CLUSTER > 1) cluster_wait();
    return;
  }
#endif
  if (threadIdx.x >= SUBTILES * THREADS) {
    if (threadIdx.x == SUBTILES * THREADS) {
      fetch_map(&weights);
      fetch_map(&x);
      const uint64_t once = policy_evict_first(), often = policy_evict_last();
      auto load_weights = [&](Cursor at, int slot) {
        barrier_expect(full + slot, stage_bytes);
#pragma unroll
        for (int box = 0; box < BOXES; box++) {
          uint8_t* to = ring + slot * stage_bytes + box * weight_box;
          const int column = at.unit * DEPTH + box * BOX;
#if LLM_GATE
          bulk_load_gated(to, &weights, column, at.tile * (tile_rows / 8), full + slot, once);
#else
          bulk_load(to, &weights, column, at.tile * tile_rows, full + slot, once);
#endif
        }
      };
      auto load_x = [&](Cursor at, int slot) {
        uint8_t* to = ring + slot * stage_bytes + BOXES * weight_box;
#pragma unroll
        for (int box = 0; box < BOXES; box++)
          bulk_load(to + box * X_BOX, &x, at.unit * DEPTH + box * BOX, 0, full + slot, often);
      };
      // Weights never change: they are on their way before the kernel before has ended.
      Cursor at = {team, begin};
      int early = 0;
      for (; early < stages && at.tile < tiles; early++, at.next(begin, end, teams)) load_weights(at, early);
      pdl_launch();
      pdl_wait();
      Cursor x_at = {team, begin};
      for (int i = 0; i < early; i++, x_at.next(begin, end, teams)) load_x(x_at, i);
      int slot = 0, parity = 0;
      for (; at.tile < tiles; at.next(begin, end, teams)) {
        barrier_wait(empty + slot, parity);
        load_weights(at, slot);
        load_x(at, slot);
        if (++slot == stages) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_wait();
    return;
  }

  const Args args = {out, bias, residual, out_stride, residual_stride, rows, columns,
                     LLM_GATE ? tile_rows / 2 : tile_rows, scaled};
  const int subtile = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  pdl_wait();
  if (CLUSTER > 1) cluster_wait();
  int slot = 0, parity = 0;
  for (int tile = team; tile < tiles; tile += teams) {
    // In a cluster, block b of a tile's accumulators is added up by rank b % CLUSTER; there is one tile only.
    auto owner = [&](int n) { return (subtile * TOKENS + n) % CLUSTER; };
    Bias bias_of;
    bias_of.load(args, tile, subtile, thread);
    uint32_t residual_of[TOKENS][HALVES];
    auto load_residuals = [&]() {
#pragma unroll
      for (int n = 0; n < TOKENS; n++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
          residual_of[n][h] = owner(n) == rank ? load_residual(args, tile, subtile, n, h, thread) : 0;
    };
    Gain gain_of;
#if LLM_NORM == 2
    gain_of.load(args, gain, tile, subtile, thread);
    float squares_of[TOKENS];
#pragma unroll
    for (int n = 0; n < TOKENS; n++) squares_of[n] = 0.0f;
#endif
    if (ROWS <= 64) load_residuals();  // more would not stay in registers
    float acc[ACC];
    for (int unit = begin; unit < end; unit++) {
      barrier_wait(full + slot, parity);
      multiply(acc, ring + slot * stage_bytes, subtile, weight_box, thread, unit != begin);
      __syncwarp();
      if ((thread & 31) == 0) barrier_arrive(empty + slot);
      if (++slot == stages) slot = 0, parity ^= 1;
    }
    if (CLUSTER > 1) {
#pragma unroll
      for (int n = 0; n < TOKENS; n++) {
        const float4* to = sums + ((subtile * TOKENS + n) / CLUSTER * CLUSTER + rank) * THREADS + thread;
        if (owner(n) != rank)
          cluster_store(cluster_address(to, owner(n)), acc[n * 4], acc[n * 4 + 1], acc[n * 4 + 2], acc[n * 4 + 3],
                        cluster_address(&received, owner(n)));
      }
    }
    if (ROWS > 64) load_residuals();
    if (CLUSTER > 1 && rank < BLOCKS) barrier_wait_cluster(&received, 0);
#if LLM_NORM == 1
    barrier_wait(&scales_ready, 0);
#endif
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
      if (owner(n) != rank) continue;
      float c[4] = {acc[n * 4], acc[n * 4 + 1], acc[n * 4 + 2], acc[n * 4 + 3]};
      if (CLUSTER > 1) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int from = 0; from < CLUSTER; from++) {
          float4 part = make_float4(c[0], c[1], c[2], c[3]);
          if (from != rank) part = sums[((subtile * TOKENS + n) / CLUSTER * CLUSTER + from) * THREADS + thread];
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        c[0] = sum.x, c[1] = sum.y, c[2] = sum.z, c[3] = sum.w;
      }
#if LLM_NORM == 1
      const float2 scale = *reinterpret_cast<const float2*>(of_rows + n * 8 + (thread & 3) * 2);
      c[0] *= scale.x, c[1] *= scale.y, c[2] *= scale.x, c[3] *= scale.y;
#endif
      const float found = finish(c, bias_of, residual_of[n], gain_of, tile, subtile, n, thread, args);
#if LLM_NORM == 2
      squares_of[n] = found;
#endif
    }
#if LLM_NORM == 2
    // A row's columns are with the lanes that differ in bits 3 and 4, and with all warps.
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
      float sum = squares_of[n];
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if ((thread & 24) == 0) of_rows[(threadIdx.x >> 5) * ROWS + n * 8 + (thread & 3) * 2 + (thread >> 2 & 1)] = sum;
    }
    ptx::bar_sync<SUBTILES * THREADS>(1);
    for (int row = threadIdx.x; row < ROWS; row += SUBTILES * THREADS) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < SUBTILES * THREADS / 32; warp++) sum += of_rows[warp * ROWS + row];
      squares[((int64_t)tile * CLUSTER + rank) * ROWS + row] = sum;
    }
    ptx::bar_sync<SUBTILES * THREADS>(1);
#endif
  }
}

#else

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
#endif
