// The instructions that csrc/cuda/device.cuh reaches through PTX, mma.sync and ldmatrix, and cp.async, which no kernel
// uses so far. Layouts are those of the PTX manual; sums are taken in ascending k, which hardware does not promise.
#pragma once
#include "warp.h"

namespace sparsekern {

struct MmaOperands {
  uint32_t a[4], b[2];
};

// d += a * b for a 16 x 16 `a`, a 16 x 8 `b`; `widen` makes a float of 16 bits.
template <class F>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const F& widen) {
  const MmaOperands own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = simt::lane(), group = lane >> 2, pair = lane & 3;
  const unsigned char* const slots = simt::meet(~0u, simt::kMma, own);
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = pair * 2 + (i & 1);
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = (k & 7) >> 1, half = k >> 3;
      const uint32_t x = simt::value_of<MmaOperands>(slots, (row & 7) * 4 + holder).a[(row >> 3) + 2 * half];
      const uint32_t y = simt::value_of<MmaOperands>(slots, column * 4 + holder).b[half];
      sum += widen(uint16_t(x >> 16 * (k & 1))) * widen(uint16_t(y >> 16 * (k & 1)));
    }
    d[i] = sum;
  }
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  mma_m16n8k16(d, a, b, [](uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); });
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  mma_m16n8k16(d, a, b, [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); });
}

template <bool kTranspose>
void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) & 15) simt::fail("ldmatrix: a row is not 16-byte aligned");
  const int lane = simt::lane(), group = lane >> 2, pair = lane & 3;
  const unsigned char* const slots = simt::meet(~0u, simt::kLdmatrix, row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t found[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTranspose ? pair * 2 + e : group, c = kTranspose ? group : pair * 2 + e;
      found[e] = reinterpret_cast<const uint16_t*>(simt::value_of<const void*>(slots, matrix * 8 + r))[c];
    }
    result[matrix] = found[0] | uint32_t{found[1]} << 16;
  }
}

// Two stores of their own: gcc expands a small memset after ThreadSanitizer has looked.
inline void fill_16(void* to, unsigned long long value) {
  typedef unsigned long long __attribute__((may_alias)) Word;
  static_cast<Word*>(to)[0] = value;
  static_cast<Word*>(to)[1] = value;
}

// The target is poisoned until a wait lets the copy land, so that reading too early shows.
inline void copy_async_16(void* to, const void* from, bool live) {
  if ((reinterpret_cast<uintptr_t>(to) | (live ? reinterpret_cast<uintptr_t>(from) : 0)) & 15) {
    simt::fail("cp.async: an address is not 16-byte aligned");
  }
  fill_16(to, ~0ull);
  simt::Quiet quiet;
  simt::machine().current->copies.back().push_back({to, from, live});
}
inline void copy_async_commit() {
  simt::Quiet quiet;
  simt::machine().current->copies.emplace_back();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = simt::machine().current->copies;
  while (int(groups.size()) > kPending + 1) {
    for (const simt::Copy& c : groups.front()) {
      if (c.live) {
        std::memcpy(c.to, c.from, 16);
      } else {
        fill_16(c.to, 0);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace sparsekern
