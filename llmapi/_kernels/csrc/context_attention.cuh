// What the context attention kernels share: the queue of work and the arithmetic of scores.
#pragma once
#include "common.cuh"

// One query tile of one sequence, written by context_plan. A sequence's entries follow each other; each carries all
// that its sequence's items need, so that an item is found with one read.
struct alignas(16) Entry {
  int sequence;
  int first;    // index of the sequence's first entry
  int entries;  // of the sequence: tiles * splits
  int section;  // query heads whose keys and values fit into the cache together
  int query_begin;
  int query_count;
  int length;  // tokens, this step's included
  int splits;  // parts that the keys of a tile are cut into
};

// The queue: entries * heads items. `next` and `done` are zero between launches.
struct alignas(16) Queue {
  int entries;
  int next;
  int done;
  int unused;
  DEVICE const Entry* entry() const { return reinterpret_cast<const Entry*>(this + 1); }
};

// A tile of query rows of one head, and a part of the keys that it sees.
struct Item {
  int sequence;
  int head;
  int row;       // first row in q
  int rows;      // rows of the tile that exist
  int position;  // of the first row in its sequence
  int split;     // which part
  int splits;
  int step;  // the item of the next part has an index lower by this
};

// Items of a sequence go section by section; within a section the tiles with most keys come first, then the parts of a
// tile, heads innermost.
DEVICE Item find_item(const Queue* queue, int index, int heads, int tile_rows) {
  const Entry* at = queue->entry() + index / heads;
  int4 place = reinterpret_cast<const int4*>(at)[0], span = reinterpret_cast<const int4*>(at)[1];
  int entries = place.z, section = place.w, splits = span.w, rest = index - place.y * heads;
  int first_head = rest / (entries * section) * section;
  rest -= first_head * entries;
  int together = min(section, heads - first_head);
  int tile = entries - 1 - rest / together;
  Item item;
  item.split = 0;
  if (splits > 1) {
    item.split = tile % splits;
    tile /= splits;
  }
  item.splits = splits;
  item.step = together;
  item.sequence = place.x;
  item.head = first_head + rest % together;
  item.row = span.x + tile * tile_rows;
  item.rows = min(tile_rows, span.y - tile * tile_rows);
  item.position = span.z - span.y + tile * tile_rows;
  return item;
}

// The last block that finds the queue empty readies it for the next launch.
DEVICE void leave_queue(Queue* queue) {
  __threadfence();
  if (atomicAdd(&queue->done, 1) == (int)gridDim.x - 1) {
    queue->next = 0;
    queue->done = 0;
  }
}

constexpr float LOG2E = 1.4426950408889634f;
#define NEGATIVE_INFINITY (-__int_as_float(0x7f800000))

DEVICE float fast_exp2(float x) { return ptx::ex2(x); }

// softcap * tanh(x / softcap), exact to float32's rounding for what a softmax needs.
DEVICE float soft_capped(float x, float softcap) {
  float e = fast_exp2(x * (2.0f * LOG2E / softcap));
  return softcap * (1.0f - __fdividef(2.0f, 1.0f + e));
}

// Scores of two rows (row and row + 8), N groups of 8 keys, as matrix instructions leave them: s[4 * j] and
// s[4 * j + 1] are keys 8 * j + 2 * (lane & 3) and the next one of `row`, s[4 * j + 2] and s[4 * j + 3] those of
// `row + 8`.

// Products to scores in units of log2: scaled, capped, with ALiBi. `distance` is the first key's position minus row's.
template <int N> DEVICE void adjust_scores(float* s, float scale, float softcap, float slope, int distance) {
  int first = distance + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    float x = s[i] * scale;
    if (softcap > 0.0f) x = soft_capped(x, softcap);
    int key = first + (i >> 2) * 8 + (i & 1) - (i & 2) * 4;
    s[i] = (x + slope * (float)key) * LOG2E;
  }
}

// Hides keys after the row and keys that the window has left behind.
template <int N> DEVICE void mask_scores(float* s, int distance, int window) {
  int first = distance + 2 * (threadIdx.x & 3);
  int last_seen = -first, last_left = window ? -first - window : -0x40000000;
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    int key = (i >> 2) * 8 + (i & 1) - (i & 2) * 4;
    if (key > last_seen || key <= last_left) s[i] = NEGATIVE_INFINITY;
  }
}

// One step of the running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): scores become
// exp2(unit * (s - top)), `top` and `sum` (of this thread's keys only) move on, and `old` is the factor of what was
// summed before.
template <int N> DEVICE void softmax_step(float* s, float unit, float (&top)[2], float (&sum)[2], float (&old)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = top[r];
#pragma unroll
    for (int j = 0; j < N; ++j) highest = fmaxf(highest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
    float shift = highest == NEGATIVE_INFINITY ? 0.0f : highest * unit;  // no key seen yet
    old[r] = fast_exp2(top[r] * unit - shift);
    top[r] = highest;
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float a = fast_exp2(s[4 * j + 2 * r] * unit - shift), b = fast_exp2(s[4 * j + 2 * r + 1] * unit - shift);
      s[4 * j + 2 * r] = a;
      s[4 * j + 2 * r + 1] = b;
      total += a + b;
    }
    sum[r] = sum[r] * old[r] + total;
  }
}

// 1 / the softmax's sum over all keys of a row and its sink (in units of log2; minus infinity for none).
DEVICE float inverse_sum(float top, float unit, float sum, float sink) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return 1.0f / (sum + fast_exp2(sink - top * unit));
}
