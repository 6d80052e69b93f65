// Beam search between two steps: each row goes on from its parent, a row of the step before.
//
// A request's rows have their parents among themselves when they are reordered in place. Blocks work on a request's rows
// in some columns: they read all before they write.
#include "common.cuh"

constexpr int THREADS = 256;  // at least the rows of a request
constexpr int TILE = 4096;    // numbers that a block reads and writes
constexpr int ROWS = 4096;    // of a step, at most
constexpr int NOBODY = 0x7fffffff;

struct alignas(16) Request {  // as in beam.cu
  int first, rows, k, unused;
};

DEVICE int columns_of(const Request& request) { return TILE / max(1, min(request.rows, THREADS)); }

// Block tables [N, width] for the next step, the list of blocks that must be copied before it, and its token ids.
//
// Row r goes on from row parents[r] of `source`, which has `sources` rows; a row with parent -1 is left alone. lengths
// [sources] are tokens, of which the first lengths / block_size blocks are full and shared. Where the next block is begun
// already, the parent's first child goes on in it, and each further one gets a copy in its own spares[r]: the pairs
// (from, to) are listed by rising rows. Where it is not, every row gets its spare, if it is not -1, without a copy.
// totals: pairs in the list, and rows that lack a spare, whose block becomes -1. ids[r] is tokens[r], 0 for -1.
// `target` may be `source` where the parents of a request's rows are among them. Of a row, what it has in use is written.
// Grid: requests, then CEIL_DIV(width, the fewest columns of a request).
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_tables(const int* source, int* target, int width, int sources, const Request* requests, const int* parents,
                const int* lengths, const int* spares, const int* tokens, int rows, int block_size, int* pairs,
                int* totals, int* ids) {
  __shared__ int tile[TILE], heads[ROWS], ahead[THREADS / 32], forks[THREADS / 32], lacking[THREADS / 32];
  pdl_wait();
  pdl_launch();
  Request request = requests[blockIdx.x];
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  int columns = columns_of(request), begin = blockIdx.y * columns, end = min(begin + columns, width);
  bool counts = blockIdx.x == 0 && blockIdx.y == 0;
  if ((request.rows <= 0 || begin >= end) && !counts) return;

  auto used = [&](int parent) { return parent < 0 ? 0 : min(lengths[parent] / block_size + 1, width); };
  for (int i = tid; i < request.rows * columns; i += THREADS) {
    int parent = parents[request.first + i / columns], column = begin + i % columns;
    if (column < used(parent)) tile[i] = source[(int64_t)parent * width + column];
  }
  for (int i = tid; i < sources; i += THREADS) heads[i] = NOBODY;
  __syncthreads();
  for (int i = tid; i < rows; i += THREADS)
    if (parents[i] >= 0) atomicMin(&heads[parents[i]], i);
  __syncthreads();
  auto further = [&](int row) {
    int parent = parents[row];
    if (parent < 0 || heads[parent] == row) return false;
    return lengths[parent] % block_size && lengths[parent] / block_size < width;
  };

  // pairs of the rows before this request's, of this request's, of all; rows that lack a spare
  int before = 0, all = 0, lack = 0;
  for (int i = tid; i < (counts ? rows : request.first); i += THREADS) {
    bool copies = further(i), has = copies && spares[i] >= 0;
    before += has && i < request.first, all += has, lack += copies && !has;
  }
  for (int offset = 16; offset; offset >>= 1) {
    before += __shfl_xor_sync(0xffffffffu, before, offset);
    all += __shfl_xor_sync(0xffffffffu, all, offset);
    lack += __shfl_xor_sync(0xffffffffu, lack, offset);
  }
  bool mine = tid < request.rows;
  int row = request.first + tid, parent = mine ? parents[row] : -1, spare = mine ? spares[row] : -1;
  bool copies = mine && further(row), has = copies && spare >= 0;
  uint32_t here = __ballot_sync(0xffffffffu, has);
  int place = __popc(here & ((1u << lane) - 1));
  if (lane == 0) ahead[warp] = before, forks[warp] = __popc(here), lacking[warp] = lack;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) place += ahead[i] + (i < warp ? forks[i] : 0);
  if (counts) {
    __syncthreads();
    if (lane == 0) forks[warp] = all;
    __syncthreads();
    if (tid == 0) {
      for (int i = 1; i < THREADS / 32; i++) all += forks[i], lack += lacking[i];
      totals[0] = all, totals[1] = lack;
    }
  }
  if (parent >= 0) {
    int column = lengths[parent] / block_size;
    if (column >= begin && column < end) {
      int& block = tile[tid * columns + column - begin];
      if (has) pairs[2 * place] = block, pairs[2 * place + 1] = spare;
      if (copies || (lengths[parent] % block_size == 0 && spare >= 0)) block = spare < 0 ? -1 : spare;
    }
  }
  if (mine && blockIdx.y == 0) ids[row] = max(0, tokens[row]);
  __syncthreads();  // all tables are read
  for (int i = tid; i < request.rows * columns; i += THREADS) {
    int row = request.first + i / columns, column = begin + i % columns;
    if (column < used(parents[row])) target[(int64_t)row * width + column] = tile[i];
  }
}

// Counts of tokens for penalties, [width] at an address for each row: those of row r become its parent's, from the
// addresses of the step before, with tokens[r] counted once more. `target` may be `source` as in beam_tables. Rows with
// address 0 (or parent -1) are left alone. Grid: requests, then CEIL_DIV(width, the fewest columns of a request).
extern "C" __global__ void __launch_bounds__(THREADS)
    beam_counts(const uint64_t* source, const uint64_t* target, int width, const Request* requests, const int* parents,
                const int* tokens) {
  __shared__ int tile[TILE];
  pdl_wait();
  pdl_launch();
  Request request = requests[blockIdx.x];
  int tid = threadIdx.x, columns = columns_of(request), begin = blockIdx.y * columns, end = min(begin + columns, width);
  if (request.rows <= 0 || begin >= end) return;
  for (int i = tid; i < request.rows * columns; i += THREADS) {
    int row = request.first + i / columns, parent = parents[row], column = begin + i % columns;
    if (column >= end || parent < 0 || !target[row]) continue;
    tile[i] = reinterpret_cast<const int*>(source[parent])[column] + (column == tokens[row]);
  }
  __syncthreads();  // all counts are read
  for (int i = tid; i < request.rows * columns; i += THREADS) {
    int row = request.first + i / columns, column = begin + i % columns;
    if (column < end && parents[row] >= 0 && target[row]) reinterpret_cast<int*>(target[row])[column] = tile[i];
  }
}
