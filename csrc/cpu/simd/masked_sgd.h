// One step of SGD with momentum over [begin, end) of one tensor. The contract is sparsekern/ops/masked_sgd.py.
#pragma once
#include "masked_step.h"

namespace {

using sparsekern::SgdOptions;
using sparsekern::SgdTensor;

// V computes, S is the type in memory. `kMore`: with what few steps ask for, whose tests take a tenth of the time of
// the others.
template <class V, class S, bool kMore>
struct MaskedSgd {
  static constexpr int kLanes = V::kLanes;
  S* const param;
  const S* const grad;
  S* const momentum;
  const uint8_t* const mask;
  const uint8_t* const inner;
  const bool fresh, decays, nesterov, maximize, keep_pruned_momentum, freeze_pruned, scaled;
  const V negative_lr, mu, decay, outer_decay, gain, scale;

  MaskedSgd(const SgdTensor& t, const SgdOptions& o)
      : param(static_cast<S*>(t.param)),
        grad(static_cast<const S*>(t.grad)),
        momentum(static_cast<S*>(t.momentum)),
        mask(t.mask),
        inner(t.inner),
        fresh(t.fresh),
        decays(t.inner || o.weight_decay != 0),
        nesterov(o.nesterov),
        maximize(o.maximize),
        keep_pruned_momentum(o.keep_pruned_momentum),
        freeze_pruned(o.freeze_pruned),
        scaled(o.scaled),
        negative_lr(V::set(o.negative_lr)),
        mu(V::set(o.mu)),
        decay(V::set(t.inner ? o.inner_decay : o.weight_decay)),
        outer_decay(V::set(o.outer_decay)),
        gain(V::set(o.one_minus_dampening)),
        scale(V::set(o.grad_scale)) {}

  inline __attribute__((always_inline)) void update(int64_t i) const {
    const uint32_t bits = mask_bits<kLanes>(mask, i);
    // Selecting before the arithmetic keeps NaN and Inf of pruned entries out of everything.
    const V stored = V::load(param + i), p = stored.keep(bits);
    V g = V::load(grad + i).keep(bits);
    if (kMore && scaled) g = g / scale;
    if (kMore && maximize) g = g.negate();
    if (decays) g = fma(kMore && inner ? decay.or_else(mask_bits<kLanes>(inner, i), outer_decay) : decay, p, g);
    V u = g;
    if (momentum) {
      V v = kMore && fresh ? g : fma(gain, g, mu * V::load(momentum + i));
      if (!(kMore && keep_pruned_momentum)) v = v.keep(bits);
      u = nesterov ? fma(mu, v, g) : v;
      v.store(momentum + i);
    }
    const V next = fma(negative_lr, u, p);
    (kMore && freeze_pruned ? next.or_else(bits, stored) : next.keep(bits)).store(param + i);
  }

  // Into the second-level cache. Into the first, the hardware would fetch neighbours too, which nobody needs: measured
  // (Zen 4, two threads, 25M float32) 1.6x slower at 18% live and 2x at 8%.
  void prefetch(int64_t i) const {
    __builtin_prefetch(param + i, 0, 2);
    __builtin_prefetch(grad + i, 0, 2);
    if (momentum) __builtin_prefetch(momentum + i, 0, 2);
  }
};

void masked_sgd(const SgdTensor& t, const SgdOptions& o, int64_t begin, int64_t end) {
  with_types(t.dtype, [&]<class T, class S>(T, S) {
    using Wide = typename WideOf<T>::type;
    const MaskedSgd<Lane<T>, S, true> narrow(t, o);
    if (t.fresh || t.inner || o.scaled || o.maximize || o.keep_pruned_momentum || o.freeze_pruned) {
      masked_step(MaskedSgd<Wide, S, true>(t, o), narrow, t.known_zero, begin, end);
    } else {
      masked_step(MaskedSgd<Wide, S, false>(t, o), narrow, t.known_zero, begin, end);
    }
  });
}

}  // namespace
