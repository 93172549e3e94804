// The product of sparse rows with a tile of packed activations: sums stay in registers, each block is one address.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseLimits;
using sparsekern::SparseRows;
using sparsekern::SparseTile;

using SparseVec = WideOf<float>::type;

// With 32 registers: 24 sums, 4 weights, activations; with 16: 12 sums. Flat blocks only need enough sums in flight to
// hide the latency of the addition and to spread the cost of the address.
constexpr int kTallVectors = SparseVec::kLanes == 16 ? 6 : SparseVec::kLanes == 8 ? 3 : 4;
constexpr int kFlatVectors = SparseVec::kLanes == 16 ? 12 : 8;

// Beyond a tile that is not padded there may be no memory: only `last` lanes of its last vector are read. `ahead`
// floats on, unless 0, lie the activations of the tile that comes next; to fetch those never fails.
template <class V, int kTall, int kWide, bool kPadded, int kVectors>
inline void sparse_rows_block(const SparseRows& s, int64_t row, const float* tile, int64_t last, int64_t ahead,
                              V (&sum)[kTall][kVectors]) {
  const int32_t end = s.pointers[row + 1];
  for (int64_t k = s.pointers[row]; k < end; ++k) {
    const float* const values = s.values + k * kTall * kWide;
    const float* x = tile + s.offsets[k];
    for (int j = 0; j < kWide; ++j, x += s.channel) {
      if (ahead) fetch<kVectors * V::kLanes>(x + ahead);
      V w[kTall];
      for (int t = 0; t < kTall; ++t) w[t] = V::splat(values[j + t]);
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        const bool whole = kPadded || i < kVectors - 1;
        const V a = whole ? V::load(x + i * V::kLanes) : V::load(x + i * V::kLanes, last);
#pragma GCC unroll 4
        for (int t = 0; t < kTall; ++t) sum[t][i] = madd(w[t], a, sum[t][i]);
      }
    }
  }
}

template <class V, int kTall, int kWide, bool kPadded, int kVectors>
inline void sparse_rows_tile(const SparseRows& s, int64_t begin, int64_t end, const SparseTile& tile) {
  const int64_t last = tile.count - (kVectors - 1) * V::kLanes;
  for (int64_t row = begin; row < end; ++row) {
    float* const out = tile.out + (row - begin) * kTall * tile.width;
    V sum[kTall][kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kTall; ++t) {
      if (!tile.stream) claim<kVectors * V::kLanes>(out + t * tile.width);
      const V start = V::splat(s.bias ? s.bias[row * kTall + t] : 0.0f);
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) sum[t][i] = start;
    }
    const int64_t ahead = row % tile.every ? 0 : tile.ahead;
    sparse_rows_block<V, kTall, kWide, kPadded, kVectors>(s, row, tile.data, last, ahead, sum);
#pragma GCC unroll 4
    for (int t = 0; t < kTall; ++t) {
      float* const y = out + t * tile.width;
      if (tile.stream) {
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; ++i) sum[t][i].stream(y + i * V::kLanes);
      } else {
#pragma GCC unroll 12
        for (int i = 0; i < kVectors - 1; ++i) sum[t][i].store(y + i * V::kLanes);
        sum[t][kVectors - 1].store(y + (kVectors - 1) * V::kLanes, last);
      }
    }
  }
}

// The instance for exactly the vectors that the tile needs.
template <class V, int kTall, int kWide, int kVectors>
inline void sparse_rows_sized(const SparseRows& s, int64_t begin, int64_t end, const SparseTile& tile) {
  if constexpr (kVectors > 1) {
    if (tile.count <= (kVectors - 1) * V::kLanes) {
      return sparse_rows_sized<V, kTall, kWide, kVectors - 1>(s, begin, end, tile);
    }
  }
  if (s.padded || tile.count == kVectors * V::kLanes) {
    sparse_rows_tile<V, kTall, kWide, true, kVectors>(s, begin, end, tile);
  } else {
    sparse_rows_tile<V, kTall, kWide, false, kVectors>(s, begin, end, tile);
  }
}

void sparse_rows(const SparseRows& s, int64_t begin, int64_t end, const SparseTile& tile) {
  if (s.tall == 4) {
    sparse_rows_sized<SparseVec, 4, 1, kTallVectors>(s, begin, end, tile);
  } else if (s.wide == 4) {
    sparse_rows_sized<SparseVec, 1, 4, kFlatVectors>(s, begin, end, tile);
  } else {
    sparse_rows_sized<SparseVec, 1, 1, kFlatVectors>(s, begin, end, tile);
  }
  if (tile.stream) SparseVec::fence();
}

void sparse_limits(SparseLimits* limits) { *limits = {SparseVec::kLanes, kTallVectors, kFlatVectors}; }

}  // namespace
