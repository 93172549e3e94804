// The gradient of the kept weights: each is a dot product of a row of activations and one of output gradients. One of
// the two operands stays in the cache, tile by tile, and is read block by block; the other passes through it once.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "sparse_gradient.h"
#include "sparse_tile_runs.h"

namespace sparsekern {
namespace {

// Pixels of a tile: enough to hide the addition over lanes, and few enough for the cache, which holds all rows of the
// operand that stays.
constexpr int64_t kLeastPixels = 128, kMostPixels = 1024;
// Images of fewer pixels than this lie one after another in a tile, where that spares more than it costs.
constexpr int64_t kTogetherPixels = 512;
// Channels packed at once: tens of KiB; where they are neighbours, four cache lines of each pixel, which took linear
// layers of 2048 rows and 768 to 3072 channels 0.73 to 0.87 times as long as one (Sapphire Rapids, one thread).
int64_t pack_channels(const Strides& s) { return s.channel == 1 && s.column != 1 ? 64 : 16; }
// Rows of at most this many floats that lie in an image are fetched while those before them are computed with: longer
// ones a processor fetches by itself. Measured (Sapphire Rapids, one thread, operands from memory, 90%) 4x1 on 16
// images of 14x14 1.1 to 1.25 times as fast, longer rows and other patterns no faster.
constexpr int64_t kFetchedFloats = 256;
// And so are the rows that stay for the next tile, if each is read this often: some may not be read at all.
constexpr int64_t kFetchedReads = 4;
constexpr int64_t kDeliverGrain = 2048;  // blocks per task

// What the gradients of a call have in common.
struct WeightPass {
  const SparseShape& w;
  const GradientAxis &down, &across;
  Strides input, gradients;
  int64_t images;

  int64_t channels() const { return w.channels * w.groups; }
  int64_t taps() const { return down.kernel * across.kernel; }
  // Whether the gradients of the output stay. A block of several channels reads one row of those, and its own rows
  // serve all blocks of these channels. Single weights read one row of either, so the operand with fewer rows stays,
  // but of few gradients too few blocks share a row. Measured (Sapphire Rapids, batch 16, ResNet-50) 1.3 to 1.7 times
  // as fast with 1x4, 1.05 times with single weights.
  bool gradients_stay() const {
    const int64_t planes = int64_t(down.forward.planes.size() * across.forward.planes.size());
    return w.wide == 4 || (w.tall == 1 && w.outputs >= 128 && w.outputs <= channels() * planes);
  }
  // Whether that operand lies as the grid numbers it, if the gradients have strides `g`.
  bool stays_in_place(const Grid& grid, const Strides& g) const {
    return gradients_stay() ? numbered_in_place(grid, g) : in_place(grid, input);
  }
  int64_t staying_rows(const Grid& grid) const { return gradients_stay() ? w.outputs : channels() * grid.planes(); }
  int64_t tile_pixels(const Grid& grid) const {
    return std::clamp(4 * kTileFloats / staying_rows(grid), kLeastPixels, kMostPixels);
  }
  Grid grid() const;
  Plan tiles(const Grid& grid) const;
  // Channels that pass at once. Those that several taps read stay in the first-level cache.
  int64_t part_channels() const { return taps() > 1 && input.column == 1 ? 4 : pack_channels(input); }
  // Rows of a plan by channels: for each part, for each tap, groups of as many channels as a block has.
  int64_t channel_rows() const {
    return ceil_divide(channels(), part_channels()) * taps() * (part_channels() / w.wide);
  }
};

Grid WeightPass::grid() const {
  const Grid alone(down.forward, across.forward, images, limits().lanes);
  // What need not be packed, or fills a tile, gains nothing by neighbours: measured (Sapphire Rapids, 16 images of
  // 14x14, two threads) 1024 -> 256 channels 2.0 times as fast in place, 3x3 with stride 2 1.2 times with tiles of its
  // own, and plain 3x3, of whose images a tile holds four, 1.1 times together.
  // Tiles, and so the order of sums, are those of gradients that lie as the input does.
  const bool direct = stays_in_place(alone, {0, 0, alone.columns.output, input.column});
  const bool fills = direct ? alone.length >= kLeastPixels : tile_pixels(alone) < 2 * alone.length;
  if (fills || alone.length >= kTogetherPixels) return alone;
  return Grid(down.forward, across.forward, images, kTogetherPixels);
}

// The rows that stay in place if the image allows it.
Plan WeightPass::tiles(const Grid& grid) const {
  const int64_t lanes = limits().lanes, most = tile_pixels(grid) / lanes, vectors = ceil_divide(grid.length, lanes);
  Tiling t(grid, 1, lanes, most);
  t.per_span = ceil_divide(vectors, most);
  t.tile = ceil_divide(vectors, t.per_span) * lanes;
  t.per_span = ceil_divide(grid.length, t.tile);
  t.count = t.per_span * grid.spans;
  t.width = ceil_divide(t.tile + grid.reach, lanes) * lanes;
  const int64_t channel = gradients_stay() ? gradients.channel : input.channel;
  return Plan(t, staying_rows(grid), stays_in_place(grid, gradients), channel);
}

// The staying rows of tiles [begin, end), one tile after another, channels shared out over threads.
void pack_tiles(const WeightPass& pass, const Grid& grid, const Tiling& t, int64_t begin, int64_t end,
                const Image<const float>& image, float* packed) {
  const bool outputs = pass.gradients_stay();
  const int64_t rows = pass.staying_rows(grid), channels = rows / (outputs ? 1 : grid.planes());
  const int64_t of_part = pack_channels(image.strides), per_tile = ceil_divide(channels, of_part);
  torch::stable::parallel_for(begin * per_tile, end * per_tile, 4, [&](int64_t from, int64_t to) {
    thread_local TileRuns runs;
    int64_t held = -1;
    for (int64_t i = from; i < to; ++i) {
      const int64_t tile = i / per_tile, first = i % per_tile * of_part;
      if (tile != held) {
        outputs ? runs.of_outputs(grid, t, tile, image.strides) : runs.of_inputs(grid, t, tile, image.strides);
      }
      held = tile;
      runs.pack(from_channel(image, first), std::min(of_part, channels - first),
                packed + ((tile - begin) * rows + first) * t.width, channels * t.width, t.width);
    }
  });
}

// Sums to their places, and zeros around them while the cache has them; `row_size` is 0 for a packed result. The sums
// of block k are number `order[k]`, or k where that is null.
void deliver(const PlannedRows& rows, const SparseShape& w, const float* sums, const int32_t* order, float* result,
             int64_t row_size) {
  const int64_t block = w.block(), size = row_size * w.tall;
  const int64_t grain = std::max<int64_t>(1, kDeliverGrain * rows.rows / std::max<int64_t>(1, rows.blocks + rows.rows));
  torch::stable::parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(result + row * size, size, 0.0f);
      for (int64_t k = rows.pointers[row]; k < rows.pointers[row + 1]; ++k) {
        const float* const from = sums + (order ? order[k] : k) * block;
        for (int64_t i = 0; i < block; ++i) result[rows.elements[k] + i * w.step] = from[i];
      }
    }
  });
}

// The dot products of block rows [begin, end) in one tile, whose activations are `x`: gradients pass.
void dots_by_outputs(const Grid& grid, const Tiling& t, const SparseRows& s, const Image<const float>& gradients,
                     int64_t tile, int64_t begin, int64_t end, const float* x, float* sums, SparseAhead ahead) {
  thread_local Buffer<float> buffer;
  thread_local std::vector<SparseRun> runs;
  const int64_t from = tile % t.per_span * t.tile, count = std::min(t.tile, grid.length - from);
  grid.outputs(runs, tile / t.per_span, from, count, gradients.strides);
  // Gradients that need not be packed are those of one call.
  const bool direct = numbered_in_place(grid, gradients.strides);
  const int64_t step = direct ? std::max<int64_t>(1, end - begin) : pack_channels(gradients.strides) / s.tall;
  ahead.gradients = direct && count <= kFetchedFloats;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t channel = row * s.tall, held = std::min(step, end - row) * s.tall;
    const NumberedRows g = numbered_rows(runs, count, gradients, channel, held, t.tile, buffer);
    kernels().sparse_dots(s, row, row + held / s.tall, x, g.data - channel * g.width, g.width, count, sums, ahead);
  }
}

// The same of parts [begin, end) of the channels in one tile, whose gradients are `g`: activations pass.
void dots_by_channels(const WeightPass& pass, const Grid& grid, const Tiling& t, const SparseRows& s,
                      const Image<const float>& input, int64_t tile, int64_t begin, int64_t end, const float* g,
                      float* sums) {
  thread_local Buffer<float> buffer;
  thread_local TileRuns runs;
  const bool direct = in_place(grid, input.strides);
  const int64_t width = direct ? input.strides.channel : t.width, of_part = pass.part_channels();
  const int64_t apart = of_part * width, rows = of_part / s.tall, across = pass.across.kernel, taps = pass.taps();
  const int64_t count = std::min(t.tile, grid.length - tile % t.per_span * t.tile);
  float* const packed = buffer.get(direct ? 0 : grid.planes() * apart);
  if (!direct) runs.of_inputs(grid, t, tile, input.strides);
  for (int64_t part = begin; part < end; ++part) {
    const int64_t channel = part * of_part, held = std::min(of_part, pass.channels() - channel);
    const Image<const float> image = from_channel(input, channel);
    if (!direct) runs.pack(image, held, packed, apart, width);
    const float* const x = direct ? place(t, image, tile) : packed;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Axis::Tap &v = grid.rows.taps[tap / across], &h = grid.columns.taps[tap % across];
      const int64_t plane = v.plane * int64_t(grid.columns.planes.size()) + h.plane;
      const int64_t row = (part * taps + tap) * rows;
      const float* const from = x + plane * apart + v.shift * grid.pitch + h.shift;
      kernels().sparse_dots(s, row, row + rows, g, from - row * s.tall * width, width, count, sums, {});
    }
  }
}

// All tiles: as many as the cache holds are packed by all threads, which then share out the rows.
void add_dots(const WeightPass& pass, const Grid& grid, const Plan& tiles, const PlannedRows& rows,
              const Image<const float>& input, const Image<const float>& gradients, float* sums) {
  thread_local Buffer<float> buffer;
  const SparseShape& w = pass.w;
  const Tiling& t = tiles.tiling;
  const bool by_channels = pass.gradients_stay();
  const int32_t tall = by_channels ? w.wide : w.tall, wide = by_channels ? w.tall : w.wide;
  const SparseRows s{rows.pointers, rows.activations, nullptr, nullptr, tiles.width, tall, wide, true};
  const Image<const float>& image = by_channels ? gradients : input;
  const int64_t tile_floats = pass.staying_rows(grid) * t.width;
  const int64_t together = std::clamp<int64_t>(4 * kTileFloats / tile_floats, 1, t.count);
  float* const packed = buffer.get(tiles.place ? 0 : together * tile_floats);
  const int64_t channels = pass.staying_rows(grid);
  const bool fetched = tiles.place && t.tile <= kFetchedFloats && rows.blocks >= kFetchedReads * channels;
  // Of the rows by channels, those of a part belong to one task.
  const int64_t whole = by_channels ? pass.taps() * (pass.part_channels() / w.wide) : 1;
  const int64_t tasks = 4 * torch::stable::get_num_threads();
  const auto task_begin = [&](int64_t i) { return ceil_divide(part_begin(rows.pointers, rows.rows, i, tasks), whole); };
  for (int64_t first = 0; first < t.count; first += together) {
    const int64_t until = std::min(first + together, t.count);
    if (!tiles.place) pack_tiles(pass, grid, t, first, until, image, packed);
    const auto tile_at = [&](int64_t tile) {
      return tiles.place ? place(t, image, tile) : packed + (tile - first) * tile_floats;
    };
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t i, int64_t j) {
      const int64_t begin = task_begin(i), end = task_begin(j);
      for (int64_t tile = first; tile < until; ++tile) {
        if (by_channels) {
          dots_by_channels(pass, grid, t, s, input, tile, begin, end, tile_at(tile), sums);
        } else {
          const SparseAhead ahead{false, fetched && tile + 1 < t.count ? place(t, image, tile + 1) : nullptr, channels};
          dots_by_outputs(grid, t, s, gradients, tile, begin, end, tile_at(tile), sums, ahead);
        }
      }
    });
  }
}

// What a column of a structure stands for in one group: a row of the plan by channels, and its place in a row of the
// weight.
struct ChannelColumn {
  int32_t row, in_row;
};

void columns_of_group(const SparseForm& form, const WeightPass& pass, int64_t group,
                      std::vector<ChannelColumn>& found) {
  const SparseShape& w = form.shape;
  const int64_t taps = pass.taps(), across = pass.across.kernel, of_part = pass.part_channels();
  found.clear();
  for (int64_t channel = 0; channel < w.channels; channel += w.wide) {
    const int64_t at = group * w.channels + channel;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = (at / of_part * taps + tap) * (of_part / w.wide) + at % of_part / w.wide;
      found.push_back({static_cast<int32_t>(row), form.in_row(channel, tap / across, tap % across)});
    }
  }
}

// The rows as they are, with the order of their sums, and then the rows by channels.
void plan_by_channels(const SparseForm& form, const WeightPass& pass, int64_t width, int32_t* plan) {
  const SparseShape& w = form.shape;
  const int64_t rows = w.block_rows(), of_group = rows / w.groups, all = pass.channel_rows();
  const PlanParts as_is(plan, rows, form.blocks, width), turned(as_is.end, all, form.blocks, width);
  std::copy_n(form.pointers, rows + 1, as_is.pointers);
  std::vector<ChannelColumn> columns;
  const auto each = [&](auto body) {
    for (int64_t row = 0; row < rows; ++row) {
      if (row % of_group == 0) columns_of_group(form, pass, row / of_group, columns);
      for (int64_t k = form.pointers[row]; k < form.pointers[row + 1]; ++k) body(row, k, columns[form.indices[k]]);
    }
  };
  std::vector<int32_t> next(all + 1);
  each([&](int64_t, int64_t, const ChannelColumn& c) { ++next[c.row + 1]; });
  for (int64_t i = 0; i < all; ++i) next[i + 1] += next[i];
  std::copy_n(next.begin(), all + 1, turned.pointers);
  each([&](int64_t row, int64_t k, const ChannelColumn& c) {
    const int32_t at = next[c.row]++;
    as_is.activations[k] = at;
    turned.activations[at] = static_cast<int32_t>(row * width);
    as_is.elements[k] = turned.elements[at] = form.element(k, row, c.in_row);
  });
}

}  // namespace

int64_t weight_plan_size(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                         const Strides& input) {
  const WeightPass pass{form.shape, rows, columns, input, {}, 0};
  const int64_t as_is = planned_size(form.shape.block_rows(), form.blocks);
  return pass.gradients_stay() ? as_is + planned_size(pass.channel_rows(), form.blocks) : as_is;
}

bool plan_weight_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                          const Strides& input, const Strides& gradients, int64_t images, int32_t* plan) {
  const WeightPass pass{form.shape, rows, columns, input, gradients, images};
  const Grid grid = pass.grid();
  const int64_t width = pass.tiles(grid).width;
  if (!pass.gradients_stay()) return plan_rows(form, grid, width, 0, plan);
  if (!is_structure(form, pass.taps())) return false;
  plan_by_channels(form, pass, width, plan);
  return true;
}

bool sparse_weight_gradient(const GradientAxis& down, const GradientAxis& across, const Image<const float>& input,
                            const SparseShape& w, PlanReader plan, const Image<const float>& gradients, float* result,
                            int64_t row_size, int64_t images) {
  thread_local Buffer<float> buffer;
  const WeightPass pass{w, down, across, input.strides, gradients.strides, images};
  const Grid grid = pass.grid();
  const Plan tiles = pass.tiles(grid);
  const bool by_channels = pass.gradients_stay();
  PlannedRows as_is, turned;
  if (!plan.next(w.block_rows(), as_is) || as_is.width != tiles.width) return false;
  if (by_channels && !plan.next(pass.channel_rows(), turned)) return false;
  const int64_t sums = as_is.blocks * w.block();
  float* const total = buffer.get(sums);
  std::fill(total, total + sums, 0.0f);
  add_dots(pass, grid, tiles, by_channels ? turned : as_is, input, gradients, total);
  deliver(as_is, w, total, by_channels ? as_is.activations : nullptr, result, row_size);
  return true;
}

}  // namespace sparsekern
