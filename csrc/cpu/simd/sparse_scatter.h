// The transposed product of blocks of four outputs: four rows of gradients stay in registers, and each block adds to
// one row of a tile. Gathering instead would read four rows for each block, which the second-level cache cannot feed.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparsePair;
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

inline void unpack_pair(const float* packed, const SparsePair& p, float* to, int64_t ahead) {
  constexpr int64_t kLanes = ScatterVec::kLanes;
  for (int64_t i = 0; i < p.count; i += 16) claim<1>(to + ahead + i);
  for (int64_t i = 0; i < p.count; i += 2 * kLanes) {
    ScatterVec even = ScatterVec::load(packed + p.even + i / 2), odd = ScatterVec::load(packed + p.odd + i / 2);
    interleave(even, odd);
    const int64_t left = p.count - i;
    if (left >= 2 * kLanes) {
      even.store(to + i);
      odd.store(to + i + kLanes);
    } else {
      even.store(to + i, lesser(left, kLanes));
      odd.store(to + i + kLanes, left > kLanes ? left - kLanes : 0);
    }
  }
}

// The pixels of two phases of a stride of two, which alternate in the image: each cache line of it is written once.
void sparse_unpack_pairs(const float* packed, int64_t width, const SparsePair* pairs, int64_t count, int64_t channels,
                         float* image, int64_t channel) {
  for (int64_t c = 0; c < channels; c += kPackGroup) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = c; i < lesser(c + kPackGroup, channels); ++i) {
        unpack_pair(packed + i * width, pairs[r], image + i * channel + pairs[r].image, kPackGroup * channel);
      }
    }
  }
}

// One channel between `begin` and its end as `line`, whose other elements are and stay zeros. Runs ascend, so that the
// zeros behind one make room for the next.
inline void spread_line(const float* packed, const SparseRun* runs, int64_t count, int64_t begin, int64_t step,
                        float* line) {
  constexpr int64_t kLanes = ScatterVec::kLanes;
  for (int64_t r = 0; r < count; ++r) {
    const float* const from = packed + runs[r].packed;
    float* const to = line + runs[r].image - begin;
    for (int64_t i = 0; i < runs[r].count; i += kLanes) {
      const int64_t n = lesser(kLanes, runs[r].count - i);
      if (step == 2) {
        ScatterVec pixels = ScatterVec::load(from + i, n), zeros = ScatterVec::splat(0.0f);
        interleave(pixels, zeros);
        pixels.store(to + 2 * i);
        zeros.store(to + 2 * i + kLanes);
      } else {
        for (int64_t j = 0; j < n; ++j) to[(i + j) * step] = from[i + j];
      }
    }
  }
}

// `size` floats to `to`; `stream`: from the first cache line on that is its own, past the caches.
inline void copy_line(const float* line, int64_t size, float* to, bool stream) {
  constexpr int64_t kLanes = ScatterVec::kLanes;
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

// Elements [runs[0].image, end) of each channel: `step` apart what the runs say, and zeros between. They are put
// together in `lines`, room for two channels with 32 floats more each, so that memory is written in whole cache lines
// and once. A channel is copied after the next one was put together: reading what was just written would wait.
void sparse_spread(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                   float* image, int64_t channel, int64_t step, int64_t end, float* lines, bool stream) {
  const int64_t begin = runs[0].image, size = end - begin, room = size + 32;
  for (int64_t i = 0; i < 2 * room; ++i) lines[i] = 0.0f;
  for (int64_t c = 0; c <= channels; ++c) {
    if (c < channels) spread_line(packed + c * width, runs, count, begin, step, lines + c % 2 * room);
    if (c) copy_line(lines + (c - 1) % 2 * room, size, image + (c - 1) * channel + begin, stream);
  }
  if (stream) ScatterVec::fence();
}

}  // namespace
