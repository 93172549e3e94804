// The number type of a tensor, as kernels take it.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd/kernels.h"

namespace sparsekern {

using torch::stable::Tensor;

// `op` names the operator in the error.
inline Dtype dtype_of(const char* op, const Tensor& t) {
  using ScalarType = torch::headeronly::ScalarType;
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
      STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace sparsekern
