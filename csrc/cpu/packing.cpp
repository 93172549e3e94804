// Masks between bool tensors and packed bits on CPU; sparsekern/ops/packing.py says what lies where.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "dispatch.h"

namespace sparsekern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1024;  // words of 64 elements per task

void check(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.is_contiguous() && t.scalar_type() == type, "sparsekern: ", name,
                  " must be contiguous, on CPU and of one dim");
}

template <class Body>
void each_part(int64_t count, Body body) {
  torch::stable::parallel_for(0, (count + 63) / 64, kGrain,
                              [&](int64_t begin, int64_t end) { body(begin * 64, std::min(end * 64, count)); });
}

Tensor mask_to_bits_cpu(Tensor mask) {
  check(mask, "mask", ScalarType::Bool);
  Tensor packed = torch::stable::new_empty(mask, {(mask.numel() + 7) / 8}, ScalarType::Byte);
  const auto* const from = static_cast<const uint8_t*>(mask.const_data_ptr());
  uint8_t* const to = packed.mutable_data_ptr<uint8_t>();
  each_part(mask.numel(), [&](int64_t begin, int64_t end) { kernels().mask_to_bits(from, begin, end, to); });
  return packed;
}

void mask_to_bytes_cpu(Tensor mask, Tensor packed) {
  check(mask, "mask", ScalarType::Bool);
  check(packed, "packed", ScalarType::Byte);
  STD_TORCH_CHECK(packed.numel() == (mask.numel() + 7) / 8, "sparsekern: packed must have a bit per element of mask");
  const uint8_t* const from = packed.const_data_ptr<uint8_t>();
  auto* const to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  each_part(mask.numel(), [&](int64_t begin, int64_t end) { kernels().mask_to_bytes(from, begin, end, to); });
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_mask_to_bits_cpu", TORCH_BOX(&sparsekern::mask_to_bits_cpu));
  m.impl("_mask_to_bytes_cpu", TORCH_BOX(&sparsekern::mask_to_bytes_cpu));
}
