// How the numbers of a grid are cut into tiles, and where an image may be its own tile.
#pragma once
#include "sparse_image.h"

namespace sparsekern {

constexpr int64_t kLineFloats = 16;  // of a cache line

// Of the instruction set in use.
SparseLimits limits();

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

// Whether the pixels of an output lie as the grid numbers them.
bool numbered_in_place(const Grid& grid, const Strides& s);

// Where such a tile begins.
inline const float* place(const Tiling& t, const Image<const float>& image, int64_t tile) {
  return image.data + tile / t.per_span * image.strides.batch + tile % t.per_span * t.tile;
}

// Raises unless `rows` rows of `width` floats can be addressed by a plan.
void check_offsets(int64_t rows, int64_t width);

// The first block row of part i of n: parts have about equal work, a row counting as two blocks more than it has.
int64_t part_begin(const int32_t* pointers, int64_t rows, int64_t i, int64_t n);

// Whether there are so few tiles that their rows are shared out over the threads too.
bool shares_tiles(int64_t tiles, int64_t threads);

}  // namespace sparsekern
