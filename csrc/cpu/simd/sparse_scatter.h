// The transposed product of blocks of four outputs: four rows of gradients stay in registers, and each block adds to
// one row of a tile. Gathering instead would read four rows for each block, which the second-level cache cannot feed.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseRows;

using ScatterVec = WideOf<float>::type;

template <class V, int kVectors>
inline void sparse_scatter_tile(const SparseRows& s, int64_t begin, int64_t end, const float* gradients, int64_t width,
                                int64_t count, float* tile) {
  const int64_t last = count - (kVectors - 1) * V::kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t until = s.pointers[row + 1];
    if (s.pointers[row] == until) continue;
    V g[4][kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const float* const from = gradients + (row * 4 + t) * width;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors - 1; ++i) g[t][i] = V::load(from + i * V::kLanes);
      g[t][kVectors - 1] = V::load(from + (kVectors - 1) * V::kLanes, last);
    }
    for (int64_t k = s.pointers[row]; k < until; ++k) {
      const float* const values = s.values + 4 * k;
      float* const to = tile + s.offsets[k];
      V sum[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[i] = V::load(to + i * V::kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const V w = V::splat(values[t]);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum[i] = madd(w, g[t][i], sum[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[i].store(to + i * V::kLanes);
    }
  }
}

// The instance for exactly the vectors that `count` pixels need.
template <class V, int kVectors>
inline void sparse_scatter_sized(const SparseRows& s, int64_t begin, int64_t end, const float* gradients, int64_t width,
                                 int64_t count, float* tile) {
  if constexpr (kVectors > 1) {
    if (count <= (kVectors - 1) * V::kLanes) {
      return sparse_scatter_sized<V, kVectors - 1>(s, begin, end, gradients, width, count, tile);
    }
  }
  sparse_scatter_tile<V, kVectors>(s, begin, end, gradients, width, count, tile);
}

// Rows of gradients lie `width` floats apart. Whole vectors of the tile are written; lanes from `count` on stay.
void sparse_scatter(const SparseRows& s, int64_t begin, int64_t end, const float* gradients, int64_t width,
                    int64_t count, float* tile) {
  sparse_scatter_sized<ScatterVec, kTallVectors>(s, begin, end, gradients, width, count, tile);
}

}  // namespace
