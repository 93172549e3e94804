// Host side of sparse_conv2d and sparse_linear on CPU: from tensors to a grid, planned rows and two images.
//
// Each pass is two calls: one makes a plan from a structure, the other runs it and answers false if the plan was made
// for other tiles than those of the instruction set in use. Callers keep plans and never take them from a user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "sparse_gradient.h"
#include "sparse_scatter.h"

namespace sparsekern {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Ints = std::vector<int64_t>;

void check_values(const Tensor& t, const char* name, int64_t dims, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_cpu() && t.dim() == dims, "sparsekern: ", name, " must be ",
                  type == ScalarType::Float ? "float32" : "bfloat16", " on CPU with ", dims, " dims");
}

// The product takes both types, for all operands alike; the gradients take float32.
ScalarType type_of(const Tensor& input) {
  return input.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

void check_ints(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu() && t.dim() == 1 && t.is_contiguous(),
                  "sparsekern: structure must be contiguous, 1-d, int32 and on CPU");
}

// The weight is dense, (out, in / groups, rows, columns) or (out, in), or packed: 1-d.
SparseShape sparse_shape(const Tensor& weight, const Ints& shape, const std::string& layout, int64_t groups,
                         ScalarType type = ScalarType::Float) {
  const int32_t tall = layout == "4x1" ? 4 : 1, wide = layout == "1x4" ? 4 : 1;
  STD_TORCH_CHECK(shape.size() == 4 && groups > 0 && shape[0] % (groups * tall) == 0 && shape[1] % wide == 0,
                  "sparsekern: layout ", layout, " must divide the channels of a group");
  const bool packed = weight.dim() == 1;
  check_values(weight, "weight", packed ? 1 : weight.dim(), type);
  STD_TORCH_CHECK(packed || weight.numel() == shape[0] * shape[1] * shape[2] * shape[3],
                  "sparsekern: weight must have its shape or be packed");
  const int64_t step = packed || tall * wide == 1 ? 1 : weight.stride(tall == 4 ? 0 : 1);
  return {shape[0], shape[1], groups, tall, wide, step};
}

SparseForm sparse_form(const Tensor& weight, const std::vector<Tensor>& structure, const SparseShape& shape) {
  STD_TORCH_CHECK(structure.size() == 2, "sparsekern: structure must have two tensors");
  for (const Tensor& t : structure) check_ints(t);
  STD_TORCH_CHECK(structure[0].numel() == shape.block_rows() + 1, "sparsekern: structure must have a pointer per row");
  SparseForm form{shape, weight.dim() == 1, {}, nullptr, nullptr, structure[1].numel()};
  for (int64_t i = 0; i < weight.dim(); ++i) form.strides[i] = weight.stride(i);
  form.pointers = structure[0].const_data_ptr<int32_t>();
  form.indices = structure[1].const_data_ptr<int32_t>();
  STD_TORCH_CHECK(!form.packed || weight.numel() == form.blocks * shape.block(),
                  "sparsekern: a packed weight must have the structure's kept elements");
  return form;
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// The operands of a convolution: images, kernel and how they meet.
struct Geometry {
  GradientAxis rows, columns;
  int64_t images, lanes;

  Grid grid() const { return Grid(rows.forward, columns.forward, images, lanes); }
};

GradientAxis axis(const Tensor& input, const Tensor& result, int64_t dim, int64_t kernel, int64_t stride,
                  int64_t padding, int64_t dilation) {
  const int64_t size = input.size(dim), output = result.size(dim);
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0 && output > 0 &&
                      (output - 1) * stride + (kernel - 1) * dilation < size + 2 * padding,
                  "sparsekern: geometry of dim ", dim, " does not give ", output, " outputs");
  Ints positions;
  for (int64_t k = 0; k < kernel; ++k) positions.push_back(k * dilation);
  return {Axis(size, output, stride, padding, positions), size, kernel, dilation};
}

// `geometry`: stride, padding and dilation, each vertical then horizontal.
Geometry geometry_of(const Tensor& input, const Tensor& result, const Ints& shape, const Ints& geometry,
                     const SparseShape& w, ScalarType type = ScalarType::Float) {
  check_values(input, "input", 4, type);
  check_values(result, "result", 4, type);
  STD_TORCH_CHECK(geometry.size() == 6, "sparsekern: geometry must have six entries");
  STD_TORCH_CHECK(input.size(1) == w.channels * w.groups && result.size(0) == input.size(0) &&
                      result.size(1) == w.outputs && result.numel() > 0,
                  "sparsekern: input, weight and result must agree in batch and channels");
  return {axis(input, result, 2, shape[2], geometry[0], geometry[2], geometry[4]),
          axis(input, result, 3, shape[3], geometry[1], geometry[3], geometry[5]), input.size(0), limits().lanes};
}

PlanReader reader(const Tensor& plan) {
  check_ints(plan);
  return PlanReader(plan.const_data_ptr<int32_t>(), plan.numel());
}

Plan plan_of(const Grid& grid, const Tensor& input, const SparseShape& w) {
  return Plan(grid, input.size(1), w.tall, strides_of(input), type_of(input) == ScalarType::Float);
}

// Fills `plan` for one pass; false if the structure is not one. `result` is the output of the convolution or its
// gradient.
bool sparse_plan_cpu(Tensor plan, std::string pass, Tensor input, Tensor result, Tensor weight,
                     std::vector<Tensor> structure, std::string layout, Ints shape, Ints geometry, int64_t groups) {
  const ScalarType type = pass == "product" ? type_of(input) : ScalarType::Float;
  const SparseShape w = sparse_shape(weight, shape, layout, groups, type);
  const SparseForm form = sparse_form(weight, structure, w);
  const Geometry g = geometry_of(input, result, shape, geometry, w, type);
  check_ints(plan);
  const bool transposed = pass == "input";
  const int64_t sets = transposed ? std::max(kMostShares, geometry[0] * geometry[1]) : 1;
  const int64_t rows = transposed ? std::max(w.channels * groups, w.block_rows()) : w.block_rows();
  STD_TORCH_CHECK(plan.numel() >= sets * planned_size(rows, 0) + 2 * form.blocks, "sparsekern: plan is too small");
  int32_t* const to = plan.mutable_data_ptr<int32_t>();
  if (pass == "input") return plan_input_gradient(form, g.rows, g.columns, strides_of(result), g.images, g.lanes, to);
  if (pass == "weight") return plan_weight_gradient(form, g.rows, g.columns, strides_of(input), g.images, to);
  const Grid grid = g.grid();
  Plan tiles = plan_of(grid, input, w);
  tiles.pack_if_read_often(input.size(1), form.blocks * w.wide);
  return plan_rows(form, grid, tiles.width, to);
}

// A contiguous vector with an entry per output channel, or null.
const float* per_output(const std::optional<Tensor>& t, const char* name, const SparseShape& w) {
  if (!t) return nullptr;
  check_values(*t, name, 1, ScalarType::Float);
  STD_TORCH_CHECK(t->is_contiguous() && t->numel() == w.outputs, "sparsekern: ", name, " must have ", w.outputs,
                  " contiguous entries");
  return t->const_data_ptr<float>();
}

const float* residual_of(const std::optional<Tensor>& t, const Tensor& result) {
  if (!t) return nullptr;
  check_values(*t, "residual", 4, ScalarType::Float);
  STD_TORCH_CHECK(t->sizes().equals(result.sizes()) && t->strides().equals(result.strides()),
                  "sparsekern: residual must lie as result does");
  return t->const_data_ptr<float>();
}

// T is the type of input, weight and result; `sparse` lacks its values.
template <class T>
void multiply_images(const Grid& grid, const Plan& tiles, const Tensor& input, const Tensor& weight, SparseRows sparse,
                     const PlannedRows& rows, const SparseShape& w, Tensor& result, const float* residual) {
  thread_local Buffer<float> buffer;
  const T* const values = static_cast<const T*>(weight.const_data_ptr());
  if constexpr (std::is_same_v<T, float>) sparse.values = values;
  if (weight.dim() > 1 || !sparse.values) sparse.values = gather_values(rows, w, values, buffer);
  const Image<const T> from{static_cast<const T*>(input.const_data_ptr()), strides_of(input)};
  const Image<T> to{static_cast<T*>(result.mutable_data_ptr()), strides_of(result)};
  multiply(grid, tiles, from, input.size(1), sparse, rows.rows, to, residual);
}

bool sparse_product_cpu(Tensor result, Tensor input, Tensor weight, Tensor plan, std::string layout,
                        std::optional<Tensor> bias, std::optional<Tensor> scale, std::optional<Tensor> residual,
                        double low, double high, Ints shape, Ints geometry, int64_t groups) {
  const ScalarType type = type_of(input);
  const SparseShape w = sparse_shape(weight, shape, layout, groups, type);
  const Geometry g = geometry_of(input, result, shape, geometry, w, type);
  STD_TORCH_CHECK(type == ScalarType::Float || !residual, "sparsekern: residual must be none with bfloat16");
  const SparseEpilogue epilogue{per_output(scale, "scale", w), static_cast<float>(low), static_cast<float>(high)};
  const float *const added = per_output(bias, "bias", w), *const held = residual_of(residual, result);
  const Grid grid = g.grid();
  Plan tiles = plan_of(grid, input, w);
  PlannedRows rows;
  if (!reader(plan).next(w.block_rows(), rows) || !tiles.agree(rows.width)) return false;
  const SparseRows sparse{rows.pointers, rows.activations, nullptr, added, 0, w.tall, w.wide, true, epilogue};
  if (type == ScalarType::Float) {
    multiply_images<float>(grid, tiles, input, weight, sparse, rows, w, result, held);
  } else {
    multiply_images<BFloat16>(grid, tiles, input, weight, sparse, rows, w, result, nullptr);
  }
  return true;
}

// `result` is stored as the weight is, output by output.
bool sparse_weight_gradient_cpu(Tensor result, Tensor grad, Tensor input, Tensor plan, std::string layout, Ints shape,
                                Ints geometry, int64_t groups) {
  const SparseShape w = sparse_shape(result, shape, layout, groups);
  const Geometry g = geometry_of(input, grad, shape, geometry, w);
  const int64_t row_size = result.dim() > 1 ? result.numel() / w.outputs : 0;
  STD_TORCH_CHECK(result.dim() == 1 || w.outputs == 1 || result.stride(0) == row_size,
                  "sparsekern: the outputs of a weight gradient must follow each other in memory");
  return sparse_weight_gradient(g.rows, g.columns, {input.const_data_ptr<float>(), strides_of(input)}, w, reader(plan),
                                {grad.const_data_ptr<float>(), strides_of(grad)}, result.mutable_data_ptr<float>(),
                                row_size, g.images);
}

bool sparse_input_gradient_cpu(Tensor result, Tensor grad, Tensor weight, Tensor plan, std::string layout, Ints shape,
                               Ints geometry, int64_t groups) {
  const SparseShape w = sparse_shape(weight, shape, layout, groups);
  const Geometry g = geometry_of(result, grad, shape, geometry, w);
  return sparse_input_gradient(g.rows, g.columns, {grad.const_data_ptr<float>(), strides_of(grad)}, w, reader(plan),
                               weight.const_data_ptr<float>(), {result.mutable_data_ptr<float>(), strides_of(result)},
                               g.images, g.lanes);
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_sparse_plan_cpu", TORCH_BOX(&sparsekern::sparse_plan_cpu));
  m.impl("_sparse_product_cpu", TORCH_BOX(&sparsekern::sparse_product_cpu));
  m.impl("_sparse_weight_gradient_cpu", TORCH_BOX(&sparsekern::sparse_weight_gradient_cpu));
  m.impl("_sparse_input_gradient_cpu", TORCH_BOX(&sparsekern::sparse_input_gradient_cpu));
}
