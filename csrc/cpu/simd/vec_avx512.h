// AVX-512 F, BW, DQ, VL. The maskz forms spare gcc 12 a false warning: its plain ones start from an undefined value.
#pragma once
#define SPARSEKERN_WIDE 1
#include <immintrin.h>

#include "vec_scalar.h"

namespace {

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
  void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, quiet, 16)));
  }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
  }
  F32x16 keep(uint32_t bits) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v)}; }
  F32x16 negate() const { return {_mm512_xor_ps(v, _mm512_set1_ps(-0.0f))}; }
};
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
  F64x8 negate() const { return {_mm512_xor_pd(v, _mm512_set1_pd(-0.0))}; }
};
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

// One bit per key of 64, set where key >= least.
inline uint64_t at_least_bits(const uint32_t* keys, uint32_t least) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int>(least));
  uint64_t bits = 0;
  for (int j = 0; j < 4; ++j) {
    bits |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16 * j), bound)) << (16 * j);
  }
  return bits;
}

}  // namespace
