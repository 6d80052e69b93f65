// Sampling: from rows of logits to token ids. sample.cuh says how.
//
// Most batches have no edited row, and NVRTC takes about a third of the time for a build that serves no such row.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper). EDITED: 1: rows may be edited; 0: none is,
// and row.edited is not looked at.
#include "sample.cuh"

constexpr int NARROW_K = 1024;  // as draw.py: up to here (x - max) / temperature, beyond x / temperature - max / t.

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
#if EDITED
  if (row.edited) {
    edit(row, raw, vocab, edits, [](float x) { return x; }, row.mask);
    sample(s, View<float>(row.edited, vocab), row, raw, ids + at, reason);
  } else
#endif
    sample(s, View<scalar_t>(raw, vocab), row, raw, ids + at, reason);
  if (SPLIT > 1) team_sync();  // others may still read this block's shared memory
}
