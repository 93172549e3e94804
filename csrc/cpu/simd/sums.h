// Sums over ranges of one tensor: in float over short stretches, then in double.
#pragma once
#include <type_traits>

#include "masked_step.h"

namespace {

// So many vectors in one float sum that its rounding does not matter.
constexpr int64_t kSumVectors = 256;

template <class V>
inline double sum_of(V v) {
  std::conditional_t<sizeof(V) / V::kLanes == 8, double, float> lanes[V::kLanes];
  v.store(lanes);
  double sum = 0;
  for (const auto lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

// Adds `value` times the sign of `sign` over [i, end) to `total`; returns where vectors end.
template <class V, class S>
inline int64_t add_signed(const S* value, const S* sign, int64_t i, int64_t end, double& total) {
  constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(S));
  while (i + V::kLanes <= end) {
    const int64_t most = kSumVectors * V::kLanes, stop = end - i < most ? end : i + most;
    V sum = V::set(0);
    for (; i + V::kLanes <= stop; i += V::kLanes) {
      __builtin_prefetch(value + i + kAhead);
      __builtin_prefetch(sign + i + kAhead);
      const V s = V::load(sign + i);
      sum = sum + V::load(value + i).times_sign(s).unless_at_most_zero(s.magnitude());
    }
    total += sum_of(sum);
  }
  return i;
}

// The contract is sparsekern/ops/signed_sums.py.
void signed_sum(const void* values, const void* signs, Dtype dtype, int64_t begin, int64_t end, double* out) {
  *out = 0;
  with_types(dtype, [&]<class T, class S>(T, S) {
    using Wide = std::conditional_t<sizeof(T) == 8, Lane<double>, typename WideOf<float>::type>;
    const S *const value = static_cast<const S*>(values), *const sign = static_cast<const S*>(signs);
    const int64_t done = add_signed<Wide>(value, sign, begin, end, *out);
    add_signed<Lane<T>>(value, sign, done, end, *out);
  });
}

}  // namespace
