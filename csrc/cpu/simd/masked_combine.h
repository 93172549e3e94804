// Two weighted sums of two tensors, chosen between by a mask, over [begin, end) of one entry. The contract is
// sparsekern/ops/masked_combine.py.
#pragma once
#include "masked_step.h"

namespace {

using sparsekern::CombineOptions;
using sparsekern::CombineTensor;

template <class V>
struct Term {
  const bool there, whole;  // coefficients 0 and 1 multiply nothing
  const V factor;
  explicit Term(double x) : there(x != 0), whole(x == 1), factor(V::set(x)) {}
  inline __attribute__((always_inline)) V of(V x) const { return whole ? x : factor * x; }
};

// V computes, S is the type in memory. `kMore`: there is `times` or `within`, whose tests would slow the others down.
template <class V, class S, bool kMore>
struct MaskedCombine {
  static constexpr int kLanes = V::kLanes;
  S* const output;
  const S* const first;
  const S* const second;
  const S* const times;
  const uint8_t* const mask;
  const uint8_t* const within;
  const bool scaled, magnitude;
  const V scale;
  const Term<V> live_first, live_second, pruned_first, pruned_second;

  MaskedCombine(const CombineTensor& t, const CombineOptions& o)
      : output(static_cast<S*>(t.output)),
        first(static_cast<const S*>(t.first)),
        second(static_cast<const S*>(t.second)),
        times(static_cast<const S*>(t.times)),
        mask(t.mask),
        within(t.within),
        scaled(o.scaled),
        magnitude(o.magnitude),
        scale(V::set(o.scale)),
        live_first(o.live[0]),
        live_second(o.live[1]),
        pruned_first(o.pruned[0]),
        pruned_second(o.pruned[1]) {}

  inline __attribute__((always_inline)) V sum(const Term<V>& a, V x, const Term<V>& b, V y, V z) const {
    if (!b.there) return a.there ? a.of(x) : V::set(0);
    V term = b.of(y);
    if (kMore && times) term = term * z;
    if (scaled) term = term * scale;
    return a.there ? a.of(x) + term : term;
  }

  inline __attribute__((always_inline)) V value(int64_t i) const {
    const V x = V::load(first + i), y = second ? V::load(second + i) : x;
    V z = x;
    if (kMore && times) z = magnitude ? V::load(times + i).magnitude() : V::load(times + i);
    V found = sum(live_first, x, live_second, y, z);
    if (mask) found = found.or_else(mask_bits<kLanes>(mask, i), sum(pruned_first, x, pruned_second, y, z));
    return kMore && within ? found.keep(mask_bits<kLanes>(within, i)) : found;
  }
  inline __attribute__((always_inline)) void update(int64_t i) const { value(i).store(output + i); }

  // The processor alone looks too few vectors ahead.
  inline __attribute__((always_inline)) void ahead(int64_t i) const {
    constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(S));
    __builtin_prefetch(first + i + kAhead);
    if (second) __builtin_prefetch(second + i + kAhead);
    if (kMore && times) __builtin_prefetch(times + i + kAhead);
  }
};

// As step_all, with memory read ahead. `kStream`: past the caches, which saves reading the lines that are written.
template <bool kStream, class V, class S, bool kMore>
inline int64_t combine_all(const MaskedCombine<V, S, kMore> k, int64_t i, int64_t end) {
  for (; i + V::kLanes <= end; i += V::kLanes) {
    k.ahead(i);
    if constexpr (kStream) {
      k.value(i).stream(k.output + i);
    } else {
      k.update(i);
    }
  }
  if constexpr (kStream) V::fence();
  return i;
}

template <class T, class S, bool kMore>
inline void combine_range(const CombineTensor& t, const CombineOptions& o, int64_t begin, int64_t end) {
  const MaskedCombine<typename WideOf<T>::type, S, kMore> wide(t, o);
  const MaskedCombine<Lane<T>, S, kMore> narrow(t, o);
  if constexpr (sizeof(S) == 4) {
    if (t.stream) return (void)step_all(narrow, combine_all<true>(wide, begin, end), end);
  }
  step_all(narrow, combine_all<false>(wide, begin, end), end);
}

void masked_combine(const CombineTensor& t, const CombineOptions& o, int64_t begin, int64_t end) {
  with_types(t.dtype, [&]<class T, class S>(T, S) {
    if (t.times || t.within) return combine_range<T, S, true>(t, o, begin, end);
    combine_range<T, S, false>(t, o, begin, end);
  });
}

}  // namespace
