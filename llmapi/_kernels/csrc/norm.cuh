// A row's RMSNorm or LayerNorm, alone or after a residual add; statistics in float32. See norm.cu for ADD and LAYER.
#pragma once
#include "common.cuh"

#ifndef ADD
#define ADD 0
#endif
#ifndef LAYER
#define LAYER 0
#endif

static constexpr int N = 16 / sizeof(scalar_t);  // elements of one access
static constexpr int MOST = sizeof(scalar_t) == 4 ? 4 : 2;  // accesses that a thread keeps in registers

// One element, for widths that are no multiple of a vector.
DEVICE float value_at(const scalar_t* x, const scalar_t* residual, scalar_t* sum, int i) {
  float v = to_float(x[i]);
#if ADD
  scalar_t s = from_float<scalar_t>(v + to_float(residual[i]));
  sum[i] = s;
  v = to_float(s);
#endif
  return v;
}

DEVICE float finished(float v, float mean, float scale, scalar_t weight, const scalar_t* bias, int i) {
#if LAYER
  return (v - mean) * scale * to_float(weight) + to_float(bias[i]);
#else
  return v * scale * to_float(weight);
#endif
}

// The row of this block. `scratch` holds 33 floats of shared memory.
DEVICE void norm_row(const scalar_t* __restrict__ x, const scalar_t* residual, const scalar_t* __restrict__ weight,
                     const scalar_t* __restrict__ bias, scalar_t* __restrict__ out, scalar_t* sum, int width, float eps,
                     float* scratch) {
  int64_t row = (int64_t)blockIdx.x * width;
  x += row;
  residual += row;
  sum += row;
  out += row;
  float total = 0.0f, squares = 0.0f;
  bool whole = width % N == 0 && width <= (int)blockDim.x * N * MOST;
  if (whole) {
    Vec<scalar_t, N> kept[MOST];
    Vec<scalar_t, N> weights[MOST];
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      int at = (j * blockDim.x + threadIdx.x) * N;
      if (at < width) weights[j] = load<scalar_t, N>(weight + at);
    }
    pdl_launch();
    pdl_wait();
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      int at = (j * blockDim.x + threadIdx.x) * N;
      if (at >= width) break;
      kept[j] = load<scalar_t, N>(x + at);
#if ADD
      Vec<scalar_t, N> other = load<scalar_t, N>(residual + at);
#pragma unroll
      for (int k = 0; k < N; k++) kept[j].at[k] = from_float<scalar_t>(to_float(kept[j].at[k]) + to_float(other.at[k]));
      store<scalar_t, N>(sum + at, kept[j]);
#endif
#pragma unroll
      for (int k = 0; k < N; k++) {
        float v = to_float(kept[j].at[k]);
        total += v;
        squares += v * v;
      }
    }
    float mean = 0.0f;
#if LAYER
    mean = block_sum(total, scratch) / width;
    squares = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      if ((j * (int)blockDim.x + (int)threadIdx.x) * N >= width) break;
#pragma unroll
      for (int k = 0; k < N; k++) {
        float d = to_float(kept[j].at[k]) - mean;
        squares += d * d;
      }
    }
    __syncthreads();
#endif
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      int at = (j * blockDim.x + threadIdx.x) * N;
      if (at >= width) break;
#pragma unroll
      for (int k = 0; k < N; k++)
        kept[j].at[k] = from_float<scalar_t>(finished(to_float(kept[j].at[k]), mean, scale, weights[j].at[k], bias, at + k));
      store<scalar_t, N>(out + at, kept[j]);
    }
    return;
  }
  pdl_launch();
  pdl_wait();
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float v = value_at(x, residual, sum, i);
    total += v;
    squares += v * v;
  }
#if ADD
  const scalar_t* values = sum;
#else
  const scalar_t* values = x;
#endif
  float mean = 0.0f;
#if LAYER
  mean = block_sum(total, scratch) / width;
  squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float d = to_float(values[i]) - mean;
    squares += d * d;
  }
  __syncthreads();
#endif
  float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    out[i] = from_float<scalar_t>(finished(to_float(values[i]), mean, scale, weight[i], bias, i));
}
