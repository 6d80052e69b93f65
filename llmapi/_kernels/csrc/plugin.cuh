// What the kernels of the TensorRT plugins share. A plugin is one kernel whose parameters are its inputs, int32 extras
// and outputs, in that order; see docs/kernels/plugins.md.
#pragma once
#include "common.cuh"

#define POOL_GUARD 0x6c6c6d6170694b56ll  // "llmapiKV"; llmapi/_kernels/plugins/pools.py has it, too

// `pools`: the guard, then the addresses of the keys and of the values of each layer. A TensorRT builder runs kernels on
// memory of its own to measure them: where the guard is not, nothing else that was passed may be believed.
DEVICE bool find_caches(const int64_t* pools, int layer, scalar_t*& keys, scalar_t*& values) {
  if (pools[0] != POOL_GUARD) return false;
  keys = reinterpret_cast<scalar_t*>(pools[1 + 2 * layer]);
  values = reinterpret_cast<scalar_t*>(pools[2 + 2 * layer]);
  return true;
}

// The block fills `width` elements with one value.
DEVICE void fill(scalar_t* to, int width, float value) {
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from_float<scalar_t>(value);
}

#define NOT_A_NUMBER __int_as_float(0x7fffffff)
