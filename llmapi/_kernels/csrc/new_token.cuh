// The newest token of a decoding sequence, whose query, key and value come straight from the projection: rotated here,
// written to the cache, and put among the keys and values that attention has in shared memory.
//
// With FUSED, decode_attention.cu does the work of rotary.cu for the rows that it serves: a step has one launch less a
// layer, and the copies of older keys and values need not wait for this step's.
//
// ROTATED: channels of a head that are rotated, the leading ones: a multiple of 16, or of 8 with INTERLEAVED (pairs are
// neighbours); 0 for none. Elements are dealt by octets: 16 bytes of a key, and what four lanes hold of a query.
#pragma once
#include "decode_attention.cuh"

#define OCTETS CHUNKS
#define TURNED (ROTATED / 8)                          // octets that are rotated
#define PAIRED (INTERLEAVED ? 0 : TURNED / 2)         // whose partner is another octet
#define KEY_ITEMS (OCTETS - PAIRED)
#define ITEMS (KEY_ITEMS + OCTETS)                    // of a key and a value; one is an octet, or two that are partners
#define ROUNDS ((ITEMS + 31) / 32)
static_assert(LLM_DTYPE != 0 && ROTATED % (INTERLEAVED ? 8 : 16) == 0 && ROTATED <= HEAD_DIM, "see above");

typedef Vec<scalar_t, 8> Octet;

// cos_sin: [ROTATED / 2] cosines of the token, then as many sines.
DEVICE void rotate_queries(Queries& queries, const float* cos_sin) {
  int at = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int o = 0; o < (INTERLEAVED ? TURNED : PAIRED); o++) {
#if INTERLEAVED
    float cosine = cos_sin[o * 4 + at / 2], sine = cos_sin[ROTATED / 2 + o * 4 + at / 2];
#else
    Vec<float, 2> cosines = load<float, 2>(cos_sin + o * 8 + at);
    Vec<float, 2> sines = load<float, 2>(cos_sin + ROTATED / 2 + o * 8 + at);
#endif
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
      uint32_t& x = queries.part[n][o / 2][o & 1];
      float2 a = unpack2(scalar_t(), x);
#if INTERLEAVED
      x = pack2(scalar_t(), a.x * cosine - a.y * sine, a.y * cosine + a.x * sine);
#else
      uint32_t& y = queries.part[n][(o + PAIRED) / 2][(o + PAIRED) & 1];
      float2 b = unpack2(scalar_t(), y);
      x = pack2(scalar_t(), a.x * cosines.at[0] - b.x * sines.at[0], a.y * cosines.at[1] - b.y * sines.at[1]);
      y = pack2(scalar_t(), b.x * cosines.at[0] + a.x * sines.at[0], b.y * cosines.at[1] + a.y * sines.at[1]);
#endif
    }
  }
}

// What a lane holds of the newest key and value: item `round * 32 + lane`. As words: NVRTC 13.0 was seen to mix up halves
// that it kept apart from here to where they are stored, with groups of more than 16 query heads in half precision.
struct NewToken {
  uint4 first[ROUNDS], second[ROUNDS];
};

DEVICE uint4 words_of(const Octet& octet) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[i] = pack2(scalar_t(), to_float(octet.at[2 * i]), to_float(octet.at[2 * i + 1]));
    ptx::made(words[i]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

DEVICE void take(NewToken& token, const scalar_t* key, const scalar_t* value, const float* cos_sin) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    int item = r * 32 + lane;
    Octet x = {}, y = {};
    if (item < PAIRED) {
      x = load<scalar_t, 8>(key + item * 8);
      y = load<scalar_t, 8>(key + (item + PAIRED) * 8);
      Vec<float, 8> cosines = load<float, 8>(cos_sin + item * 8);
      Vec<float, 8> sines = load<float, 8>(cos_sin + ROTATED / 2 + item * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) rotate_pair(x.at[i], y.at[i], cosines.at[i], sines.at[i]);
    } else if (item < KEY_ITEMS) {
      x = load<scalar_t, 8>(key + (item + PAIRED) * 8);
      if (INTERLEAVED && item < TURNED) {
        Vec<float, 4> cosines = load<float, 4>(cos_sin + item * 4);
        Vec<float, 4> sines = load<float, 4>(cos_sin + ROTATED / 2 + item * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) rotate_pair(x.at[2 * i], x.at[2 * i + 1], cosines.at[i], sines.at[i]);
      }
    } else if (item < ITEMS) {
      x = load<scalar_t, 8>(value + (item - KEY_ITEMS) * 8);
    }
    token.first[r] = words_of(x);
    token.second[r] = words_of(y);
  }
}

DEVICE void store_words(scalar_t* to, const uint4& words) { *reinterpret_cast<uint4*>(to) = words; }
DEVICE void put(const NewToken& token, scalar_t* key, scalar_t* value) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    int item = r * 32 + lane;
    if (item < PAIRED) store_words(key + item * 8, token.first[r]);
    if (item < KEY_ITEMS) {
      store_words(key + (item + PAIRED) * 8, item < PAIRED ? token.second[r] : token.first[r]);
    } else if (item < ITEMS) {
      store_words(value + (item - KEY_ITEMS) * 8, token.first[r]);
    }
  }
}
