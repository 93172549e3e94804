// AVX-512 F, BW, DQ, VL. The maskz forms spare gcc 12 a false warning: its plain ones start from an undefined value.
#pragma once
#define SPARSEKERN_WIDE 1
#include <immintrin.h>

#include "vec_scalar.h"

namespace {

// To bfloat16, not by vcvtneps2bf16: it takes denormals for zeros. Ahead of what calls it, or -O0 makes weak symbols
// for unwinding.
inline __m256i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, quiet, 16));
}

struct F32x16 {
  static constexpr int kLanes = 16;
  __m512 v;
  static F32x16 set(double x) { return {_mm512_set1_ps(static_cast<float>(x))}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load(const BFloat16* p) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16))};
  }
  static F32x16 load(const Float16* p) {
    return {_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v)); }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Past the caches, to a whole vector; readers wait for `fence`.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  F32x16 keep(uint32_t bits) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v)}; }
  F32x16 or_else(uint32_t bits, F32x16 other) const {
    return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(bits), v)};
  }
  // Lanes where `other` is above 0 or NaN; the rest become +0.
  F32x16 unless_at_most_zero(F32x16 other) const {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(other.v, _mm512_setzero_ps(), _CMP_NLE_UQ), v)};
  }
  F32x16 root() const { return {_mm512_maskz_sqrt_ps(0xffff, v)}; }
  F32x16 negate() const { return {_mm512_xor_ps(v, _mm512_set1_ps(-0.0f))}; }
  // Lanes change their sign where that of `other` is negative.
  F32x16 times_sign(F32x16 other) const { return {_mm512_xor_ps(v, _mm512_and_ps(other.v, _mm512_set1_ps(-0.0f)))}; }
  // 2^n of lanes n + kPowerBias, n a whole number from -126 to 127.
  F32x16 power() const {
    const __m512i shifted = _mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
  }
  // One bit per lane, set where it is above that of `other`; NaN is above nothing.
  uint32_t above(F32x16 other) const { return _mm512_cmp_ps_mask(v, other.v, _CMP_GT_OQ); }
  F32x16 magnitude() const { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), v)}; }
  static F32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
  // The first n lanes, 0 <= n <= 16; the others are 0, or not stored.
  static F32x16 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static F32x16 load(const BFloat16* p, int64_t n) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(first(n), p));
    return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16))};
  }
  void store(BFloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), rounded(v)); }
  // p[0], p[2], ..., p[30]; p[31] is not read.
  template <class T>
  static F32x16 load_even(const T* p) {
    const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_permutex2var_ps(load(p).v, pick, load(p + 15).v)};
  }
  // The first n of them, 0 < n <= 16; nothing behind the last is read.
  template <class T>
  static F32x16 load_even(const T* p, int64_t n) {
    const int64_t read = 2 * n - 1;
    const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const F32x16 low = load(p, read < 16 ? read : 16), high = load(p + 16, read < 16 ? 0 : read - 16);
    return {_mm512_permutex2var_ps(low.v, pick, high.v)};
  }
  // The first n lanes to p[0], p[2], ..., 0 <= n <= 16; what lies between stays.
  void store_even(float* p, int64_t n) const {
    const uint32_t even = static_cast<uint32_t>((uint64_t{1} << 2 * n) - 1) & 0x55555555u;
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(even), _mm512_maskz_permutexvar_ps(0xffff, low, v));
    _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(even >> 16), _mm512_maskz_permutexvar_ps(0xffff, high, v));
  }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};
inline F32x16 madd(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
// b where either is NaN.
inline F32x16 larger(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 smaller(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }

// The lanes of both, one after the other, from lane `by` of `a` on; 0 <= by < 16.
inline F32x16 slide(F32x16 a, F32x16 b, int by) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(lane, _mm512_set1_epi32(by)), b.v)};
}

// The lanes of both in turns: a0, b0, a1, ... in a, and the rest in b.
inline void interleave(F32x16& a, F32x16& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 first = a.v;
  a.v = _mm512_permutex2var_ps(first, low, b.v);
  b.v = _mm512_permutex2var_ps(first, high, b.v);
}

inline void transpose(F32x16 (&m)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(m[i].v, m[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(m[i].v, m[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // b[4 * i + j] holds column 4 * q + j of rows 4 * i to 4 * i + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512 p = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x44), q = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x44);
    const __m512 r = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xee), s = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xee);
    m[j].v = _mm512_shuffle_f32x4(p, q, 0x88);
    m[j + 4].v = _mm512_shuffle_f32x4(p, q, 0xdd);
    m[j + 8].v = _mm512_shuffle_f32x4(r, s, 0x88);
    m[j + 12].v = _mm512_shuffle_f32x4(r, s, 0xdd);
  }
}
// Lane i is the sum of the lanes of m[i]: half of the shuffles of a transposition, and they share one port.
inline F32x16 sum_lanes(const F32x16 (&m)[16]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 even = m[2 * i].v, odd = m[2 * i + 1].v;
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
    b[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  // Each quarter of b[i] has a share of rows 4 * i to 4 * i + 3.
  for (int i = 0; i < 2; ++i) {
    const __m512 even = b[2 * i], odd = b[2 * i + 1];
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(even, odd, 0x88), _mm512_shuffle_f32x4(even, odd, 0xdd));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

struct F64x8 {
  static constexpr int kLanes = 8;
  __m512d v;
  static F64x8 set(double x) { return {_mm512_set1_pd(x)}; }
  static F64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  F64x8 keep(uint32_t bits) const { return {_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), v)}; }
  F64x8 or_else(uint32_t bits, F64x8 other) const {
    return {_mm512_mask_mov_pd(other.v, static_cast<__mmask8>(bits), v)};
  }
  F64x8 root() const { return {_mm512_maskz_sqrt_pd(0xff, v)}; }
  F64x8 negate() const { return {_mm512_xor_pd(v, _mm512_set1_pd(-0.0))}; }
  F64x8 magnitude() const { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), v)}; }
};
inline F64x8 operator+(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64x8 operator*(F64x8 a, F64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64x8 operator/(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

template <class T>
struct WideOf;
template <>
struct WideOf<float> {
  using type = F32x16;
};
template <>
struct WideOf<double> {
  using type = F64x8;
};

template <>
inline uint64_t live_vectors<16>(const uint8_t* mask) {
  const __m512i low = _mm512_loadu_si512(mask), high = _mm512_loadu_si512(mask + 64);
  return _mm512_test_epi16_mask(low, low) | static_cast<uint64_t>(_mm512_test_epi16_mask(high, high)) << 32;
}
template <>
inline uint64_t live_vectors<8>(const uint8_t* mask) {
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// One bit per key of 64, set where key >= least.
inline uint64_t at_least_bits(const uint32_t* keys, uint32_t least) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int>(least));
  uint64_t bits = 0;
  for (int j = 0; j < 4; ++j) {
    bits |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16 * j), bound)) << (16 * j);
  }
  return bits;
}

// As key_of of topk_keys.h.
template <bool kMagnitude>
inline __m512i keys_of(__m512 score) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u)), one = _mm512_set1_epi32(1);
  if (kMagnitude) return _mm512_add_epi32(_mm512_andnot_si512(sign, _mm512_castps_si512(score)), one);
  const __m512i bits = _mm512_castps_si512(_mm512_add_ps(score, _mm512_setzero_ps()));
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
}

// As bracket_bits of topk_keys.h.
template <bool kMagnitude>
inline bool bracket_bits(const float* scores, uint32_t lo, uint32_t over, uint64_t* inside, uint64_t* above) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(lo)), high = _mm512_set1_epi32(static_cast<int>(over));
  __mmask16 nan = 0;
  *inside = *above = 0;
  for (int j = 0; j < 4; ++j) {
    const __m512 score = _mm512_loadu_ps(scores + 16 * j);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q));
    const __m512i key = keys_of<kMagnitude>(score);
    *inside |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(key, low)) << (16 * j);
    *above |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(key, high)) << (16 * j);
  }
  *inside &= ~*above;
  return nan != 0;
}

}  // namespace
