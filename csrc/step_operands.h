// Checks of the operands of the masked optimizer steps, on any device. Header only: two libraries use it.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/simd/kernels.h"

namespace sparsekern {

using torch::stable::Tensor;

// Element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  // torch 2.10 has no operator== for sizes.
  if (a.scalar_type() != b.scalar_type() || !a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the elements fill their memory, in any order of the dimensions: the kernel walks it from end to end.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t inside = 1;
    for (size_t e = 0; e < sizes.size(); ++e) inside *= strides[e] < strides[d] ? sizes[e] : 1;
    if (sizes[d] != 1 && strides[d] != inside) return false;
  }
  return true;
}

// One of the number types of a parameter; `op` names the operator in errors, here and below.
inline Dtype step_dtype(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::kFloat32;
    case torch::headeronly::ScalarType::Double:
      return Dtype::kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": params must be float32, float64, bfloat16 or float16");
  }
}

// `values[i]` is like params[i] in type, shape and layout.
inline void check_step_operand(const char* op, const char* name, const std::vector<Tensor>& params,
                               const std::vector<Tensor>& values, size_t i) {
  STD_TORCH_CHECK(same_layout(params[i], values[i]), op, ": ", name, "[", i, "] must have the layout of params[", i,
                  "]");
}

// The bits of one mask, null without one.
inline const uint8_t* step_mask(const char* op, const Tensor& param, const std::optional<Tensor>& mask, size_t i) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Byte && mask->is_contiguous() &&
                      mask->numel() == (param.numel() + 7) / 8,
                  op, ": masks[", i, "] must be contiguous uint8 with one bit per weight");
  return mask->const_data_ptr<uint8_t>();
}

}  // namespace sparsekern
