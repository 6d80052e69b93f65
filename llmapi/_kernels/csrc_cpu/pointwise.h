// Norms, rotation with the write of keys and values, gated activations.
#pragma once

#include <cmath>

#include "common.h"

namespace llmapi {

constexpr int64_t GRAIN = 1 << 14;  // floats of work below which a second thread costs more than it brings

inline int64_t rows_of_grain(int64_t width) { return width >= GRAIN ? 1 : GRAIN / width; }

// total = x + residual where there is a residual; y = total / sqrt(mean(total^2) + eps) * weight.
inline void rms_norm(const float* x, const float* residual, const float* weight, float* y, float* total, int64_t rows,
                     int64_t width, float eps, int threads) {
  for_ranges(rows, rows_of_grain(width), threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* in = x + row * width;
      const int64_t even = width / W * W;
      vec squares[2] = {};
      float tail = 0.0f;
      if (residual) {
        float* to = total + row * width;
        const float* other = residual + row * width;
        for (int64_t i = 0; i < even; i += W) store(to + i, load(in + i) + load(other + i));
        for (int64_t i = even; i < width; ++i) to[i] = in[i] + other[i];
        in = to;
      }
      for (int64_t i = 0; i < even; i += W) squares[i / W % 2] += load(in + i) * load(in + i);
      for (int64_t i = even; i < width; ++i) tail += in[i] * in[i];
      const float scale = 1.0f / std::sqrt((sum(squares[0] + squares[1]) + tail) / width + eps);
      float* out = y + row * width;
      for (int64_t i = 0; i < even; i += W) store(out + i, load(in + i) * scale * load(weight + i));
      for (int64_t i = even; i < width; ++i) out[i] = in[i] * scale * weight[i];
    }
  });
}

// total = x + residual; y = (total - mean) / sqrt(variance + eps) * weight + bias.
inline void add_layer_norm(const float* x, const float* residual, const float* weight, const float* bias, float* y,
                           float* total, int64_t rows, int64_t width, float eps, int threads) {
  for_ranges(rows, rows_of_grain(width), threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* to = total + row * width;
      const int64_t even = width / W * W;
      vec sums{}, squares{};
      float tail = 0.0f;
      for (int64_t i = 0; i < even; i += W) {
        const vec value = load(x + row * width + i) + load(residual + row * width + i);
        store(to + i, value);
        sums += value;
      }
      for (int64_t i = even; i < width; ++i) tail += to[i] = x[row * width + i] + residual[row * width + i];
      const float mean = (sum(sums) + tail) / width;
      tail = 0.0f;
      for (int64_t i = 0; i < even; i += W) {
        const vec off = load(to + i) - mean;
        squares += off * off;
      }
      for (int64_t i = even; i < width; ++i) tail += (to[i] - mean) * (to[i] - mean);
      const float scale = 1.0f / std::sqrt((sum(squares) + tail) / width + eps);
      float* out = y + row * width;
      for (int64_t i = 0; i < even; i += W)
        store(out + i, (load(to + i) - mean) * scale * load(weight + i) + load(bias + i));
      for (int64_t i = even; i < width; ++i) out[i] = (to[i] - mean) * scale * weight[i] + bias[i];
    }
  });
}

enum Activation { SILU = 0, GELU_TANH = 1, RELU = 2 };

template <int KIND>
inline vec activated(vec x) {
  if (KIND == RELU) {
    const ivec negative = x < vec{};
    return negative ? vec{} : x;
  }
  if (KIND == SILU) return x / (1.0f + exp(-x));
  // 0.5 (1 + tanh(u)) is the logistic function of 2u
  const vec u = 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-u));
}

// y = act(gate) * up for rows of [gate, up].
template <int KIND>
inline void gated_rows(const float* gate_up, float* y, int64_t first, int64_t last, int64_t half) {
  for (int64_t row = first; row < last; ++row) {
    const float *gate = gate_up + row * 2 * half, *up = gate + half;
    float* out = y + row * half;
    int64_t i = 0;
    for (; i + W <= half; i += W) store(out + i, activated<KIND>(load(gate + i)) * load(up + i));
    if (i < half) {
      const int n = static_cast<int>(half - i);
      store_first(out + i, activated<KIND>(load_first(gate + i, n)) * load_first(up + i, n), n);
    }
  }
}

inline void gated_activation(const float* gate_up, float* y, int64_t rows, int64_t half, int kind, int threads) {
  for_ranges(rows, rows_of_grain(half), threads, [&](int64_t first, int64_t last) {
    switch (kind) {
      case SILU: return gated_rows<SILU>(gate_up, y, first, last, half);
      case GELU_TANH: return gated_rows<GELU_TANH>(gate_up, y, first, last, half);
      case RELU: return gated_rows<RELU>(gate_up, y, first, last, half);
    }
  });
}

struct RotaryArgs {
  const float* qkv;      // [tokens, (heads + 2 kv_heads) * dim]
  const float* cos_sin;  // [tokens, rotary] or null
  const int32_t* slots;  // [tokens]; negative: keys and values of that token are not written
  float* k_cache;        // [slots, kv_heads, dim]
  float* v_cache;
  float* q;  // [tokens, heads, dim]
  int64_t tokens, heads, kv_heads, dim, rotary;
  bool interleaved;
};

inline void turn(const RotaryArgs& a, const float* in, const float* angles, float* out) {
  const int64_t half = a.rotary / 2;
  const float *cos = angles, *sin = angles + half;
  if (a.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      out[2 * i] = in[2 * i] * cos[i] - in[2 * i + 1] * sin[i];
      out[2 * i + 1] = in[2 * i + 1] * cos[i] + in[2 * i] * sin[i];
    }
  } else {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
      const vec x = load(in + i), y = load(in + half + i), c = load(cos + i), s = load(sin + i);
      store(out + i, x * c - y * s);
      store(out + half + i, y * c + x * s);
    }
    for (; i < half; ++i) {
      out[i] = in[i] * cos[i] - in[half + i] * sin[i];
      out[half + i] = in[half + i] * cos[i] + in[i] * sin[i];
    }
  }
  std::memcpy(out + a.rotary, in + a.rotary, (a.dim - a.rotary) * sizeof(float));
}

// Queries and keys turned, keys and values written to their slots.
inline void rotary_kv_write(const RotaryArgs& a, int threads) {
  const int64_t width = (a.heads + 2 * a.kv_heads) * a.dim, kv_width = a.kv_heads * a.dim;
  for_ranges(a.tokens, rows_of_grain(width), threads, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const float* in = a.qkv + token * width;
      const float* angles = a.cos_sin ? a.cos_sin + token * a.rotary : nullptr;
      for (int64_t h = 0; h < a.heads; ++h) turn(a, in + h * a.dim, angles, a.q + (token * a.heads + h) * a.dim);
      if (a.slots[token] < 0) continue;
      const int64_t slot = a.slots[token];
      for (int64_t h = 0; h < a.kv_heads; ++h)
        turn(a, in + (a.heads + h) * a.dim, angles, a.k_cache + slot * kv_width + h * a.dim);
      std::memcpy(a.v_cache + slot * kv_width, in + (a.heads + a.kv_heads) * a.dim, kv_width * sizeof(float));
    }
  });
}

}  // namespace llmapi
