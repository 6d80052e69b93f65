// What the CPU kernels share: a vector type, its loads and sums, exp, and the pool of threads.
//
// Written with the vector extensions that GCC and Clang have in common, so one source serves AVX-512, AVX2 and others.
#pragma once

#include <cstdint>
#include <cstring>

namespace llmapi {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#else
constexpr int W = 8;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef vec uvec __attribute__((aligned(4)));  // the same in memory, at any address

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t iv4 __attribute__((vector_size(16)));

inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<uvec*>(p) = v; }
inline vec splat(float x) { return x - vec{}; }

// Lanes of two vectors in a new order; I is the vector of as many integers. GCC before 12 lacks the name that Clang has.
#if defined(__clang__)
#define LLMAPI_SHUFFLE(I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LLMAPI_SHUFFLE(I, a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// Keeps a value in a register, so that it is loaded once for several products.
inline void in_register(vec& value) {
#if defined(__AVX__)
  asm("" : "+v"(value));
#else
  (void)value;
#endif
}

// The first n < W floats, then zeros.
inline vec load_first(const float* p, int n) {
  vec v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store_first(float* p, vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }

// Sum of the lanes: halves, then halves of the halves, always in this order.
inline float sum(vec v) {
  typedef float v8 __attribute__((vector_size(32)));
#if defined(__AVX512F__)
  v8 low, high;
  std::memcpy(&low, &v, 32);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
  v8 a = low + high;
#else
  v8 a = v;
#endif
  v4 lower, upper;
  std::memcpy(&lower, &a, 16);
  std::memcpy(&upper, reinterpret_cast<const char*>(&a) + 16, 16);
  v4 b = lower + upper;
  v4 c = b + LLMAPI_SHUFFLE(iv4, b, b, 2, 3, 2, 3);
  return c[0] + c[1];
}

// Largest of the lanes.
inline float largest(vec v) {
  v4 part[W / 4];
  std::memcpy(part, &v, sizeof v);
  for (int i = 1; i < W / 4; ++i) part[0] = part[0] > part[i] ? part[0] : part[i];
  const v4 a = part[0], b = LLMAPI_SHUFFLE(iv4, a, a, 2, 3, 2, 3), c = a > b ? a : b;
  return c[0] > c[1] ? c[0] : c[1];
}

// e**x to about 1e-7; 0 below the smallest normal number, the largest number above the largest. NaN stays NaN.
inline vec exp(vec x) {
  const vec lowest = splat(-87.33654f), highest = splat(88.37626f);
  const ivec vanishes = x < lowest;
  x = x > highest ? highest : x;
  x = vanishes ? lowest : x;
  const float magic = 12582912.0f;  // 1.5 * 2**23: adding it rounds to a whole number
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = splat(1.0f / 5040);  // Taylor series: |r| <= ln(2) / 2, so the next term is below 1e-8
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  ivec bits = reinterpret_cast<ivec>(p) + (reinterpret_cast<ivec>(shifted) << 23);
  vec y = reinterpret_cast<vec>(bits);
  return vanishes ? vec{} : y;
}

// ---- threads: those of the OpenMP runtime that torch itself uses, so that two pools do not fight over the cores

typedef void (*gomp_parallel_t)(void (*)(void*), void*, unsigned, unsigned);

extern gomp_parallel_t pool_run;

// Runs body(i) for i in [0, items), a thread taking the next one when it is done with its last.
template <class Body>
void for_each(int64_t items, int threads, const Body& body) {
  if (threads <= 1 || items <= 1 || !pool_run) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  struct Shared {
    const Body* body;
    int64_t items;
    int64_t next;
  } shared{&body, items, 0};
  pool_run(
      [](void* data) {
        auto* s = static_cast<Shared*>(data);
        for (;;) {
          const int64_t i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
          if (i >= s->items) break;
          (*s->body)(i);
        }
      },
      &shared, static_cast<unsigned>(threads), 0);
}

// Runs body(first, last) over [0, count) in one even run of at least `grain` for each thread.
template <class Body>
void for_ranges(int64_t count, int64_t grain, int threads, const Body& body) {
  int64_t parts = grain > 0 ? count / grain : count;
  if (parts > threads) parts = threads;
  if (parts <= 1) {
    if (count > 0) body(static_cast<int64_t>(0), count);
    return;
  }
  for_each(parts, threads, [&](int64_t i) { body(count * i / parts, count * (i + 1) / parts); });
}

}  // namespace llmapi

#define LLMAPI_EXPORT extern "C" __attribute__((visibility("default")))
