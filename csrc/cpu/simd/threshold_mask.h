// Mask bits of what is above a number, over a range of one tensor. The contract is sparsekern/ops/threshold_mask.py.
#pragma once
#include <type_traits>

#include "masked_step.h"

namespace {

// `begin` is a multiple of 64. The threshold is one of the compute type.
void threshold_mask(const void* values, Dtype dtype, double threshold, int64_t begin, int64_t end, uint8_t* out,
                    int64_t* count) {
  *count = 0;
  with_types(dtype, [&]<class T, class S>(T, S) {
    using V = std::conditional_t<sizeof(T) == 8, Lane<double>, typename WideOf<float>::type>;
    const S* const value = static_cast<const S*>(values);
    const V bound = V::set(threshold);
    int64_t i = begin;
    for (; i + 64 <= end; i += 64) {
      __builtin_prefetch(value + i + 8192 / static_cast<int64_t>(sizeof(S)));
      uint64_t bits = 0;
      for (int j = 0; j < 64; j += V::kLanes) bits |= uint64_t{V::load(value + i + j).above(bound)} << j;
      __builtin_memcpy(out + i / 8, &bits, 8);
      *count += __builtin_popcountll(bits);
    }
    for (; i < end; i += 8) {
      uint32_t bits = 0;
      for (int64_t j = 0; j < 8 && i + j < end; ++j) {
        bits |= Lane<T>::load(value + i + j).above(Lane<T>::set(threshold)) << j;
      }
      out[i / 8] = static_cast<uint8_t>(bits);
      *count += __builtin_popcount(bits);
    }
  });
}

}  // namespace
