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

Images images_of(const Tensor& t) {
  return {t.size(0), t.size(1), {t.size(2), t.size(3)}, {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

Images rows_of(const Tensor& t) {
  const int64_t channels = t.size(t.dim() - 1), all = t.numel(), rows = all / std::max<int64_t>(channels, 1);
  return {1, channels, {1, rows}, {all, 1, all, channels}};
}

}  // namespace

bool Form::fits(const Operand& t, Number number) const {
  if (!t.given || t.number != number || t.dims != dims) return false;
  for (int64_t i = 0; i < dims; ++i) {
    if (t.sizes[i] != sizes[i] || (t.strides[i] != strides[i] && sizes[i] != 1)) return false;
  }
  return true;
}

void Form::check(const Operand& t, const char* name) const {
  STD_TORCH_CHECK(fits(t, Number::kFloat32), "sparsekern: ", name, " does not lie as its plan says");
}

Operand operand(const Tensor& t) {
  Number number = Number::kOther;
  if (t.is_cpu()) {
    const ScalarType type = t.scalar_type();
    if (type == ScalarType::Float) number = Number::kFloat32;
    if (type == ScalarType::BFloat16) number = Number::kBFloat16;
    if (type == ScalarType::Int) number = Number::kInt32;
  }
  return {const_cast<void*>(t.const_data_ptr()), t.sizes().data(), t.strides().data(),
          static_cast<int32_t>(t.dim()),         number,           true};
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
                       const std::string& layout, Ints shape, Ints geometry, int64_t groups) {
  const bool linear = shape.size() == 2;
  if (linear) {
    STD_TORCH_CHECK(geometry.empty() && input.dim() > 0 && input.is_contiguous() && result.is_contiguous(),
                    "sparsekern: input and result of a linear layer must be contiguous");
    shape.insert(shape.end(), {1, 1});
    geometry = {1, 1, 0, 0, 1, 1};
  }
  const int32_t tall = layout == "4x1" ? 4 : 1, wide = layout == "1x4" ? 4 : 1;
  STD_TORCH_CHECK(shape.size() == 4 && groups > 0 && shape[0] % (groups * tall) == 0 && shape[1] % wide == 0,
                  "sparsekern: layout ", layout, " must divide the channels of a group");
  STD_TORCH_CHECK(geometry.size() == 6, "sparsekern: geometry must have six entries");
  check_values(input, "input", linear ? input.dim() : 4, type);
  check_values(result, "result", input.dim(), type);
  check_values(weight, "weight", weight.dim(), type);
  const bool packed = weight.dim() == 1;
  STD_TORCH_CHECK(packed || weight.numel() == shape[0] * shape[1] * shape[2] * shape[3],
                  "sparsekern: weight must have its shape or be packed");
  const int64_t step = packed || tall * wide == 1 ? 1 : weight.stride(tall == 4 ? 0 : 1);
  SparseCall call{form_of(input),
                  form_of(result),
                  form_of(weight),
                  linear ? rows_of(input) : images_of(input),
                  linear ? rows_of(result) : images_of(result),
                  {shape[0], shape[1], groups, tall, wide, step}};
  const Images &in = call.in, &out = call.out;
  STD_TORCH_CHECK(
      in.channels == shape[1] * groups && out.count == in.count && out.channels == shape[0] && result.numel() > 0,
      "sparsekern: input, weight and result must agree in batch and channels");
  call.bfloat16 = type == ScalarType::BFloat16;
  for (int i = 0; i < 2; ++i) {
    const int64_t kernel = call.kernel[i] = shape[i + 2], stride = call.stride[i] = geometry[i];
    const int64_t padding = call.padding[i] = geometry[i + 2], dilation = call.dilation[i] = geometry[i + 4];
    STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0 && out.size[i] > 0 &&
                        (out.size[i] - 1) * stride + (kernel - 1) * dilation < in.size[i] + 2 * padding,
                    "sparsekern: geometry of dim ", i + 2, " does not give ", out.size[i], " outputs");
  }
  return call;
}

SparseCall head(const Operand& plan) {
  STD_TORCH_CHECK(plan.number == Number::kInt32 && plan.dims == 1 && plan.strides[0] == 1 && plan.sizes[0] >= kHeadInts,
                  "sparsekern: plan must be contiguous, 1-d, int32, on CPU and have a head");
  SparseCall call;
  std::memcpy(&call, plan.data, sizeof call);
  return call;
}

GradientAxis SparseCall::axis(int i) const {
  Ints positions;
  for (int64_t k = 0; k < kernel[i]; ++k) positions.push_back(k * dilation[i]);
  return {Axis(in.size[i], out.size[i], stride[i], padding[i], positions), in.size[i], kernel[i], dilation[i]};
}

PlanReader sets(const Operand& plan) {
  return PlanReader(static_cast<const int32_t*>(plan.data) + kHeadInts, plan.sizes[0] - kHeadInts);
}

}  // namespace sparsekern
