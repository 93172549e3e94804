// Exact selection of groups by magnitude: radix histograms, tie counts and mask bits over ranges of one tensor.
// The contract is sparsekern/ops/topk_mask.py. Keys are unsigned integers that order as the scores do.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::TopkLevel;
using sparsekern::TopkTensor;

inline float score_value(float x) { return x; }
template <class S>
inline float score_value(S x) {
  return widen(x);
}

template <bool kMagnitude, class S>
inline float weight_value(S x) {
  const float value = score_value(x);
  return kMagnitude ? __builtin_fabsf(value) : value;
}

// Adding 0 makes -0 equal to 0. NaN is reported apart, so where it sorts does not matter.
template <bool kMagnitude>
inline uint32_t key_of(float value) {
  if (kMagnitude) return as_bits(value) << 1;
  const uint32_t bits = as_bits(value + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

template <bool kMagnitude, class S>
inline float block_value(const S* x, int64_t step, int64_t count) {
  float sum = weight_value<kMagnitude>(x[0]);
  for (int64_t j = 1; j < count; ++j) sum = sum + weight_value<kMagnitude>(x[j * step]);
  return count == 4 ? sum : static_cast<float>(static_cast<double>(sum) * 4 / static_cast<double>(count));
}

constexpr int64_t kKeyBuffer = 1024;

// Keys of groups [begin, end), at most kKeyBuffer of them; returns whether one is NaN.
template <bool kMagnitude, class S>
inline bool fill_keys(const TopkTensor& t, int64_t begin, int64_t end, uint32_t* out) {
  const S* const data = static_cast<const S*>(t.score);
  uint32_t nan = 0;
  if (!t.block) {
    for (int64_t i = 0; i < end - begin; ++i) {
      const float value = weight_value<kMagnitude>(data[begin + i]);
      nan |= static_cast<uint32_t>(value != value);
      out[i] = key_of<kMagnitude>(value);
    }
    return nan != 0;
  }
  const int64_t blocks = (t.axis + 3) / 4, inner = t.inner;
  if (inner == 1 && t.axis % 4 == 0) {
    for (int64_t i = 0; i < end - begin; ++i) {
      const float value = block_value<kMagnitude>(data + 4 * (begin + i), 1, 4);
      nan |= static_cast<uint32_t>(value != value);
      out[i] = key_of<kMagnitude>(value);
    }
    return nan != 0;
  }
  int64_t row = begin / inner, column = begin % inner;
  while (begin < end) {
    const int64_t outer = row / blocks, block = row % blocks;
    const int64_t run = inner - column < end - begin ? inner - column : end - begin;
    const int64_t count = t.axis - 4 * block < 4 ? t.axis - 4 * block : 4;
    const S* const x = data + (outer * t.axis + 4 * block) * inner + column;
    for (int64_t i = 0; i < run; ++i) {
      const float value =
          count == 4 ? block_value<kMagnitude>(x + i, inner, 4) : block_value<kMagnitude>(x + i, inner, count);
      nan |= static_cast<uint32_t>(value != value);
      out[i] = key_of<kMagnitude>(value);
    }
    out += run;
    begin += run;
    column = 0;
    ++row;
  }
  return nan != 0;
}

inline bool topk_keys(const TopkTensor& t, int64_t begin, int64_t end, uint32_t* out) {
  switch (t.dtype) {
    case sparsekern::Dtype::kBFloat16:
      return t.magnitude ? fill_keys<true, BFloat16>(t, begin, end, out)
                         : fill_keys<false, BFloat16>(t, begin, end, out);
    case sparsekern::Dtype::kFloat16:
      return t.magnitude ? fill_keys<true, Float16>(t, begin, end, out) : fill_keys<false, Float16>(t, begin, end, out);
    default:
      return t.magnitude ? fill_keys<true, float>(t, begin, end, out) : fill_keys<false, float>(t, begin, end, out);
  }
}

// Two interleaved histograms of 1 << level.bits counters, so that equal neighbours do not wait for each other.
void topk_histogram(const TopkTensor& t, const TopkLevel& level, int64_t begin, int64_t end, uint32_t* histogram,
                    bool* nan) {
  uint32_t keys[kKeyBuffer];
  const uint32_t size = 1u << level.bits, last = size - 1;
  const int shift = level.shift, top = shift + level.bits;
  for (; begin < end; begin += kKeyBuffer) {
    const int64_t n = end - begin < kKeyBuffer ? end - begin : kKeyBuffer;
    if (topk_keys(t, begin, begin + n, keys)) *nan = true;
    if (top == 32) {
      uint32_t* const odd = histogram + size;
      int64_t i = 0;
      for (; i + 4 <= n; i += 4) {
        ++histogram[keys[i] >> shift];
        ++odd[keys[i + 1] >> shift];
        ++histogram[keys[i + 2] >> shift];
        ++odd[keys[i + 3] >> shift];
      }
      for (; i < n; ++i) ++histogram[keys[i] >> shift];
    } else {
      // Few keys share the prefix. No number has the highest prefix, so `least + (1 << top)` does not wrap.
      const uint32_t least = level.prefix << top, above = least + (1u << top);
      int64_t i = 0;
      for (; i + 8 <= n; i += 8) {
        uint32_t bits = at_least_bits(keys + i, least) & ~at_least_bits(keys + i, above);
        for (; bits; bits &= bits - 1) ++histogram[keys[i + __builtin_ctz(bits)] >> shift & last];
      }
      for (; i < n; ++i) {
        if (keys[i] >> top == level.prefix) ++histogram[keys[i] >> shift & last];
      }
    }
  }
}

void topk_ties(const TopkTensor& t, uint32_t key, int64_t begin, int64_t end, int64_t* found) {
  uint32_t keys[kKeyBuffer];
  int64_t total = 0;
  for (; begin < end; begin += kKeyBuffer) {
    const int64_t n = end - begin < kKeyBuffer ? end - begin : kKeyBuffer;
    topk_keys(t, begin, begin + n, keys);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] == key;
    total += count;
  }
  *found = total;
}

// Group bits of [begin, end), begin a multiple of 8: keys >= `least`, and the first `ties` keys equal to least - 1.
void topk_choose(const TopkTensor& t, uint32_t least, int64_t ties, int64_t begin, int64_t end) {
  uint32_t keys[kKeyBuffer];
  for (; begin < end; begin += kKeyBuffer) {
    const int64_t n = end - begin < kKeyBuffer ? end - begin : kKeyBuffer;
    topk_keys(t, begin, begin + n, keys);
    for (int64_t i = n; i % 8; ++i) keys[i] = 0;
    uint8_t* const out = t.chosen + begin / 8;
    for (int64_t i = 0; i < n; i += 8) {
      uint32_t bits = at_least_bits(keys + i, least);
      const int64_t lanes = n - i < 8 ? n - i : 8;
      if (ties > 0) {
        for (int64_t j = 0; j < lanes && ties > 0; ++j) {
          if (keys[i + j] == least - 1) {
            bits |= 1u << j;
            --ties;
          }
        }
      }
      out[i / 8] = static_cast<uint8_t>(bits & ((1u << lanes) - 1));
    }
  }
}

// Mask bytes of weights [begin, end), begin a multiple of 8, from the group bits of a block pattern.
void topk_spread(const TopkTensor& t, int64_t begin, int64_t end) {
  const int64_t blocks = (t.axis + 3) / 4, inner = t.inner;
  if (inner == 1 && t.axis % 4 == 0) {
    for (; begin < end; begin += 8) {
      const uint32_t pair = t.chosen[begin >> 5] >> (begin >> 2 & 7) & 3u;
      const uint32_t bits = (pair & 1u) * 0x0fu + (pair >> 1) * 0xf0u;
      t.mask[begin >> 3] = static_cast<uint8_t>(end - begin < 8 ? bits & 0x0fu : bits);
    }
    return;
  }
  int64_t row = begin / inner, column = begin % inner;
  int64_t outer = row / t.axis, channel = row % t.axis;
  uint64_t pending = 0;
  int held = 0;
  uint8_t* out = t.mask + begin / 8;
  while (begin < end) {
    const int64_t left = inner - column < end - begin ? inner - column : end - begin;
    const int64_t from = (outer * blocks + channel / 4) * inner + column;
    // A byte at a time: `chosen` has a spare byte at its end.
    for (int64_t done = 0; done < left; done += 8) {
      const int take = static_cast<int>(left - done < 8 ? left - done : 8);
      const int64_t at = from + done;
      const uint32_t two = t.chosen[at >> 3] | static_cast<uint32_t>(t.chosen[(at >> 3) + 1]) << 8;
      pending |= static_cast<uint64_t>((two >> (at & 7)) & ((1u << take) - 1)) << held;
      held += take;
      if (held >= 8) {
        *out++ = static_cast<uint8_t>(pending);
        pending >>= 8;
        held -= 8;
      }
    }
    begin += left;
    column = 0;
    if (++channel == t.axis) {
      channel = 0;
      ++outer;
    }
  }
  if (held) *out = static_cast<uint8_t>(pending);
}

}  // namespace
