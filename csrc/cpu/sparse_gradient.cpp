#include "sparse_gradient.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "sparse_product.h"
#include "sparse_scatter.h"

namespace sparsekern {
namespace {

// Images of fewer pixels than this have rows too short for what is decided below.
constexpr int64_t kLargePixels = 512;

// Whether the gradient of the input is added up block by block. Where it lies as the pixels do and has many channels
// for few gradients, writing it is what takes time, and gathering writes it once.
bool scatters(const SparseShape& w, const Grid& grid, const Strides& gradients) {
  const bool wide = in_place(grid, gradients) && grid.length >= kLargePixels;
  return w.tall == 4 && !(wide && w.channels * w.groups >= 2 * w.outputs);
}

// The grid of a gradient that is added up block by block, or of the question whether it is. Where gradients lie as they
// are numbered and have more channels than the input, to pack small images together costs more than the lanes that end
// with each of them: measured (Sapphire Rapids, 16 images of 7x7) 512 -> 2048 channels 1.3 times as fast one by one at
// 90%, 2.4 times at 98%, but 2048 -> 512 0.9 times at 90%.
Grid forward_grid(const GradientAxis& rows, const GradientAxis& columns, const SparseShape& w, const Strides& gradients,
                  int64_t images, int64_t lanes) {
  const Grid alone(rows.forward, columns.forward, images, 1);
  const bool direct = w.outputs > w.channels * w.groups && numbered_in_place(alone, gradients);
  return direct ? alone : Grid(rows.forward, columns.forward, images, lanes);
}

// Whether each position is read by some tap, by those between the taps of a longer stride, and behind the last output.
bool reads_all(const GradientAxis& a) {
  const Axis& f = a.forward;
  return int64_t(f.planes.size()) == f.stride && a.size + f.padding <= (f.output + f.reach) * f.stride;
}

// Where one tap reads every few pixels from the first on, the zeros between them are written with them. Measured
// (Sapphire Rapids, one thread, 98%) 256 -> 512 channels at 56x56 15.2 -> 5.7 ms, 512 -> 1024 at 28x28 4.4 -> 2.9;
// smaller images have too short rows.
std::optional<SpreadShape> spread_shape(const GradientAxis& rows, const GradientAxis& columns, const Strides& result) {
  const bool first = rows.kernel * columns.kernel == 1 && rows.forward.padding + columns.forward.padding == 0;
  const int64_t size = rows.size * columns.size;
  const bool whole = result.column == 1 && result.row == columns.size && result.channel == size;
  const bool apart = rows.forward.stride * columns.forward.stride > 1;
  if (!first || !whole || !apart || size < kLargePixels) return std::nullopt;
  return SpreadShape{rows.size, columns.size, rows.forward.stride};
}

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
    found.push_back({first, Axis(a.forward.output, output, 1, most - entry, positions), taps});
  }
  return found;
}

}  // namespace

bool plan_input_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                         const Strides& gradients, int64_t images, int64_t lanes, int32_t* plan) {
  const Grid forward = forward_grid(rows, columns, form.shape, gradients, images, lanes);
  if (scatters(form.shape, forward, gradients)) return plan_scattered(form, forward, plan);
  if (!is_structure(form, rows.kernel * columns.kernel)) return false;
  for (const Phase& v : phases(rows)) {
    for (const Phase& h : phases(columns)) {
      const Grid grid(v.axis, h.axis, images, lanes);
      Plan tiles(grid, form.shape.outputs, form.shape.wide, gradients);
      tiles.pack_if_read_often(form.shape.outputs, form.blocks * form.shape.tall);
      plan = plan_transposed(form, v, h, grid, tiles, plan);
    }
  }
  return true;
}

bool fills_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Strides& gradients,
                          const SparseShape& w, const Strides& result, int64_t images, int64_t lanes) {
  return (reads_all(rows) && reads_all(columns)) || spread_shape(rows, columns, result);
}

bool sparse_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& gradients,
                           const SparseShape& w, PlanReader plan, const float* weight, const Image<float>& result,
                           int64_t images, int64_t lanes) {
  thread_local Buffer<float> buffer;
  const Grid forward = forward_grid(rows, columns, w, gradients.strides, images, lanes);
  const std::optional<SpreadShape> spread = spread_shape(rows, columns, result.strides);
  if (scatters(w, forward, gradients.strides)) {
    return scattered_gradient(forward, gradients, w, plan, weight, result, spread);
  }
  const Strides& s = result.strides;
  for (const Phase& v : phases(rows)) {
    for (const Phase& h : phases(columns)) {
      const Grid grid(v.axis, h.axis, images, lanes);
      Plan tiles(grid, w.outputs, w.wide, gradients.strides);
      PlannedRows planned;
      if (!plan.next(w.channels / w.wide * w.groups, planned) || !tiles.agree(planned.width)) return false;
      const float* const values = gather_values(planned, w, weight, buffer);
      const Image<float> out{result.data + v.first * s.row + h.first * s.column,
                             {s.batch, s.channel, s.row * rows.forward.stride, s.column * columns.forward.stride}};
      multiply(grid, tiles, gradients, w.outputs,
               {planned.pointers, planned.activations, values, nullptr, 0, w.wide, w.tall, true, planned.order},
               planned.rows, out, nullptr, spread);
    }
  }
  return true;
}

}  // namespace sparsekern
