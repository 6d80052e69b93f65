// Attention over the paged cache for a whole ragged batch. Queries go in tiles, keys in chunks, and the softmax is kept
// as it goes (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <cmath>

#include "common.h"

namespace llmapi {

constexpr int CHUNK = 64;      // keys at a time
constexpr int MAX_DIM = 256;   // channels of a head
constexpr int TILE_ROWS = 96;  // (token, query head) pairs that share a key head
constexpr int FEW_ROWS = 8;    // up to so many, scores are dot products; beyond, the keys are turned round first
#if defined(__AVX512F__)
constexpr int QROWS = 6, QVECS = 4;
#else
constexpr int QROWS = 3, QVECS = 4;
#endif

struct AttentionArgs {
  const float* q;        // [tokens, heads, dim]
  const float* k_cache;  // [blocks, block_size, kv_heads, dim]
  const float* v_cache;
  const int32_t* tables;   // [sequences, table_width]
  const int32_t* lengths;  // [sequences]
  const int32_t* starts;   // [sequences + 1]
  const float* slopes;     // [heads] or null
  const float* sinks;      // [heads] or null
  float* out;              // [tokens, heads, dim]
  int64_t sequences, table_width, heads, kv_heads, dim, block_size, window;
  float scale, softcap;
};

struct AttentionScratch {
  float q[TILE_ROWS * MAX_DIM];
  float out[TILE_ROWS * MAX_DIM];
  float turned[MAX_DIM * CHUNK];
  float scores[TILE_ROWS * CHUNK];
  float most[TILE_ROWS], total[TILE_ROWS];
};

// R rows of a (of A floats each) times b: c[r][0 .. V vectors) (+)= sum over i of a[r][i] * b[i].
template <int R, int V, class B>
inline void outer(const float* a, int64_t a_row, const B& b, int64_t n, float* c, int64_t c_row, bool add) {
  vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * c_row + v * W) : vec{};
  for (int64_t i = 0; i < n; ++i) {
    const float* at = b(i);
    vec wide[V];
    for (int v = 0; v < V; ++v) wide[v] = load(at + v * W);
    for (int r = 0; r < R; ++r) {
      vec factor = splat(a[r * a_row + i]);
      in_register(factor);
      for (int v = 0; v < V; ++v) sums[r][v] += factor * wide[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * W, sums[r][v]);
}

// The same for any number of rows and vectors.
template <int V, class B>
inline void outer_rows(int rows, const float* a, int64_t a_row, const B& b, int64_t n, float* c, int64_t c_row,
                       bool add) {
  int r = 0;
  for (; r + QROWS <= rows; r += QROWS) outer<QROWS, V>(a + r * a_row, a_row, b, n, c + r * c_row, c_row, add);
  a += r * a_row;
  c += r * c_row;
  switch (rows - r) {
    case 1: return outer<1, V>(a, a_row, b, n, c, c_row, add);
    case 2: return outer<2, V>(a, a_row, b, n, c, c_row, add);
#if defined(__AVX512F__)
    case 3: return outer<3, V>(a, a_row, b, n, c, c_row, add);
    case 4: return outer<4, V>(a, a_row, b, n, c, c_row, add);
    case 5: return outer<5, V>(a, a_row, b, n, c, c_row, add);
#endif
  }
}

template <class B>
inline void outer_all(int rows, int vectors, const float* a, int64_t a_row, const B& b, int64_t n, float* c,
                      int64_t c_row, bool add) {
  int v = 0;
  for (; v + QVECS <= vectors; v += QVECS)
    outer_rows<QVECS>(rows, a, a_row, [&](int64_t i) { return b(i) + v * W; }, n, c + v * W, c_row, add);
  for (; v < vectors; ++v)
    outer_rows<1>(rows, a, a_row, [&](int64_t i) { return b(i) + v * W; }, n, c + v * W, c_row, add);
}

// Scores of one query with W keys: dot products, summed across W vectors at once by a tree.
inline vec dots(const float* q, const float* const* keys, int64_t dim) {
  vec part[W];
  for (int i = 0; i < W; ++i) part[i] = load(q) * load(keys[i]);
  for (int64_t d = W; d < dim; d += W) {
    const vec value = load(q + d);
    for (int i = 0; i < W; ++i) part[i] += value * load(keys[i] + d);
  }
#if defined(__AVX512F__)
  for (int i = 0; i < 8; ++i)  // lanes 0-7 of one and of the other, summed over halves
    part[i] = LLMAPI_SHUFFLE(ivec, part[i], part[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              LLMAPI_SHUFFLE(ivec, part[i], part[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    part[i] = LLMAPI_SHUFFLE(ivec, part[i], part[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
              LLMAPI_SHUFFLE(ivec, part[i], part[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    part[i] = LLMAPI_SHUFFLE(ivec, part[i], part[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              LLMAPI_SHUFFLE(ivec, part[i], part[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return LLMAPI_SHUFFLE(ivec, part[0], part[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         LLMAPI_SHUFFLE(ivec, part[0], part[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  for (int i = 0; i < 4; ++i)
    part[i] = LLMAPI_SHUFFLE(ivec, part[i], part[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
              LLMAPI_SHUFFLE(ivec, part[i], part[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; ++i)
    part[i] = LLMAPI_SHUFFLE(ivec, part[i], part[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
              LLMAPI_SHUFFLE(ivec, part[i], part[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return LLMAPI_SHUFFLE(ivec, part[0], part[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         LLMAPI_SHUFFLE(ivec, part[0], part[1], 1, 9, 3, 11, 5, 13, 7, 15);
#endif
}

// One chunk of keys for the rows of one key head: scores, softmax so far, weighted values.
inline void attend_chunk(const AttentionArgs& a, AttentionScratch& s, int row0, int rows, int64_t head,
                         int64_t position0, int64_t at, int count, const int64_t* slots, int next_count,
                         const int64_t* next) {
  const int64_t group = a.heads / a.kv_heads, dim = a.dim;
  const float *keys[CHUNK], *values[CHUNK];
  for (int i = 0; i < CHUNK; ++i) {  // past the last key the last one stands in, and is hidden below
    const int64_t offset = (slots[i < count ? i : count - 1] * a.kv_heads + head) * dim;
    keys[i] = a.k_cache + offset;
    values[i] = a.v_cache + offset;
  }
  if (rows <= FEW_ROWS)
    for (int i = 0; i < next_count; ++i) {  // the next chunk is fetched while this one is computed
      const int64_t offset = (next[i] * a.kv_heads + head) * dim;
      for (int64_t d = 0; d < dim; d += 16) {
        __builtin_prefetch(a.k_cache + offset + d, 0, 2);
        __builtin_prefetch(a.v_cache + offset + d, 0, 2);
      }
    }
  float* const q = s.q + row0 * dim;
  float* const out = s.out + row0 * dim;
  if (rows <= FEW_ROWS) {
    for (int i = 0; i < count; i += W)
      for (int r = 0; r < rows; ++r) store(s.scores + r * CHUNK + i, dots(q + r * dim, keys + i, dim));
  } else {
    for (int i = 0; i < CHUNK; ++i)
      for (int64_t d = 0; d < dim; ++d) s.turned[d * CHUNK + i] = keys[i][d];
    outer_all(rows, CHUNK / W, q, dim, [&](int64_t d) { return s.turned + d * CHUNK; }, dim, s.scores, CHUNK, false);
  }
  for (int r = 0; r < rows; ++r) {
    float* score = s.scores + r * CHUNK;
    const int64_t position = position0 + r / group, h = head * group + r % group;
    if (a.softcap != 0.0f)
      for (int i = 0; i < count; ++i) score[i] = a.softcap * std::tanh(score[i] / a.softcap);
    if (a.slopes)
      for (int i = 0; i < count; ++i) score[i] += a.slopes[h] * static_cast<float>(at + i - position);
    const int64_t seen = position + 1 - at;  // keys of this chunk up to the query itself
    for (int i = seen < 0 ? 0 : static_cast<int>(seen < count ? seen : count); i < CHUNK; ++i) score[i] = -INFINITY;
    if (a.window)
      for (int i = 0; i < count && at + i <= position - a.window; ++i) score[i] = -INFINITY;
    vec highest = load(score);
    for (int i = W; i < CHUNK; i += W) highest = highest > load(score + i) ? highest : load(score + i);
    const float chunk_most = largest(highest), before = s.most[row0 + r];
    const float most = chunk_most > before ? chunk_most : before;
    vec sums{};
    for (int i = 0; i < CHUNK; i += W) {
      const vec p = exp(load(score + i) - most);
      store(score + i, p);
      sums += p;
    }
    if (most != before) {
      const float keep = exp(splat(before - most))[0];
      s.total[row0 + r] *= keep;
      for (int64_t d = 0; d < dim; d += W) store(out + r * dim + d, load(out + r * dim + d) * keep);
      s.most[row0 + r] = most;
    }
    s.total[row0 + r] += sum(sums);
  }
  const int vectors = static_cast<int>(dim / W);
  outer_all(rows, vectors, s.scores, CHUNK, [&](int64_t i) { return values[i]; }, count, out, dim, true);
}

// Query tokens [first, last) of a sequence, and the query heads of key heads [head0, head1).
inline void attend(const AttentionArgs& a, AttentionScratch& s, int64_t sequence, int64_t head0, int64_t head1,
                   int64_t first, int64_t last) {
  const int64_t group = a.heads / a.kv_heads, dim = a.dim;
  const int64_t start = a.starts[sequence];
  const int64_t length = a.lengths[sequence];
  const int64_t position0 = length - (a.starts[sequence + 1] - start) + first;  // of the first query here
  const int rows = static_cast<int>((last - first) * group);                   // of one key head
  const int all = rows * static_cast<int>(head1 - head0);
  const int32_t* table = a.tables + sequence * a.table_width;
  const auto at_row = [&](int r) {  // where row r lies in q and out
    return ((start + first + r % rows / group) * a.heads + (head0 + r / rows) * group + r % group) * dim;
  };
  for (int r = 0; r < all; ++r) {
    const float* q = a.q + at_row(r);
    for (int64_t d = 0; d < dim; d += W) {
      store(s.q + r * dim + d, load(q + d) * a.scale);
      store(s.out + r * dim + d, vec{});
    }
    s.most[r] = -1e30f;  // finite, so that a difference of two is a number
    s.total[r] = 0.0f;
  }
  const int64_t end = position0 + last - first;  // keys that the last query sees
  int64_t begin = a.window ? position0 - a.window + 1 : 0;
  begin = begin < 0 ? 0 : begin;
  int64_t block = begin / a.block_size, within = begin % a.block_size, slots[2][CHUNK];
  const auto find = [&](int64_t at, int64_t* slot) {  // slots of the chunk at `at`, chunk after chunk; their number
    const int count = static_cast<int>(end - at < CHUNK ? end - at : CHUNK);
    for (int i = 0; i < count; ++i) {
      slot[i] = table[block] * a.block_size + within;
      if (++within == a.block_size) ++block, within = 0;
    }
    return count > 0 ? count : 0;
  };
  int turn = 0, count = find(begin, slots[0]);
  for (int64_t at = begin; at < end; at += CHUNK, turn ^= 1) {
    const int next = find(at + CHUNK, slots[turn ^ 1]);
    for (int64_t head = head0; head < head1; ++head)
      attend_chunk(a, s, static_cast<int>(head - head0) * rows, rows, head, position0, at, count, slots[turn], next,
                   slots[turn ^ 1]);
    count = next;
  }
  for (int r = 0; r < all; ++r) {
    float total = s.total[r], keep = 1.0f;
    if (a.sinks) {  // one more logit, without a value
      const float sink = a.sinks[(head0 + r / rows) * group + r % group];
      const float most = sink > s.most[r] ? sink : s.most[r];
      keep = exp(splat(s.most[r] - most))[0];
      total = total * keep + exp(splat(sink - most))[0];
    }
    float* out = a.out + at_row(r);
    for (int64_t d = 0; d < dim; d += W) store(out + d, load(s.out + r * dim + d) * (keep / total));
  }
}

inline void attention(const AttentionArgs& a, int threads) {
  const int64_t group = a.heads / a.kv_heads, step = TILE_ROWS / group;
  // One token at a time, a thread takes all key heads of a sequence, which lie side by side, if there are sequences
  // enough for all threads; else, and for many tokens, it takes one key head.
  const bool decode = a.starts[a.sequences] == a.sequences && a.sequences >= 2 * threads && a.heads <= TILE_ROWS;
  const int64_t heads = decode ? a.kv_heads : 1, parts = a.kv_heads / heads;
  int64_t tiles = 0;
  for (int64_t i = 0; i < a.sequences; ++i) tiles += (a.starts[i + 1] - a.starts[i] + step - 1) / step * parts;
  for_each(tiles, threads, [&](int64_t item) {
    static thread_local AttentionScratch scratch;
    for (int64_t i = 0; i < a.sequences; ++i) {
      const int64_t count = a.starts[i + 1] - a.starts[i], here = (count + step - 1) / step * parts;
      if (item < here) {
        const int64_t first = item / parts * step, head = item % parts * heads;
        return attend(a, scratch, i, head, head + heads, first, first + step < count ? first + step : count);
      }
      item -= here;
    }
  });
}

}  // namespace llmapi
