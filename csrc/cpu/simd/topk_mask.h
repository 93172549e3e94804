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
  for (int64_t i = 0; i < count; ++i) topk_keys(t, at[i], at[i] + 1, out + i);
}

// Group bits of keys > `hi`; keys in [lo, hi] are appended to `keys`, with their places in the range to `places`.
void topk_scan(const TopkTensor& t, uint32_t lo, uint32_t hi, int64_t begin, int64_t end, uint32_t* keys,
               uint16_t* places, TopkFound* found) {
  int64_t chosen = 0, candidates = 0;
  const bool nan = each_buffer<uint32_t>(t, begin, end, [&](const uint32_t* buffer, int64_t n, int64_t first) {
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t above = at_least_bits(buffer + i, hi + 1);
      uint64_t inside = at_least_bits(buffer + i, lo) & ~above;
      chosen += __builtin_popcountll(above);
      put_bits(t.chosen + (first + i) / 8, above, n - i);
      for (; inside; inside &= inside - 1) {
        const int64_t place = i + __builtin_ctzll(inside);
        keys[candidates] = buffer[place];
        places[candidates++] = static_cast<uint16_t>(first - begin + place);
      }
    }
  });
  *found = {chosen, candidates, nan};
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
