// y = x W^T + b, with weights in panels: PANEL outputs side by side for each input, panel after panel.
//
// A tile holds R rows of x by one panel in registers; per input it loads the panel's row and one number of each row of
// x. Few rows read the weights once, in order, at the rate of memory; many rows reuse a panel from the cache.
#pragma once

#include "common.h"

namespace llmapi {

constexpr int PANEL = 2 * W;
#if defined(__AVX512F__)
constexpr int ROWS = 12;  // 24 sums in 32 registers
#else
constexpr int ROWS = 6;  // 12 sums in 16
#endif
constexpr int64_t ROW_BLOCK = 16 * ROWS;  // rows of x that stay in the second-level cache while panels pass

struct LinearArgs {
  const float* x;       // [rows, in]
  const float* panels;  // [ceil(out / PANEL), in, PANEL]
  const float* bias;    // [out] or null
  float* y;             // [rows, out]
  int64_t rows, in, out;
};

inline int64_t panel_count(int64_t out) { return (out + PANEL - 1) / PANEL; }

// Each sum runs over `in` in order, whatever R is: a row's result does not depend on the rows beside it. FETCH lines of
// what comes next, at `ahead`, are fetched for each input.
template <int R, int FETCH>
inline void tile(const LinearArgs& a, int64_t row, int64_t panel, const char* ahead) {
  const float* w = a.panels + panel * a.in * PANEL;
  const float* x = a.x + row * a.in;
  const int64_t in = a.in;
  vec low[R] = {}, high[R] = {};
  for (int64_t k = 0; k < in; ++k) {
    if (FETCH) {
      for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
      ahead += 64 * FETCH;
    }
    const vec l = load(w + k * PANEL), h = load(w + k * PANEL + W);
    for (int r = 0; r < R; ++r) {
      vec value = splat(x[r * in + k]);
      in_register(value);
      low[r] += l * value;
      high[r] += h * value;
    }
  }
  const int64_t first = panel * PANEL, count = a.out - first;
  for (int r = 0; r < R; ++r) {
    float* y = a.y + (row + r) * a.out + first;
    if (count >= PANEL) {
      store(y, a.bias ? low[r] + load(a.bias + first) : low[r]);
      store(y + W, a.bias ? high[r] + load(a.bias + first + W) : high[r]);
    } else {
      for (int64_t i = 0; i < count; ++i)
        y[i] = (i < W ? low[r][i] : high[r][i - W]) + (a.bias ? a.bias[first + i] : 0.0f);
    }
  }
}

template <int FETCH>
inline void tile_of(int rows, const LinearArgs& a, int64_t row, int64_t panel, const char* ahead) {
  switch (rows) {
    case 1: return tile<1, FETCH>(a, row, panel, ahead);
    case 2: return tile<2, FETCH>(a, row, panel, ahead);
    case 3: return tile<3, FETCH>(a, row, panel, ahead);
    case 4: return tile<4, FETCH>(a, row, panel, ahead);
    case 5: return tile<5, FETCH>(a, row, panel, ahead);
    case 6: return tile<6, FETCH>(a, row, panel, ahead);
#if defined(__AVX512F__)
    case 7: return tile<7, FETCH>(a, row, panel, ahead);
    case 8: return tile<8, FETCH>(a, row, panel, ahead);
    case 9: return tile<9, FETCH>(a, row, panel, ahead);
    case 10: return tile<10, FETCH>(a, row, panel, ahead);
    case 11: return tile<11, FETCH>(a, row, panel, ahead);
    case 12: return tile<12, FETCH>(a, row, panel, ahead);
#endif
  }
}

inline void linear(const LinearArgs& a, int threads) {
  const int64_t panels = panel_count(a.out), blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
  for_each(panels * blocks, threads, [&](int64_t item) {
    const int64_t block = item / panels, panel = item % panels;
    const int64_t first = block * ROW_BLOCK, count = a.rows - first < ROW_BLOCK ? a.rows - first : ROW_BLOCK;
    const int64_t groups = (count + ROWS - 1) / ROWS;
    // While the last rows of this panel are computed, the panel after the other threads' is on its way.
    const int64_t next = panel + threads < panels ? panel + threads : panel;
    const char* ahead = reinterpret_cast<const char*>(a.panels + next * a.in * PANEL);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = count * g / groups;
      const int rows = static_cast<int>(count * (g + 1) / groups - row);
      if (groups == 1)
        tile_of<PANEL * 4 / 64>(rows, a, first + row, panel, ahead);
      else if (g < 2)
        tile_of<PANEL * 4 / 128>(rows, a, first + row, panel, ahead + g * a.in * (PANEL * 4 / 128) * 64);
      else
        tile_of<0>(rows, a, first + row, panel, ahead);
    }
  });
}

// Weights as they lie, [out, in], to panels; missing outputs of the last panel are zeros.
inline void pack_linear(const float* w, float* panels, int64_t in, int64_t out, int threads) {
  for_each(panel_count(out), threads, [&](int64_t panel) {
    float* to = panels + panel * in * PANEL;
    const int64_t first = panel * PANEL, count = out - first < PANEL ? out - first : PANEL;
    if (count < PANEL) std::memset(to, 0, in * PANEL * sizeof(float));
    for (int64_t k = 0; k < in; k += 16)  // a cache line of each output at a time
      for (int64_t i = 0; i < count; ++i) {
        const float* from = w + (first + i) * in;
        for (int64_t j = k; j < k + 16 && j < in; ++j) to[j * PANEL + i] = from[j];
      }
  });
}

}  // namespace llmapi
