// Stands for llmapi/_kernels/csrc/ptx.cuh: the same functions, done as the PTX ISA's sections on them say.
#pragma once

namespace ptx {

DEVICE void griddepcontrol_wait() {}
DEVICE void griddepcontrol_launch_dependents() {}

// ---- copies to shared memory

DEVICE void cp_async16(uint32_t to, const void* from, int bytes) {
  if (to % 16 || (bytes && (uintptr_t)from % 16)) emulated::fail("cp.async of 16 bytes with an address that is not aligned");
  emulated::start_copy(emulated::shared_pointer(to), from, bytes);
}
DEVICE void cp_async16_line(uint32_t to, const void* from) { cp_async16(to, from, 16); }
DEVICE void cp_async_commit_group() { emulated::commit_copies(); }
template <int PENDING> DEVICE void cp_async_wait_group() { emulated::wait_copies(PENDING); }
DEVICE void st_shared16(uint32_t to, const uint4& x) {
  if (to % 16) emulated::fail("st.shared of 16 bytes to an address that is not aligned");
  memcpy(emulated::shared_pointer(to), &x, 16);
}

// ---- matrices of a warp
//
// A matrix of 8 rows by 8 columns of 16 bits is held as one 32-bit register of each lane: lane 4 * i + j has row i,
// columns 2 * j (low half) and 2 * j + 1.

struct Registers {
  uint32_t at[4];
};
DEVICE uint32_t pair_of(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
DEVICE uint16_t half_of(uint32_t pair, int which) { return (uint16_t)(which ? pair >> 16 : pair); }

// Lanes 8 * m to 8 * m + 7 say where the rows of matrix m are.
template <bool TRANS> DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row) {
  if (row % 16) emulated::fail("ldmatrix of a row that is not aligned to 16 bytes");
  const char* name = TRANS ? "ldmatrix.trans" : "ldmatrix";
  Registers got = emulated::together<Registers>(name, 0xffffffffu, row, [](const uint32_t* rows, Registers* out) {
    for (int m = 0; m < 4; m++) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; i++) memcpy(matrix[i], emulated::shared_pointer(rows[8 * m + i]), 16);
      for (int lane = 0; lane < 32; lane++) {
        int i = lane / 4, j = lane % 4 * 2;
        out[lane].at[m] = TRANS ? pair_of(matrix[j][i], matrix[j + 1][i]) : pair_of(matrix[i][j], matrix[i][j + 1]);
      }
    }
  });
  memcpy(r, got.at, sizeof r);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { load_matrices<false>(r, row); }
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { load_matrices<true>(r, row); }

DEVICE uint32_t movmatrix_trans(uint32_t pair) {
  return emulated::together<uint32_t>("movmatrix", 0xffffffffu, pair, [](const uint32_t* in, uint32_t* out) {
    auto element = [&](int row, int column) { return half_of(in[row * 4 + column / 2], column & 1); };
    for (int lane = 0; lane < 32; lane++)
      out[lane] = pair_of(element(lane % 4 * 2, lane / 4), element(lane % 4 * 2 + 1, lane / 4));
  });
}

// c[16, 8] += a[16, K] * b[K, 8]. With g = lane / 4 and t = lane % 4, a lane has of a: rows g, g + 8, g, g + 8 at columns
// 2 t and 2 t + 1 (first two registers), 2 t + 8 and 2 t + 9 (next two); of b: rows 2 t, 2 t + 1, then 2 t + 8, 2 t + 9,
// of column g; of c: columns 2 t and 2 t + 1 of row g, then of row g + 8.
struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaOut {
  float c[4];
};
template <int K, typename Widen>
DEVICE void multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen) {
  MmaIn mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  MmaOut got = emulated::together<MmaOut>(name, 0xffffffffu, mine, [=](const MmaIn* in, MmaOut* out) {
    float left[16][K], right[K][8], sum[16][8];
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < K / 4; i++)
        for (int e = 0; e < 2; e++) left[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = widen(half_of(in[lane].a[i], e));
      for (int i = 0; i < K / 8; i++)
        for (int e = 0; e < 2; e++) right[2 * t + i * 8 + e][g] = widen(half_of(in[lane].b[i], e));
      for (int i = 0; i < 4; i++) sum[g + i / 2 * 8][2 * t + i % 2] = in[lane].c[i];
    }
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < K; k++)
        for (int n = 0; n < 8; n++) sum[m][n] += left[m][k] * right[k][n];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) out[lane].c[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
  memcpy(c, got.c, sizeof c);
}
DEVICE void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  multiply<8>("mma.m16n8k8.f16", c, a, b0, 0, [](uint16_t x) { return __half2float({x}); });
}
DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<16>("mma.m16n8k16.f16", c, a, b0, b1, [](uint16_t x) { return __half2float({x}); });
}
DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<16>("mma.m16n8k16.bf16", c, a, b0, b1, [](uint16_t x) { return __bfloat162float({x}); });
}

// ---- numbers

DEVICE float ex2(float x) {
  float y = exp2f(fabsf(x) < 0x1p-126f ? 0.0f : x);
  return y < 0x1p-126f ? 0.0f : y;
}
DEVICE float max_nan(float a, float b) { return a != a || b != b ? __int_as_float(0x7fffffff) : fmaxf(a, b); }

// ---- barriers, clusters

template <int THREADS> DEVICE void bar_sync(int id) { emulated::block_barrier(id, THREADS); }
DEVICE int cluster_ctarank() { return emulated::self->cluster_rank; }
DEVICE void barrier_cluster() { emulated::cluster_barrier(); }
template <typename T> DEVICE const T* mapa(const T* here, int rank) {
  return static_cast<const T*>(emulated::of_rank(here, rank));
}

DEVICE void used(int) {}
DEVICE void made(uint32_t&) {}

}  // namespace ptx
