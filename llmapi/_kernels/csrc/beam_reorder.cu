// Beam search between two steps, without the host: who goes on, in which row, and from which blocks; who has ended, and
// whether the search is over.
//
// A search keeps its number of rows. Of the continuations of a row the best stays in the row, each further one moves to
// a row that has none; llmapi/_runtime/beam.py says it exactly, in seats(). So a row whose parent is another one has no
// continuation itself, and its own last block is free for what its parent has begun in the block at that place.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;  // at least the rows of a search
constexpr int TILE = 4096;                          // numbers that a block reads and writes
#define INFINITY_F __int_as_float(0x7f800000)
constexpr int NOBODY = 0x7fffffff;

// A search whose continuations are chosen. `list`: of its candidates; k: how many they are; slot: its first place among
// the results; [ends, ends_stop) in the list of tokens that end it.
struct alignas(16) Choice {
  int list, rows, k, slot, ends, ends_stop, unused[2];
};

// How a search ends, of the length that this step's tokens give it. norm: that length to the power of its length penalty,
// 0 where the host keeps the books itself; settle: likewise, of the length by which the best that goes on is judged. last:
// no more tokens may follow; always: as soon as all places are taken it is over. carried: first place + 1 of what has ended
// before in `before`; 0: it is in `given`.
struct alignas(16) Finish {
  double norm, settle;
  int last, always, carried, unused;
};
static_assert(sizeof(Finish) == 32, "layout");

// A search that has moved. row: its first in the tables; slot: its first place among the results of beam_choose.
struct alignas(16) Move {
  int row, rows, slot, unused;
};

// A search whose counts move. counts [rows, width]; slot: as of a Move.
struct alignas(16) Tally {
  int* counts;
  int rows, slot;
};

DEVICE int columns_of(int rows) { return TILE / max(1, min(rows, THREADS)); }

// How many threads before this one, and in all, have the flag; `counts` [WARPS] is shared. For the whole block.
DEVICE int rank_of(bool flag, int* counts, int& all) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint32_t here = __ballot_sync(0xffffffffu, flag);
  __syncthreads();  // counts may still be read
  if (lane == 0) counts[warp] = __popc(here);
  __syncthreads();
  int before = __popc(here & ((1u << lane) - 1));
  all = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) before += i < warp ? counts[i] : 0, all += counts[i];
  return before;
}

// Whether a token ends the search.
DEVICE bool ends_it(int token, const Choice& own, const int* ends) {
  bool found = false;
  for (int e = own.ends; e < own.ends_stop; e++) found = found || token == ends[e];
  return found;
}

// From the candidates of searches, [.., columns] and best first, the continuations of each: those of its first `rows`
// that do not end it. By slot: parents, the row within the search that a row goes on from; tokens; scores. Where there
// are fewer, and where the first score is NaN, every row stays, with token 0 and score 0: the host, which sees the same
// candidates, drops what follows. Grid: the searches.
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_choose(const float* scores, const int* tokens, const int* beams, int columns, const Choice* choices,
                const int* ends, int* parents, int* chosen, float* carried) {
  __shared__ int ranks[THREADS], heads[THREADS], late[THREADS], counts[WARPS];
  pdl_wait();
  pdl_launch();
  Choice own = choices[blockIdx.x];
  int tid = threadIdx.x, found = 0;
  bool row = tid < own.rows;
  scores += (int64_t)own.list * columns, tokens += (int64_t)own.list * columns, beams += (int64_t)own.list * columns;
  parents += own.slot, chosen += own.slot, carried += own.slot;
  heads[tid] = NOBODY;
  bool failed = scores[0] != scores[0];
  for (int begin = 0; begin < own.k && found < own.rows && !failed; begin += THREADS) {
    int i = begin + tid, all;
    bool on = i < own.k && scores[i] > -INFINITY_F;
    on = on && !ends_it(tokens[i], own, ends);
    int place = found + rank_of(on, counts, all);
    if (on && place < own.rows) ranks[place] = i;
    found += all;
  }
  __syncthreads();
  if (found < own.rows) {
    if (row) parents[tid] = tid, chosen[tid] = 0, carried[tid] = 0.0f;
    return;
  }
  int beam = row ? beams[ranks[tid]] : -1;
  if (row) atomicMin(&heads[beam], tid);
  __syncthreads();
  bool further = row && heads[beam] != tid, free = row && heads[tid] == NOBODY;
  int all, place = rank_of(further, counts, all);
  if (further) late[place] = tid;
  place = rank_of(free, counts, all);
  if (!row) return;
  int rank = ranks[free ? late[place] : heads[tid]];
  parents[tid] = beams[rank], chosen[tid] = tokens[rank], carried[tid] = scores[rank];
}

// The books of searches: of their first `rows` candidates, those that end it, or all where it is the last step, join those
// that have ended before, of which the best `rows` stay: by score / norm, of equals the older, then the better candidate.
// worths, by slot: theirs, best first, then -inf. records [.., stride], a row for each search: 1 if a new one stays, plus 2 if
// the search is over; how many there are; where each comes from: its place before, or ~rank of its candidate.
// before, given: as worths. llmapi/_runtime/beam.py has the same rules in Beams.advance(). Grid: the searches.
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_finish(const float* scores, const int* tokens, int columns, const Choice* choices, const Finish* finishes,
                const int* ends, const double* before, const double* given, double* worths, int* records, int stride) {
  __shared__ double all[2 * THREADS], worst;
  __shared__ int sources[2 * THREADS], counts[WARPS], best, joined;
  pdl_wait();
  pdl_launch();
  Choice own = choices[blockIdx.x];
  Finish how = finishes[blockIdx.x];
  if (how.norm == 0) return;
  int tid = threadIdx.x, fresh, olds;
  scores += (int64_t)own.list * columns, tokens += (int64_t)own.list * columns;
  worths += own.slot, records += (int64_t)blockIdx.x * stride;
  const double* from = how.carried ? before + how.carried - 1 : given + own.slot;
  double old = tid < own.rows ? from[tid] : -INFINITY_F;
  bool new_one = tid < min(own.rows, own.k) && scores[tid] > -INFINITY_F && (how.last || ends_it(tokens[tid], own, ends));
  if (tid == 0) best = NOBODY, joined = 0;
  rank_of(old > -INFINITY_F, counts, olds);
  int place = olds + rank_of(new_one, counts, fresh), total = olds + fresh, kept = min(total, own.rows);
  if (tid < olds) all[tid] = old, sources[tid] = tid;
  if (new_one) all[place] = scores[tid] / how.norm, sources[place] = ~tid;
  for (int i = tid; i < own.k && !how.last; i += THREADS)
    if (scores[i] > -INFINITY_F && !ends_it(tokens[i], own, ends)) atomicMin(&best, i);
  __syncthreads();
  for (int i = tid; i < total; i += THREADS) {
    int rank = 0;
    for (int j = 0; j < total; j++) rank += all[j] > all[i] || (all[j] == all[i] && j < i);
    if (rank >= own.rows) continue;
    worths[rank] = all[i], records[2 + rank] = sources[i];
    if (rank == own.rows - 1) worst = all[i];
    if (sources[i] < 0) joined = 1;
  }
  for (int i = kept + tid; i < own.rows; i += THREADS) worths[i] = -INFINITY_F, records[2 + i] = 0;
  __syncthreads();
  if (tid) return;
  bool over = best == NOBODY || (kept == own.rows && (how.always || scores[best] / how.settle <= worst));
  records[0] = joined + 2 * over, records[1] = kept;
}

// Block tables [.., width] for the next step, in place: a row has the full blocks of its parent. Its last block, for the
// token that the step computes, stays its own. seq_lens, by row: tokens, that one included, of all rows of a search the
// same. A row that is read stays as it is, so nobody waits for anybody. Grid: searches, then CEIL_DIV(width, the fewest
// columns of a search).
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_tables(int* table, int width, const Move* moves, const int* parents, const int* seq_lens, int block_size) {
  pdl_wait();
  pdl_launch();
  Move own = moves[blockIdx.x];
  int columns = columns_of(own.rows), begin = blockIdx.y * columns;
  int end = min(begin + columns, min((seq_lens[own.row] - 1) / block_size, width));
  table += (int64_t)own.row * width, parents += own.slot;
  for (int i = threadIdx.x; i < own.rows * columns; i += THREADS) {
    int row = i / columns, column = begin + i % columns, parent = parents[row];
    if (column < end && parent != row) table[(int64_t)row * width + column] = table[(int64_t)parent * width + column];
  }
}

// What parents have begun in their last blocks, to the last blocks of the rows that go on from them. caches: addresses;
// bytes: of a token, a multiple of 16. The other arguments are those of beam_tables, before or after it. Grid: searches,
// caches, and the rows of a search, or fewer.
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_blocks(const uint64_t* caches, int64_t bytes, const int* table, int width, const Move* moves,
                const int* parents, const int* seq_lens, int block_size) {
  pdl_wait();
  pdl_launch();
  Move own = moves[blockIdx.x];
  int last = seq_lens[own.row] - 1, begun = last % block_size;
  if (begun == 0) return;
  char* base = reinterpret_cast<char*>(caches[blockIdx.y]);
  table += (int64_t)own.row * width + last / block_size, parents += own.slot;
  int64_t vectors = begun * bytes / 16;
  for (int row = blockIdx.z; row < own.rows; row += gridDim.z) {
    int parent = parents[row];
    if (parent == row) continue;
    int64_t source = table[(int64_t)parent * width], target = table[(int64_t)row * width];
    const uint4* from = reinterpret_cast<const uint4*>(base + source * block_size * bytes);
    uint4* to = reinterpret_cast<uint4*>(base + target * block_size * bytes);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vectors; i += THREADS) to[i] = from[i];
  }
}

// Counts of tokens for penalties, in place: a row has those of its parent, and its token counted once more. Grid: searches,
// then CEIL_DIV(width, the fewest columns of a search).
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_counts(int width, const Tally* tallies, const int* parents, const int* tokens) {
  pdl_wait();
  pdl_launch();
  Tally own = tallies[blockIdx.x];
  int columns = columns_of(own.rows), begin = blockIdx.y * columns, end = min(begin + columns, width);
  parents += own.slot, tokens += own.slot;
  for (int i = threadIdx.x; i < own.rows * columns; i += THREADS) {
    int row = i / columns, column = begin + i % columns, parent = parents[row];
    if (column < end && parent != row)
      own.counts[(int64_t)row * width + column] = own.counts[(int64_t)parent * width + column];
  }
  __syncthreads();  // nobody counts before all have been read
  for (int row = threadIdx.x; row < own.rows; row += THREADS) {
    int token = tokens[row];
    if (begin <= token && token < end) own.counts[(int64_t)row * width + token]++;
  }
}
