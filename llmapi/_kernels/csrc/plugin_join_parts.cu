// A plugin: what plugin_paged_attention.cu with PARTS left in parts, joined (Flash-Decoding, Dao et al. 2023).
//
// HEAD_DIM. SINKS: whether there is the parameter. Grid: x, tokens; y, query heads.
#include "plugin.cuh"

extern "C" __global__ void plugin_join_parts(const scalar_t* __restrict__ whole, const float* __restrict__ parts,
                                             const float* __restrict__ part_sums,
#if SINKS
                                             const float* __restrict__ sinks,
#endif
                                             int count, scalar_t* __restrict__ out) {
  const float2* sums = reinterpret_cast<const float2*>(part_sums);
  int64_t at = (int64_t)blockIdx.x * gridDim.y + blockIdx.y, step = (int64_t)gridDim.x * gridDim.y;
  bool joined = sums[at].y >= 0.0f;
  float most = __int_as_float(0xff800000), sum = 0.0f;
#if SINKS
  most = sinks[blockIdx.y] * 1.4426950408889634f;
  sum = 1.0f;
#endif
  if (joined) {
    float top = most;
    for (int i = 0; i < count; i++) top = fmaxf(top, sums[at + i * step].x);
    sum *= ptx::ex2(most - top);
    most = top;
    for (int i = 0; i < count; i++) sum += sums[at + i * step].y * ptx::ex2(sums[at + i * step].x - most);
  }
  for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
    scalar_t value = whole[at * HEAD_DIM + d];
    if (joined) {
      float total = 0.0f;
      for (int i = 0; i < count; i++)
        total += parts[(at + i * step) * HEAD_DIM + d] * ptx::ex2(sums[at + i * step].x - most);
      value = from_float<scalar_t>(total / sum);
    }
    out[at * HEAD_DIM + d] = value;
  }
}
