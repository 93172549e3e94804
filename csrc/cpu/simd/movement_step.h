// One step of the scores of movement pruning over a range of one tensor. The contract is
// sparsekern/ops/movement_step.py.
#pragma once
#include "masked_step.h"

namespace {

using sparsekern::MovementOptions;
using sparsekern::MovementTensor;

// sigmoid(x) * (1 - sigmoid(x)), by e / (1 + e)^2 with e = exp(-|x|). The logarithm of 2 in two parts, the first of few
// bits, and the series of exp on half of it to each side.
template <class V>
inline __attribute__((always_inline)) V sigmoid_slope(V x) {
  const V bias = V::set(kPowerBias), one = V::set(1);
  const V a = smaller(x.magnitude(), V::set(87)).negate();
  const V biased = fma(a, V::set(1.44269504), bias), n = biased + bias.negate();
  const V r = fma(n, V::set(2.12194440e-4), fma(n, V::set(-0.693359375), a));
  constexpr double kSeries[] = {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
  V p = V::set(1.0 / 5040);
  for (const double c : kSeries) p = fma(p, r, V::set(c));
  const V e = p * biased.power(), sum = one + e;
  return e / (sum * sum);
}

// V computes, S is the type of weights and gradients in memory.
template <class V, class S>
struct MovementStep {
  static constexpr int kLanes = V::kLanes;
  float* const score;
  S* const grad;
  const S* const weight;
  const uint8_t* const mask;
  const bool penalised, scaled;
  const V negative_lr, penalty, scale;

  MovementStep(const MovementTensor& t, const MovementOptions& o)
      : score(t.score),
        grad(static_cast<S*>(t.grad)),
        weight(static_cast<const S*>(t.weight)),
        mask(t.mask),
        penalised(t.penalty != 0),
        scaled(o.scaled),
        negative_lr(V::set(o.negative_lr)),
        penalty(V::set(t.penalty)),
        scale(V::set(o.grad_scale)) {}

  inline __attribute__((always_inline)) void update(int64_t i) const {
    constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(S));
    __builtin_prefetch(score + i + kAhead);
    __builtin_prefetch(grad + i + kAhead);
    __builtin_prefetch(weight + i + kAhead);
    const V g = V::load(grad + i), s = V::load(score + i);
    V u = g * V::load(weight + i);
    if (scaled) u = u / scale;
    if (penalised) u = fma(penalty, sigmoid_slope(s), u);
    fma(negative_lr, u, s).store(score + i);
    if (mask) g.keep(mask_bits<kLanes>(mask, i)).store(grad + i);
  }
};

void movement_step(const MovementTensor& t, const MovementOptions& o, int64_t begin, int64_t end) {
  const auto run = [&]<class S>(S) {
    const int64_t done = step_all(MovementStep<typename WideOf<float>::type, S>(t, o), begin, end);
    step_all(MovementStep<Lane<float>, S>(t, o), done, end);
  };
  if (t.dtype == Dtype::kFloat32) return run(float{});
  t.dtype == Dtype::kBFloat16 ? run(BFloat16{}) : run(Float16{});
}

}  // namespace
