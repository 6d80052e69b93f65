// What kernels over rows of logits share: the team of blocks that has a row, what each of its warps reads, the row's
// largest value, sums that do not depend on their order, and the edits that a request asks for.
//
// One row is the work of a team of SPLIT blocks: one block, or a cluster (Hopper and newer). Warps own consecutive
// stretches of the vocabulary. A row is read several times; after the first time it comes from L1 or L2.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
#pragma once
#include "common.cuh"

#ifndef SPLIT
#define SPLIT 1
#endif
#if SPLIT > 1 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // no clusters: such a build is never launched
#undef SPLIT
#define SPLIT 1
#endif
#if SPLIT > 1
#define TEAM __cluster_dims__(SPLIT, 1, 1)
#else
#define TEAM
#endif

constexpr int THREADS = 512, WARPS = THREADS / 32;

#define INFINITY_F __int_as_float(0x7f800000)
#define NAN_F __int_as_float(0x7fffffff)

struct Edit {
  int id;
  float value;
};

// ---- the team

DEVICE int team_rank() {
#if SPLIT > 1
  return ptx::cluster_ctarank();
#else
  return 0;
#endif
}
DEVICE void team_sync() {
#if SPLIT > 1
  ptx::barrier_cluster();
#else
  __syncthreads();
#endif
}
// The same place in the shared memory of another block of the team.
template <typename T> DEVICE const T& peer(const T& here, int rank) {
#if SPLIT > 1
  return *ptx::mapa(&here, rank);
#else
  return here;
#endif
}

// ---- numbers

DEVICE uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
DEVICE uint64_t warp_scan(uint64_t x, int lane) {  // inclusive
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    uint64_t left = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += left;
  }
  return x;
}
DEVICE float max_nan(float a, float b) {  // NaN wins
#if __CUDA_ARCH__ >= 800
  return ptx::max_nan(a, b);
#else
  return a != a || b != b ? NAN_F : fmaxf(a, b);
#endif
}
DEVICE float warp_max_nan(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
DEVICE int warp_min(int x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = min(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Larger floats have smaller keys; both zeros have the same.
DEVICE uint32_t falling_key(float x) {
  uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}
DEVICE float from_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu); }

// Numbers in [0, 1] as multiples of 2^-44, rounded to the nearest: two addends whose last bits are worth 2^-21 and 2^-44.
struct Fixed {
  uint32_t coarse = 0, fine = 0;  // sums of bits, modulo 2^32: right for up to 256 numbers
  DEVICE void add(float x) {
    float a = __fadd_rn(x, 6.0f), b = __fadd_rn(__fsub_rn(x, __fsub_rn(a, 6.0f)), 0x1.8p-21f);
    coarse += __float_as_uint(a) - 0x40c00000u;
    fine += __float_as_uint(b) - 0x35400000u;
  }
  DEVICE uint64_t sum() const { return ((uint64_t)coarse << 23) + (int64_t)(int)fine; }
};

// ---- one row

// Sixteen bytes of logits.
template <typename T> DEVICE float element(const uint4& v, int e) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[e]);
  } else {
    uint32_t word = words[e / 2];
#if LLM_DTYPE == 1
    return __half2float(__ushort_as_half((unsigned short)(e & 1 ? word >> 16 : word)));
#else
    return __uint_as_float(e & 1 ? word & 0xffff0000u : word << 16);
#endif
  }
}
template <typename T> DEVICE float peak(const uint4& v) {  // the largest, NaN if there is one
#if __CUDA_ARCH__ >= 800 && LLM_DTYPE > 0
  if constexpr (sizeof(T) == 2) {
#if LLM_DTYPE == 1
    typedef __half2 Pair;
#else
    typedef __nv_bfloat162 Pair;
#endif
    auto pair = [](const uint32_t& word) { return *reinterpret_cast<const Pair*>(&word); };
    Pair two = __hmax2_nan(__hmax2_nan(pair(v.x), pair(v.y)), __hmax2_nan(pair(v.z), pair(v.w)));
    uint4 out = make_uint4(*reinterpret_cast<uint32_t*>(&two), 0, 0, 0);
    return max_nan(element<T>(out, 0), element<T>(out, 1));
  }
#endif
  float out = element<T>(v, 0);
#pragma unroll
  for (int e = 1; e < 16 / (int)sizeof(T); e++) out = max_nan(out, element<T>(v, e));
  return out;
}

// The stretch of a row that a warp owns, as tiles of 32 aligned 16-byte vectors.
template <typename T> struct View {
  static constexpr int WIDTH = 16 / sizeof(T);
  typedef T Element;
  const T* row;
  int size, lead, begin, end;  // lead: elements between the first vector's start and the row's

  DEVICE View(const T* row, int size) : row(row), size(size) {
    lead = (int)((uint64_t)row / sizeof(T) % WIDTH);
    int tiles = CEIL_DIV(CEIL_DIV(lead + size, WIDTH), 32), each = CEIL_DIV(tiles, SPLIT * WARPS);
    int warp = team_rank() * WARPS + (threadIdx.x >> 5);
    begin = min(warp * each, tiles);
    end = min(begin + each, tiles);
  }
  DEVICE int first(int tile) const { return (tile * 32 + (int)(threadIdx.x & 31)) * WIDTH - lead; }
  DEVICE uint4 read(int tile) const {  // -inf outside the row
    int id = first(tile);
    if (id >= 0 && id + WIDTH <= size) return *reinterpret_cast<const uint4*>(row + id);
    uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int at = id + WIDTH - 1; at >= id; at--) {
      T x = (unsigned)at < (unsigned)size ? row[at] : from_float<T>(-INFINITY_F);
      if constexpr (sizeof(T) == 4) {
        v.w = v.z, v.z = v.y, v.y = v.x, v.x = *reinterpret_cast<uint32_t*>(&x);
      } else {
        v.w = v.w << 16 | v.z >> 16, v.z = v.z << 16 | v.y >> 16, v.y = v.y << 16 | v.x >> 16;
        v.x = v.x << 16 | *reinterpret_cast<uint16_t*>(&x);
      }
    }
    return v;
  }
  DEVICE float at(int id) const { return to_float(row[id]); }
  // f(vector, id of its first element) of all that hold a value of at least `floor`.
  template <typename F> DEVICE void each_vector(float floor, F f) const {
    if (begin >= end) return;
    uint4 next = read(begin);
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
      uint4 raw = next;
      if (tile + 1 < end) next = read(tile + 1);
      if (floor == -INFINITY_F || peak<T>(raw) >= floor) f(raw, first(tile));
    }
  }
  // f(x, id) of all elements of such vectors, read again one by one: where few are expected.
  template <typename F> DEVICE void each(float floor, F f) const {
    each_vector(floor, [&](const uint4&, int id) {
      int last = min(id + WIDTH, size);
#pragma unroll 1
      for (id = max(id, 0); id < last; id++) f(at(id), id);
    });
  }
  // f(x, id) of all, 32 ids at a time.
  template <typename F> DEVICE void each_one(F f) const {
#pragma unroll 1
    for (int id = from() + (int)(threadIdx.x & 31); id < to(); id += 32) f(at(id), id);
  }
  DEVICE int from() const { return max(begin * 32 * WIDTH - lead, 0); }
  DEVICE int to() const { return min(end * 32 * WIDTH - lead, size); }
};

template <typename V> DEVICE float thread_max(const V& view) {  // NaN if there is one
  constexpr int FLIGHT = 8;  // loads
  float top = -INFINITY_F;
#pragma unroll 1
  for (int tile = view.begin; tile < view.end; tile += FLIGHT) {
    uint4 raw[FLIGHT];
#pragma unroll
    for (int u = 0; u < FLIGHT; u++) raw[u] = view.read(min(tile + u, view.end - 1));
#pragma unroll
    for (int u = 0; u < FLIGHT; u++) top = max_nan(top, peak<typename V::Element>(raw[u]));
  }
  return top;
}
// Largest value of a row to every thread, NaN if there is one; `own`: the largest of the thread's own, `s.top[WARPS]`:
// those of the block's warps.
template <typename Shared, typename V> DEVICE float row_max(Shared& s, const V& view, float& own) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  own = thread_max(view);
  float top = warp_max_nan(own);
  if (lane == 0) s.top[warp] = top;
  team_sync();
  top = -INFINITY_F;
#pragma unroll
  for (int i = 0; i < CEIL_DIV(SPLIT * WARPS, 32); i++) {
    int at = min(lane + 32 * i, SPLIT * WARPS - 1);
    top = max_nan(top, peer(s.top[at % WARPS], at / WARPS));
  }
  return warp_max_nan(top);
}

// value(logit) of a row, edited, into the row's scratch, in the order of logit_edits.py. For the team.
//   row.counts [V]: bit 31 is set if the prompt has the token; below it, how often the output has it
//   row.edited [V]: the scratch
//   row.penalized: whether counts shape the values, by row.repetition, row.presence and row.frequency
//   row.edits, row.bans, row.edits_end: in the list of edits, [edits, bans) are added, [bans, edits_end) become -inf
//   mask: a bit for each token that is allowed; null: all are
template <typename Row, typename Value>
DEVICE void edit(const Row& row, const scalar_t* raw, int vocab, const Edit* edits, const uint32_t* mask, Value value) {
  auto penalize = [&](float x, int id) {
    int count = row.counts[id];
    if (row.repetition != 1.0f && count) x = x < 0 ? __fmul_rn(x, row.repetition) : __fdiv_rn(x, row.repetition);
    count &= 0x7fffffff;
    return count ? __fsub_rn(x, __fadd_rn(__fmul_rn(row.frequency, (float)count), row.presence)) : x;
  };
  bool lists = row.edits < row.edits_end;
  View<scalar_t> view(raw, vocab);
  bool penalties = row.penalized && !lists;
  constexpr int WIDTH = View<scalar_t>::WIDTH;
  if (view.lead == 0 && vocab % 8 == 0 && (((uint64_t)row.edited | (uint64_t)row.counts) & 15) == 0) {
    float* edited = row.edited;
    const int* counts = row.counts;
    view.each_vector(-INFINITY_F, [&](const uint4& raw, int id) {
      if (id >= vocab) return;
      uint32_t any = 0, allowed = mask ? mask[id >> 5] >> (id & 31) : 0xffffffffu;  // a vector lies in one word
      if (penalties) {
#pragma unroll
        for (int e = 0; e < WIDTH; e += 4) {
          uint4 count = *reinterpret_cast<const uint4*>(counts + id + e);
          any |= count.x | count.y | count.z | count.w;
        }
      }
#pragma unroll
      for (int e = 0; e < WIDTH; e += 4)
        *reinterpret_cast<float4*>(edited + id + e) =
            make_float4(value(allowed >> e & 1 ? element<scalar_t>(raw, e) : -INFINITY_F),
                        value(allowed >> (e + 1) & 1 ? element<scalar_t>(raw, e + 1) : -INFINITY_F),
                        value(allowed >> (e + 2) & 1 ? element<scalar_t>(raw, e + 2) : -INFINITY_F),
                        value(allowed >> (e + 3) & 1 ? element<scalar_t>(raw, e + 3) : -INFINITY_F));
      if (any) {
#pragma unroll 1
        for (int e = 0; e < WIDTH; e++) edited[id + e] = penalize(edited[id + e], id + e);
      }
    });
  } else {
    view.each_one([&](float x, int id) {
      if (mask && !(mask[id >> 5] >> (id & 31) & 1)) x = -INFINITY_F;
      row.edited[id] = penalties ? penalize(value(x), id) : value(x);
    });
  }
  team_sync();
  if (!lists) return;
  int thread = team_rank() * THREADS + threadIdx.x;
  for (int i = row.edits + thread; i < row.bans; i += SPLIT * THREADS) row.edited[edits[i].id] += edits[i].value;
  team_sync();
  for (int i = row.bans + thread; i < row.edits_end; i += SPLIT * THREADS) row.edited[edits[i].id] = -INFINITY_F;
  team_sync();
  if (row.penalized) {
    for (int id = thread; id < vocab; id += SPLIT * THREADS) row.edited[id] = penalize(row.edited[id], id);
    team_sync();
  }
}
