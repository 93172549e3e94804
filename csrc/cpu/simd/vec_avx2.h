// AVX2 + FMA + F16C.
#pragma once
#define SPARSEKERN_WIDE 1
#include <immintrin.h>

#include "vec_scalar.h"

namespace {

struct F32x8 {
  static constexpr int kLanes = 8;
  __m256 v;
  static F32x8 set(double x) { return {_mm256_set1_ps(static_cast<float>(x))}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32x8 load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static F32x8 load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Past the caches, to a whole vector; readers wait for `fence`.
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static __m256 lanes(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return _mm256_castsi256_ps(on);
  }
  F32x8 keep(uint32_t bits) const { return {_mm256_and_ps(v, lanes(bits))}; }
  F32x8 or_else(uint32_t bits, F32x8 other) const { return {_mm256_blendv_ps(other.v, v, lanes(bits))}; }
  // Lanes where `other` is above 0 or NaN; the rest become +0.
  F32x8 unless_at_most_zero(F32x8 other) const {
    return {_mm256_and_ps(v, _mm256_cmp_ps(other.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
  }
  F32x8 root() const { return {_mm256_sqrt_ps(v)}; }
  F32x8 negate() const { return {_mm256_xor_ps(v, _mm256_set1_ps(-0.0f))}; }
  // Lanes change their sign where that of `other` is negative.
  F32x8 times_sign(F32x8 other) const { return {_mm256_xor_ps(v, _mm256_and_ps(other.v, _mm256_set1_ps(-0.0f)))}; }
  // 2^n of lanes n + kPowerBias, n a whole number from -126 to 127.
  F32x8 power() const {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)))};
  }
  // One bit per lane, set where it is above that of `other`; NaN is above nothing.
  uint32_t above(F32x8 other) const {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, other.v, _CMP_GT_OQ)));
  }
  F32x8 magnitude() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  static F32x8 splat(float x) { return {_mm256_set1_ps(x)}; }
  // The first n lanes, 0 <= n <= 8; the others are 0, or not stored.
  static F32x8 load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  static F32x8 load(const BFloat16* p, int64_t n) {
    BFloat16 lanes[8] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(BFloat16* p, int64_t n) const {
    BFloat16 lanes[8];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  // p[0], p[2], ..., p[14]; p[15] is not read.
  template <class T>
  static F32x8 load_even(const T* p) {
    const __m256 pairs = _mm256_shuffle_ps(load(p).v, load(p + 7).v, 0xd8);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8))};
  }
  // The first n of them, 0 < n <= 8; nothing behind the last is read.
  template <class T>
  static F32x8 load_even(const T* p, int64_t n) {
    const int64_t read = 2 * n - 1;
    const F32x8 low = load(p, read < 8 ? read : 8), high = load(p + 8, read < 8 ? 0 : read - 8);
    const __m256 pairs = _mm256_shuffle_ps(low.v, high.v, 0x88);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8))};
  }
  // The first n lanes to p[0], p[2], ..., 0 <= n <= 8; what lies between stays.
  void store_even(float* p, int64_t n) const {
    const __m256i even = _mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0);
    const __m256 low = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    const __m256 high = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
    _mm256_maskstore_ps(p, _mm256_and_si256(even, first(2 * n)), low);
    _mm256_maskstore_ps(p + 8, _mm256_and_si256(even, first(2 * n - 8)), high);
  }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
inline F32x8 madd(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
// b where either is NaN.
inline F32x8 larger(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32x8 smaller(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }

// The lanes of both, one after the other, from lane `by` of `a` on; 0 <= by < 8.
inline F32x8 slide(F32x8 a, F32x8 b, int by) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), first = _mm256_set1_epi32(by);
  const __m256 both = _mm256_blendv_ps(a.v, b.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(first, lane)));
  return {_mm256_permutevar8x32_ps(both, _mm256_add_epi32(lane, first))};
}

// The lanes of both in turns: a0, b0, a1, ... in a, and the rest in b.
inline void interleave(F32x8& a, F32x8& b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}

inline void transpose(F32x8 (&m)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(m[i].v, m[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(m[i].v, m[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    m[j].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    m[j + 4].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
}
// Lane i is the sum of the lanes of m[i].
inline F32x8 sum_lanes(const F32x8 (&m)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(m[0].v, m[1].v), _mm256_hadd_ps(m[2].v, m[3].v));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(m[4].v, m[5].v), _mm256_hadd_ps(m[6].v, m[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

struct F64x4 {
  static constexpr int kLanes = 4;
  __m256d v;
  static F64x4 set(double x) { return {_mm256_set1_pd(x)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  static __m256d lanes(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane));
  }
  F64x4 keep(uint32_t bits) const { return {_mm256_and_pd(v, lanes(bits))}; }
  F64x4 or_else(uint32_t bits, F64x4 other) const { return {_mm256_blendv_pd(other.v, v, lanes(bits))}; }
  F64x4 root() const { return {_mm256_sqrt_pd(v)}; }
  F64x4 negate() const { return {_mm256_xor_pd(v, _mm256_set1_pd(-0.0))}; }
  F64x4 magnitude() const { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), v)}; }
};
inline F64x4 operator+(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64x4 operator*(F64x4 a, F64x4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64x4 operator/(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

template <class T>
struct WideOf;
template <>
struct WideOf<float> {
  using type = F32x8;
};
template <>
struct WideOf<double> {
  using type = F64x4;
};

template <>
inline uint64_t live_vectors<8>(const uint8_t* mask) {
  uint64_t dead = 0;
  for (int j = 0; j < 2; ++j) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 32 * j));
    const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    dead |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zero))) << (32 * j);
  }
  return ~dead;
}

// One bit per key of 64, set where key >= least.
inline uint64_t at_least_bits(const uint32_t* keys, uint32_t least) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(least));
  uint64_t bits = 0;
  for (int j = 0; j < 8; ++j) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * j));
    const __m256i hit = _mm256_cmpeq_epi32(_mm256_max_epu32(key, bound), key);
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hit)))) << (8 * j);
  }
  return bits;
}

// As key_of of topk_keys.h.
template <bool kMagnitude>
inline __m256i keys_of(__m256 score) {
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  if (kMagnitude) return _mm256_add_epi32(_mm256_andnot_si256(sign, _mm256_castps_si256(score)), _mm256_set1_epi32(1));
  const __m256i bits = _mm256_castps_si256(_mm256_add_ps(score, _mm256_setzero_ps()));
  return _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), sign));
}

// As bracket_bits of topk_keys.h.
template <bool kMagnitude>
inline bool bracket_bits(const float* scores, uint32_t lo, uint32_t over, uint64_t* inside, uint64_t* above) {
  const __m256i low = _mm256_set1_epi32(static_cast<int>(lo)), high = _mm256_set1_epi32(static_cast<int>(over));
  const auto at_least = [](__m256i key, __m256i bound) {
    const __m256i hit = _mm256_cmpeq_epi32(_mm256_max_epu32(key, bound), key);
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hit))));
  };
  __m256 nan = _mm256_setzero_ps();
  *inside = *above = 0;
  for (int j = 0; j < 8; ++j) {
    const __m256 score = _mm256_loadu_ps(scores + 8 * j);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(score, score, _CMP_UNORD_Q));
    const __m256i key = keys_of<kMagnitude>(score);
    *inside |= at_least(key, low) << (8 * j);
    *above |= at_least(key, high) << (8 * j);
  }
  *inside &= ~*above;
  return _mm256_movemask_ps(nan) != 0;
}

}  // namespace
