// Host side of sparse_conv2d and sparse_linear on CPU: from tensors to a grid, planned rows and two images.
//
// Each pass is two calls: one makes a plan from a structure, the other runs it, and does not if the plan was made for
// other tiles than those of the instruction set in use. A plan begins with the convolution that it was made for, so a
// call takes few arguments: that is a good part of the time of a small layer. Callers keep plans and never take them
// from a user.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "sparse_call.h"
#include "sparse_order.h"
#include "sparse_scatter.h"

namespace sparsekern {
namespace {

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

// The plan of one pass, none if the structure is not one. `result` is the output of the convolution or its gradient.
std::optional<Tensor> sparse_plan_cpu(std::string pass, Tensor input, Tensor result, Tensor weight,
                                      std::vector<Tensor> structure, std::string layout, Ints shape, Ints geometry,
                                      int64_t groups) {
  const bool bfloat16 = pass == "product" && input.scalar_type() == ScalarType::BFloat16;
  const SparseCall call = sparse_call(input, result, weight, bfloat16 ? ScalarType::BFloat16 : ScalarType::Float,
                                      layout, shape, geometry, groups);
  const SparseShape& w = call.shape;
  const SparseForm form = sparse_form(weight, structure, w);
  // The gradient of the input has a set of rows per share of its channels or per phase of the stride.
  const bool transposed = pass == "input";
  const int64_t sets = transposed ? std::max(kMostShares, call.stride[0] * call.stride[1]) : 1;
  const int64_t rows = transposed ? std::max(w.channels * groups, w.block_rows()) : w.block_rows();
  const int64_t ints = pass == "weight" ? weight_plan_size(form, call.axis(0), call.axis(1), call.in.strides)
                                        : sets * (planned_size(rows, 0) + order_size(rows, 0)) +
                                              planned_size(0, form.blocks) + order_size(0, form.blocks);
  Tensor plan = torch::stable::new_empty(structure[1], {kHeadInts + ints});
  int32_t* const to = plan.mutable_data_ptr<int32_t>();
  std::memcpy(to, &call, sizeof call);
  bool good;
  if (transposed) {
    good = plan_input_gradient(form, call.axis(0), call.axis(1), call.out.strides, call.in.count, limits().lanes,
                               to + kHeadInts);
  } else if (pass == "weight") {
    good = plan_weight_gradient(form, call.axis(0), call.axis(1), call.in.strides, call.out.strides, call.in.count,
                                to + kHeadInts);
  } else {
    const Grid grid = call.grid();
    Plan tiles = call.tiles(grid);
    tiles.pack_if_read_often(call.in.channels, form.blocks * w.wide);
    good = plan_rows(form, grid, tiles.width, tiles.tiling.part, to + kHeadInts);
  }
  return good ? std::optional(plan) : std::nullopt;
}

// A contiguous vector with an entry per output channel, or null.
const float* per_output(const Operand& t, const char* name, const SparseShape& w) {
  if (!t.given) return nullptr;
  const bool contiguous = t.dims == 1 && (t.strides[0] == 1 || t.sizes[0] == 1);
  STD_TORCH_CHECK(t.number == Number::kFloat32 && contiguous && t.sizes[0] == w.outputs, "sparsekern: ", name,
                  " must have ", w.outputs, " contiguous entries of float32 on CPU");
  return static_cast<const float*>(t.data);
}

// T is the type of input, weight and result; `sparse` lacks its values.
template <class T>
void multiply_images(const SparseCall& call, const Grid& grid, const Plan& tiles, const ProductOperands& given,
                     SparseRows sparse, const PlannedRows& rows, void* result) {
  thread_local Buffer<float> buffer;
  const T* const values = static_cast<const T*>(given.weight.data);
  if constexpr (std::is_same_v<T, float>) sparse.values = values;
  const bool as_packed = given.weight.dims == 1 && !rows.order.begins;
  if (!as_packed || !sparse.values) sparse.values = gather_values(rows, call.shape, values, buffer);
  const Image<const T> from{static_cast<const T*>(given.input.data), call.in.strides};
  const Image<T> to{static_cast<T*>(result), call.out.strides};
  multiply(grid, tiles, from, call.in.channels, sparse, rows.rows, to, static_cast<const float*>(given.residual.data));
}

bool fits(const SparseCall& call, const ProductOperands& given) {
  return call.input.fits(given.input, call.number()) && call.weight.fits(given.weight, call.number());
}

// False if the plan is for other operands, or for tiles of another instruction set; else `allocate` gives memory for
// the result.
template <class Allocate>
bool product(const ProductOperands& given, Allocate allocate) {
  const SparseCall call = head(given.plan);
  const SparseShape& w = call.shape;
  if (!fits(call, given)) return false;
  if (given.residual.given) {
    STD_TORCH_CHECK(!call.bfloat16, "sparsekern: residual must be none with bfloat16");
    call.result.check(given.residual, "residual");
  }
  const SparseEpilogue epilogue{per_output(given.scale, "scale", w), static_cast<float>(given.low),
                                static_cast<float>(given.high)};
  const float* const bias = per_output(given.bias, "bias", w);
  const Grid grid = call.grid();
  Plan tiles = call.tiles(grid);
  PlannedRows rows;
  if (!sets(given.plan).next(w.block_rows(), rows) || !tiles.agree(rows.width)) return false;
  const SparseRows sparse{rows.pointers, rows.activations, nullptr, bias,       0,
                          w.tall,        w.wide,           true,    rows.order, epilogue};
  void* const result = allocate(call);
  if (!result) return false;
  if (call.bfloat16) {
    multiply_images<BFloat16>(call, grid, tiles, given, sparse, rows, result);
  } else {
    multiply_images<float>(call, grid, tiles, given, sparse, rows, result);
  }
  return true;
}

// Without values yet. torch's stable C++ has no such function.
Tensor empty_strided(const Form& form, bool bfloat16) {
  AtenTensorHandle handle;
  const int32_t dtype = bfloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(form.dims, form.sizes, form.strides, dtype, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

// None where `product` is false.
std::optional<Tensor> sparse_product_cpu(Tensor input, Tensor weight, Tensor plan, std::optional<Tensor> bias,
                                         std::optional<Tensor> scale, std::optional<Tensor> residual, double low,
                                         double high) {
  std::optional<Tensor> result;
  const auto allocate = [&](const SparseCall& call) {
    result = empty_strided(call.result, call.bfloat16);
    return result->mutable_data_ptr();
  };
  product(
      {operand(input), operand(weight), operand(plan), operand(bias), operand(scale), operand(residual), {}, low, high},
      allocate);
  return result;
}

// `result` is stored as the weight is, output by output.
bool sparse_weight_gradient_cpu(Tensor result, Tensor grad, Tensor input, Tensor plan) {
  const Operand planned = operand(plan);
  const SparseCall call = head(planned);
  call.weight.check(operand(result), "result");
  call.result.check(operand(grad), "grad");
  call.input.check(operand(input), "input");
  const SparseShape& w = call.shape;
  const int64_t row_size = result.dim() > 1 ? result.numel() / w.outputs : 0;
  STD_TORCH_CHECK(result.dim() == 1 || w.outputs == 1 || result.stride(0) == row_size,
                  "sparsekern: the outputs of a weight gradient must follow each other in memory");
  return sparse_weight_gradient(call.axis(0), call.axis(1), {input.const_data_ptr<float>(), call.in.strides}, w,
                                sets(planned), {grad.const_data_ptr<float>(), call.out.strides},
                                result.mutable_data_ptr<float>(), row_size, call.in.count);
}

bool sparse_input_gradient_cpu(Tensor result, Tensor grad, Tensor weight, Tensor plan) {
  const Operand planned = operand(plan);
  const SparseCall call = head(planned);
  call.input.check(operand(result), "result");
  call.result.check(operand(grad), "grad");
  call.weight.check(operand(weight), "weight");
  const GradientAxis rows = call.axis(0), columns = call.axis(1);
  const int64_t images = call.in.count, lanes = limits().lanes;
  if (!fills_input_gradient(rows, columns, call.out.strides, call.shape, call.in.strides, images, lanes)) {
    torch::stable::zero_(result);
  }
  return sparse_input_gradient(rows, columns, {grad.const_data_ptr<float>(), call.out.strides}, call.shape,
                               sets(planned), weight.const_data_ptr<float>(),
                               {result.mutable_data_ptr<float>(), call.in.strides}, images, lanes);
}

}  // namespace
}  // namespace sparsekern

namespace {

bool direct_fits(const sparsekern::ProductOperands* given) noexcept try {
  return sparsekern::fits(sparsekern::head(given->plan), *given);
} catch (...) {
  return false;
}

// What raises is refused here, and raises when it comes through the dispatcher.
bool direct_product(const sparsekern::ProductOperands* given) noexcept try {
  return sparsekern::product(*given, [&](const sparsekern::SparseCall& call) {
    return call.result.fits(given->result, call.number()) ? given->result.data : nullptr;
  });
} catch (...) {
  return false;
}

}  // namespace

using sparsekern::DirectProduct;
extern "C" __attribute__((visibility("default"))) const DirectProduct sparsekern_direct{direct_fits, direct_product};

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_sparse_plan_cpu", TORCH_BOX(&sparsekern::sparse_plan_cpu));
  m.impl("_sparse_product_cpu", TORCH_BOX(&sparsekern::sparse_product_cpu));
  m.impl("_sparse_weight_gradient_cpu", TORCH_BOX(&sparsekern::sparse_weight_gradient_cpu));
  m.impl("_sparse_input_gradient_cpu", TORCH_BOX(&sparsekern::sparse_input_gradient_cpu));
}
