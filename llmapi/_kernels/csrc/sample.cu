// Sampling: from rows of logits to token ids, and their log probabilities.
//
// A token's weight is exp((x - max) / temperature) * 2^44, rounded: a 64-bit integer. Sums of integers do not depend on
// their order, so a row gives the same token however it is split and whatever atomics do. Weights under 2^-45 of the
// largest are zero.
//
// Thresholds (top_k, top_p, the best k for log probabilities) are one search: the smallest set of tokens, largest first
// and lower ids first among equals, whose weights reach a goal. A histogram over the distance to the maximum gives the
// bucket in which the goal is reached. Where no more than LIST tokens are in it and the buckets above, they are listed,
// and the rest of the work is done on the list, by ranking its tokens against each other. For a small k the histogram
// is of the maxima of the threads alone: k of them are at least that large, so the k largest tokens are. Where there
// For a nucleus, the hundred or so largest found this way are tried first. Where there
// are more, those in the bucket are ranked; if even these are too many, the bucket is divided by the bits of its
// values, at last down to equal values.
//
// Most vectors of a row hold nothing above a threshold; one comparison passes them over.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
#include "rows.cuh"

constexpr int BUCKETS = 2 * THREADS;  // two to a thread in the scan
constexpr int LIST = THREADS;         // tokens that are ranked against each other, one to a thread
constexpr int NUCLEUS = 128;          // about how many of the largest are listed in search of a nucleus
constexpr int LAST_ID = 0x7fffffff;
constexpr int NARROW_K = 1024;     // as draw.py: up to here (x - max) / temperature, beyond x / temperature - max / t.
constexpr float SUPPORT = 32.0f;   // exp(-32) < 2^-45: farther tokens have no weight

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
  const uint32_t* mask;            // a bit for each token that is allowed; null: all are
};
static_assert(sizeof(Row) == 112, "layout");

struct Shared {
  uint32_t low[BUCKETS], high[BUCKETS];  // 64-bit sums in two words
  uint32_t beyond_low, beyond_high;      // what counts in the total only
  uint64_t weight[LIST], all_weight[SPLIT > 1 ? LIST : 1], kept[LIST];
  float x[LIST], all_x[SPLIT > 1 ? LIST : 1];
  int id[LIST], all_id[SPLIT > 1 ? LIST : 1];
  uint64_t mass[WARPS], scan[WARPS], found_before, beyond;
  float top[WARPS];
  int top_id[WARPS];
  int listed, found, tie, ahead;
  float border;
  int border_id;
};

// Logits to weights. (x - before) / temperature - after, where one of before and after is the maximum: as draw.py.
struct Scale {
  float top, before, after, temperature, inverse;

  // Nats from the maximum, at most 0; NaN for -inf. The quotient is correctly rounded (Markstein 1990).
  DEVICE float nats(float x) const {
    float a = __fsub_rn(x, before), q = __fmul_rn(a, inverse);
    return __fsub_rn(__fmaf_rn(__fmaf_rn(-q, temperature, a), inverse, q), after);
  }
  // Coefficients: Moshier's Cephes, expf. Every operation is spelled out: all builds must give the same bits.
  DEVICE float exp(float x) const {
    float far = fmaxf(nats(x), -40.0f);  // also of NaN
    float t = __fmaf_rn(far, 1.44269504f, 12582912.0f), n = __fsub_rn(t, 12582912.0f);
    float f = __fmaf_rn(n, 2.12194440e-4f, __fmaf_rn(n, -0.693359375f, far));
    float p = __fmaf_rn(1.9875691500e-4f, f, 1.3981999507e-3f);
    p = __fmaf_rn(p, f, 8.3334519073e-3f);
    p = __fmaf_rn(p, f, 4.1665795894e-2f);
    p = __fmaf_rn(p, f, 1.6666665459e-1f);
    p = __fmaf_rn(p, f, 5.0000001201e-1f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(f, f), f), 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23));
  }
  DEVICE uint64_t weight(float x) const;
  // A logit below all that are nearer to the maximum than so many nats: for passing over what cannot matter.
  DEVICE float floor_at(float nats) const {
    return top - fmaf(nats * temperature, 1.00001f, fmaf(fabsf(top), 1e-5f, 1e-30f));
  }
};

DEVICE uint64_t Scale::weight(float x) const {
  Fixed one;
  one.add(exp(x));
  return one.sum();
}

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

// Sum of exp(x, id), numbers in [0, 1], over this warp's vectors that reach `floor`.
template <typename V, typename Exp> DEVICE uint64_t warp_mass(const V& view, float floor, Exp exp) {
  uint64_t mine = 0;
  view.each_vector(floor, [&](const uint4& raw, int id) {
    Fixed sum;
#pragma unroll
    for (int e = 0; e < V::WIDTH; e++) sum.add(exp(element<typename V::Element>(raw, e), id + e));
    mine += sum.sum();
  });
  return warp_sum(mine);
}

// Two sums over the team.
DEVICE void team_totals(Shared& s, uint64_t& a, uint64_t& b) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  a = warp_sum(a), b = warp_sum(b);
  if (lane == 0) s.mass[warp] = a, s.scan[warp] = b;
  team_sync();
  a = b = 0;
  for (int i = lane; i < SPLIT * WARPS; i += 32) a += peer(s.mass[i % WARPS], i / WARPS), b += peer(s.scan[i % WARPS], i / WARPS);
  a = warp_sum(a), b = warp_sum(b);
}

// The token in whose stretch of the cumulative weights, in the order of ids, the number pick(total) lies. Its lane
// gets its id, every other thread of the team gets -1. `total` is what all weights add up to.
template <typename V, typename Exp, typename Pick>
DEVICE int locate(Shared& s, const V& view, float floor, Exp exp, Pick pick, uint64_t& total) {
  int lane = threadIdx.x & 31;
  uint64_t mine = warp_mass(view, floor, exp), start = start_of(s, mine, total), goal = pick(total);
  if (total == 0 || goal < start || goal - start >= mine) return -1;
  goal -= start;
#pragma unroll 1
  for (int tile = view.begin; tile < view.end; tile++) {
    auto raw = view.read(tile);
    uint64_t own = 0, each[V::WIDTH];
#pragma unroll
    for (int e = 0; e < V::WIDTH; e++) {
      Fixed one;
      one.add(exp(element<typename V::Element>(raw, e), view.first(tile) + e));
      own += each[e] = one.sum();
    }
    if (!__any_sync(0xffffffffu, own != 0)) continue;
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

// Of the tokens for which test(x, id) holds, the one that pick(how many they are) have a lower id of. Its lane gets its
// id, every other thread of the team gets -1.
template <typename V, typename Test, typename Pick> DEVICE int nth(Shared& s, const V& view, Test test, Pick pick) {
  int lane = threadIdx.x & 31, found = -1;
  uint64_t mine = 0, all;
  view.each_one([&](float x, int id) { mine += test(x, id); });
  mine = warp_sum(mine);
  uint64_t start = start_of(s, mine, all), last = pick(all);
  if (last < start || last - start >= mine) return -1;
#pragma unroll 1
  for (int first = view.from(); first < view.to(); first += 32) {
    int id = first + lane;
    uint32_t here = __ballot_sync(0xffffffffu, id < view.to() && test(view.at(id), id));
    if (here >> lane & 1 && start + __popc(here & ((1u << lane) - 1)) == last) found = id;
    start += __popc(here);
  }
  return found;
}

// ---- thresholds

DEVICE void add(uint32_t& low, uint32_t& high, uint64_t weight) {
  uint32_t part = (uint32_t)weight, old = atomicAdd(&low, part);
  uint32_t rest = (uint32_t)(weight >> 32) + (old + part < old ? 1u : 0u);
  if (rest) atomicAdd(&high, rest);
}

template <bool COUNT> DEVICE void clear(Shared& s) {
  int tid = threadIdx.x;
  reinterpret_cast<uint64_t*>(s.low)[tid] = 0;
  if (!COUNT) reinterpret_cast<uint64_t*>(s.high)[tid] = 0;
  if (tid == 0) s.listed = 0, s.found = s.tie = -1, s.beyond_low = s.beyond_high = 0;
  __syncthreads();
}

// The bucket in which aim(total) is reached, -1 if in none, and what the buckets before it hold. To every thread.
template <bool COUNT, typename Aim>
DEVICE int scan(Shared& s, Aim aim, uint64_t& goal, uint64_t& before, uint64_t& total) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  team_sync();
  uint64_t a = 0, b = 0;
#pragma unroll
  for (int rank = 0; rank < SPLIT; rank++) {
    uint64_t low = peer(reinterpret_cast<const uint64_t*>(s.low)[tid], rank);
    a += (uint32_t)low, b += low >> 32;
    if (!COUNT) {
      uint64_t high = peer(reinterpret_cast<const uint64_t*>(s.high)[tid], rank);
      a += high << 32, b += high >> 32 << 32;
    }
  }
  if (!COUNT && tid == 0) {
    uint64_t beyond = 0;
    for (int rank = 0; rank < SPLIT; rank++) beyond += ((uint64_t)peer(s.beyond_high, rank) << 32) + peer(s.beyond_low, rank);
    s.beyond = beyond;
  }
  uint64_t up_to = warp_scan(a + b, lane), ahead = up_to - a - b;
  if (lane == 31) s.scan[warp] = up_to;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    if (i == warp) ahead += total;
    total += s.scan[i];
  }
  if (!COUNT) total += s.beyond;
  goal = aim(total);
  if (ahead < goal && goal <= ahead + a + b) {
    bool second = goal > ahead + a;
    s.found = 2 * tid + second;
    s.found_before = second ? ahead + a : ahead;
  }
  __syncthreads();
  before = s.found_before;
  return s.found;
}

// How many tokens the team has listed.
DEVICE int listed(Shared& s) {
  team_sync();
  int count = 0;
#pragma unroll
  for (int rank = 0; rank < SPLIT; rank++) count += peer(s.listed, rank);
  return count;
}

// List a token, unless there are too many; its weight.
DEVICE uint64_t put(Shared& s, const Scale& scale, float x, int id) {
  if (*(volatile int*)&s.listed > LIST) return 0;
  int at = atomicAdd(&s.listed, 1);
  uint64_t weight = scale.weight(x);
  if (at < LIST) s.x[at] = x, s.id[at] = id, s.weight[at] = weight;
  return weight;
}

// List the tokens of at least `floor` for which wanted(x, id) holds, until there are too many; how many they are.
template <typename V, typename Wanted>
DEVICE int list(Shared& s, const V& view, const Scale& scale, float floor, Wanted wanted) {
  view.each(floor, [&](float x, int id) {
    if (x >= floor && wanted(x, id)) put(s, scale, x, id);
  });
  return listed(s);
}

// The team's list in one piece, to the threads of every block that calls this, or of the first block only.
struct Listed {
  const float* x;
  const int* id;
  const uint64_t* weight;
};
DEVICE Listed gather(Shared& s) {
#if SPLIT > 1
  int from = 0, tid = threadIdx.x;
  for (int rank = 0; rank < SPLIT; rank++) {
    int n = peer(s.listed, rank);
    if (tid < n) {
      s.all_x[from + tid] = peer(s.x[tid], rank);
      s.all_id[from + tid] = peer(s.id[tid], rank);
      s.all_weight[from + tid] = peer(s.weight[tid], rank);
    }
    from += n;
  }
  __syncthreads();
  return {s.all_x, s.all_id, s.all_weight};
#else
  return {s.x, s.id, s.weight};
#endif
}

// Several neighbouring lanes share a token of the list: 32 for a short one, 1 for a full one.
struct Shares {
  int parts, part, at;
  DEVICE Shares(int count) : parts(1) {
    while (parts < 32 && 2 * parts * count <= THREADS) parts *= 2;
    part = threadIdx.x & (parts - 1), at = threadIdx.x / parts;
  }
  template <typename N> DEVICE N sum(N x) const {
    for (int offset = parts / 2; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
};

// For this thread's token of the list: how many are larger, how many equals have lower ids, and what all these weigh.
DEVICE void rank_in(const Listed& list, int count, const Shares& own, int& larger, int& equal, uint64_t& weight) {
  larger = equal = 0, weight = 0;
  if (own.at < count) {
    float x = list.x[own.at];
    int id = list.id[own.at];
#pragma unroll 4
    for (int i = own.part; i < count; i += own.parts) {
      float other = list.x[i];
      bool more = other > x, same = other == x && list.id[i] < id;
      larger += more, equal += same;
      if (more || same) weight += list.weight[i];
    }
  }
  larger = own.sum(larger), equal = own.sum(equal), weight = own.sum(weight);
}

DEVICE uint64_t block_total(Shared& s, uint64_t x) {
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) s.scan[threadIdx.x >> 5] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) x += s.scan[i];
  __syncthreads();
  return x;
}

struct Border {
  float x;
  int id;
  DEVICE bool holds(float value, int at) const { return value > x || (value == x && at <= id); }
};

// The smallest set of tokens, largest first and lower ids first among equals, whose weights reach a goal.
//
// Returns the length of the list, if the set and what is in its last bucket fit; each block then holds its part of it.
// Else returns -1, and `border` is the set's last token.
//   COUNT: every token weighs 1 here (in the list it has its weight); else as `scale` says
//   bucket(x, id): rising with falling x, below BUCKETS; BUCKETS: counts in the total only; -1: not at all
//   floor_of(bucket): a logit below all in this bucket and those before it
//   aim(total): the goal, at least 1; if all buckets do not reach it, every token belongs to the set
//   peaks: whether to begin with the threads' maxima, of which `own` is one; not COUNT: then nothing may be left out
//     of bucket() but what has no weight
//   ids: else all that equal the last token belong to the set, and the border's id is LAST_ID
template <bool COUNT, typename V, typename Bucket, typename Floor, typename Aim>
DEVICE int select(Shared& s, const V& view, const Scale& scale, Bucket bucket, Floor floor_of, Aim aim, bool peaks,
                  float own, bool ids, Border& border, uint64_t& total) {
  int lane = threadIdx.x & 31;
  float floor = floor_of(BUCKETS - 1);
  uint64_t goal, before;
  border = {-INFINITY_F, LAST_ID};

  if (COUNT && peaks) {
    clear<true>(s);
    int at = own > -INFINITY_F ? bucket(own, 0) : -1;
    if (at >= 0 && at < BUCKETS) atomicAdd(&s.low[at], 1u);
    int last = scan<true>(s, aim, goal, before, total);
    if (last >= 0) {
      floor = fmaxf(floor, floor_of(last));
      int count = list(s, view, scale, floor, [&](float x, int id) {
        int at = bucket(x, id);
        return at >= 0 && at <= last;
      });
      if (count <= LIST) return count;
    }
    team_sync();  // before anything is cleared
  }

  if (!COUNT && peaks) {
    clear<true>(s);
    int at = own > -INFINITY_F ? bucket(own, 0) : -1;
    if (at >= 0 && at < BUCKETS) atomicAdd(&s.low[at], 1u);
    int last = scan<true>(s, [](uint64_t) { return (uint64_t)NUCLEUS; }, goal, before, total);
    if (last < 0) last = BUCKETS - 1;
    float least = fmaxf(floor, floor_of(last));
    uint64_t mass = 0, in_list = 0;
    view.each_vector(floor, [&](const uint4& raw, int id) {
      Fixed sum;
#pragma unroll
      for (int e = 0; e < V::WIDTH; e++) sum.add(scale.exp(element<typename V::Element>(raw, e)));
      mass += sum.sum();
      if (peak<typename V::Element>(raw) >= least) {
        int end = min(id + V::WIDTH, view.size);
#pragma unroll 1
        for (id = max(id, 0); id < end; id++) {
          float x = view.at(id);
          int at = bucket(x, id);
          if (at >= 0 && at <= last) in_list += put(s, scale, x, id);
        }
      }
    });
    team_totals(s, mass, in_list);
    int count = listed(s);
    goal = aim(mass);
    total = mass;
    if (count <= LIST && in_list >= goal) return count;
    team_sync();  // before anything is cleared
  }

  clear<COUNT>(s);
  uint64_t beyond = 0;
  if (COUNT) {
    view.each(floor, [&](float x, int id) {
      int at = bucket(x, id);
      if (at >= 0) atomicAdd(&s.low[at], 1u);
    });
  } else {
    view.each_vector(floor, [&](const uint4& raw, int id) {
#pragma unroll
      for (int e = 0; e < V::WIDTH; e++) {
        float x = element<typename V::Element>(raw, e);
        int at = bucket(x, id + e);
        if (at < 0) continue;
        uint64_t weight = scale.weight(x);
        if (at < BUCKETS) add(s.low[at], s.high[at], weight);
        else beyond += weight;
      }
    });
    beyond = warp_sum(beyond);
    if (lane == 0 && beyond) add(s.beyond_low, s.beyond_high, beyond);
  }
  int coarse = scan<COUNT>(s, aim, goal, before, total);
  if (coarse < 0) {
    team_sync();
    return -1;
  }
  floor = fmaxf(floor, floor_of(coarse));
  if (!COUNT || goal <= LIST) {
    int count = list(s, view, scale, floor, [&](float x, int id) {
      int at = bucket(x, id);
      return at >= 0 && at <= coarse;
    });
    if (count <= LIST) return count;
    team_sync();
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
  }

  int shift = 32;  // how many low bits of the bucket's keys are still open
  uint32_t prefix = 0;
  auto member = [&](float x, int id) {
    return bucket(x, id) == coarse && (shift == 32 || falling_key(x) >> shift == prefix);
  };
  for (;;) {
    goal -= before;
    int count = list(s, view, scale, floor, member);
    if (count <= LIST) {
      Listed all = gather(s);
      Shares mine(count);
      int larger, equal;
      uint64_t ahead;
      rank_in(all, count, mine, larger, equal, ahead);
      if (COUNT) ahead = larger + equal;
      if (mine.at < count && ahead < goal && goal <= ahead + (COUNT ? 1 : all.weight[mine.at]))
        s.border = all.x[mine.at], s.border_id = all.id[mine.at];
      team_sync();
      border = {s.border, ids ? s.border_id : LAST_ID};
      return -1;
    }
    team_sync();
    if (shift == 0) break;
    clear<false>(s);
    int next = shift > 10 ? shift - 10 : 0;
    view.each_one([&](float x, int id) {
      if (member(x, id))
        add(s.low[falling_key(x) >> next & ((1u << (shift - next)) - 1)],
            s.high[falling_key(x) >> next & ((1u << (shift - next)) - 1)], COUNT ? 1 : scale.weight(x));
    });
    uint64_t left = goal, all;
    int found = scan<false>(s, [&](uint64_t) { return left; }, goal, before, all);
    prefix = (shift == 32 ? 0 : prefix << (shift - next)) | found;
    shift = next;
  }
  // too many to list, all equal
  border.x = from_key(prefix);
  if (ids) {
    uint64_t last = COUNT ? goal - 1 : (goal - 1) / scale.weight(border.x);  // the last that belongs, counted from 0
    int id = nth(s, view, member, [&](uint64_t) { return last; });
    if (id >= 0) s.tie = id;
    team_sync();
    border.id = -1;
#pragma unroll
    for (int rank = 0; rank < SPLIT; rank++) border.id = max(border.id, peer(s.tie, rank));
    team_sync();
  }
  return -1;
}

// The largest value and the lowest id that has it; only the first warp of the team's first block gets them.
template <typename V> DEVICE int argmax(Shared& s, const V& view, float& top) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float own = thread_max(view);
  top = warp_max_nan(own);
  int id = LAST_ID;
  if (own == top) view.each(top, [&](float x, int i) { id = x == top ? min(id, i) : id; });
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

// The draw from a list that holds all that can be drawn. For the team's first block. `total`: all weights of the row,
// where there is no top_k.
DEVICE void draw_listed(Shared& s, const Row& row, int count, bool by_k, bool by_p, uint64_t total, int* out) {
  Listed list = gather(s);
  Shares own(count);
  int larger, equal;
  uint64_t ahead;
  rank_in(list, count, own, larger, equal, ahead);
  bool kept = own.at < count && (!by_k || larger < row.top_k);
  uint64_t weight = own.at < count ? list.weight[own.at] : 0;
  if (by_p) {
    if (by_k) total = block_total(s, kept && own.part == 0 ? weight : 0);
    kept = kept && ahead < share_up(row.top_p, total);
  }
  if (!kept || weight < row.least) weight = 0;
  if (own.part == 0 && own.at < count) s.kept[own.at] = weight;
  uint64_t goal = share(random53(row), block_total(s, own.part == 0 ? weight : 0)), before = 0;
  if (weight) {
    int id = list.id[own.at];
#pragma unroll 4
    for (int i = own.part; i < count; i += own.parts)
      if (list.id[i] < id) before += s.kept[i];
  }
  before = own.sum(before);
  if (own.part == 0 && before <= goal && goal < before + weight) accept(row, list.id[own.at], out);
}

template <typename V> DEVICE void sample(Shared& s, const V& view, const Row& row, const scalar_t* raw, int* out, int* reason) {
  int vocab = view.size;
  bool first = team_rank() == 0 && threadIdx.x < 32;
  float top, own;
  if (row.temperature == 0.0f) {
    int id = argmax(s, view, top);
    if (first) {
      if (!(top > -INFINITY_F)) fail(raw, vocab, out, reason);
      else if (threadIdx.x == 0) accept(row, id, out);
    }
    return;
  }
  top = row_max(s, view, own);
  if (top == INFINITY_F) {  // stands for certainty: the choice is among those alone
    int id = nth(s, view, [](float x, int) { return x == INFINITY_F; },
                 [&](uint64_t all) { return share(random53(row), share_up(row.top_p, all)); });
    if (id >= 0) accept(row, id, out);
    return;
  }
  bool by_k = row.top_k > 0 && row.top_k < vocab, by_p = row.top_p < 1ull << 53;
  Scale scale = {top, 0.0f, 0.0f, row.temperature, __frcp_rn(row.temperature)};
  if (by_k && row.top_k <= NARROW_K) scale.before = top;
  else scale.after = scale.nats(top);
  if (!(scale.nats(top) == 0.0f)) {  // -inf, NaN, or too large for the temperature
    if (first) fail(raw, vocab, out, reason);
    return;
  }
  Border border = {-INFINITY_F, LAST_ID};
  int count = -1;
  uint64_t total = 0;
  if (by_k) {
    float per_nat = BUCKETS / SUPPORT;
    count = select<true>(
        s, view, scale,
        [&](float x, int) {
          float far = -scale.nats(x);
          return far < SUPPORT ? min((int)(far * per_nat), BUCKETS - 1) : -1;
        },
        [&](int bucket) { return scale.floor_at((bucket + 1) * (SUPPORT / BUCKETS)); },
        [&](uint64_t) { return (uint64_t)row.top_k; }, row.top_k <= LIST / 2, own, false, border, total);
  }
  if (by_p && count < 0) {
    float kth = border.x, range = row.range, per_nat = BUCKETS / range;
    count = select<false>(
        s, view, scale,
        [&](float x, int) {
          float far = -scale.nats(x);
          if (!(x >= kth && far < SUPPORT)) return -1;
          return far < range ? min((int)(far * per_nat), BUCKETS - 1) : BUCKETS;
        },
        [&](int bucket) {
          return fmaxf(scale.floor_at(bucket == BUCKETS - 1 ? SUPPORT : (bucket + 1) * (range / BUCKETS)), kth);
        },
        [&](uint64_t all) { return share_up(row.top_p, all); }, !by_k, own, true, border, total);
    border.x = fmaxf(border.x, kth);
    by_k = false;
  }
  if (count >= 0) {
    if (team_rank() == 0) draw_listed(s, row, count, by_k, by_p, total, out);
    return;
  }
  uint64_t least = row.least;
  float smallest = (float)least * 0x1p-44f, floor = fmaxf(border.x, scale.floor_at(SUPPORT));
  if (least) floor = fmaxf(floor, scale.floor_at(0.001f - __logf(smallest)));
  int id = locate(
      s, view, floor,
      [&](float x, int at) {
        if (!border.holds(x, at)) return 0.0f;
        float weight = scale.exp(x);
        return !least || scale.weight(x) >= least ? weight : 0.0f;
      },
      [&](uint64_t all) { return share(random53(row), all); }, total);
  if (id >= 0) accept(row, id, out);
  if (total == 0 && first) fail(raw, vocab, out, reason);
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
    edit(row, raw, vocab, edits, row.mask, [](float x) { return x; });
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
  int best = min(min(row.logprobs, width), min(vocab, LIST)), chosen = ids[at];
  if (!row.used || row.logprobs < 0 || chosen < 0) return;
  const scalar_t* raw = logits + at * stride;
  values += (int64_t)at * (1 + width);
  tokens += (int64_t)at * (1 + width);
  View<scalar_t> view(raw, vocab);
  bool first = team_rank() == 0;

  float own, top = row_max(s, view, own);
  if (!(top < INFINITY_F)) {  // no distribution
    if (first && tid <= best) values[tid] = NAN_F, tokens[tid] = tid ? tid - 1 : 1;
    if (SPLIT > 1) team_sync();
    return;
  }
  Scale scale = {top, top, 0.0f, 1.0f, 1.0f};
  uint64_t total, weighed = warp_mass(view, scale.floor_at(SUPPORT), [&](float x, int) { return scale.exp(x); });
  start_of(s, weighed, total);
  float log_sum = (float)log((double)total * 0x1p-44);
  auto logprob = [&](float x) { return __fsub_rn(__fsub_rn(x, top), log_sum); };

  Border border = {INFINITY_F, -1};
  int count = 0;
  if (best > 0) {
    count = select<true>(
        s, view, scale,
        [&](float x, int id) {  // all beyond the support are in the last bucket
          if ((unsigned)id >= (unsigned)vocab) return -1;
          float far = __fmul_rn(__fsub_rn(top, x), BUCKETS / SUPPORT);
          return far < BUCKETS ? (int)far : BUCKETS - 1;
        },
        [&](int bucket) { return bucket == BUCKETS - 1 ? -INFINITY_F : scale.floor_at((bucket + 1) * (SUPPORT / BUCKETS)); },
        [&](uint64_t) { return (uint64_t)best; }, best <= LIST / 2, own, true, border, total);
  }
  if (count < 0) {  // the set itself, which is no larger than the list
    team_sync();
    if (tid == 0) s.listed = 0;
    __syncthreads();
    view.each_one([&](float x, int id) {
      if (border.holds(x, id)) {
        int place = atomicAdd(&s.listed, 1);
        if (place < LIST) s.x[place] = x, s.id[place] = id, s.weight[place] = 0;
      }
    });
    count = listed(s);
  }
  if (tid == 0) s.ahead = 0;
  __syncthreads();
  float chosens = logprob(to_float(raw[chosen]));
  int ahead = 0;
  view.each(to_float(raw[chosen]), [&](float x, int) { ahead += logprob(x) > chosens; });
  if (ahead) atomicAdd(&s.ahead, ahead);
  team_sync();
  if (first) {
    int rank = 1;
    for (int r = 0; r < SPLIT; r++) rank += peer(s.ahead, r);
    if (tid == 0) values[0] = chosens, tokens[0] = rank;
    if (best > 0) {
      Listed list = gather(s);
      Shares mine(count);
      int larger, equal;
      uint64_t weight;
      rank_in(list, count, mine, larger, equal, weight);
      if (mine.at < count && mine.part == 0 && larger + equal < best)
        values[1 + larger + equal] = logprob(list.x[mine.at]), tokens[1 + larger + equal] = list.id[mine.at];
    }
  }
  if (SPLIT > 1) team_sync();
}
