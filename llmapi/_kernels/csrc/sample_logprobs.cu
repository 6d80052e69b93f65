// Log probabilities of the tokens that were chosen, and of the most probable ones. sample.cuh says how these are found.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
#include "sample.cuh"

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
