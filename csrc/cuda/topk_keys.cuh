// Keys of topk_mask: unsigned integers in the order of the scores, 0 for what is no candidate.
#pragma once
#include "device.cuh"
#include "kernels.h"
#include "numbers.cuh"

namespace sparsekern::cuda {
namespace {

__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ uint64_t ordered_bits(double x) {
  const uint64_t bits = __double_as_longlong(x);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// The key of one score that is no NaN; positive. Adding 0 makes 0 of -0.
__device__ __forceinline__ void make_key(float x, bool magnitude, uint32_t& key) {
  key = ordered_bits((magnitude ? fabsf(x) : x) + 0.0f);
}
__device__ __forceinline__ void make_key(double x, bool magnitude, uint64_t& key) {
  key = ordered_bits((magnitude ? fabs(x) : x) + 0.0);
}

// Where a group lies: its first weight, and the number of its weights, `inner` apart.
struct Place {
  uint32_t first, weights;
};

__device__ __forceinline__ Place place_of(const ScoreTensor& t, uint32_t group) {
  const uint32_t blocks = (t.axis + 3) / 4, row = group / t.inner, outer = row / blocks, block = row - outer * blocks;
  const uint32_t left = t.axis - 4 * block;
  return {(outer * t.axis + 4 * block) * t.inner + (group - row * t.inner), left < 4 ? left : 4};
}

__device__ __forceinline__ bool is_candidate(const ScoreTensor& t, uint32_t weight) {
  return !t.candidates || t.candidates[weight >> 3] >> (weight & 7) & 1;
}

// The score of a block: ((a + b) + c) + d in float32, that of a short one brought to the scale of four.
template <class S>
__device__ __forceinline__ float block_score(const ScoreTensor& t, const Place& p, bool magnitude, bool& allowed) {
  const S* const score = static_cast<const S*>(t.score);
  float sum = 0;
  for (uint32_t j = 0; j < p.weights; ++j) {
    const uint32_t i = p.first + j * t.inner;
    const float x = static_cast<float>(widen(score[i])), value = magnitude ? fabsf(x) : x;
    sum = j ? sum + value : value;
    allowed = allowed && is_candidate(t, i);
  }
  return p.weights == 4 ? sum : static_cast<float>(static_cast<double>(sum) * 4 / p.weights);
}

// The key of one group, by its number in storage order; `nan` learns of a score that is none.
template <class S, class Key>
__device__ __forceinline__ Key compute_key(const ScoreTensor& t, uint32_t group, bool magnitude, bool& nan) {
  using C = typename std::conditional<sizeof(Key) == 8, double, float>::type;
  bool allowed = true;
  C score;
  if (t.width == 1) {
    score = widen(static_cast<const S*>(t.score)[group]);
    allowed = is_candidate(t, group);
  } else {
    score = block_score<S>(t, place_of(t, group), magnitude, allowed);
    magnitude = false;
  }
  nan = nan || score != score;
  Key key;
  make_key(score, magnitude, key);
  return allowed ? key : 0;
}

// body(S()) with the type of a tensor's elements.
template <class F>
__device__ __forceinline__ void with_type(Dtype dtype, const F& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float());
    case Dtype::kFloat64:
      return body(double());
    case Dtype::kBFloat16:
      return body(__nv_bfloat16());
    case Dtype::kFloat16:
      return body(__half());
  }
}

// From the logical order of groups to that of storage.
__device__ __forceinline__ uint32_t storage_group(const ScoreTensor& t, uint32_t logical) {
  if (t.dims == 0) return logical;
  uint32_t found = 0;
  for (int d = static_cast<int>(t.dims) - 1; d >= 0; --d) {
    const uint32_t rest = logical / t.sizes[d];
    found += (logical - rest * t.sizes[d]) * t.strides[d];
    logical = rest;
  }
  return found;
}

}  // namespace
}  // namespace sparsekern::cuda
