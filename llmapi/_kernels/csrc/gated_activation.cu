// out[t, i] = act(gate_up[t, i]) * gate_up[t, I + i], in float32.
//
// ACT: 0 silu, 1 gelu (erf), 2 gelu (tanh), 3 relu.
#include "common.cuh"

#ifndef ACT
#define ACT 0
#endif

DEVICE float activate(float x) {
#if ACT == 0
  return x / (1.0f + expf(-x));
#elif ACT == 1
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
#elif ACT == 2
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#else
  return fmaxf(x, 0.0f);
#endif
}

static constexpr int N = 16 / sizeof(scalar_t);

// Grid: x over the columns, y over the rows.
extern "C" __global__ void gated_activation(const scalar_t* __restrict__ gate_up, scalar_t* __restrict__ out, int width) {
  pdl_launch();
  pdl_wait();
  const scalar_t* gate = gate_up + (int64_t)blockIdx.y * 2 * width;
  const scalar_t* up = gate + width;
  out += (int64_t)blockIdx.y * width;
  int at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (at >= width) return;
  if (width % N == 0) {
    Vec<scalar_t, N> g = load<scalar_t, N>(gate + at), u = load<scalar_t, N>(up + at);
#pragma unroll
    for (int k = 0; k < N; k++) g.at[k] = from_float<scalar_t>(activate(to_float(g.at[k])) * to_float(u.at[k]));
    store<scalar_t, N>(out + at, g);
  } else {
    for (int k = at; k < min(at + N, width); k++)
      out[k] = from_float<scalar_t>(activate(to_float(gate[k])) * to_float(up[k]));
  }
}
