#include "sparse_scatter.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace sparsekern {
namespace {

// As many tasks as a few threads need.
constexpr int64_t kTasks = 8;
// Block rows whose gradients are packed at once, 96 KiB: all of them would drive the tile from the cache.
constexpr int64_t kRows = 64;

// A tile is a range of positions: those of the packed input, of which output number n reads n to n + reach. It is
// computed from all numbers that it needs, so neighbouring tiles do some work twice, but no tile waits for another.
struct Tiles {
  int64_t positions, per_span, count;
  int64_t part;   // numbers per call of the kernel
  int64_t width;  // floats between the channels of a tile
  int64_t shares, channels;
  bool stream;  // the result past the caches

  Tiles(const Grid& grid, int64_t all_channels) {
    const SparseLimits limits = sparsekern::limits();
    part = limits.lanes * limits.tall;
    const int64_t all = grid.length + grid.reach;
    const int64_t room = 4 * kTileFloats / (all_channels * grid.planes()) - 2 * grid.reach;
    // Without a reach nothing is done twice; rows of a few cache lines are slow to write, whatever their number.
    const int64_t most = std::max({grid.reach ? room : std::min(room, 4 * part), part, 4 * grid.reach});
    per_span = ceil_divide(all, most);
    positions = ceil_divide(ceil_divide(all, per_span), limits.lanes) * limits.lanes;
    per_span = ceil_divide(all, positions);
    count = per_span * grid.spans;
    width = ceil_divide(positions + grid.reach, limits.lanes) * limits.lanes + ceil_divide(grid.reach, 16) * 16;
    if (width / 16 % 2 == 0) width += 16;  // an odd number of cache lines spreads the channels over all sets
    shares = std::clamp<int64_t>(std::min(ceil_divide(kTasks, count), all_channels / 16), 1, kMostShares);
    channels = ceil_divide(all_channels, shares);
    const int64_t down = grid.rows.output * grid.rows.stride, across = grid.columns.output * grid.columns.stride;
    stream = grid.images * all_channels * down * across >= kStreamFloats;
  }
};

// One set of rows: the blocks whose channels are of one share. In a row those of one tap come one after another: a
// block that read what the one before it has just written a pixel further would wait for that.
int32_t* plan_share(const SparseForm& form, const Grid& grid, const Tiles& t, int64_t share, int32_t* plan) {
  const SparseShape& shape = form.shape;
  const int64_t down = int64_t(grid.rows.taps.size()), across = int64_t(grid.columns.taps.size());
  const int64_t taps = down * across, rows = shape.block_rows(), of_group = rows / shape.groups;
  int32_t* const pointers = plan + 4;
  const auto channel_of = [&](int64_t row, int64_t k) {
    return row / of_group * shape.channels + form.indices[k] / taps - share * t.channels;
  };
  const auto each = [&](int64_t row, auto body) {
    for (int64_t k = form.pointers[row]; k < form.pointers[row + 1]; ++k) {
      const int64_t channel = channel_of(row, k);
      if (channel >= 0 && channel < t.channels) body(k, channel, form.indices[k] % taps);
    }
  };
  int32_t blocks = 0;
  for (int64_t row = 0; row < rows; ++row) {
    pointers[row] = blocks;
    each(row, [&](int64_t, int64_t, int64_t) { ++blocks; });
  }
  pointers[rows] = blocks;
  const PlanParts parts(plan, rows, blocks, t.width);
  std::vector<int32_t> next(taps + 1);
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(next.begin(), next.end(), 0);
    each(row, [&](int64_t, int64_t, int64_t tap) { ++next[tap + 1]; });
    for (int64_t i = 0; i < taps; ++i) next[i + 1] += next[i];
    each(row, [&](int64_t k, int64_t channel, int64_t tap) {
      const Axis::Tap &v = grid.rows.taps[tap / across], &h = grid.columns.taps[tap % across];
      const int64_t plane = v.plane * int64_t(grid.columns.planes.size()) + h.plane;
      const int64_t at = pointers[row] + next[tap]++;
      parts.activations[at] =
          static_cast<int32_t>((plane * t.channels + channel) * t.width + v.shift * grid.pitch + h.shift);
      parts.elements[at] = form.element(k, row, form.in_row(form.indices[k] / taps, tap / across, tap % across));
    });
  }
  return parts.end;
}

// The runs of two planes whose pixels alternate in the image; those of the second lie `apart` floats behind those of
// the first. False if some do not alternate.
bool alternate(const std::vector<SparseRun>& first, const std::vector<SparseRun>& second, int64_t apart,
               std::vector<SparsePair>& pairs) {
  pairs.clear();
  auto a = first.begin(), b = second.begin();
  while (a != first.end() || b != second.end()) {
    const bool leads = b == second.end() || (a != first.end() && a->image < b->image);
    const bool both = a != first.end() && b != second.end() && std::abs(a->image - b->image) == 1;
    const SparseRun lead = leads ? *a : *b, other = both ? leads ? *b : *a : SparseRun{0, 0, 0};
    if (lead.count < other.count || lead.count > other.count + 1) return false;
    const int64_t even = lead.packed + (leads ? 0 : apart), odd = other.packed + (leads ? apart : 0);
    pairs.push_back({lead.image, even, odd, lead.count + other.count});
    a += both || leads;
    b += both || !leads;
  }
  return true;
}

// Positions [first, last) of a span, which begin at `packed`, to their image.
void unpack_tile(const Grid& grid, const Tiles& t, int64_t span, int64_t first, int64_t last, const float* packed,
                 int64_t channels, const Image<float>& result, const std::optional<SpreadShape>& spread) {
  thread_local std::vector<SparseRun> runs, others;
  thread_local std::vector<SparsePair> pairs;
  const int64_t apart = t.channels * t.width, step = grid.columns.stride;
  // Both phases of a row of pixels are written at once, which took 0.81 to 0.87 times as long at 98% (Sapphire Rapids).
  const bool paired = step == 2 && grid.columns.planes.size() == 2 && result.strides.column == 1;
  for (int64_t plane = 0; plane < grid.planes(); ++plane, packed += apart) {
    grid.inputs(runs, span, first, last - first, plane, result.strides);
    if (spread) {
      spread_runs(packed, t.width, runs, channels, step, result, *spread, t.stream);
      continue;
    }
    if (paired && plane % 2 == 0) {
      grid.inputs(others, span, first, last - first, plane + 1, result.strides);
      if (alternate(runs, others, apart, pairs)) {
        kernels().sparse_unpack_pairs(packed, t.width, pairs.data(), int64_t(pairs.size()), channels, result.data,
                                      result.strides.channel);
        ++plane;
        packed += apart;
        continue;
      }
    }
    unpack_runs(packed, t.width, t.positions, runs, channels, step, result, t.stream);
  }
}

void scatter_tile(const Grid& grid, const Tiles& t, int64_t tile, const Image<const float>& gradients,
                  const SparseRows& rows, int64_t block_rows, int64_t channels, const Image<float>& result,
                  const std::optional<SpreadShape>& spread) {
  thread_local Buffer<float> buffer, gradient_buffer;
  thread_local std::vector<SparseRun> runs;
  const int64_t span = tile / t.per_span, first = tile % t.per_span * t.positions;
  const int64_t last = std::min(first + t.positions, grid.length + grid.reach);
  const int64_t start = std::max<int64_t>(0, first - grid.reach), stop = std::min(last, grid.length);
  const int64_t floats = grid.planes() * t.channels * t.width;
  float* const packed = buffer.get(floats + t.part);
  std::fill(packed, packed + floats, 0.0f);
  for (int64_t n = start; n < stop; n += t.part) {
    const int64_t count = std::min(t.part, stop - n);
    grid.outputs(runs, span, n, count, gradients.strides);
    for (int64_t row = 0; row < block_rows; row += kRows) {
      const int64_t last = std::min(row + kRows, block_rows);
      const NumberedRows g = numbered_rows(runs, count, gradients, row * 4, (last - row) * 4, t.part, gradient_buffer);
      kernels().sparse_scatter(rows, row, last, g.data - row * 4 * g.width, g.width, count, packed + (n - start));
    }
  }
  unpack_tile(grid, t, span, first, last, packed + (first - start), channels, result, spread);
}

}  // namespace

bool plan_scattered(const SparseForm& form, const Grid& grid, int32_t* plan) {
  if (!is_structure(form, int64_t(grid.rows.taps.size() * grid.columns.taps.size()))) return false;
  const Tiles t(grid, form.shape.channels * form.shape.groups);
  check_offsets(t.channels * grid.planes(), t.width);
  for (int64_t share = 0; share < t.shares; ++share) plan = plan_share(form, grid, t, share, plan);
  return true;
}

bool scattered_gradient(const Grid& grid, const Image<const float>& gradients, const SparseShape& w, PlanReader plan,
                        const float* weight, const Image<float>& result, const std::optional<SpreadShape>& spread) {
  thread_local Buffer<float> buffers[kMostShares];
  const int64_t channels = w.channels * w.groups;
  const Tiles t(grid, channels);
  std::vector<SparseRows> shares;
  for (int64_t share = 0; share < t.shares; ++share) {
    PlannedRows rows;
    if (!plan.next(w.block_rows(), rows) || rows.width != t.width) return false;
    const float* const values = gather_values(rows, w, weight, buffers[share]);
    shares.push_back({rows.pointers, rows.activations, values, nullptr, t.width, w.tall, w.wide, true});
  }
  torch::stable::parallel_for(0, t.count * t.shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % t.shares * t.channels, count = std::min(t.channels, channels - from);
      const Image<float> part{result.data + from * result.strides.channel, result.strides};
      scatter_tile(grid, t, i / t.shares, gradients, shares[i % t.shares], w.block_rows(), count, part, spread);
    }
  });
  return true;
}

}  // namespace sparsekern
