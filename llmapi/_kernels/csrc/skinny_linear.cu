// y[M, N] = x[M, K] w[N, K]^T for at most 128 rows: a stream of weights past a few rows of activations. Bulk tensor
// copies, compute capability 9.0 and newer; skinny_linear_copy.cu is for the others.
//
// In the matrix instructions the weight is the operand with 16 (64) rows and x^T the one with 8 (ROWS) columns, so that
// 8 rows of activations fill them. Both come through a ring of stages in shared memory, 128-byte rows in the 128-byte
// swizzle (16-byte chunk c of row r lies at c ^ (r % 8)).
//
// One block a multiprocessor, with all of the shared memory in flight. A block owns tiles of `tile_rows` rows, any multiple
// of 8 up to 256, chosen so that every block owns as many; the matrix instruction reads beyond a tile that is no multiple of
// 64, and what comes of that is dropped. A cluster of LLM_CLUSTER blocks shares a tile: each takes a part of K, and they add
// up through their shared memory. Every sum has one order, which depends neither on timing nor on M.
//
// An RMSNorm between two products costs no launch. norm(h) w^T is (h g) w^T times one number a row, 1 / rms(h), h the sum
// with the residual and g the norm's weight. The first product (LLM_NORM 2) writes h, h g, and of each block its share of
// h's squares; the second (LLM_NORM 1) reads h g as its x, adds the shares up beside its products, and scales its sums.
//
// LLM_ROWS, LLM_BOXES, LLM_GATE: see skinny_linear_tile.cuh. LLM_SUBTILES: a tile's rows over 64, rounded up. LLM_NORM: 0
// none, 1 scales, 2 writes what a norm needs.
#include "skinny_linear_tile.cuh"
#include "skinny_linear.cuh"

#ifndef LLM_SUBTILES
#define LLM_SUBTILES 1
#endif
#ifndef LLM_CLUSTER
#define LLM_CLUSTER 1
#endif

#if LLM_CLUSTER > 1
#define TEAM __cluster_dims__(LLM_CLUSTER, 1, 1)
#else
#define TEAM
#endif

#if __CUDA_ARCH__ >= 900

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
extern "C" __global__ void TEAM __launch_bounds__(SUBTILES * THREADS + HELPERS * 32, 1)
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
#endif
