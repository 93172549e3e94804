// Exact selection of groups over ranges of one tensor: bracket scans, radix histograms, tie counts and mask bits.
// The contract is sparsekern/ops/topk_mask.py. Ranges start at a multiple of 64 groups, so no two share a mask byte.
#pragma once
#include "topk_bits.h"
#include "topk_keys.h"

namespace {

using sparsekern::TopkFound;
using sparsekern::TopkLevel;

// Calls body(keys, n, first) for each buffer of keys in [begin, end), filled up with 0 to a multiple of 64. Returns
// whether a score is NaN.
template <class Key, class F>
inline bool each_buffer(const TopkTensor& t, int64_t begin, int64_t end, const F& body) {
  Key keys[kKeyBuffer];
  bool nan = false;
  for (; begin < end; begin += kKeyBuffer) {
    const int64_t n = end - begin < kKeyBuffer ? end - begin : kKeyBuffer;
    nan |= topk_keys(t, begin, begin + n, keys);
    for (int64_t i = n; i % 64; ++i) keys[i] = 0;
    body(keys, n, begin);
  }
  return nan;
}

// Keys of the `count` groups `at`, not wide.
void topk_gather(const TopkTensor& t, const int64_t* at, int64_t count, uint32_t* out) {
  if (!t.block) {
    // All of them miss the caches: without this, one after the other.
    const int64_t size = t.dtype == Dtype::kFloat64 ? 8 : t.dtype == Dtype::kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(static_cast<const char*>(t.score) + at[i] * size);
  }
  for (int64_t i = 0; i < count; ++i) topk_keys(t, at[i], at[i] + 1, out + i);
}

// What a scan collects, and how far it has come.
struct Collected {
  uint32_t* keys;
  uint16_t* places;
  TopkFound found;
};

// The `n` <= 64 values `x`, those of the groups from `group` on, `place` in the range.
template <bool kMagnitude>
inline void scan_word(const TopkTensor& t, const float* x, int64_t n, uint32_t lo, uint32_t over, int64_t group,
                      int64_t place, Collected& to) {
  uint64_t inside, above, allowed = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  to.found.nan |= bracket_bits<kMagnitude>(x, lo, over, &inside, &above);
  if (t.allowed) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, t.allowed + group / 8, n < 64 ? (n + 7) / 8 : 8);
    allowed &= bits;
  }
  above &= allowed;
  to.found.above += __builtin_popcountll(above);
  put_bits(t.chosen + group / 8, above, n);
  for (inside &= allowed; inside; inside &= inside - 1) {
    const int i = __builtin_ctzll(inside);
    to.keys[to.found.within] = key_of<kMagnitude, uint32_t>(x[i]);
    to.places[to.found.within++] = static_cast<uint16_t>(place + i);
  }
}

// Keys are made in registers and compared there, so that the pass waits for nothing but the scores.
template <bool kMagnitude>
__attribute__((noinline)) void scan(const TopkTensor& t, uint32_t lo, uint32_t over, int64_t begin, int64_t end,
                                    Collected& to) {
  float buffer[kKeyBuffer];
  Ahead ahead(t, begin);
  for (int64_t first = begin; first < end; first += kKeyBuffer) {
    const int64_t n = end - first < kKeyBuffer ? end - first : kKeyBuffer;
    const float* const x = float_values<kMagnitude>(t, first, first + n, buffer);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      ahead.next();
      scan_word<kMagnitude>(t, x + i, 64, lo, over, first + i, first - begin + i, to);
    }
    if (i < n) {
      float last[64] = {};
      __builtin_memcpy(last, x + i, (n - i) * sizeof(float));
      scan_word<kMagnitude>(t, last, n - i, lo, over, first + i, first - begin + i, to);
    }
  }
}

// Group bits of keys > `hi`; keys in [lo, hi] are appended to `keys`, with their places in the range to `places`.
void topk_scan(const TopkTensor& t, uint32_t lo, uint32_t hi, int64_t begin, int64_t end, uint32_t* keys,
               uint16_t* places, TopkFound* found) {
  Collected to{keys, places, {0, 0, false}};
  if (t.magnitude) {
    scan<true>(t, lo, hi + 1, begin, end, to);
  } else {
    scan<false>(t, lo, hi + 1, begin, end, to);
  }
  *found = to.found;
}

template <class Key>
inline bool histogram_of(const TopkTensor& t, const TopkLevel& level, int64_t begin, int64_t end, uint32_t* histogram) {
  const uint32_t size = 1u << level.bits, last = size - 1;
  const int shift = level.shift, top = shift + level.bits;
  return each_buffer<Key>(t, begin, end, [&](const Key* keys, int64_t n, int64_t) {
    if (top == 8 * sizeof(Key)) {
      // Two histograms in turn, so that equal neighbours do not wait for each other.
      for (int64_t i = 0; i < n; ++i) ++histogram[(i & 1) * size + static_cast<uint32_t>(keys[i] >> shift)];
      return;
    }
    // Few keys share the prefix. No number has the highest prefix, so `least + (1 << top)` does not wrap.
    const Key least = static_cast<Key>(level.prefix) << top, above = least + (Key{1} << top);
    for (int64_t i = 0; i < n; i += 64) {
      uint64_t bits = at_least_bits(keys + i, least) & ~at_least_bits(keys + i, above);
      if (n - i < 64) bits &= (uint64_t{1} << (n - i)) - 1;
      for (; bits; bits &= bits - 1) ++histogram[(keys[i + __builtin_ctzll(bits)] >> shift) & last];
    }
  });
}

// Adds to two histograms of 1 << level.bits counters each; their sum counts.
void topk_histogram(const TopkTensor& t, const TopkLevel& level, int64_t begin, int64_t end, uint32_t* histogram,
                    bool* nan) {
  *nan |= t.wide ? histogram_of<uint64_t>(t, level, begin, end, histogram)
                 : histogram_of<uint32_t>(t, level, begin, end, histogram);
}

template <class Key>
inline void choose(const TopkTensor& t, Key least, int64_t ties, int64_t begin, int64_t end, uint8_t* out,
                   TopkFound* found) {
  int64_t chosen = 0, tied = 0;
  const bool nan = each_buffer<Key>(t, begin, end, [&](const Key* keys, int64_t n, int64_t first) {
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t above = at_least_bits(keys + i, least);
      uint64_t bits = above, equal = at_least_bits(keys + i, static_cast<Key>(least - 1)) & ~above;
      if (n - i < 64) equal &= (uint64_t{1} << (n - i)) - 1;
      chosen += __builtin_popcountll(above);
      tied += __builtin_popcountll(equal);
      for (; equal && ties > 0; --ties, equal &= equal - 1) bits |= equal & (~equal + 1);
      if (out) put_bits(out + (first + i) / 8, bits, n - i);
    }
  });
  *found = {chosen, tied, nan};
}

// Into `out`, unless null: the bits of keys >= `least` and of the first `ties` keys equal to least - 1. `found` counts
// both kinds whatever `ties` is. `least` is at least 1.
void topk_choose(const TopkTensor& t, uint64_t least, int64_t ties, int64_t begin, int64_t end, uint8_t* out,
                 TopkFound* found) {
  if (t.wide) {
    choose<uint64_t>(t, least, ties, begin, end, out, found);
  } else {
    choose<uint32_t>(t, static_cast<uint32_t>(least), ties, begin, end, out, found);
  }
}

}  // namespace
