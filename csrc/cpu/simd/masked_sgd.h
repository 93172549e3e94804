// One step of SGD with momentum over [begin, end) of one tensor; `begin` is a multiple of 16 so that lanes and mask
// bits line up. The contract is sparsekern/ops/masked_sgd.py.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::Dtype;
using sparsekern::SgdOptions;
using sparsekern::SgdTensor;

// The mask bits of V::kLanes elements from element i on. No vector straddles a 16-bit word.
template <int kLanes>
inline uint32_t mask_bits(const uint8_t* mask, int64_t i) {
  if (!mask) return 0xffffu;
  if (kLanes == 16) return static_cast<uint32_t>(mask[i >> 3]) | static_cast<uint32_t>(mask[(i >> 3) + 1]) << 8;
  return static_cast<uint32_t>(mask[i >> 3]) >> (i & 7);
}

template <class V, class S>
inline int64_t masked_sgd_span(const SgdTensor& t, const SgdOptions& o, int64_t i, int64_t end) {
  S* const param = static_cast<S*>(t.param);
  const S* const grad = static_cast<const S*>(t.grad);
  S* const momentum = static_cast<S*>(t.momentum);
  const V negative_lr = V::set(o.negative_lr), mu = V::set(o.mu), decay = V::set(o.weight_decay);
  const V gain = V::set(o.one_minus_dampening), scale = V::set(o.grad_scale);
  constexpr uint32_t kAll = (uint32_t{1} << V::kLanes) - 1;
  const bool skip = t.known_zero && t.mask;
  for (; i + V::kLanes <= end; i += V::kLanes) {
    const uint32_t bits = mask_bits<V::kLanes>(t.mask, i);
    // Sixteen float32 are a cache line: what is not touched here need not come from memory.
    if (skip && (bits & kAll) == 0) continue;
    // Selecting before the arithmetic keeps NaN and Inf of pruned entries out of everything.
    const V p = V::load(param + i).keep(bits);
    V g = V::load(grad + i).keep(bits);
    if (o.scaled) g = g / scale;
    if (o.maximize) g = g.negate();
    if (o.weight_decay != 0) g = fma(decay, p, g);
    V u = g;
    if (momentum) {
      V v = t.fresh ? g : fma(gain, g, mu * V::load(momentum + i));
      if (!o.keep_pruned_momentum) v = v.keep(bits);
      u = o.nesterov ? fma(mu, v, g) : v;
      v.store(momentum + i);
    }
    fma(negative_lr, u, p).keep(bits).store(param + i);
  }
  return i;
}

template <class T, class S>
inline void masked_sgd_typed(const SgdTensor& t, const SgdOptions& o, int64_t begin, int64_t end) {
  const int64_t done = masked_sgd_span<typename WideOf<T>::type, S>(t, o, begin, end);
  masked_sgd_span<Lane<T>, S>(t, o, done, end);
}

void masked_sgd(const SgdTensor& t, const SgdOptions& o, int64_t begin, int64_t end) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return masked_sgd_typed<float, float>(t, o, begin, end);
    case Dtype::kFloat64:
      return masked_sgd_typed<double, double>(t, o, begin, end);
    case Dtype::kBFloat16:
      return masked_sgd_typed<float, BFloat16>(t, o, begin, end);
    case Dtype::kFloat16:
      return masked_sgd_typed<float, Float16>(t, o, begin, end);
  }
}

}  // namespace
