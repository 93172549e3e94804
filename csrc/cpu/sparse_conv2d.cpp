// Host side of sparse_conv2d and sparse_linear on CPU: from tensors to a grid, a weight and two images.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "sparse_gradient.h"
#include "sparse_product.h"

namespace sparsekern {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

void check_float(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu() && t.dim() == dims, "sparsekern: ", name,
                  " must be float32 on CPU with ", dims, " dims");
}

SparseWeight sparse_weight(const Tensor& weight, const std::vector<Tensor>& structure, const std::string& layout,
                           int64_t groups) {
  const int32_t tall = layout == "4x1" ? 4 : 1, wide = layout == "1x4" ? 4 : 1;
  STD_TORCH_CHECK(structure.size() == 2, "sparsekern: structure must have two tensors");
  for (const Tensor& t : structure) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu() && t.dim() == 1 && t.is_contiguous(),
                    "sparsekern: structure must be contiguous, 1-d, int32 and on CPU");
  }
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  STD_TORCH_CHECK(groups > 0 && outputs % (groups * tall) == 0 && channels % wide == 0, "sparsekern: layout ", layout,
                  " must divide the channels of a group");
  STD_TORCH_CHECK(structure[0].numel() == outputs / tall + 1, "sparsekern: structure must have a pointer per row");
  const bool image = weight.dim() == 4;
  return {weight.const_data_ptr<float>(),
          {weight.stride(0), weight.stride(1), image ? weight.stride(2) : 0, image ? weight.stride(3) : 0},
          outputs,
          channels,
          groups,
          structure[0].const_data_ptr<int32_t>(),
          structure[1].const_data_ptr<int32_t>(),
          structure[1].numel(),
          tall,
          wide};
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

const float* bias_of(const std::optional<Tensor>& bias, const Tensor& weight) {
  if (!bias) return nullptr;
  check_float(*bias, "bias", 1);
  STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == weight.size(0), "sparsekern: bias must have ",
                  weight.size(0), " contiguous entries");
  return bias->const_data_ptr<float>();
}

int64_t lanes() {
  SparseLimits limits;
  kernels().sparse_limits(&limits);
  return limits.lanes;
}

Axis axis(const Tensor& input, const Tensor& weight, const Tensor& result, int64_t dim, int64_t stride, int64_t padding,
          int64_t dilation) {
  const int64_t size = input.size(dim), kernel = weight.size(dim), output = result.size(dim);
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0 && output > 0 &&
                      (output - 1) * stride + (kernel - 1) * dilation < size + 2 * padding,
                  "sparse_conv2d: geometry of dim ", dim, " does not give ", output, " outputs");
  std::vector<int64_t> positions;
  for (int64_t k = 0; k < kernel; ++k) positions.push_back(k * dilation);
  return Axis(size, output, stride, padding, positions);
}

// Fills `result`; false if the structure is not one.
bool sparse_conv2d_cpu(Tensor result, Tensor input, Tensor weight, std::vector<Tensor> structure, std::string layout,
                       std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, int64_t groups) {
  check_float(input, "input", 4);
  check_float(weight, "weight", 4);
  check_float(result, "result", 4);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "sparse_conv2d: stride, padding and dilation must have two entries");
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups && result.size(0) == input.size(0) &&
                      result.size(1) == weight.size(0) && result.numel() > 0,
                  "sparse_conv2d: input, weight and result must agree in batch and channels");
  const SparseWeight w = sparse_weight(weight, structure, layout, groups);
  const Grid grid(axis(input, weight, result, 2, stride[0], padding[0], dilation[0]),
                  axis(input, weight, result, 3, stride[1], padding[1], dilation[1]), input.size(0), lanes());
  return sparse_product(grid, {input.const_data_ptr<float>(), strides_of(input)}, w, bias_of(bias, weight),
                        {result.mutable_data_ptr<float>(), strides_of(result)});
}

// The rows of `input` are the pixels of one image, channels last.
bool sparse_linear_cpu(Tensor result, Tensor input, Tensor weight, std::vector<Tensor> structure, std::string layout,
                       std::optional<Tensor> bias) {
  check_float(input, "input", 2);
  check_float(weight, "weight", 2);
  check_float(result, "result", 2);
  const int64_t rows = input.size(0);
  STD_TORCH_CHECK(input.size(1) == weight.size(1) && result.size(0) == rows && result.size(1) == weight.size(0) &&
                      result.numel() > 0,
                  "sparse_linear: input, weight and result must agree in rows and features");
  const SparseWeight w = sparse_weight(weight, structure, layout, 1);
  const Grid grid(Axis(1, 1, 1, 0, {0}), Axis(rows, rows, 1, 0, {0}), 1, lanes());
  return sparse_product(grid, {input.const_data_ptr<float>(), {0, input.stride(1), 0, input.stride(0)}}, w,
                        bias_of(bias, weight),
                        {result.mutable_data_ptr<float>(), {0, result.stride(1), 0, result.stride(0)}});
}

// One spatial axis of both operands of a gradient.
GradientAxis gradient_axis(const Tensor& input, const Tensor& weight, const Tensor& grad, int64_t dim, int64_t stride,
                           int64_t padding, int64_t dilation) {
  return {axis(input, weight, grad, dim, stride, padding, dilation), input.size(dim), weight.size(dim), dilation};
}

// Fills the gradients of input and weight that are not empty; false, with unknown results, if the structure is not one.
bool sparse_conv2d_backward_cpu(Tensor grad_input, Tensor grad_weight, Tensor grad, Tensor input, Tensor weight,
                                std::vector<Tensor> structure, std::string layout, std::vector<int64_t> stride,
                                std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  check_float(input, "input", 4);
  check_float(weight, "weight", 4);
  check_float(grad, "grad", 4);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "sparse_conv2d_backward: stride, padding and dilation must have two entries");
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups && grad.size(0) == input.size(0) &&
                      grad.size(1) == weight.size(0) && grad.numel() > 0,
                  "sparse_conv2d_backward: input, weight and grad must agree in batch and channels");
  const SparseWeight w = sparse_weight(weight, structure, layout, groups);
  const GradientAxis rows = gradient_axis(input, weight, grad, 2, stride[0], padding[0], dilation[0]);
  const GradientAxis columns = gradient_axis(input, weight, grad, 3, stride[1], padding[1], dilation[1]);
  const Image<const float> gradients{grad.const_data_ptr<float>(), strides_of(grad)};
  if (grad_weight.numel() > 0) {
    check_float(grad_weight, "grad_weight", 4);
    STD_TORCH_CHECK(grad_weight.sizes().equals(weight.sizes()),
                    "sparse_conv2d_backward: grad_weight must have weight's shape");
    const Grid grid(rows.forward, columns.forward, input.size(0), lanes());
    if (!sparse_weight_gradient(grid, {input.const_data_ptr<float>(), strides_of(input)}, w, gradients,
                                {grad_weight.mutable_data_ptr<float>(), strides_of(grad_weight)})) {
      return false;
    }
  }
  if (grad_input.numel() == 0) return true;
  check_float(grad_input, "grad_input", 4);
  STD_TORCH_CHECK(grad_input.sizes().equals(input.sizes()),
                  "sparse_conv2d_backward: grad_input must have input's shape");
  return sparse_input_gradient(rows, columns, gradients, w,
                               {grad_input.mutable_data_ptr<float>(), strides_of(grad_input)}, input.size(0), lanes());
}

Strides pixel_rows(const Tensor& t) { return {0, t.stride(1), 0, t.stride(0)}; }

// Fills the gradients of input and weight that are not empty; false, with unknown results, if the structure is not one.
bool sparse_linear_backward_cpu(Tensor grad_input, Tensor grad_weight, Tensor grad, Tensor input, Tensor weight,
                                std::vector<Tensor> structure, std::string layout) {
  check_float(input, "input", 2);
  check_float(weight, "weight", 2);
  check_float(grad, "grad", 2);
  const int64_t count = input.size(0);
  STD_TORCH_CHECK(
      input.size(1) == weight.size(1) && grad.size(0) == count && grad.size(1) == weight.size(0) && grad.numel() > 0,
      "sparse_linear_backward: input, weight and grad must agree in rows and features");
  const SparseWeight w = sparse_weight(weight, structure, layout, 1);
  const GradientAxis rows{Axis(1, 1, 1, 0, {0}), 1, 1, 1}, columns{Axis(count, count, 1, 0, {0}), count, 1, 1};
  const Image<const float> gradients{grad.const_data_ptr<float>(), pixel_rows(grad)};
  if (grad_weight.numel() > 0) {
    check_float(grad_weight, "grad_weight", 2);
    STD_TORCH_CHECK(grad_weight.sizes().equals(weight.sizes()),
                    "sparse_linear_backward: grad_weight must match weight");
    if (!sparse_weight_gradient(
            Grid(rows.forward, columns.forward, 1, lanes()), {input.const_data_ptr<float>(), pixel_rows(input)}, w,
            gradients, {grad_weight.mutable_data_ptr<float>(), {grad_weight.stride(0), grad_weight.stride(1), 0, 0}})) {
      return false;
    }
  }
  if (grad_input.numel() == 0) return true;
  check_float(grad_input, "grad_input", 2);
  STD_TORCH_CHECK(grad_input.sizes().equals(input.sizes()), "sparse_linear_backward: grad_input must match input");
  return sparse_input_gradient(rows, columns, gradients, w,
                               {grad_input.mutable_data_ptr<float>(), pixel_rows(grad_input)}, 1, lanes());
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_sparse_conv2d_cpu", TORCH_BOX(&sparsekern::sparse_conv2d_cpu));
  m.impl("_sparse_conv2d_backward_cpu", TORCH_BOX(&sparsekern::sparse_conv2d_backward_cpu));
  m.impl("_sparse_linear_backward_cpu", TORCH_BOX(&sparsekern::sparse_linear_backward_cpu));
  m.impl("_sparse_linear_cpu", TORCH_BOX(&sparsekern::sparse_linear_cpu));
}
