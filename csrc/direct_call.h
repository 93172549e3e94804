// A forward pass asked for without torch's dispatcher: on the way through it, a call whose code has left the caches
// takes as long as a small layer. Shared by the operator library, which has no Python, and `_C`, which has no torch.
#pragma once
#include <cstdint>

namespace sparsekern {

enum class Number : int32_t { kOther, kFloat32, kBFloat16, kInt32 };

// A tensor on a CPU, or none. Sizes and strides (in elements) belong to whoever made it.
struct Operand {
  void* data;
  const int64_t *sizes, *strides;
  int32_t dims;
  Number number;
  bool given;
};

struct ProductOperands {
  Operand input, weight, plan, bias, scale, residual, result;
  double low, high;
};

// What `_C` calls. `fits`: input and weight are as those that the plan was made for. `product` is false if nothing was
// done: an operand is not as planned, or the plan is for another instruction set.
struct DirectProduct {
  bool (*fits)(const ProductOperands* operands) noexcept;
  bool (*product)(const ProductOperands* operands) noexcept;
};

}  // namespace sparsekern
