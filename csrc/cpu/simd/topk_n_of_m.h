// The n best of every m weights along an axis. A tile holds the keys of 64 groups, one group a column.
#pragma once
#include "topk_bits.h"
#include "topk_keys.h"

namespace {

using sparsekern::TopkRatio;

constexpr int64_t kTile = 64;
using sparsekern::kTopkSlack;

// Choice in row `j` of a tile: fewer than `n` others of the column rank before it, and it is a candidate.
template <class Key>
inline uint64_t tile_row(const Key* tile, int64_t rows, int64_t j, int64_t n) {
  constexpr int64_t kPart = 16;  // counts that stay in registers
  uint32_t chosen[kTile];
  for (int64_t from = 0; from < kTile; from += kPart) {
    const Key* const part = tile + from;
    Key own[kPart];
    for (int64_t c = 0; c < kPart; ++c) own[c] = part[j * kTile + c];
    uint32_t before[kPart] = {};
    for (int64_t i = 0; i < j; ++i) {
      for (int64_t c = 0; c < kPart; ++c) before[c] += part[i * kTile + c] >= own[c];
    }
    for (int64_t i = j + 1; i < rows; ++i) {
      for (int64_t c = 0; c < kPart; ++c) before[c] += part[i * kTile + c] > own[c];
    }
    for (int64_t c = 0; c < kPart; ++c) {
      chosen[from + c] = static_cast<uint32_t>((before[c] < n) & (own[c] != 0));
    }
  }
  return at_least_bits(chosen, uint32_t{1});
}

// `columns` <= 64 groups that are neighbours in memory, their weights `inner` apart.
template <class Key>
inline bool apart(const TopkTensor& t, int64_t at, int64_t rows, int64_t columns, int64_t n, Key* tile) {
  bool nan = false;
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t from = at + j * t.inner;
    nan |= topk_keys(t, from, from + columns, tile + j * kTile);
    for (int64_t c = columns; c < kTile; ++c) tile[j * kTile + c] = 0;
  }
  for (int64_t j = 0; j < rows; ++j) or_bits(t.mask, at + j * t.inner, tile_row(tile, rows, j, n), columns);
  return nan;
}

// Stretches of `rows` by `inner` weights, one after the other in memory: the `inner` groups of one lie side by side. At
// most kTile groups and kKeyBuffer weights in all `count` of them.
template <class Key>
inline bool together(const TopkTensor& t, int64_t at, int64_t rows, int64_t count, int64_t n, Key* tile) {
  Key keys[kKeyBuffer + kTopkSlack];
  const int64_t inner = t.inner, stretch = rows * inner;
  const bool nan = topk_keys(t, at, at + count * stretch, keys);
  for (int64_t j = 0; j < rows; ++j) {
    Key* out = tile + j * kTile;
    if (inner == 1) {
      for (int64_t c = 0; c < count; ++c) *out++ = keys[c * rows + j];
    } else if (inner <= kTopkSlack) {
      // Of a fixed size, a vector; what is too much of it is overwritten by what follows.
      for (int64_t c = 0; c < count; ++c, out += inner) {
        __builtin_memcpy(out, keys + c * stretch + j * inner, kTopkSlack * sizeof(Key));
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t i = 0; i < inner; ++i) *out++ = keys[c * stretch + j * inner + i];
      }
    }
    while (out < tile + (j + 1) * kTile) *out++ = 0;
  }
  for (int64_t j = 0; j < rows; ++j) {
    const uint64_t bits = tile_row(tile, rows, j, n);
    if (inner > 1) {
      const uint64_t own = (uint64_t{1} << inner) - 1;
      for (int64_t c = 0; c < count; ++c) {
        const uint64_t some = bits >> (c * inner) & own;
        if (some) or_bits(t.mask, at + c * stretch + j * inner, some, inner);
      }
      continue;
    }
    for (uint64_t left = bits; left; left &= left - 1) {
      const int64_t place = at + __builtin_ctzll(left) * rows + j;
      t.mask[place >> 3] |= static_cast<uint8_t>(1u << (place & 7));
    }
  }
  return nan;
}

template <class Key>
inline bool n_of_m(const TopkTensor& t, const TopkRatio& ratio, int64_t begin, int64_t end, Key* tile) {
  bool nan = false;
  for (int64_t outer = begin; outer < end; ++outer) {
    const int64_t slice = outer * t.axis * t.inner;
    for (int64_t channel = 0; channel < t.axis;) {
      const int64_t left = t.axis - channel, rows = left < ratio.m ? left : ratio.m, at = slice + channel * t.inner;
      const int64_t fit =
          kKeyBuffer / (rows * t.inner) < kTile / t.inner ? kKeyBuffer / (rows * t.inner) : kTile / t.inner;
      // One alone would leave most columns of a tile empty.
      const int64_t count = left / rows < fit ? left / rows : fit;
      if (fit > 1) {
        nan |= together(t, at, rows, count, ratio.n, tile);
        channel += count * rows;
        continue;
      }
      for (int64_t c = 0; c < t.inner; c += kTile) {
        const int64_t wide = t.inner - c < kTile ? t.inner - c : kTile;
        nan |= apart(t, at + c, rows, wide, ratio.n, tile);
      }
      channel += rows;
    }
  }
  return nan;
}

// Sets the chosen bits of outer slices [begin, end) in a zeroed mask. `tile` has room for kTopkSlack keys more than
// 64 * min(m, axis).
void topk_n_of_m(const TopkTensor& t, const TopkRatio& ratio, int64_t begin, int64_t end, void* tile, bool* nan) {
  *nan |= t.wide ? n_of_m(t, ratio, begin, end, static_cast<uint64_t*>(tile))
                 : n_of_m(t, ratio, begin, end, static_cast<uint32_t*>(tile));
}

}  // namespace
