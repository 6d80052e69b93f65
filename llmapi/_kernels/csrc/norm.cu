// RMSNorm and LayerNorm over rows, alone or after a residual add. One block a row; statistics in float32.
//
// ADD: 0, out = norm(x); 1, sum = x + residual (rounded to scalar_t), out = norm(sum).
// LAYER: 0, RMSNorm; 1, LayerNorm with bias.
#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(1024)
norm_rows(const scalar_t* __restrict__ x, const scalar_t* residual, const scalar_t* __restrict__ weight,
     const scalar_t* __restrict__ bias, scalar_t* __restrict__ out, scalar_t* sum, int width, float eps) {
  __shared__ float scratch[33];
  norm_row(x, residual, weight, bias, out, sum, width, eps, scratch);
}
