#include "sparse_tiling.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "dispatch.h"

namespace sparsekern {
namespace {

// Of an image whose channels do not begin on cache lines, each vector is read from two, half as fast. Packing it first
// pays if each channel is read this often: measured (Sapphire Rapids, batch 1) on the pointwise layers of ResNet-50
// with 14x14 and 7x7 pixels, 1.1 to 1.6 times as fast from 10 on, slower below, as it always is on 28x28 and 56x56.
constexpr int64_t kPackedReads = 10;

}  // namespace

SparseLimits limits() {
  SparseLimits found;
  kernels().sparse_limits(&found);
  return found;
}

int64_t part_begin(const int32_t* pointers, int64_t rows, int64_t i, int64_t n) {
  const int64_t wanted = (pointers[rows] + 2 * rows) * i / n;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (pointers[middle] + 2 * middle < wanted ? low = middle + 1 : high = middle);
  }
  return low;
}

bool shares_tiles(int64_t tiles, int64_t threads) { return threads > 1 && tiles < 4 * threads; }

Tiling::Tiling(const Grid& grid, int64_t channels, int64_t lanes, int64_t most) {
  const int64_t vectors = ceil_divide(grid.length, lanes);
  const int64_t room = kTileFloats / (channels * grid.planes()) - grid.reach;
  // Without a reach nothing is packed twice, and the smallest tile is the best one, unless a stride leaves short runs.
  const int64_t fitting = grid.reach || grid.columns.stride > 1 ? std::max(most, room / lanes) : most;
  per_span = ceil_divide(vectors, fitting);
  tile = ceil_divide(vectors, per_span) * lanes;
  per_span = ceil_divide(grid.length, tile);
  width = ceil_divide(tile + grid.reach, lanes) * lanes;
  // An odd number of cache lines spreads the rows of a tile over all sets.
  if (tile > most * lanes && width / 16 % 2 == 0) width += std::max<int64_t>(lanes, 16);
  count = per_span * grid.spans;
  part = ceil_divide(tile / lanes, ceil_divide(tile / lanes, most)) * lanes;
}

void check_offsets(int64_t rows, int64_t width) {
  STD_TORCH_CHECK(rows * width < INT32_MAX, "sparsekern: ", rows, " channels do not fit one tile of 32-bit offsets");
}

bool in_place(const Grid& grid, const Strides& s) {
  return grid.planes() == 1 && grid.reach == 0 && grid.length == s.channel && s.column == 1 &&
         grid.columns.stride == 1 && grid.rows.stride == 1 && grid.columns.padding == 0 && grid.rows.padding == 0;
}

bool numbered_in_place(const Grid& grid, const Strides& s) {
  return grid.spans == grid.images && grid.pitch == grid.columns.output && s.column == 1 && s.row == grid.pitch;
}

Plan::Plan(const Tiling& tiling, int64_t rows, bool place, int64_t width)
    : tiling(tiling), place(place), width(place ? width : tiling.width) {
  check_offsets(rows, this->width);
}

Plan::Plan(const Grid& grid, int64_t channels, int32_t tall, const Strides& input, bool direct)
    : Plan(Tiling(grid, channels, limits().lanes, tall == 4 ? limits().tall : limits().flat), channels * grid.planes(),
           direct && in_place(grid, input), input.channel) {}

void Plan::pack_if_read_often(int64_t channels, int64_t reads) {
  // What one core has packed is slow for another one to read.
  if (shares_tiles(tiling.count, torch::stable::get_num_threads())) return;
  if (place && width % kLineFloats && reads >= kPackedReads * channels) agree(tiling.width);
}

bool Plan::agree(int64_t planned_width) {
  if (place && planned_width == tiling.width) {
    place = false;
    width = planned_width;
  }
  return planned_width == width;
}

}  // namespace sparsekern
