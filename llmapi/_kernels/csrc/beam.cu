// Beam search: from rows of logits to the best continuations of each request.
//
// A request has up to 256 rows (its beams) with a score each. A candidate is a row and a token; its score is the row's
// score plus the token's log probability, in float32. Candidates are ordered by falling score, then by rising row, then
// by rising token, and the first k are wanted. Log probabilities are edited after log_softmax, as transformers does.
//
// beam_rows: one row is the work of a team of SPLIT blocks. A pass finds the maximum, a second one the sum of
// exp(x - max), in multiples of 2^-44 so that it depends neither on the order nor on the split. Then each block chooses
// the k best of its own part. At least k of the threads' maxima lie above some line (for a large k: of the maxima of
// 16 bytes), so the k best do; what lies above is listed and sorted. Where too many lie above, as with many equal
// values, the k-th best is found by the bits of the scores, at last among equals by their ids.
//
// beam_merge: the sorted lists of a request's rows into one. The first few of each list are sorted together; then those
// that are still better than the k-th best so far, until there are none.
//
// Scores never fall as logits rise, so one comparison passes over 16 bytes of logits that hold nothing good.
//
// LLM_DTYPE: type of the logits. SPLIT: blocks in a team (1 below Hopper).
#include "rows.cuh"

constexpr int BUCKETS = 4 * THREADS;  // four to a thread in the scan
constexpr int MOST = 1024;            // candidates of a request, at most
constexpr int LIST = 2 * MOST;        // of a block that are sorted
constexpr int MERGE = 4 * MOST;       // of a request that are sorted together
constexpr int LISTS = 256 * 8;        // of a request: rows by blocks
constexpr int RANKED = 256;           // lists up to here are sorted by ranking
constexpr int TOKEN_BITS = 24;
constexpr float SUPPORT = 32.0f;      // exp(-32) < 2^-45: farther tokens add nothing to the sum
constexpr float LOG2E = 1.44269504f;

// One row's settings; llmapi/_kernels/beam_cuda.py has the same layout, and says what each is. Those of the edits are as
// in rows.cuh.
struct alignas(16) Row {
  int* counts;
  float* edited;
  float repetition, presence, frequency;
  int penalized;
  int edits, bans, edits_end;
  int k;
  int beam;
  int used;
  int given;
  int carried;
};
static_assert(sizeof(Row) == 64, "layout");

struct alignas(16) Request {
  int first, rows, k, unused;
};

// What a block found in its part of a row.
struct alignas(16) Found {
  int count, reason;   // candidates; why the row has none, 0 if it has
  float top, log_sum;  // the row's log_softmax is (x - top) - log_sum
};

struct Shared {
  uint64_t list[LIST];
  uint32_t count[BUCKETS];
  uint64_t mass[WARPS];
  float top[WARPS], high[WARPS], low[WARPS];
  uint32_t scan[WARPS], before, inside;
  int listed, found;
  float log_sum;
};

// ---- lists of candidates: the score's falling key, the row in the request, the token

DEVICE uint64_t entry(float score, uint32_t beam, int token) {
  return (uint64_t)falling_key(score) << 32 | beam << TOKEN_BITS | (uint32_t)token;
}

// Sorts n entries, all different; `list` has room for the next power of two. For the whole block.
DEVICE void sort(uint64_t* list, int n) {
  int tid = threadIdx.x, threads = blockDim.x;
  if (n <= min(threads, RANKED)) {  // several neighbouring lanes to an entry
    int parts = 1;
    while (parts < 32 && 2 * parts * n <= threads) parts *= 2;
    int at = tid / parts, part = tid & (parts - 1), rank = 0;
    uint64_t own = at < n ? list[at] : 0;
    if (at < n) {
#pragma unroll 4
      for (int i = part; i < n; i += parts) rank += list[i] < own;
    }
    for (int offset = parts / 2; offset; offset >>= 1) rank += __shfl_xor_sync(0xffffffffu, rank, offset);
    __syncthreads();
    if (at < n && part == 0) list[rank] = own;
    __syncthreads();
    return;
  }
  int size = 2;
  while (size < n) size *= 2;
  for (int i = n + tid; i < size; i += threads) list[i] = ~0ull;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {  // bitonic
    for (int stride = width / 2; stride; stride /= 2) {
      for (int i = tid; i < size / 2; i += threads) {
        int a = 2 * i - (i & (stride - 1)), b = a + stride;
        uint64_t x = list[a], y = list[b];
        if ((x > y) == !(a & width)) list[a] = y, list[b] = x;
      }
      // up to a stride of 32, a warp stays within 64 entries
      if (stride > 32 || (stride == 1 && width > 32)) __syncthreads();
      else __syncwarp();
    }
  }
  __syncthreads();
}

// ---- the best of a block's part of a row

DEVICE void clear(Shared& s) {
  reinterpret_cast<uint4*>(s.count)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) s.listed = 0, s.found = -1;
  __syncthreads();
}

// The bucket in which the count reaches `goal`, -1 if in none; s.before and s.inside: what lies before and in it.
DEVICE int find(Shared& s, uint32_t goal) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  __syncthreads();
  uint4 four = reinterpret_cast<const uint4*>(s.count)[tid];
  uint32_t own = four.x + four.y + four.z + four.w, up_to = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    uint32_t left = __shfl_up_sync(0xffffffffu, up_to, offset);
    if (lane >= offset) up_to += left;
  }
  if (lane == 31) s.scan[warp] = up_to;
  __syncthreads();
  uint32_t ahead = up_to - own;
#pragma unroll
  for (int i = 0; i < WARPS; i++) ahead += i < warp ? s.scan[i] : 0;
  if (ahead < goal && goal <= ahead + own) {
    const uint32_t each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (ahead < goal && goal <= ahead + each[i]) s.found = 4 * tid + i, s.before = ahead, s.inside = each[i];
      ahead += each[i];
    }
  }
  __syncthreads();
  return s.found;
}

DEVICE void put(Shared& s, uint64_t candidate) {
  if (*(volatile int*)&s.listed > LIST) return;
  int at = atomicAdd(&s.listed, 1);
  if (at < LIST) s.list[at] = candidate;
}

// List what wanted(score) holds for, which is true for every score above one for which it is; how many there are, above
// LIST if they are too many. `s.listed` is 0 before.
template <typename V, typename Score, typename Wanted>
DEVICE int list(Shared& s, const V& view, Score score, uint32_t beam, Wanted wanted) {
  view.each_vector(-INFINITY_F, [&](const uint4& raw, int id) {
    if (!wanted(score(peak<typename V::Element>(raw)))) return;
    int last = min(id + V::WIDTH, view.size);
#pragma unroll 1
    for (id = max(id, 0); id < last; id++) {
      float x = score(view.at(id));
      if (wanted(x)) put(s, entry(x, beam, id));
    }
  });
  __syncthreads();
  return s.listed;
}

// List at least the `want` best of the block's part, among which there are more than LIST; how many are listed.
//   score(x): of a logit, never falling
//   own: the largest of the thread's logits; high, low: the best and the worst score of these, those of -inf left out
//   vectors: how many 16 bytes of logits the block has
template <typename V, typename Score>
DEVICE int choose(Shared& s, const V& view, Score score, uint32_t beam, float own, float high, float low, int vectors,
                  int want) {
  typedef typename V::Element T;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  clear(s);
  bool few = want <= THREADS / 2;
  if ((few || vectors >= 2 * want) && high > -INFINITY_F) {
    float scale = fminf(BUCKETS / (high - low), 1e30f);
    auto far = [&](float score) { return __fmul_rn(__fsub_rn(high, score), scale); };
    auto tally = [&](float x) {
      float at = far(score(x));
      if (at < INFINITY_F) atomicAdd(&s.count[at < BUCKETS - 1 ? (int)at : BUCKETS - 1], 1u);
    };
    if (few) tally(own);
    else view.each_vector(-INFINITY_F, [&](const uint4& raw, int) { tally(peak<T>(raw)); });
    int last = find(s, want);
    float limit = last < 0 || last == BUCKETS - 1 ? INFINITY_F : (float)(last + 1);
    int n = list(s, view, score, beam, [&](float score) { return far(score) < limit; });
    if (want <= n && n <= LIST) return n;
    __syncthreads();  // before anything is cleared
    clear(s);
  }

  uint32_t prefix = 0, left = want;  // of what has these upper bits in its key, so many are wanted; all that is before it
  for (int shift = 32;;) {
    int next = shift > 11 ? shift - 11 : 0, pending = -1;
    uint32_t mask = (1u << (shift - next)) - 1, run = 0;
    view.each_vector(-INFINITY_F, [&](const uint4& raw, int id) {
#pragma unroll
      for (int e = 0; e < V::WIDTH; e++) {
        uint32_t key = falling_key(score(element<T>(raw, e)));
        if ((unsigned)(id + e) >= (unsigned)view.size || (shift < 32 && key >> shift != prefix)) continue;
        int at = key >> next & mask;
        if (at == pending) {
          run++;
        } else {
          if (run) atomicAdd(&s.count[pending], run);
          pending = at, run = 1;
        }
      }
    });
    if (run) atomicAdd(&s.count[pending], run);
    int found = find(s, left);
    prefix = (shift < 32 ? prefix << (shift - next) : 0) | (uint32_t)found;
    left -= s.before;
    shift = next;
    if (want - left + s.inside <= (uint32_t)LIST) {
      return list(s, view, score, beam, [&](float score) { return falling_key(score) >> shift <= prefix; });
    }
    if (shift == 0) break;
    __syncthreads();
    clear(s);
  }

  // too many that equal the last one: those with the lowest ids
  float last = from_key(prefix);
  list(s, view, score, beam, [&](float score) { return score > last; });
  uint32_t equal = 0;
  view.each_vector(-INFINITY_F, [&](const uint4& raw, int id) {
#pragma unroll
    for (int e = 0; e < V::WIDTH; e++)
      equal += (unsigned)(id + e) < (unsigned)view.size && score(element<T>(raw, e)) == last;
  });
  equal = (uint32_t)warp_sum((uint64_t)equal);
  if (lane == 0) s.scan[warp] = equal;
  __syncthreads();
  uint32_t start = 0;
  for (int i = 0; i < warp; i++) start += s.scan[i];
#pragma unroll 1
  for (int first = view.from(); first < view.to() && start < left; first += 32) {
    int id = first + lane;
    uint32_t here = __ballot_sync(0xffffffffu, id < view.to() && score(view.at(id)) == last);
    if (here >> lane & 1 && start + __popc(here & ((1u << lane) - 1)) < left) put(s, entry(last, beam, id));
    start += __popc(here);
  }
  __syncthreads();
  return s.listed;
}

// The best k of the block's part, in order, to `out`; how many they are. -1 if a score is NaN.
template <typename V, typename Score>
DEVICE int best_of(Shared& s, const V& view, Score score, uint32_t beam, int k, float own, uint64_t* out) {
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  float high = score(own), low = high > -INFINITY_F ? high : INFINITY_F;
  high = warp_max_nan(high);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) low = fminf(low, __shfl_xor_sync(0xffffffffu, low, offset));
  if (lane == 0) s.high[warp] = high, s.low[warp] = low;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) high = max_nan(high, s.high[i]), low = fminf(low, s.low[i]);
  if (high != high) return -1;

  int tiles = CEIL_DIV(CEIL_DIV(view.lead + view.size, V::WIDTH), 32), each = CEIL_DIV(tiles, SPLIT * WARPS);
  int begin = min(team_rank() * WARPS * each, tiles) * 32 * V::WIDTH - view.lead;
  int end = min((team_rank() + 1) * WARPS * each, tiles) * 32 * V::WIDTH - view.lead;
  begin = max(begin, 0), end = min(end, view.size);
  int part = max(end - begin, 0), want = min(k, part), n = part;
  if (part <= LIST) {
    for (int i = tid; i < part; i += THREADS) s.list[i] = entry(score(view.at(begin + i)), beam, begin + i);
    __syncthreads();
  } else {
    n = choose(s, view, score, beam, own, high, low, part / V::WIDTH, want);
  }
  sort(s.list, n);
  for (int i = tid; i < want; i += THREADS) out[i] = s.list[i];
  return want;
}

// Why a row has no candidates: how many logits are NaN; or -1 if all are -inf; -2 if one is +inf; -3 if the row's score
// is NaN or +inf. For one warp.
DEVICE int reason_of(const scalar_t* raw, int vocab, float top) {
  int nans = 0;
  for (int id = threadIdx.x & 31; id < vocab; id += 32) nans += to_float(raw[id]) != to_float(raw[id]);
  nans = (int)warp_sum((uint64_t)nans);
  return nans ? nans : top == -INFINITY_F ? -1 : top == INFINITY_F ? -2 : -3;
}

// logits [N, V] with a stride between rows; rows [N]; scores [N]; carried: scores that stay on the device, of which a row
// with `carried` has number carried - 1 instead of its own; edits: one list for all rows.
// best [N * SPLIT, width] and found [N * SPLIT] are written, those of unused rows are not. Grid: N * SPLIT.
extern "C" __global__ void TEAM __launch_bounds__(THREADS, 2)
    beam_rows(const scalar_t* logits, int64_t stride, int vocab, const Row* rows, const float* scores, const float* carried,
              const Edit* edits, uint64_t* best, int width, Found* found) {
  __shared__ Shared s;
  pdl_wait();
  pdl_launch();
  int at = blockIdx.x / SPLIT, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const Row& row = rows[at];
  if (!row.used) return;
  const scalar_t* raw = logits + at * stride;
  best += (int64_t)blockIdx.x * width;
  found += blockIdx.x;
  View<scalar_t> view(raw, vocab);
  float own, top = row_max(s, view, own), score = row.carried ? carried[row.carried - 1] : scores[at];
  if (!(top > -INFINITY_F && top < INFINITY_F && score < INFINITY_F)) {
    if (warp == 0) {
      int reason = team_rank() == 0 ? reason_of(raw, vocab, top) : 0;
      if (lane == 0) *found = {0, reason, top, 0.0f};
    }
    if (SPLIT > 1) team_sync();  // others may still read this block's shared memory
    return;
  }

  uint64_t mass = 0;
  float floor = top - fmaf(SUPPORT, 1.00001f, fmaf(fabsf(top), 1e-5f, 1e-30f));
  view.each_vector(floor, [&](const uint4& vector, int) {
    Fixed sum;
#pragma unroll
    for (int e = 0; e < View<scalar_t>::WIDTH; e++)
      sum.add(ptx::ex2(__fmul_rn(__fsub_rn(element<scalar_t>(vector, e), top), LOG2E)));
    mass += sum.sum();
  });
  mass = warp_sum(mass);
  if (lane == 0) s.mass[warp] = mass;
  team_sync();
  if (warp == 0) {
    mass = 0;
    for (int i = lane; i < SPLIT * WARPS; i += 32) mass += peer(s.mass[i % WARPS], i / WARPS);
    mass = warp_sum(mass);
    if (lane == 0) s.log_sum = (float)log((double)mass * 0x1p-44);
  }
  __syncthreads();
  float log_sum = s.log_sum;
  auto logprob = [=](float x) { return __fsub_rn(__fsub_rn(x, top), log_sum); };

  int count, k = min(row.k, min(width, MOST));
  uint32_t beam = (uint32_t)row.beam;
  if (row.edited) {
    if (!row.given) edit(row, raw, vocab, edits, logprob);
    View<float> edited(row.edited, vocab);
    count = best_of(s, edited, [=](float x) { return __fadd_rn(x, score); }, beam, k, thread_max(edited), best);
  } else {
    count = best_of(s, view, [=](float x) { return __fadd_rn(logprob(x), score); }, beam, k, own, best);
  }
  if (tid == 0) *found = {max(count, 0), count < 0 ? -3 : 0, top, log_sum};
  if (SPLIT > 1) team_sync();
}

struct Merged {
  uint64_t list[MERGE];
  uint16_t count[LISTS], next[LISTS], live[LISTS];  // of each list: its length, where to go on; those worth going on with
  int total, listed, lives, failed;
};

// The best requests[q].k candidates of each request, to row q of scores, tokens, beams (rows within the request) and
// logprobs (of the raw logits), all [Q, columns]. What a request lacks has token and beam -1 and -inf. reasons [Q]: 0, or
// that of the request's first failed row, as reason_of() and found.reason say; then it has no candidates, and its first
// score is NaN, its first token the reason. Grid: Q.
extern "C" __global__ void __launch_bounds__(1024)
    beam_merge(const scalar_t* logits, int64_t stride, const Request* requests, const uint64_t* best, int width,
               const Found* found, float* scores, int* tokens, int* beams, float* logprobs, int columns, int* reasons) {
  __shared__ Merged s;
  pdl_wait();
  pdl_launch();
  int q = blockIdx.x, tid = threadIdx.x, threads = blockDim.x;
  Request request = requests[q];
  if (request.rows <= 0 || request.k <= 0) return;
  int lists = request.rows * SPLIT, k = min(request.k, min(columns, MOST));
  logits += request.first * stride;
  best += (int64_t)request.first * SPLIT * width;
  found += request.first * SPLIT;
  scores += (int64_t)q * columns, tokens += (int64_t)q * columns;
  beams += (int64_t)q * columns, logprobs += (int64_t)q * columns;

  if (tid == 0) s.total = s.listed = s.lives = 0, s.failed = lists;
  __syncthreads();
  for (int i = tid; i < lists; i += threads) {
    int count = found[i].count;
    if (found[i].reason) atomicMin(&s.failed, i);
    s.count[i] = (uint16_t)count, s.next[i] = 0;
    if (count) {
      atomicAdd(&s.total, count);
      s.live[atomicAdd(&s.lives, 1)] = (uint16_t)i;
    }
  }
  __syncthreads();
  int want = s.failed < lists ? 0 : min(k, s.total), kept = 0;
  if (tid == 0) reasons[q] = s.failed < lists ? found[s.failed].reason : 0;

  uint64_t bound = ~0ull;  // the last of those kept, once they are all that are wanted
  int lives = want ? s.lives : 0, room = min(MERGE, max(4 * want, 128));
  while (lives) {
    int each = max(1, min(width, room / lives));
    __syncthreads();
    for (int i = tid; i < lives * each; i += threads) {
      int own = s.live[i / each], at = s.next[own] + i % each;
      if (at >= s.count[own]) continue;
      uint64_t candidate = best[(int64_t)own * width + at];
      if (candidate < bound) s.list[kept + atomicAdd(&s.listed, 1)] = candidate;
    }
    __syncthreads();
    int n = kept + s.listed;
    for (int i = tid; i < lives; i += threads) {
      int own = s.live[i];
      s.next[own] = (uint16_t)min(s.next[own] + each, (int)s.count[own]);
    }
    sort(s.list, n);
    kept = min(n, want);
    if (n >= want) bound = s.list[want - 1];
    if (tid == 0) s.listed = s.lives = 0;
    __syncthreads();
    for (int i = tid; i < lists; i += threads) {
      int at = s.next[i];
      if (at < s.count[i] && best[(int64_t)i * width + at] < bound) s.live[atomicAdd(&s.lives, 1)] = (uint16_t)i;
    }
    __syncthreads();
    lives = s.lives, room = MERGE - kept;
  }

  for (int i = tid; i < k; i += threads) {
    float score = -INFINITY_F, logprob = -INFINITY_F;
    int token = -1, beam = -1;
    if (i < want) {
      uint64_t candidate = s.list[i];
      score = from_key((uint32_t)(candidate >> 32));
      beam = (int)((uint32_t)candidate >> TOKEN_BITS), token = (int)(candidate & ((1u << TOKEN_BITS) - 1));
      Found own = found[beam * SPLIT];
      logprob = __fsub_rn(__fsub_rn(to_float(logits[beam * stride + token]), own.top), own.log_sum);
    }
    if (i == 0 && s.failed < lists) score = NAN_F, token = found[s.failed].reason;
    scores[i] = score, tokens[i] = token, beams[i] = beam, logprobs[i] = logprob;
  }
}
