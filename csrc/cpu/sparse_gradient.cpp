#include "sparse_gradient.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "sparse_scatter.h"

namespace sparsekern {
namespace {

// Pixels of a tile of the weight gradient: enough to hide the addition over lanes, and few enough for the cache, which
// holds the activations of all channels; gradients pass through it once.
constexpr int64_t kLeastPixels = 128, kMostPixels = 1024;
// Images of fewer pixels than this lie one after another in a tile, where that spares more than it costs.
constexpr int64_t kTogetherPixels = 512;
// Channels per packing task, tens of KiB.
constexpr int64_t kPackChannels = 16;
// Blocks per task of delivery.
constexpr int64_t kDeliverGrain = 2048;

int64_t tile_pixels(const SparseShape& w, const Grid& grid) {
  return std::clamp(4 * kTileFloats / (w.channels * w.groups * grid.planes()), kLeastPixels, kMostPixels);
}

Grid weight_grid(const GradientAxis& rows, const GradientAxis& columns, int64_t images, const SparseShape& w,
                 const Strides& input) {
  const Grid alone(rows.forward, columns.forward, images, limits().lanes);
  // What need not be packed, or fills a tile, gains nothing by neighbours: measured (Sapphire Rapids, 16 images of
  // 14x14, two threads) 1024 -> 256 channels 2.0 times as fast in place, 3x3 with stride 2 1.2 times with tiles of its
  // own, and plain 3x3, of whose images a tile holds four, 1.1 times together.
  const bool fills = in_place(alone, input) ? alone.length >= kLeastPixels : tile_pixels(w, alone) < 2 * alone.length;
  if (fills || alone.length >= kTogetherPixels) return alone;
  return Grid(rows.forward, columns.forward, images, kTogetherPixels);
}

// The activations in place if the image allows it.
Plan weight_plan(const Grid& grid, const SparseShape& w, const Strides& input) {
  const int64_t lanes = limits().lanes, rows = w.channels * w.groups * grid.planes();
  const int64_t pixels = tile_pixels(w, grid);
  Tiling t(grid, 1, lanes, pixels / lanes);
  const int64_t vectors = (grid.length + lanes - 1) / lanes, most = pixels / lanes;
  t.per_span = (vectors + most - 1) / most;
  t.tile = (vectors + t.per_span - 1) / t.per_span * lanes;
  t.per_span = (grid.length + t.tile - 1) / t.tile;
  t.count = t.per_span * grid.spans;
  t.width = (t.tile + grid.reach + lanes - 1) / lanes * lanes;
  return Plan(t, rows, in_place(grid, input), input.channel);
}

// The activations of tiles [begin, end), one after another, channels shared out over threads.
void pack_tiles(const Grid& grid, const Tiling& t, int64_t begin, int64_t end, const Image<const float>& input,
                int64_t channels, float* activations) {
  const int64_t per_plane = (channels + kPackChannels - 1) / kPackChannels, per_tile = per_plane * grid.planes();
  torch::stable::parallel_for(begin * per_tile, end * per_tile, 4, [&](int64_t from, int64_t to) {
    thread_local std::vector<SparseRun> runs;
    int64_t held = -1;
    for (int64_t i = from; i < to; ++i) {
      const int64_t plane = i / per_plane, first = i % per_plane * kPackChannels, tile = i / per_tile;
      if (plane != held) {
        grid.inputs(runs, tile / t.per_span, tile % t.per_span * t.tile, t.tile + grid.reach, plane % grid.planes(),
                    input.strides);
      }
      held = plane;
      pack_runs(Image<const float>{input.data + first * input.strides.channel, input.strides}, grid.columns.stride,
                runs, std::min(kPackChannels, channels - first),
                activations + ((plane - begin * grid.planes()) * channels + first) * t.width, t.width);
    }
  });
}

// Sums to their places, and zeros around them while the cache has them; `row_size` is 0 for a packed result.
void deliver(const PlannedRows& rows, const SparseShape& w, const float* sums, float* result, int64_t row_size) {
  const int64_t block = w.block(), size = row_size * w.tall;
  const int64_t grain = std::max<int64_t>(1, kDeliverGrain * rows.rows / std::max<int64_t>(1, rows.blocks + rows.rows));
  torch::stable::parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(result + row * size, size, 0.0f);
      for (int64_t k = rows.pointers[row]; k < rows.pointers[row + 1]; ++k) {
        for (int64_t i = 0; i < block; ++i) result[rows.elements[k] + i * w.step] = sums[k * block + i];
      }
    }
  });
}

// Whether the gradient of the input is added up block by block. Where it lies as the pixels do and has many channels
// for few gradients, writing it is what takes time, and gathering writes it once.
bool scatters(const SparseShape& w, const Grid& grid, const Strides& gradients) {
  const bool wide = in_place(grid, gradients) && grid.length >= kTogetherPixels;
  return w.tall == 4 && !(wide && w.channels * w.groups >= 2 * w.outputs);
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
  if (!first || !whole || !apart || size < kTogetherPixels) return std::nullopt;
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

bool plan_weight_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                          const Strides& input, int64_t images, int32_t* plan) {
  const Grid grid = weight_grid(rows, columns, images, form.shape, input);
  return plan_rows(form, grid, weight_plan(grid, form.shape, input).width, plan);
}

bool sparse_weight_gradient(const GradientAxis& down, const GradientAxis& across, const Image<const float>& input,
                            const SparseShape& w, PlanReader plan, const Image<const float>& gradients, float* result,
                            int64_t row_size, int64_t images) {
  thread_local Buffer<float> activation_buffer, sum_buffer;
  const Grid grid = weight_grid(down, across, images, w, input.strides);
  const Plan chosen = weight_plan(grid, w, input.strides);
  const Tiling& t = chosen.tiling;
  PlannedRows rows;
  if (!plan.next(w.block_rows(), rows) || rows.width != chosen.width) return false;
  const int64_t channels = w.channels * w.groups, sums = rows.blocks * w.block();
  float* const total = sum_buffer.get(sums);
  std::fill(total, total + sums, 0.0f);
  const int64_t tile_floats = channels * grid.planes() * t.width;
  const int64_t together = std::clamp<int64_t>(4 * kTileFloats / tile_floats, 1, t.count);
  float* const activations = activation_buffer.get(chosen.place ? 0 : together * tile_floats);
  const SparseRows s{rows.pointers, rows.activations, nullptr, nullptr, chosen.width, w.tall, w.wide, true};
  const int64_t parts = 4 * torch::stable::get_num_threads(), step = kPackChannels / w.tall;
  for (int64_t first = 0; first < t.count; first += together) {
    const int64_t until = std::min(first + together, t.count);
    if (!chosen.place) pack_tiles(grid, t, first, until, input, channels, activations);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      thread_local Buffer<float> buffer;
      thread_local std::vector<SparseRun> runs;
      const int64_t last = part_begin(rows.pointers, rows.rows, end, parts);
      for (int64_t tile = first; tile < until; ++tile) {
        const int64_t from = tile % t.per_span * t.tile, count = std::min(t.tile, grid.length - from);
        const float* const x = chosen.place ? place(t, input, tile) : activations + (tile - first) * tile_floats;
        grid.outputs(runs, tile / t.per_span, from, count, gradients.strides);
        for (int64_t row = part_begin(rows.pointers, rows.rows, begin, parts); row < last; row += step) {
          const int64_t stop = std::min(row + step, last);
          const NumberedRows g =
              numbered_rows(runs, count, gradients, row * w.tall, (stop - row) * w.tall, t.tile, buffer);
          kernels().sparse_dots(s, row, stop, x, g.data - row * w.tall * g.width, g.width, count, total);
        }
      }
    });
  }
  deliver(rows, w, total, result, row_size);
  return true;
}

bool plan_input_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                         const Strides& gradients, int64_t images, int64_t lanes, int32_t* plan) {
  const Grid forward(rows.forward, columns.forward, images, lanes);
  if (scatters(form.shape, forward, gradients)) return plan_scattered(form, forward, plan);
  if (!is_structure(form, rows.kernel * columns.kernel)) return false;
  for (const Phase& v : phases(rows)) {
    for (const Phase& h : phases(columns)) {
      const Grid grid(v.axis, h.axis, images, lanes);
      Plan tiles(grid, form.shape.outputs, form.shape.wide, gradients);
      tiles.pack_if_read_often(form.shape.outputs, form.blocks * form.shape.tall);
      plan = plan_transposed(form, v, h, grid, tiles.width, plan);
    }
  }
  return true;
}

bool fills_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Strides& gradients,
                          const SparseShape& w, const Strides& result, int64_t images, int64_t lanes) {
  if (reads_all(rows) && reads_all(columns)) return true;
  return scatters(w, Grid(rows.forward, columns.forward, images, lanes), gradients) &&
         spread_shape(rows, columns, result).has_value();
}

bool sparse_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& gradients,
                           const SparseShape& w, PlanReader plan, const float* weight, const Image<float>& result,
                           int64_t images, int64_t lanes) {
  thread_local Buffer<float> buffer;
  const Grid forward(rows.forward, columns.forward, images, lanes);
  if (scatters(w, forward, gradients.strides)) {
    return scattered_gradient(forward, gradients, w, plan, weight, result, spread_shape(rows, columns, result.strides));
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
               {planned.pointers, planned.activations, values, nullptr, 0, w.wide, w.tall, true}, planned.rows, out);
    }
  }
  return true;
}

}  // namespace sparsekern
