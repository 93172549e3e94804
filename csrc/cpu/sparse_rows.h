// From a structure that may lie and a dense weight to rows that a kernel may follow blindly.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "sparse_buffer.h"
#include "sparse_product.h"

namespace sparsekern {

// Where each column of the structure finds its activation in a tile, and its element in a row of the weight.
struct ColumnTable {
  struct Entry {
    int64_t element;
    int32_t activation;
  };
  const Entry* entries;
  int64_t size;
};

inline ColumnTable column_table(const Grid& grid, const SparseWeight& w, int64_t width) {
  thread_local Buffer<ColumnTable::Entry> buffer;
  const int64_t taps = int64_t(grid.rows.taps.size() * grid.columns.taps.size());
  ColumnTable::Entry* entry = buffer.get(w.channels / w.wide * taps);
  const ColumnTable table{entry, w.channels / w.wide * taps};
  const int64_t across = int64_t(grid.columns.planes.size()), all = w.channels * w.groups;
  for (int64_t c = 0; c < w.channels / w.wide; ++c) {
    for (size_t i = 0; i < grid.rows.taps.size(); ++i) {
      for (size_t j = 0; j < grid.columns.taps.size(); ++j) {
        const Axis::Tap &v = grid.rows.taps[i], &h = grid.columns.taps[j];
        const int64_t row = (v.plane * across + h.plane) * all + c * w.wide;
        entry->activation = static_cast<int32_t>(row * width + v.shift * grid.pitch + h.shift);
        entry++->element = c * w.wide * w.strides[1] + int64_t(i) * w.strides[2] + int64_t(j) * w.strides[3];
      }
    }
  }
  return table;
}

inline bool rows_ascend(const SparseWeight& w) {
  const int64_t rows = w.block_rows();
  bool good = w.pointers[0] == 0 && w.pointers[rows] == w.blocks;
  for (int64_t r = 0; r < rows; ++r) good = good && w.pointers[r] <= w.pointers[r + 1];
  return good;
}

// Fills offsets and values of block rows [begin, end); false at the first index that is not allowed.
template <int kBlock>
bool gather_rows(const SparseWeight& w, const ColumnTable& table, int64_t width, int64_t begin, int64_t end,
                 int32_t* offsets, float* values) {
  const int64_t step = w.strides[w.tall == 4 ? 0 : 1];
  const int64_t rows_of_group = w.block_rows() / w.groups;
  for (int64_t row = begin; row < end; ++row) {
    const float* const from = w.data + row * w.tall * w.strides[0];
    const int32_t group = static_cast<int32_t>(row / rows_of_group * w.channels * width);
    int64_t before = -1;
    for (int64_t k = w.pointers[row]; k < w.pointers[row + 1]; ++k) {
      const int64_t column = w.indices[k];
      if (column <= before || column >= table.size) return false;
      before = column;
      const ColumnTable::Entry entry = table.entries[column];
      offsets[k] = group + entry.activation;
      for (int i = 0; i < kBlock; ++i) values[k * kBlock + i] = from[entry.element + i * step];
    }
  }
  return true;
}

// Rows per task; with 8 or more blocks a row, a task is a few thousand loads or more.
constexpr int64_t kGatherGrain = 64;

// `offsets` has w.blocks entries, `values` as many blocks. False if the structure is not one.
inline bool gather(const SparseWeight& w, const ColumnTable& table, int64_t width, int32_t* offsets, float* values) {
  if (!rows_ascend(w)) return false;
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, w.block_rows(), kGatherGrain, [&](int64_t begin, int64_t end) {
    const auto part = w.tall * w.wide == 4 ? gather_rows<4> : gather_rows<1>;
    if (!part(w, table, width, begin, end, offsets, values)) good = false;
  });
  return good;
}

}  // namespace sparsekern
