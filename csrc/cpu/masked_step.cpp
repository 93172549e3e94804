#include "masked_step.h"

namespace sparsekern {
namespace {

using ScalarType = torch::headeronly::ScalarType;

// Element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  // torch 2.10 has no operator== for sizes.
  if (a.scalar_type() != b.scalar_type() || !a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the elements fill their memory, in any order of the dimensions: the kernel walks it from end to end.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t inside = 1;
    for (size_t e = 0; e < sizes.size(); ++e) inside *= strides[e] < strides[d] ? sizes[e] : 1;
    if (sizes[d] != 1 && strides[d] != inside) return false;
  }
  return true;
}

}  // namespace

Dtype step_dtype(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": params must be float32, float64, bfloat16 or float16");
  }
}

double step_scalar(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, op, ": grad_scale and found_inf must hold one element");
  if (t.scalar_type() == ScalarType::Double) return *t.const_data_ptr<double>();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": grad_scale and found_inf must be float32");
  return *t.const_data_ptr<float>();
}

void check_step_param(const char* op, const std::vector<Tensor>& params, size_t i) {
  STD_TORCH_CHECK(params[i].is_cpu() && is_dense(params[i]), op, ": params[", i, "] must fill its memory, on the CPU");
}

void check_step_operand(const char* op, const char* name, const std::vector<Tensor>& params,
                        const std::vector<Tensor>& values, size_t i) {
  STD_TORCH_CHECK(same_layout(params[i], values[i]), op, ": ", name, "[", i, "] must have the layout of params[", i,
                  "]");
}

const uint8_t* step_mask(const char* op, const Tensor& param, const std::optional<Tensor>& mask, size_t i) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Byte && mask->is_contiguous() && mask->numel() == (param.numel() + 7) / 8, op,
      ": masks[", i, "] must be contiguous uint8 with one bit per weight");
  return mask->const_data_ptr<uint8_t>();
}

}  // namespace sparsekern
