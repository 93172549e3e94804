// The gradients of sparse_product for its input and for its kept weights.
#pragma once
#include "sparse_product.h"

namespace sparsekern {

// One spatial axis of a convolution: its forward axis, the size of the input and what the taps were made of.
struct GradientAxis {
  Axis forward;
  int64_t size, kernel, dilation;
};

// The gradient of the weight at its kept blocks, (out, in / groups, rows, columns); other elements stay as they are.
// Sums run over tiles in order, so results do not depend on threads. False if the structure is not one.
bool sparse_weight_gradient(const Grid& grid, const Image<const float>& input, const SparseWeight& weight,
                            const Image<const float>& gradients, const Image<float>& result);

// The gradient of the input. Pixels that no tap reaches by the stride stay as they are. False if the structure is not
// one.
bool sparse_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& gradients,
                           const SparseWeight& weight, const Image<float>& result, int64_t images, int64_t lanes);

}  // namespace sparsekern
