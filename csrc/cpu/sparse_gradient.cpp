#include "sparse_gradient.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "sparse_rows.h"

namespace sparsekern {
namespace {

// Pixels of a tile of the weight gradient: enough to hide the addition over lanes, and few enough for the cache.
constexpr int64_t kLeastPixels = 128, kMostPixels = 1024;
// Channels per packing task, tens of KiB.
constexpr int64_t kPackChannels = 16;

Tiling weight_tiling(const Grid& grid, const SparseWeight& w, int64_t lanes) {
  const int64_t rows = w.channels * w.groups * grid.planes() + w.outputs;
  const int64_t pixels = std::clamp(2 * kTileFloats / rows, kLeastPixels, kMostPixels);
  Tiling t(grid, 1, lanes, pixels / lanes);
  const int64_t vectors = (grid.length + lanes - 1) / lanes, most = pixels / lanes;
  t.per_span = (vectors + most - 1) / most;
  t.tile = (vectors + t.per_span - 1) / t.per_span * lanes;
  t.per_span = (grid.length + t.tile - 1) / t.tile;
  t.count = t.per_span * grid.spans;
  t.width = (t.tile + grid.reach + lanes - 1) / lanes * lanes;
  return t;
}

// The activations and the gradients of one tile, channels shared out over threads.
void pack_pair(const Grid& grid, const Tiling& t, int64_t tile, const Image<const float>& input, int64_t channels,
               float* activations, const Image<const float>& gradients, int64_t outputs, float* packed) {
  const int64_t span = tile / t.per_span, from = tile % t.per_span * t.tile;
  const int64_t per_plane = (channels + kPackChannels - 1) / kPackChannels, of_input = per_plane * grid.planes();
  const int64_t tasks = of_input + (outputs + kPackChannels - 1) / kPackChannels;
  torch::stable::parallel_for(0, tasks, 4, [&](int64_t begin, int64_t end) {
    thread_local std::vector<SparseRun> runs;
    int64_t held = -1;
    for (int64_t i = begin; i < end; ++i) {
      const bool is_input = i < of_input;
      const int64_t plane = is_input ? i / per_plane : grid.planes();
      const int64_t first = (is_input ? i % per_plane : i - of_input) * kPackChannels;
      const int64_t count = std::min(kPackChannels, (is_input ? channels : outputs) - first);
      if (plane != held && is_input) grid.inputs(runs, span, from, t.tile + grid.reach, plane, input.strides);
      if (plane != held && !is_input) grid.outputs(runs, span, from, t.tile, gradients.strides);
      held = plane;
      const Image<const float>& image = is_input ? input : gradients;
      const int64_t width = is_input ? t.width : t.tile;
      float* const to = is_input ? activations + (plane * channels + first) * width : packed + first * width;
      pack_runs({image.data + first * image.strides.channel, image.strides}, is_input ? grid.columns.stride : 1, runs,
                count, to, width);
    }
  });
}

void scatter(const SparseWeight& w, const ColumnTable& table, const float* sums, float* result) {
  const int64_t block = w.tall * w.wide, step = w.strides[w.tall == 4 ? 0 : 1];
  for (int64_t row = 0; row < w.block_rows(); ++row) {
    for (int64_t k = w.pointers[row]; k < w.pointers[row + 1]; ++k) {
      float* const to = result + row * w.tall * w.strides[0] + table.entries[w.indices[k]].element;
      for (int64_t i = 0; i < block; ++i) to[i * step] = sums[k * block + i];
    }
  }
}

// The outputs of one phase of the stride along one axis: every `stride`-th input position from `first` on.
struct Phase {
  int64_t first, output;
  Axis axis;              // reads the gradients
  std::vector<int> taps;  // of the kernel -> tap of `axis`, or -1
};

std::vector<Phase> phases(const GradientAxis& a) {
  std::vector<Phase> found;
  const int64_t stride = a.forward.stride, padding = a.forward.padding;
  for (int64_t phase = 0; phase < stride; ++phase) {
    const int64_t entry = std::max<int64_t>(0, (padding - phase + stride - 1) / stride);
    const int64_t first = entry * stride + phase - padding;
    const int64_t output = first < a.size ? (a.size - 1 - first) / stride + 1 : 0;
    std::vector<int> taps(a.kernel, -1);
    std::vector<int64_t> positions;
    int64_t most = 0;
    for (int64_t k = 0; k < a.kernel; ++k) most = std::max(most, k * a.dilation / stride);
    for (int64_t k = 0; k < a.kernel; ++k) {
      if (k * a.dilation % stride != phase) continue;
      taps[k] = static_cast<int>(positions.size());
      positions.push_back(most - k * a.dilation / stride);
    }
    if (output == 0 || positions.empty()) continue;
    found.push_back({first, output, Axis(a.forward.output, output, 1, most - entry, positions), taps});
  }
  return found;
}

struct Transposed {
  std::vector<int32_t> pointers, offsets;
  std::vector<float> values;
};

// The blocks whose taps lie in this pair of phases, ordered by input channel: 4 x 1 becomes 1 x 4 and vice versa.
Transposed transpose_blocks(const SparseWeight& w, const Phase& v, const Phase& h, const Grid& grid, int64_t width) {
  const int64_t across = int64_t(h.taps.size()), taps = int64_t(v.taps.size()) * across;
  const int64_t block = w.tall * w.wide, step = w.strides[w.tall == 4 ? 0 : 1];
  const int64_t group_rows = w.channels / w.wide, rows_of_group = w.block_rows() / w.groups;
  Transposed t;
  t.pointers.assign(group_rows * w.groups + 1, 0);
  const auto each = [&](auto body) {
    for (int64_t row = 0; row < w.block_rows(); ++row) {
      for (int64_t k = w.pointers[row]; k < w.pointers[row + 1]; ++k) {
        const int64_t channel = w.indices[k] / taps, tap = w.indices[k] % taps;
        if (v.taps[tap / across] < 0 || h.taps[tap % across] < 0) continue;
        body(row, channel, tap / across, tap % across, row / rows_of_group * group_rows + channel);
      }
    }
  };
  each([&](int64_t, int64_t, int64_t, int64_t, int64_t target) { ++t.pointers[target + 1]; });
  for (size_t i = 1; i < t.pointers.size(); ++i) t.pointers[i] += t.pointers[i - 1];
  std::vector<int32_t> next(t.pointers.begin(), t.pointers.end() - 1);
  t.offsets.resize(t.pointers.back());
  t.values.resize(t.pointers.back() * block);
  each([&](int64_t row, int64_t channel, int64_t y, int64_t x, int64_t target) {
    const int64_t k = next[target]++;
    const int64_t shift = grid.rows.taps[v.taps[y]].shift * grid.pitch + grid.columns.taps[h.taps[x]].shift;
    t.offsets[k] = static_cast<int32_t>(row * w.tall * width + shift);
    const float* const from =
        w.data + row * w.tall * w.strides[0] + channel * w.wide * w.strides[1] + y * w.strides[2] + x * w.strides[3];
    for (int64_t i = 0; i < block; ++i) t.values[k * block + i] = from[i * step];
  });
  return t;
}

}  // namespace

bool sparse_weight_gradient(const Grid& grid, const Image<const float>& input, const SparseWeight& w,
                            const Image<const float>& gradients, const Image<float>& result) {
  thread_local Buffer<int32_t> offset_buffer;
  thread_local Buffer<float> activation_buffer, gradient_buffer, sum_buffer;
  SparseLimits limits;
  kernels().sparse_limits(&limits);
  const Tiling t = weight_tiling(grid, w, limits.lanes);
  const int64_t channels = w.channels * w.groups, rows = w.block_rows(), sums = w.blocks * w.tall * w.wide;
  STD_TORCH_CHECK(channels * grid.planes() * t.width < INT32_MAX, "sparsekern: ", channels,
                  " channels do not fit one tile of 32-bit offsets");
  int32_t* const offsets = offset_buffer.get(w.blocks);
  float* const total = sum_buffer.get(sums);
  if (!gather(w, column_table(grid, w, t.width), t.width, offsets, total)) return false;
  std::fill(total, total + sums, 0.0f);
  float* const activations = activation_buffer.get(channels * grid.planes() * t.width);
  float* const packed = gradient_buffer.get(w.outputs * t.tile);
  const SparseRows s{w.pointers, offsets, nullptr, nullptr, t.width, w.tall, w.wide, true};
  const int64_t parts = 4 * torch::stable::get_num_threads();
  for (int64_t tile = 0; tile < t.count; ++tile) {
    pack_pair(grid, t, tile, input, channels, activations, gradients, w.outputs, packed);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      kernels().sparse_dots(s, part_begin(w.pointers, rows, begin, parts), part_begin(w.pointers, rows, end, parts),
                            activations, packed, t.tile, t.tile, total);
    });
  }
  SparseWeight target = w;
  const Strides& to = result.strides;
  std::copy_n(std::initializer_list<int64_t>{to.batch, to.channel, to.row, to.column}.begin(), 4, target.strides);
  scatter(target, column_table(grid, target, t.width), total, result.data);
  return true;
}

bool sparse_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& gradients,
                           const SparseWeight& w, const Image<float>& result, int64_t images, int64_t lanes) {
  const int64_t taps = rows.kernel * columns.kernel;
  if (!indices_ascend(w, w.channels / w.wide * taps)) return false;
  const Strides& s = result.strides;
  for (const Phase& v : phases(rows)) {
    for (const Phase& h : phases(columns)) {
      const Grid grid(v.axis, h.axis, images, lanes);
      const Plan plan(grid, w.outputs, w.wide, gradients.strides);
      const Transposed t = transpose_blocks(w, v, h, grid, plan.width);
      const Image<float> out{result.data + v.first * s.row + h.first * s.column,
                             {s.batch, s.channel, s.row * rows.forward.stride, s.column * columns.forward.stride}};
      multiply(grid, plan, gradients, w.outputs,
               {t.pointers.data(), t.offsets.data(), t.values.data(), nullptr, 0, w.wide, w.tall, true},
               int64_t(t.pointers.size()) - 1, out);
    }
  }
  return true;
}

}  // namespace sparsekern
