// Bit strings of topk_mask: group bits to and from weight bits. Bit i of byte j is element 8j + i.
#pragma once
#include "kernels.h"

namespace {

using sparsekern::TopkTensor;

// The low `n` bits, at most 64, from a byte border on.
inline void put_bits(uint8_t* out, uint64_t bits, int64_t n) {
  if (n >= 64) {
    __builtin_memcpy(out, &bits, 8);
    return;
  }
  for (; n > 0; n -= 8, bits >>= 8) *out++ = static_cast<uint8_t>(bits);
}

// `n` <= 8 bits from any bit on, reading no byte that holds none of them.
inline uint32_t get_bits(const uint8_t* from, int64_t at, int n) {
  const int offset = static_cast<int>(at & 7);
  uint32_t bits = from[at >> 3];
  if (offset + n > 8) bits |= static_cast<uint32_t>(from[(at >> 3) + 1]) << 8;
  return bits >> offset & ((1u << n) - 1);
}

// Sets the low `n` bits of `bits` from any bit on; touches no byte that gets none of them.
inline void or_bits(uint8_t* to, int64_t at, uint64_t bits, int64_t n) {
  for (; n > 0; n -= 8, at += 8, bits >>= 8) {
    const uint32_t two = static_cast<uint32_t>(bits & 0xff) << (at & 7);
    to[at >> 3] |= static_cast<uint8_t>(two);
    if (two >> 8) to[(at >> 3) + 1] |= static_cast<uint8_t>(two >> 8);
  }
}

// Appends bits; the last byte is filled up with zeros.
struct BitWriter {
  uint8_t* out;
  uint32_t pending = 0;
  int held = 0;
  void put(uint32_t bits, int n) {
    pending |= bits << held;
    held += n;
    if (held < 8) return;
    *out++ = static_cast<uint8_t>(pending);
    pending >>= 8;
    held -= 8;
  }
  void finish() const {
    if (held) *out = static_cast<uint8_t>(pending);
  }
};

// Mask bits of weights [begin, end), begin a multiple of 8, from the group bits of a block pattern.
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
  BitWriter writer{t.mask + begin / 8};
  for (; begin < end; ++row, column = 0) {
    const int64_t left = inner - column < end - begin ? inner - column : end - begin;
    const int64_t from = (row / t.axis * blocks + row % t.axis / 4) * inner + column;
    for (int64_t done = 0; done < left; done += 8) {
      const int n = static_cast<int>(left - done < 8 ? left - done : 8);
      writer.put(get_bits(t.chosen, from + done, n), n);
    }
    begin += left;
  }
  writer.finish();
}

// Candidate bits of blocks [begin, end), begin a multiple of 8, from those of the weights: all of a block must be.
void topk_gather_bits(const TopkTensor& t, const uint8_t* weights, int64_t begin, int64_t end, uint8_t* out) {
  const int64_t blocks = (t.axis + 3) / 4, inner = t.inner;
  int64_t row = begin / inner, column = begin % inner;
  BitWriter writer{out + begin / 8};
  for (; begin < end; ++row, column = 0) {
    const int64_t left = inner - column < end - begin ? inner - column : end - begin;
    const int64_t channel = row % blocks * 4, count = t.axis - channel < 4 ? t.axis - channel : 4;
    const int64_t from = (row / blocks * t.axis + channel) * inner + column;
    for (int64_t done = 0; done < left; done += 8) {
      const int n = static_cast<int>(left - done < 8 ? left - done : 8);
      uint32_t bits = get_bits(weights, from + done, n);
      for (int64_t j = 1; j < count; ++j) bits &= get_bits(weights, from + j * inner + done, n);
      writer.put(bits, n);
    }
    begin += left;
  }
  writer.finish();
}

}  // namespace
