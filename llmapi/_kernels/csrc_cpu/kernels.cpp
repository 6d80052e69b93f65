// The functions that Python calls. Pointers are to float32 (int32 for indices), contiguous; the caller checks shapes.
#include "attention.h"
#include "common.h"
#include "linear.h"
#include "pointwise.h"

namespace llmapi {
gomp_parallel_t pool_run = nullptr;
}

// `run` is the OpenMP runtime's GOMP_parallel; without it everything runs on the calling thread.
LLMAPI_EXPORT void llmapi_use_pool(void* run) { llmapi::pool_run = reinterpret_cast<llmapi::gomp_parallel_t>(run); }

// Floats that the packed form of an [out, in] weight takes.
LLMAPI_EXPORT int64_t llmapi_packed_size(int64_t in, int64_t out) {
  return llmapi::panel_count(out) * llmapi::PANEL * in;
}

LLMAPI_EXPORT void llmapi_pack_linear(const float* w, float* panels, int64_t in, int64_t out, int threads) {
  llmapi::pack_linear(w, panels, in, out, threads);
}

LLMAPI_EXPORT void llmapi_linear(const float* x, const float* panels, const float* bias, float* y, int64_t rows,
                                 int64_t in, int64_t out, int threads) {
  llmapi::linear({x, panels, bias, y, rows, in, out}, threads);
}

LLMAPI_EXPORT void llmapi_rms_norm(const float* x, const float* residual, const float* weight, float* y, float* total,
                                   int64_t rows, int64_t width, float eps, int threads) {
  llmapi::rms_norm(x, residual, weight, y, total, rows, width, eps, threads);
}

LLMAPI_EXPORT void llmapi_add_layer_norm(const float* x, const float* residual, const float* weight, const float* bias,
                                         float* y, float* total, int64_t rows, int64_t width, float eps, int threads) {
  llmapi::add_layer_norm(x, residual, weight, bias, y, total, rows, width, eps, threads);
}

LLMAPI_EXPORT void llmapi_gated_activation(const float* gate_up, float* y, int64_t rows, int64_t half, int kind,
                                           int threads) {
  llmapi::gated_activation(gate_up, y, rows, half, kind, threads);
}

LLMAPI_EXPORT void llmapi_rotary_kv_write(const float* qkv, const float* cos_sin, const int32_t* slots, float* k_cache,
                                          float* v_cache, float* q, int64_t tokens, int64_t heads, int64_t kv_heads,
                                          int64_t dim, int64_t rotary, int interleaved, int threads) {
  llmapi::rotary_kv_write(
      {qkv, cos_sin, slots, k_cache, v_cache, q, tokens, heads, kv_heads, dim, rotary, interleaved != 0}, threads);
}

LLMAPI_EXPORT void llmapi_paged_attention(const float* q, const float* k_cache, const float* v_cache,
                                          const int32_t* tables, const int32_t* lengths, const int32_t* starts,
                                          const float* slopes, const float* sinks, float* out, int64_t sequences,
                                          int64_t table_width, int64_t heads, int64_t kv_heads, int64_t dim,
                                          int64_t block_size, int64_t window, float scale, float softcap, int threads) {
  llmapi::attention({q, k_cache, v_cache, tables, lengths, starts, slopes, sinks, out, sequences, table_width, heads,
                     kv_heads, dim, block_size, window, scale, softcap},
                    threads);
}
