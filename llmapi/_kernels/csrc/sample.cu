// Sampling: from rows of logits to token ids, and their log probabilities.
//
// One row is the work of a team of SPLIT blocks: one block, or a cluster (Hopper and newer). Warps own consecutive
// stretches of the vocabulary. A row is read several times; after the first time it comes from L1 or L2.
//
// A token's weight is floor(exp((x - max) / temperature) * 2^44), a 64-bit integer. Sums of integers do not depend on
// their order, so a row gives the same token however it is split and whatever atomics do. Weights under 2^-44 of the
// largest are zero.
//
// Thresholds (top_k, top_p, the best k for log probabilities) are one search: the smallest set of tokens, largest first
// and lower ids first among equals, whose weights reach a goal. A histogram over the distance to the maximum gives the
// bucket in which the goal is reached; the few tokens in it are ranked against each other. Where they are not few, the
// bucket is divided by the bits of its values, at last down to equal values.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
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
constexpr int BUCKETS = 2 * THREADS;  // two to a thread in the scan
constexpr int LIST = THREADS;         // tokens that are ranked against each other, one to a thread
constexpr int LAST_ID = 0x7fffffff;
constexpr int NARROW_K = 1024;     // as draw.py: up to here (x - max) / temperature, beyond x / temperature - max / t.
constexpr float SUPPORT = 32.0f;   // exp(-32) < 2^-44: farther tokens have no weight

#define INFINITY_F __int_as_float(0x7f800000)
#define NAN_F __int_as_float(0x7fffffff)

// One row's settings; llmapi/_kernels/sample_cuda.py has the same layout.
struct alignas(16) Row {
  uint64_t seed, stream, counter;  // Philox
  uint64_t top_p;                  // times 2^53; 2^53 is off
  uint64_t least;                  // min_p times 2^44, rounded up
  int* counts;                     // [V]: bit 31 is set if the prompt has the token; below it, how often the output has it
  float* edited;                   // [V] scratch for edited logits; null where nothing is edited
  float temperature;               // 0: greedy
  float range;                     // the nucleus lies within this (x - max) / temperature of the maximum
  int top_k;                       // 0: off
  int used;                        // 0: skip the row
  float repetition, presence, frequency;
  int edits, bans, edits_end;  // in the list of edits: [edits, bans) are added, [bans, edits_end) become -inf
  int logprobs;                // how many of the best are wanted; -1: no log probabilities
  int penalized;               // whether counts shape the logits
  int unused[2];
};
static_assert(sizeof(Row) == 112, "layout");

struct Edit {
  int id;
  float value;
};

struct Shared {
  uint32_t low[BUCKETS + 2], high[BUCKETS + 2];  // 64-bit sums in two words; the one at BUCKETS holds what is beyond
  uint64_t weight[LIST], all_weight[SPLIT > 1 ? LIST : 1];
  float x[LIST], all_x[SPLIT > 1 ? LIST : 1];
  int id[LIST], all_id[SPLIT > 1 ? LIST : 1];
  uint64_t mass[WARPS], scan[WARPS], found_before;
  float top[WARPS], bottom[WARPS];
  int top_id[WARPS];
  int listed, found, tie, ahead;
  float border;
  int border_id;
};

// ---- the team

DEVICE int team_rank() {
#if SPLIT > 1
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
DEVICE void team_sync() {
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The same place in the shared memory of another block of the team.
template <typename T> DEVICE const T& peer(const T& here, int rank) {
#if SPLIT > 1
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(&here), "r"(rank));
  return *there;
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
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a != a || b != b ? NAN_F : fmaxf(a, b);
#endif
}
DEVICE float warp_max_nan(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
DEVICE float warp_min(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fminf(x, __shfl_xor_sync(0xffffffffu, x, offset));
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

// Logits to weights. (x - before) / temperature - after, where one of before and after is the maximum: as draw.py.
struct Scale {
  float before, after, temperature, inverse;

  // Nats from the maximum, at most 0; NaN for -inf. The quotient is correctly rounded (Markstein 1990).
  DEVICE float nats(float x) const {
    float a = __fsub_rn(x, before), q = __fmul_rn(a, inverse);
    return __fsub_rn(__fmaf_rn(__fmaf_rn(-q, temperature, a), inverse, q), after);
  }
  // Coefficients: Moshier's Cephes, expf. Every operation is spelled out: all builds must give the same bits.
  DEVICE uint64_t weight_of(float nats) const {
    nats = fmaxf(nats, -40.0f);  // also of NaN
    float t = __fmaf_rn(nats, 1.44269504f, 12582912.0f), n = __fsub_rn(t, 12582912.0f);
    float f = __fmaf_rn(n, 2.12194440e-4f, __fmaf_rn(n, -0.693359375f, nats));
    float p = __fmaf_rn(1.9875691500e-4f, f, 1.3981999507e-3f);
    p = __fmaf_rn(p, f, 8.3334519073e-3f);
    p = __fmaf_rn(p, f, 4.1665795894e-2f);
    p = __fmaf_rn(p, f, 1.6666665459e-1f);
    p = __fmaf_rn(p, f, 5.0000001201e-1f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(f, f), f), 1.0f);
    uint32_t bits = __float_as_uint(p) + (__float_as_uint(t) << 23);
    return (uint64_t)((bits & 0x7fffffu) | 0x800000u) << 21 >> (127 - (bits >> 23));
  }
  DEVICE uint64_t weight(float x) const { return weight_of(nats(x)); }
};

// 53 random bits: Philox4x32-10 (Salmon et al. 2011), as philox.py.
DEVICE uint64_t random53(const Row& row) {
  uint32_t c0 = (uint32_t)row.counter, c1 = (uint32_t)(row.counter >> 32);
  uint32_t c2 = (uint32_t)row.stream, c3 = (uint32_t)(row.stream >> 32);
  uint32_t k0 = (uint32_t)row.seed, k1 = (uint32_t)(row.seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return ((uint64_t)(c0 >> 5) << 26) | (c1 >> 6);
}
DEVICE uint64_t share(uint64_t part53, uint64_t total) {  // floor(part * total / 2^53)
  return (__umul64hi(part53, total) << 11) | (part53 * total >> 53);
}
DEVICE uint64_t share_up(uint64_t part53, uint64_t total) {  // ceil
  return share(part53, total) + ((part53 * total & ((1ull << 53) - 1)) != 0);
}

// ---- one row

// The stretch of a row that a warp owns, as tiles of 32 aligned 16-byte vectors.
template <typename T> struct View {
  static constexpr int WIDTH = 16 / sizeof(T);
  const T* row;
  int size, lead, begin, end;  // lead: elements between the first vector's start and the row's
  bool forced = false;         // +inf stands for certainty: it becomes 0, everything else -inf

  DEVICE View(const T* row, int size) : row(row), size(size) {
    lead = (int)((uint64_t)row / sizeof(T) % WIDTH);
    int tiles = CEIL_DIV(CEIL_DIV(lead + size, WIDTH), 32), each = CEIL_DIV(tiles, SPLIT * WARPS);
    int warp = team_rank() * WARPS + (threadIdx.x >> 5);
    begin = min(warp * each, tiles);
    end = min(begin + each, tiles);
  }
  DEVICE int first(int tile) const { return (tile * 32 + (int)(threadIdx.x & 31)) * WIDTH - lead; }
  DEVICE Vec<T, WIDTH> read(int tile) const {
    int id = first(tile);
    if (id >= 0 && id + WIDTH <= size) return load<T, WIDTH>(row + id);
    Vec<T, WIDTH> out;
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
      out.at[e] = (unsigned)(id + e) < (unsigned)size ? row[id + e] : from_float<T>(-INFINITY_F);
    return out;
  }
  DEVICE float value(T x) const {
    float v = to_float(x);
    return forced ? (v == INFINITY_F ? 0.0f : -INFINITY_F) : v;
  }
  // f(x, id) of the tiles [from, to), FLIGHT loads at a time; ids outside the row come as -inf.
  template <int FLIGHT, typename F> DEVICE void each(int from, int to, F f) const {
#pragma unroll 1
    for (int tile = from; tile < to; tile += FLIGHT) {
      Vec<T, WIDTH> raw[FLIGHT];
#pragma unroll
      for (int u = 0; u < FLIGHT; u++)
        if (tile + u < to) raw[u] = read(tile + u);
#pragma unroll
      for (int u = 0; u < FLIGHT; u++) {
        if (tile + u < to) {
          int id = first(tile + u);
#pragma unroll
          for (int e = 0; e < WIDTH; e++) f(value(raw[u].at[e]), id + e);
        }
      }
    }
  }
  // The same in less code, for what is rare: 32 ids at a time, none outside the row.
  template <typename F> DEVICE void each_one(F f) const {
#pragma unroll 1
    for (int id = from() + (int)(threadIdx.x & 31); id < to(); id += 32) f(value(row[id]), id);
  }
  DEVICE int from() const { return max(begin * 32 * WIDTH - lead, 0); }
  DEVICE int to() const { return min(end * 32 * WIDTH - lead, size); }
  template <int FLIGHT = 1, typename F> DEVICE void each(F f) const { each<FLIGHT>(begin, end, f); }
};

DEVICE void add(Shared& s, int bucket, uint64_t weight) {
  uint32_t low = (uint32_t)weight, old = atomicAdd(&s.low[bucket], low);
  uint32_t high = (uint32_t)(weight >> 32) + (old + low < old ? 1u : 0u);
  if (high) atomicAdd(&s.high[bucket], high);
}

// What the warps before this one have, in the order of ids, and what all warps of the team have; `mine`: what this has.
DEVICE uint64_t start_of(Shared& s, uint64_t mine, uint64_t& total) {
  constexpr int OWN = CEIL_DIV(SPLIT * WARPS, 32);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, place = team_rank() * WARPS + warp;
  if (lane == 0) s.mass[warp] = mine;
  team_sync();
  uint64_t part[OWN], sum = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    int at = lane * OWN + i;
    part[i] = at < SPLIT * WARPS ? peer(s.mass[at % WARPS], at / WARPS) : 0;
    sum += part[i];
  }
  uint64_t up_to = warp_scan(sum, lane);
  total = __shfl_sync(0xffffffffu, up_to, 31);
  uint64_t start = __shfl_sync(0xffffffffu, up_to - sum, place / OWN);
#pragma unroll
  for (int i = 0; i < OWN - 1; i++) {
    uint64_t left = __shfl_sync(0xffffffffu, part[i], place / OWN);
    if (i < place % OWN) start += left;
  }
  return start;
}

// The token in whose stretch of the cumulative weights, in the order of ids, the number pick(total) lies. Its lane
// gets its id, every other thread of the team gets -1. `total` is what all weights add up to.
template <typename V, typename Weight, typename Pick>
DEVICE int locate(Shared& s, const V& view, Weight weight, Pick pick, uint64_t& total) {
  int lane = threadIdx.x & 31;
  uint64_t mine = 0;
  view.each([&](float x, int id) { mine += weight(x, id); });
  mine = warp_sum(mine);
  uint64_t start = start_of(s, mine, total), goal = pick(total);
  if (total == 0 || goal < start || goal - start >= mine) return -1;
  goal -= start;
  for (int tile = view.begin; tile < view.end; tile++) {
    auto raw = view.read(tile);
    uint64_t own = 0, each[V::WIDTH];
#pragma unroll
    for (int e = 0; e < V::WIDTH; e++) own += each[e] = weight(view.value(raw.at[e]), view.first(tile) + e);
    uint64_t reached = warp_scan(own, lane), all = __shfl_sync(0xffffffffu, reached, 31);
    if (goal >= all) {
      goal -= all;
      continue;
    }
    int found = -1;
    reached -= own;
    if (reached <= goal) {
#pragma unroll
      for (int e = 0; e < V::WIDTH; e++) {
        reached += each[e];
        if (found < 0 && reached > goal) found = view.first(tile) + e;
      }
    }
    return found;
  }
  return -1;
}

struct Border {
  float x;
  int id;
  DEVICE bool holds(float value, int at) const { return value > x || (value == x && at <= id); }
};

// The last token of the smallest set, largest first and lower ids first among equals, whose weights reach a goal.
//   bucket(x, id): rising with falling x, below BUCKETS; BUCKETS: counts in the total only; -1: not at all
//   weight(x): at least 1 where bucket is below BUCKETS
//   aim(total): the goal, at least 1; if all buckets do not reach it, every token belongs to the set
// Without `ids`, the border's id is LAST_ID: all tokens that equal the last one belong to the set.
template <typename V, typename Bucket, typename Weight, typename Aim>
DEVICE Border select(Shared& s, const V& view, Bucket bucket, Weight weight, Aim aim, bool ids) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  int coarse = -1, shift = 32;  // the bucket being divided, and how many low bits of its keys are still open
  uint32_t prefix = 0;
  uint64_t goal = 0;
  auto member = [&](float x, int id) {
    return bucket(x, id) == coarse && (shift == 32 || falling_key(x) >> shift == prefix);
  };
  for (;;) {
    for (int i = tid; i <= BUCKETS; i += THREADS) s.low[i] = s.high[i] = 0;
    if (tid == 0) s.listed = 0, s.found = s.tie = -1;
    __syncthreads();
    int next = shift > 10 ? (coarse < 0 ? 32 : shift - 10) : 0;
    uint64_t beyond = 0;
    if (coarse < 0) {
      view.each([&](float x, int id) {
        int at = bucket(x, id);
        if (at >= 0) {
          if (at < BUCKETS) add(s, at, weight(x));
          else beyond += weight(x);
        }
      });
      beyond = warp_sum(beyond);
      if (lane == 0 && beyond) add(s, BUCKETS, beyond);
    } else {
      view.each_one([&](float x, int id) {
        if (member(x, id)) add(s, falling_key(x) >> next & ((1u << (shift - next)) - 1), weight(x));
      });
    }
    team_sync();

    uint64_t a = 0, b = 0, rest = 0;
#pragma unroll
    for (int rank = 0; rank < SPLIT; rank++) {
      a += ((uint64_t)peer(s.high[2 * tid], rank) << 32) + peer(s.low[2 * tid], rank);
      b += ((uint64_t)peer(s.high[2 * tid + 1], rank) << 32) + peer(s.low[2 * tid + 1], rank);
      rest += ((uint64_t)peer(s.high[BUCKETS], rank) << 32) + peer(s.low[BUCKETS], rank);
    }
    uint64_t up_to = warp_scan(a + b, lane), total = 0, before = up_to - a - b;
    if (lane == 31) s.scan[warp] = up_to;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      if (i == warp) before += total;
      total += s.scan[i];
    }
    if (coarse < 0) goal = aim(total + rest);
    if (before < goal && goal <= before + a + b) {
      bool second = goal > before + a;
      s.found = 2 * tid + second;
      s.found_before = second ? before + a : before;
    }
    __syncthreads();
    if (s.found < 0) {
      team_sync();
      return {-INFINITY_F, LAST_ID};
    }
    goal -= s.found_before;
    if (coarse < 0) {
      coarse = s.found;
    } else {
      prefix = (shift == 32 ? 0 : prefix << (shift - next)) | s.found;
      shift = next;
    }

    view.each([&](float x, int id) {
      if (member(x, id)) {
        int at = atomicAdd(&s.listed, 1);
        if (at < LIST) s.x[at] = x, s.id[at] = id, s.weight[at] = weight(x);
      }
    });
    team_sync();
    int count = 0;
#pragma unroll
    for (int rank = 0; rank < SPLIT; rank++) count += peer(s.listed, rank);
    if (count <= LIST) {
#if SPLIT > 1
      int from = 0;
      for (int rank = 0; rank < SPLIT; rank++) {
        int n = peer(s.listed, rank);
        if (tid < n) {
          s.all_x[from + tid] = peer(s.x[tid], rank);
          s.all_id[from + tid] = peer(s.id[tid], rank);
          s.all_weight[from + tid] = peer(s.weight[tid], rank);
        }
        from += n;
      }
      team_sync();
      const float* xs = s.all_x;
      const int* at = s.all_id;
      const uint64_t* weights = s.all_weight;
#else
      const float* xs = s.x;
      const int* at = s.id;
      const uint64_t* weights = s.weight;
#endif
      if (tid < count) {
        float x = xs[tid];
        int id = at[tid];
        uint64_t ahead = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
          float other = xs[i];
          if (other > x || (other == x && at[i] < id)) ahead += weights[i];
        }
        if (ahead < goal && goal <= ahead + weights[tid]) s.border = x, s.border_id = id;
      }
      __syncthreads();
      return {s.border, ids ? s.border_id : LAST_ID};
    }
    if (shift == 0) {  // too many to list, all equal
      Border border = {from_key(prefix), LAST_ID};
      if (ids) {
        uint64_t last = (goal - 1) / weight(border.x), equal = 0, all;  // the last that belongs, counted from 0
        view.each_one([&](float x, int id) { equal += member(x, id); });
        equal = warp_sum(equal);
        uint64_t start = start_of(s, equal, all);
        if (start <= last && last < start + equal) {
#pragma unroll 1
          for (int first = view.from(); first < view.to(); first += 32) {
            int id = first + lane;
            uint32_t here = __ballot_sync(0xffffffffu, id < view.to() && member(view.value(view.row[id]), id));
            if (here >> lane & 1 && start + __popc(here & ((1u << lane) - 1)) == last) s.tie = id;
            start += __popc(here);
          }
        }
        team_sync();
        border.id = -1;
#pragma unroll
        for (int rank = 0; rank < SPLIT; rank++) border.id = max(border.id, peer(s.tie, rank));
      }
      team_sync();
      return border;
    }
    team_sync();  // before the counts are cleared
  }
}

// Largest and smallest value of a row to every thread; NaN if there is one. -inf counts for the largest only.
template <typename V> DEVICE float extremes(Shared& s, const V& view, float* smallest) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float top = -INFINITY_F, bottom = INFINITY_F;
  if (smallest) view.template each<4>([&](float x, int) { top = max_nan(top, x), bottom = x > -INFINITY_F ? fminf(bottom, x) : bottom; });
  else view.template each<4>([&](float x, int) { top = max_nan(top, x); });
  top = warp_max_nan(top);
  if (smallest) bottom = warp_min(bottom);
  if (lane == 0) s.top[warp] = top, s.bottom[warp] = bottom;
  team_sync();
  top = -INFINITY_F, bottom = INFINITY_F;
  for (int i = lane; i < SPLIT * WARPS; i += 32) {
    top = max_nan(top, peer(s.top[i % WARPS], i / WARPS));
    if (smallest) bottom = fminf(bottom, peer(s.bottom[i % WARPS], i / WARPS));
  }
  if (smallest) *smallest = warp_min(bottom);
  return warp_max_nan(top);
}

// The largest value and the lowest id that has it; only the first warp of the team's first block gets them.
template <typename V> DEVICE int argmax(Shared& s, const V& view, float& top) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float own = -INFINITY_F;
  view.template each<4>([&](float x, int) { own = max_nan(own, x); });
  top = warp_max_nan(own);
  int id = LAST_ID;
  if (own == top) view.each([&](float x, int i) { id = x == top ? min(id, i) : id; });
  id = warp_min(id);
  if (lane == 0) s.top[warp] = top, s.top_id[warp] = id;
  team_sync();
  if (team_rank() || warp) return -1;
  own = -INFINITY_F, id = LAST_ID;
  for (int i = lane; i < SPLIT * WARPS; i += 32) {
    float x = peer(s.top[i % WARPS], i / WARPS);
    int at = peer(s.top_id[i % WARPS], i / WARPS);
    if (x > own || (x == own && at < id)) id = at;
    own = max_nan(own, x);
  }
  top = warp_max_nan(own);
  return warp_min(own == top ? id : LAST_ID);
}

// -1 as the row's token, and why: how many raw logits are NaN; or -1 if all are -inf; or 0: the edits left nothing.
// For one warp.
DEVICE void fail(const scalar_t* raw, int vocab, int* out, int* reason) {
  int lane = threadIdx.x & 31, nans = 0, some = 0;
  for (int id = lane; id < vocab; id += 32) {
    float x = to_float(raw[id]);
    nans += x != x;
    some |= x > -INFINITY_F;
  }
  nans = (int)warp_sum((uint64_t)nans);
  some = __any_sync(0xffffffffu, some);
  if (lane == 0) {
    *out = -1;
    if (reason) *reason = nans ? nans : some ? 0 : -1;
  }
}

DEVICE void accept(const Row& row, int id, int* out) {
  *out = id;
  if (row.counts) row.counts[id] += 1;
}

template <typename V>
DEVICE void sample(Shared& s, V view, const Row& row, const scalar_t* raw, int* out, int* reason) {
  int vocab = view.size;
  bool first = team_rank() == 0 && threadIdx.x < 32;
  float top;
  if (row.temperature == 0.0f) {
    int id = argmax(s, view, top);
    if (first) {
      if (!(top > -INFINITY_F)) fail(raw, vocab, out, reason);
      else if (threadIdx.x == 0) accept(row, id, out);
    }
    return;
  }
  top = extremes(s, view, nullptr);
  if (top == INFINITY_F) view.forced = true, top = 0.0f;
  bool by_k = row.top_k > 0 && row.top_k < vocab, by_p = row.top_p < 1ull << 53;
  Scale scale = {0.0f, 0.0f, row.temperature, __frcp_rn(row.temperature)};
  if (by_k && row.top_k <= NARROW_K) scale.before = top;
  else scale.after = scale.nats(top);
  if (!(scale.nats(top) == 0.0f)) {  // -inf, NaN, or too large for the temperature
    if (first) fail(raw, vocab, out, reason);
    return;
  }
  Border border = {-INFINITY_F, LAST_ID};
  if (by_k) {
    float per_nat = BUCKETS / SUPPORT;
    border = select(
        s, view,
        [&](float x, int) {
          float far = -scale.nats(x);
          return far < SUPPORT ? min((int)(far * per_nat), BUCKETS - 1) : -1;
        },
        [](float) { return (uint64_t)1; }, [&](uint64_t) { return (uint64_t)row.top_k; }, false);
  }
  if (by_p) {
    float kth = border.x, range = row.range, per_nat = BUCKETS / range;
    border = select(
        s, view,
        [&](float x, int) {
          float far = -scale.nats(x);
          if (!(x >= kth && far < SUPPORT)) return -1;
          return far < range ? min((int)(far * per_nat), BUCKETS - 1) : BUCKETS;
        },
        [&](float x) { return scale.weight(x); }, [&](uint64_t all) { return share_up(row.top_p, all); }, true);
    border.x = fmaxf(border.x, kth);
  }
  uint64_t least = row.least, total;
  int id = locate(
      s, view,
      [&](float x, int at) {
        if (!border.holds(x, at)) return (uint64_t)0;
        uint64_t weight = scale.weight(x);
        return weight >= least ? weight : (uint64_t)0;
      },
      [&](uint64_t all) { return share(random53(row), all); }, total);
  if (id >= 0) accept(row, id, out);
  if (total == 0 && first) fail(raw, vocab, out, reason);
}

// Edited logits into the row's scratch, in the order of logit_edits.py.
DEVICE void edit(const Row& row, const scalar_t* raw, int vocab, const Edit* edits) {
  auto penalize = [&](float x, int id) {
    int count = row.counts[id];
    if (row.repetition != 1.0f && count) x = x < 0 ? __fmul_rn(x, row.repetition) : __fdiv_rn(x, row.repetition);
    count &= 0x7fffffff;
    return count ? __fsub_rn(x, __fadd_rn(__fmul_rn(row.frequency, (float)count), row.presence)) : x;
  };
  bool lists = row.edits < row.edits_end;
  View<scalar_t> view(raw, vocab);
  view.each_one([&](float x, int id) { row.edited[id] = row.penalized && !lists ? penalize(x, id) : x; });
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

// logits [N, V] with a stride between rows; rows [N]; edits: one list for all rows; ids [N] and reasons [N] are written.
// Grid: N * SPLIT.
extern "C" __global__ void TEAM __launch_bounds__(THREADS, 2)
    sample_rows(const scalar_t* logits, int64_t stride, int vocab, const Row* rows, const Edit* edits, int* ids,
                int* reasons) {
  __shared__ Shared s;
  pdl_wait();
  pdl_launch();
  int at = blockIdx.x / SPLIT;
  const Row& row = rows[at];
  if (!row.used) return;
  const scalar_t* raw = logits + at * stride;
  int* reason = reasons ? reasons + at : nullptr;
  if (row.edited) {
    edit(row, raw, vocab, edits);
    sample(s, View<float>(row.edited, vocab), row, raw, ids + at, reason);
  } else {
    sample(s, View<scalar_t>(raw, vocab), row, raw, ids + at, reason);
  }
  if (SPLIT > 1) team_sync();  // others may still read this block's shared memory
}

// Log probabilities under the raw logits. values [N, 1 + width] float and tokens [N, 1 + width] int32: first the chosen
// token's log probability and rank, then the best row.logprobs tokens in falling order. Grid: N * SPLIT.
extern "C" __global__ void TEAM __launch_bounds__(THREADS, 2)
    sample_logprobs(const scalar_t* logits, int64_t stride, int vocab, const Row* rows, const int* ids, int width,
                    float* values, int* tokens) {
  __shared__ Shared s;
  pdl_wait();
  pdl_launch();
  int at = blockIdx.x / SPLIT, tid = threadIdx.x;
  const Row& row = rows[at];
  int best = min(min(row.logprobs, width), vocab), chosen = ids[at];
  if (!row.used || row.logprobs < 0 || chosen < 0) return;
  const scalar_t* raw = logits + at * stride;
  values += (int64_t)at * (1 + width);
  tokens += (int64_t)at * (1 + width);
  View<scalar_t> view(raw, vocab);
  bool first = team_rank() == 0;

  float bottom, top = extremes(s, view, &bottom);
  if (!(top < INFINITY_F)) {  // no distribution
    if (first && tid <= best) values[tid] = NAN_F, tokens[tid] = tid ? tid - 1 : 1;
    if (SPLIT > 1) team_sync();
    return;
  }
  Scale scale = {top, 0.0f, 1.0f, 1.0f};
  uint64_t total;
  locate(s, view, [&](float x, int) { return scale.weight(x); }, [](uint64_t all) { return all; }, total);
  float log_sum = (float)log((double)total * 0x1p-44);
  auto logprob = [&](float x) { return __fsub_rn(__fsub_rn(x, top), log_sum); };

  Border border = {INFINITY_F, -1};
  if (best > 0) {
    float per_unit = BUCKETS / fmaxf(top - bottom, 1e-30f);
    border = select(
        s, view,
        [&](float x, int id) {
          if ((unsigned)id >= (unsigned)vocab) return -1;
          float far = __fmul_rn(__fsub_rn(top, x), per_unit);
          return far < BUCKETS ? (int)far : BUCKETS - 1;
        },
        [](float) { return (uint64_t)1; }, [&](uint64_t) { return (uint64_t)best; }, true);
  }
  __syncthreads();
  if (tid == 0) s.listed = s.ahead = 0;
  __syncthreads();
  float own = logprob(to_float(raw[chosen]));
  int ahead = 0;
  view.each([&](float x, int id) {
    if (logprob(x) > own) ahead++;
    if ((unsigned)id < (unsigned)vocab && border.holds(x, id)) {
      int place = atomicAdd(&s.listed, 1);
      if (place < LIST) s.x[place] = x, s.id[place] = id;
    }
  });
  if (ahead) atomicAdd(&s.ahead, ahead);
  team_sync();
  if (first) {
    int rank = 1;
    for (int r = 0; r < SPLIT; r++) rank += peer(s.ahead, r);
    if (tid == 0) values[0] = own, tokens[0] = rank;
  }
  for (int i = tid; i < min(s.listed, LIST); i += THREADS) {  // each block places its own
    int place = 0;
    for (int r = 0; r < SPLIT; r++) {
      int n = min(peer(s.listed, r), LIST);
      for (int j = 0; j < n; j++) {
        float other = peer(s.x[j], r);
        place += other > s.x[i] || (other == s.x[i] && peer(s.id[j], r) < s.id[i]);
      }
    }
    if (place < best) values[1 + place] = logprob(s.x[i]), tokens[1 + place] = s.id[i];
  }
  if (SPLIT > 1) team_sync();
}
