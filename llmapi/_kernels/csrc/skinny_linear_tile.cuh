// What both kernels of skinny products share: the matrix instruction of a warp, and the way from sums to y.
//
// LLM_ROWS: M rounded up: 8, 16, 24, 32, 48, 64, 96, 128. LLM_BOXES: depth of a stage in 64 columns. LLM_GATE: 0 none, 1
// silu, 2 gelu, 3 gelu_tanh, 4 relu; a tile then interleaves 4 gate rows with the 4 up rows that belong to them.
// LLM_NORM: see skinny_linear.cu.
#pragma once
#include "common.cuh"

#if LLM_DTYPE == 0
#error "skinny products are for half and bfloat16"
#endif
#ifndef LLM_ROWS
#define LLM_ROWS 8
#endif
#ifndef LLM_BOXES
#define LLM_BOXES 1
#endif
#ifndef LLM_GATE
#define LLM_GATE 0
#endif
#ifndef LLM_NORM
#define LLM_NORM 0
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
