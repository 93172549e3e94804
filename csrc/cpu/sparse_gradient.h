// The gradients of a sparse product for its input and for its kept weights.
#pragma once
#include "sparse_plan.h"

namespace sparsekern {

// One spatial axis of a convolution: its forward axis, the size of the input and what the taps were made of.
struct GradientAxis {
  Axis forward;
  int64_t size, kernel, dilation;
};

// Plans for the functions below; false if the structure is not one. The size is that of a plan of the weight's
// gradient.
int64_t weight_plan_size(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                         const Strides& input);
bool plan_weight_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                          const Strides& input, const Strides& gradients, int64_t images, int32_t* plan);
bool plan_input_gradient(const SparseForm& form, const GradientAxis& rows, const GradientAxis& columns,
                         const Strides& gradients, int64_t images, int64_t lanes, int32_t* plan);

// The gradient of the weight, stored as the weight is: each output has `row_size` neighbouring elements, which are 0
// but for its kept blocks; a packed gradient holds only those, and `row_size` is 0. Sums run over tiles in order, so
// results do not depend on threads. False, with nothing written, if the plan is for other tiles.
bool sparse_weight_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& input,
                            const SparseShape& w, PlanReader plan, const Image<const float>& gradients, float* result,
                            int64_t row_size, int64_t images);

// Whether the function below writes all of `result`, or leaves pixels that no tap reaches by the stride as they are.
bool fills_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Strides& gradients,
                          const SparseShape& w, const Strides& result, int64_t images, int64_t lanes);

// The gradient of the input. False if the plan is for other tiles.
bool sparse_input_gradient(const GradientAxis& rows, const GradientAxis& columns, const Image<const float>& gradients,
                           const SparseShape& w, PlanReader plan, const float* weight, const Image<float>& result,
                           int64_t images, int64_t lanes);

}  // namespace sparsekern
