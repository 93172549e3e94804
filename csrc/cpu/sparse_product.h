// A sparse weight times the activations of a grid: what forward convolution and linear layers run on.
#pragma once
#include <cstdint>

#include "sparse_grid.h"

namespace sparsekern {

// A dense weight (out, in / groups, rows, columns) of any strides and the compressed rows of its kept blocks, which are
// `tall` outputs by `wide` inputs: the layouts of sparsekern/ops/sparse_structure.py. Pointers and indices may lie.
struct SparseWeight {
  const float* data;
  int64_t strides[4];
  int64_t outputs, channels, groups;
  const int32_t* pointers;
  const int32_t* indices;
  int64_t blocks;
  int32_t tall, wide;
  int64_t block_rows() const { return outputs / tall; }
};

template <class T>
struct Image {
  T* data;
  Strides strides;
};

// Half of a usual second-level cache: the other half streams the weights.
constexpr int64_t kTileFloats = (512 << 10) / 4;

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
  Plan(const Grid& grid, int64_t channels, int32_t tall, const Strides& input);
};

// Packs `channels` rows of `width` floats; `step` pixels lie between the pixels of a run.
void pack_runs(const Image<const float>& input, int64_t step, const std::vector<SparseRun>& runs, int64_t channels,
               float* packed, int64_t width);

// The first block row of part i of n: parts have about equal work, a row counting as two blocks more than it has.
int64_t part_begin(const int32_t* pointers, int64_t rows, int64_t i, int64_t n);

// output = rows * input + bias at every output pixel of the grid; offsets are made for plan.width.
void multiply(const Grid& grid, const Plan& plan, const Image<const float>& input, int64_t channels, SparseRows s,
              int64_t rows, const Image<float>& output);

// output = weight * input + bias (may be null) at every output pixel of the grid. False, with nothing written, if the
// structure is not one: rows that fall or leave the indices, indices that leave the grid or do not ascend. Sums run in
// the order of the indices, so results depend neither on threads nor on tiles.
bool sparse_product(const Grid& grid, const Image<const float>& input, const SparseWeight& weight, const float* bias,
                    const Image<float>& output);

}  // namespace sparsekern
