// Stands for llmapi/_kernels/csrc/skinny_linear.cuh: mbarriers, bulk tensor copies and clusters as the PTX ISA says.
//
// The matrix instruction of a warpgroup is not here: the emulated architectures take the warp's.
#pragma once

#define __grid_constant__

// What tests/emulator/tensor_map.py writes; the fastest side first, elements of 16 bits.
struct alignas(64) TensorMap {
  const char* base;
  uint64_t steps[3];  // bytes
  uint32_t rank, sides[4], box[4];
  uint32_t unused[15];
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap");

// An mbarrier: its phase is over when `pending` threads have arrived and `bytes` have come.
struct Mbarrier {
  int32_t bytes;
  int16_t pending;
  uint16_t phase : 1, count : 15;
  void settle() {
    if (pending < 0) emulated::fail("more arrive at an mbarrier than it is for");
    if (pending || bytes) return;
    phase ^= 1, pending = (int16_t)count;
    emulated::changed();
  }
  void complete(int came) {
    bytes -= came;
    settle();
  }
};
static_assert(sizeof(Mbarrier) == 8, "a word of shared memory");
DEVICE Mbarrier& mbarrier(uint64_t* word) { return *reinterpret_cast<Mbarrier*>(word); }

DEVICE void barrier_init(uint64_t* barrier, int count) { mbarrier(barrier) = {0, (int16_t)count, 0, (uint16_t)count}; }
DEVICE void barrier_init_fence() {}
DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  mbarrier(barrier).bytes += bytes;
  mbarrier(barrier).pending--;
  mbarrier(barrier).settle();
}
DEVICE void barrier_arrive(uint64_t* barrier) {
  mbarrier(barrier).pending--;
  mbarrier(barrier).settle();
}
DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  while (mbarrier(barrier).phase == (parity & 1)) emulated::wait_for_change("an mbarrier");
}
DEVICE void barrier_wait_cluster(uint64_t* barrier, int parity) { barrier_wait(barrier, parity); }

DEVICE uint64_t policy_evict_first() { return 0; }
DEVICE uint64_t policy_evict_last() { return 0; }
DEVICE void fetch_map(const TensorMap*) {}

// A box on its way: zeros for what is outside, 16-byte chunks swizzled by the 128-byte row of shared memory they are in.
struct BoxCopy {
  char* to;
  uint32_t offset;  // of `to`, in shared memory
  TensorMap map;
  int at[4];
  uint64_t* barrier;
  void run() const {
    int lines = 1;
    for (uint32_t d = 1; d < map.rank; d++) lines *= (int)map.box[d];
    for (int line = 0; line < lines; line++) {
      const char* from = map.base;
      bool inside = true;
      for (int d = 1, rest = line; d < (int)map.rank; rest /= (int)map.box[d], d++) {
        int where = at[d] + rest % (int)map.box[d];
        inside = inside && where >= 0 && where < (int)map.sides[d];
        if (inside) from += where * map.steps[d - 1];
      }
      for (int column = 0; column < (int)map.box[0]; column++) {
        uint32_t byte = (uint32_t)(line * (int)map.box[0] + column) * 2, place = offset + byte;
        uint16_t value = 0;
        int where = at[0] + column;
        if (inside && where >= 0 && where < (int)map.sides[0]) memcpy(&value, from + where * 2, 2);
        memcpy(to + (int)((place ^ (place >> 7 & 7) << 4) - offset), &value, 2);
      }
    }
    mbarrier(barrier).complete(lines * (int)map.box[0] * 2);
  }
};
DEVICE void start_box(void* to, const TensorMap* map, uint64_t* barrier, int a, int b, int c, int d) {
  BoxCopy copy = {static_cast<char*>(to), emulated::shared_offset(to), *map, {a, b, c, d}, barrier};
  if (copy.offset % 128) emulated::fail("a bulk copy to an address that is not aligned to 128 bytes");
  if (map->box[0] != 64) emulated::fail("a swizzled box of lines that are not 128 bytes");
  emulated::shared_offset(static_cast<char*>(to) + 128 * map->box[1] * (map->rank > 2 ? map->box[2] * map->box[3] : 1) - 1);
  emulated::start_later(copy);
}
DEVICE void bulk_load(void* to, const TensorMap* map, int x, int y, uint64_t* barrier, uint64_t) {
  if (map->rank != 2) emulated::fail("a bulk copy of two dimensions with a map of %u", map->rank);
  start_box(to, map, barrier, x, y, 0, 0);
}
DEVICE void bulk_load_gated(void* to, const TensorMap* map, int x, int y, uint64_t* barrier, uint64_t) {
  if (map->rank != 4) emulated::fail("a bulk copy of four dimensions with a map of %u", map->rank);
  start_box(to, map, barrier, x, 0, 0, y);
}

// ---- clusters: an address of another block's shared memory has the rank in its highest bits

DEVICE void cluster_arrive() { emulated::cluster_arrive(); }
DEVICE void cluster_wait() { emulated::cluster_wait(); }
DEVICE uint32_t cluster_address(const void* mine, int rank) { return emulated::shared_offset(mine) | (uint32_t)rank << 28; }
template <typename T> DEVICE T* in_cluster(uint32_t address) {
  char* mine = emulated::shared_pointer(address & 0xfffffff, sizeof(T));
  return static_cast<T*>(const_cast<void*>(emulated::of_rank(mine, (int)(address >> 28))));
}
struct Store {
  float4* to;
  float4 value;
  uint64_t* barrier;
  void run() const {
    *to = value;
    mbarrier(barrier).complete(16);
  }
};
DEVICE void cluster_store(uint32_t to, float a, float b, float c, float d, uint32_t barrier) {
  emulated::start_later(Store{in_cluster<float4>(to), {a, b, c, d}, in_cluster<uint64_t>(barrier)});
}
