// The transposed product of blocks of four outputs: four rows of gradients stay in registers, and each block adds to
// one row of a tile. Gathering instead would read four rows for each block, which the second-level cache cannot feed.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseRows;
using sparsekern::SparseRun;

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
      fetch<kVectors * V::kLanes>(from + kVectors * V::kLanes);
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

// Rows of gradients lie `width` floats apart; the numbers behind them, which come next, are fetched meanwhile. Whole
// vectors of the tile are written; lanes from `count` on stay.
void sparse_scatter(const SparseRows& s, int64_t begin, int64_t end, const float* gradients, int64_t width,
                    int64_t count, float* tile) {
  sparse_scatter_sized<ScatterVec, kTallVectors>(s, begin, end, gradients, width, count, tile);
}

// Elements [runs[0].image, end) of each channel: `step` apart what the runs say, and zeros between. They are put
// together in `line`, so that memory is written in whole cache lines and once; `stream`: past the caches, where a
// channel begins on a line.
void sparse_spread(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                   float* image, int64_t channel, int64_t step, int64_t end, float* line, bool stream) {
  constexpr int64_t kLanes = ScatterVec::kLanes;
  const int64_t begin = runs[0].image, size = end - begin;
  for (int64_t i = 0; i < size; ++i) line[i] = 0.0f;
  for (int64_t c = 0; c < channels; ++c, packed += width, image += channel) {
    for (int64_t r = 0; r < count; ++r) {
      const float* const from = packed + runs[r].packed;
      float* const to = line + runs[r].image - begin;
      for (int64_t i = 0; i < runs[r].count; i += kLanes) {
        const int64_t n = lesser(kLanes, runs[r].count - i);
        if (step == 2) {
          ScatterVec::load(from + i, n).store_even(to + 2 * i, n);
        } else {
          for (int64_t j = 0; j < n; ++j) to[(i + j) * step] = from[i + j];
        }
      }
    }
    // From the first cache line on that is its own.
    float* const to = image + begin;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(float));
    const int64_t before = stream && past ? lesser(16 - past, size) : 0;
    int64_t i = 0;
    for (; i < before; i += kLanes) {
      const int64_t n = lesser(kLanes, before - i);
      ScatterVec::load(line + i, n).store(to + i, n);
    }
    for (i = before; i + kLanes <= size; i += kLanes) {
      const ScatterVec v = ScatterVec::load(line + i);
      stream ? v.stream(to + i) : v.store(to + i);
    }
    if (i < size) ScatterVec::load(line + i, size - i).store(to + i, size - i);
  }
  if (stream) ScatterVec::fence();
}

}  // namespace
