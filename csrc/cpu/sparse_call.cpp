#include "sparse_call.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace sparsekern {

static_assert(std::is_trivially_copyable_v<SparseCall>);

namespace {

Form form_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() <= 4, "sparsekern: expected at most 4 dims, got ", t.dim());
  Form form{t.dim(), {}, {}};
  std::ranges::copy(t.sizes(), form.sizes);
  std::ranges::copy(t.strides(), form.strides);
  return form;
}

}  // namespace

bool Form::fits(const Tensor& t, ScalarType type) const {
  if (t.scalar_type() != type || !t.is_cpu() || t.dim() != dims) return false;
  const auto found = t.sizes(), steps = t.strides();
  for (int64_t i = 0; i < dims; ++i) {
    if (found[i] != sizes[i] || (steps[i] != strides[i] && sizes[i] != 1)) return false;
  }
  return true;
}

void Form::check(const Tensor& t, const char* name, ScalarType type) const {
  STD_TORCH_CHECK(fits(t, type), "sparsekern: ", name, " does not lie as its plan says");
}

void check_values(const Tensor& t, const char* name, int64_t dims, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_cpu() && t.dim() == dims, "sparsekern: ", name, " must be ",
                  type == ScalarType::Float ? "float32" : "bfloat16", " on CPU with ", dims, " dims");
}

void check_ints(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu() && t.dim() == 1 && t.is_contiguous(),
                  "sparsekern: structure must be contiguous, 1-d, int32 and on CPU");
}

SparseCall sparse_call(const Tensor& input, const Tensor& result, const Tensor& weight, ScalarType type,
                       const std::string& layout, const Ints& shape, const Ints& geometry, int64_t groups) {
  const int32_t tall = layout == "4x1" ? 4 : 1, wide = layout == "1x4" ? 4 : 1;
  STD_TORCH_CHECK(shape.size() == 4 && groups > 0 && shape[0] % (groups * tall) == 0 && shape[1] % wide == 0,
                  "sparsekern: layout ", layout, " must divide the channels of a group");
  STD_TORCH_CHECK(geometry.size() == 6, "sparsekern: geometry must have six entries");
  check_values(input, "input", 4, type);
  check_values(result, "result", 4, type);
  const bool packed = weight.dim() == 1;
  check_values(weight, "weight", weight.dim(), type);
  STD_TORCH_CHECK(packed || weight.numel() == shape[0] * shape[1] * shape[2] * shape[3],
                  "sparsekern: weight must have its shape or be packed");
  STD_TORCH_CHECK(input.size(1) == shape[1] * groups && result.size(0) == input.size(0) && result.size(1) == shape[0] &&
                      result.numel() > 0,
                  "sparsekern: input, weight and result must agree in batch and channels");
  const int64_t step = packed || tall * wide == 1 ? 1 : weight.stride(tall == 4 ? 0 : 1);
  SparseCall call{form_of(input), form_of(result), form_of(weight), {shape[0], shape[1], groups, tall, wide, step}};
  call.bfloat16 = type == ScalarType::BFloat16;
  for (int i = 0; i < 2; ++i) {
    const int64_t kernel = call.kernel[i] = shape[i + 2], stride = call.stride[i] = geometry[i];
    const int64_t padding = call.padding[i] = geometry[i + 2], dilation = call.dilation[i] = geometry[i + 4];
    const int64_t size = input.size(i + 2), output = result.size(i + 2);
    STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0 && output > 0 &&
                        (output - 1) * stride + (kernel - 1) * dilation < size + 2 * padding,
                    "sparsekern: geometry of dim ", i + 2, " does not give ", output, " outputs");
  }
  return call;
}

SparseCall head(const Tensor& plan) {
  check_ints(plan);
  STD_TORCH_CHECK(plan.numel() >= kHeadInts, "sparsekern: plan is too small");
  SparseCall call;
  std::memcpy(&call, plan.const_data_ptr<int32_t>(), sizeof call);
  return call;
}

GradientAxis SparseCall::axis(int i) const {
  const int64_t size = input.sizes[i + 2];
  Ints positions;
  for (int64_t k = 0; k < kernel[i]; ++k) positions.push_back(k * dilation[i]);
  return {Axis(size, result.sizes[i + 2], stride[i], padding[i], positions), size, kernel[i], dilation[i]};
}

PlanReader sets(const Tensor& plan) {
  return PlanReader(plan.const_data_ptr<int32_t>() + kHeadInts, plan.numel() - kHeadInts);
}

}  // namespace sparsekern
