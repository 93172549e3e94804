// The n best of every m weights along an axis: in the order of memory where groups are short, else in tiles that hold
// the keys of 64 groups, one group a column.
#pragma once
#include "topk_bits.h"
#include "topk_keys.h"

namespace {

using sparsekern::TopkRatio;

constexpr int64_t kTile = 64;

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

// Keys in the order of memory, with room on both sides for neighbours that are read and not counted; and of each key
// the row of its group that it lies in, where a stretch starts at the first.
template <class Key>
struct Stretches {
  Key all[3 * kKeyBuffer] = {}, row[kKeyBuffer] = {};
  Key* const keys = all + kKeyBuffer;
};

// As tile_row, of 64 keys `from` on, whose rivals lie multiples of `inner` before and behind them.
template <class Key>
inline uint64_t word_of(const Stretches<Key>& s, int64_t from, int64_t rows, int64_t inner, int64_t n) {
  constexpr int64_t kPart = 16;
  uint32_t chosen[64];
  for (int64_t part = 0; part < 64; part += kPart) {
    Key own[kPart], row[kPart], before[kPart] = {};
    for (int64_t c = 0; c < kPart; ++c) own[c] = s.keys[from + part + c];
    for (int64_t c = 0; c < kPart; ++c) row[c] = s.row[from + part + c];
    for (int64_t d = 1; d < rows; ++d) {
      const Key* const last = s.keys + from + part - d * inner;
      const Key* const next = s.keys + from + part + d * inner;
      const Key low = static_cast<Key>(d), high = static_cast<Key>(rows - d);
      for (int64_t c = 0; c < kPart; ++c) before[c] += (last[c] >= own[c]) & (row[c] >= low);
      for (int64_t c = 0; c < kPart; ++c) before[c] += (next[c] > own[c]) & (row[c] < high);
    }
    for (int64_t c = 0; c < kPart; ++c) {
      chosen[part + c] = static_cast<uint32_t>((before[c] < static_cast<Key>(n)) & (own[c] != 0));
    }
  }
  return at_least_bits(chosen, uint32_t{1});
}

// `size` <= kKeyBuffer weights, whole groups of `rows` whose members lie `inner` apart.
template <class Key>
inline bool together(const TopkTensor& t, int64_t at, int64_t rows, int64_t size, int64_t n, Stretches<Key>& s) {
  const bool nan = topk_keys(t, at, at + size, s.keys);
  Ahead ahead(t, at);
  for (int64_t i = 0; i < size; i += 64) {
    ahead.next();
    const int64_t count = size - i < 64 ? size - i : 64;
    // Keys behind the last are left from before.
    or_bits(t.mask, at + i, word_of(s, i, rows, t.inner, n) & ~uint64_t{0} >> (64 - count), count);
  }
  return nan;
}

template <class Key>
inline bool n_of_m(const TopkTensor& t, const TopkRatio& ratio, int64_t begin, int64_t end, Key* tile) {
  bool nan = false;
  Stretches<Key> stretches;
  for (int64_t i = 0; i < kKeyBuffer; ++i) stretches.row[i] = static_cast<Key>(i / t.inner % ratio.m);
  // Slices of whole groups follow each other as if they were one.
  const bool whole = t.axis % ratio.m == 0;
  const int64_t axis = whole ? (end - begin) * t.axis : t.axis;
  for (int64_t outer = begin; outer < (whole ? begin + 1 : end); ++outer) {
    const int64_t slice = outer * t.axis * t.inner;
    for (int64_t channel = 0; channel < axis;) {
      const int64_t left = axis - channel, rows = left < ratio.m ? left : ratio.m, at = slice + channel * t.inner;
      const int64_t fit = kKeyBuffer / (rows * t.inner);
      if (fit) {
        const int64_t count = left / rows < fit ? left / rows : fit;
        nan |= together(t, at, rows, count * rows * t.inner, ratio.n, stretches);
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

// Sets the chosen bits of outer slices [begin, end) in a zeroed mask. `tile` has room for 64 * min(m, axis) keys.
void topk_n_of_m(const TopkTensor& t, const TopkRatio& ratio, int64_t begin, int64_t end, void* tile, bool* nan) {
  *nan |= t.wide ? n_of_m(t, ratio, begin, end, static_cast<uint64_t*>(tile))
                 : n_of_m(t, ratio, begin, end, static_cast<uint32_t*>(tile));
}

}  // namespace
