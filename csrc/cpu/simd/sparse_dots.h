// The gradient of the kept weights over one tile: each is a dot product of a row of activations and one of gradients.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseRows;

using DotVec = WideOf<float>::type;

// Dot products in flight: the lanes of a vector of them are added up together.
constexpr int kDots = DotVec::kLanes < 4 ? 4 : DotVec::kLanes;

template <int kTall, int kWide>
inline void dots_of(const float* const (&x)[kDots / kTall], const float* gradient, int64_t width, int64_t count,
                    DotVec (&sum)[kDots]) {
  const auto add = [&](int64_t p, auto load) {
    DotVec g[kTall];
    for (int t = 0; t < kTall; ++t) g[t] = load(gradient + t * width + p);
#pragma GCC unroll 16
    for (int i = 0; i < kDots / kTall; ++i) {
      const DotVec a = load(x[i] + p);
#pragma GCC unroll 4
      for (int t = 0; t < kTall; ++t) sum[i * kTall + t] = madd(a, g[t], sum[i * kTall + t]);
    }
  };
  for (int i = 0; i < kDots; ++i) sum[i] = DotVec::splat(0.0f);
  int64_t p = 0;
  for (; p + DotVec::kLanes <= count; p += DotVec::kLanes) add(p, [](const float* q) { return DotVec::load(q); });
  if (p < count) add(p, [&](const float* q) { return DotVec::load(q, count - p); });
}

template <int kTall, int kWide>
inline void sparse_dots_rows(const SparseRows& s, int64_t begin, int64_t end, const float* tile, const float* gradients,
                             int64_t width, int64_t count, float* sums) {
  constexpr int kBlock = kTall * kWide, kStep = kDots / kBlock;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = s.pointers[row]; k < s.pointers[row + 1]; k += kStep) {
      const int64_t left = s.pointers[row + 1] - k < kStep ? s.pointers[row + 1] - k : kStep;
      const float* x[kDots / kTall];
      for (int i = 0; i < kStep; ++i) {
        // Blocks beyond the row repeat its last one; their sums are dropped.
        const float* const first = tile + s.offsets[k + (i < left ? i : left - 1)];
        for (int j = 0; j < kWide; ++j) x[i * kWide + j] = first + j * s.channel;
      }
      DotVec sum[kDots];
      dots_of<kTall, kWide>(x, gradients + row * kTall * width, width, count, sum);
      for (int64_t i = 0; i < kDots; i += DotVec::kLanes) {
        DotVec m[DotVec::kLanes];
        for (int j = 0; j < DotVec::kLanes; ++j) m[j] = sum[i + j];
        const int64_t n = left * kBlock - i < DotVec::kLanes ? left * kBlock - i : DotVec::kLanes;
        if (n <= 0) break;
        float* const to = sums + k * kBlock + i;
        (DotVec::load(to, n) + sum_lanes(m)).store(to, n);
      }
    }
  }
}

void sparse_dots(const SparseRows& s, int64_t begin, int64_t end, const float* tile, const float* gradients,
                 int64_t width, int64_t count, float* sums) {
  if (s.tall == 4) return sparse_dots_rows<4, 1>(s, begin, end, tile, gradients, width, count, sums);
  if (s.wide == 4) return sparse_dots_rows<1, 4>(s, begin, end, tile, gradients, width, count, sums);
  sparse_dots_rows<1, 1>(s, begin, end, tile, gradients, width, count, sums);
}

}  // namespace
