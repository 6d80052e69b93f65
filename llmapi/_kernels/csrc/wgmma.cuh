// Hopper's warpgroup matrix instructions, barriers and bulk tensor copies (PTX ISA, sm_90a).
//
// Wgmma<N>::ss and ::rs: d (64 x N, float32) = or += a (64 x 16) * b (16 x N) of LLM_DTYPE. A warpgroup (four warps,
// the first a multiple of four) issues them together. Thread t holds d[4 * j + i]: row 16 * (t / 32 % 4) + t % 32 / 4 +
// 8 * (i / 2), column 8 * j + 2 * (t % 4) + i % 2. Registers of a hold the same rows: columns 2 * (t % 4) and the next
// one in a[0], of row + 8 in a[1], columns + 8 in a[2] and a[3].
// ss: a and b lie in shared memory with their 16-wide side contiguous. rs: b's N side is contiguous.
#pragma once
#include "common.cuh"

struct alignas(64) TensorMap {
  char opaque[128];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#if LLM_DTYPE == 1
#define WGMMA_TYPES ".f32.f16.f16 "
#else
#define WGMMA_TYPES ".f32.bf16.bf16 "
#endif

// Descriptor of a matrix in shared memory in rows of 128 bytes, eight rows to a 1024-byte aligned, swizzled piece.
// `stride` bytes lead to the next eight rows; `leading` bytes to the next 64 columns where columns are contiguous
// and N (or M) is more than 64.
DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving what touches the registers across.
template <int N> DEVICE void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int REGISTERS> DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

DEVICE void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Like named_sync; whether `mine` is true in any thread.
DEVICE bool named_any(int barrier, int threads, bool mine) {
  int any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.s32 q, %1, 0; bar.red.or.pred p, %2, %3, q; selp.s32 %0, 1, 0, p;}"
      : "=r"(any)
      : "r"((int)mine), "r"(barrier), "r"(threads)
      : "memory");
  return any;
}

// Ordinary accesses to shared memory before come before those of matrix instructions and bulk copies after.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and expects as many bytes of bulk copies before the phase ends.
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of that parity has ended.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

DEVICE void tensor_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A box of a tensor to shared memory; its bytes count at the barrier. Coordinates from the innermost dimension on.
DEVICE void tensor_copy(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DEVICE void tensor_copy(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

DEVICE void stmatrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

#define FLOATS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLOATS8(i) FLOATS4(i), FLOATS4(i + 4)

template <int N> struct Wgmma;

template <> struct Wgmma<64> {
  static DEVICE void ss(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, %32, %33, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[32], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<80> {
  static DEVICE void ss(float (&d)[40], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %42, 0;"
        "wgmma.mma_async.sync.aligned.m64n80k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39"
        "}, %40, %41, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[40], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %45, 0;"
        "wgmma.mma_async.sync.aligned.m64n80k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39"
        "}, {%40,%41,%42,%43}, %44, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<96> {
  static DEVICE void ss(float (&d)[48], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %50, 0;"
        "wgmma.mma_async.sync.aligned.m64n96k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
        "}, %48, %49, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[48], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %53, 0;"
        "wgmma.mma_async.sync.aligned.m64n96k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
        "}, {%48,%49,%50,%51}, %52, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<112> {
  static DEVICE void ss(float (&d)[56], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %58, 0;"
        "wgmma.mma_async.sync.aligned.m64n112k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55"
        "}, %56, %57, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[56], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %61, 0;"
        "wgmma.mma_async.sync.aligned.m64n112k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55"
        "}, {%56,%57,%58,%59}, %60, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<128> {
  static DEVICE void ss(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, %64, %65, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48), FLOATS8(56)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[64], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48), FLOATS8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<192> {
  static DEVICE void ss(float (&d)[96], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %98, 0;"
        "wgmma.mma_async.sync.aligned.m64n192k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
        "}, %96, %97, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48),
          FLOATS8(56), FLOATS8(64), FLOATS8(72), FLOATS8(80), FLOATS8(88)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[96], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %101, 0;"
        "wgmma.mma_async.sync.aligned.m64n192k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
        "}, {%96,%97,%98,%99}, %100, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48),
          FLOATS8(56), FLOATS8(64), FLOATS8(72), FLOATS8(80), FLOATS8(88)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

template <> struct Wgmma<256> {
  static DEVICE void ss(float (&d)[128], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %130, 0;"
        "wgmma.mma_async.sync.aligned.m64n256k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, %128, %129, p, 1, 1, 0, 0;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48),
          FLOATS8(56), FLOATS8(64), FLOATS8(72), FLOATS8(80), FLOATS8(88), FLOATS8(96), FLOATS8(104),
          FLOATS8(112), FLOATS8(120)
        : "l"(a), "l"(b), "r"((int)add));
  }
  static DEVICE void rs(float (&d)[128], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %133, 0;"
        "wgmma.mma_async.sync.aligned.m64n256k16" WGMMA_TYPES "{"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1;}"
        : FLOATS8(0), FLOATS8(8), FLOATS8(16), FLOATS8(24), FLOATS8(32), FLOATS8(40), FLOATS8(48),
          FLOATS8(56), FLOATS8(64), FLOATS8(72), FLOATS8(80), FLOATS8(88), FLOATS8(96), FLOATS8(104),
          FLOATS8(112), FLOATS8(120)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
};

#undef FLOATS4
#undef FLOATS8
#endif
