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

// output = weight * input + bias (may be null) at every output pixel of the grid. False, with nothing written, if the
// structure is not one: rows that fall or leave the indices, indices that leave the grid or do not ascend. Sums run in
// the order of the indices, so results depend neither on threads nor on tiles.
bool sparse_product(const Grid& grid, const Image<const float>& input, const SparseWeight& weight, const float* bias,
                    const Image<float>& output);

}  // namespace sparsekern
