// Masks between a byte per element, as bool tensors have it, and a bit: bit i of byte j is element 8j + i.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

// Elements [begin, end), begin a multiple of 64; what is not 0 is kept. Bits behind the last element are 0.
void mask_to_bits(const uint8_t* bytes, int64_t begin, int64_t end, uint8_t* bits) {
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    __builtin_prefetch(bytes + i + 4096);
    const uint64_t word = live_vectors<8>(bytes + i);
    __builtin_memcpy(bits + i / 8, &word, 8);
  }
  for (; i < end; i += 8) {
    uint32_t byte = 0;
    for (int64_t j = 0; j < 8 && i + j < end; ++j) byte |= uint32_t{bytes[i + j] != 0} << j;
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

// The bytes of each packed one, in order of their addresses.
struct SpreadBits {
  uint8_t bytes[256][8];
  constexpr SpreadBits() : bytes() {
    for (int i = 0; i < 256; ++i) {
      for (int j = 0; j < 8; ++j) bytes[i][j] = static_cast<uint8_t>(i >> j & 1);
    }
  }
};
constexpr SpreadBits kSpreadBits;

// The inverse, of 1 and 0; begin is a multiple of 8.
void mask_to_bytes(const uint8_t* bits, int64_t begin, int64_t end, uint8_t* bytes) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) __builtin_memcpy(bytes + i, kSpreadBits.bytes[bits[i / 8]], 8);
  for (; i < end; ++i) bytes[i] = bits[i / 8] >> (i & 7) & 1;
}

}  // namespace
