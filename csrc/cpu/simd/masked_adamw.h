// One step of AdamW over [begin, end) of one tensor. The contract is sparsekern/ops/masked_adamw.py.
#pragma once
#include "masked_step.h"

namespace {

using sparsekern::AdamwOptions;
using sparsekern::AdamwTensor;

// V computes in T, S is the type in memory.
template <class V, class T, class S>
struct MaskedAdamw {
  static constexpr int kLanes = V::kLanes;
  S* const param;
  const S* const grad;
  S* const first;
  S* const second;
  const uint8_t* const mask;
  const bool near, decays, maximize, scaled;
  const V weight, beta2, rest2, eps, shrink, scale, negative_step_size, correction;

  MaskedAdamw(const AdamwTensor& t, const AdamwOptions& o)
      : param(static_cast<S*>(t.param)),
        grad(static_cast<const S*>(t.grad)),
        first(static_cast<S*>(t.first)),
        second(static_cast<S*>(t.second)),
        mask(t.mask),
        near(static_cast<T>(o.one_minus_beta1) < T(0.5)),
        decays(o.decays),
        maximize(o.maximize),
        scaled(o.scaled),
        weight(V::set(near ? o.one_minus_beta1 : static_cast<T>(o.one_minus_beta1) - T(1))),
        beta2(V::set(o.beta2)),
        rest2(V::set(o.one_minus_beta2)),
        eps(V::set(o.eps)),
        shrink(V::set(o.shrink)),
        scale(V::set(o.grad_scale)),
        negative_step_size(V::set(t.negative_step_size)),
        correction(V::set(t.correction)) {}

  inline __attribute__((always_inline)) void update(int64_t i) const {
    const uint32_t bits = mask_bits<kLanes>(mask, i);
    V p = V::load(param + i), g = V::load(grad + i), m = V::load(first + i), v = V::load(second + i);
    if (scaled) g = g / scale;
    if (maximize) g = g.negate();
    if (decays) p = p * shrink;
    m = fma(weight, g + m.negate(), near ? m : g);
    v = fma(rest2 * g, g, v * beta2);
    p = p + negative_step_size * m / (v.root() / correction + eps);
    // Lanes do not mix, so NaN and Inf of pruned entries end here.
    m.keep(bits).store(first + i);
    v.keep(bits).store(second + i);
    p.keep(bits).store(param + i);
  }

  // Into the second-level cache, as for masked_sgd.
  void prefetch(int64_t i) const {
    __builtin_prefetch(param + i, 0, 2);
    __builtin_prefetch(grad + i, 0, 2);
    __builtin_prefetch(first + i, 0, 2);
    __builtin_prefetch(second + i, 0, 2);
  }
};

void masked_adamw(const AdamwTensor& t, const AdamwOptions& o, int64_t begin, int64_t end) {
  with_types(t.dtype, [&]<class T, class S>(T, S) {
    using Wide = MaskedAdamw<typename WideOf<T>::type, T, S>;
    masked_step(Wide(t, o), MaskedAdamw<Lane<T>, T, S>(t, o), t.known_zero, begin, end);
  });
}

}  // namespace
