// The gradient of the kept weights over one tile: each is a dot product of a row of activations and one of gradients.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseAhead;
using sparsekern::SparseRows;

using DotVec = WideOf<float>::type;

// Most dot products in flight: they share the loads of gradients.
constexpr int kDots = DotVec::kLanes < 4 ? 4 : DotVec::kLanes;

// Dot products wait here until the lanes of a vector of them are added up together, whatever rows they are of. Its user
// calls `finish`: a destructor would need unwinding code, whose symbol is weak.
class DotSums {
 public:
  explicit DotSums(float* to) : to_(to) {}
  void finish() {
    if (!held_) return;
    for (int i = held_; i < DotVec::kLanes; ++i) waiting_[i] = DotVec::splat(0.0f);
    (DotVec::load(to_, held_) + sum_lanes(waiting_)).store(to_, held_);
  }
  template <int kCount>
  void push(const DotVec (&v)[kCount]) {
    if constexpr (kCount == DotVec::kLanes) {
      if (!held_) return add(v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      waiting_[held_++] = v[i];
      if (held_ < DotVec::kLanes) continue;
      add(waiting_);
      held_ = 0;
    }
  }

 private:
  void add(const DotVec (&v)[DotVec::kLanes]) {
    (DotVec::load(to_) + sum_lanes(v)).store(to_);
    to_ += DotVec::kLanes;
  }

  DotVec waiting_[DotVec::kLanes];
  int held_ = 0;
  float* to_;
};

// Rows of `count` floats, `step` apart, that are fetched a few cache lines at a time.
struct FetchedRows {
  const float* from;
  int64_t rows, count, step, lines, at = 0;
  FetchedRows(const float* from, int64_t rows, int64_t count, int64_t step, int64_t times)
      : from(from), rows(rows), count(count), step(step), lines((rows * ((count + 15) / 16) + times - 1) / times) {}
  void some() {
    for (int64_t i = 0; i < lines && rows > 0; ++i) {
      fetch<1>(from + at);
      at += 16;
      if (at < count) continue;
      at = 0;
      from += step;
      --rows;
    }
  }
};

// Few dot products take turns with several sums each, to hide the latency of the addition. `ahead` floats on, unless 0,
// lie the gradients that come next: rows with few blocks wait for those. Tall blocks have no registers left for it.
template <int kTall, int kRows>
inline void dots_of(const float* const* x, const float* gradient, int64_t width, int64_t count, int64_t ahead,
                    DotSums& sums) {
  constexpr int kCount = kTall * kRows, kTurns = kCount * 4 > kDots ? 1 : kDots / 2 / kCount;
  constexpr int64_t kLanes = DotVec::kLanes;
  DotVec sum[kTurns][kCount];
#pragma GCC unroll 8
  for (int u = 0; u < kTurns; ++u) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sum[u][i] = DotVec::splat(0.0f);
  }
  const auto add = [&](int64_t p, DotVec(&to)[kCount], auto load) {
    DotVec g[kTall];
#pragma GCC unroll 4
    for (int t = 0; t < kTall; ++t) {
      const float* const from = gradient + t * width + p;
      if (kTall == 1 && ahead) fetch<kLanes>(from + ahead);
      g[t] = load(from);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const DotVec a = load(x[i] + p);
#pragma GCC unroll 4
      for (int t = 0; t < kTall; ++t) to[i * kTall + t] = madd(a, g[t], to[i * kTall + t]);
    }
  };
  const auto whole = [](const float* q) { return DotVec::load(q); };
  int64_t p = 0;
  for (; p + kTurns * kLanes <= count; p += kTurns * kLanes) {
#pragma GCC unroll 8
    for (int u = 0; u < kTurns; ++u) add(p + u * kLanes, sum[u], whole);
  }
  if constexpr (kTurns > 1) {
    for (; p + kLanes <= count; p += kLanes) add(p, sum[0], whole);
  }
  if (p < count) add(p, sum[0], [&](const float* q) { return DotVec::load(q, count - p); });
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    for (int u = 1; u < kTurns; ++u) sum[0][i] = sum[0][i] + sum[u][i];
  }
  sums.push(sum[0]);
}

// The instance for exactly the blocks that are left.
template <int kTall, int kWide, int kBlocks>
inline void dots_sized(int64_t blocks, const float* const* x, const float* gradient, int64_t width, int64_t count,
                       int64_t ahead, DotSums& sums) {
  if constexpr (kBlocks > 1) {
    if (blocks < kBlocks) return dots_sized<kTall, kWide, kBlocks - 1>(blocks, x, gradient, width, count, ahead, sums);
  }
  dots_of<kTall, kWide * kBlocks>(x, gradient, width, count, ahead, sums);
}

// `fetch_more` runs before each few dot products.
template <int kTall, int kWide, class FetchMore>
inline void sparse_dots_rows(const SparseRows& s, int64_t begin, int64_t end, const float* tile, const float* gradients,
                             int64_t width, int64_t count, float* sums, FetchMore fetch_more) {
  constexpr int kBlock = kTall * kWide, kStep = kDots / kBlock;
  DotSums waiting(sums + s.pointers[begin] * int64_t{kBlock});
  for (int64_t row = begin; row < end; ++row) {
    int64_t ahead = kTall * width;
    for (int64_t k = s.pointers[row]; k < s.pointers[row + 1]; k += kStep, ahead = 0) {
      fetch_more();
      const int64_t left = s.pointers[row + 1] - k < kStep ? s.pointers[row + 1] - k : kStep;
      const float* x[kDots / kTall];
      for (int i = 0; i < left; ++i) {
        for (int j = 0; j < kWide; ++j) x[i * kWide + j] = tile + s.offsets[k + i] + j * s.channel;
      }
      dots_sized<kTall, kWide, kStep>(left, x, gradients + row * kTall * width, width, count, ahead, waiting);
    }
  }
  waiting.finish();
}

// Rows of four outputs, whose kernel has no registers left to fetch what comes next.
inline void tall_dots(const SparseRows& s, int64_t begin, int64_t end, const float* tile, const float* gradients,
                      int64_t width, int64_t count, float* sums, const SparseAhead& ahead) {
  if (!ahead.gradients && !ahead.tile) {
    return sparse_dots_rows<4, 1>(s, begin, end, tile, gradients, width, count, sums, [] {});
  }
  // About as often as a few dot products begin.
  const int64_t times = 1 + (s.pointers[end] - s.pointers[begin]) * 4 / kDots + (end - begin) / 2;
  FetchedRows own(gradients + (begin + 1) * 4 * width, ahead.gradients ? (end - begin) * 4 : 0, count, width, times);
  FetchedRows next(ahead.tile, ahead.tile ? ahead.rows : 0, count, s.channel, times);
  sparse_dots_rows<4, 1>(s, begin, end, tile, gradients, width, count, sums, [&] {
    own.some();
    next.some();
  });
}

void sparse_dots(const SparseRows& s, int64_t begin, int64_t end, const float* tile, const float* gradients,
                 int64_t width, int64_t count, float* sums, const SparseAhead& ahead) {
  const auto nothing = [] {};
  if (s.tall == 4) return tall_dots(s, begin, end, tile, gradients, width, count, sums, ahead);
  if (s.wide == 4) return sparse_dots_rows<1, 4>(s, begin, end, tile, gradients, width, count, sums, nothing);
  sparse_dots_rows<1, 1>(s, begin, end, tile, gradients, width, count, sums, nothing);
}

}  // namespace
