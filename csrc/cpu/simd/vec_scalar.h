// One-lane vectors: the portable build, and the tail of every other build. Same arithmetic, so results agree bit for
// bit.
#pragma once
#include <stdint.h>

#include "kernels.h"

namespace {

using sparsekern::BFloat16;

struct Float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent's bias and normalises subnormals; it is exact.
  const float value = as_float(magnitude << 13) * as_float(0x77800000u);
  return as_float(sign | as_bits(value));
}

inline BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline Float16 narrow(float x, Float16) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 leaves the rounded significand in the low bits.
    const uint32_t rounded = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline float square_root(float a) { return __builtin_sqrtf(a); }
inline double square_root(double a) { return __builtin_sqrt(a); }

inline float absolute(float a) { return __builtin_fabsf(a); }
inline double absolute(double a) { return __builtin_fabs(a); }

inline float with_sign(float a, float b) { return __builtin_copysignf(a, b); }
inline double with_sign(double a, double b) { return __builtin_copysign(a, b); }

// Added to a whole number, it leaves that in the lowest bits of the float.
constexpr float kPowerBias = 12582912.0f;

// To the second level of the cache: `count` floats from p on, which need not be memory.
template <int64_t kCount>
inline void fetch(const float* p) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; i += 16) __builtin_prefetch(p + i, 0, 2);
}
// To the first level, to be written.
template <int64_t kCount>
inline void claim(float* p) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; i += 16) __builtin_prefetch(p + i, 1, 3);
}

// T is the compute type, float or double.
template <class T>
struct Lane {
  static constexpr int kLanes = 1;
  T value;
  static Lane set(double x) { return {static_cast<T>(x)}; }
  static Lane load(const T* p) { return {*p}; }
  template <class S>
  static Lane load(const S* p) {
    return {widen(*p)};
  }
  void store(T* p) const { *p = value; }
  template <class S>
  void store(S* p) const {
    *p = narrow(value, S{});
  }
  void stream(T* p) const { *p = value; }
  static void fence() {}
  // Lanes whose bit is 0 become +0; `bits` holds one bit per lane from bit 0 on.
  Lane keep(uint32_t bits) const { return {bits & 1u ? value : T(0)}; }
  // Lanes whose bit is 0 are those of `other`.
  Lane or_else(uint32_t bits, Lane other) const { return bits & 1u ? *this : other; }
  // Lanes where `other` is above 0 or NaN; the rest become +0.
  Lane unless_at_most_zero(Lane other) const { return {other.value <= T(0) ? T(0) : value}; }
  Lane root() const { return {square_root(value)}; }
  Lane negate() const { return {-value}; }
  Lane magnitude() const { return {absolute(value)}; }
  // Lanes change their sign where that of `other` is negative.
  Lane times_sign(Lane other) const { return {value * with_sign(T(1), other.value)}; }
  static Lane splat(T x) { return {x}; }
  // One bit per lane, set where it is above that of `other`; NaN is above nothing.
  uint32_t above(Lane other) const { return value > other.value; }
  // 2^n of a float lane n + kPowerBias, n a whole number from -126 to 127.
  Lane power() const { return {as_float((as_bits(value) << 23) + 0x3f800000u)}; }
  // The first n lanes, 0 <= n <= 1; the other is 0, or not stored.
  template <class S>
  static Lane load(const S* p, int64_t n) {
    return n ? load(p) : Lane{T(0)};
  }
  template <class S>
  void store(S* p, int64_t n) const {
    if (n) store(p);
  }
  void store_even(T* p, int64_t n) const { store(p, n); }
  template <class S>
  static Lane load_even(const S* p, int64_t = 1) {
    return load(p);
  }
};
template <class T>
inline Lane<T> operator*(Lane<T> a, Lane<T> b) {
  return {a.value * b.value};
}
template <class T>
inline Lane<T> operator/(Lane<T> a, Lane<T> b) {
  return {a.value / b.value};
}
template <class T>
inline Lane<T> fma(Lane<T> a, Lane<T> b, Lane<T> c) {
  return {fused(a.value, b.value, c.value)};
}
// a * b + c for sums whose rounding is free: not fused here, where that may be a call into the mathematics library.
template <class T>
inline Lane<T> madd(Lane<T> a, Lane<T> b, Lane<T> c) {
  return {a.value * b.value + c.value};
}
template <class T>
inline Lane<T> operator+(Lane<T> a, Lane<T> b) {
  return {a.value + b.value};
}
// b where either is NaN.
template <class T>
inline Lane<T> larger(Lane<T> a, Lane<T> b) {
  return {a.value > b.value ? a.value : b.value};
}
template <class T>
inline Lane<T> smaller(Lane<T> a, Lane<T> b) {
  return {a.value < b.value ? a.value : b.value};
}
// The lanes of both in turns.
template <class T>
inline void interleave(Lane<T>&, Lane<T>&) {}
// Of a kLanes by kLanes matrix, in registers.
template <class T>
inline void transpose(Lane<T> (&)[1]) {}
template <class T>
inline Lane<T> sum_lanes(const Lane<T> (&m)[1]) {
  return m[0];
}

#ifndef SPARSEKERN_WIDE
template <class T>
struct WideOf {
  using type = Lane<T>;
};

// One bit per key of 64, set where key >= least.
inline uint64_t at_least_bits(const uint32_t* keys, uint32_t least) {
  uint64_t bits = 0;
  for (int j = 0; j < 64; ++j) bits |= static_cast<uint64_t>(keys[j] >= least) << j;
  return bits;
}
#endif

// One bit per group of kLanes mask bits, of 64 groups, set where any of them is.
template <int kLanes>
inline uint64_t live_vectors(const uint8_t* mask) {
  constexpr uint32_t kAll = (uint32_t{1} << kLanes) - 1;
  uint64_t bits = 0;
  for (int j = 0; j < 64; ++j) {
    const int at = j * kLanes;
    uint32_t own = mask[at >> 3];
    if (kLanes > 8) own |= static_cast<uint32_t>(mask[(at >> 3) + 1]) << 8;
    bits |= static_cast<uint64_t>((own >> (at & 7) & kAll) != 0) << j;
  }
  return bits;
}
template <>
inline uint64_t live_vectors<1>(const uint8_t* mask) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, 8);
  return bits;
}

// Keys of float64 scores, on every instruction set.
inline uint64_t at_least_bits(const uint64_t* keys, uint64_t least) {
  uint64_t bits = 0;
  for (int j = 0; j < 64; ++j) bits |= static_cast<uint64_t>(keys[j] >= least) << j;
  return bits;
}

}  // namespace
