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
  if (n >= 64) {
    uint64_t word;
    __builtin_memcpy(&word, to + (at >> 3), 8);
    word |= bits << (at & 7);
    __builtin_memcpy(to + (at >> 3), &word, 8);
    if (at & 7) to[(at >> 3) + 8] |= static_cast<uint8_t>(bits >> (64 - (at & 7)));
    return;
  }
  for (; n > 0; n -= 8, at += 8, bits >>= 8) {
    const uint32_t two = static_cast<uint32_t>(bits & 0xff) << (at & 7);
    to[at >> 3] |= static_cast<uint8_t>(two);
    if (two >> 8) to[(at >> 3) + 1] |= static_cast<uint8_t>(two >> 8);
  }
}

// `n` <= 57 bits from any bit on; reads up to 8 bytes.
inline uint64_t get_word(const uint8_t* from, int64_t at, int n) {
  uint64_t bits;
  __builtin_memcpy(&bits, from + (at >> 3), 8);
  return bits >> (at & 7) & ((uint64_t{1} << n) - 1);
}

// Appends at most 32 bits at a time; the last byte is filled up with zeros.
struct BitWriter {
  uint8_t* out;
  uint64_t pending = 0;
  int held = 0;
  void put(uint64_t bits, int n) {
    pending |= bits << held;
    held += n;
    if (held < 32) return;
    __builtin_memcpy(out, &pending, 4);
    out += 4;
    pending >>= 32;
    held -= 32;
  }
  void finish() { put_bits(out, pending, held); }
};

// Mask bits of 32 weights from those of 8 groups of neighbours.
inline uint32_t fourfold(uint32_t groups) {
  uint32_t bits = (groups | groups << 12) & 0x000f000fu;
  bits = (bits | bits << 6) & 0x03030303u;
  bits = (bits | bits << 3) & 0x11111111u;
  return bits * 15;
}

// Mask bits of weights [begin, end), begin a multiple of 32, from the group bits of a block pattern, behind which lie
// 8 bytes to read.
void topk_spread(const TopkTensor& t, int64_t begin, int64_t end) {
  const int64_t axis = t.axis, inner = t.inner, blocks = (axis + 3) / 4;
  if (inner == 1 && axis % 4 == 0) {
    for (; end - begin >= 32; begin += 32) {
      const uint32_t bits = fourfold(t.chosen[begin >> 5]);
      __builtin_memcpy(t.mask + begin / 8, &bits, 4);
    }
    if (begin < end) put_bits(t.mask + begin / 8, fourfold(t.chosen[begin >> 5]), end - begin);
    return;
  }
  int64_t channel = begin / inner % axis, column = begin % inner, base = begin / inner / axis * blocks;
  BitWriter writer{t.mask + begin / 8};
  while (begin < end) {
    const int64_t left = inner - column < end - begin ? inner - column : end - begin;
    const int64_t from = (base + channel / 4) * inner + column;
    for (int64_t done = 0; done < left; done += 32) {
      const int n = static_cast<int>(left - done < 32 ? left - done : 32);
      writer.put(get_word(t.chosen, from + done, n), n);
    }
    begin += left;
    column = 0;
    if (++channel < axis) continue;
    channel = 0;
    base += blocks;
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
