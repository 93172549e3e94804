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

// Vectors of 16 lanes lie across two cache lines wherever they are not aligned, those of 8 half as often. Measured
// (Sapphire Rapids, one thread) on the 3x3 layers of ResNet-50: with AVX-512 the order made for aligned loads is 1.03
// to 1.6 times as fast even for single blocks, with AVX2 0.86 times for two or three, 1.0 to 1.26 times from eight on.
constexpr int kAlike = SparseVec::kLanes == 16 ? 1 : SparseVec::kLanes == 8 ? 8 : 0;

// Beyond a tile that is not padded there may be no memory: only `last` lanes of its last vector are read. `ahead`
// floats on, unless 0, lie the activations of the tile that comes next; to fetch those never fails.
template <class V, int kTall, int kWide, bool kPadded, int kVectors>
inline void sparse_rows_block(const SparseRows& s, int64_t begin, int64_t end, const float* tile, int64_t last,
                              int64_t ahead, V (&sum)[kTall][kVectors]) {
  for (int64_t k = begin; k < end; ++k) {
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

template <class V, int kVectors>
inline void slide_all(V (&v)[kVectors], int by) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) v[i] = slide(v[i], v[i + 1 < kVectors ? i + 1 : i], by);
}

// A load that lies across two cache lines takes twice as long, and flat blocks have one for each multiply-add. So those
// of them that begin off a vector's border, `past` lanes behind it, are loaded from there, with one vector more, and
// their sums lie as much too far on: where `past` changes they slide, once for all blocks that share it. Lanes that
// slide in from nowhere never reach a sum that is kept. Returns the first block that begins on a border.
template <class V, int kWide, int kVectors>
inline int64_t sparse_rows_aligned(const SparseRows& s, int64_t begin, int64_t end, const float* tile,
                                   V (&sum)[kVectors]) {
  int64_t k = begin;
  int held = k < end ? s.offsets[k] & (V::kLanes - 1) : 0;
  if (!held) return k;
  V slid[kVectors + 1];
#pragma GCC unroll 16
  for (int i = 0; i <= kVectors; ++i) slid[i] = V::splat(0.0f);
  for (; k < end; ++k) {
    const int past = s.offsets[k] & (V::kLanes - 1);
    if (past != held) slide_all(slid, held - past);
    held = past;
    if (!held) break;
    const float* const values = s.values + k * kWide;
    const float* x = tile + (s.offsets[k] - past);
    for (int j = 0; j < kWide; ++j, x += s.channel) {
      const V w = V::splat(values[j]);
#pragma GCC unroll 16
      for (int i = 0; i <= kVectors; ++i) slid[i] = madd(w, V::load(x + i * V::kLanes), slid[i]);
    }
  }
  if (held) slide_all(slid, held);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) sum[i] = sum[i] + slid[i];
  return k;
}

template <class V, int kTall, int kVectors>
inline void sparse_rows_finish(const SparseRows& s, int64_t row, const SparseTile& tile, const float* residual,
                               V (&sum)[kTall][kVectors]) {
  const V low = V::splat(s.epilogue.low), high = V::splat(s.epilogue.high);
#pragma GCC unroll 4
  for (int t = 0; t < kTall; ++t) {
    const V scale = V::splat(s.epilogue.scale ? s.epilogue.scale[row * kTall + t] : 1.0f);
    const V bias = V::splat(s.bias ? s.bias[row * kTall + t] : 0.0f);
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) {
      const int64_t from = t * tile.width + i * V::kLanes, left = tile.count - i * V::kLanes;
      if (s.epilogue.scale) sum[t][i] = s.bias ? sum[t][i] * scale + bias : sum[t][i] * scale;
      if (residual) sum[t][i] = sum[t][i] + V::load(residual + from, left < V::kLanes ? left : V::kLanes);
      sum[t][i] = smaller(high, larger(low, sum[t][i]));
    }
  }
}

template <class V, int kTall, int kVectors>
inline void sparse_rows_store(const SparseTile& tile, int64_t last, bool stream, float* out,
                              const V (&sum)[kTall][kVectors]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTall; ++t) {
    float* const y = out + t * tile.width;
    if (stream) {
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) sum[t][i].stream(y + i * V::kLanes);
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < kVectors - 1; ++i) sum[t][i].store(y + i * V::kLanes);
      sum[t][kVectors - 1].store(y + (kVectors - 1) * V::kLanes, last);
    }
  }
}

// One slice of a tile that has an order, else all of it. Between slices the sums of a row wait where its results go.
template <class V, int kTall, int kWide, bool kPadded, bool kOrdered, int kVectors>
inline void sparse_rows_slice(const SparseRows& s, int64_t slice, int64_t begin, int64_t end, const SparseTile& tile) {
  const bool first = !kOrdered || slice == 0, final = !kOrdered || slice == s.order.slices - 1;
  const int64_t last = tile.count - (kVectors - 1) * V::kLanes;
  const bool plain =
      !s.epilogue.scale && !tile.residual && s.epilogue.low == -__builtin_inff() && s.epilogue.high == __builtin_inff();
  const float* const bias = s.epilogue.scale ? nullptr : s.bias;
  const int32_t* const begins = kOrdered ? s.order.begins + slice * s.order.rows : s.pointers;
  for (int64_t row = begin; row < end; ++row) {
    float* const out = tile.out + (row - begin) * kTall * tile.width;
    V sum[kTall][kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kTall; ++t) {
      if (first && !tile.stream) claim<kVectors * V::kLanes>(out + t * tile.width);
      const V start = V::splat(first && bias ? bias[row * kTall + t] : 0.0f);
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) sum[t][i] = start;
    }
    const int64_t ahead = row % tile.every ? 0 : tile.ahead;
    int64_t k = begins[row];
    if constexpr (kOrdered) {
      if (!first) {
#pragma GCC unroll 12
        for (int i = 0; i < kVectors - 1; ++i) sum[0][i] = V::load(out + i * V::kLanes);
        sum[0][kVectors - 1] = V::load(out + (kVectors - 1) * V::kLanes, last);
      }
      k = sparse_rows_aligned<V, kWide, kVectors>(s, k, begins[row + 1], tile.data, sum[0]);
    }
    sparse_rows_block<V, kTall, kWide, kPadded, kVectors>(s, k, begins[row + 1], tile.data, last, ahead, sum);
    if (!plain && final) {
      const float* const residual = tile.residual ? tile.residual + (row - begin) * kTall * tile.width : nullptr;
      sparse_rows_finish<V, kTall, kVectors>(s, row, tile, residual, sum);
    }
    sparse_rows_store<V, kTall, kVectors>(tile, last, tile.stream && final, out, sum);
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
  if constexpr (kTall == 1 && V::kLanes > 1) {
    if (s.order.begins) {
      for (int64_t slice = 0; slice < s.order.slices; ++slice) {
        sparse_rows_slice<V, kTall, kWide, true, true, kVectors>(s, slice, begin, end, tile);
      }
      return;
    }
  }
  if (s.padded || tile.count == kVectors * V::kLanes) {
    sparse_rows_slice<V, kTall, kWide, true, false, kVectors>(s, 0, begin, end, tile);
  } else {
    sparse_rows_slice<V, kTall, kWide, false, false, kVectors>(s, 0, begin, end, tile);
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

void sparse_limits(SparseLimits* limits) { *limits = {SparseVec::kLanes, kTallVectors, kFlatVectors, kAlike}; }

}  // namespace
