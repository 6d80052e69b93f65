// y = x W^T + b for few rows of x: weights are read as they lie, once, at the rate of memory.
#pragma once

#include "common.h"

namespace llmapi {

constexpr int OUT = 4;  // outputs of a tile
#if defined(__AVX512F__)
constexpr int ROWS = 6;  // rows of x in a tile: 24 sums in 32 registers
#else
constexpr int ROWS = 2;
#endif
constexpr int64_t PANEL = 64;  // outputs that a thread takes at a time

struct LinearArgs {
  const float* x;     // [rows, in]
  const float* w;     // [out, in]
  const float* bias;  // [out] or null
  float* y;           // [rows, out]
  int64_t rows, in, out;
};

// O outputs of R rows. Each sum runs over `in` in the same order whatever O and R are, so a row's result does not
// depend on the rows beside it. FETCH lines of the weights at `ahead` are fetched in each step.
template <int O, int R, int FETCH>
inline void tile(const LinearArgs& a, int64_t row, int64_t out, const char* ahead) {
  const float* w = a.w + out * a.in;
  const float* x = a.x + row * a.in;
  const int64_t in = a.in;
  vec sums[O][R] = {};
  int64_t k = 0;
  for (; k + W <= in; k += W) {
    for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + 64 * i, 0, 3);
    ahead += 64 * FETCH;
    vec wide[O];
    for (int o = 0; o < O; ++o) wide[o] = load(w + o * in + k);
    for (int r = 0; r < R; ++r) {
      vec value = load(x + r * in + k);
#if defined(__x86_64__)
      asm("" : "+v"(value));  // keep it in a register: one load for O products
#endif
      for (int o = 0; o < O; ++o) sums[o][r] += wide[o] * value;
    }
  }
  if (k < in) {
    const int n = static_cast<int>(in - k);
    for (int r = 0; r < R; ++r) {
      const vec value = load_first(x + r * in + k, n);
      for (int o = 0; o < O; ++o) sums[o][r] += load_first(w + o * in + k, n) * value;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      a.y[(row + r) * a.out + out + o] = sum(sums[o][r]) + (a.bias ? a.bias[out + o] : 0.0f);
}

template <int O, int FETCH>
inline void tile_of(int rows, const LinearArgs& a, int64_t row, int64_t out, const char* ahead) {
  switch (rows) {
    case 1: return tile<O, 1, FETCH>(a, row, out, ahead);
    case 2: return tile<O, 2, FETCH>(a, row, out, ahead);
#if defined(__AVX512F__)
    case 3: return tile<O, 3, FETCH>(a, row, out, ahead);
    case 4: return tile<O, 4, FETCH>(a, row, out, ahead);
    case 5: return tile<O, 5, FETCH>(a, row, out, ahead);
    case 6: return tile<O, 6, FETCH>(a, row, out, ahead);
#endif
  }
}

inline void linear(const LinearArgs& a, int threads) {
  const int64_t groups = (a.rows + ROWS - 1) / ROWS;
  const int64_t panels = (a.out + PANEL - 1) / PANEL;
  const int64_t steps = a.in / W;
  for_each(panels, threads, [&](int64_t panel) {
    int64_t out = panel * PANEL;
    const int64_t last = out + PANEL < a.out ? out + PANEL : a.out;
    while (out < last) {
      const bool whole = last - out >= OUT;
      const bool more = out + 2 * OUT <= a.out;  // the weights of the next tile follow in memory
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t row = a.rows * g / groups;
        const int rows = static_cast<int>(a.rows * (g + 1) / groups - row);
        // With several groups of rows, the first two fetch half of the next tile's weights each.
        const char* next = reinterpret_cast<const char*>(a.w + (out + OUT) * a.in);
        if (!whole)
          tile_of<1, 0>(rows, a, row, out, next);
        else if (more && groups == 1)
          tile_of<OUT, OUT * W * 4 / 64>(rows, a, row, out, next);
        else if (more && g < 2)
          tile_of<OUT, OUT * W * 4 / 128>(rows, a, row, out, next + g * steps * (OUT * W * 4 / 128) * 64);
        else
          tile_of<OUT, 0>(rows, a, row, out, next);
      }
      out += whole ? OUT : 1;
    }
  });
}

}  // namespace llmapi
