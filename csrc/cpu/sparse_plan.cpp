#include "sparse_plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>

#include "sparse_order.h"

namespace sparsekern {
namespace {

float widened(float x) { return x; }
float widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <int kBlock, class T>
void gather_blocks(const int32_t* elements, int64_t begin, int64_t end, const T* weight, int64_t step, float* values) {
  for (int64_t k = begin; k < end; ++k) {
    const T* const from = weight + elements[k];
    for (int i = 0; i < kBlock; ++i) values[k * kBlock + i] = widened(from[i * step]);
  }
}

// What a column of a structure stands for: the first of its channels in the group, and a tap.
struct Column {
  int32_t channel, y, x;
};

std::vector<Column> columns_of(const SparseShape& shape, int64_t down, int64_t across) {
  std::vector<Column> columns;
  columns.reserve(shape.channels / shape.wide * down * across);
  for (int32_t c = 0; c < shape.channels; c += shape.wide) {
    for (int32_t y = 0; y < down; ++y) {
      for (int32_t x = 0; x < across; ++x) columns.push_back({c, y, x});
    }
  }
  return columns;
}

// Blocks per task: 16 to 64 KiB of values.
constexpr int64_t kGatherGrain = 4096;

}  // namespace

bool PlanReader::next(int64_t rows, PlannedRows& found) {
  if (end_ - at_ < planned_size(rows, 0)) return false;
  found.width = at_[0];
  found.blocks = at_[1];
  found.rows = rows;
  const int64_t lanes = at_[2], slices = at_[3], begins = lanes ? rows * slices + 1 : 0;
  if (found.blocks < 0 || end_ - at_ < planned_size(rows, found.blocks) + begins) return false;
  if (lanes && lanes != limits().lanes) return false;
  found.pointers = at_ + 4;
  found.activations = found.pointers + rows + 1;
  found.elements = found.activations + found.blocks;
  at_ = found.elements + found.blocks;
  found.order = lanes ? SparseOrder{at_, slices, rows} : SparseOrder{};
  at_ += begins;
  return found.pointers[rows] == found.blocks;
}

bool is_structure(const SparseForm& form, int64_t taps) {
  const int64_t rows = form.shape.block_rows(), columns = form.shape.channels / form.shape.wide * taps;
  bool good = form.pointers[0] == 0 && form.pointers[rows] == form.blocks;
  for (int64_t r = 0; r < rows; ++r) good = good && form.pointers[r] <= form.pointers[r + 1];
  for (int64_t row = 0; good && row < rows; ++row) {
    int64_t before = -1;
    for (int64_t k = form.pointers[row]; k < form.pointers[row + 1]; before = form.indices[k++]) {
      good = good && form.indices[k] > before && form.indices[k] < columns;
    }
  }
  return good;
}

bool plan_rows(const SparseForm& form, const Grid& grid, int64_t width, int64_t part, int32_t* plan) {
  const SparseShape& shape = form.shape;
  const int64_t down = int64_t(grid.rows.taps.size()), across = int64_t(grid.columns.taps.size());
  if (!is_structure(form, down * across)) return false;
  const int64_t rows = shape.block_rows(), of_group = rows / shape.groups, all = shape.channels * shape.groups;
  const PlanParts parts(plan, rows, form.blocks, width);
  std::copy_n(form.pointers, rows + 1, parts.pointers);
  const std::vector<Column> columns = columns_of(shape, down, across);
  std::vector<int32_t> activations;  // of a column, for the first group
  for (const Column& c : columns) {
    const Axis::Tap &v = grid.rows.taps[c.y], &h = grid.columns.taps[c.x];
    const int64_t plane = v.plane * int64_t(grid.columns.planes.size()) + h.plane;
    const int64_t activation = (plane * all + c.channel) * width + v.shift * grid.pitch + h.shift;
    activations.push_back(static_cast<int32_t>(activation));
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t group = static_cast<int32_t>(row / of_group * shape.channels * width);
    for (int64_t k = form.pointers[row]; k < form.pointers[row + 1]; ++k) {
      const Column& c = columns[form.indices[k]];
      parts.activations[k] = group + activations[form.indices[k]];
      parts.elements[k] = form.element(k, row, form.in_row(c.channel, c.y, c.x));
    }
  }
  if (part && shape.tall == 1) order_rows(parts, rows, shape.wide, {all * grid.planes(), width, part, grid.reach});
  return true;
}

namespace {

// What a column of a structure is to one pair of phases: a row of the transposed weight in its group, or -1; where it
// reads in a row of gradients; where it lies in a row of the weight.
struct TransposedColumn {
  int32_t row, shift, in_row;
};

std::vector<TransposedColumn> transposed_columns(const SparseForm& form, const Phase& v, const Phase& h,
                                                 const Grid& grid) {
  std::vector<TransposedColumn> found;
  for (const Column& c : columns_of(form.shape, int64_t(v.taps.size()), int64_t(h.taps.size()))) {
    const int y = v.taps[c.y], x = h.taps[c.x];
    if (y < 0 || x < 0) {
      found.push_back({-1, 0, 0});
      continue;
    }
    const int64_t shift = grid.rows.taps[y].shift * grid.pitch + grid.columns.taps[x].shift;
    found.push_back({c.channel / form.shape.wide, static_cast<int32_t>(shift), form.in_row(c.channel, c.y, c.x)});
  }
  return found;
}

}  // namespace

int32_t* plan_transposed(const SparseForm& form, const Phase& v, const Phase& h, const Grid& grid, const Plan& tiles,
                         int32_t* plan) {
  const SparseShape& shape = form.shape;
  const std::vector<TransposedColumn> columns = transposed_columns(form, v, h, grid);
  const int64_t of_group = shape.channels / shape.wide, rows = of_group * shape.groups;
  const int64_t rows_of_group = shape.block_rows() / shape.groups;
  const auto each = [&](auto body) {
    for (int64_t row = 0; row < shape.block_rows(); ++row) {
      const int64_t first = row / rows_of_group * of_group;
      for (int64_t k = form.pointers[row]; k < form.pointers[row + 1]; ++k) {
        const TransposedColumn& c = columns[form.indices[k]];
        if (c.row >= 0) body(row, k, c, first + c.row);
      }
    }
  };
  std::vector<int32_t> next(rows + 1);
  each([&](int64_t, int64_t, const TransposedColumn&, int64_t target) { ++next[target + 1]; });
  for (int64_t i = 0; i < rows; ++i) next[i + 1] += next[i];
  const PlanParts parts(plan, rows, next[rows], tiles.width);
  std::copy_n(next.begin(), rows + 1, parts.pointers);
  each([&](int64_t row, int64_t k, const TransposedColumn& c, int64_t target) {
    const int64_t at = next[target]++;
    parts.activations[at] = static_cast<int32_t>(row * shape.tall * tiles.width + c.shift);
    parts.elements[at] = form.element(k, row, c.in_row);
  });
  if (shape.wide == 4) return parts.end;
  return order_rows(parts, rows, shape.tall, {shape.outputs, tiles.width, tiles.tiling.part, grid.reach});
}

template <class T>
const float* gather_values(const PlannedRows& rows, const SparseShape& shape, const T* weight, Buffer<float>& buffer) {
  const int64_t block = shape.block();
  float* const values = buffer.get(rows.blocks * block);
  const auto part = block == 4 ? gather_blocks<4, T> : gather_blocks<1, T>;
  const auto [begins, slices, all] = rows.order;
  if (begins) {
    // All slices of a row at once: their elements share cache lines.
    const int64_t grain = std::max<int64_t>(1, kGatherGrain * all / std::max<int64_t>(1, rows.blocks));
    torch::stable::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (const int32_t* of = begins + row; of < begins + slices * all; of += all) {
          part(rows.elements, of[0], of[1], weight, shape.step, values);
        }
      }
    });
  } else {
    torch::stable::parallel_for(0, rows.blocks, kGatherGrain, [&](int64_t begin, int64_t end) {
      part(rows.elements, begin, end, weight, shape.step, values);
    });
  }
  return values;
}
template const float* gather_values(const PlannedRows&, const SparseShape&, const float*, Buffer<float>&);
template const float* gather_values(const PlannedRows&, const SparseShape&, const BFloat16*, Buffer<float>&);

}  // namespace sparsekern
