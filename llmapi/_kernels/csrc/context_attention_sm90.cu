// Context attention on Hopper, after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), over the paged cache.
//
// One block per multiprocessor takes items (64 * GROUPS query rows of one head) from the queue. A producer warp brings
// queries, keys and values by bulk tensor copies into swizzled shared memory, always ahead of the consumers: GROUPS
// warpgroups of 64 rows each. A consumer multiplies the next tile's keys while it multiplies the last one's values; the
// warpgroups take turns, so that the softmax of one runs beside the products of the other.
//
// Shared memory: a tile of rows is cut into pieces of 8 rows x 64 columns, 1024 bytes, swizzled by the copy engine;
// where the head size is no multiple of 64, the last columns are filled with zeros. Queries: the pieces of the same
// columns follow each other. Keys and values: the pieces of the same 8 tokens do, so that one copy brings whole tokens;
// where the copy engine must fill columns, it takes one copy for each 64 of them, and the layout is as for the queries.
//
// Where the plan splits the keys of a tile among items, each leaves its unfinished rows in `partial`; whoever comes
// last (`arrived` counts) merges them.
//
// LLM_HEAD_DIM: multiple of 16. LLM_KEYS: BN. LLM_GROUPS: GROUPS. LLM_STAGES: tiles of keys, and of values, in flight.
// LLM_BOX: tokens of one copy, a divisor of the block size and BN. LLM_QUERIES: 1 or 2 buffers of queries.
// LLM_ADJUST: 1 for soft cap and ALiBi. LLM_MERGE: 1 to follow the plan's splits; with 0 the first part takes all keys.
#include "context_attention.cuh"
#include "wgmma.cuh"

constexpr int D = LLM_HEAD_DIM, BN = LLM_KEYS, GROUPS = LLM_GROUPS, STAGES = LLM_STAGES, BOX = LLM_BOX;
constexpr int QUERIES = LLM_QUERIES, BM = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr bool SPLIT = D % 64 != 0;              // one copy for each 64 columns
constexpr uint32_t CHUNKS = (D + 63) / 64;       // pieces side by side
constexpr uint32_t GROUP_BYTES = CHUNKS * 8192;  // queries of a warpgroup
constexpr uint32_t QUERY_BYTES = GROUPS * GROUP_BYTES;
constexpr uint32_t TILE_BYTES = CHUNKS * BN * 128;
constexpr uint32_t DOWN = SPLIT ? 1024 : CHUNKS * 1024;  // from a piece of keys or values to that of the next 8 tokens
constexpr uint32_t ACROSS = SPLIT ? BN * 128 : 1024;     // and to that of the next 64 columns
constexpr int BOXES = BN / BOX, COPIES = SPLIT ? CHUNKS : 1;
constexpr uint32_t COPY_BYTES = BOX * 128 * CHUNKS / COPIES;
static_assert(BN % BOX == 0 && BOXES * COPIES <= 32 && BOX % 8 == 0, "a warp's lanes bring a tile");

struct Shared {
  uint32_t queries, keys, values;  // addresses
  uint32_t barriers;

  DEVICE uint32_t query_full(int slot) const { return barriers + 8 * slot; }
  DEVICE uint32_t query_empty(int slot) const { return barriers + 8 * (QUERIES + slot); }
  DEVICE uint32_t key_full(int stage) const { return barriers + 8 * (2 * QUERIES + stage); }
  DEVICE uint32_t key_empty(int stage) const { return barriers + 8 * (2 * QUERIES + STAGES + stage); }
  DEVICE uint32_t value_full(int stage) const { return barriers + 8 * (2 * QUERIES + 2 * STAGES + stage); }
  DEVICE uint32_t value_empty(int stage) const { return barriers + 8 * (2 * QUERIES + 3 * STAGES + stage); }
};

// A ring's place: which stage, and the parity of its phase.
template <int SIZE> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  DEVICE void step() {
    if (++stage == SIZE) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What the producer tells the consumers of an item, beside its queries.
struct alignas(16) Notice {
  Item item;  // its head is negative: no more items
  int index;
};

// Tiles of keys of an item, the last one first.
struct Range {
  int lowest, highest;
  int end;    // keys that the last row sees
  int parts;  // items that share them; this one is empty where its number is not below
  DEVICE Range(const Item& item, int window) {
    end = item.position + item.rows;
    highest = (end + BN - 1) / BN - 1;
    lowest = window ? max(0, item.position - window + 1) / BN : 0;
    parts = 1;
    if (LLM_MERGE && item.splits > 1) {
      int tiles = highest - lowest + 1;
      parts = min(item.splits, tiles);
      highest = lowest + (item.split + 1) * tiles / parts - 1;
      lowest += item.split * tiles / parts;
    }
  }
};

DEVICE void produce(const Shared& shared, Notice* notices, const TensorMap* q_map, const TensorMap* k_map,
                    const TensorMap* v_map, const int* block_tables, int table_stride, Queue* queue, int heads,
                    int group, int block_shift, int window) {
  int lane = threadIdx.x & 31;
  int total = queue->entries * heads, index = blockIdx.x;
  Ring<QUERIES> slot;
  Ring<STAGES> keys, values;
  while (true) {
    barrier_wait(shared.query_empty(slot.stage), slot.parity ^ 1);
    if (index >= total) break;
    Item item = find_item(queue, index, heads, BM);
    Range range(item, window);
    int next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(&queue->next, 1);
    if (item.split >= range.parts) {
      index = __shfl_sync(0xffffffffu, next, 0);
      continue;
    }
    if (lane == 0) {
      notices[slot.stage].item = item;
      notices[slot.stage].index = index;
      barrier_expect(shared.query_full(slot.stage), QUERY_BYTES);
    }
    __syncwarp();
    if (lane < GROUPS * COPIES) {
      int turn = lane % GROUPS, chunk = lane / GROUPS;
      tensor_copy(shared.queries + slot.stage * QUERY_BYTES + turn * GROUP_BYTES + chunk * 8192, q_map,
                  shared.query_full(slot.stage), chunk * 64, item.row + turn * 64,
                  SPLIT ? item.head : item.head * CHUNKS);
    }
    slot.step();

    const int* table = block_tables + (int64_t)item.sequence * table_stride;
    int kv_head = item.head / group, box = lane % BOXES, chunk = lane / BOXES;
    // The eight-token group where this lane's box of a tile starts in the cache.
    auto place = [&](int tile) {
      int position = tile * BN + box * BOX;
      if (chunk >= COPIES || position >= range.end) return 0;
      return ((table[position >> block_shift] << block_shift) + (position & ((1 << block_shift) - 1))) >> 3;
    };
    auto bring = [&](const TensorMap* map, uint32_t to, uint32_t full, int tile, int from) {
      int boxes = min(BOXES, (range.end - tile * BN + BOX - 1) / BOX);
      if (lane == 0) barrier_expect(full, boxes * COPIES * COPY_BYTES);
      __syncwarp();
      if (box < boxes && chunk < COPIES)
        tensor_copy(to + chunk * ACROSS + box * COPY_BYTES, map, full, chunk * 64, 0,
                    SPLIT ? kv_head : kv_head * CHUNKS, from);
    };
    auto bring_keys = [&](int tile, int from) {
      barrier_wait(shared.key_empty(keys.stage), keys.parity ^ 1);
      bring(k_map, shared.keys + keys.stage * TILE_BYTES, shared.key_full(keys.stage), tile, from);
      keys.step();
    };
    auto bring_values = [&](int tile, int from) {
      barrier_wait(shared.value_empty(values.stage), values.parity ^ 1);
      bring(v_map, shared.values + values.stage * TILE_BYTES, shared.value_full(values.stage), tile, from);
      values.step();
    };
    int tile = range.highest, from = place(tile);
    bring_keys(tile, from);
    for (; tile > range.lowest; --tile) {
      int before = place(tile - 1);
      bring_keys(tile - 1, before);
      bring_values(tile, from);
      from = before;
    }
    bring_values(tile, from);
    index = __shfl_sync(0xffffffffu, next, 0);
  }
  if (lane == 0) {
    notices[slot.stage].item.head = -1;
    barrier_arrive(shared.query_full(slot.stage));
    leave_queue(queue);
  }
}

// The state of 64 rows of one item in a warpgroup.
struct Consumer {
  const Shared& shared;
  Ring<STAGES> keys, values;
  int turn;             // this warpgroup's number
  int window;
  float scale, softcap, slope, unit;
  int position;         // of this thread's upper row
  uint64_t query;       // descriptor
  float s[BN / 2];
  float o[D / 2];
  uint32_t p[BN / 4];
  float top[2], sum[2], old[2];

  DEVICE void release(uint32_t barrier) {
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
  }
  DEVICE void multiply_keys() {
    uint64_t key = matrix_descriptor(shared.keys + keys.stage * TILE_BYTES, 16, DOWN);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      Wgmma<BN>::ss(s, query + (i / 4 * 8192 + i % 4 * 32) / 16, key + (i / 4 * ACROSS + i % 4 * 32) / 16, i != 0);
    wgmma_commit();
  }
  DEVICE void multiply_values() {
    uint64_t value = matrix_descriptor(shared.values + values.stage * TILE_BYTES, ACROSS, DOWN);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BN / 16; ++i) Wgmma<D>::rs(o, p + 4 * i, value + i * (2 * DOWN / 16), true);
    wgmma_commit();
  }
  template <bool MASK> DEVICE void soften(int tile) {
    int distance = tile * BN - position;
#if LLM_ADJUST
    adjust_scores<BN / 8>(s, scale, softcap, slope, distance);
#endif
    if (MASK) mask_scores<BN / 8>(s, distance, window);
    softmax_step<BN / 8>(s, unit, top, sum, old);
  }
  DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) p[i] = pack2(scalar_t(), s[2 * i], s[2 * i + 1]);
  }
  // Values of tokens that do not exist, or that no row of the item sees, may be anything, and 0 * NaN is NaN.
  DEVICE void clear_values(int first) {
    barrier_wait(shared.value_full(values.stage), values.parity);
    uint32_t base = shared.values + values.stage * TILE_BYTES;
    for (int i = first * (D / 8) + (threadIdx.x & 127); i < BN * (D / 8); i += 128) {
      int row = i / (D / 8), piece = i % (D / 8);
      uint32_t at = base + (row >> 3) * DOWN + (piece >> 3) * ACROSS + (row & 7) * 128 + ((piece ^ row) & 7) * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_async();
    named_sync(1 + GROUPS + turn, 128);
  }
  // Leaves the unfinished rows of an item of several parts in `partial`; true in the last of them, with all merged.
  DEVICE bool merge(float* partial, int* arrived, const Item& item, int index, int parts) {
    constexpr int FLOATS = D / 2 + 4;
    int thread = threadIdx.x & 127, first = index + item.split * item.step;  // the index of part 0
    auto slot = [&](int part) {
      return partial + (int64_t)((first - part * item.step) * GROUPS + turn) * (FLOATS * 128) + thread;
    };
    float* mine = slot(item.split);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) __stcg(mine + i * 128, o[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      __stcg(mine + (D / 2 + r) * 128, top[r]);
      __stcg(mine + (D / 2 + 2 + r) * 128, sum[r]);
    }
    __threadfence();
    named_sync(1 + GROUPS + turn, 128);
    int* count = arrived + first * GROUPS + turn;
    bool last = thread == 0 && atomicAdd(count, 1) == parts - 1;
    if (last) *count = 0;
    if (!named_any(1 + GROUPS + turn, 128, last)) return false;
    __threadfence();
    for (int part = 0; part < parts; ++part) {
      if (part == item.split) continue;
      const float* other = slot(part);
      float theirs[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = __ldcg(other + (D / 2 + r) * 128), highest = fmaxf(top[r], high);
        float shift = highest == NEGATIVE_INFINITY ? 0.0f : highest * unit;
        old[r] = fast_exp2(top[r] * unit - shift);
        theirs[r] = fast_exp2(high * unit - shift);
        top[r] = highest;
        sum[r] = sum[r] * old[r] + __ldcg(other + (D / 2 + 2 + r) * 128) * theirs[r];
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i)
        o[i] = o[i] * old[(i >> 1) & 1] + __ldcg(other + i * 128) * theirs[(i >> 1) & 1];
    }
    return true;
  }
  template <bool MASK> DEVICE void step(int tile) {
    barrier_wait(shared.key_full(keys.stage), keys.parity);
    named_sync(1 + turn, 256);
    multiply_keys();
    barrier_wait(shared.value_full(values.stage), values.parity);
    multiply_values();
    named_arrive(1 + (turn + 1) % GROUPS, 256);
    wgmma_wait<1>();
    hold(s);
    release(shared.key_empty(keys.stage));
    keys.step();
    soften<MASK>(tile);
    wgmma_wait<0>();
    hold(o);
    release(shared.value_empty(values.stage));
    values.step();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= old[(i >> 1) & 1];
    pack();
  }
};

DEVICE void consume(const Shared& shared, const Notice* notices, scalar_t* out, float* partial, int* arrived, int heads,
                    float scale, int window, float softcap, const float* alibi_slopes, const float* sinks) {
  int turn = threadIdx.x / 128 - 1, thread = threadIdx.x & 127, warp = thread >> 5, lane = threadIdx.x & 31;
  Consumer c{shared};
  c.turn = turn;
  c.window = window;
  c.scale = scale;
  c.softcap = softcap;
  c.unit = LLM_ADJUST ? 1.0f : scale * LOG2E;
  Ring<QUERIES> slot;
  if (turn == GROUPS - 1) named_arrive(1, 256);  // the first turn is warpgroup 0's
  while (true) {
    barrier_wait(shared.query_full(slot.stage), slot.parity);
    Item item = notices[slot.stage].item;
    int index = notices[slot.stage].index, head = item.head;
    if (head < 0) break;
    uint32_t queries = shared.queries + slot.stage * QUERY_BYTES + turn * GROUP_BYTES;
    c.query = matrix_descriptor(queries, 16, 1024);
    c.position = item.position + turn * 64 + warp * 16 + (lane >> 2);
    c.slope = LLM_ADJUST && alibi_slopes ? alibi_slopes[head] : 0.0f;
    float sink = sinks ? sinks[head] * LOG2E : NEGATIVE_INFINITY;
    Range range(item, window);
    int first = item.position + turn * 64;  // the warpgroup's first row

    c.top[0] = c.top[1] = NEGATIVE_INFINITY;
    c.sum[0] = c.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) c.o[i] = 0.0f;
    barrier_wait(shared.key_full(c.keys.stage), c.keys.parity);
    c.multiply_keys();
    wgmma_wait<0>();
    hold(c.s);
    c.release(shared.key_empty(c.keys.stage));
    c.keys.step();
    int tile = range.highest;
    c.soften<true>(tile);
    c.pack();
    if (range.end < (tile + 1) * BN) c.clear_values(range.end - tile * BN);
    --tile;
    for (; tile >= range.lowest && (tile + 1) * BN - 1 > first; --tile) c.step<true>(tile);
    int inside = window ? max(range.lowest, (first + 63 - window) / BN + 1) : range.lowest;
    for (; tile >= inside; --tile) c.step<false>(tile);
    for (; tile >= range.lowest; --tile) c.step<true>(tile);

    barrier_wait(shared.value_full(c.values.stage), c.values.parity);
    c.multiply_values();
    float by[2] = {inverse_sum(c.top[0], c.unit, c.sum[0], sink), inverse_sum(c.top[1], c.unit, c.sum[1], sink)};
    wgmma_wait<0>();
    hold(c.o);
    c.release(shared.value_empty(c.values.stage));
    c.values.step();

    if (LLM_MERGE && range.parts > 1) {
      if (!c.merge(partial, arrived, item, index, range.parts)) {
        __syncwarp();
        c.release(shared.query_empty(slot.stage));
        slot.step();
        continue;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) by[r] = inverse_sum(c.top[r], c.unit, c.sum[r], sink);
    }

    // Through the warpgroup's queries, so that whole rows are written.
    named_sync(1 + GROUPS + turn, 128);
    int at = warp * 16 + (lane & 15);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t to = queries + i / 4 * 8192 + at * 128 + (((i % 4 * 2 + (lane >> 4)) ^ at) & 7) * 16;
      stmatrix_x4(to, pack2(scalar_t(), c.o[8 * i] * by[0], c.o[8 * i + 1] * by[0]),
                  pack2(scalar_t(), c.o[8 * i + 2] * by[1], c.o[8 * i + 3] * by[1]),
                  pack2(scalar_t(), c.o[8 * i + 4] * by[0], c.o[8 * i + 5] * by[0]),
                  pack2(scalar_t(), c.o[8 * i + 6] * by[1], c.o[8 * i + 7] * by[1]));
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += 32) {
      int line = warp * 16 + i / (D / 8), piece = i % (D / 8);
      uint4 value;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                   : "r"(queries + piece / 8 * 8192 + line * 128 + ((piece ^ line) & 7) * 16)
                   : "memory");
      int at_row = turn * 64 + line;
      if (at_row < item.rows)
        *reinterpret_cast<uint4*>(out + ((int64_t)(item.row + at_row) * heads + head) * D + piece * 8) = value;
    }
    fence_async();
    __syncwarp();
    c.release(shared.query_empty(slot.stage));
    slot.step();
  }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    context_attention_sm90(scalar_t* out, const __grid_constant__ TensorMap q_map,
                           const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                           const int* block_tables, int table_stride, Queue* queue, float* partial, int* arrived,
                           int heads, int kv_heads, int block_shift, float scale, int window, float softcap,
                           const float* alibi_slopes, const float* sinks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 dynamic[];
  __shared__ Notice notices[QUERIES];
  __shared__ uint64_t barriers[2 * QUERIES + 4 * STAGES];
  Shared shared;
  shared.queries = (shared_address(dynamic) + 1023) & ~1023u;
  shared.keys = shared.queries + QUERIES * QUERY_BYTES;
  shared.values = shared.keys + STAGES * TILE_BYTES;
  shared.barriers = shared_address(barriers);
  if (threadIdx.x == 0) {
    tensor_prefetch(&q_map);
    tensor_prefetch(&k_map);
    tensor_prefetch(&v_map);
    for (int i = 0; i < QUERIES; ++i) {
      barrier_init(shared.query_full(i), 1);
      barrier_init(shared.query_empty(i), 4 * GROUPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.key_full(i), 1);
      barrier_init(shared.key_empty(i), 4 * GROUPS);
      barrier_init(shared.value_full(i), 1);
      barrier_init(shared.value_empty(i), 4 * GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  pdl_wait();
  if (threadIdx.x < 128) {
    fewer_registers<GROUPS == 2 ? 40 : 32>();
    if (threadIdx.x < 32) {
      produce(shared, notices, &q_map, &k_map, &v_map, block_tables, table_stride, queue, heads, heads / kv_heads,
              block_shift, window);
      pdl_launch();
    }
  } else {
    more_registers<GROUPS == 2 ? 232 : 160>();
    consume(shared, notices, out, partial, arrived, heads, scale, window, softcap, alibi_slopes, sinks);
  }
#else
  __trap();
#endif
}
