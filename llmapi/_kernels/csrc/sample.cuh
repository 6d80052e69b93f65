// What the kernels of sampling share: a row's settings, the weights of its tokens, and the search for thresholds.
//
// A token's weight is exp((x - max) / temperature) * 2^44, rounded: a 64-bit integer. Sums of integers do not depend on
// their order, so a row gives the same token however it is split and whatever atomics do. Weights under 2^-45 of the
// largest are zero.
//
// Thresholds (top_k, top_p, the best k for log probabilities) are one search: the smallest set of tokens, largest first
// and lower ids first among equals, whose weights reach a goal. A histogram over the distance to the maximum gives the
// bucket in which the goal is reached. Where no more than LIST tokens are in it and the buckets above, they are listed,
// and the rest of the work is done on the list, by ranking its tokens against each other. For a small k the histogram
// is of the maxima of the threads alone: k of them are at least that large, so the k largest tokens are. For a nucleus,
// the hundred or so largest found this way are tried first. Where there are more, those in the bucket are ranked; if
// even these are too many, the bucket is divided by the bits of its values, at last down to equal values.
//
// Most vectors of a row hold nothing above a threshold; one comparison passes them over.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
#pragma once
#include "rows.cuh"

constexpr int BUCKETS = 2 * THREADS;  // two to a thread in the scan
constexpr int LIST = THREADS;         // tokens that are ranked against each other, one to a thread
constexpr int NUCLEUS = 128;          // about how many of the largest are listed in search of a nucleus
constexpr int LAST_ID = 0x7fffffff;
constexpr float SUPPORT = 32.0f;  // exp(-32) < 2^-45: farther tokens have no weight

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
  const uint32_t* mask;        // a bit for each token that is allowed; null: all are
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
