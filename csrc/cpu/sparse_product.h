// Planned rows times the activations of a grid: what convolution, linear layers and input gradients run on.
#pragma once
#include <optional>

#include "sparse_tiling.h"

namespace sparsekern {

// Results of more floats than this, 8 MiB, go past the caches, which saves reading them first.
constexpr int64_t kStreamFloats = 1 << 21;

// output = rows * input + bias at every output pixel of the grid, and the epilogue; offsets are made for plan.width.
// `residual` has output's strides, or is null. Sums run in the order of the blocks, so results depend neither on
// threads nor on tiles. T is float, or BFloat16, whose results are the sums in float, rounded once; it has no residual.
template <class T>
void multiply(const Grid& grid, const Plan& plan, const Image<const T>& input, int64_t channels, SparseRows s,
              int64_t rows, const Image<T>& output, const float* residual = nullptr,
              const std::optional<SpreadShape>& spread = std::nullopt);

}  // namespace sparsekern
