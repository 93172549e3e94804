// Scores as unsigned integers that order as they do: 0 is no candidate, every number is at least 1.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::Dtype;
using sparsekern::TopkTensor;

// Groups whose keys are worked on at a time, in the first-level cache; a multiple of 64.
constexpr int64_t kKeyBuffer = 1024;

// Asks for the scores that a scan comes to kBytes later. It does so much with each that the processor alone looks too
// few ahead: measured (Sapphire Rapids, one thread, 102 MB) 10.8 ms without and 5.0 ms with it, where a read takes 3.6.
class Ahead {
 public:
  Ahead(const TopkTensor& t, int64_t begin) {
    const int64_t size = t.dtype == Dtype::kFloat64 ? 8 : t.dtype == Dtype::kFloat32 ? 4 : 2;
    word_ = 64 * size * (t.block ? 4 : 1);
    line_ = static_cast<const char*>(t.score) + begin / 64 * word_ + kBytes;
  }
  // For 64 groups. Those of blocks lie in this order but for ragged channels, and reading ahead is never wrong.
  void next() {
    for (int64_t i = 0; i < word_; i += 64) __builtin_prefetch(line_ + i);
    line_ += word_;
  }

 private:
  static constexpr int64_t kBytes = 8192;
  const char* line_;
  int64_t word_;
};

template <class Key>
struct ValueOf {
  using type = float;
};
template <>
struct ValueOf<uint64_t> {
  using type = double;
};

inline uint32_t key_bits(float value) { return as_bits(value); }
inline uint64_t key_bits(double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  return bits;
}

// Adding 0 makes -0 equal to 0. NaN is reported apart, so where it sorts does not matter.
template <bool kMagnitude, class Key, class V>
inline Key key_of(V value) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (kMagnitude) return (key_bits(value) & ~kSign) + 1;
  const Key bits = key_bits(value + V(0));
  return bits & kSign ? ~bits : bits | kSign;
}

#ifndef SPARSEKERN_WIDE
// Of 64 scores: one bit for each whose key is in [lo, over), and one for each from `over` on; whether one is NaN.
template <bool kMagnitude>
inline bool bracket_bits(const float* scores, uint32_t lo, uint32_t over, uint64_t* inside, uint64_t* above) {
  bool nan = false;
  *inside = *above = 0;
  for (int j = 0; j < 64; ++j) {
    const uint32_t key = key_of<kMagnitude, uint32_t>(scores[j]);
    nan |= scores[j] != scores[j];
    *inside |= static_cast<uint64_t>((key >= lo) & (key < over)) << j;
    *above |= static_cast<uint64_t>(key >= over) << j;
  }
  return nan;
}
#endif

// n scores as float or double: in place where they are that already, else in `buffer`.
inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const double* widened(const double* x, int64_t, double*) { return x; }
template <class S, class V>
inline const V* widened(const S* x, int64_t n, V* buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<V>(x[i]);
  return buffer;
}
template <class S>
inline const float* widened_half(const S* x, int64_t n, float* buffer) {
  using Wide = typename WideOf<float>::type;
  int64_t i = 0;
  for (; i + Wide::kLanes <= n; i += Wide::kLanes) Wide::load(x + i).store(buffer + i);
  for (; i < n; ++i) buffer[i] = widen(x[i]);
  return buffer;
}
inline const float* widened(const BFloat16* x, int64_t n, float* buffer) { return widened_half(x, n, buffer); }
inline const float* widened(const Float16* x, int64_t n, float* buffer) { return widened_half(x, n, buffer); }
template <class S>
inline const double* widened_half(const S* x, int64_t n, double* buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = widen(x[i]);
  return buffer;
}
inline const double* widened(const BFloat16* x, int64_t n, double* buffer) { return widened_half(x, n, buffer); }
inline const double* widened(const Float16* x, int64_t n, double* buffer) { return widened_half(x, n, buffer); }

template <bool kMagnitude>
inline float weight_value(float x) {
  return kMagnitude ? __builtin_fabsf(x) : x;
}

// Sums over the `count` <= 4 weights of `run` blocks, neighbours in memory; weights of a block lie `step` apart.
template <bool kMagnitude, class S>
inline void block_sums(const S* x, int64_t step, int64_t count, int64_t run, float* out) {
  float buffer[kKeyBuffer];
  const float* row = widened(x, run, buffer);
  for (int64_t i = 0; i < run; ++i) out[i] = weight_value<kMagnitude>(row[i]);
  for (int64_t j = 1; j < count; ++j) {
    row = widened(x + j * step, run, buffer);
    for (int64_t i = 0; i < run; ++i) out[i] = out[i] + weight_value<kMagnitude>(row[i]);
  }
}
// All rows in one pass: rows of 3x3 kernels are too short for several.
template <bool kMagnitude>
inline void block_sums(const float* x, int64_t step, int64_t count, int64_t run, float* out) {
  using Wide = typename WideOf<float>::type;
  const auto value = [](Wide v) { return kMagnitude ? larger(v, v.negate()) : v; };
  for (int64_t i = 0; i < run; i += Wide::kLanes) {
    const int64_t n = run - i < Wide::kLanes ? run - i : Wide::kLanes;
    Wide sum = value(Wide::load(x + i, n));
    for (int64_t j = 1; j < count; ++j) sum = sum + value(Wide::load(x + j * step + i, n));
    sum.store(out + i, n);
  }
}

template <bool kMagnitude, class S>
inline void block_row(const S* x, int64_t step, int64_t count, int64_t run, float* out) {
  block_sums<kMagnitude>(x, step, count, run, out);
  if (count == 4) return;
  // Through double, which cannot change the result: 4s/3 is never half-way between two float32 values.
  for (int64_t i = 0; i < run; ++i) {
    out[i] = static_cast<float>(static_cast<double>(out[i]) * 4 / static_cast<double>(count));
  }
}

template <bool kMagnitude, class S>
inline void block_values(const TopkTensor& t, int64_t begin, int64_t end, float* out) {
  const S* const data = static_cast<const S*>(t.score);
  if (t.inner == 1 && t.axis % 4 == 0) {
    float buffer[4 * kKeyBuffer];
    const float* const x = widened(data + 4 * begin, 4 * (end - begin), buffer);
    for (int64_t i = 0; i < end - begin; ++i) {
      const float pair = weight_value<kMagnitude>(x[4 * i]) + weight_value<kMagnitude>(x[4 * i + 1]);
      out[i] = pair + weight_value<kMagnitude>(x[4 * i + 2]) + weight_value<kMagnitude>(x[4 * i + 3]);
    }
    return;
  }
  const int64_t blocks = (t.axis + 3) / 4, inner = t.inner;
  int64_t row = begin / inner, column = begin % inner;
  while (begin < end) {
    const int64_t outer = row / blocks, block = row % blocks;
    const int64_t run = inner - column < end - begin ? inner - column : end - begin;
    const int64_t count = t.axis - 4 * block < 4 ? t.axis - 4 * block : 4;
    block_row<kMagnitude>(data + (outer * t.axis + 4 * block) * inner + column, inner, count, run, out);
    out += run;
    begin += run;
    column = 0;
    ++row;
  }
}

template <bool kMagnitude, class Key, class V>
inline bool keys_of_values(const V* values, int64_t n, Key* out) {
  Key nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    nan |= static_cast<Key>(values[i] != values[i]);
    out[i] = key_of<kMagnitude, Key>(values[i]);
  }
  return nan != 0;
}

// n values times a factor, in `buffer`, where they may be.
template <class V>
inline const V* multiplied(const V* values, int64_t n, V factor, V* buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = values[i] * factor;
  return buffer;
}

// The float or double scores of groups [begin, end), at most kKeyBuffer of them, in place or in `buffer`.
template <bool kMagnitude, class S, class V>
inline const V* group_values(const TopkTensor& t, int64_t begin, int64_t end, V* buffer) {
  if constexpr (sizeof(V) == 4) {
    if (t.block) {
      block_values<kMagnitude, S>(t, begin, end, buffer);
      return buffer;
    }
  }
  const V* const values = widened(static_cast<const S*>(t.score) + begin, end - begin, buffer);
  return t.factor == 1 ? values : multiplied(values, end - begin, static_cast<V>(t.factor), buffer);
}

// The float32 ones, on the fly or widened from any dtype.
template <bool kMagnitude>
inline const float* float_values(const TopkTensor& t, int64_t begin, int64_t end, float* buffer) {
  switch (t.dtype) {
    case Dtype::kBFloat16:
      return group_values<kMagnitude, BFloat16>(t, begin, end, buffer);
    case Dtype::kFloat16:
      return group_values<kMagnitude, Float16>(t, begin, end, buffer);
    case Dtype::kFloat64:
      return group_values<kMagnitude, double>(t, begin, end, buffer);
    default:
      return group_values<kMagnitude, float>(t, begin, end, buffer);
  }
}

template <bool kMagnitude, class Key, class S>
inline bool fill_keys(const TopkTensor& t, int64_t begin, int64_t end, Key* out) {
  typename ValueOf<Key>::type buffer[kKeyBuffer];
  return keys_of_values<kMagnitude>(group_values<kMagnitude, S>(t, begin, end, buffer), end - begin, out);
}

// Keys of groups [begin, end), at most kKeyBuffer of them; returns whether a score is NaN, candidate or not.
template <class Key>
__attribute__((noinline)) bool topk_keys(const TopkTensor& t, int64_t begin, int64_t end, Key* out) {
  const auto fill = [&]<class S>(S) {
    return t.magnitude ? fill_keys<true, Key, S>(t, begin, end, out) : fill_keys<false, Key, S>(t, begin, end, out);
  };
  bool nan = false;
  switch (t.dtype) {
    case Dtype::kBFloat16:
      nan = fill(BFloat16{});
      break;
    case Dtype::kFloat16:
      nan = fill(Float16{});
      break;
    case Dtype::kFloat64:
      nan = fill(double{});
      break;
    default:
      nan = fill(float{});
  }
  if (t.allowed) {
    for (int64_t i = 0; i < end - begin; ++i) {
      out[i] &= Key{0} - static_cast<Key>(t.allowed[(begin + i) >> 3] >> ((begin + i) & 7) & 1u);
    }
  }
  return nan;
}

}  // namespace
