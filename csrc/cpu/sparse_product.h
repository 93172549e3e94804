// Planned rows times the activations of a grid: what convolution, linear layers and input gradients run on.
#pragma once
#include "sparse_image.h"

namespace sparsekern {

// Of the instruction set in use.
SparseLimits limits();

// Results of more floats than this, 8 MiB, go past the caches, which saves reading them first.
constexpr int64_t kStreamFloats = 1 << 21;

// An eighth of a usual second-level cache, beside the parts of images that are packed and written. With twice as much,
// layers with a stride took 1.05 times as long, and plain 3x3 ones 1.02 times (Sapphire Rapids, batch 1 and 16).
constexpr int64_t kTileFloats = (256 << 10) / 4;

// The packed tile: as many numbers as fit the cache, cut evenly; a kernel call takes `part` of them.
struct Tiling {
  int64_t tile, width, per_span, count, part;
  Tiling(const Grid& grid, int64_t channels, int64_t lanes, int64_t most);
};

// How a grid is multiplied: `width` floats lie between the channels of a tile, which may be the image itself.
struct Plan {
  Tiling tiling;
  bool place;
  int64_t width;
  // `direct`: the image may be the tile; else each tile is packed, as images of bfloat16 must be.
  Plan(const Grid& grid, int64_t channels, int32_t tall, const Strides& input, bool direct = true);
  Plan(const Tiling& tiling, int64_t rows, bool place, int64_t width);

  // Packs the tiles of an image that could be the tile itself if `reads` rows of it in all make that pay.
  void pack_if_read_often(int64_t channels, int64_t reads);
  // Packs such tiles if rows were planned so; false if they were planned for neither.
  bool agree(int64_t planned_width);
};

// Whether tiles may be ranges of the image itself: one tap that reads each pixel where it lies.
bool in_place(const Grid& grid, const Strides& s);

// Where such a tile begins.
inline const float* place(const Tiling& t, const Image<const float>& image, int64_t tile) {
  return image.data + tile / t.per_span * image.strides.batch + tile % t.per_span * t.tile;
}

// Raises unless `rows` rows of `width` floats can be addressed by a plan.
void check_offsets(int64_t rows, int64_t width);

// The first block row of part i of n: parts have about equal work, a row counting as two blocks more than it has.
int64_t part_begin(const int32_t* pointers, int64_t rows, int64_t i, int64_t n);

// output = rows * input + bias at every output pixel of the grid, and the epilogue; offsets are made for plan.width.
// `residual` has output's strides, or is null. Sums run in the order of the blocks, so results depend neither on
// threads nor on tiles. T is float, or BFloat16, whose results are the sums in float, rounded once; it has no residual.
template <class T>
void multiply(const Grid& grid, const Plan& plan, const Image<const T>& input, int64_t channels, SparseRows s,
              int64_t rows, const Image<T>& output, const float* residual = nullptr);

}  // namespace sparsekern
