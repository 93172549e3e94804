// Soft thresholds over a range of one tensor: single weights, or whole output channels that are rescaled. The contract
// is sparsekern/ops/soft_threshold.py.
#pragma once
#include "sums.h"

namespace {

using sparsekern::ShrinkTensor;

// V computes, S is the type in memory.
template <class V, class S>
struct Shrink {
  static constexpr int kLanes = V::kLanes;
  S* const output;
  const S* const weight;
  const S* const gradient;
  const V negative_threshold, scale;

  Shrink(const ShrinkTensor& t, double scaled)
      : output(static_cast<S*>(t.output)),
        weight(static_cast<const S*>(t.weight)),
        gradient(static_cast<const S*>(t.gradient)),
        negative_threshold(V::set(t.threshold).negate()),
        scale(V::set(scaled)) {}

  inline __attribute__((always_inline)) V value(int64_t i) const {
    const V w = V::load(weight + i), rest = w.magnitude() + negative_threshold;
    if (gradient) return V::load(gradient + i).unless_at_most_zero(rest);
    return scale * rest.times_sign(w).unless_at_most_zero(rest);
  }
  inline __attribute__((always_inline)) void update(int64_t i) const { value(i).store(output + i); }
};

template <bool kStream, class V, class S>
inline int64_t shrink_all(const Shrink<V, S> k, int64_t i, int64_t end) {
  for (; i + V::kLanes <= end; i += V::kLanes) {
    constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(S));
    __builtin_prefetch(k.weight + i + kAhead);
    if (k.gradient) __builtin_prefetch(k.gradient + i + kAhead);
    if constexpr (kStream) {
      k.value(i).stream(k.output + i);
    } else {
      k.update(i);
    }
  }
  return i;
}

// Adds the magnitudes of [i, end) to `all`, and of those above the threshold to `above`; returns where vectors end.
template <class V, class S>
inline int64_t add_sizes(const Shrink<V, S> k, int64_t i, int64_t end, double& all, double& above) {
  constexpr int64_t kStretch = kSumVectors * V::kLanes;
  while (i + V::kLanes <= end) {
    const int64_t stop = end - i < kStretch ? end : i + kStretch;
    V whole = V::set(0), kept = V::set(0);
    for (; i + V::kLanes <= stop; i += V::kLanes) {
      __builtin_prefetch(k.weight + i + 8192 / static_cast<int64_t>(sizeof(S)));
      const V size = V::load(k.weight + i).magnitude();
      whole = whole + size;
      kept = kept + size.unless_at_most_zero(size + k.negative_threshold);
    }
    all += sum_of(whole);
    above += sum_of(kept);
  }
  return i;
}

template <class Wide, class Narrow, class S>
inline void soft_threshold_range(const ShrinkTensor& t, int64_t begin, int64_t end) {
  const int64_t row = t.row ? t.row : end - begin;
  for (; begin < end; begin += row) {
    double scale = 1;
    if (t.row) {
      double all = 0, above = 0;
      const int64_t done = add_sizes(Shrink<Wide, S>(t, 1), begin, begin + row, all, above);
      add_sizes(Shrink<Narrow, S>(t, 1), done, begin + row, all, above);
      const double count = static_cast<double>(row), share = (above / count + 1e-6) / (all / count + 1e-6);
      scale = 1.01 / (share + 0.01);
    }
    const Shrink<Wide, S> wide(t, scale);
    int64_t done = begin;
    if constexpr (sizeof(S) == 4) {
      if (t.stream) done = shrink_all<true>(wide, begin, begin + row);
    }
    done = shrink_all<false>(wide, done, begin + row);
    step_all(Shrink<Narrow, S>(t, scale), done, begin + row);
  }
  if (t.stream) Wide::fence();
}

// Elements [begin, end): with `row` whole rows of so many, else any.
void soft_threshold(const ShrinkTensor& t, int64_t begin, int64_t end) {
  with_types(t.dtype, [&]<class T, class S>(T, S) {
    if constexpr (sizeof(T) == 8) {
      soft_threshold_range<Lane<double>, Lane<double>, S>(t, begin, end);
    } else {
      soft_threshold_range<typename WideOf<float>::type, Lane<float>, S>(t, begin, end);
    }
  });
}

}  // namespace
